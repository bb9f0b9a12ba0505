"""prefopt aligns language models with human preferences.

    from prefopt import DPOTrainer
    DPOTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset).train()

Names are imported when they are first used, so that `import prefopt` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.core.config import RunConfig
    from prefopt.core.errors import PrefoptError
    from prefopt.data.groups import Feedback, Group, Turn
    from prefopt.model.load import load_model
    from prefopt.model.selfcheck import selfcheck
    from prefopt.objective.apply import dpo_loss
    from prefopt.pipeline import train_run
    from prefopt.report.build import build_report
    from prefopt.rollout.sample import sample
    from prefopt.trainer import DPOConfig, DPOTrainer

_HOMES = {
    "DPOConfig": "prefopt.trainer",
    "DPOTrainer": "prefopt.trainer",
    "Feedback": "prefopt.data.groups",
    "Group": "prefopt.data.groups",
    "PrefoptError": "prefopt.core.errors",
    "RunConfig": "prefopt.core.config",
    "Turn": "prefopt.data.groups",
    "build_report": "prefopt.report.build",
    "dpo_loss": "prefopt.objective.apply",
    "load_model": "prefopt.model.load",
    "sample": "prefopt.rollout.sample",
    "selfcheck": "prefopt.model.selfcheck",
    "train_run": "prefopt.pipeline",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "Feedback",
    "Group",
    "PrefoptError",
    "RunConfig",
    "Turn",
    "build_report",
    "dpo_loss",
    "load_model",
    "sample",
    "selfcheck",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
