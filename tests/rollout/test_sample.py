"""Samples are what the model itself would say, in the order they were asked for, and leave the model as it was."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import GenerationConfig

import prefopt.rollout.sample as sample_module
from prefopt.core.errors import ConfigError, DataError, ModelError
from prefopt.model.engine import LanguageModel
from prefopt.rollout.sample import read_samples, sample, samples_of, write_samples
from tiny_word_model import language_model

SHARED = Path(os.environ.get("PREFOPT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
PROMPTS = ["a b c d e", "a", "b c", "e e e e e e", "d c"]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return language_model()


@torch.no_grad()
def next_probabilities(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    return torch.softmax(model.model(torch.tensor([ids])).logits[0, -1].float(), dim=-1)


def test_greedy_is_the_argmax_of_the_plain_forward(tiny: LanguageModel) -> None:
    rows = sample(tiny, PROMPTS, temperature=0, max_new_tokens=9, batch_size=3)
    for row in rows:
        ids: list[int] = row.prompt_ids.tolist()
        while len(ids) < len(row.prompt_ids) + 9 and ids[len(row.prompt_ids) :][-1:] != [1]:
            ids.append(int(next_probabilities(tiny, ids).argmax()))
        assert row.prompt_ids.tolist() + row.response_ids.tolist() == ids
        assert row.finished == (ids[-1] == 1)


def test_rows_come_back_in_the_order_of_the_prompts(tiny: LanguageModel) -> None:
    rows = sample(tiny, PROMPTS, n=3, max_new_tokens=4, batch_size=4)
    assert [row.prompt for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert [len(row.prompt_ids) for row in rows] == [len(prompt.split()) for prompt in PROMPTS for _ in range(3)]


def test_a_response_stops_at_its_end_of_turn_or_at_the_limit(tiny: LanguageModel) -> None:
    rows = sample(tiny, PROMPTS, n=20, max_new_tokens=5)
    assert {row.finished for row in rows} == {True, False}
    for row in rows:
        ids = row.response_ids.tolist()
        assert 1 not in ids[:-1]
        assert row.finished == (ids[-1] == 1)
        assert row.finished or len(ids) == 5
        assert "<" not in row.response


def test_the_first_token_is_drawn_from_the_models_own_distribution(tiny: LanguageModel) -> None:
    draws = 3000
    rows = sample(tiny, ["a b"], n=draws, max_new_tokens=1, batch_size=1000)
    counts = Counter(int(row.response_ids[0]) for row in rows)
    expected = next_probabilities(tiny, rows[0].prompt_ids.tolist()).tolist()
    for token, p in enumerate(expected):
        assert abs(counts[token] / draws - p) < 4 * math.sqrt(p * (1 - p) / draws) + 1e-3


def test_top_p_keeps_the_smallest_set_that_holds_p(tiny: LanguageModel) -> None:
    rows = sample(tiny, ["a b"], n=500, max_new_tokens=1, batch_size=500, top_p=0.6)
    p = next_probabilities(tiny, rows[0].prompt_ids.tolist())
    order = p.argsort(descending=True).tolist()
    needed = int((p[order].cumsum(0) < 0.6).sum()) + 1
    assert {int(row.response_ids[0]) for row in rows} == set(order[:needed])


def test_the_seed_decides_and_torch_keeps_its_own_random_state(tiny: LanguageModel) -> None:
    def ids(seed: int) -> list[list[int]]:
        return [row.response_ids.tolist() for row in sample(tiny, PROMPTS, n=4, max_new_tokens=6, batch_size=8, seed=seed)]

    torch.manual_seed(11)
    first = ids(1)
    after = torch.rand(3)
    torch.manual_seed(99)
    assert ids(1) == first != ids(2)
    assert len({tuple(response) for response in first[:4]}) > 1
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), after)


def test_settings_of_the_model_are_set_aside_and_put_back(tiny: LanguageModel) -> None:
    before = [row.response_ids.tolist() for row in sample(tiny, PROMPTS, n=4, max_new_tokens=6)]
    inner: Any = tiny.model
    kept = inner.generation_config
    own: Any = GenerationConfig
    inner.generation_config = own(top_k=1, repetition_penalty=5.0, max_length=3, suppress_tokens=[2, 3], do_sample=True)
    mine = inner.generation_config
    inner.config.use_cache = False
    inner.train()
    try:
        assert [row.response_ids.tolist() for row in sample(tiny, PROMPTS, n=4, max_new_tokens=6)] == before
        assert inner.training
        assert inner.generation_config is mine
        assert inner.config.use_cache is False
        with pytest.raises(ModelError):
            sample(tiny, ["a " * 40], max_new_tokens=6)
        assert inner.training
    finally:
        inner.generation_config = kept
        inner.config.use_cache = True
        inner.eval()


def test_a_tokenizer_without_padding_gives_the_same_samples(tiny: LanguageModel) -> None:
    one, other = (
        [row.response_ids.tolist() for row in sample(model, PROMPTS, n=3, max_new_tokens=6)]
        for model in (tiny, language_model(pad=False))
    )
    assert one == other


def test_prompts_that_do_not_fit_are_named(tiny: LanguageModel) -> None:
    with pytest.raises(ModelError, match=r"prompt 1: 30 prompt tokens and 5 new ones.*1 of 2") as caught:
        sample(tiny, ["a", "a " * 30], max_new_tokens=5)
    assert "at most 2" in str(caught.value)
    assert len(sample(tiny, ["a " * 30], max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    "settings",
    [{"n": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}]
    + [{"batch_size": 0}, {"temperature": 0.0, "n": 2}],
)
def test_settings_out_of_range_are_refused(tiny: LanguageModel, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        sample(tiny, ["a"], **settings)


def test_messages_without_a_template_are_refused_before_sampling(tiny: LanguageModel) -> None:
    with pytest.raises(ModelError, match="template"):
        sample(tiny, [[{"role": "user", "content": "a"}]])


def test_the_file_of_samples_has_a_line_a_prompt(tiny: LanguageModel, tmp_path: Path) -> None:
    rows = sample(tiny, PROMPTS, n=2, max_new_tokens=4)
    write_samples(tmp_path / "s.jsonl", rows)
    lines = read_samples(tmp_path / "s.jsonl")
    assert lines == samples_of(rows)
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [text for line in lines for text in line["responses"]] == [row.response for row in rows]
    assert [size for line in lines for size in line["response_tokens"]] == [len(row.response_ids) for row in rows]
    assert [done for line in lines for done in line["finished"]] == [row.finished for row in rows]
    (tmp_path / "bad.jsonl").write_text(json.dumps(lines[0]) + '\n{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        read_samples(tmp_path / "bad.jsonl")


def test_words_keep_their_spaces_behind_the_prompt_of_a_real_model() -> None:
    folder = SHARED / "models" / "stories15M"
    if not folder.is_dir():
        pytest.skip("the model stories15M is not here")
    from prefopt.model.load import load_model

    model = load_model(str(folder), precision="fp32")
    (row,) = sample(model, ["Once upon a"], temperature=0, max_new_tokens=6)
    assert row.response.startswith(" time")
    whole = model.tokenizer.decode(np.concatenate([row.prompt_ids, row.response_ids]), skip_special_tokens=True)
    assert whole == "Once upon a" + row.response


def test_a_response_depends_on_its_own_stream_only(tiny: LanguageModel) -> None:
    def ids(prompts: list[str], n: int, batch_size: int) -> list[list[list[int]]]:
        rows = sample(tiny, prompts, n=n, max_new_tokens=9, seed=4, batch_size=batch_size)
        return [[row.response_ids.tolist() for row in rows[at : at + n]] for at in range(0, len(rows), n)]

    whole = ids(PROMPTS, 4, 7)
    assert ids(PROMPTS, 4, 1) == ids(PROMPTS, 4, 100) == whole
    assert ids(PROMPTS[:3], 4, 5) == whole[:3]
    assert ids(PROMPTS, 2, 6) == [responses[:2] for responses in whole]
    assert len({tuple(response) for responses in whole for response in responses}) > 12


def test_both_ways_of_computing_draw_the_same_responses(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"n": 5, "max_new_tokens": 9, "seed": 2, "batch_size": 4, "top_p": 0.95, "temperature": 1.3}
    own = [row.response_ids.tolist() for row in sample(tiny, PROMPTS, **settings)]
    monkeypatch.setattr(sample_module, "follows", lambda *arguments: False)
    assert [row.response_ids.tolist() for row in sample(tiny, PROMPTS, **settings)] == own
    assert len({len(response) for response in own}) > 3


def test_whole_responses_have_the_policys_own_probabilities(tiny: LanguageModel) -> None:
    """Pearson's chi-square over every response of at most two tokens, against their exact probabilities."""
    draws = 4000
    rows = sample(tiny, ["a b"], n=draws, max_new_tokens=2, batch_size=500)
    counts = Counter(tuple(row.response_ids.tolist()) for row in rows)
    prompt = rows[0].prompt_ids.tolist()
    expected: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(next_probabilities(tiny, prompt).tolist()):
        after = [1.0] if first == 1 else next_probabilities(tiny, [*prompt, first]).tolist()
        expected |= {(first,) if first == 1 else (first, second): p * q for second, q in enumerate(after)}
    assert math.isclose(sum(expected.values()), 1, abs_tol=1e-5)
    frequent = [response for response, p in expected.items() if p * draws >= 5]
    rare = draws * (1 - sum(expected[response] for response in frequent))
    seen = sum(counts[response] for response in frequent)
    square = sum((counts[response] - draws * expected[response]) ** 2 / (draws * expected[response]) for response in frequent)
    square += (draws - seen - rare) ** 2 / rare
    assert len(frequent) > 12
    assert chi2.sf(square, len(frequent)) > 1e-3
