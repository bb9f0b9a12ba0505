"""The ground-truth reward of the sentiment task: a frozen classifier of film reviews, read without scikit-learn or pickle.

    PYTHONPATH=recipes/paper/sentiment prefopt label samples.jsonl --reward sentiment_reward:score -o pairs.jsonl

`prepare.py` writes the classifier to runs/paper/sentiment/data/reward.npz; $PREFOPT_SENTIMENT_REWARD names another file.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from prefopt.core.errors import ConfigError
from prefopt.core.files import whole_file
from prefopt.rollout.prompts import Given, prompt_text

FILE = Path(__file__).resolve().parents[3] / "runs" / "paper" / "sentiment" / "data" / "reward.npz"
VARIABLE = "PREFOPT_SENTIMENT_REWARD"
_WORD = re.compile(r"\b\w\w+\b")  # what scikit-learn's TfidfVectorizer takes for a word


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on TF-IDF of words and pairs of neighbours: for each term its idf and its weight."""

    terms: dict[str, tuple[float, float]]
    intercept: float

    def log_odds(self, text: str) -> float:
        """log(P(positive) / P(negative)) of a text; the intercept where it knows none of its terms."""
        counts = Counter(term for term in terms_of(text) if term in self.terms)
        squares = product = 0.0
        for term, count in counts.items():
            idf, weight = self.terms[term]
            value = (1 + math.log(count)) * idf
            squares += value * value
            product += value * weight
        return self.intercept + (product / math.sqrt(squares) if squares else 0.0)


def terms_of(text: str) -> list[str]:
    """Words of two letters or more in lower case, then pairs of neighbours."""
    words = _WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


def freeze(path: Path, terms: Sequence[str], idf: Sequence[float], weight: Sequence[float], intercept: float) -> None:
    """Write a classifier to `path`, whole or not at all."""
    arrays = {"terms": np.array(terms), "idf": np.array(idf), "weight": np.array(weight), "intercept": np.array(intercept)}
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)


@cache
def thawed(path: Path) -> Classifier:
    """The classifier in `path`; ConfigError where there is none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = (arrays["terms"].tolist(), arrays["idf"].tolist(), arrays["weight"].tolist())
            terms = {term: (idf, weight) for term, idf, weight in zip(*columns, strict=True)}
            return Classifier(terms, float(arrays["intercept"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path}: holds no sentiment classifier ({error})",
            todo=f"Run python recipes/paper/sentiment/prepare.py, or name a file that it wrote in ${VARIABLE}.",
        ) from error


def score(prompts: Sequence[Given], responses: Sequence[str]) -> list[float]:
    """Log-odds that the review, prompt and response together, is positive: the reward that labels are drawn from.

    Log-odds are the reward of Bradley-Terry with scale 1, so that one beta means the same to DPO, to a reward model
    learnt from the labels, and as the price of a nat of KL. Terms are normalised: it is bounded by the weights.
    """
    classifier = thawed(Path(os.environ.get(VARIABLE) or FILE))
    return [classifier.log_odds(prompt_text(prompt) + text) for prompt, text in zip(prompts, responses, strict=True)]


def probability(prompts: Sequence[Given], responses: Sequence[str]) -> list[float]:
    """P(positive) of each review, from 0 to 1: the reward axis of arXiv 2305.18290 figure 2."""
    return [0.5 * (1 + math.tanh(value / 2)) for value in score(prompts, responses)]
