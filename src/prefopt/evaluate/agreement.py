"""How far a judge agrees with people who compared the same responses, and people with each other.

Labels are "first", "second" or "tie", which is a class of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from prefopt.core.errors import DataError
from prefopt.core.progress import say
from prefopt.data.read import read_rows
from prefopt.evaluate.intervals import Floats, resampled_counts, resampled_interval, wilson
from prefopt.evaluate.win_rate import Judged, Match, prompt_numbers, shown
from prefopt.rollout.judges.verdict import Winner
from prefopt.rollout.prompts import as_prompt

CLASSES: tuple[Winner, ...] = ("first", "second", "tie")
_READ: dict[Any, Winner] = {0: "tie", 1: "first", 2: "second", "0": "tie", "1": "first", "2": "second"}
_READ |= {name: name for name in CLASSES}
_WANTED = "prompt (or instruction, with input), response1, response2, and a column annotator... for each person"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Comparisons of two responses, the first in the place of the policy; `labels[who][i]` is what a person said of match i.

    `left_out`: places of rows whose prompt or responses are no text.
    """

    matches: list[Match]
    labels: dict[str, list[Winner]]
    left_out: tuple[str, ...] = ()


def read_labelled(path: str, *, columns: Sequence[str] = (), max_rows: int | None = None) -> Labelled:
    """Rows of a file with prompt (or instruction and input), response1, response2 and labels of people.

    A label is 1 (the first response), 2 (the second) or 0 (a tie), or these words. `columns` names the columns of labels;
    by default those that begin with "annotator". Rows whose prompt or responses are no text are left out. DataError names the
    first row with another label, and says so where no row is left.
    """
    raw = read_rows(path, max_rows=max_rows)
    if raw.bad:
        raise DataError(str(raw.bad[0]), todo="Mend or remove this row.")
    names = list(columns) or [name for name in raw.rows[0] if re.match("annotator", str(name))]
    if not names:
        found = ", ".join(map(str, raw.rows[0]))
        raise DataError(
            f"{path}: has no column of labels; its columns: {found}", todo=f"A row has {_WANTED}; or name them with --labels."
        )
    matches, labels = [], {name: list[Winner]() for name in names}
    left_out = []
    for row, source in zip(raw.rows, raw.sources, strict=True):
        match = _match(row, source)
        if match is None:
            left_out.append(source)
            continue
        matches.append(match)
        for name in names:
            label = row.get(name)
            if isinstance(label, bool) or not isinstance(label, (int, str)) or label not in _READ:
                raise DataError(f"{source}: {name} is {label!r}", todo="A label is 1, 2 or 0 (tie), or first, second, tie.")
            labels[name].append(_READ[label])
    if not matches:
        raise DataError(
            f"{path}: none of its {raw.total} rows has a prompt and two responses of text", todo=f"A row has {_WANTED}."
        )
    if left_out:
        say(f"{path}: {len(left_out)} rows whose prompt or responses are no text are left out, the first of them {left_out[0]}")
    return Labelled(matches, labels, tuple(left_out))


def _match(row: Mapping[str, Any], source: str) -> Match | None:
    first, second, prompt = row.get("response1"), row.get("response2"), row.get("prompt")
    if prompt is None:
        parts = [row.get("instruction"), row.get("input")]
        prompt = "\n".join(part for part in parts if isinstance(part, str) and part)
    if not isinstance(first, str) or not isinstance(second, str) or not prompt:
        return None
    return Match(as_prompt(prompt, source=source).given, first, second)


def majority(labels: Mapping[str, Sequence[Winner]]) -> list[Winner | None]:
    """What more than half of the people said of each comparison; None where nothing did."""
    found: list[Winner | None] = []
    for said in zip(*labels.values(), strict=True):
        winner, count = Counter(said).most_common(1)[0]
        found.append(winner if 2 * count > len(said) else None)
    return found


def decisions(judged: Sequence[Judged]) -> list[Winner | None]:
    """What a judge decided over both orders; None where none of its verdicts could be read."""
    outcomes = [one.outcome for one in judged]
    return [None if value is None else "tie" if value == 0.5 else "first" if value > 0.5 else "second" for value in outcomes]


