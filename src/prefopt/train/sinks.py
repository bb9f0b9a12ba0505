"""Optional places where metrics also go. A sink that fails is switched off with one line; the run goes on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from prefopt.core.errors import ConfigError
from prefopt.core.progress import say


class Sink(Protocol):
    """Receives metrics of a step."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...


class TensorBoardSink:
    """Writes below `RUN/tensorboard`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        writer = _needed("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(log_dir=str(folder / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class _ProjectSink:
    """Weights & Biases and trackio share one interface: init, then log."""

    package = ""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.module = _needed(self.package, self.package)
        self.module.init(project="prefopt", name=folder.name, config=config)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log(metrics, step=step)


class WandbSink(_ProjectSink):
    package = "wandb"


class TrackioSink(_ProjectSink):
    package = "trackio"


SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"train.sinks: {package} is not installed", todo=f"pip install {package}, or leave it out of train.sinks."
        ) from error


class Sinks:
    """All sinks of a run behind one call that never raises."""

    def __init__(self, names: tuple[str, ...], folder: Path, config: dict[str, Any]) -> None:
        self.open: dict[str, Sink] = {}
        for name in names:
            try:
                self.open[name] = SINKS[name](folder, config)
            except ConfigError:
                raise
            except Exception as error:  # whatever a service does, the run goes on
                self._failed(name, error)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name in list(self.open):
            try:
                self.open[name].log(metrics, step)
            except Exception as error:  # as above
                del self.open[name]
                self._failed(name, error)

    @staticmethod
    def _failed(name: str, error: Exception) -> None:
        say(f"warning: {name} failed and is switched off; events.jsonl has everything ({type(error).__name__}: {error})")
