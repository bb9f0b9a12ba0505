"""Measures below `prefopt evaluate`, each with a section of its own in the results: win-rate, agreement, temperatures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli.data import JsonOption
from prefopt.cli.feedback import JudgeOption, JudgeSetOption, JudgeTemplateOption

if TYPE_CHECKING:
    from prefopt.evaluate.evaluation import SampleSettings
    from prefopt.evaluate.responses import Responses
    from prefopt.rollout.judges.verdict import Judge
    from prefopt.rollout.prompts import Prompt
    from prefopt.rollout.rewards import Reward

OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results; by default the run folder.")]
RewardOption = Annotated[
    str | None, typer.Option("--reward", "-r", help="Judge by this reward: the same as --judge reward:NAME.")
]
AgainstOption = Annotated[
    str,
    typer.Option(
        help="reference; another run or model; or a file: stored responses, or preference rows, whose preferred response is taken."
    ),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Prompts; by default those of the file that the policy is compared with.")
]
MaxPromptsOption = Annotated[int | None, typer.Option(help="Use the first prompts only.", min=1)]


def win_rate(
    policy: Annotated[str, typer.Argument(help="A run folder, any model, or a file of its responses.")],
    against: AgainstOption = "reference",
    reference: Annotated[str | None, typer.Option(help="The reference of a model that is no run.")] = None,
    prompts: PromptsOption = None,
    judge: JudgeOption = None,
    reward: RewardOption = None,
    judge_template: JudgeTemplateOption = None,
    settings: JudgeSetOption = None,
    samples_per_prompt: Annotated[int, typer.Option("-n", help="Samples of each model to each prompt.")] = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    max_prompts: MaxPromptsOption = None,
    batch_size: int = 32,
    seed: int = 0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """How often a judge prefers the policy's responses, asked in both orders, with position bias and length control."""
    from prefopt.core.progress import set_quiet
    from prefopt.evaluate.evaluation import SampleSettings
    from prefopt.evaluate.responses import matches_of
    from prefopt.evaluate.results import check_results
    from prefopt.evaluate.win_rate import comparison_rows, judge_matches, win_rate_lines, win_rate_section
    from prefopt.rollout.judges.verdict import sees_order

    if as_json:
        set_quiet(True)
    opponent, folder = _opponent(policy, against, reference, output)
    wanted = SampleSettings(samples_per_prompt, max_new_tokens, temperature, batch_size=batch_size)
    asked, stored = _asked([policy, opponent], prompts, max_prompts, wanted)
    judged_by = _judge(judge, reward, judge_template, settings)
    if folder is not None:
        check_results(folder)
    ours, theirs = _responses([policy, opponent], asked, stored, wanted, seed)
    judged = judge_matches(judged_by, matches_of(ours, theirs))
    file = None
    if folder is not None:
        file = _write_comparisons(folder, comparison_rows(judged, judged_by.name), policy, opponent, judged_by.name)
    section = {"policy": policy, "opponent": opponent, "judge": judged_by.name, "comparisons_file": file}
    section |= win_rate_section(judged, order_seen=sees_order(judged_by), seed=seed) | {"settings": _settings(wanted, seed)}
    finish(section, folder, "win_rates", (opponent, judged_by.name), as_json, [
        f"{policy} against {opponent}, judged by {judged_by.name} (95 % intervals)", *win_rate_lines(section)
    ])  # fmt: skip


def agreement(
    rows: Annotated[str, typer.Argument(metavar="FILE", help="Rows with prompt, response1, response2 and labels of people.")],
    judge: JudgeOption = None,
    reward: RewardOption = None,
    judge_template: JudgeTemplateOption = None,
    settings: JudgeSetOption = None,
    labels: Annotated[
        str | None, typer.Option(help="Columns of labels, with commas between; by default those that begin with annotator.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Use the first rows only.", min=1)] = None,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    as_json: JsonOption = False,
) -> None:
    """How far a judge agrees with people: accuracy and Cohen's kappa, per annotator, with their majority, and among them."""
    from prefopt.core.progress import set_quiet
    from prefopt.core.run_folder import RunFolder
    from prefopt.evaluate.agreement import agreement_lines, agreement_section, read_labelled
    from prefopt.evaluate.results import check_results
    from prefopt.evaluate.win_rate import comparison_rows, judge_matches

    if as_json:
        set_quiet(True)
    columns = [name.strip() for name in labels.split(",")] if labels else []
    labelled = read_labelled(rows, columns=columns, max_rows=max_rows)
    judged_by = _judge(judge, reward, judge_template, settings)
    folder = RunFolder(output) if output is not None else None
    if folder is not None:
        check_results(folder)
    judged = judge_matches(judged_by, labelled.matches)
    if folder is not None:
        _write_comparisons(folder, comparison_rows(judged, judged_by.name), rows, judged_by.name)
    section = {"file": rows, "judge_name": judged_by.name} | agreement_section(labelled, judged, seed=seed)
    title = f"{judged_by.name} on {rows} (95 % intervals; a tie is a class of its own)"
    finish(section, folder, "agreements", (rows, judged_by.name), as_json, [title, *agreement_lines(section)])


