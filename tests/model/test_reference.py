"""The reference cache: keyed by what the numbers depend on, resumable, and loud about anything missing or damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.tiny_models import awkward_groups, language_model
from prefopt.core.errors import StorageError, TrainingError
from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.model import reference
from prefopt.model.engine import LanguageModel, cast_parameters, weights_identity
from prefopt.model.reference import LiveReference, ReferenceCache, fill_cache, response_keys


def filled(root: Path, groups: Sequence[TokenGroup], model: LanguageModel) -> ReferenceCache:
    cache = ReferenceCache(model.identity, model.numerics, root=root)
    fill_cache(cache, groups, lambda: model, micro_batch_tokens=64)
    return cache


def never() -> LanguageModel:
    raise AssertionError("the reference was loaded although every entry is there")


def test_a_second_fill_loads_nothing_and_gives_the_same_numbers(tmp_path: Path) -> None:
    groups, model = awkward_groups(), language_model()
    first = filled(tmp_path, groups, model).of(groups)
    again = ReferenceCache(model.identity, model.numerics, root=tmp_path)
    assert fill_cache(again, groups, never, micro_batch_tokens=64) == 0
    live = LiveReference(model, micro_batch_tokens=64).of(groups)
    for a, b, c in zip(first, again.of(groups), live, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(np.allclose(x, y, atol=1e-5) for x, y in zip(a, c, strict=True))


def test_order_feedback_and_siblings_do_not_matter(tmp_path: Path) -> None:
    """Swapped labels, another order, one response alone: what a sweep or a cleaned file changes computes nothing new."""
    groups, model = awkward_groups(), language_model()
    filled(tmp_path, groups, model)
    others = [
        replace(
            group,
            response_ids=group.response_ids[::-1],
            scored=group.scored[::-1],
            feedback=Feedback("pair", margin=2.0, weight=0.5),
            source="elsewhere:1",
        )
        for group in groups[::-1]
    ]
    alone = [replace(group, response_ids=group.response_ids[:1], scored=group.scored[:1], finished=()) for group in groups]
    cache = ReferenceCache(model.identity, model.numerics, root=tmp_path)
    assert fill_cache(cache, [*others, *alone], never, micro_batch_tokens=8) == 0
    for straight, swapped in zip(cache.of(groups), cache.of(others)[::-1], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(straight, swapped[::-1], strict=True))


def test_a_key_depends_on_prompt_response_and_flags() -> None:
    group = awkward_groups()[0]
    tokens, flags = group.response_ids[0].copy(), group.scored[0].copy()
    prompt = group.prompt_ids.copy()
    prompt[3] += 1
    tokens[2] += 1
    flags[0] = not flags[0]
    changed = [
        replace(group, prompt_ids=prompt),
        replace(group, response_ids=(tokens, group.response_ids[1])),
        replace(group, scored=(flags, group.scored[1])),
        # the same tokens end to end, with the boundary moved by one
        replace(
            group,
            prompt_ids=np.append(group.prompt_ids, group.response_ids[0][0]),
            response_ids=(group.response_ids[0][1:], group.response_ids[1]),
            scored=(group.scored[0][1:], group.scored[1]),
        ),
    ]
    keys = [response_keys(one)[0] for one in (group, *changed)]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {16}
    wide = replace(group, prompt_ids=group.prompt_ids.astype(np.int64))
    assert response_keys(wide) == response_keys(group)


def test_weights_and_numerics_name_the_entry(tmp_path: Path) -> None:
    model = language_model()
    other = language_model()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    assert weights_identity(other.model) != model.identity
    assert language_model().identity == model.identity
    half = language_model()
    half.dtype = torch.bfloat16
    assert half.numerics != model.numerics
    groups = awkward_groups()
    filled(tmp_path, groups, model)
    for identity, numerics in ((weights_identity(other.model), model.numerics), (model.identity, half.numerics)):
        assert len(ReferenceCache(identity, numerics, root=tmp_path).missing(groups)) == len(groups)


def test_identity_sees_the_dtype_of_the_weights() -> None:
    model = language_model().model
    before = weights_identity(model)
    cast_parameters(model, torch.bfloat16)
    assert weights_identity(model) != before


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "garbage"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    groups, model = awkward_groups(), language_model()
    (part,) = filled(tmp_path, groups, model).folder.glob("part-*.npz")
    body = bytearray(part.read_bytes())
    if damage == "flipped":
        body[len(body) // 2] ^= 0xFF
    part.write_bytes({"cut": body[:-40], "empty": b"", "flipped": body, "garbage": b"not an archive"}[damage])
    with pytest.raises(StorageError, match=part.name) as raised:
        ReferenceCache(model.identity, model.numerics, root=tmp_path)
    assert "Delete" in raised.value.todo


def test_values_that_do_not_fit_their_lengths_are_named(tmp_path: Path) -> None:
    groups, model = awkward_groups(), language_model()
    (part,) = filled(tmp_path, groups, model).folder.glob("part-*.npz")
    with np.load(part) as stored:
        kept = dict(stored)
    for values in (kept["values"][:-1], np.full_like(kept["values"], np.nan)):
        np.savez(part, **{**kept, "values": values})
        with pytest.raises(StorageError, match=part.name):
            ReferenceCache(model.identity, model.numerics, root=tmp_path)


def test_holes_name_their_rows(tmp_path: Path) -> None:
    groups, model = awkward_groups(), language_model()
    cache = filled(tmp_path, groups[:3], model)
    with pytest.raises(TrainingError, match=r"3 rows.*rows\.jsonl:4, rows\.jsonl:5, rows\.jsonl:6"):
        cache.of(groups)


def test_a_non_finite_logp_is_refused_and_not_kept(tmp_path: Path) -> None:
    groups, model = awkward_groups(), language_model()
    cache = ReferenceCache(model.identity, model.numerics, root=tmp_path)
    values = model.score(groups)
    values[1][0][0] = -np.inf
    with pytest.raises(TrainingError, match=r"rows\.jsonl:2"):
        cache.add(groups, values)
    assert len(cache.missing(groups)) == len(groups)
    assert not list(tmp_path.rglob("*.npz"))


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_pass_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GROUPS_PER_PART", 2)
    groups, model = awkward_groups(), language_model()
    computed: list[str] = []
    score = model.score

    def dying(part: Sequence[TokenGroup], **options: Any) -> Any:
        if len(computed) == 2:
            raise Killed
        computed.extend(group.source for group in part)
        return score(part, **options)

    def counting(part: Sequence[TokenGroup], **options: Any) -> Any:
        computed.extend(group.source for group in part)
        return score(part, **options)

    monkeypatch.setattr(model, "score", dying)
    with pytest.raises(Killed):
        filled(tmp_path, groups, model)
    monkeypatch.setattr(model, "score", counting)
    again = ReferenceCache(model.identity, model.numerics, root=tmp_path)
    assert fill_cache(again, groups, lambda: model, micro_batch_tokens=64) == 4
    assert computed == [group.source for group in groups]
    assert len(again.of(groups)) == len(groups)


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ReferenceCache("weights", "numerics", root=tmp_path / "file")
    with pytest.raises(StorageError):
        fill_cache(cache, awkward_groups(), never, micro_batch_tokens=64)


def test_a_group_that_comes_twice_is_computed_once(tmp_path: Path) -> None:
    groups, model = awkward_groups(), language_model()
    cache = ReferenceCache(model.identity, model.numerics, root=tmp_path)
    assert fill_cache(cache, [*groups, *groups], lambda: model, micro_batch_tokens=64) == len(groups)
