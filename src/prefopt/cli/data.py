"""Verbs around rows: check, sample, label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

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
    from prefopt.data.shapes import load_groups
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
    """Sample responses of a model to prompts."""
    from prefopt.core.files import check_writable
    from prefopt.core.progress import say, set_quiet
    from prefopt.model.load import load_model
    from prefopt.rollout.prompts import read_prompts
    from prefopt.rollout.sample import sample as draw
    from prefopt.rollout.sample import samples_of, write_samples
    from prefopt.rollout.with_vllm import chosen_engine, sample_with_vllm

    if as_json:
        set_quiet(True)
    asked = read_prompts(prompts)
    check_writable(output.parent)
    settings: dict[str, Any] = {"n": n, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    settings |= {"seed": seed, "template": template} | ({} if batch_size is None else {"batch_size": batch_size})
    if chosen_engine(engine, model) == "vllm":
        rows = sample_with_vllm(model, asked, **settings)
    else:
        rows = draw(load_model(model), asked, **settings)
    write_samples(output, rows)
    finished = sum(row.finished for row in rows)
    say(
        f"{output}: {len(rows)} responses to {len(asked)} prompts; {finished} ended by themselves within {max_new_tokens} tokens"
    )
    if as_json:
        typer.echo(json.dumps(samples_of(rows), ensure_ascii=False))


def label(
    samples: Annotated[Path, typer.Argument(help="What `prefopt sample` wrote.")],
    reward: Annotated[
        str, typer.Option("--reward", "-r", help="vader, length, a check such as min_words:20, or module:function.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL of preference rows.")],
    how: Annotated[
        str,
        typer.Option(
            help="best-worst, all-pairs, bradley-terry (labels drawn from sigmoid of the difference), or scores (K responses a row)."
        ),
    ] = "best-worst",
    scale: Annotated[float, typer.Option(help="bradley-terry: factor of the difference.")] = 1.0,
    min_margin: Annotated[float, typer.Option(help="Skip pairs whose scores are closer than this.")] = 0.0,
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Turn sampled responses and a reward into preference rows."""
    from prefopt.core.errors import DataError
    from prefopt.core.files import whole_file
    from prefopt.core.progress import say, set_quiet
    from prefopt.rollout.label import label as make_pairs
    from prefopt.rollout.label import score_samples
    from prefopt.rollout.rewards import load_reward
    from prefopt.rollout.sample import read_samples

    if as_json:
        set_quiet(True)
    rows = read_samples(samples)
    result = make_pairs(rows, score_samples(rows, load_reward(reward)), how=how, scale=scale, seed=seed, min_margin=min_margin)  # type: ignore[arg-type]
    if not result.rows:
        raise DataError(
            f"{samples}: no pair could be made ({result.skipped})",
            todo="Sample more responses a prompt, or lower --min-margin.",
        )
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in result.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    skipped = ", ".join(f"{count} {reason}" for reason, count in result.skipped.items()) or "nothing"
    say(f"{output}: {len(result.rows)} preference rows from {len(rows)} prompts; skipped: {skipped}")
    if as_json:
        typer.echo(json.dumps({"rows": len(result.rows), "skipped": result.skipped, "flipped": result.flipped}))
