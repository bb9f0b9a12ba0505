"""The reward-KL frontier of a recipe: train what is not trained, evaluate what is not evaluated, write table and figure.

DIR/stages/NAME         stages that come before the methods
DIR/runs/LABEL-KEY      a run; KEY names its resolved configuration and the content of its rows, prompts and models
DIR/evaluations/        a file for each checkpoint, named by run, step and evaluation
DIR/locks/              held by the command that works on a run: several commands share one folder's work
DIR/frontier.json, .csv, .png, .svg
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt.core.checks import steps_per_round
from prefopt.core.config import RunConfig
from prefopt.core.errors import StorageError, TrainingError
from prefopt.core.files import check_writable, digest, digest_of, write_json, write_text
from prefopt.core.frontier_recipe import BEST_OF_N, FrontierPlan, Job
from prefopt.core.progress import say, silence
from prefopt.core.run_folder import RunFolder
from prefopt.core.run_state import KEEPING, flattened, run_state, started
from prefopt.evaluate.evaluation import SampleSettings
from prefopt.evaluate.frontier import REFERENCE, Point, frontier_csv, frontier_json
from prefopt.evaluate.frontier_points import best_of_n_points, policy_point, reference_point
from prefopt.model.engine import LanguageModel
from prefopt.model.load import load_model, load_tokenizer, model_facts, model_folder
from prefopt.model.precision import compute_dtype, pick_device
from prefopt.preparing import prepare_rows, steps_of
from prefopt.report.frontier import save_frontier_figure
from prefopt.rollout.prompts import Prompt, read_prompts
from prefopt.rollout.rewards import Reward, load_reward
from prefopt.stages import check_inputs, check_stages, failure, finished_run, train_stages
from prefopt.train.checkpoint import prune_checkpoints

_ALL = 10**6  # checkpoints
_PART = 1 << 22  # bytes of a file that are read at a time
_PATHS = ("model.name", "reference.model", "data.train", "data.eval", "rollout.prompts")
_OF_TRAINING = ("optimizer.safetensors", "reference.safetensors", "training.json", "manifest.json")


@dataclass
class _Judge:
    """Prompts, rewards and reference of the evaluation, each read when it is first needed."""

    plan: FrontierPlan

    @cached_property
    def prompts(self) -> list[Prompt]:
        return read_prompts(self.plan.evaluation.prompts)

    @cached_property
    def reward(self) -> Reward:
        return load_reward(self.plan.evaluation.reward)

    @cached_property
    def chooses(self) -> Reward:
        """What best-of-n chooses by: the true reward itself where it has none of its own."""
        own = self.plan.best_of_n.reward if self.plan.best_of_n is not None else None
        return self.reward if own in (None, self.plan.evaluation.reward) else load_reward(str(own))

    @property
    def precision(self) -> str:
        """Of the policies that are judged, and of the reference."""
        return self.plan.evaluation.precision or "auto"

    @cached_property
    def reference(self) -> LanguageModel:
        return load_model(self.plan.reference, precision=self.precision)

    @cached_property
    def settings(self) -> SampleSettings:
        given = self.plan.evaluation
        return SampleSettings(
            given.samples_per_prompt, given.max_new_tokens, batch_size=given.batch_size, template=self.plan.template
        )

    @cached_property
    def key(self) -> str:
        """Names the evaluation by content: of prompts, reward and reference, its settings, and what it is computed in."""
        judged = self.plan.evaluation
        given = judged.model_dump(exclude={"batch_size", "reference", "prompts", "reward"})
        given["precision"] = str(compute_dtype(self.precision, pick_device())[0])  # `auto` is not the same everywhere
        contents = [content_of(judged.prompts), reward_content(judged.reward), content_of(self.plan.reference)]
        return digest(json.dumps(given, sort_keys=True), self.plan.template, *contents)


@dataclass
class _Frontier:
    """The work: what is there already is read, the rest is made and kept at once."""

    plan: FrontierPlan
    output: Path
    resume: bool = False
    prune: bool = False
    points: dict[str, list[Point]] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def judge(self) -> _Judge:
        return _Judge(self.plan)

    def make(self) -> dict[str, Any]:
        """All points, the table written behind each run. What another command works on comes last, when that has done it."""
        with self._lock("stages", wait=True):
            train_stages(self.plan.stages, resume=self.resume)
        work: dict[str, Callable[[], list[Point]]] = {REFERENCE: self._of_reference}
        work |= {job.label: partial(self._of_run, job, number) for number, job in enumerate(self.plan.jobs, start=1)}
        self.points = {name: [] for name in work}
        elsewhere = [name for name in work if not self._done(name, work[name], wait=False)]
        for name in elsewhere:
            say(f"{name}: waits for the command that works on it")
            self._done(name, work[name], wait=True)
        return self._write(complete=True)

    def _done(self, name: str, work: Callable[[], list[Point]], *, wait: bool) -> bool:
        """Do `work` unless another command does and `wait` is not given."""
        try:
            with self._lock(name, wait=wait):
                self.points[name] = work()
        except Timeout:
            return False
        self._write(complete=False)
        return True

    def _lock(self, name: str, *, wait: bool) -> FileLock:
        """Let go by the system when its process ends, however it ends."""
        folder = self.output / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0)

    def _of_reference(self) -> list[Point]:
        """The reference, which is best-of-n with n = 1 where that is asked for, and best-of-n."""
        judge, seed, wanted = self.judge, self.plan.evaluation.seed, self.plan.best_of_n
        if wanted is None:

            def alone() -> Any:
                return reference_point(judge.reference, judge.prompts, judge.reward, judge.settings, seed=seed)

            return [Point(REFERENCE, **self._kept("reference", judge.key, "the reference", alone))]

        def several() -> Any:
            rewards = (judge.reward, judge.chooses)
            return best_of_n_points(judge.reference, judge.prompts, *rewards, judge.settings, most=wanted.n, seed=seed)

        chosen = wanted.reward or self.plan.evaluation.reward
        key = digest(judge.key, str(wanted.n), reward_content(chosen))
        best = self._kept(BEST_OF_N, key, f"the reference, and best-of-n up to {wanted.n} chosen by {chosen}", several)
        reference = Point(REFERENCE, **{name: best[0][name] for name in ("reward", "kl", "more")})
        return [reference, *(Point(BEST_OF_N, kl_is_bound=True, **one) for one in best)]

    def _of_run(self, job: Job, number: int) -> list[Point]:
        """The evaluated checkpoints of a run, which is trained first where it is not; none of one that failed."""
        title = f"run {number} of {len(self.plan.jobs)}, {job.label}"
        run_key = key_of(job.config)
        label = f"{job.label}-{run_key[:8]}"
        run = RunFolder(self.output / "runs" / label)
        if not self._trained(job, run, title):
            return []
        began = f"{started(run):.3f}"  # a run that was removed and trained again is another one
        keys = {step: digest(run_key, began, str(step), self.judge.key) for step in _saved_steps(run)}
        keys |= {
            int(found["step"]): str(found["key"])
            for path in (self.output / "evaluations").glob(f"{label}-step*.json")
            if (found := _read(path)) and found["key"] == digest(run_key, began, str(found["step"]), self.judge.key)
        }
        points = []
        for step in spaced(_planned(run, sorted(keys)), self.plan.checkpoints):
            found = self._kept(
                f"{label}-step{step:06d}", keys[step], f"{title}, step {step}", self._of_checkpoint(run, step), step=step
            )
            points.append(Point(job.method, beta=job.beta, seed=job.seed, step=step, run=str(run.path), **found))
        if self.prune:
            prune_checkpoints(run.checkpoints, keep_last=1, keep=set())
        return points

    def _trained(self, job: Job, run: RunFolder, title: str) -> bool:
        """Whether the run came to its end, now or before; what fails is noted, and the others go on."""
        config = _at(job.config, run.path)
        if run_state(run) == "failed" and not (self.resume and run.complete_checkpoints()):
            self._fail(run, failure(run))
            return False
        if run_state(run) != "complete":
            config = keeping(config, self.plan.checkpoints)
        try:
            finished_run(config, title=title, resume=self.resume, known=True)
        except TrainingError as error:
            self._fail(run, error.what)
            return False
        return True

    def _fail(self, run: RunFolder, why: str) -> None:
        say(f"{run.path}: {why}; it is left out, remove its folder to try it again")
        self.failed.append({"run": str(run.path), "error": why})

    def _of_checkpoint(self, run: RunFolder, step: int) -> Callable[[], Any]:
        judge = self.judge

        def measure() -> Any:
            policy = load_model(str(run.checkpoints / f"step-{step:06d}"), precision=judge.precision)
            seed = self.plan.evaluation.seed
            return policy_point(policy, judge.reference, judge.prompts, judge.reward, judge.settings, seed=seed)

        return measure

    def _kept(self, name: str, key: str, title: str, measure: Callable[[], Any], **facts: Any) -> Any:
        """The result of `measure`, from its file where that holds the evaluation `key`."""
        path = self.output / "evaluations" / f"{name}-{key[:8]}.json"
        found = _read(path)
        if found is not None and found["key"] == key:
            return found["found"]
        say(f"{title}: evaluated on {len(self.judge.prompts)} prompts")
        result = measure()
        write_json(path, {"key": key, **facts, "found": result})
        return result

    def _write(self, *, complete: bool) -> dict[str, Any]:
        given = self.plan.evaluation.model_dump()
        points = [point for name in self.points for point in self.points[name]]
        found = frontier_json(
            points,
            complete=complete,
            reference=self.plan.reference,
            evaluation=given,
            best_of_n=self.plan.best_of_n.model_dump() if self.plan.best_of_n is not None else None,
            failed=self.failed,
        )
        write_json(self.output / "frontier.json", found)
        write_text(self.output / "frontier.csv", frontier_csv(points))
        return found


def make_frontier(
    plan: FrontierPlan, output: Path, *, resume: bool = False, prune: bool = False, sqrt_kl: bool = False
) -> dict[str, Any]:
    """Train and evaluate what `plan` asks for, below `output`, and give the contents of frontier.json.

    Finished runs and evaluations are found again by content, an interrupted run goes on from its newest checkpoint: a
    killed call is repeated. Several calls on one folder share the work; each ends when all is done. A run that ends with a
    TrainingError, such as a loss that is not finite, is left out and listed under "failed"; `resume` goes on from its newest
    checkpoint. `prune`: keep the last checkpoint of a run only, once all are evaluated. `sqrt_kl`: the figure's axis. Raises
    what `train_stages` and `train_run` raise.
    """
    content_of.cache_clear()  # files may have changed since an earlier call
    check_plan(plan, output)
    found = _Frontier(plan, output, resume=resume, prune=prune).make()
    for suffix in (".png", ".svg"):
        save_frontier_figure(output / f"frontier{suffix}", found, sqrt_kl=sqrt_kl)
    return found


def check_plan(plan: FrontierPlan, output: Path) -> None:
    """Everything that can be known before anything is trained; raises as `make_frontier`."""
    check_stages(plan.stages)
    before = [stage.folder for stage in plan.stages]
    for job in plan.jobs:
        check_inputs(job.config, before, title=f"method {job.method}")
    below = [Path(plan.evaluation.prompts)] if any(folder in Path(plan.evaluation.prompts).parents for folder in before) else []
    if not below:
        read_prompts(plan.evaluation.prompts)
    rewards = [plan.evaluation.reward, plan.best_of_n.reward if plan.best_of_n is not None else None]
    for name in rewards:
        if name is not None and not name.startswith(("model:", "implicit:")):
            load_reward(name)
    check_writable(output)


def key_of(config: RunConfig) -> str:
    """Names a run by what decides its weights: its resolved options, and the content of the files and models they name."""
    options = flattened(config.resolved())
    contents = [f"{key}={content_of(str(options[key]))}" for key in _PATHS if options.get(key) is not None]
    contents += [reward_content(config.rollout.reward)] if config.rollout is not None else []
    other = {key: value for key, value in options.items() if not key.startswith(KEEPING) and key not in _PATHS}
    other.pop("rollout.reward", None)
    return digest(json.dumps(other, sort_keys=True), *contents)


def reward_content(name: str) -> str:
    """Names a reward: that of a model by its weights, a function in the current folder by its file, others by name."""
    head, _, argument = name.partition(":")
    if head in ("model", "implicit"):
        return f"{head}:{content_of(argument)}"
    source = Path(*head.split(".")).with_suffix(".py")
    return f"{name} {content_of(str(source))}" if source.is_file() else name


@lru_cache(maxsize=256)
def content_of(name: str) -> str:
    """Names a file or a model's folder by content; what is neither, such as a Hub id, by name."""
    path = Path(name)
    if path.is_dir():
        path = Path(model_folder(name))
    if not path.exists():
        return name
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if _decides(file))
    return digest_of(part for file in files for part in [file.name if path.is_dir() else "", *_parts(file)])


