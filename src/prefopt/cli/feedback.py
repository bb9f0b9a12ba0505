"""Verbs that make rows of feedback: label, revise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from prefopt.cli.data import JsonOption

JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", help="Who prefers: reward:NAME, implicit:RUN, local:MODEL, contrast:MODEL, or endpoint:MODEL@URL."),
]
JudgeTemplateOption = Annotated[
    str | None, typer.Option(help="What a local or endpoint judge is asked: pairwise, pointwise, or a Jinja file.")
]
JudgeSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Setting of the judge as key=value, for example requests_per_minute=60; docs/ai-feedback.md."),
]

_FOR_REWARDS = ("how", "scale", "min_margin")
_FOR_JUDGES = ("judge_template", "settings", "constitution", "orders", "pairs_per_prompt")


def label(
    context: typer.Context,
    samples: Annotated[Path, typer.Argument(help="What `prefopt sample` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL of preference rows.")],
    reward: Annotated[
        str | None,
        typer.Option("--reward", "-r", help="vader, length, a check such as min_words:20, model:PATH, or module:function."),
    ] = None,
    how: Annotated[
        str,
        typer.Option(
            help="--reward: best-worst, all-pairs, bradley-terry (labels drawn from sigmoid of the difference), or scores"
            " (K responses a row)."
        ),
    ] = "best-worst",
    scale: Annotated[float, typer.Option(help="bradley-terry: factor of the difference.")] = 1.0,
    min_margin: Annotated[float, typer.Option(help="--reward: skip pairs whose scores are closer than this.")] = 0.0,
    judge: JudgeOption = None,
    judge_template: JudgeTemplateOption = None,
    settings: JudgeSetOption = None,
    constitution: Annotated[
        Path | None, typer.Option(help="--judge: YAML of principles; each pair is judged by one of them, drawn with the seed.")
    ] = None,
    orders: Annotated[
        str,
        typer.Option(
            help="--judge: agree: both orders must name the same response; mean: their mean margin decides (verdict_by=letters)."
        ),
    ] = "agree",
    pairs_per_prompt: Annotated[
        int | None, typer.Option(help="--judge: judge so many pairs of a prompt's responses, drawn with the seed.")
    ] = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Turn sampled responses into preference rows, by a reward or by a judge that is asked in both orders."""
    from prefopt.core.files import check_writable
    from prefopt.core.progress import set_quiet
    from prefopt.rollout.sample import read_samples

    if as_json:
        set_quiet(True)
    _check_asked(context, reward, judge)
    rows = read_samples(samples)
    check_writable(output.parent)
    if judge is not None:
        how_judged: dict[str, Any] = {"pairs_per_prompt": pairs_per_prompt, "seed": seed, "orders": orders}
        made, summary = _judged(rows, judge, judge_template, settings or (), constitution, **how_judged)
    else:
        made, summary = _scored(rows, str(reward), how=how, scale=scale, min_margin=min_margin, seed=seed)
    _write(output, made, summary, f"{samples}: no pair could be made", f"preference rows from {len(rows)} prompts", as_json)


