"""Writes the reference pages that come from the code: losses.md, options.md, cli.md. A test holds them true.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from prefopt.cli.app import app
from prefopt.cli.groups import DEFAULT
from prefopt.core.losses.describe import (
    SHAPES,
    accepts_text,
    by_family,
    coupling_text,
    default_text,
    input_text,
    inputs_by_kinds,
    kinds_text,
    knob_text,
    needs_text,
    range_text,
    reward_text,
    tokens_text,
    unit_text,
)
from prefopt.core.losses.facts import ANY, Knob, LossFacts
from prefopt.core.losses.knobs import EVERY_READING
from prefopt.core.losses.starts import start_loss
from prefopt.core.losses.table import LOSSES
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


LOSSES_INTRO = """# Losses

Made by `python docs/generate.py` from the table in `prefopt/core/losses/`. The formulas as code: `prefopt/objective/`.

```sh
prefopt losses             # the list
prefopt losses kto         # everything about one: formula, options, what it needs
prefopt losses --inputs    # quantities that a loss of your own may ask for
prefopt train recipes/dpo.yaml data.train=rows.jsonl loss.name=simpo loss.gamma=0.5
```

log-ratio = log(policy / reference) of a response, in nats. Rows: [data.md](data.md)."""

WHICH = """## Which loss when

No loss is known to be the best one: in the papers each wins with its own tuned beta and learning rate. Begin with `dpo`,
and compare on held-out rows and samples of your own ([metrics.md](metrics.md)). What the rows and the model decide:

| what you have or see | look at |
| --- | --- |
| rows with a margin, a probability, ties | `odpo`, `soft_dpo`, `rao_kupper` or `davidson`: no other loss of a policy looks at these columns |
| single responses, good or bad | `kto`, `bco`, `apo_zero_unpaired`, `aot_unpaired` |
| several responses with scores or ranks | `plackett_luce`, `all_pairs`, `best_of_k`: every response is used, and each prompt computed once |
| a share of labels that is known to be wrong | `cdpo` (a target margin), `robust` (an unbiased estimate) |
| chosen responses get less likely | `dpop`, `nca`, `cal_dpo`, or a mix with `sft` |
| responses get longer | `sigmoid_norm`, `simpo`, `r_dpo`, or `loss.ld_alpha` below 1 |
| margins grow without end | `ipo`, `sppo`, `cal_dpo`, `hinge`: they have a margin that is enough |
| no reference is wanted | `simpo`, `cpo`, `orpo` |
| demonstrations | `sft` |"""

MIXES_SECTION = """## Mixes

A section with a weight for each loss is their weighted sum. Each part is averaged over its own unit before it is weighted
(`sft` over tokens, `dpo` over pairs); options beside the weights go to every part that knows them, those of one part stand
in a mapping. Steps log every part as `loss/NAME`, without its weight. Rows must be of a kind that all parts learn from;
rewards are those of the first part that has some.

```yaml
loss: {dpo: 1.0, sft: 1.0, beta: 0.1}     # RPO, arXiv 2404.19733: DPO and the likelihood of chosen (there averaged by response)
```

```yaml
loss: {dpo: 0.8, bco_pair: 0.2, sft: 1.0, beta: 0.1}     # MPO, arXiv 2411.10442: preference, quality and generation
```

