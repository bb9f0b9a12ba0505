"""Self-BLEU against sacrebleu and its extremes; the embedding spread against plain cosines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.core.errors import ConfigError
from prefopt.evaluate.comparison import compare
from prefopt.evaluate.diversity import self_bleu
from prefopt.evaluate.evaluation import evaluate
from prefopt.evaluate.spread import embedding_spread
from prefopt.model.engine import LanguageModel
from prefopt.rollout.sample import SampleRow, sample
from tiny_word_model import language_model

TEXTS = st.lists(st.lists(st.sampled_from("abcd"), min_size=0, max_size=12).map(" ".join), min_size=2, max_size=6)


@given(TEXTS.filter(all))
def test_self_bleu_is_the_mean_of_sacrebleus_sentence_bleu(texts: list[str]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    each = [
        sacrebleu.sentence_bleu(text, texts[:at] + texts[at + 1 :], tokenize="none", smooth_method="exp").score
        for at, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(np.mean(each) / 100, abs=1e-9)


def test_extremes() -> None:
    assert self_bleu(["the same words, again", "The same words, again"]) == pytest.approx(1)
    assert self_bleu(["one two three", "four five six", "seven"]) == 0
    assert self_bleu(["", ""]) == 1
    assert self_bleu(["", "some words"]) == 0
    with pytest.raises(ValueError, match="found 1"):
        self_bleu(["alone"])


def test_by_hand() -> None:
    """`a b c d e` with the reference `a b c x e`: 4/5 words, 2/4 pairs, 1/3 triples, and no four: half of 1/2."""
    assert self_bleu(["a b c d e", "a b c x e"]) == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** 0.25)
    short = self_bleu(["a b", "a b c d"])
    own, other = np.exp(1 - 4 / 2), (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** 0.25
    assert short == pytest.approx((own + other) / 2)


@given(TEXTS, st.randoms())
def test_order_does_not_matter_and_a_copy_makes_it_no_more_varied(texts: list[str], random: object) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert self_bleu(shuffled) == pytest.approx(self_bleu(texts))
    assert 0 <= self_bleu(texts) <= self_bleu(texts * 2) == pytest.approx(1)


def row(prompt: str, response: str) -> SampleRow:
    return SampleRow(prompt, np.zeros(1, np.int32), response, np.arange(len(response.split()) + 1, dtype=np.int32), True)


def test_compare_averages_over_prompts_with_several_samples() -> None:
    rows = [row("p", "one two"), row("p", "one two"), row("q", "three"), row("q", "four"), row("r", "alone")]
    diversity = compare(rows, rows).sections["diversity"]["policy"]
    assert diversity["self_bleu"] == pytest.approx((1 + 0) / 2)
    assert "self_bleu" not in compare(rows[-1:], rows[-1:]).sections["diversity"]["policy"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model(seed=2)


@torch.no_grad()
def plain_embedding(model: LanguageModel, one: SampleRow) -> np.ndarray:
    ids = torch.tensor([[*one.prompt_ids.tolist(), *one.response_ids.tolist()]])
    hidden = model.model.base_model(input_ids=ids).last_hidden_state[0]
    return hidden[len(one.prompt_ids) - 1 : -1].mean(dim=0).double().numpy()


def plain_spread(model: LanguageModel, prompts: Sequence[Sequence[SampleRow]]) -> float:
    means = []
    for members in prompts:
        vectors = [plain_embedding(model, one) for one in members]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(vectors, 2)]
        means.append(1 - np.mean(cosines))
    return float(np.mean(means))


def test_the_spread_is_that_of_plain_hidden_states(model: LanguageModel) -> None:
    rows = sample(model, ["a b", "c d e", "e"], n=3, max_new_tokens=5, seed=1)
    wanted = plain_spread(model, [rows[:3], rows[3:6], rows[6:]])
    assert wanted > 1e-3
    for budget in (8, 4096):
        assert embedding_spread(model, rows, micro_batch_tokens=budget) == pytest.approx(wanted, rel=1e-4)
    interleaved = [rows[at] for at in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    assert embedding_spread(model, interleaved) == pytest.approx(wanted, rel=1e-4)


def test_equal_samples_have_no_spread_and_single_ones_none_at_all(model: LanguageModel) -> None:
    rows = sample(model, ["a b", "c"], max_new_tokens=4)
    assert embedding_spread(model, [one for one in rows for _ in range(3)]) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="no prompt has two samples"):
        embedding_spread(model, rows)


def test_the_evaluation_has_it_where_it_is_asked_for(model: LanguageModel) -> None:
    policy = language_model(seed=3)
    result, _ = evaluate(policy, model, prompts=["a b", "c"], samples_per_prompt=2, max_new_tokens=4, spread=True)
    assert set(result["diversity"]["policy"]) == {"distinct_1", "distinct_2", "self_bleu", "spread"}
    with pytest.raises(ConfigError, match="samples of one prompt"):
        evaluate(policy, model, prompts=["a b"], spread=True)
