"""Verbs that measure models: evaluate, score, selfcheck."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prefopt.cli.data import JsonOption, ModelOption, TemplateOption


def evaluate(
    policy: Annotated[str, typer.Argument(help="A run folder, or any model.")],
    reference: Annotated[str | None, typer.Option(help="Model to compare with; for a run, its own reference.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Held-out preference rows; for a run, its own held-out rows.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts for fresh samples of both models.")] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", "-r", help="Reward of the samples: vader, length, module:function ...")
    ] = None,
    samples_per_prompt: Annotated[int, typer.Option("-n", help="Samples of each model to each prompt.")] = 1,
    max_new_tokens: int = 128,
    temperature: Annotated[float, typer.Option(help="KL is estimated at 1 only.")] = 1.0,
    tolerance: Annotated[float, typer.Option(help="Rewards closer than this are a tie.")] = 0.0,
    beta: Annotated[float | None, typer.Option(help="Beta of the implicit reward; for a run, its own.")] = None,
    batch_size: int = 32,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; by default the run folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a policy against its reference: accuracy, reward, win rate, KL, length, diversity, with intervals."""
    from prefopt.core.progress import set_quiet
    from prefopt.evaluate.evaluation import evaluate as measure
    from prefopt.evaluate.subject import evaluation_lines, subject_of
    from prefopt.model.load import load_model
    from prefopt.rollout.prompts import read_prompts
    from prefopt.rollout.rewards import load_reward

    if as_json:
        set_quiet(True)
    subject = subject_of(policy, reference=reference, beta=beta, output=output)
    asked = read_prompts(prompts) if prompts else None
    judge = load_reward(reward) if reward else None
    model = load_model(subject.policy)
    result, samples = measure(
        model,
        load_model(subject.reference),
        pairs=subject.held_out_pairs(model, pairs),
        prompts=asked,
        reward=judge,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        tolerance=tolerance,
        beta=subject.beta,
        batch_size=batch_size,
        seed=seed,
    )
    if subject.folder is not None:
        subject.folder.write("evaluation.json", result)
        if samples:
            subject.folder.write_samples(samples)
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else "\n".join(evaluation_lines(result)))


def score(
    policy: Annotated[str, typer.Argument(help="A run folder, or any model.")],
    rows: Annotated[str, typer.Argument(metavar="DATA", help="Rows with responses: pairs, rankings, scores, demonstrations.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL: source, rewards, logps, reference_logps.")],
    reference: Annotated[str | None, typer.Option(help="Model of the log-ratios; for a run, its own reference.")] = None,
    beta: Annotated[float | None, typer.Option(help="For a run, its own.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also the reward of every token, with its text.")] = False,
    shape: str = "auto",
    template: TemplateOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Implicit reward beta * log(policy / reference) of every response."""
    from prefopt.core.files import check_writable, whole_file
    from prefopt.core.progress import say, set_quiet
    from prefopt.data.encode import encode_groups
    from prefopt.data.shapes import load_groups
    from prefopt.evaluate.implicit import implicit_rewards
    from prefopt.evaluate.subject import scored_rows, subject_of
    from prefopt.model.load import load_model

    if as_json:
        set_quiet(True)
    subject = subject_of(policy, reference=reference, beta=beta, output=None)
    check_writable(output.parent)
    groups = load_groups(rows, shape=shape)
    model = load_model(subject.policy)
    encoded = encode_groups(groups, model.tokenizer, template=template)
    ours = model.score(encoded.groups, title="scoring with the policy")
    theirs = load_model(subject.reference).score(encoded.groups, title="scoring with the reference")
    rewards = implicit_rewards(ours, theirs, subject.beta)
    lines = scored_rows(encoded.groups, ours, theirs, rewards, model.tokenizer if tokens else None)
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    refused = len(groups.bad) + len(encoded.bad)
    say(f"{output}: {len(lines)} rows scored, {refused} refused")
    if as_json:
        typer.echo(json.dumps({"rows": len(lines), "refused": refused, "beta": subject.beta}))


def selfcheck(
    model: ModelOption = "smollm2-135m-instruct",
    rows: Annotated[str | None, typer.Argument(metavar="[DATA]", help="Your rows; by default a small built-in set.")] = None,
    n: Annotated[int, typer.Option("-n", help="Rows to check on.")] = 4,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    template: TemplateOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prove on your model and rows that the fast paths compute what plain transformers does."""
    from prefopt.core.errors import DataError
    from prefopt.core.progress import set_quiet
    from prefopt.data.encode import encode_groups
    from prefopt.data.shapes import load_groups
    from prefopt.model.load import load_model
    from prefopt.model.selfcheck import selfcheck as prove

    if as_json:
        set_quiet(True)
    groups = load_groups(rows if rows is not None else _BUILT_IN_ROWS)
    loaded = load_model(model, precision=precision)
    encoded = [group for group in encode_groups(groups, loaded.tokenizer, template=template).groups if _fits(group, loaded)][:n]
    if not encoded:
        raise DataError(f"{groups.name}: no row can be used", todo="See `prefopt check` for every reason.")
    checks = prove(loaded, encoded)
    if as_json:
        typer.echo(
            json.dumps(
                [{"name": c.name, "deviation": c.deviation, "tolerance": c.tolerance, "passed": c.passed} for c in checks],
                indent=2,
            )
        )
    else:
        for c in checks:
            typer.echo(
                f"{'ok  ' if c.passed else 'FAIL'} {c.name:<22} {c.deviation:9.2e} (at most {c.tolerance:.0e})  {c.about}"
            )
    if not all(c.passed for c in checks):
        raise typer.Exit(1)


def _fits(group: Any, model: Any) -> bool:
    return len(group.prompt_ids) + max(len(ids) for ids in group.response_ids) <= int(model.context_tokens)


_BUILT_IN_ROWS = [
    {"prompt": "What is a good way to start the day?", "chosen": "A short walk and a glass of water.", "rejected": "No idea."},
    {"prompt": "Name a river.", "chosen": "The Danube.", "rejected": "The Danube is a mountain, and it is very high indeed."},
    {"prompt": "Why is the sky blue?", "chosen": "Air scatters blue light more than red.", "rejected": "Because it is."},
]
