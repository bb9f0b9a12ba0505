"""Measures below `prefopt evaluate` that score the responses of preference rows: accuracy, calibration."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prefopt.cli.data import JsonOption, TemplateOption
from prefopt.cli.measures import OutputOption, finish


def accuracy(
    rows: Annotated[str, typer.Argument(metavar="DATA", help="Rows with responses: pairs, rankings, scores.")],
    reward: Annotated[str | None, typer.Option("--reward", "-r", help="vader, model:PATH, module:function ...")] = None,
    policy: Annotated[str | None, typer.Option(help="Score by the implicit reward of this run or model instead.")] = None,
    reference: Annotated[str | None, typer.Option(help="Reference of --policy; for a run, its own.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of categories: accuracy in each, and their mean.")
    ] = None,
    shape: str = "auto",
    template: TemplateOption = "auto",
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """How often a reward scores the preferred response higher, by category; equal scores count half and are listed."""
    from prefopt.core.errors import ConfigError
    from prefopt.core.progress import set_quiet
    from prefopt.core.run_folder import RunFolder
    from prefopt.data.load import load_groups
    from prefopt.evaluate.accuracy import accuracy_lines, accuracy_section, categories_of
    from prefopt.evaluate.results import check_results
    from prefopt.evaluate.subject import subject_of

    if as_json:
        set_quiet(True)
    if (reward is None) == (policy is None):
        found = "neither of them" if reward is None else "both"
        raise ConfigError(f"accuracy: --reward or --policy says what scores, found {found}", todo="Give one of them.")
    if reward is not None and reference is not None:
        raise ConfigError("accuracy: a reward has no reference", todo="Leave out --reference, or give --policy.")
    subject = subject_of(policy, reference=reference, beta=1.0, output=output) if policy is not None else None
    folder = subject.folder if subject is not None else RunFolder(output) if output is not None else None
    groups = load_groups(rows, shape=shape)
    categories = categories_of(rows, by) if by is not None else None
    if folder is not None:
        check_results(folder)
    scores, scored = _scores(subject, reward, groups, template)
    named = None if categories is None else [categories.get(group.source, "(none)") for group in scored]
    name = reward if reward is not None else f"implicit:{policy}"
    section = {"scored_by": name, "data": rows, "by": by, **accuracy_section(scores, scored, named)}
    section["left_out"] = groups.rows - len(scored)
    title = f"{name} on {rows}: preferred response scores higher (95 % intervals); {section['left_out']} of {groups.rows} rows could not be scored"
    finish(section, folder, "accuracies", (rows, name), as_json, [title, *accuracy_lines(section)])


def _scores(subject: Any, reward: str | None, groups: Any, template: str) -> tuple[Any, Any]:
    """Scores, and the groups that they belong to."""
    from prefopt.evaluate.pair_scores import implicit_scores, text_scores, trained_scores
    from prefopt.rollout.rewards import load_reward

    if reward is None:
        return implicit_scores(subject, groups, template=template)
    kind, _, path = reward.partition(":")
    if kind == "model":
        return trained_scores(path, groups, template=template)
    return text_scores(load_reward(reward), groups)


def calibration(
    policy: Annotated[str, typer.Argument(help="A run folder, or any model.")],
    pairs: Annotated[
        str | None, typer.Option(help="Preference rows with known labels; for a run, its own held-out rows.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="For a run, its own.")] = None,
    beta: Annotated[float | None, typer.Option(help="Beta of the implicit reward; for a run, its own.")] = None,
    bins: Annotated[int, typer.Option(help="Bins of equal counts.", min=1)] = 10,
    seed: int = 0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether sigmoid(margin) of the implicit reward is the probability of being preferred: reliability table, ECE, Brier."""
    from prefopt.core.errors import DataError
    from prefopt.core.progress import set_quiet
    from prefopt.evaluate.calibration import calibration_lines, calibration_section
    from prefopt.evaluate.pair_scores import implicit_margins
    from prefopt.evaluate.results import check_results
    from prefopt.evaluate.subject import subject_of
    from prefopt.model.load import load_model

    if as_json:
        set_quiet(True)
    subject = subject_of(policy, reference=reference, beta=beta, output=output)
    if subject.folder is not None:
        check_results(subject.folder)
    model = load_model(subject.policy)
    found = subject.held_out_pairs(model, pairs)
    known = [group for group in found or () if not group.feedback.tie]
    if not known:
        raise DataError(
            f"{pairs or policy}: there are no pairs with a preferred response", todo="Give preference rows with --pairs FILE."
        )
    margins = implicit_margins(subject, model, known)
    name = pairs or "held-out rows"
    section = {"policy": policy, "reference": subject.reference, "beta": subject.beta, "data": name, "seed": seed}
    section |= calibration_section(margins, bins=bins, seed=seed)
    title = f"{policy}: sigmoid(margin) at beta {subject.beta:g} as the probability of being preferred (95 % intervals)"
    finish(section, subject.folder, "calibrations", (name,), as_json, [title, *calibration_lines(section)])
