"""What a step says of KTO, TDPO and imitation is what plain transformers gives, row by row; kept references are live ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from prefopt.data.encode import TokenGroup
from prefopt.pipeline import train_run
from train.rows_of_kinds import labels, pairs, rankings, rows_for, scores
from train.tiny_objectives import Models, assert_same_gradients, run, step_of
from train.tiny_runs import preference_rows, tiny_config, write_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    return Models.made_in(tmp_path_factory.mktemp("plain"))


class Plain:
    """transformers' own model and its log-probs of whole rows, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logps(self, group: TokenGroup, response: int = 0) -> torch.Tensor:
        """Log-probs of the vocabulary at each scored token of a response, shape (tokens, V)."""
        ids = np.concatenate([group.prompt_ids, group.response_ids[response]])
        row = torch.as_tensor(ids, dtype=torch.long)
        logits = self.model(input_ids=row[None], use_cache=False).logits[0].double()
        places = len(group.prompt_ids) + torch.as_tensor(np.flatnonzero(group.scored[response]))
        return torch.log_softmax(logits[places - 1], dim=-1)

    def total(self, group: TokenGroup, response: int = 0) -> float:
        """Log-prob of a response, summed over its scored tokens."""
        scored = torch.as_tensor(group.response_ids[response][group.scored[response]], dtype=torch.long)
        return float(self.logps(group, response).gather(1, scored[:, None]).sum())


@pytest.fixture(scope="module")
def policy(models: Models) -> Plain:
    return Plain(models.folder / "model")


@pytest.fixture(scope="module")
def reference(models: Models) -> Plain:
    return Plain(models.folder / "near")


