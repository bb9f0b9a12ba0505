"""The report of a run: one self-contained HTML page, and the same facts as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefopt.core.files import write_text
from prefopt.core.run_folder import RunFolder
from prefopt.report.contents import report_data
from prefopt.report.drawing import Figure
from prefopt.report.figures import audit_figures, run_figures
from prefopt.report.history import num, number, part, percent, plural

__all__ = ["build_report", "report_data", "report_markdown"]

_TEMPLATES = Path(__file__).parent / "templates"


def build_report(run: RunFolder) -> Path:
    """Write `report.html` of `run` and return its path. The page loads nothing from anywhere.

    StorageError where a file of the run is broken or the folder cannot be written.
    """
    data = report_data(run)
    audit = data["audit"] or {}
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"num": _shown, "percent": percent, "value": _plain}
    page = environment.get_template("report.html.j2").render(
        **data,
        figures=[_markup(figure) for figure in run_figures(run.events(), run.read("config.json") or {}, run.samples(), audit)],
        token_figures=[_markup(figure) for figure in audit_figures(audit)],
        audit_rows=audit_rows(audit),
        audit_examples=audit_examples(audit),
    )
    write_text(run.report_path, page)
    return run.report_path


def _markup(figure: Figure) -> dict[str, Any]:
    return {"id": figure.id, "title": figure.title, "caption": figure.caption, "svg": Markup(figure.svg)}


def _shown(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else num(value, sign=sign)


def _plain(value: object) -> str:
    """A config value as one would type it."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def audit_rows(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data audit as (what, found) lines; empty without an audit."""
    if not audit:
        return []
    rows = [("Data", str(audit.get("data", "–"))), ("Shape of a row", str(audit.get("shape", "–")))]
    rows += [(label, f"{audit[key]:,}") for label, key in (("Rows", "rows"), ("Usable groups", "groups")) if key in audit]
    for label, key, field in (
        ("Duplicates", "duplicates", "count"),
        ("Contradictions (preferred both ways)", "contradictions", "count"),
        ("Rows with special-token text, neutralised", "special_text", "rows"),
    ):
        if audit.get(key):
            rows.append((label, f"{audit[key].get(field, 0):,}"))
    rows += _feedback_rows(audit.get("feedback") or {})
    if bias := audit.get("length_bias"):
        share = " to ".join(f"{100 * bias[end]:.1f}" for end in ("low", "high") if end in bias)
        rows.append(
            ("Chosen is the longer response", f"{percent(bias['chosen_longer'])} ({share} %) of {bias.get('pairs', 0):,} pairs")
        )
        rows.append(("Length alone predicts the label (AUC)", f"{bias['auc']:.2f}; 0.50 is no information"))
    if leak := audit.get("leakage"):
        found = f"{leak.get('prompts', 0):,} prompts and {leak.get('groups', 0):,} whole groups"
        rows.append(("Shared with held-out rows", f"{found} shared with {leak.get('against')}"))
    if cut := audit.get("truncation"):
        budget = f"prompt {_plain(cut.get('max_prompt_tokens'))}, response {_plain(cut.get('max_response_tokens'))} tokens"
        over = ", ".join(f"{cut.get(f'{side}_over', 0):,} {side}" for side in ("prompts", "responses", "groups"))
        rows.append(("Token budget", f"{budget}; over it: {over} ({cut.get('on_overlong')})"))
    for side, stats in (audit.get("tokens") or {}).items():
        kept = ", ".join(f"{key} {float(stats[key]):,.4g}" for key in ("min", "median", "mean", "p95", "max") if key in stats)
        rows.append((f"Tokens of {'the prompt' if side == 'prompt' else side}", kept))
    return rows


