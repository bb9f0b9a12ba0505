"""Rows that say the same, or the opposite, or are in two sets at once: found by digests, 16 bytes each, of their texts.

Shapes: G groups, P preferences (ordered pairs of responses) of all groups.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.core.files import digest
from prefopt.data.groups import Group, Turn

EXAMPLES = 3
Keys = NDArray[np.uint64]  # (n, 2): digests of 128 bits
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupKeys:
    """Digests of groups. `prompt_G`: of the prompt; `whole_G`: of prompt and responses in any order; `exact_G`: of these and
    the order of preference. `both_P`: of a prompt and two responses in any order, of which `forward_P` says which is the
    better one; `group_P`: the group that says so.
    """

    prompt_G: Keys
    whole_G: Keys
    exact_G: Keys
    both_P: Keys
    forward_P: NDArray[np.bool_]
    group_P: Places

    @classmethod
    def of(cls, groups: Iterable[Group]) -> GroupKeys:
        """The keys of `groups`, each of which is looked at once."""
        prompts, wholes, exacts, boths = bytearray(), bytearray(), bytearray(), bytearray()
        forward, of_group = bytearray(), array("q")
        for place, group in enumerate(groups):
            prompt = digest(_text_key(group.prompt), group.tools)
            keys = [_text_key(response) for response in group.responses]
            found = list(preferences(group, keys))
            prompts += bytes.fromhex(prompt)
            wholes += bytes.fromhex(digest(prompt, *sorted(keys)))
            exacts += bytes.fromhex(digest(prompt, *sorted(keys), *(part for pair in sorted(found) for part in pair)))
            for better, worse in found:
                boths += bytes.fromhex(digest(prompt, min(better, worse), max(better, worse)))
                forward.append(better < worse)
                of_group.append(place)
        return cls(
            prompt_G=_table(prompts),
            whole_G=_table(wholes),
            exact_G=_table(exacts),
            both_P=_table(boths),
            forward_P=np.frombuffer(forward, dtype=np.bool_),
            group_P=np.array(of_group, dtype=np.int64),
        )


def _table(digests: bytearray) -> Keys:
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def _text_key(turns: Sequence[Turn]) -> str:
    return digest(*(part for turn in turns for part in (turn.role, turn.content, turn.tool_calls)))


def preferences(group: Group, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(better, worse) of the group's responses, of which `keys` are the digests. A label compares its response with "",
    that is with none."""
    feedback = group.feedback
    if feedback.kind == "pair" and not feedback.tie:
        yield keys[0], keys[1]
    elif feedback.kind == "label":
        yield (keys[0], "") if feedback.label else ("", keys[0])
    elif feedback.kind in ("ranking", "scores"):
        worth = feedback.scores or tuple(-rank for rank in feedback.ranking)
        for (key, value), (other, other_value) in combinations(zip(keys, worth, strict=True), 2):
            if value != other_value and key != other:
                yield (key, other) if value > other_value else (other, key)


def duplicates(groups: Sequence[Group], keys: GroupKeys) -> dict[str, Any]:
    """Groups that repeat an earlier one: same prompt, same responses, in the same order of preference."""
    first_G = _first_equal(keys.exact_G)
    repeats = np.flatnonzero(first_G < np.arange(len(first_G)))
    examples = [f"{groups[place].source} repeats {groups[first_G[place]].source}" for place in repeats[:EXAMPLES].tolist()]
    return {"count": len(repeats), "examples": examples}


def contradictions(groups: Sequence[Group], keys: GroupKeys) -> dict[str, Any]:
    """Prompts with two responses that are preferred both ways, each two responses counted once."""
    first_P = _first_equal(keys.both_P)
    opposed = np.flatnonzero(keys.forward_P != keys.forward_P[first_P])
    _, at = np.unique(first_P[opposed], return_index=True)  # the first that says otherwise
    found = np.sort(opposed[at])
    pairs = [(int(keys.group_P[place]), int(keys.group_P[first_P[place]])) for place in found[:EXAMPLES].tolist()]
    return {
        "count": len(found),
        "examples": [f"{groups[one].source} contradicts {groups[other].source}" for one, other in pairs],
    }


def leakage(groups: Sequence[Group], keys: GroupKeys, against: Sequence[Group], others: GroupKeys) -> dict[str, Any]:
    """How many groups have a prompt that is also in `against`, and how many a prompt and responses in any order."""
    first_G = _place_in(keys.prompt_G, others.prompt_G)
    shared = np.flatnonzero(first_G >= 0)
    examples = [
        f"{groups[place].source} has the prompt of {against[first_G[place]].source}" for place in shared[:EXAMPLES].tolist()
    ]
    whole = int((_place_in(keys.whole_G, others.whole_G) >= 0).sum())
    return {"prompts": len(shared), "groups": whole, "examples": examples}


def _first_equal(keys: Keys) -> Places:
    """For each of `keys` the first place with an equal one, shape (n,)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal ones stay in their order
    lined_up = keys[order]
    begins = np.ones(len(keys), dtype=np.bool_)
    begins[1:] = (lined_up[1:] != lined_up[:-1]).any(axis=1)
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return first


def _place_in(keys: Keys, others: Keys) -> Places:
    """For each of `keys` the first equal one of `others`, -1 where there is none, shape (n,)."""
    first = _first_equal(np.concatenate((others, keys)))[len(others) :]
    return np.where(first < len(others), first, -1)
