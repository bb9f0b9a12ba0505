"""The facts of a report, gathered once from the run folder: the page, the Markdown and the JSON all show these."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefopt.core.config import RunConfig
from prefopt.core.errors import PrefoptError
from prefopt.core.losses.table import Part, parts_of_section, section_title
from prefopt.core.run_folder import RunFolder
from prefopt.report.cards import cards
from prefopt.report.findings import findings
from prefopt.report.history import (
    History,
    Interval,
    Maybe,
    Row,
    interval,
    num,
    number,
    part,
    percent,
    percent_spread,
    perplexity,
    spread,
)
from prefopt.report.known import Known
from prefopt.report.measures import measure_rows, round_samples
from prefopt.report.wording import Wording

MOST_SAMPLES = 12
MOST_CHARACTERS = 4000  # of one text; a page of 12 samples stays readable and small
MOST_WARNINGS = 30


def report_data(run: RunFolder) -> Row:
    """All facts of the report of `run` as plain JSON values, texts included; figures and raw events are left out.

    What the run does not have is None or empty. StorageError where a file of the run is not JSON.
    """
    events, config = run.events(), run.read("config.json") or {}
    evaluation, audit = run.read("evaluation.json"), run.read("audit.json")
    firsts = list({str(row.get("prompt")): row for row in reversed(run.samples())}.values())[::-1]  # the first of each prompt
    history = History(events)
    known = Known(history, evaluation or {}, audit or {}, config)
    claims = verdict(run.path, known)
    return {
        "run": run.path.name or str(run.path),
        "path": str(run.path),
        "state": asdict(history.state()),
        "verdict": claims[0],
        "verdict_more": claims[1:],
        "findings": [asdict(finding) for finding in findings(events, evaluation, audit, config)],
        "cards": cards(known),
        "reward_name": part(evaluation, "reward", "name") or "reward",
        "samples": [_sample(row) for row in firsts[:MOST_SAMPLES]],
        "samples_total": len(firsts),
        "measures": measure_rows(evaluation),
        "round_samples": round_samples(history.of_kind("round")),
        "training": _training(history),
        "evaluation": evaluation,
        "audit": audit,
        "config": _config_rows(config),
        "loss": _loss(config.get("loss")),
        "environment": _environment(run.read("env.json"), history),
        "checkpoints": [_checkpoint(folder) for folder in run.complete_checkpoints()],
        "warnings": _warnings(history),
        "repeat": _repeat(run, known.wording),
    }


def verdict(path: Path, known: Known) -> list[str]:
    """Sentences: what changed, by how much and at what price in KL, with intervals; or that it was not evaluated yet."""
    claims, price = _claims(known.evaluation), kl_text(known.evaluation)
    if claims:
        claims[0] += f", at a KL of {price}" if price else ""
        return [f"{claim}." for claim in claims]
    if price:
        return [f"The policy is at a KL of {price} from its reference; whether it is better was not evaluated."]
    return _not_evaluated(shlex.quote(str(path)), known)


def _not_evaluated(path: str, known: Known) -> list[str]:
    """What training itself has seen of held-out rows, and the command that measures."""
    seen, history = known.history.heldout_accuracy(), known.history
    if known.wording.reward_model:
        score = f"`{_measure(path, known.wording)}`"
        if seen is None:
            return [f"Not measured on held-out rows: run {score}."]
        return [f"In training the reward model {known.wording.claim(seen)}.", f"{score} measures it on other rows."]
    said = [f"In training it {known.wording.claim(seen)}."] if seen else []
    start, loss = history.at_start("eval/loss"), history.last("eval/loss")
    if known.wording.imitates and start is not None and loss is not None and len(history.series("eval/loss")[0]) > 1:
        said.append(
            f"In training the perplexity of held-out demonstrations went from {num(perplexity(start))} to {num(perplexity(loss))}."
        )
    return [f"Not evaluated yet: run `{_measure(path, known.wording)}`.", *said]


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
    """Name, title, formula and paper of the loss, of a mix those of its parts, joined; `said` is a line for the page."""
    parts = parts_of_section(section)
    if not parts:
        return {"name": section_title(section) or None, "said": ""}
    mixed = len(parts) > 1
    weighted = [f"{one.weight:g} * [{one.facts.formula}]" if mixed else one.facts.formula for one in parts]
    said = [_said(one, weighted=mixed) for one in parts]
    return {
        "name": section_title(section),
        "title": "; ".join(one.facts.title for one in parts),
        "formula": " + ".join(weighted),
        "paper": "; ".join(one.facts.paper for one in parts),
        "said": f"{' + '.join(said)}.",
    }


def _said(one: Part, *, weighted: bool) -> str:
    """`Direct Preference Optimization (arXiv 2305.18290, eq. 7)`, within a mix with its weight and without what explains it."""
    title, paper = one.facts.title.split(";")[0], one.facts.paper.split(";")[0]
    return f"{one.weight:g} × {title.split(':')[0]} ({paper})" if weighted else f"{title} ({paper})"


def _config_rows(config: Mapping[str, Any]) -> list[Row]:
    """Every option with its default; `changed` where they differ. Sections within sections, as of a mix, are spread out."""
    defaults = _defaults(config)
    rows = []
    for keys, value in _leaves(config):
        default = part(defaults, *keys)
        rows.append({"key": ".".join(keys), "value": value, "default": default, "changed": value != default})
    return rows


def _leaves(values: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *above, key)
        else:
            yield (*above, key), value


def _defaults(config: Mapping[str, Any]) -> Row:
    """What every option is where it is not set: those of the chosen losses, and the reference that they need."""
    defaults: Row = RunConfig().resolved()
    parts = parts_of_section(config.get("loss"))
    if len(parts) == 1:
        defaults["loss"] = {"name": defaults["loss"]["name"], **_knobs(parts[0])}
    elif parts:
        defaults["loss"] = {one.name: {"weight": 1.0, **_knobs(one)} for one in parts}
    reference = {**(part(config, "reference") or {}), "kind": "auto"}
    with suppress(ValidationError, PrefoptError):  # of a version with other options
        defaults["reference"]["kind"] = RunConfig.model_validate({**config, "reference": reference}).reference_kind
    return defaults


def _knobs(one: Part) -> Row:
    return {key: knob.default for key, knob in one.facts.knobs.items()}


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


def _repeat(run: RunFolder, said: Wording) -> list[str]:
    """Commands that repeat the run, evaluate it and write this report."""
    path, again = shlex.quote(str(run.path)), shlex.quote(f"{run.path}-again")
    config = shlex.quote(str(run.path / "config.json"))
    return [f"prefopt train {config} train.output_dir={again}", _measure(path, said), f"prefopt report {path}"]


def _measure(path: str, said: Wording) -> str:
    """The command that measures a run: of held-out pairs it needs nothing else, of other rows prompts to answer."""
    if said.reward_model:
        return f"prefopt score --reward-model {path} ROWS -o scores.jsonl"
    return f"prefopt evaluate {path}" + ("" if said.words.row == "pair" else " --prompts PROMPTS")
