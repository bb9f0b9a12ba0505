"""The application: verbs, global options, and errors without tracebacks.

Exit codes: 0 done; 1 a check failed or an unexpected error; 2 usage or configuration; 3 data; 4 model; 5 training
stopped before going wrong; 6 storage; 130 interrupted, with a checkpoint.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from prefopt.cli import data, evaluation, feedback, frontier, measures, scores, show, training
from prefopt.cli.groups import DEFAULT, WithDefault
from prefopt.core.errors import PrefoptError
from prefopt.core.progress import set_quiet

app = typer.Typer(
    name="prefopt",
    help="Align language models with human preferences: check rows, train, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"prefopt {version('prefopt')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results and errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    global _debug
    _debug = debug
    set_quiet(quiet)


app.command("check")(data.check)
app.command("plan")(training.plan)
app.command("train")(training.train)
app.command("sample")(data.sample)
app.command("label")(feedback.label)
app.command("revise")(feedback.revise)
measuring = typer.Typer(
    cls=WithDefault, help="Measure a policy against its reference, or one thing at a time: win-rate, agreement, accuracy ..."
)
measuring.command(DEFAULT)(evaluation.evaluate)
measuring.command("win-rate")(measures.win_rate)
measuring.command("agreement")(measures.agreement)
measuring.command("accuracy")(scores.accuracy)
measuring.command("calibration")(scores.calibration)
measuring.command("temperatures")(measures.temperatures)
app.add_typer(measuring, name="evaluate")
app.command("frontier")(frontier.frontier)
app.command("score")(evaluation.score)
app.command("report")(show.report)
app.command("selfcheck")(evaluation.selfcheck)
app.command("losses")(show.losses)
app.command("runs")(show.runs)


def main() -> None:
    """Entry point of the `prefopt` command."""
    try:
        app()
    except PrefoptError as error:
        if _debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # typer makes this of Ctrl-C, without a word
            print("error: stopped at once; nothing was saved after the last checkpoint", file=sys.stderr)
        raise
    except Exception as error:
        if _debug:
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        print(
            f"error: {type(error).__name__}: {line}\n  This is a fault of prefopt: run again with `prefopt --debug ...` and report it.",
            file=sys.stderr,
        )
        sys.exit(1)