```yaml
loss:                                     # CPO with imitation over all tokens of a step instead of each response's mean
  cpo: {weight: 1.0, alpha: 0.0}
  sft: 1.0
```"""

OWN = '''## A loss of your own

A function in a module of the working folder or the Python path. Its positional parameters name
[quantities](#quantities), which decide what rows, reference and measurements a run needs; its keyword-only parameters are
options, with their defaults. It returns one value a row, shape (G,), or one a response, (S,), where it takes quantities of
responses; the step's mean and the rows' weights are not its business.

```python
# my_losses.py
import torch.nn.functional as F


def squared_hinge(chosen_G, rejected_G, *, beta=0.1, enough=1.0):
    """Squared hinge: pairs whose reward margin is `enough` teach nothing more."""
    margin_G = beta * (chosen_G - rejected_G)
    return F.relu(enough - margin_G) ** 2
```

```sh
prefopt losses my_losses:squared_hinge
prefopt train recipes/dpo.yaml data.train=rows.jsonl loss.name=my_losses:squared_hinge loss.enough=2.0
```

It can be a part of a mix: `loss: {"my_losses:squared_hinge": 1.0, sft: 0.2}`. A function that couples rows is named in its
module, `STEP_WIDE = {"function"}`, and then sees all rows of a step at once.'''


def losses_page() -> str:
    lines = [LOSSES_INTRO, "", "| loss | learns from | reference | paper |", "| --- | --- | --- | --- |"]
    families = by_family(LOSSES.values())
    for facts in (facts for members in families.values() for facts in members):
        reference = "in memory" if facts.needs_live_reference else "yes" if facts.needs_reference else "no"
        lines.append(f"| [`{facts.name}`](#{facts.name}) | {accepts_text(facts)} | {reference} | {_paper_link(facts)} |")
    lines += ["", WHICH, "", MIXES_SECTION, "", OWN, "", *_quantities(), "", *_shared_options()]
    for title, members in families.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}"]
        for facts in members:
            lines += _loss(facts)
    return "\n".join(lines) + "\n"


def _paper_link(facts: LossFacts) -> str:
    """A link to the paper on arXiv where the source that is named first is there, else its name."""
    first = facts.paper.split(";")[0]
    found = re.search(r"arXiv (\d{4}\.\d{5})", first)
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else first.split(", eq.")[0]


def _quantities() -> list[str]:
    lines = [
        "### Quantities",
        "",
        re.sub(r"\b_\w+", r"`\g<0>`", SHAPES),
        "",
        "| name | what it is | rows | needs |",
        "| --- | --- | --- | --- |",
    ]
    for kinds, quantities in inputs_by_kinds().items():
        rows = "all" if len(kinds) == len(ANY) else kinds_text(kinds)
        lines += [f"| `{name}` | {_cell(of.about)} | {rows} | {input_text(of)} |" for name, of in quantities.items()]
    return lines


def _shared_options() -> list[str]:
    lines = [
        "## Options of many losses",
        "",
        "How log-ratios are read from tokens. Losses below name those that they know.",
        "",
    ]
    rows = [_knob(f"loss.{key}", knob) for key, knob in EVERY_READING.items()]
    return [*lines, *_KNOBS_HEADER, *rows]


def _loss(facts: LossFacts) -> list[str]:
    start = start_loss({"name": facts.name})
    said = [
        f"Learns from {accepts_text(facts)}; needs {needs_text(facts)}.",
        f"It takes {tokens_text(facts)}, {coupling_text(facts)}; the loss is the mean over {unit_text(facts)}.",
        f"Reward: {reward_text(facts)}.",
        *([] if start is None else [f"With default options it starts at {start:.4g}."]),
        f"Since {facts.since}.",
    ]
    lines = ["", f"### {facts.name}", "", f"{_sentence(facts.title)} Source: {facts.paper}.", ""]
    lines += [f"    {piece}" for piece in facts.formula.split(",  ")] + ["", " ".join(said)]
    own = {key: knob for key, knob in facts.knobs.items() if EVERY_READING.get(key) != knob}
    shared = [f"`loss.{key}`" for key in facts.knobs if key not in own]
    if own:
        lines += ["", *_KNOBS_HEADER, *(_knob(f"loss.{key}", knob) for key, knob in own.items())]
    if shared:
        lines += ["", f"Also [options of many losses](#options-of-many-losses): {', '.join(shared)}."]
    return lines


_KNOBS_HEADER = ["| option | default | range | meaning |", "| --- | --- | --- | --- |"]


def _knob(key: str, knob: Knob) -> str:
    return f"| `{key}` | {default_text(knob)} | {range_text(knob)} | {_cell(knob_text(knob))} |"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def options_page() -> str:
    lines = [
        "# Options",
        "",
        "Made by `python docs/generate.py`. Set them in a recipe (YAML sections) or as `section.key=value` on the command line.",
        "Which loss has which options, with the reasons for their defaults: [losses.md](losses.md).",
    ]
    section = ""
    for key, default, about in option_table():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"## {section}", "", "| option | default | meaning |", "| --- | --- | --- |"]
        lines.append(f"| `{key}` | `{default}` | {_cell(about)} |")
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
    for name, verb in _verbs(command.commands):
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


def _verbs(commands: dict[str, Any]) -> list[tuple[str, Any]]:
    """Every verb with its words; of a verb with measures below it the one that runs by itself, then each of them."""
    found = []
    for name, verb in commands.items():
        below = getattr(verb, "commands", {})
        found += [(name, below.get(DEFAULT, verb))]
        found += [(f"{name} {word}", measure) for word, measure in below.items() if word != DEFAULT]
    return found


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
