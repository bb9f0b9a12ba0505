"""What benchmarks count and compare: tokens, operations, ratios, and the rows and models that they make."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.model.batch import packed_batch
from prefopt.model.head import head_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def task(**options: Any) -> Any:
    shapes, sides = module("shapes"), module("sides")
    groups = shapes.made_pairs(shapes.PROFILES["HH-like"], 8, 500, scale=0.1)
    values: dict[str, Any] = {"steps": 4, "batch": 2, "trl_batch": 2, **options}
    return sides.Task("tiny-llama", [sides.as_row(group) for group in groups], **values)


def test_a_row_of_a_task_is_its_group_again() -> None:
    shapes, sides = module("shapes"), module("sides")
    group = shapes.made_group(np.random.default_rng(0), 500, 7, [3, 5, 4])
    again = sides.groups_of([sides.as_row(group)])[0]
    assert again.prompt_ids.tolist() == group.prompt_ids.tolist()
    assert [ids.tolist() for ids in again.response_ids] == [ids.tolist() for ids in group.response_ids]
    assert again.unique_tokens == 7 + 3 + 5 + 4 and again.feedback.ranking == (1, 2, 3)


def test_speeds_leave_out_the_warm_up_and_count_the_same_work_for_both_sides() -> None:
    sides = module("sides")
    given = task(warm_up=1)
    fast = sides.Outcome("prefopt", losses=(0.7,) * 4, seconds=(9.0, 1.0, 1.0, 1.0), peak_bytes=2**30)
    slow = sides.Outcome("trl-live", losses=(0.7, 0.7, 0.6, 0.7), seconds=(1.0, 4.0, 4.0, 4.0), peak_bytes=2**32)
    assert fast.pairs_per_second(given) == 2.0
    assert fast.flops_per_second(given) / slow.flops_per_second(given) == pytest.approx(4.0)
    assert 3 * fast.flops_per_second(given) == pytest.approx(sides.task_flops(given, first_step=1))
    ours, theirs = sides.comparison(given, [fast, slow], peak=1e12)
    assert theirs[sides.HEADER.index("prefopt is")] == "4.00 x"
    assert theirs[sides.HEADER.index("prefopt uses")] == "25%"
    assert float(theirs[sides.HEADER.index("loss differs by")]) == pytest.approx(0.1)
    assert ours[sides.HEADER.index("prefopt is")] == ""


def test_a_side_without_figures_says_why_and_leaves_the_other_ones_in_the_table() -> None:
    sides = module("sides")
    given = task()
    sound = sides.Outcome("trl-live", losses=(0.7,) * 4, seconds=(1.0,) * 4, peak_bytes=2**30)
    rows = sides.comparison(given, [sides.Outcome("prefopt", error="first\nlast line"), sound], peak=1e12)
    assert rows[0][:2] == ["prefopt", "last line"]
    assert rows[1][1] == "2" and rows[1][2] == ""
    assert all(len(row) == len(sides.HEADER) for row in rows)


def test_smaller_passes_always_divide_a_step() -> None:
    given = task(batch=12, trl_batch=12)
    sizes = []
    while given is not None:
        sizes.append(given.trl_batch)
        given = given.with_smaller_passes()
    assert sizes == [12, 6, 3, 1]
    with pytest.raises(ValueError, match="cannot be made of passes of 3"):
        task(batch=8, trl_batch=3)


def test_passes_within_a_number_of_tokens_are_the_largest_that_keep_it() -> None:
    lengths = module("lengths")
    rows = [{"prompt": [0] * 5, "responses": [[0] * 5, [0]]}, {"prompt": [0], "responses": [[0], [0] * 2]}] * 4
    assert lengths.pairs_within(rows, 8, tokens=160) == 8  # 16 rows of 10 tokens
    assert lengths.pairs_within(rows, 8, tokens=159) == 4
    assert lengths.pairs_within(rows, 6, tokens=79) == 3
    assert lengths.pairs_within(rows, 8, tokens=1) == 1


@pytest.mark.parametrize("name", ["HH-like", "UltraFeedback-like", "prompt 2000, response 200"])
def test_made_pairs_have_the_lengths_of_their_profile(name: str) -> None:
    shapes = module("shapes")
    profile = shapes.PROFILES[name]
    groups = shapes.made_pairs(profile, 4000, 500)
    chosen = [len(group.response_ids[0]) for group in groups]
    assert min(chosen) >= 2 and max(len(group.prompt_ids) for group in groups) <= profile.longest
    # Cutting the longest rows lowers the mean of wide distributions.
    assert 0.5 < np.mean(chosen) / profile.chosen < 1.05
    assert 0.5 < np.mean([len(group.prompt_ids) for group in groups]) / profile.prompt < 1.05
    assert (np.std(chosen) == 0) == (profile.response_spread == 0)


def test_made_pairs_are_the_same_at_every_call() -> None:
    shapes = module("shapes")
    first, second = (shapes.made_pairs(shapes.PROFILES["HH-like"], 5, 500) for _ in range(2))
    assert [group.prompt_ids.tolist() for group in first] == [group.prompt_ids.tolist() for group in second]


@pytest.mark.parametrize(
    ("name", "weights"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("qwen3-0.6b", 596_049_920)]
)
def test_shapes_have_the_published_number_of_weights(name: str, weights: int) -> None:
    shapes = module("shapes")
    assert shapes.counted_weights(shapes.shape_config(name)) == (weights, 0)


def test_an_adapter_is_counted_as_peft_makes_it() -> None:
    shapes = module("shapes")
    peft = pytest.importorskip("peft")
    config = shapes.shape_config("tiny-qwen3")
    model = AutoModelForCausalLM.from_config(config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shapes.counted_weights(config, 4)[1] == adapted.get_nb_trainable_parameters()[0]


def test_random_models_are_the_same_at_every_call_and_their_logits_are_of_the_order_of_1() -> None:
    shapes = module("shapes")
    first, second = (shapes.random_model("tiny-llama", precision="fp32") for _ in range(2))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    batch = packed_batch([shapes.made_group(np.random.default_rng(0), 500, 20, [30])], first.device)
    with torch.no_grad():
        logits = first.hidden_states(batch) @ head_of(first.model).weight.T
    assert 0.3 < float(logits.std()) < 3
