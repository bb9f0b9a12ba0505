"""The facts of a report, gathered once from the run folder: the page, the Markdown and the JSON all show these."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefopt.core.config import RunConfig
from prefopt.core.losses.table import parts_of_section, section_title
from prefopt.core.run_folder import RunFolder
from prefopt.report.findings import findings
from prefopt.report.history import (
    History,
    Interval,
    duration,
    interval,
    num,
    number,
    part,
    percent,
    percent_spread,
    plural,
    spread,
)

MOST_SAMPLES = 12
MOST_CHARACTERS = 4000  # of one text; a page of 12 samples stays readable and small
MOST_WARNINGS = 30

Row = dict[str, Any]
Maybe = Mapping[str, Any] | None


def report_data(run: RunFolder) -> Row:
    """All facts of the report of `run` as plain JSON values, texts included; figures and raw events are left out.

    What the run does not have is None or empty. StorageError where a file of the run is not JSON.
    """
    events, config = run.events(), run.read("config.json") or {}
    evaluation, audit = run.read("evaluation.json"), run.read("audit.json")
    firsts = list({str(row.get("prompt")): row for row in reversed(run.samples())}.values())[::-1]  # the first of each prompt
    history = History(events)
    claims = verdict(run.path, history, evaluation)
    return {
        "run": run.path.name or str(run.path),
        "path": str(run.path),
        "state": asdict(history.state()),
        "verdict": claims[0],
        "verdict_more": claims[1:],
        "findings": [asdict(finding) for finding in findings(events, evaluation, audit, config)],
        "cards": _cards(history, evaluation),
        "reward_name": part(evaluation, "reward", "name") or "reward",
        "samples": [_sample(row) for row in firsts[:MOST_SAMPLES]],
        "samples_total": len(firsts),
        "training": _training(history),
        "evaluation": evaluation,
        "audit": audit,
        "config": _config_rows(config),
        "loss": _loss(config.get("loss")),
        "environment": _environment(run.read("env.json"), history),
        "checkpoints": [_checkpoint(folder) for folder in run.complete_checkpoints()],
        "warnings": _warnings(history),
        "repeat": _repeat(run),
    }


def verdict(path: Path, history: History, evaluation: Maybe) -> list[str]:
    """Sentences: what changed, by how much and at what price in KL, with intervals; or that it was not evaluated yet."""
    claims = _claims(evaluation)
    price = kl_text(evaluation)
    if claims:
        claims[0] += f", at a KL of {price}" if price else ""
        return [f"{claim}." for claim in claims]
    if price:
        return [f"The policy is at a KL of {price} from its reference; whether it is better was not evaluated."]
    seen = history.heldout_accuracy()
    said = [f"In training it ranked {percent(seen[0])} of held-out pairs as labelled ({percent_spread(seen)})."] if seen else []
    return [f"Not evaluated yet: run `prefopt evaluate {shlex.quote(str(path))}`.", *said]


def _claims(evaluation: Maybe) -> list[str]:
    claims = []
    if (difference := interval(part(evaluation, "reward", "difference"))) is not None:
        claims.append(_reward_claim(difference, part(evaluation, "reward", "name") or "the reward"))
    if (rate := interval(part(evaluation, "win_rate", "rate"))) is not None:
        claims.append(f"The policy wins {percent(rate[0])} of comparisons with its reference ({percent_spread(rate)})")
    if (heldout := interval(part(evaluation, "heldout", "accuracy"))) is not None:
        claims.append(f"The policy ranks {percent(heldout[0])} of held-out pairs as labelled ({percent_spread(heldout)})")
    return claims


def _reward_claim(difference: Interval, name: str) -> str:
    value, low, high, _ = difference
    if low > 0:
        return f"Training raised {name} by {num(value)} ({spread(difference)})"
    if high < 0:
        return f"Training lowered {name} by {num(-value)} ({num(-high)} to {num(-low)})"
    return f"Training did not measurably change {name}: {num(value, sign=True)} ({spread(difference, sign=True)})"


def kl_text(evaluation: Maybe) -> str:
    """KL per response with its 95 % interval (1.96 standard errors), or an empty string."""
    value = number(part(evaluation, "kl", "per_response", "value"))
    error = number(part(evaluation, "kl", "per_response", "standard_error"))
    if value is None:
        return ""
    ends = f" ({num(value - 1.96 * error)} to {num(value + 1.96 * error)})" if error is not None else ""
    return f"{num(value)} nats a response{ends}"


def _card(label: str, value: str, detail: str = "") -> Row:
    return {"label": label, "value": value, "detail": detail}


def _cards(history: History, evaluation: Maybe) -> list[Row]:
    return [
        card for card in (*_quality_cards(history, evaluation), *_change_cards(evaluation), *_training_cards(history)) if card
    ]


def _quality_cards(history: History, evaluation: Maybe) -> list[Row | None]:
    difference, rate = interval(part(evaluation, "reward", "difference")), interval(part(evaluation, "win_rate", "rate"))
    evaluated = interval(part(evaluation, "heldout", "accuracy"))
    accuracy = evaluated or history.heldout_accuracy()
    when = "" if evaluated else ", last look in training"
    policy, reference = (interval(part(evaluation, "reward", side)) for side in ("policy", "reference"))
    levels = f"; {num(reference[0])}\u00a0→\u00a0{num(policy[0])}" if policy and reference else ""
    return [
        difference and _card("Reward difference", num(difference[0], sign=True), f"{spread(difference, sign=True)}{levels}"),
        rate and _card("Win rate", percent(rate[0]), f"{percent_spread(rate)}, {plural(rate[3], 'prompt')}"),
        accuracy
        and _card(
            "Held-out accuracy", percent(accuracy[0]), f"{percent_spread(accuracy)}, {plural(accuracy[3], 'pair')}{when}"
        ),
    ]


def _change_cards(evaluation: Maybe) -> list[Row | None]:
    kl, error = (number(part(evaluation, "kl", "per_response", key)) for key in ("value", "standard_error"))
    token = number(part(evaluation, "kl", "per_token", "value"))
    detail = [f"± {num(1.96 * error)} nats a response"] if error is not None else ["nats a response"]
    detail += [f"{num(token)} a token"] if token is not None else []
    cards: list[Row | None] = [_card("KL from reference", num(kl), "; ".join(detail)) if kl is not None else None]
    lengths = [interval(part(evaluation, "length", side)) for side in ("policy", "reference")]
    if lengths[0] and lengths[1]:
        cards.append(_card("Length", f"{num(lengths[0][0])} tokens", f"reference {num(lengths[1][0])} ({spread(lengths[1])})"))
    for label, keys, show in (
        ("Distinct word pairs", ("diversity", "distinct_2"), num),
        ("Finished responses", ("finished", ""), percent),
    ):
        values = [number(part(evaluation, keys[0], side, *filter(None, keys[1:]))) for side in ("policy", "reference")]
        if values[0] is not None and values[1] is not None:
            cards.append(_card(label, show(values[0]), f"reference {show(values[1])}"))
    return cards


def _training_cards(history: History) -> list[Row | None]:
    loss, first = history.final("loss"), history.first("loss")
    steps, margin = len(history.series("loss")[1]), history.final("rewards/margins")
    window = f"mean of last {plural(history.tail_steps(steps), 'step')}" if steps > 1 else "one step"
    seconds = _seconds(history)
    tokens = history.last("num_tokens")
    state = history.state(now=0.0)
    return [
        _card("Training loss", num(loss), f"from {num(first)}; {window}") if loss is not None and first is not None else None,
        _card("Training margin", num(margin, sign=True), "implicit reward, chosen minus rejected")
        if margin is not None
        else None,
        _card(
            "Steps",
            f"{state.step:,}" + (f" of {state.total_steps:,}" if state.total_steps > state.step else ""),
            ", ".join(([f"{tokens:,.0f} tokens"] if tokens else []) + ([duration(seconds)] if seconds else [])),
        ),
    ]


def _seconds(history: History) -> float:
    ends = [number(event.get("seconds")) for event in history.of_kind("end")]
    steps = history.series("step_seconds")[1]
    return (ends[-1] if ends else None) or sum(steps)


def _training(history: History) -> Row:
    """First and final value of every metric; `final` averages the last tenth of the steps."""
    keys = sorted(
        {key for event in (*history.steps, *history.evals) for key, value in event.items() if number(value) is not None}
    )
    kept = [key for key in keys if key not in ("step", "time")]
    return {key: {"first": history.first(key), "final": history.final(key), "last": history.last(key)} for key in kept}


def _sample(row: Mapping[str, Any]) -> Row:
    texts = {key: _shortened(row.get(key)) for key in ("prompt", "policy", "reference")}
    return texts | {key: number(row.get(key)) for key in ("policy_reward", "reference_reward", "kl")}


def _shortened(text: object) -> str:
    text = "" if text is None else str(text)
    return (
        text
        if len(text) <= MOST_CHARACTERS
        else f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS:,} more characters)"
    )


def _loss(section: object) -> Row:
    """Name, title, formula and paper of the loss; of a mix those of its parts, joined."""
    parts = parts_of_section(section)
    if not parts:
        return {"name": section_title(section) or None}
    weighted = [part.facts.formula if len(parts) == 1 else f"{part.weight:g} * [{part.facts.formula}]" for part in parts]
    return {
        "name": section_title(section),
        "title": "; ".join(part.facts.title for part in parts),
        "formula": " + ".join(weighted),
        "paper": "; ".join(part.facts.paper for part in parts),
    }


def _config_rows(config: Mapping[str, Any]) -> list[Row]:
    """Every option with its default; `changed` where they differ."""
    defaults: dict[str, Any] = RunConfig().resolved()
    parts = parts_of_section(config.get("loss"))
    if len(parts) == 1:
        defaults["loss"] = {"name": defaults["loss"]["name"]} | {
            key: knob.default for key, knob in parts[0].facts.knobs.items()
        }
    rows = []
    for section, values in config.items():
        for key, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            default = part(defaults, section, key)
            rows.append(
                {"key": f"{section}.{key}".rstrip("."), "value": value, "default": default, "changed": value != default}
            )
    return rows


def _environment(env: Maybe, history: History) -> dict[str, str]:
    """What ran where, as shown: versions, device, precision, reference, size."""
    env = env or {}
    start: Mapping[str, Any] = next(iter(history.of_kind("start")), {})
    shown = {key: env.get(key) or start.get(key) for key in ("device", "precision", "python", "platform")}
    shown |= {"reference": start.get("reference")}
    for key in ("parameters", "groups", "tokens"):
        count = number(start.get(key))
        shown[key] = f"{count:,.0f}" if count is not None else None
    packages = env.get("packages") or {}
    return {key: str(value) for key, value in (shown | dict(packages)).items() if value}


def _checkpoint(folder: Path) -> Row:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"name": folder.name, "path": str(folder), "megabytes": round(size / 1e6, 1)}


def _warnings(history: History) -> list[Row]:
    """Warning events, the same message once, with its first step and count."""
    events = history.of_kind("warning")
    counts = Counter(str(event.get("message")) for event in events)
    first = {str(event.get("message")): event["step"] for event in reversed(events)}
    return [{"message": message, "step": first[message], "count": count} for message, count in counts.items()][:MOST_WARNINGS]


def _repeat(run: RunFolder) -> list[str]:
    """Commands that repeat the run, evaluate it and write this report."""
    path, again = shlex.quote(str(run.path)), shlex.quote(f"{run.path}-again")
    config = shlex.quote(str(run.path / "config.json"))
    return [f"prefopt train {config} train.output_dir={again}", f"prefopt evaluate {path}", f"prefopt report {path}"]
