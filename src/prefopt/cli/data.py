"""Verbs around rows: check, sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prefopt.rollout.rewards import Reward

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Folder, Hub id, .gguf file, or smollm2-135m-instruct.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
TemplateOption = Annotated[str, typer.Option(help="auto, chat, plain, or a .jinja file.")]


def check(
    rows: Annotated[str, typer.Argument(metavar="DATA", help="File or Hub dataset id.")],
    model: ModelOption,
    against: Annotated[str | None, typer.Option(help="The other split: rows in both are reported as leakage.")] = None,
    shape: Annotated[str, typer.Option(help="Shape of the rows; auto detects it.")] = "auto",
    template: TemplateOption = "auto",
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Prompt budget.")] = None,
    max_response_tokens: Annotated[int | None, typer.Option(help="Response budget.")] = None,
    on_overlong: Annotated[str, typer.Option(help="drop, truncate or error.")] = "drop",
    as_json: JsonOption = False,
) -> None:
    """Audit rows before anything is trained: defects by reason, lengths, length bias, leakage, truncation."""
    from prefopt.core.progress import set_quiet

    if as_json:
        set_quiet(True)
    from prefopt.core.resolve import resolve_config
    from prefopt.data.audit import audit, audit_lines
    from prefopt.data.budget import token_budget
    from prefopt.data.load import load_groups
    from prefopt.data.token_cache import cached_encoding
    from prefopt.model.load import load_tokenizer, model_facts

    given = {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens, "on_overlong": on_overlong}
    config = resolve_config({"data": {"shape": shape, "template": template, **given}})
    groups = load_groups(rows, shape=shape)
    other = load_groups(against, shape=shape) if against else None
    tokens = cached_encoding(groups, load_tokenizer(model), template=template)
    budget = token_budget(config.data, model_facts(model).context_tokens)
    found = audit(groups, tokens, budget=budget, on_overlong=on_overlong, against=other)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join([*groups.notes, *audit_lines(found)]))


def sample(
    prompts: Annotated[Path, typer.Argument(help="Prompts: .jsonl with prompt, messages or turns; .txt, one a line.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL: prompt, responses, finished, response_tokens.")],
    n: Annotated[int, typer.Option("-n", help="Responses to each prompt.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(help="Sample this many responses to each prompt, and keep the one with the highest --reward.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward", "-r", help="With --best-of: vader, a check such as min_words:20, model:PATH, module:function."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus: the smallest set of tokens with this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 128,
    seed: int = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Responses in progress at once: 32 unless given, or what vLLM chooses.")
    ] = None,
    template: TemplateOption = "auto",
    engine: Annotated[
        str, typer.Option(help="torch, vllm, or auto: vLLM on CUDA where it is installed and the model is no adapter.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Sample responses of a model to prompts; with --best-of, keep the best of several by a reward."""
    from prefopt.core.files import check_writable
    from prefopt.core.progress import say, set_quiet
    from prefopt.model.load import load_model
    from prefopt.rollout.best_of_n import best_lines, kl_bound
    from prefopt.rollout.prompts import read_prompts
    from prefopt.rollout.sample import sample as draw
    from prefopt.rollout.sample import samples_of, write_lines
    from prefopt.rollout.with_vllm import chosen_engine, sample_with_vllm

    if as_json:
        set_quiet(True)
    judge = _judge_of(best_of, reward, n)
    asked = read_prompts(prompts)
    check_writable(output.parent)
    settings: dict[str, Any] = {"n": best_of or n, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    settings |= {"seed": seed, "template": template} | ({} if batch_size is None else {"batch_size": batch_size})
    if chosen_engine(engine, model) == "vllm":
        rows = sample_with_vllm(model, asked, **settings)
    else:
        rows = draw(load_model(model), asked, **settings)
    lines = samples_of(rows) if judge is None else best_lines(rows, judge, best_of or n)
    write_lines(output, lines)
    finished = sum(sum(line["finished"]) for line in lines)
    kept = sum(len(line["responses"]) for line in lines)
    of = f" kept of {len(rows)}" if judge is not None else ""
    say(
        f"{output}: {kept} responses{of} to {len(asked)} prompts; {finished} ended by themselves within {max_new_tokens} tokens"
    )
    if best_of is not None:
        say(f"best of {best_of}: at most {kl_bound(best_of):.3f} nats from the model, log n - (n - 1) / n (arXiv 2401.01879)")
    if as_json:
        typer.echo(json.dumps(lines, ensure_ascii=False))


def _judge_of(best_of: int | None, reward: str | None, n: int) -> Reward | None:
    """The reward that chooses; None without --best-of. ConfigError where one of the two is missing, or -n is given too."""
    from prefopt.core.errors import ConfigError
    from prefopt.rollout.best_of_n import check_n
    from prefopt.rollout.rewards import load_reward

    if best_of is None:
        if reward is not None:
            raise ConfigError("sample: --reward is given without --best-of", todo="Add --best-of 8, or leave --reward out.")
        return None
    check_n(best_of)
    if reward is None:
        raise ConfigError(
            f"sample: --best-of {best_of} has no reward to choose by", todo="For example --reward model:runs/reward."
        )
    if n != 1:
        raise ConfigError(f"sample: both -n {n} and --best-of {best_of} are given", todo="--best-of says how many are sampled.")
    return load_reward(reward)
