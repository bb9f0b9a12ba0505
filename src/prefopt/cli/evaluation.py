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
    spread: Annotated[
        bool, typer.Option("--spread", help="Also how far samples of a prompt lie apart for the reference (needs -n 2).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; by default the run folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a policy against its reference: accuracy, reward, win rate, KL, length, diversity, with intervals."""
    from prefopt.core.progress import set_quiet
    from prefopt.evaluate.evaluation import evaluate as measure
    from prefopt.evaluate.results import kept_results
    from prefopt.evaluate.subject import evaluation_lines, subject_of
    from prefopt.model.load import load_model
    from prefopt.rollout.prompts import read_prompts
    from prefopt.rollout.rewards import load_reward

    if as_json:
        set_quiet(True)
    subject = subject_of(policy, reference=reference, beta=beta, output=output)
    asked = read_prompts(prompts) if prompts else None
    judge = load_reward(reward) if reward else None
    kept = kept_results(subject.folder) if subject.folder is not None else {}
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
        spread=spread,
    )
    if subject.folder is not None:
        subject.folder.write("evaluation.json", result | kept)
        if samples:
            subject.folder.write_samples(samples)
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else "\n".join(evaluation_lines(result)))


def score(
    policy: Annotated[
        str | None, typer.Argument(metavar="POLICY", help="A run folder, or any model; left out with --reward-model.")
    ] = None,
    rows: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Rows with responses: pairs, rankings, scores, demonstrations.")
    ] = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL: source, rewards, logps, reference_logps; or source, scores.")
    ],
    reward_model: Annotated[
        str | None, typer.Option(help="Score with this trained reward model instead of a policy: a run folder, or any model.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Model of the log-ratios; for a run, its own reference.")] = None,
    beta: Annotated[float | None, typer.Option(help="For a run, its own.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also the reward of every token, with its text.")] = False,
    shape: str = "auto",
    template: TemplateOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Reward of every response: implicit, beta * log(policy / reference), or by a trained reward model.

    prefopt score POLICY DATA -o FILE, or prefopt score --reward-model MODEL DATA -o FILE. With a reward model and rows
    that prefer some response, it ends with how often the scores agree.
    """
    from prefopt.core.files import check_writable, whole_file
    from prefopt.core.progress import say, set_quiet
    from prefopt.data.load import load_groups
    from prefopt.evaluate.subject import subject_of

    if as_json:
        set_quiet(True)
    only_policy = {"--reference": reference, "--beta": beta, "--tokens": tokens or None}
    name, data = _policy_and_rows([word for word in (policy, rows) if word is not None], reward_model, only_policy)
    subject = subject_of(name, reference=reference, beta=beta, output=None) if name is not None else None
    check_writable(output.parent)
    groups = load_groups(data, shape=shape)
    if subject is not None:
        lines, found = _implicit_rewards(subject, groups, template, tokens)
    else:
        lines, found = _trained_scores(str(reward_model), groups, template)
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    refused = len(groups.bad) + len(groups.groups) - len(lines)
    say(f"{output}: {len(lines)} rows scored, {refused} refused")
    if as_json:
        typer.echo(json.dumps({"rows": len(lines), "refused": refused, **found}))
    elif accuracy := found.get("accuracy"):
        interval = f"{accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}, 95 %)"
        typer.echo(f"accuracy {interval}: the preferred response scores higher, on {accuracy['n']} rows")


def _policy_and_rows(given: list[str], reward_model: str | None, only_policy: dict[str, Any]) -> tuple[str | None, str]:
    """(policy or None, rows) of the positional words. ConfigError for a policy and a reward model, or neither of them."""
    from prefopt.core.errors import ConfigError

    todo = "Write prefopt score POLICY DATA, or prefopt score --reward-model MODEL DATA."
    if reward_model is None:
        if len(given) < 2:
            raise ConfigError(f"score: neither a policy nor --reward-model is given, only {given}", todo=todo)
        return given[0], given[1]
    if len(given) == 2:
        raise ConfigError(f'score: both a policy ("{given[0]}") and --reward-model ("{reward_model}") are given', todo=todo)
    if not given:
        raise ConfigError("score: there are no rows to score", todo=todo)
    wrong = [name for name, value in only_policy.items() if value is not None]
    if wrong:
        raise ConfigError(
            f"score: {', '.join(wrong)} belongs to the implicit reward of a policy; a reward model has none",
            todo="Leave it out.",
        )
    return None, given[0]


def _as_trained(name: str, template: str) -> dict[str, Any]:
    """How rows become tokens for the model `name`: as in the run that it is, unless the command line says otherwise."""
    from prefopt.evaluate.subject import run_config

    config = run_config(name)
    if config is None:
        return {"template": template}
    return {"template": config.data.template if template == "auto" else template, "train_on": config.data.train_on}


def _implicit_rewards(subject: Any, groups: Any, template: str, tokens: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from prefopt.data.encode import encode_groups
    from prefopt.evaluate.implicit import implicit_rewards
    from prefopt.evaluate.subject import scored_rows
    from prefopt.model.load import load_model

    model = load_model(subject.policy)
    encoded = encode_groups(groups, model.tokenizer, **_as_trained(subject.policy, template)).groups
    ours = model.score(encoded, title="scoring with the policy")
    theirs = load_model(subject.reference).score(encoded, title="scoring with the reference")
    rewards = implicit_rewards(ours, theirs, subject.beta)
    return scored_rows(encoded, ours, theirs, rewards, model.tokenizer if tokens else None), {"beta": subject.beta}


def _trained_scores(name: str, groups: Any, template: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from prefopt.core.progress import say
    from prefopt.data.encode import encode_groups
    from prefopt.evaluate.ranking import ranking_accuracy
    from prefopt.model.load import load_reward_model

    model = load_reward_model(name, require_trained=True)
    encoded = encode_groups(groups, model.tokenizer, **_as_trained(name, template)).groups
    fitting = [group for group in encoded if _fits(group, model)]
    if over := len(encoded) - len(fitting):
        say(f"{over} row{'s' * (over > 1)} longer than the model's context of {model.context_tokens} tokens")
    scores = model.score_groups(fitting, title="scoring with the reward model")
    lines = [
        {"source": group.source, "scores": [round(float(value), 6) for value in values]}
        for group, values in zip(fitting, scores, strict=True)
    ]
    return lines, {"accuracy": ranking_accuracy(scores, fitting)}


def selfcheck(
    model: ModelOption = "smollm2-135m-instruct",
    rows: Annotated[str | None, typer.Argument(metavar="[DATA]", help="Your rows; by default a small built-in set.")] = None,
    n: Annotated[int, typer.Option("-n", help="Rows to check on.")] = 4,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="nf4 or int8: as model.quantize trains it.")] = None,
    template: TemplateOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prove on your model and rows that the fast paths compute what plain transformers does."""
    from prefopt.core.errors import ConfigError, DataError
    from prefopt.core.progress import set_quiet
    from prefopt.data.encode import encode_groups
    from prefopt.data.load import load_groups
    from prefopt.model.load import load_model
    from prefopt.model.selfcheck import selfcheck as prove

    if as_json:
        set_quiet(True)
    groups = load_groups(rows if rows is not None else _BUILT_IN_ROWS)
    if quantize not in (None, "nf4", "int8"):
        raise ConfigError(f'--quantize: "{quantize}" is not a way to hold weights', todo="Give nf4 or int8.")
    loaded = load_model(model, precision=precision, quantize=quantize)
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