def temperatures(
    policies: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders or models, each with a curve of its own.")
    ],
    reward: Annotated[str, typer.Option("--reward", "-r", help="Reward that decides who wins: vader, model:PATH ...")],
    against: AgainstOption = "reference",
    reference: Annotated[str | None, typer.Option(help="The reference of a model that is no run.")] = None,
    prompts: PromptsOption = None,
    temperatures: Annotated[str, typer.Option(help="0,0.5,1, or with a step: 0,0.25,...,1.")] = "0,0.25,...,1",
    samples_per_prompt: Annotated[int, typer.Option("-n", help="Samples of each model to each prompt.")] = 1,
    max_new_tokens: int = 128,
    tolerance: Annotated[float, typer.Option(help="Rewards closer than this are a tie.", min=0.0)] = 0.0,
    max_prompts: MaxPromptsOption = None,
    batch_size: int = 32,
    seed: int = 0,
    figure: Annotated[
        Path | None, typer.Option(help=".svg, .png or .pdf; by default temperatures.svg beside the results.")
    ] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Win rate and reward at several sampling temperatures, against an opponent that stays the same; with a figure.

    A model as the opponent is sampled once, at temperature 1.
    """
    from prefopt.core.files import check_writable
    from prefopt.core.progress import set_quiet
    from prefopt.evaluate.evaluation import SampleSettings, streams
    from prefopt.evaluate.results import check_results
    from prefopt.evaluate.temperatures import parse_temperatures, temperature_lines
    from prefopt.report.temperatures import check_figure_name, save_temperature_figure
    from prefopt.rollout.rewards import load_reward

    if as_json:
        set_quiet(True)
    wanted = parse_temperatures(temperatures)
    opponent, folder = _opponent(policies[0], against, reference, output)
    drawn = figure or (folder.path / "temperatures.svg" if folder is not None else None)
    if drawn is not None:
        check_figure_name(drawn)
        check_writable(drawn.parent)
    settings = SampleSettings(samples_per_prompt, max_new_tokens, batch_size=batch_size)
    asked, stored = _asked([opponent], prompts, max_prompts, settings)
    scored_by = load_reward(reward)
    if folder is not None:
        check_results(folder)
    theirs = _responses([opponent], asked, stored, settings, streams(seed)[1])[0]
    section = _sweep(policies, theirs, scored_by, wanted, settings, tolerance, seed)
    if drawn is not None:
        save_temperature_figure(drawn, section)
    lines = [f"against {opponent} on {len(asked)} prompts, by {scored_by.name} (95 % intervals)"]
    for name, points in section["policies"].items():
        lines += [name, *temperature_lines(points)]
    lines += [f"figure: {drawn}"] if drawn is not None else []
    finish(section, folder, "temperatures", (opponent, scored_by.name), as_json, lines)


def _sweep(
    policies: list[str],
    opponent: Responses,
    reward: Reward,
    temperatures: list[float],
    settings: SampleSettings,
    tolerance: float,
    seed: int,
) -> dict[str, Any]:
    """The "temperatures" section: a curve for each policy."""
    from prefopt.evaluate.evaluation import streams
    from prefopt.evaluate.temperatures import mean_reward, score_responses, temperature_sweep
    from prefopt.model.load import load_model

    scores = score_responses(reward, opponent)
    curves = {}
    for name in policies:
        sampled = (load_model(name), opponent, scores, reward, temperatures, settings)
        curves[name] = temperature_sweep(*sampled, tolerance=tolerance, seed=streams(seed)[0])
    return {
        "opponent": opponent.name,
        "reward": reward.name,
        "opponent_reward": mean_reward(scores, seed=seed),
        "policies": curves,
        "settings": _settings(settings, seed) | {"tolerance": tolerance, "temperature": temperatures},
    }


def _judge(judge: str | None, reward: str | None, template: str | None, settings: list[str] | None) -> Judge:
    """The judge of the command line. ConfigError unless there is one, by either of its options."""
    from prefopt.core.errors import ConfigError
    from prefopt.rollout.judges.load import load_judge
    from prefopt.rollout.judges.settings import judge_settings

    if (judge is None) == (reward is None):
        raise ConfigError(
            "there is no judge" if judge is None else "both --judge and --reward are given",
            todo="Give --reward vader, for example, or --judge local:MODEL.",
        )
    name = judge if judge is not None else f"reward:{reward}"
    return load_judge(name, template=template, settings=judge_settings(settings or []))


def _opponent(policy: str, against: str, reference: str | None, output: Path | None) -> tuple[str, Any]:
    """Name of the opponent, and the folder for results, if there is one."""
    from prefopt.core.errors import ConfigError
    from prefopt.core.run_folder import RunFolder
    from prefopt.evaluate.responses import is_stored
    from prefopt.evaluate.subject import run_config, subject_of

    if against == "reference":
        if is_stored(policy) and reference is None:
            raise ConfigError(f"{policy} is a file, so its reference is not known", todo="Say with --against what it meets.")
        subject = subject_of(policy, reference=reference, beta=None, output=output)
        return subject.reference, subject.folder
    if reference is not None:
        raise ConfigError(f"--reference {reference} and --against {against} both name the opponent", todo="Leave out one.")
    folder = RunFolder(output or Path(policy)) if output is not None or run_config(policy) is not None else None
    return against, folder


def _asked(
    names: list[str], prompts: Path | None, max_prompts: int | None, settings: SampleSettings
) -> tuple[list[Prompt], dict[str, Responses]]:
    """Prompts to compare on, and what the files among `names` hold for them. Says what is wrong before any model loads."""
    from prefopt.core.errors import ConfigError
    from prefopt.evaluate.responses import distinct_prompts, is_stored, only, stored_responses
    from prefopt.rollout.prompts import read_prompts
    from prefopt.rollout.sample import check_settings

    check_settings(
        n=settings.samples_per_prompt,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    stored = {name: stored_responses(name) for name in names if is_stored(name)}
    if prompts is not None:
        asked = distinct_prompts(read_prompts(prompts))
    elif stored:
        asked = next(iter(stored.values())).prompts
    else:
        raise ConfigError(
            "there are no prompts to compare on", todo="Give --prompts FILE, or a file of responses with --against."
        )
    asked = asked[:max_prompts]
    return asked, {name: only(found, asked) for name, found in stored.items()}


def _responses(
    names: list[str], asked: list[Prompt], stored: dict[str, Responses], settings: SampleSettings, seed: int
) -> list[Responses]:
    """Responses of each of `names`; models draw from separate random streams, so that equal ones are independent."""
    from prefopt.evaluate.evaluation import streams
    from prefopt.evaluate.responses import sampled_responses

    seeds = streams(seed) if len(names) > 1 else (seed,)
    return [
        stored.get(name) or sampled_responses(name, asked, settings, seed=stream, title=f"sampling {name}")
        for name, stream in zip(names, seeds, strict=True)
    ]


def _write_comparisons(folder: Any, rows: list[dict[str, Any]], *words: str) -> str:
    """Write the comparisons to a file of their own below the folder, whole or not at all, and give its name there."""
    from prefopt.core.files import whole_file
    from prefopt.evaluate.results import file_name

    name = f"comparisons/{file_name(*words)}.jsonl"
    with whole_file(folder.path / name) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return name


def _settings(settings: SampleSettings, seed: int) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__slots__} | {"seed": seed}


def finish(section: dict[str, Any], folder: Any, place: str, keys: tuple[str, ...], as_json: bool, lines: list[str]) -> None:
    """Put the section into the folder's results and print it."""
    from prefopt.evaluate.results import add_result

    if folder is not None:
        add_result(folder, place, keys, section)
    typer.echo(json.dumps(section, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))
