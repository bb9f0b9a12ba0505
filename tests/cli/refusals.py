"""What a refusal looks like, for the tests of bad input."""

from __future__ import annotations

from pathlib import Path

from cli.command_line import Done, prefopt

USAGE, DATA, MODEL, TRAINING, STORAGE = 2, 3, 4, 5, 6


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_refused(done: Done, code: int, *parts: str) -> None:
    """What an error looks like: its exit code, one paragraph with every one of `parts`, and a second line on the way out."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err and "fault of prefopt" not in done.err, done.err
    assert done.out == ""
    message = done.err[done.err.index("error: ") :].rstrip("\n")
    lines = message.split("\n")
    assert len(lines) == 2 and lines[1].startswith("  ") and len(lines[1].strip()) > 10, message
    assert len(message) < 700, message
    for part in parts:
        assert part in message, message


def train(model: Path, *words: object) -> Done:
    """`prefopt train` into ./run with small steps; `words` come last, so they win."""
    given = [
        f"model.name={model}",
        "data.train=rows.jsonl",
        "train.output_dir=run",
        "train.max_steps=2",
        "train.groups_per_step=4",
    ]
    return prefopt("train", *given, "train.precision=fp32", *words)