def agreement(
    one: Sequence[Winner | None],
    other: Sequence[Winner | None],
    clusters: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Share of equal labels, Cohen's kappa with its interval, and the table of counts; rows with a None on either side are left out.

    kappa = (share - chance) / (1 - chance), where chance is the share that two raters with these frequencies of labels would
    reach by luck (Cohen 1960); None where that is 1. Its interval, and that of the share where a prompt has several
    rows, are percentiles of a bootstrap over prompts, corrected for bias; otherwise the share's is Wilson's.
    """
    rows = [
        (CLASSES.index(a), CLASSES.index(b), cluster)
        for a, b, cluster in zip(one, other, clusters, strict=True)
        if a is not None and b is not None
    ]
    if not rows:
        raise DataError("there is no row that both sides labelled", todo="Look at the labels, and at what the judge says.")
    numbers = {cluster: at for at, cluster in enumerate(dict.fromkeys(cluster for _, _, cluster in rows))}
    tables_P9 = np.zeros((len(numbers), 9))
    for a, b, cluster in rows:
        tables_P9[numbers[cluster], 3 * a + b] += 1
    whole = tables_P9.sum(axis=0)
    drawn = np.concatenate([counts @ tables_P9 for counts in resampled_counts(len(numbers), resamples, seed=seed, width=9)])
    share = wilson(float(whole.reshape(3, 3).trace()), len(rows))
    if len(numbers) < len(rows):
        share = resampled_interval(share["value"], _share(drawn), len(numbers))
    kappa = float(_kappa(whole))
    return {
        "rows": len(rows),
        "left_out": len(one) - len(rows),
        "accuracy": share,
        "kappa": resampled_interval(kappa, _kappa(drawn), len(numbers)) if np.isfinite(kappa) else None,
        "table": {
            name: dict(zip(CLASSES, map(int, counts), strict=True))
            for name, counts in zip(CLASSES, whole.reshape(3, 3), strict=True)
        },
    }


def agreement_section(labelled: Labelled, judged: Sequence[Judged], *, seed: int = 0) -> dict[str, Any]:
    """The judge against every person and against their majority, and every two people against each other."""
    clusters = prompt_numbers([match.prompt for match in labelled.matches])
    decided = decisions(judged)
    by_all = majority(labelled.labels)
    people = list(labelled.labels)
    section: dict[str, Any] = {
        "rows": len(decided),
        "left_out": list(labelled.left_out),
        "unreadable": sum(decision is None for decision in decided),
        "inconsistent": sum(one.first_shown in (0.0, 1.0) for one in judged),
        "no_majority": sum(label is None for label in by_all),
        "judge": {name: agreement(decided, labelled.labels[name], clusters, seed=seed) for name in people},
    }
    if len(people) > 1:
        section["judge"]["majority"] = agreement(decided, by_all, clusters, seed=seed)
        section["people"] = [
            {"who": [a, b], **agreement(labelled.labels[a], labelled.labels[b], clusters, seed=seed)}
            for a, b in combinations(people, 2)
        ]
    return section


def agreement_lines(section: dict[str, Any]) -> list[str]:
    """The section as plain text."""
    lines = [
        f"{section['rows']} rows; {section['unreadable']} without a verdict that can be read, {section['no_majority']} without a"
        f" majority; the judge's winner changed with the order in {section['inconsistent']}"
    ]
    pairs = [(f"judge, {name}", found) for name, found in section["judge"].items()]
    pairs += [(", ".join(found["who"]), found) for found in section.get("people", [])]
    width = max(len(name) for name, _ in pairs)
    for name, found in pairs:
        kappa = shown(found["kappa"]) if found["kappa"] else "undefined: each side gives one label only"
        lines.append(f"{name:<{width}}  equal {shown(found['accuracy'])}  kappa {kappa}")
    return lines


def _share(table: Floats) -> Floats:
    """Share of equal labels of tables of counts, shape (..., 9)."""
    share: Floats = table[..., [0, 4, 8]].sum(axis=-1) / table.sum(axis=-1)
    return share


def _kappa(table: Floats) -> Floats:
    """Cohen's kappa of tables of counts, shape (..., 9); NaN where chance alone explains everything."""
    square = table.reshape(*table.shape[:-1], 3, 3)
    total = square.sum(axis=(-1, -2))
    chance = (square.sum(axis=-1) * square.sum(axis=-2)).sum(axis=-1) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa: Floats = np.where(chance < 1, (_share(table) - chance) / (1 - chance), np.nan)
    return kappa
