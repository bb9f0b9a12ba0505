"""The section `frontier` of a recipe: which runs a reward-KL frontier is made of, and how they are judged."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from prefopt.core.config import ModelConfig, RunConfig
from prefopt.core.errors import ConfigError, nearest
from prefopt.core.losses.table import LOSSES
from prefopt.core.resolve import resolve_config, set_option
from prefopt.core.section import Section
from prefopt.core.stages import (
    Override,
    Stage,
    check_uses,
    expand_stages,
    filled,
    is_staged,
    merged,
    overlaid,
    override_of,
    says_which,
    split_overrides,
    value_at,
)

BEST_OF_N = "best-of-n"
GROUND_TRUTH = "ppo-gt"
S = TypeVar("S", bound=BaseModel)


class EvaluationSection(Section):
    """How every policy is judged: by samples on the same prompts."""

    prompts: str = Field(description="Prompts: .jsonl with prompt, messages or turns; .txt, one a line.")
    reward: str = Field(description="The true reward: vader, a check, model:PATH, or module:function.")
    samples_per_prompt: int = Field(4, ge=1, description="Samples of each policy to each prompt.")
    max_new_tokens: int = Field(64, ge=1, description="Longest response.")
    seed: int = Field(0, description="Seed of the samples and of the bootstrap.")
    batch_size: int = Field(32, ge=1, description="Responses in progress at once.")
    precision: Literal["auto", "bf16", "fp32"] | None = Field(
        None, description="Of samples and KL; by default train.precision."
    )
    reference: str | None = Field(None, description="What KL is measured from; by default model.name of the methods.")


class BestOfN(Section):
    """Best-of-n from the reference: no training."""

    n: int = Field(16, ge=2, description="Samples of each prompt; points are n = 1, 2, 4 ... up to it.")
    reward: str | None = Field(None, description="What chooses, for example a learned reward; by default the true reward.")


Beta = Annotated[float, Field(gt=0)]


class FrontierSection(Section):
    """Everything that `prefopt frontier` needs beside the recipe of a run."""

    evaluation: EvaluationSection
    methods: dict[str, dict[str, Any] | None] = Field(default_factory=dict, description="A partial recipe for each method.")
    defaults: dict[str, Any] = Field(default_factory=dict, description="Keys of all methods, not of the stages before them.")
    betas: tuple[Beta, ...] | dict[str, tuple[Beta, ...]] = Field((), description="Of all methods, or a list for each.")
    beta_key: dict[str, str | None] = Field(default_factory=dict, description="Which option a method's beta is; null: none.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="A run for each, with it as data.seed.")
    checkpoints: int = Field(4, ge=1, description="Checkpoints of each run that are evaluated, the last among them.")


@dataclass(frozen=True, slots=True)
class Job:
    """A run of the frontier. `beta` is None for a method without one; `uses`: stages whose runs it names."""

    method: str
    beta: float | None
    seed: int
    config: RunConfig
    uses: tuple[str, ...]

    @property
    def label(self) -> str:
        """`dpo-0.1-seed0`."""
        return f"{self.method}{'' if self.beta is None else f'-{self.beta:g}'}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class FrontierPlan:
    """All of a frontier: stages that come first, runs, and how they are judged. `template`: how prompts become tokens."""

    evaluation: EvaluationSection
    reference: str
    template: str
    checkpoints: int
    stages: tuple[Stage, ...]
    jobs: tuple[Job, ...]
    best_of_n: BestOfN | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says instead of the section `frontier`; None: what that says."""

    methods: Sequence[str] | None = None
    betas: Sequence[float] | None = None
    seeds: Sequence[int] | None = None
    checkpoints: int | None = None


