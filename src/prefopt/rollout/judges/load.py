"""Judges, and what answers for them, by name."""

from __future__ import annotations

from pathlib import Path

from prefopt.core.errors import ConfigError, nearest
from prefopt.rollout.judges.asked import PairwiseJudge, PointwiseJudge
from prefopt.rollout.judges.chat import ChatModel
from prefopt.rollout.judges.scores import RewardJudge
from prefopt.rollout.judges.settings import JudgeSettings, check_settings_of
from prefopt.rollout.judges.templates import JudgeTemplate, check_takes_principles, load_template
from prefopt.rollout.judges.verdict import Judge
from prefopt.rollout.rewards import load_reward

KINDS = {
    "reward": "reward:NAME: any reward, as of prefopt label --reward",
    "implicit": "implicit:RUN: beta * log(policy / reference) of a run",
    "local": "local:MODEL: a local model that is asked in words",
    "contrast": "contrast:MODEL: how likely a local model is to write each response when told to keep to a principle, and to break it",
    "endpoint": "endpoint:MODEL@URL: an OpenAI-compatible chat endpoint, at http://HOST:PORT/v1 for one",
}


def load_judge(
    name: str,
    *,
    template: str | Path | None = None,
    settings: JudgeSettings | None = None,
    tolerance: float | None = None,
    by_principles: bool = False,
) -> Judge:
    """The judge `name`: reward:NAME, implicit:RUN, local:MODEL, contrast:MODEL or endpoint:MODEL@URL.

    `template`: what a local model or an endpoint is asked: pairwise (the default), pointwise, or a Jinja file (see
    `load_template`). `settings`: see `JudgeSettings`. `tolerance` is the setting of this name, for who has no others.
    `by_principles`: principles are to be gone by; refuse a judge that cannot, without them one that cannot do else.
    ConfigError, before any model is loaded, for an unknown kind and for what does not apply to it.
    """
    kind, target = kind_and_target(name, tuple(KINDS))
    settings = settings or JudgeSettings()
    if tolerance is not None:
        settings = JudgeSettings.model_validate(settings.model_dump(exclude_unset=True) | {"tolerance": tolerance})
    check_settings_of(kind, settings)
    if kind in ("reward", "implicit", "contrast") and template is not None:
        raise ConfigError(
            f'judge: "{name}" gives a number and is asked nothing, so a template does not apply',
            todo="Remove the template, or use a judge local:MODEL or endpoint:MODEL@URL.",
        )
    if kind == "contrast":
        return _contrast(name, target, settings, by_principles)
    if kind in ("reward", "implicit"):
        if by_principles:
            check_takes_principles(name, None)
        reward = load_reward(target if kind == "reward" else name)
        return RewardJudge(reward, tolerance=settings.tolerance, name=name)
    asked = load_template(template)
    _check_fits(asked, settings)
    if by_principles:
        check_takes_principles(name, asked)
    if settings.verdict_by == "letters":
        from prefopt.model.load import load_model
        from prefopt.rollout.judges.local import LetterJudge

        return LetterJudge(load_model(target), asked, settings, name=name)
    model = _chat(kind, target, settings)
    if asked.kind == "pointwise":
        return PointwiseJudge(model, asked, tolerance=settings.tolerance)
    return PairwiseJudge(model, asked)


def load_chat(name: str, *, settings: JudgeSettings | None = None) -> ChatModel:
    """What answers as `name`: local:MODEL or endpoint:MODEL@URL. ConfigError for any other name."""
    kind, target = kind_and_target(name, ("local", "endpoint"))
    settings = settings or JudgeSettings()
    check_settings_of(kind, settings)
    if settings.verdict_by == "letters" or "tolerance" in settings.model_fields_set:
        raise ConfigError(
            "judge settings: verdict_by and tolerance are for judges", todo="Remove them: here a text is written."
        )
    return _chat(kind, target, settings)


def kind_and_target(name: str, kinds: tuple[str, ...]) -> tuple[str, str]:
    """`'local:MODEL'` as `('local', 'MODEL')`; ConfigError lists the kinds."""
    kind, sign, target = name.partition(":")
    listed = "; ".join(KINDS[known] for known in kinds)
    if kind not in kinds:
        raise ConfigError(f'judge: "{name}" is of no known kind', todo=f"{nearest(kind, kinds)}Kinds: {listed}.")
    if not sign or not target:
        raise ConfigError(f'judge: "{name}" names no {kind}', todo=f"{KINDS[kind]}.")
    return kind, target


def _contrast(name: str, target: str, settings: JudgeSettings, by_principles: bool) -> Judge:
    if not by_principles:
        raise ConfigError(
            f'judge: "{name}" compares by principles, and there are none',
            todo="Give prefopt label --constitution with principles that have follow and violate.",
        )
    from prefopt.model.load import load_model
    from prefopt.rollout.judges.contrast import ContrastJudge

    return ContrastJudge(load_model(target), settings, name=name)


def _chat(kind: str, target: str, settings: JudgeSettings) -> ChatModel:
    if kind == "endpoint":
        from prefopt.rollout.judges.endpoint import Endpoint

        at = max(target.find("@http://"), target.find("@https://"))
        model, url = (target[:at], target[at + 1 :]) if at > 0 else ("", "")
        if not model:
            raise ConfigError(
                f'judge: "endpoint:{target}" is not of the form endpoint:MODEL@URL',
                todo="For example endpoint:my-model@http://localhost:8000/v1.",
            )
        return Endpoint(model, url, settings)
    from prefopt.model.load import load_model  # with torch, which an endpoint does without
    from prefopt.rollout.judges.local import LocalChat

    return LocalChat(load_model(target), settings, name=f"local:{target}")


def _check_fits(template: JudgeTemplate, settings: JudgeSettings) -> None:
    if settings.verdict_by == "letters" and template.kind == "pointwise":
        raise ConfigError(
            "judge settings: verdict_by=letters compares two responses, and the template marks one",
            todo="Use a pairwise template, or verdict_by=text.",
        )
    if settings.verdict_by == "letters":
        for name in ("temperature", "max_answer_tokens", "seed"):
            if name in settings.model_fields_set:
                raise ConfigError(
                    f"judge settings: {name} does not apply with verdict_by=letters: nothing is written", todo="Remove it."
                )
    elif template.kind == "pairwise" and "tolerance" in settings.model_fields_set:
        raise ConfigError(
            "judge settings: tolerance: a verdict in words has no score that could be close to another",
            todo="Remove it, or use the template pointwise, or verdict_by=letters.",
        )
