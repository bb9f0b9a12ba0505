"""Token ids kept on disk by content: the second run over the same rows and tokenizer tokenises nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefopt.core.files import cache_root, digest, digest_of
from prefopt.core.memory import collector_paused
from prefopt.data.encode import TokenSet, TrainOn, encode_groups
from prefopt.data.encode_parts import encode_parts
from prefopt.data.group_store import group_contents, group_feedbacks
from prefopt.data.groups import BadRow, GroupSet
from prefopt.data.token_store import read_tokens, writing_tokens

# Raised whenever rendering or tokenising can give other ids for the same text, or the file has another form.
ENCODING_VERSION = 3


def cached_encoding(
    groups: GroupSet, tokenizer: Any, *, template: str = "auto", train_on: TrainOn = "all", root: Path | None = None
) -> TokenSet:
    """`encode_groups`, read from the cache where it holds this content. A damaged entry is made again.

    The token ids stay on disk: `groups` of the result makes each group when it is asked for.
    """
    if not groups.groups:
        return encode_groups(groups, tokenizer, template=template, train_on=train_on)
    path = (root or cache_root() / "tokens") / f"{encoding_key(groups, tokenizer, template, train_on)}.arrow"
    if path.exists():
        try:
            return _read(path, groups)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            path.unlink(missing_ok=True)
    bad: list[BadRow] = []
    special_text: list[str] = []
    made = encode_parts(groups.groups, tokenizer, template=template, train_on=train_on)
    with collector_paused(), writing_tokens(path) as writer, closing(made) as parts:
        for part in parts:
            for batch in part.batches:
                writer.add(batch)
            bad += part.bad
            special_text += part.special_text
        writer.notes = {"bad": [asdict(row) for row in bad], "special_text": special_text}
    return _read(path, groups)


def _read(path: Path, groups: GroupSet) -> TokenSet:
    rows, notes = read_tokens(path, group_feedbacks(groups.groups))
    return TokenSet(rows, tuple(BadRow(**row) for row in notes["bad"]), tuple(notes["special_text"]))


def encoding_key(groups: GroupSet, tokenizer: Any, template: str, train_on: TrainOn = "all") -> str:
    """Digest of everything that ids and loss flags depend on: texts, roles, what was cut, tokenizer, template, `train_on`."""
    template_text = Path(template).read_text(encoding="utf-8") if Path(template).is_file() else template

    def parts() -> Iterator[str | bytes]:
        yield from (str(ENCODING_VERSION), template_text, train_on, tokenizer_identity(tokenizer))
        yield from group_contents(groups.groups)

    return digest_of(parts())


def tokenizer_identity(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return digest(body, special, json.dumps(getattr(tokenizer, "chat_template", None)))
