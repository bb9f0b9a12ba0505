"""What the measures below `prefopt evaluate` found, as rows of a table: win rates, accuracies, calibration, agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prefopt.report.history import Maybe, Row, interval, num, number, part, percent, percent_spread, plural, spread


def measure_rows(evaluation: Maybe) -> list[Row]:
    """Rows with `what` was measured, its `value` with the 95 % interval, and a `detail`; empty without such measures."""
    found = evaluation or {}
    return [
        *(_win_rate(opponent, judge, section) for opponent, judge, section in _nested(found.get("win_rates"))),
        *(_accuracy(data, scorer, section) for data, scorer, section in _nested(found.get("accuracies"))),
        *(_calibration(data, section) for data, section in (found.get("calibrations") or {}).items()),
    ]


def _nested(sections: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for outer, inner in (sections or {}).items():
        for name, section in inner.items():
            yield outer, name, section


def _row(what: str, value: str, detail: str = "") -> Row:
    return {"what": what, "value": value, "detail": detail}


def _share(section: Mapping[str, Any], key: str) -> str:
    found = interval(section.get(key))
    return "–" if found is None else f"{percent(found[0])} ({percent_spread(found)})"


def _win_rate(opponent: str, judge: str, section: Mapping[str, Any]) -> Row:
    counts = ", ".join(f"{section.get(key, 0)} {key}" for key in ("wins", "ties", "losses"))
    details = [counts]
    controlled = interval(part(section, "length_controlled", "rate")) or interval(section.get("length_controlled"))
    if controlled is not None:
        details.append(f"at equal length {percent(controlled[0])} ({percent_spread(controlled)})")
    first = interval(part(section, "position", "first_shown"))
    if first is not None:
        details.append(f"the one shown first won {percent(first[0])}")
    unread = sum(int(number(count) or 0) for count in (section.get("unreadable") or {}).values())
    if unread:
        details.append(f"{plural(unread, 'comparison')} with a verdict that could not be read")
    return _row(f"Win rate against {opponent}, judged by {judge}", _share(section, "rate"), "; ".join(details))


def _accuracy(data: str, scorer: str, section: Mapping[str, Any]) -> Row:
    details = [plural(int(number(section.get("rows")) or 0), "row")]
    if "macro" in section:
        details.append(f"mean of {len(section.get('categories') or {})} categories {_share(section, 'macro')}")
    return _row(f"Accuracy of {scorer} on {data}", _share(section, "accuracy"), "; ".join(details))


def _calibration(data: str, section: Mapping[str, Any]) -> Row:
    error, chance = interval(section.get("ece")), number(part(section, "ece_by_chance", "value"))
    value = "–" if error is None else f"{num(error[0])} ({spread(error)})"
    by_chance = "" if chance is None else f"{num(chance)} would be seen by chance alone; "
    return _row(f"Calibration error on {data}", value, f"{by_chance}{plural(int(number(section.get('pairs')) or 0), 'pair')}")


def round_samples(rounds: list[Any], most: int = 6) -> list[Row]:
    """Samples of the last round with their scores; empty without rounds."""
    shown = (rounds[-1].get("shown") or []) if rounds else []
    return [
        {"prompt": str(row.get("prompt", "")), "response": str(row.get("response", ""))}
        | {key: number(row.get(key)) for key in ("score", "kl")}
        for row in shown[:most]
    ]
