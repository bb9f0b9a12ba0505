"""The KL estimate against the exact KL of models that can be enumerated, and the whole evaluation on equal models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from prefopt.core.errors import ConfigError
from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.evaluate.evaluation import evaluate, kl_section, log_ratios
from prefopt.model.engine import LanguageModel
from prefopt.rollout.rewards import load_reward
from prefopt.rollout.sample import sample
from tiny_word_model import language_model

PROMPTS = ["a b", "c", "d e a", "b b", "e", "a c e b"]
LENGTH = load_reward("length")


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    return language_model(seed=0)


@pytest.fixture(scope="module")
def reference() -> LanguageModel:
    return language_model(seed=1)


@torch.no_grad()
def next_logps(model: LanguageModel, ids: list[int]) -> list[float]:
    return [float(value) for value in torch.log_softmax(model.model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)]


def exact(policy: LanguageModel, reference: LanguageModel, ids: list[int], horizon: int) -> tuple[float, float]:
    """KL(policy || reference) and expected tokens of what follows `ids`, by walking every continuation."""
    nats = tokens = 0.0
    for token, (ours, theirs) in enumerate(zip(next_logps(policy, ids), next_logps(reference, ids), strict=True)):
        more = (0.0, 0.0) if token == 1 or horizon == 1 else exact(policy, reference, [*ids, token], horizon - 1)
        nats += math.exp(ours) * (ours - theirs + more[0])
        tokens += math.exp(ours) * (1 + more[1])
    return nats, tokens


def test_the_estimate_agrees_with_the_exact_kl(policy: LanguageModel, reference: LanguageModel) -> None:
    draws, horizon = 2000, 3
    rows = sample(policy, ["a b"], n=draws, max_new_tokens=horizon, batch_size=500)
    ratios = log_ratios(policy, reference, rows, micro_batch_tokens=8000)
    lengths = [len(row.response_ids) for row in rows]
    # independent draws for one prompt: each is its own cluster here
    found = kl_section(ratios, lengths, range(draws))
    nats, tokens = exact(policy, reference, rows[0].prompt_ids.tolist(), horizon)
    response, token = found["per_response"], found["per_token"]
    assert nats > 20 * response["standard_error"], "otherwise agreement would mean little"
    assert abs(response["value"] - nats) < 3 * response["standard_error"]
    assert abs(token["value"] - nats / tokens) < 3 * token["standard_error"]
    # the errors are right: 40 estimates from 50 draws each scatter as one of them claims
    parts = [kl_section(ratios[at::40], lengths[at::40], range(draws // 40)) for at in range(40)]
    for kind in ("per_response", "per_token"):
        scatter = np.std([part[kind]["value"] for part in parts], ddof=1)
        claimed = np.mean([part[kind]["standard_error"] for part in parts])
        assert 0.65 < scatter / claimed < 1.5


def test_kl_is_clustered_by_prompt() -> None:
    ratios, lengths = [1.0, 3.0, 2.0], [2, 4, 3]
    once = kl_section(ratios, lengths, [0, 1, 2])
    copied = kl_section(np.repeat(ratios, 4), np.repeat(lengths, 4).tolist(), np.repeat([0, 1, 2], 4).tolist())
    for kind in ("per_response", "per_token"):
        assert copied[kind] == pytest.approx(once[kind])
    assert once["per_response"] == pytest.approx({"value": 2.0, "standard_error": 1 / math.sqrt(3), "n": 3})
    assert once["per_token"]["value"] == 6 / 9
    assert kl_section([1.0, 2.0], [1, 1], [0, 0])["per_response"]["standard_error"] is None


def test_equal_models_have_no_kl_no_margin_and_no_bias(policy: LanguageModel) -> None:
    result, rows = evaluate(
        policy, policy, pairs=pairs(), prompts=PROMPTS, reward=LENGTH, samples_per_prompt=2, max_new_tokens=4
    )
    assert result["kl"]["per_response"] == {"value": 0.0, "standard_error": 0.0, "n": 6}
    assert result["kl"]["per_token"] == {"value": 0.0, "standard_error": 0.0}
    assert result["heldout"]["accuracy"]["value"] == 0.5
    assert math.isclose(result["heldout"]["loss"], math.log(2))
    assert [row["kl"] for row in rows] == [0.0] * 12
    # independent draws, yet the same at temperature 0
    assert any(row["policy"] != row["reference"] for row in rows)
    greedy, _ = evaluate(policy, policy, prompts=PROMPTS, reward=LENGTH, temperature=0, max_new_tokens=4)
    assert greedy["win_rate"]["ties"] == 6
    assert greedy["win_rate"]["rate"]["value"] == 0.5


def pairs() -> list[TokenGroup]:
    random = np.random.default_rng(0)

    def ids(size: int) -> np.ndarray:
        return random.integers(1, 7, size, dtype=np.int32)

    return [
        TokenGroup(ids(3), (ids(4), ids(6)), (np.ones(4, np.bool_), np.ones(6, np.bool_)), Feedback("pair")) for _ in range(9)
    ]


def test_the_whole_result_is_json_and_follows_its_seed(policy: LanguageModel, reference: LanguageModel) -> None:
    def run(seed: int) -> tuple[dict[str, object], list[dict[str, object]]]:
        return evaluate(policy, reference, prompts=PROMPTS, reward=LENGTH, max_new_tokens=4, seed=seed, pairs=pairs())

    first, rows = run(3)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert set(first) == {
        "checkpoint", "settings", "heldout", "diagnosis", "reward", "win_rate", "kl", "length", "finished", "diversity"
    }  # fmt: skip
    assert [row["prompt"] for row in rows] == PROMPTS
    assert run(3) == (first, rows)
    assert run(4)[1] != rows


def test_kl_is_left_out_with_a_note_away_from_temperature_1(policy: LanguageModel, reference: LanguageModel) -> None:
    for settings in ({"temperature": 0.7}, {"top_p": 0.9}):
        result, rows = evaluate(policy, reference, prompts=PROMPTS, max_new_tokens=3, **settings)  # type: ignore[arg-type]
        assert "kl" not in result
        assert "temperature 1" in result["notes"][0]
        assert all(row["kl"] is None for row in rows)


def test_held_out_pairs_alone_need_no_samples(policy: LanguageModel, reference: LanguageModel) -> None:
    result, rows = evaluate(policy, reference, pairs=pairs(), beta=0.5)
    assert rows == []
    assert set(result) == {"checkpoint", "settings", "heldout", "diagnosis"}
    sums = [[math.fsum(scores) for scores in group] for model in (policy, reference) for group in model.score(pairs())]
    m = np.diff(np.array(sums[9:]) - np.array(sums[:9]))[:, 0]
    assert math.isclose(result["heldout"]["margin"]["value"], m.mean(), rel_tol=1e-6)


def test_calls_that_mean_nothing_are_refused(policy: LanguageModel) -> None:
    single = TokenGroup(np.ones(1, np.int32), (np.ones(1, np.int32),), (np.ones(1, np.bool_),), Feedback("demonstration"))
    for arguments, said in (
        ({}, "neither"),
        ({"pairs": pairs(), "reward": LENGTH}, "no prompts"),
        ({"pairs": []}, "needs pairs"),
        ({"pairs": [single]}, "needs pairs"),
        ({"prompts": []}, "empty"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate(policy, policy, **arguments)  # type: ignore[arg-type]
