"""Verbs that show what is there: report, losses, runs. None of them loads a model."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt.cli.data import JsonOption

if TYPE_CHECKING:
    from prefopt.core.losses.facts import LossFacts

WIDTH = 100


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown instead.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write RUN/report.html: one page with everything about the run."""
    from prefopt.core.run_folder import open_run
    from prefopt.report.build import build_report, report_data, report_markdown

    folder = open_run(run)
    if as_json:
        typer.echo(json.dumps(report_data(folder), indent=2, ensure_ascii=False, default=str))
        return
    if markdown:
        typer.echo(report_markdown(folder))
        return
    path = build_report(folder)
    typer.echo(f"report: {path}")
    if open_page:
        typer.launch(str(path.resolve()))


def losses(
    name: Annotated[str | None, typer.Argument(help="One loss, with its formula and options; also module:function.")] = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="List the quantities that a loss of your own may ask for.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the losses, or explain one."""
    from prefopt.core.errors import ConfigError
    from prefopt.core.losses.describe import facts_json, inputs_json
    from prefopt.core.losses.table import LOSSES, loss_facts

    if inputs and name is not None:
        raise ConfigError(f"losses: --inputs lists all quantities, and {name} is one loss", todo="Leave out one of them.")
    if inputs:
        typer.echo(json.dumps(inputs_json(), indent=2) if as_json else "\n".join(_input_lines()))
        return
    chosen = [loss_facts(name)] if name else list(LOSSES.values())
    if as_json:
        typer.echo(json.dumps([facts_json(facts) for facts in chosen], indent=2, ensure_ascii=False, allow_nan=False))
        return
    typer.echo("\n".join(_loss_lines(chosen[0]) if name else _losses_lines(chosen)))


def _losses_lines(losses: Sequence[LossFacts]) -> list[str]:
    """The list: a heading for each family, one line a loss. On a terminal lines end at its edge."""
    from prefopt.core.losses.describe import MIXES, by_family, default_text, extra_needs

    width = max(len(facts.name) for facts in losses)
    lines = []
    for title, members in by_family(losses).items():
        lines += ["", title]
        for facts in members:
            beta = f"beta {default_text(facts.knobs['beta'])}" if "beta" in facts.knobs else ""
            more = "; ".join(extra_needs(facts))
            lines.append(f"  {facts.name:<{width}}  {beta:<9}  {facts.title}{f' [{more}]' if more else ''}")
    lines += ["", f"One of them: prefopt losses NAME. {MIXES}"]
    edge = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    return [line if not edge or len(line) <= edge or not line.startswith(" ") else f"{line[: edge - 1]}…" for line in lines[1:]]


def _loss_lines(facts: LossFacts) -> list[str]:
    """Everything about one loss."""
    from prefopt.core.losses import describe
    from prefopt.core.losses.starts import start_loss

    start = start_loss({"name": facts.name})
    where = "every score is 0 and rows have no margin" if facts.trains_reward_model else "policy and reference are equal"
    rows = [
        ("paper", facts.paper),
        ("learns from", describe.accepts_text(facts)),
        ("needs", describe.needs_text(facts)),
        ("reward", describe.reward_text(facts)),
        ("tokens", describe.tokens_text(facts)),
        ("mean over", describe.unit_text(facts)),
        ("a step", describe.coupling_text(facts)),
        *([] if start is None else [("starts at", f"{start:.4g}, with default options, where {where}")]),
        *([] if ":" in facts.name else [("since", facts.since)]),
    ]
    lines = [f"{facts.name}: {facts.title}", "", *_hanging("  ", facts.formula), ""]
    for key, value in rows:
        lines += _hanging(f"  {key:<13}", value)
    for key, knob in facts.knobs.items():
        lines += ["", f"  loss.{key} = {describe.default_text(knob)}   ({describe.range_text(knob)})"]
        lines += _hanging("      ", describe.knob_text(knob))
    return lines


def _input_lines() -> list[str]:
    """The quantities by the rows that have them, each with what else it needs."""
    from prefopt.core.losses.describe import SHAPES, input_text, inputs_by_kinds, kinds_text
    from prefopt.core.losses.facts import INPUTS

    width = max(len(name) for name in INPUTS)
    lines = textwrap.wrap(f"Positional parameters of a loss of your own. {SHAPES}", WIDTH)
    for kinds, quantities in inputs_by_kinds().items():
        lines += ["", f"of {kinds_text(kinds)}"]
        for name, quantity in quantities.items():
            needs = input_text(quantity)
            lines += _hanging(f"  {name:<{width}}  ", quantity.about + (f" [needs {needs}]" if needs else ""))
    return lines


def _hanging(start: str, text: str) -> list[str]:
    """`text` behind `start`, wrapped below its beginning."""
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)


def runs(
    root: Annotated[Path, typer.Argument(help="Folder to look in, two levels deep.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List the runs below a folder."""
    from prefopt.report.listing import run_rows

    rows = run_rows(root)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"no runs below {root}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("run", "state", "loss", "model", "steps", "last loss", "held-out loss", "held-out accuracy", "reward", "KL"):
        table.add_column(column)
    for row in rows:
        steps = f"{row['step']}/{row['total_steps']}"
        numbers = [
            _number(row[key], sign)
            for key, sign in (
                ("last_loss", ""),
                ("heldout_loss", ""),
                ("heldout_accuracy", ""),
                ("reward_difference", "+"),
                ("kl", ""),
            )
        ]
        table.add_row(str(row["path"]), row["state"], row["loss"] or "", str(row["model"] or ""), steps, *numbers)
    Console(width=None if Console().is_terminal else 200).print(table)


def _number(value: float | None, sign: str) -> str:
    return "" if value is None else f"{value:{sign}.3f}"
