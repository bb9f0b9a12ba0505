"""Scored responses -> preference rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from prefopt.core.errors import ConfigError, DataError, nearest
from prefopt.rollout.rewards import Reward

How = Literal["best-worst", "all-pairs", "bradley-terry", "scores"]
HOWS: tuple[How, ...] = ("best-worst", "all-pairs", "bradley-terry", "scores")


@dataclass(frozen=True, slots=True)
class LabelResult:
    """Preference rows, and what gave none, by reason.

    "empty response" counts responses, "fewer than two responses" counts prompts, "identical responses", "tie" and
    "margin below min_margin" count pairs. `flipped` counts Bradley-Terry pairs whose lower score won the draw.
    """

    rows: list[dict[str, Any]]
    skipped: dict[str, int]
    flipped: int = 0


def score_samples(rows: Sequence[Mapping[str, Any]], reward: Reward) -> list[list[float]]:
    """Scores of the `responses` of every row (as `prefopt.rollout.sample.samples_of` gives them), in one call of `reward`."""
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    ends = [end for row in rows for end in (row.get("finished") or [True] * len(row["responses"]))]
    known = ends if len(ends) == len(prompts) else None  # else `label` says which row is wrong
    flat = iter(reward(prompts, [response for row in rows for response in row["responses"]], known))
    return [[next(flat) for _ in row["responses"]] for row in rows]


def label(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[float]],
    *,
    how: How = "best-worst",
    scale: float = 1.0,
    seed: int = 0,
    min_margin: float = 0.0,
) -> LabelResult:
    """Preference rows {prompt, chosen, rejected, margin, chosen_score, rejected_score} from scored responses.

    `rows` hold `prompt` and `responses`; `scores` one number a response. best-worst: one pair a prompt, the highest
    against the lowest score. all-pairs: every pair of responses, the higher score is chosen. bradley-terry: every pair,
    and a is chosen over b with probability sigmoid(scale * (score a - score b)), the preference model of arXiv
    2305.18290 eq. 1; these rows have no margin, which would tell what the draw hides. scores: one row a prompt {prompt, responses,
    scores}, all its different responses for losses that learn from K of them; only `finished` is added to it. Empty responses, identical responses, ties
    and pairs whose scores differ by less than `min_margin` are skipped and counted. Where the prompt is a message list,
    chosen and rejected are message lists too. Where the row's `finished` says that one of them was cut, the pair has
    `chosen_finished` and `rejected_finished`. ConfigError for an unknown `how` or a scale that is not above 0.
    """
    if how not in HOWS:
        raise ConfigError(f'how: "{how}" is not a way to label', todo=f"{nearest(how, HOWS)}Use one of {', '.join(HOWS)}.")
    if not 0 < scale < math.inf or not 0 <= min_margin < math.inf:
        raise ConfigError(f"scale: {scale}, min_margin: {min_margin}", todo="scale is above 0, min_margin at least 0.")
    if len(rows) != len(scores):
        raise DataError(f"{len(rows)} rows and {len(scores)} lists of scores", todo="Give one list of scores for each row.")
    random = np.random.default_rng(seed)
    result: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    flipped = 0
    for at, (row, given) in enumerate(zip(rows, scores, strict=True)):
        answers = _answers(at, row, given, skipped)
        if how == "scores":
            result += _group_of_k(row["prompt"], answers, skipped)
            continue
        for better, worse in _pairs(answers, how):
            reason = _refused(better, worse, min_margin)
            if reason:
                skipped[reason] += 1
                continue
            if how == "bradley-terry" and random.random() >= _sigmoid(scale * (better.score - worse.score)):
                better, worse = worse, better
                flipped += 1
            pair = _preference(row["prompt"], better, worse)
            if how == "bradley-terry":
                del pair["margin"]
            result.append(pair)
    return LabelResult(result, dict(+skipped), flipped)


class Answer(NamedTuple):
    """A response with its score, and whether it came to its end."""

    text: str
    score: float
    finished: bool


def _answers(at: int, row: Mapping[str, Any], scores: Sequence[float], skipped: Counter[str]) -> list[Answer]:
    responses = row["responses"]
    if len(responses) != len(scores):
        raise DataError(
            f"row {at}: {len(responses)} responses and {len(scores)} scores", todo="Give one score for each response."
        )
    return [Answer(text, float(scores[place]), done) for text, done, place in usable_responses(at, row, skipped)]


def usable_responses(at: int, row: Mapping[str, Any], skipped: Counter[str]) -> list[tuple[str, bool, int]]:
    """(text, finished, place) of the responses of row number `at` that have text; none where there are fewer than two.

    What is left out is counted in `skipped`. DataError where `finished` does not fit the responses.
    """
    responses = row["responses"]
    finished = row.get("finished")
    if finished is None:
        finished = [True] * len(responses)
    if not isinstance(finished, list) or [type(done) for done in finished] != [bool] * len(responses):
        raise DataError(
            f"row {at}: {len(responses)} responses, and finished is {finished!r}", todo="Give true or false for each response."
        )
    found = [(text, done, place) for place, (text, done) in enumerate(zip(responses, finished, strict=True)) if text.strip()]
    if len(found) < len(responses):
        skipped["empty response"] += len(responses) - len(found)
    if len(found) < 2:
        skipped["fewer than two responses"] += 1
        return []
    return found


def _pairs(answers: list[Answer], how: How) -> Iterator[tuple[Answer, Answer]]:
    """Pairs to label, the higher score first."""
    if not answers:
        return
    if how == "best-worst":
        yield max(answers, key=lambda answer: answer.score), min(answers, key=lambda answer: answer.score)
        return
    for one, other in combinations(answers, 2):
        yield (one, other) if one.score >= other.score else (other, one)


def _refused(better: Answer, worse: Answer, min_margin: float) -> str:
    if better.text.strip() == worse.text.strip():
        return "identical responses"
    if better.score == worse.score:
        return "tie"
    return "margin below min_margin" if better.score - worse.score < min_margin else ""


def _preference(prompt: Any, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    row = {
        "prompt": prompt,
        "chosen": as_prompt_is(prompt, chosen.text),
        "rejected": as_prompt_is(prompt, rejected.text),
        "margin": chosen.score - rejected.score,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    if not (chosen.finished and rejected.finished):
        row |= {"chosen_finished": chosen.finished, "rejected_finished": rejected.finished}
    return row


def _group_of_k(prompt: Any, answers: list[Answer], skipped: Counter[str]) -> list[dict[str, Any]]:
    """At most one row: the different responses with their scores."""
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.text.strip(), answer)
    different = list(first.values())
    skipped["identical responses"] += len(answers) - len(different)
    if len({answer.score for answer in different}) < 2:
        skipped["tie"] += bool(answers)
        return []
    row = {
        "prompt": prompt,
        "responses": [as_prompt_is(prompt, answer.text) for answer in different],
        "scores": [answer.score for answer in different],
    }
    return [row if all(answer.finished for answer in different) else row | {"finished": [a.finished for a in different]}]


def as_prompt_is(prompt: Any, text: str) -> str | list[dict[str, str]]:
    """A response written as its prompt is: a text, or a message list."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _sigmoid(x: float) -> float:
    """For x >= 0, where exp cannot overflow."""
    return 1 / (1 + math.exp(-x))
