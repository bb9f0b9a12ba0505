"""Verbs that show what is there: report, losses, runs. None of them loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prefopt.cli.data import JsonOption


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
    name: Annotated[str | None, typer.Argument(help="One loss, with its formula and options.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the losses, or explain one."""
    from dataclasses import asdict

    from prefopt.core.facts import LOSSES, loss_facts

    chosen = [loss_facts(name)] if name else list(LOSSES.values())
    if as_json:
        typer.echo(json.dumps([asdict(facts) for facts in chosen], indent=2))
        return
    if name is None:
        for facts in chosen:
            typer.echo(f"{facts.name:<8} {facts.title}  [{', '.join(facts.accepts)}]")
        return
    facts = chosen[0]
    reference = "needs a reference" if facts.needs_reference else "needs no reference"
    typer.echo(
        f"{facts.name}: {facts.title}\n  {facts.formula}\n  {facts.paper}\n  {reference}; rows: {', '.join(facts.accepts)}; since {facts.since}"
    )
    for key, knob in facts.knobs.items():
        typer.echo(f"  loss.{key} = {knob.default}: {knob.about}")


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
    for column in ("run", "state", "loss", "model", "steps", "last loss", "held-out accuracy", "reward", "KL"):
        table.add_column(column)
    for row in rows:
        steps = f"{row['step']}/{row['total_steps']}"
        numbers = [
            _number(row[key], sign)
            for key, sign in (("last_loss", ""), ("heldout_accuracy", ""), ("reward_difference", "+"), ("kl", ""))
        ]
        table.add_row(str(row["path"]), row["state"], row["loss"] or "", str(row["model"] or ""), steps, *numbers)
    Console(width=None if Console().is_terminal else 200).print(table)


def _number(value: float | None, sign: str) -> str:
    return "" if value is None else f"{value:{sign}.3f}"
