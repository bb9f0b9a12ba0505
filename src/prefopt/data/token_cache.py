"""Token ids kept on disk by content: the second run over the same rows and tokenizer tokenises nothing."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.files import cache_root, digest, whole_file
from prefopt.data.encode import TokenGroup, TokenSet, TrainOn, encode_groups
from prefopt.data.groups import BadRow, GroupSet

# Raised whenever rendering or tokenising can give other ids for the same text.
ENCODING_VERSION = 2


def cached_encoding(
    groups: GroupSet, tokenizer: Any, *, template: str = "auto", train_on: TrainOn = "all", root: Path | None = None
) -> TokenSet:
    """`encode_groups`, read from the cache where it holds this content. A damaged entry is made again.

    Groups are found again by their `source`: where two have the same, nothing is cached.
    """
    if not groups.groups or len({group.source for group in groups.groups}) < len(groups.groups):
        return encode_groups(groups, tokenizer, template=template, train_on=train_on)
    path = (root or cache_root() / "tokens") / f"{encoding_key(groups, tokenizer, template, train_on)}.npz"
    if path.exists():
        try:
            return _read(path, groups)
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
    tokens = encode_groups(groups, tokenizer, template=template, train_on=train_on)
    _write(path, groups, tokens)
    return tokens


def encoding_key(groups: GroupSet, tokenizer: Any, template: str, train_on: TrainOn = "all") -> str:
    """Digest of everything that ids and loss flags depend on: texts, roles, what was cut, tokenizer, template, `train_on`."""
    template_text = Path(template).read_text(encoding="utf-8") if Path(template).is_file() else template
    parts = [str(ENCODING_VERSION), template_text, train_on, tokenizer_identity(tokenizer)]
    parts += [
        repr((group.prompt, group.responses, group.form, group.tools, group.finished, group.source)) for group in groups.groups
    ]
    return digest(*parts)


def tokenizer_identity(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return digest(body, special, json.dumps(getattr(tokenizer, "chat_template", None)))


def _write(path: Path, groups: GroupSet, tokens: TokenSet) -> None:
    place = {group.source: number for number, group in enumerate(groups.groups)}
    parts = [part for group in tokens.groups for part in (group.prompt_ids, *group.response_ids)]
    flags = [part for group in tokens.groups for part in group.scored]
    notes = {
        "bad": [asdict(row) for row in tokens.bad],
        "special_text": list(tokens.special_text),
        "places": [place[group.source] for group in tokens.groups],
    }
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            ids=np.concatenate(parts) if parts else np.zeros(0, np.int32),
            lengths=np.array([len(part) for part in parts], dtype=np.int64),
            scored=np.concatenate(flags) if flags else np.zeros(0, bool),
            responses=np.array([len(group.response_ids) for group in tokens.groups], dtype=np.int64),
            finished=np.array([done for group in tokens.groups for done in group.finished], dtype=bool),
            notes=np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8),
        )


def _read(path: Path, groups: GroupSet) -> TokenSet:
    with open(path, "rb") as file, np.load(file) as stored:
        names = ("ids", "lengths", "scored", "responses", "finished")
        ids, lengths, scored, responses, finished = (stored[name] for name in names)
        notes = json.loads(stored["notes"].tobytes())
    if len(ids) != lengths.sum() or len(lengths) != len(responses) + responses.sum() or len(finished) != responses.sum():
        raise ValueError(f"{path}: lengths do not add up")
    parts = iter(np.split(ids, np.cumsum(lengths)[:-1]))
    ended = iter(finished.tolist())
    made = []
    start = 0
    for place, count in zip(notes["places"], responses, strict=True):
        prompt = next(parts)
        answers = tuple(next(parts) for _ in range(count))
        flags = []
        for answer in answers:
            flags.append(scored[start : start + len(answer)])
            start += len(answer)
        group = groups.groups[place]
        made.append(
            TokenGroup(prompt, answers, tuple(flags), group.feedback, group.source, tuple(next(ended) for _ in answers))
        )
    return TokenSet(tuple(made), tuple(BadRow(**row) for row in notes["bad"]), tuple(notes["special_text"]))