def revise(
    prompts: Annotated[Path, typer.Argument(help="Prompts: .jsonl with prompt, messages or turns; .txt, one a line.")],
    constitution: Annotated[Path, typer.Option(help="YAML of principles: recipes/ai-feedback/constitution.yaml for one.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Who writes: local:MODEL, endpoint:MODEL@URL, or a local model's name alone.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL of demonstrations, for SFT.")],
    rounds: Annotated[int, typer.Option(help="Critiques and revisions of each response.")] = 1,
    samples: Annotated[
        bool, typer.Option("--samples", help="PROMPTS is what `prefopt sample` wrote: revise its responses.")
    ] = False,
    settings: JudgeSetOption = None,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Make demonstrations: a model criticises a response by a principle and revises it (Constitutional AI)."""
    from prefopt.core.files import check_writable
    from prefopt.core.progress import say, set_quiet
    from prefopt.rollout.constitution import revise as revised
    from prefopt.rollout.judges.load import load_chat
    from prefopt.rollout.judges.settings import judge_settings
    from prefopt.rollout.principles import read_constitution
    from prefopt.rollout.prompts import read_prompts
    from prefopt.rollout.sample import read_samples

    if as_json:
        set_quiet(True)
    principles = read_constitution(constitution)
    chosen = judge_settings(settings or ())
    asked: list[Any]
    first: list[str] | None
    if samples:
        pairs = [(row["prompt"], response) for row in read_samples(prompts) for response in row["responses"]]
        asked, first = [prompt for prompt, _ in pairs], [response for _, response in pairs]
    else:
        asked, first = list(read_prompts(prompts)), None
    check_writable(output.parent)
    writer = load_chat(model if model.startswith(("local:", "endpoint:")) else f"local:{model}", settings=chosen)
    made = revised(asked, writer, principles, first=first, rounds=rounds, seed=seed)
    say(writer.usage.line())
    summary = {"rows": len(made.rows), "skipped": made.skipped, "unchanged": made.unchanged, "usage": _usage(writer)}
    what = f"demonstrations from {len(asked)} responses, {made.unchanged} of them unchanged"
    _write(output, made.rows, summary, f"{prompts}: no response could be revised", what, as_json)


def _scored(rows: list[dict[str, Any]], reward: str, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by a reward, and the summary of the command."""
    from prefopt.rollout.label import label as make_pairs
    from prefopt.rollout.label import score_samples
    from prefopt.rollout.rewards import load_reward

    result = make_pairs(rows, score_samples(rows, load_reward(reward)), **options)
    return result.rows, {"rows": len(result.rows), "skipped": result.skipped, "flipped": result.flipped}


def _judged(
    rows: list[dict[str, Any]],
    name: str,
    template: str | None,
    settings: Sequence[str],
    constitution: Path | None,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by a judge, and the summary of the command."""
    from prefopt.core.progress import say
    from prefopt.rollout.judges.labelling import label_with_judge
    from prefopt.rollout.judges.load import load_judge
    from prefopt.rollout.judges.settings import judge_settings
    from prefopt.rollout.principles import read_constitution, suited

    principles: Sequence[Any] = ()
    if constitution is not None:
        principles = suited(read_constitution(constitution), constitution, contrast=name.startswith("contrast:"))
    judge = load_judge(name, template=template, settings=judge_settings(settings), by_principles=bool(principles))
    result = label_with_judge(rows, judge, principles=principles, **options)
    usage = _usage(judge)
    if usage is not None:
        say(judge.usage.line())  # type: ignore[attr-defined]
    if result.decided:
        share = result.first_won / result.decided
        say(f"the response shown first won {100 * share:.0f} % of {result.decided} verdicts: 50 % without a taste for a place")
    summary: dict[str, Any] = {"rows": len(result.rows), "skipped": result.skipped, "pairs": result.pairs}
    summary |= {"first_won": result.first_won, "decided": result.decided, "usage": usage}
    return result.rows, summary | ({"by_principle": result.by_principle} if principles else {})


def _usage(asked: Any) -> dict[str, Any] | None:
    from dataclasses import asdict

    usage = getattr(asked, "usage", None)
    return None if usage is None else asdict(usage)


def _check_asked(context: typer.Context, reward: str | None, judge: str | None) -> None:
    """ConfigError unless one of --reward and --judge is given, and no option that only the other one has."""
    from prefopt.core.errors import ConfigError

    if (reward is None) == (judge is None):
        found = "neither" if reward is None else "both"
        raise ConfigError(f"label: {found} of --reward and --judge given", todo="Give one of them; docs/ai-feedback.md.")
    names, owner = (_FOR_JUDGES, "--judge") if judge is None else (_FOR_REWARDS, "--reward")
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"label: {parameter.opts[0]} applies with {owner} only", todo=f"Remove it, or use {owner}.")


def _write(output: Path, rows: list[dict[str, Any]], summary: dict[str, Any], nothing: str, what: str, as_json: bool) -> None:
    """Write `rows`, and say what was made; DataError, and no file, where there are none."""
    from prefopt.core.errors import DataError
    from prefopt.core.files import whole_file
    from prefopt.core.progress import say

    if not rows:
        raise DataError(
            f"{nothing} ({summary['skipped']})", todo="Give more responses a prompt, or look at what was skipped and why."
        )
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    skipped = ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items()) or "nothing"
    say(f"{output}: {len(rows)} {what}; skipped: {skipped}")
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
