"""Writes the reference pages that come from the code: losses.md, options.md, cli.md. A test holds them true.

python docs/generate.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from prefopt.cli.app import app
from prefopt.core.facts import LOSSES
from prefopt.core.resolve import option_table
from prefopt.rollout.rewards import reward_table

FOLDER = Path(__file__).parent

EXIT_CODES = (
    (0, "done"),
    (1, "a check failed, or an unexpected error (`--debug` shows the traceback)"),
    (2, "usage or configuration: a key, a value, a combination"),
    (3, "data: a file or row that cannot be read or trained on"),
    (4, "model: cannot be loaded, or does not fit the rows"),
    (5, "training stopped before going wrong: a non-finite loss, a reference that does not match"),
    (6, "storage: a folder that cannot be written, a full disk, an incomplete checkpoint"),
    (130, "interrupted by Ctrl-C; the step was finished and saved"),
)


def losses_page() -> str:
    lines = [
        "# Losses",
        "",
        "Made by `python docs/generate.py` from the table in `prefopt/core/facts.py`. The formulas as code: `prefopt/objective/`.",
        "",
        "log-ratio = log(policy / reference) of a response, summed over its scored tokens, in nats.",
    ]
    for facts in LOSSES.values():
        lines += ["", f"## {facts.name}", "", f"{facts.title}. {facts.paper}.", "", f"    {facts.formula}", ""]
        reference = "a reference" if facts.needs_reference else "no reference"
        lines += [f"Needs {reference}; learns from: {', '.join(facts.accepts)}. Since {facts.since}.", ""]
        lines += ["| option | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `loss.{key}` | {knob.default} | {knob.about} |" for key, knob in facts.knobs.items()]
    return "\n".join(lines) + "\n"


def options_page() -> str:
    lines = [
        "# Options",
        "",
        "Made by `python docs/generate.py`. Set them in a recipe (YAML sections) or as `section.key=value` on the command line.",
        "",
        "| option | default | meaning |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{key}` | `{default}` | {about} |" for key, default, about in option_table()]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    lines = [
        "# Command line",
        "",
        "Made by `python docs/generate.py`.",
        "",
        "Results go to standard output, progress and errors to standard error.",
    ]
    lines += ["`NO_COLOR` is honoured; where standard error is no terminal, progress is plain lines.", ""]
    command: Any = typer.main.get_command(app)
    lines += ["Options before the verb:", ""] + _options(command)
    for name, verb in command.commands.items():
        usage = " ".join(word for word in verb.collect_usage_pieces(verb.make_context(name, [], resilient_parsing=True)))
        lines += ["", f"## {name}", "", inspect.cleandoc(verb.help or ""), "", f"    prefopt {name} {usage}", ""] + _options(
            verb
        )
    lines += [
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "| --- | --- |",
        *(f"| {code} | {about} |" for code, about in EXIT_CODES),
    ]
    lines += ["", "## Rewards", "", "Names for `--reward`:", "", "| name | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {about.replace('|', chr(92) + '|')} |" for name, about in reward_table()]
    return "\n".join(lines) + "\n"


def _options(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.param_type_name != "option" or (not getattr(parameter, "help", None) and parameter.name is None):
            continue
        default = "" if parameter.default in (None, False) or parameter.required else f" (default {parameter.default})"
        about = (getattr(parameter, "help", None) or "").strip()
        rows.append(f"- `{', '.join(parameter.opts)}`{': ' + about if about else ''}{default}")
    return rows


PAGES = {"losses.md": losses_page, "options.md": options_page, "cli.md": cli_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
