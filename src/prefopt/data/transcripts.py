"""Prompts inside texts: splitting and joining HH-style transcripts, and what two conversations share. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefopt.data.groups import Turn

HH_MARKERS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_FULL_WIDTH_MARKS = frozenset("\u3002\uff01\uff1f\uff1b\uff1a\uff0c\u3001")  # scripts without spaces have places to cut too


def is_hh(text: str) -> bool:
    """Whether `text` is an HH-style transcript: it begins with `\\n\\nHuman:` or `\\n\\nAssistant:`."""
    return text.startswith(tuple(HH_MARKERS.values()))


def split_hh(text: str) -> tuple[Turn, ...]:
    """Turns of an HH-style transcript; ValueError where `text` does not begin with a marker.

    The separators are not content: one space after the marker and newlines at the end of a turn are taken off,
    everything else is kept. A transcript that ends with an open `\\n\\nAssistant:` ends with an empty turn.
    """
    if not is_hh(text):
        raise ValueError(f"not an HH-style transcript: {text[:40]!r}")
    parts = _MARKER.split(text)[1:]
    names, bodies = parts[::2], parts[1::2]
    return tuple(Turn(_ROLES[name], body.removeprefix(" ").rstrip("\n")) for name, body in zip(names, bodies, strict=True))


def join_hh(turns: Sequence[Turn]) -> str:
    """The HH-style transcript of `turns` by user and assistant; `split_hh` is its inverse. ValueError for other roles."""
    for turn in turns:
        if turn.role not in HH_MARKERS:
            raise ValueError(f'an HH-style transcript has no turns by "{turn.role}"')
    return "".join(f"{HH_MARKERS[turn.role]} {turn.content}" for turn in turns)


def common_turns(first: Sequence[Turn], second: Sequence[Turn]) -> int:
    """How many turns both conversations begin with, at most so many that each has an assistant's turn left to begin with.

    What follows is the two responses: several turns where the conversations part early. 0 where nothing is shared
    or no assistant's turn follows on what is shared.
    """
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    parted = shared < min(len(first), len(second))
    if parted:
        return shared if first[shared].role == second[shared].role == "assistant" else 0
    # one conversation is the beginning of the other (or they are equal): its last assistant turns are the response
    cut = min(shared, len(first), len(second)) - 1
    while cut > 0 and first[cut].role != "assistant":
        cut -= 1
    while cut > 0 and first[cut - 1].role == "assistant":
        cut -= 1
    return max(cut, 0)


def split_common_prefix(first: str, second: str) -> tuple[str, str, str]:
    """`(prompt, rest of first, rest of second)` for two texts that begin alike; prompt + rest is each text exactly.

    The cut is the last one in the shared beginning that is not inside a word of either text: before white space,
    behind a newline, or behind a full-width punctuation mark. White space goes with the word behind it, as tokenizers
    have it. Neither rest is blank. The prompt is "" where there is no such cut.
    """
    limit = min(len(first), len(second))
    shared = 0
    while shared < limit and first[shared] == second[shared]:
        shared += 1
    last = min(shared, len(first.rstrip()) - 1, len(second.rstrip()) - 1)
    for cut in range(last, 0, -1):
        if is_word_boundary(first, cut) and is_word_boundary(second, cut):
            return first[:cut], first[cut:], second[cut:]
    return "", first, second


def is_word_boundary(text: str, cut: int) -> bool:
    """Whether `text[:cut]` and `text[cut:]` part between words: words are runs of characters that are not white space."""
    if cut <= 0 or cut >= len(text):
        return True
    before, after = text[cut - 1], text[cut]
    if before.isspace():
        return before == "\n" and not after.isspace()
    return after.isspace() or before in _FULL_WIDTH_MARKS