def expand_frontier(
    recipe: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    output: Path,
    asked: Asked | None = None,
    source: str = "",
) -> FrontierPlan:
    """The frontier of `recipe`, with runs below `output`; all runs are resolved and checked.

    `key=value` goes to all stages and methods, `stages.NAME.key=value` to one stage, `frontier.key=value` to the section,
    so that `frontier.methods.NAME.key=value` goes to one method. ConfigError names the method or stage.
    """
    asked, where = asked or Asked(), f" ({source})" if source else ""
    about, words = _of_frontier(overrides)
    values = copy.deepcopy(dict(recipe.get("frontier") or {}))
    for path, value in about:
        set_option(values, path, value)
    if asked.betas is not None:
        values["betas"] = list(asked.betas)
    given = {"seeds": asked.seeds, "checkpoints": asked.checkpoints}
    values |= {key: value for key, value in given.items() if value is not None}
    base = {key: value for key, value in recipe.items() if key not in ("frontier", "stages")}
    stages = _stages(recipe, base, words, output, source)
    names = [stage.name for stage in stages]
    common, _ = split_overrides(words, names, where)
    folders = {stage.name: stage.folder for stage in stages}
    section = _section(FrontierSection, values, "frontier", where)
    judged, _ = filled(
        section.evaluation.model_dump(), folders, names, f"frontier.evaluation{where}", path="frontier.evaluation"
    )
    section = section.model_copy(update={"evaluation": _section(EvaluationSection, judged, "frontier.evaluation", where)})
    maker = _Maker(section, base, common, folders, output, where)
    methods = list(dict.fromkeys(asked.methods if asked.methods is not None else section.methods))
    if not methods:
        raise ConfigError(
            f"frontier: there are no methods{where}", todo="Give --methods dpo,ipo,best-of-n or frontier.methods."
        )
    jobs = tuple(job for method in methods if method != BEST_OF_N for job in maker.jobs(method))
    for job in jobs:
        check_uses(stages, Stage(job.method, job.config, job.uses), f'method "{job.method}"')
    defaults, _ = maker.values({}, [], "frontier.defaults")
    precision = section.evaluation.precision or value_at(defaults, ["train", "precision"]) or "auto"
    return FrontierPlan(
        evaluation=_section(EvaluationSection, {**judged, "precision": precision}, "frontier.evaluation", where),
        reference=section.evaluation.reference or str(value_at(defaults, ["model", "name"]) or ModelConfig().name),
        template=str(value_at(defaults, ["data", "template"]) or "auto"),
        checkpoints=section.checkpoints,
        stages=stages,
        jobs=jobs,
        best_of_n=maker.best_of_n() if BEST_OF_N in methods else None,
    )