def _decides(file: Path) -> bool:
    return file.is_file() and file.suffix in (".safetensors", ".json", ".jinja", ".model") and file.name not in _OF_TRAINING


def _parts(file: Path) -> Any:
    with open(file, "rb") as opened:
        while part := opened.read(_PART):
            yield part


def keeping(config: RunConfig, checkpoints: int) -> RunConfig:
    """`config` with about `checkpoints` checkpoints, evenly spaced, all of them kept, as are those of interruptions."""
    every = max(1, math.ceil(planned_steps(config) / checkpoints))
    return config.model_copy(update={"train": config.train.model_copy(update={"save_every_steps": every, "keep_last": _ALL})})


def planned_steps(config: RunConfig) -> int:
    """Optimizer steps of a run; rows are read and encoded where their number decides it."""
    if config.rollout is not None:
        planned = config.rollout.rounds * steps_per_round(config)
        return min(planned, config.train.max_steps or planned)
    if config.train.max_steps is not None:
        return config.train.max_steps
    source: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    with silence():
        tokenizer, facts = load_tokenizer(config.model.name, **source), model_facts(config.model.name, **source)
        return steps_of(config, prepare_rows(config, tokenizer, facts.context_tokens).train)


def spaced(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of `steps`, evenly spaced, the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[(place + 1) * len(steps) // count - 1] for place in range(count)]


def _planned(run: RunFolder, steps: Sequence[int]) -> list[int]:
    """Those of the saved `steps`, in order, that an unbroken run saves too, and no other, which an interruption added."""
    every = (run.read("config.json") or {}).get("train", {}).get("save_every_steps") or 1
    return [step for step in steps if step % every == 0 or step == steps[-1]]


def _saved_steps(run: RunFolder) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in run.complete_checkpoints()]


def _at(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"output_dir": str(folder)})})


def _read(path: Path) -> dict[str, Any] | None:
    """What an evaluation's file holds; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise StorageError(f"{path}: is not JSON", todo="Remove it: it is evaluated again.") from None
    return found if isinstance(found, dict) and "key" in found else None
