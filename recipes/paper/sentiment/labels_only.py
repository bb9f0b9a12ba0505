"""Pairs as the reward model of the sentiment task sees them: prompt, chosen and rejected, and nothing else.

    python recipes/paper/sentiment/labels_only.py pairs_train.jsonl --output labels_train.jsonl

Left out are the true scores, whose difference `reward` would take for a margin, and which responses were cut: as a reward
(`model:PATH`) the model reads every response as one that came to its end, so that is how it has to learn them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prefopt.core.files import whole_file
from prefopt.data.read import read_rows

FIELDS = ("prompt", "chosen", "rejected")


def labels_only(source: Path, output: Path) -> int:
    """Write the pairs of `source` with FIELDS alone to `output`, whole or not at all, and count them."""
    rows = read_rows(source).rows
    with whole_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({field: row[field] for field in FIELDS}, ensure_ascii=False) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="pairs that prefopt label wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    print(f"{args.output}: {labels_only(args.source, args.output)} pairs")


if __name__ == "__main__":
    main()
