"""The operations that a step cannot do without, counted against what the model's own passes do."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from model.tiny_models import language_model, token_group
from prefopt.core.config import LoraConfig
from prefopt.data.encode import TokenGroup
from prefopt.model.adapters import add_lora
from prefopt.model.head import head_of
from prefopt.train.flops import attended_pairs, training_flops


def group() -> TokenGroup:
    return token_group(np.random.default_rng(0), 40, (30,))


@pytest.mark.parametrize("lora", [False, True])
def test_they_are_those_of_the_real_passes(lora: bool) -> None:
    """One long response in its prompt is plainly causal: matrix products do what was counted, and nothing is computed twice."""
    model = language_model("llama")
    model.__dict__["sharing"] = True
    weights = model.model.num_parameters()
    if lora:
        add_lora(model, LoraConfig(r=4), seed=0)
    adapter = sum(weight.numel() for weight in model.model.parameters() if weight.requires_grad) if lora else 0
    rows = [group()]
    batch = model.batch(rows)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(batch)
        head_of(model.model).logps(hidden[batch.predictor_N], batch.target_N).sum().backward()
    by_kind = counter.get_flop_counts()["Global"]
    products = sum(count for kind, count in by_kind.items() if "mm" in str(kind))
    attention = 12.0 * 2 * 32 * attended_pairs(rows[0])
    counted = training_flops(model.model.config, weights, rows, adapter=adapter) - attention
    # Norms multiply by weights that are no matrices, the head's gradients may be frozen, LoRA's first layer has no input gradient.
    assert products == pytest.approx(counted, rel=0.03 if not lora else 0.12)


def test_a_shared_prompt_counts_once() -> None:
    random = np.random.default_rng(0)
    pair, single = token_group(random, 10, (4, 6)), token_group(random, 10, (4,))
    assert attended_pairs(pair) == 55 + 4 * 10 + 10 + 6 * 10 + 21
    assert attended_pairs(single) == attended_pairs(token_group(random, 14, (1,))) - 15 + 0.0
    config = language_model("llama").model.config
    weights = 10_000
    one, two = (training_flops(config, weights, [group]) for group in (single, pair))
    decoder = weights - 2 * 61 * 32
    scored = [sum(int(flags.sum()) for flags in group.scored) for group in (single, pair)]
    attention = 12.0 * 2 * 32 * (attended_pairs(pair) - attended_pairs(single))
    assert two - one == 6.0 * decoder * 6 + 6.0 * 61 * 32 * (scored[1] - scored[0]) + attention


def test_a_reward_model_has_no_vocabulary_head() -> None:
    config = language_model("llama").model.config
    without = training_flops(config, 10_000, [group()], head=False)
    assert without == 6.0 * (10_000 - 61 * 32) * 70 + 12.0 * 64 * attended_pairs(group())
