"""Tokenising word by word gives the ids of the whole text, or is not done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.tiny_tokenizers import byte_level, metaspace
from prefopt.data import words
from prefopt.data.words import WordEncoder, word_encoder

CORPUS = ["the boat is on the water, isn't it?  12 + 345 = 357 \n\nHuman: yes, the water.\nAssistant: no   it's là 你好"] * 4
SPECIAL = ["<|im_start|>", "<|im_end|>"]
BITS = [*" \n\t", "  ", " \n", "\r\n", "\u00a0", "\u2003", "\x1c", "\x85", "the", "water", "'s", "12", "3", "½", "٣", "▁", "▁▁"]
BITS += ["é", "e\u0301", "\u0301", "你好", "😀", ".", "...", "?!", "_", "T", *SPECIAL, "<s>", "</s>", "<unk>", "<|"]
TEXTS = st.lists(st.lists(st.sampled_from(BITS), max_size=14).map("".join) | st.text(max_size=20), min_size=1, max_size=6)

LATER = sorted(words._PATTERNS)


def trained(step: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    inner = Tokenizer(models.BPE(**options))
    inner.pre_tokenizer = step
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def bytes_after(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def sentence_pieces() -> Tokenizer:
    """Llama 2's way, with merges inside words only, as its own vocabulary has them."""
    body = json.loads(metaspace().backend_tokenizer.to_str())
    vocab = {token: 0 for token in body["model"]["vocab"] if "▁" not in token.lstrip("▁")} | {"▁▁": 0, "▁▁▁▁": 0}
    body["model"]["vocab"] = {token: number for number, token in enumerate(vocab)}
    merges = [pair for pair in body["model"]["merges"] if "".join(pair) in vocab and set(pair) <= vocab.keys()]
    body["model"]["merges"] = [*merges, ["▁", "▁"], ["▁▁", "▁▁"]]
    for token in body["added_tokens"]:
        token["id"] = body["model"]["vocab"][token["content"]]
    body["post_processor"] = None
    return Tokenizer.from_str(json.dumps(body))


MADE: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: byte_level().backend_tokenizer,
    "SmolLM2": lambda: trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "Llama 3": lambda: trained(bytes_after(split(LATER[1])), ignore_merges=True),
    "Qwen 2": lambda: trained(bytes_after(split(LATER[0])), normalizers.NFC()),
    "Llama 2": sentence_pieces,
}


def whole(inner: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [found.ids for found in inner.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope="module", params=MADE)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, WordEncoder]:
    inner = MADE[request.param]()
    encoder = word_encoder(inner, whole(inner))
    assert encoder is not None, request.param
    return inner, encoder


@given(texts=TEXTS)
@settings(max_examples=300, deadline=None)
def test_words_give_the_ids_of_the_whole_text(pair: tuple[Tokenizer, WordEncoder], texts: list[str]) -> None:
    """The memory of words lasts from one example to the next, as it does from one chunk of rows to the next."""
    inner, encoder = pair
    for _ in range(2):
        assert [ids.tolist() for ids in encoder.encode(texts)] == whole(inner)(texts)


def test_known_words_are_not_tokenised_again() -> None:
    inner = MADE["GPT-2"]()
    asked: list[str] = []

    def counting(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return whole(inner)(texts)

    encoder = word_encoder(inner, counting)
    assert encoder is not None
    first = encoder.encode(["the boat is on the water"])
    asked.clear()
    again = encoder.encode(["the boat is on the water", "the water is on the boat"])
    assert not asked and again[0].tolist() == first[0].tolist()
    encoder.encode(["the boat is on  the shore"])
    assert sorted(" ".join(asked).replace(encoder.mark, " ").split()) == ["on", "shore"]  # "on" with a space behind it


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_WORDS_KEPT", 50)
    inner = MADE["GPT-2"]()
    encoder = word_encoder(inner, whole(inner))
    assert encoder is not None
    for number in range(40):
        texts = [f"{number} {number + 1000} {'x' * 60}{number} and so on"]
        assert [ids.tolist() for ids in encoder.encode(texts)] == whole(inner)(texts)
        assert len(encoder.known) < 120 and encoder.table.count < 120
        assert max(map(len, encoder.known)) <= 48


def changed(name: str, **parts: Any) -> Tokenizer:
    body = json.loads(MADE[name]().to_str())
    for key, value in parts.items():
        body[key] = {**body[key], **value} if isinstance(body[key], dict) else value
    return Tokenizer.from_str(json.dumps(body))


def with_added(**options: Any) -> Tokenizer:
    from tokenizers import AddedToken

    inner = MADE["GPT-2"]()
    inner.add_tokens([AddedToken(**options)])
    return inner


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "a space in front of a text": lambda: changed("GPT-2", pre_tokenizer={"add_prefix_space": True}),
    "no split at all": lambda: changed("GPT-2", pre_tokenizer={"use_regex": False}),
    "merges left out at random": lambda: changed("GPT-2", model={"dropout": 0.5}),
    "another split": lambda: trained(bytes_after(split(r"\w+ ?|."))),
    "a normalizer": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
    "merges across spaces": lambda: metaspace().backend_tokenizer,
    "an added token with a space": lambda: with_added(content="the boat"),
    "an added token that takes spaces": lambda: with_added(content="boat", lstrip=True),
    "an added token for whole words": lambda: with_added(content="boat", single_word=True),
    "words, not byte pairs": lambda: Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_that_may_look_further_is_left_alone(name: str) -> None:
    inner = OTHERS[name]()
    assert word_encoder(inner, whole(inner)) is None


@pytest.mark.parametrize("name", ["stories15M"])
def test_a_real_vocabulary(shared: Path, name: str) -> None:
    path = shared / "models" / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"{name} is not there")
    inner = Tokenizer.from_file(str(path))
    encoder = word_encoder(inner, whole(inner))
    assert encoder is not None
    texts = ["".join(BITS[(7 * start + 5 * step) % len(BITS)] for step in range(start % 9)) for start in range(2000)]
    assert [ids.tolist() for ids in encoder.encode(texts)] == whole(inner)(texts)