def _of_frontier(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Overrides of the section `frontier`, and the words of all others."""
    about = [word for word in words if word.startswith("frontier.")]
    parsed = [override_of(word) for word in about]
    return [Override(path[1:], value) for path, value in parsed], [word for word in words if word not in about]


def _stages(
    recipe: Mapping[str, Any], base: Mapping[str, Any], words: Sequence[str], output: Path, source: str
) -> tuple[Stage, ...]:
    if any(override_of(word).path == ["train", "output_dir"] for word in words) or value_at(base, ["train", "output_dir"]):
        raise ConfigError("frontier: train.output_dir is set", todo="Remove it: everything is below the folder --output.")
    if not is_staged(recipe):
        return ()
    whole = merged(base, {"train": {"output_dir": str(output / "stages")}})
    return expand_stages({**whole, "stages": recipe["stages"]}, words, source=source)


def _section(kind: type[S], values: Mapping[str, Any], path: str, where: str) -> S:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([path, *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            known = sorted(kind.model_fields)
            close = nearest(str(first["loc"][-1]), known)
            raise ConfigError(f"{key}: there is no such option{where}", todo=f"{close}Known: {', '.join(known)}.") from error
        todo = "The section: frontier: {evaluation: {prompts: FILE, reward: NAME}, methods: {dpo: {}, best-of-n: {n: 16}}}."
        raise ConfigError(f"{key}: {first['msg'].lower()}, found {first.get('input')!r}{where}", todo=todo) from error


@dataclass(frozen=True)
class _Maker:
    """Makes the runs of methods."""

    section: FrontierSection
    base: Mapping[str, Any]
    common: Sequence[Override]
    folders: Mapping[str, Path]
    output: Path
    where: str

    def jobs(self, method: str) -> list[Job]:
        """A run for each beta and seed."""
        partial = self._partial(method)
        key = self._beta_key(method, partial)
        betas = self._betas(method) if key is not None else ()
        return [
            self._job(method, partial, key, beta, seed)
            for beta in (betas or (None,))
            for seed in dict.fromkeys(self.section.seeds)
        ]

    def _partial(self, method: str) -> dict[str, Any]:
        """The partial recipe of `method`, whose loss is that of its name where it says none."""
        methods = self.section.methods
        given = methods.get(method)
        if given is None and method == GROUND_TRUTH and methods.get("ppo"):
            truth = {"loss": {"name": "ppo"}, "rollout": {"reward": self.section.evaluation.reward}}
            given = merged(methods["ppo"] or {}, truth)
        given = dict(given or {})
        if says_which(given.get("loss") or {}):
            return given
        if method not in LOSSES:
            known = [*LOSSES, BEST_OF_N, *(name for name in methods if name != method)]
            raise ConfigError(
                f'frontier: "{method}" is neither a loss nor has frontier.methods.{method} a loss.name{self.where}',
                todo=f"{nearest(method, known)}Methods: names of losses (prefopt losses), {BEST_OF_N}, or your own in frontier.methods.",
            )
        return merged({"loss": {"name": method}}, given)

    def _beta_key(self, method: str, partial: Mapping[str, Any]) -> str | None:
        """The option that is the method's beta; None where it has none."""
        if method in self.section.beta_key:
            return self.section.beta_key[method]
        config = self._config(method, partial, [])[0]
        if config.loss.needs_samples:
            return "rollout.kl_coefficient"
        return "loss.beta" if any("beta" in part.knobs for part in config.loss.parts) else None

    def _betas(self, method: str) -> tuple[float, ...]:
        given = self.section.betas
        return tuple(dict.fromkeys(given.get(method, ()) if isinstance(given, Mapping) else given))

    def _job(self, method: str, partial: Mapping[str, Any], key: str | None, beta: float | None, seed: int) -> Job:
        own = [Override(["data", "seed"], seed)]
        if key is not None and beta is not None:
            own.append(Override(key.split("."), beta))
        config, uses = self._config(method, partial, own)
        if key is not None and beta is None:
            found = value_at(config.resolved(), key.split("."))
            beta = float(found) if isinstance(found, int | float) else None
        job = Job(method, beta, seed, config, uses)
        folder = config.train.model_copy(update={"output_dir": str(self.output / "runs" / job.label)})
        return replace(job, config=config.model_copy(update={"train": folder}))

    def _config(self, method: str, partial: Mapping[str, Any], own: Sequence[Override]) -> tuple[RunConfig, tuple[str, ...]]:
        said = f'method "{method}"'
        values, uses = self.values(partial, own, f"{said}{self.where}")
        return resolve_config(values, source=f"{said}{self.where}"), uses

    def values(self, partial: Mapping[str, Any], own: Sequence[Override], said: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The recipe of a method with its placeholders filled, and the stages that it names."""
        values = merged(merged(self.base, self.section.defaults), partial)
        values = overlaid(values, self.common, own, known=self.folders)
        found, uses = filled(values, self.folders, list(self.folders), said)
        return found, uses

    def best_of_n(self) -> BestOfN:
        given, _ = filled(self.section.methods.get(BEST_OF_N) or {}, self.folders, list(self.folders), self.where)
        return _section(BestOfN, given, f"frontier.methods.{BEST_OF_N}", self.where)