def _feedback_rows(feedback: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known about the responses: how many there are to a prompt, how labels, ties and equal scores are spread."""
    rows = []
    if spread := feedback.get("responses_per_prompt"):
        low, high = (number(spread.get(end)) or 0 for end in ("min", "max"))
        count = int(number(feedback.get("prompts")) or 0)
        each = plural(int(low), "response") if low == high else f"{low:.0f} to {high:.0f} responses"
        rows.append(("Different prompts", f"{count:,}, {each} each" if low == high else f"{count:,}, {each}"))
    if labels := feedback.get("labels"):
        found = f"{labels.get('desirable', 0):,} desirable, {labels.get('undesirable', 0):,} undesirable"
        rows.append(("Labels", f"{found} ({percent(number(labels.get('share')) or 0.0)} desirable)"))
    if (tied := part(feedback, "ties", "tied")) and number(tied):
        rows.append(("Tied pairs", f"{tied:,} ({percent(number(part(feedback, 'ties', 'share')) or 0.0)})"))
    if (equal := part(feedback, "tied_scores", "tied")) and number(equal):
        rows.append(("Rows with equal scores", f"{equal:,}, in {part(feedback, 'tied_scores', 'all_equal'):,} of them all"))
    if cut := number(feedback.get("unfinished")):
        rows.append(("Responses cut at a token limit", f"{cut:,.0f}"))
    return rows


def audit_examples(audit: Mapping[str, Any]) -> list[tuple[str, int, list[str]]]:
    """(reason, count, examples) of refused rows, then of what else the audit found."""
    found = [(f"refused: {reason}", entry) for reason, entry in (audit.get("refused") or {}).items()]
    found += [
        (name.replace("_", " "), audit.get(name) or {}) for name in ("duplicates", "contradictions", "leakage", "special_text")
    ]
    rows = []
    for name, entry in found:
        count = entry.get("count", entry.get("rows", entry.get("prompts", 0)))
        examples = [str(example)[:300] for example in entry.get("examples", [])[:5]]
        if count:
            rows.append((name, int(count), examples))
    return rows


def report_markdown(run: RunFolder) -> str:
    """The report of `run` as Markdown, with the numbers of the page and without its figures."""
    data = report_data(run)
    lines = [
        f"# {data['run']}",
        "",
        f"**{data['verdict']}** {' '.join(data['verdict_more'])}".strip(),
        "",
        data["state"]["text"],
        "",
    ]
    if data["findings"]:
        lines += ["## Findings", ""]
        lines += [f"- **{found['level']}**: {found['text']} ({found['evidence']})" for found in data["findings"]] + [""]
    lines += ["## Key numbers", "", "| what | value | detail |", "| --- | --- | --- |"]
    lines += [_table_line(card["label"], card["value"], card["detail"]) for card in data["cards"]] + [""]
    if data["samples"]:
        lines += ["## Policy beside reference", ""]
        for sample in data["samples"]:
            for who in ("prompt", "policy", "reference"):
                reward = sample.get(f"{who}_reward")
                lines += [
                    f"{who.capitalize()}{'' if reward is None else f' (reward {num(reward)})'}:",
                    "",
                    _fenced(sample[who]),
                    "",
                ]
    if data["audit"]:
        lines += ["## Data", "", "| what | found |", "| --- | --- |"]
        lines += [_table_line(*row) for row in audit_rows(data["audit"])]
        lines += [""] + [f"- {name}: {count:,}" for name, count, _ in audit_examples(data["audit"])] + [""]
    lines += ["## What was run", "", "| option | value | default |", "| --- | --- | --- |"]
    changed = [row for row in data["config"] if row["changed"]]
    lines += [_table_line(row["key"], _plain(row["value"]), _plain(row["default"])) for row in changed]
    lines += ["", *(f"- {key}: {value}" for key, value in data["environment"].items()), ""]
    if data["checkpoints"]:
        lines += ["## Checkpoints", "", *(f"- {found['name']} ({found['megabytes']} MB)" for found in data["checkpoints"]), ""]
    if data["warnings"]:
        lines += [
            "## Warnings",
            "",
            *(f"- step {row['step']}: {row['message']} (x{row['count']})" for row in data["warnings"]),
            "",
        ]
    return "\n".join([*lines, "## How to repeat", "", _fenced("\n".join(data["repeat"])), ""])


def _table_line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _fenced(text: str) -> str:
    """`text` in a code block whose fence is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
