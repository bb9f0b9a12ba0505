"""The lines of `prefopt runs`: one row a run, from the run folders alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefopt.core.errors import StorageError
from prefopt.core.losses.table import section_title
from prefopt.core.run_folder import RunFolder, find_runs
from prefopt.report.history import History, interval, number, part


def run_rows(root: Path) -> list[dict[str, Any]]:
    """Runs at `root` or up to two folders below, newest first.

    Keys: path, state, loss, model, step, total_steps, last_loss (mean of the last tenth), heldout_loss, heldout_accuracy
    (of labelled responses an area under the ROC curve), reward_difference, kl (nats a response), when (UTC, ISO 8601). None where the run does not say; state is
    "unreadable" where one of its files is broken.
    """
    rows = [_row(run) for run in find_runs(root)]
    return sorted(rows, key=lambda row: row["when"] or "", reverse=True)


def _row(run: RunFolder) -> dict[str, Any]:
    history = History(run.events())
    state = history.state()
    name: str = state.name
    try:
        config, evaluation = run.read("config.json"), run.read("evaluation.json")
    except StorageError:
        config, evaluation, name = None, None, "unreadable"
    accuracy = interval(part(evaluation, "heldout", "accuracy")) or history.heldout_accuracy()
    difference = interval(part(evaluation, "reward", "difference"))
    times = [time for event in history.events if (time := number(event.get("time"))) is not None]
    return {
        "path": str(run.path),
        "state": name,
        "loss": section_title(part(config, "loss")) or None,
        "model": part(config, "model", "name"),
        "step": state.step,
        "total_steps": state.total_steps,
        "last_loss": history.final("loss"),
        "heldout_loss": history.last("eval/loss"),
        "heldout_accuracy": accuracy[0] if accuracy else None,
        "reward_difference": difference[0] if difference else None,
        "kl": number(part(evaluation, "kl", "per_response", "value")),
        "when": datetime.fromtimestamp(times[-1], UTC).isoformat(timespec="seconds") if times else None,
    }
