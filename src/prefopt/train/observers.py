"""Logging, evaluation, saving and stopping: each watches the steps and knows nothing of the others."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prefopt.core.errors import Interrupted
from prefopt.core.events import Event, EventLog
from prefopt.core.progress import Progress, say
from prefopt.core.run_folder import RunFolder
from prefopt.core.statistics import area_interval, wilson
from prefopt.data.encode import TokenGroup
from prefopt.train.checkpoint import prune_checkpoints, save_checkpoint
from prefopt.train.loop import Training
from prefopt.train.record import StepRecord, StepValues
from prefopt.train.sinks import Sinks


@dataclass
class LogSteps:
    """Every step into events.jsonl and the sinks, and onto the progress bar."""

    log: EventLog
    sinks: Sinks
    bar: Progress

    def after_step(self, record: StepRecord) -> None:
        metrics = record.metrics()
        self.log.write("step", step=record.step, **metrics)
        self.sinks.log(metrics, record.step)
        margin = f", margin {metrics['rewards/margins']:.3f}" if "rewards/margins" in metrics else ""
        self.bar.advance(1, f"loss {metrics['loss']:.4f}{margin}, {metrics['tokens_per_second']:.0f} tokens/s")


@dataclass
class EvaluateHeldOut:
    """Loss, accuracy and margins on held-out groups, every `every` steps and at the end; `measure(0)` before the first step."""

    training: Training
    groups: Sequence[TokenGroup]
    every: int
    log: EventLog
    sinks: Sinks
    best_loss: float = math.inf
    best_step: int = 0

    def after_step(self, record: StepRecord) -> None:
        if record.step % self.every and record.step != self.training.total_steps:
            return
        self._compare(self.measure(record.step)["eval/loss"], record.step)

    def measure(self, step: int) -> dict[str, Any]:
        """Evaluate now, log it as of optimizer step `step`, and return the metrics."""
        metrics = held_out_metrics(self.training.evaluate(self.groups))
        margins = metrics.pop("margins")
        self.log.write("eval", step=step, **metrics, margins=margins)
        self.sinks.log({name: value for name, value in metrics.items() if isinstance(value, float)}, step)
        accuracy = ""
        if "eval/rewards/accuracies_low" in metrics:
            value, low, high = (metrics[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high"))
            accuracy = f" accuracy {value:.3f} ({low:.3f} to {high:.3f}),"
        say(f"step {step}: held-out{accuracy} loss {metrics['eval/loss']:.4f}")
        return metrics

    def remember(self, events: Sequence[Event]) -> None:
        """Take up the best loss of a run that is resumed."""
        for event in events:
            if event["kind"] == "eval" and event["step"] > 0 and event["eval/loss"] is not None:
                self._compare(event["eval/loss"], event["step"])

    def _compare(self, loss: float, step: int) -> None:
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step


def held_out_metrics(values: StepValues) -> dict[str, Any]:
    """Metrics of held-out groups with a 95 % interval of the accuracy, and every margin.

    The interval is Wilson's over groups; for labelled responses, whose accuracy is an area under a curve, Newcombe's.
    """
    metrics: dict[str, Any] = {
        f"eval/{name}": value for name, value in values.metrics().items() if not name.startswith("lengths")
    }
    metrics["eval/groups"] = len(values.sources)
    metrics["margins"] = [round(float(margin), 5) for margin in values.margins] if values.has_rewards else []
    if "eval/rewards/accuracies" not in metrics:
        return metrics
    share, count = values.accuracy()
    if (values.responses == 1).all():
        good = int((values.target > 0.5).sum())
        low, high = area_interval(share, good, count - good)
    else:
        low, high = wilson(share, count)
    metrics["eval/rewards/accuracies_low"], metrics["eval/rewards/accuracies_high"] = low, high
    return metrics


@dataclass
class SaveCheckpoints:
    """A checkpoint every `every` steps (None: only at the end); keeps the newest, and the best where asked."""

    training: Training
    run: RunFolder
    log: EventLog
    every: int | None
    keep_last: int
    held_out: EvaluateHeldOut | None = None

    def after_step(self, record: StepRecord) -> None:
        due = self.every is not None and record.step % self.every == 0
        best = self.held_out is not None and self.held_out.best_step == record.step
        if due or best or record.step == self.training.total_steps:
            self.save()

    def save(self) -> None:
        """Save now, then remove what is no longer kept."""
        step = self.training.step
        folder = save_checkpoint(self.training, self.run.checkpoints / f"step-{step:06d}")
        self.log.write("checkpoint", step=step, path=str(folder.relative_to(self.run.path)))
        kept = {f"step-{self.held_out.best_step:06d}"} if self.held_out is not None else set()
        prune_checkpoints(self.run.checkpoints, keep_last=self.keep_last, keep=kept)


@dataclass
class StopOnSignal:
    """On Ctrl-C: the step is finished, a checkpoint saved, and the run ends with how to go on."""

    saver: SaveCheckpoints
    log: EventLog
    resume_command: str
    asked: bool = False

    def after_step(self, record: StepRecord) -> None:
        if not self.asked or record.step == self.saver.training.total_steps:
            return
        self.saver.save()
        self.log.write("stop", step=record.step, reason="interrupted by the user")
        raise Interrupted(
            f"Stopped after step {record.step} of {self.saver.training.total_steps}; a checkpoint is saved",
            todo=f"Go on with: {self.resume_command}",
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C asks for a stop within the block; a second Ctrl-C stops at once."""

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say("stopping after this step; press Ctrl-C again to stop at once")

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: the host program keeps its own handling
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