def other_prompts(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The groups under other prompts, which must be other ones, with the same responses."""
    others = []
    for group in groups:
        other = group.mismatched
        assert other is not None and not np.array_equal(other.prompt_ids, group.prompt_ids)
        assert all(np.array_equal(*both) for both in zip(other.response_ids, group.response_ids, strict=True))
        others.append(other)
    return others


@pytest.mark.parametrize("kind", ["label", "pair"])
def test_ktos_kl_is_the_mean_log_ratio_under_other_prompts_and_at_least_0(
    models: Models, policy: Plain, reference: Plain, kind: str
) -> None:
    training = models.training(
        {"name": "kto"}, rows_for({"name": "kto"}, kind, 16), train={"groups_per_step": 2, "max_steps": 8}
    )
    means = []
    for step in range(8):
        groups = training.groups_of(step)
        values, _ = step_of(training, groups)
        ratios = [
            policy.total(other, response) - reference.total(other, response)
            for other in other_prompts(groups)
            for response in range(len(other.response_ids))
        ]
        means.append(float(np.mean(ratios)))
        assert values.metrics()["kl"] == values.statistics["kl"] == pytest.approx(max(0.0, means[-1]), abs=1e-4)
        own = [policy.total(group) - reference.total(group) for group in groups]
        gains = [0.1 * (ratio - values.statistics["kl"]) for ratio in own]
        if kind == "label":
            signs = [-1 if group.feedback.label else 1 for group in groups]
            losses = [1 / (1 + math.exp(-sign * gain)) for sign, gain in zip(signs, gains, strict=True)]
            assert values.total == pytest.approx(np.mean(losses), abs=1e-5)
    assert min(means) < -0.02 and max(means) > 0.1, "steps of both signs, so that the bound at 0 is seen"


@pytest.mark.parametrize(("desirable", "of"), [(1, 4), (2, 3), (9, 10)])
def test_every_step_of_kto_mixes_labels_in_their_proportion(models: Models, desirable: int, of: int) -> None:
    """The count of desirable rows of a step is within 1 of its expectation, so that none is without either class for long."""
    rows = labels(60, desirable=desirable, of=of)
    training = models.training({"name": "kto"}, rows, train={"groups_per_step": 10, "max_steps": None, "epochs": 3.0})
    for step in range(training.total_steps):
        good = sum(bool(group.feedback.label) for group in training.groups_of(step))
        assert abs(good - 10 * desirable / of) <= 1


def test_a_step_of_kto_on_pairs_has_as_many_of_each(models: Models) -> None:
    training = models.training({"name": "kto"}, pairs(12))
    values, _ = step_of(training, training.groups_of(0))
    assert sorted(values.target) == [0.0] * 4 + [1.0] * 4


def test_a_run_of_kto_logs_its_kl_at_every_step_and_on_held_out_rows(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "labels.jsonl", labels(40))
    data = {"train": str(rows), "eval_rows": 8}
    folder = train_run(tiny_config(tmp_path, loss={"name": "kto"}, data=data, train={"max_steps": 3}))
    events = folder.events()
    kl = [event["kl"] for event in events if event["kind"] == "step"]
    assert len(kl) == 3 and all(value >= 0 for value in kl) and kl[0] == pytest.approx(0, abs=1e-5)
    assert max(kl) > 1e-4
    measured = [event for event in events if event["kind"] == "eval"]
    assert [event["step"] for event in measured] == [0, 1, 2, 3]
    assert all(event["eval/kl"] >= 0 and 0 <= event["eval/rewards/accuracies"] <= 1 for event in measured)
    assert all(event["margins"] == [] for event in measured), "labels are not pairs"


@pytest.mark.parametrize(
    ("name", "rows"), [("kto", labels()), ("kto", pairs()), ("plackett_luce", scores()), ("bco", labels())]
)
def test_a_kept_reference_gives_the_step_of_a_live_one(models: Models, name: str, rows: list[Any]) -> None:
    kept = models.training({"name": name}, rows)
    live = models.training({"name": name}, rows, reference={"kind": "live"})
    groups = kept.groups_of(1)
    (ours, one), (theirs, other) = step_of(kept, groups), step_of(live, groups)
    assert ours.total == pytest.approx(theirs.total, abs=1e-6)
    assert ours.statistics == pytest.approx(theirs.statistics, abs=1e-5)
    np.testing.assert_allclose(ours.ratio, theirs.ratio, atol=1e-4)
    assert_same_gradients(one, other)


def test_the_loss_of_a_ranking_is_that_of_its_order(models: Models, policy: Plain, reference: Plain) -> None:
    """- sum over places of log(exp(beta r_k) / sum of exp(beta r_j) of those not better), from plain log-probs."""
    training = models.training({"name": "plackett_luce", "beta": 0.3}, rankings(6))
    groups = training.groups_of(0)
    values, _ = step_of(training, groups)
    for group, loss in zip(groups, values.loss, strict=True):
        places = np.argsort(group.feedback.ranking)
        rewards = np.array([0.3 * (policy.total(group, place) - reference.total(group, place)) for place in places])
        wanted = sum(np.log(np.exp(rewards[k:]).sum()) - rewards[k] for k in range(len(rewards)))
        assert loss == pytest.approx(wanted, abs=1e-4)


def test_tdpo_starts_at_ln_2(models: Models) -> None:
    for version in ("tdpo1", "tdpo2"):
        training = models.training({"name": "tdpo", "version": version}, pairs(), fresh=True)
        values, _ = step_of(training, training.groups_of(0))
        assert values.loss == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("version", "alpha"), [("tdpo1", 1.0), ("tdpo2", 0.5)])
def test_tdpos_kl_is_that_of_the_whole_distributions(
    models: Models, policy: Plain, reference: Plain, version: str, alpha: float
) -> None:
    training = models.training({"name": "tdpo", "version": version}, pairs())
    groups = training.groups_of(0)
    values, _ = step_of(training, groups)
    for group, loss in zip(groups, values.loss, strict=True):
        kl = []
        for response in (0, 1):
            log_p, log_q = policy.logps(group, response), reference.logps(group, response)
            kl.append(float((log_q.exp() * (log_q - log_p)).sum()))
        chosen, rejected = (policy.total(group, side) - reference.total(group, side) for side in (0, 1))
        assert min(kl) > 0.01
        margin = 0.1 * (chosen - rejected - alpha * (kl[1] - kl[0]))
        assert loss == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-4)


@pytest.mark.parametrize("kind", ["demonstration", "pair", "label", "ranking", "scores"])
def test_imitation_is_the_mean_over_the_tokens_of_the_best_responses(models: Models, policy: Plain, kind: str) -> None:
    rows = [{**row, "weight": 1.0 + number % 3} for number, row in enumerate(rows_for({"name": "sft"}, kind))]
    training = models.training({"name": "sft"}, rows)
    assert all(len(group.response_ids) == 1 for group in training.groups), "only what is imitated is computed"
    groups = training.groups_of(0)
    values, _ = step_of(training, groups)
    weights = [group.feedback.weight for group in groups]
    assert len(set(weights)) > 1
    tokens = [int(group.scored[0].sum()) for group in groups]
    lost = [-policy.total(group) for group in groups]
    assert values.total == pytest.approx(np.dot(weights, lost) / np.dot(weights, tokens), rel=1e-5)
    assert values.loss == pytest.approx(np.multiply(weights, lost), rel=1e-5)


def test_imitation_learns_from_chosen_rank_1_and_the_highest_score(models: Models) -> None:
    def imitated(rows: list[Any]) -> set[bytes]:
        training = models.training({"name": "sft"}, rows)
        return {group.response_ids[0].tobytes() for group in training.groups}

    of_pairs, ranked, scored = preference_rows(12), rankings(), scores()
    best = [
        (of_pairs, [row["chosen"] for row in of_pairs]),
        (ranked, [row["responses"][row["ranking"].index(1)] for row in ranked]),
        (scored, [row["responses"][int(np.argmax(row["scores"]))] for row in scored]),
    ]
    for rows, texts in best:
        shown = [{"prompt": row["prompt"], "completion": text} for row, text in zip(rows, texts, strict=True)]
        assert imitated(rows) == imitated(shown)


def test_the_steps_of_imitation_are_logged_without_rewards(models: Models) -> None:
    for record in run(models.training({"name": "sft"}, pairs(), fresh=True, train={"max_steps": 1})):
        metrics = record.metrics()
        assert "rewards/margins" not in metrics and "drift/chosen" not in metrics
        per_token = -metrics["logps/chosen"] / metrics["lengths/chosen"]
        assert metrics["loss"] == pytest.approx(per_token, rel=1e-5), "all rows weigh the same"
