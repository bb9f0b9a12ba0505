"""Token groups on disk: the same groups as in memory, made one by one, in bounded memory; damage is found."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.core.config import RunConfig
from prefopt.core.errors import DataError
from prefopt.core.resolve import resolve_config
from prefopt.data import token_store
from prefopt.data.audit import audit
from prefopt.data.budget import fit_budget
from prefopt.data.groups import Feedback, GroupSet
from prefopt.data.mismatch import Counterparts, mismatched, with_mismatched
from prefopt.data.projections import demonstrations
from prefopt.data.suitable import suitable
from prefopt.data.token_store import StoredRows, TokenWriter, read_tokens, token_batches, writing_tokens
from prefopt.data.tokens import (
    JoinedRows,
    TokenGroup,
    TokenRows,
    TokenSet,
    feedbacks_of,
    lengths_of,
    pick,
    prompt_digests,
    unfinished_responses,
)

FEEDBACKS = (
    Feedback("pair"),
    Feedback("pair", margin=2.0),
    Feedback("pair", tie=True),
    Feedback("label", label=True),
    Feedback("label", label=False),
    Feedback("scores", scores=(0.5, 1.0, 1.0)),
    Feedback("ranking", ranking=(3, 1, 2)),
)
RESPONSES = {"pair": 2, "label": 1, "scores": 3, "ranking": 3}


def made(count: int, *, seed: int = 0, kinds: Sequence[Feedback] = FEEDBACKS, longest: int = 9) -> list[TokenGroup]:
    """Groups of all kinds; one prompt in three is that of another group."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return random.integers(0, 1000, length, dtype=np.int32)

    groups = []
    for number in range(count):
        feedback = kinds[number % len(kinds)]
        responses = tuple(ids(random.integers(1, longest)) for _ in range(RESPONSES[feedback.kind]))
        flags = tuple(random.random(len(response)) < 0.8 for response in responses)
        prompt = groups[-1].prompt_ids if number % 3 == 2 else ids(random.integers(1, longest))
        finished = tuple(bool(random.random() < 0.9) for _ in responses)
        groups.append(TokenGroup(prompt, responses, flags, feedback, f"rows.jsonl:{number + 1}", finished))
    return groups


def add_all(writer: TokenWriter, rows: Iterable[tuple[int, TokenGroup]]) -> None:
    for batch in token_batches(rows):
        writer.add(batch)


def stored(folder: Path, groups: Sequence[TokenGroup], notes: dict[str, Any] | None = None) -> StoredRows:
    path = folder / "tokens.arrow"
    with writing_tokens(path) as writer:
        add_all(writer, enumerate(groups))
        writer.notes = notes or {}
    rows, found = read_tokens(path, [group.feedback for group in groups])
    assert found == (notes or {})
    return rows


def plain(group: TokenGroup | None) -> Any:
    if group is None:
        return None
    arrays = (group.prompt_ids, *group.response_ids, *group.scored)
    shown = [(array.tolist(), str(array.dtype)) for array in arrays]
    return shown, group.feedback, group.source, group.finished, plain(group.mismatched)


def same(first: Sequence[TokenGroup], second: Sequence[TokenGroup]) -> bool:
    return len(first) == len(second) and [*map(plain, first)] == [*map(plain, second)]


@given(count=st.integers(0, 40), seed=st.integers(0, 2**31), rows=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, rows: int) -> None:
    groups = made(count, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "_ROWS_PER_BATCH", rows)
        read = stored(tmp_path_factory.mktemp("tokens"), groups, {"bad": ["…"]})
    assert same(groups, read)
    assert same(groups[::-1], read[::-1]) and same(groups[3:7], read[3:7])
    if groups:
        assert plain(read[-1]) == plain(groups[-1])
    with pytest.raises(IndexError):
        read[count]


def test_it_is_an_arrow_stream_with_its_checksum_behind_it(tmp_path: Path) -> None:
    groups = made(20)
    stored(tmp_path, groups)
    table = pa.ipc.open_stream(tmp_path / "tokens.arrow").read_all()
    assert table.column("prompt").to_pylist() == [group.prompt_ids.tolist() for group in groups]
    assert table.column("scored").to_pylist() == [[flags.tolist() for flags in group.scored] for group in groups]
    assert table.column("source").to_pylist() == [group.source.encode() for group in groups]


def test_the_same_groups_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        stored(tmp_path / name, made(50))
    first, second = ((tmp_path / name / "tokens.arrow").read_bytes() for name in ("a", "b"))
    assert first == second


def test_odd_names_of_rows_are_kept(tmp_path: Path) -> None:
    """A file name that is not UTF-8 comes with half of a surrogate pair."""
    groups = [replace(group, source=name) for group, name in zip(made(3), ("", "zeile\udce9:1", "ряд:2"), strict=True)]
    assert same(groups, stored(tmp_path, groups))


class Untouched(StoredRows):
    """Stored rows of which none may be made."""

    def group(self, place: int) -> TokenGroup:
        raise AssertionError(f"group {place} was made")


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[TokenGroup], StoredRows]:
    monkeypatch.setattr(token_store, "StoredRows", Untouched)
    groups = made(60)
    return groups, stored(tmp_path, groups)


def test_lengths_and_feedback_make_no_group(untouched: tuple[list[TokenGroup], StoredRows]) -> None:
    groups, rows = untouched
    places = [5, 3, 3, 58]
    for few, all_rows in (
        (groups, rows),
        ([groups[place] for place in places], pick(rows, places)),
        (groups[7:50:3], pick(rows[7:50], range(0, 43, 3))),
    ):
        mine, theirs = lengths_of(few), lengths_of(all_rows)
        for name in ("prompt_G", "response_S", "responses_G", "unique_G", "longest_G"):
            assert getattr(mine, name).tolist() == getattr(theirs, name).tolist()
        assert mine.unique_G.tolist() == [group.unique_tokens for group in few]
        assert list(feedbacks_of(few)) == list(feedbacks_of(all_rows))
        assert prompt_digests(few) == prompt_digests(all_rows)
    assert unfinished_responses(groups) == unfinished_responses(rows)
    tokens = TokenSet(rows)
    assert fit_budget(tokens, (9, 9), on_overlong="drop").groups is rows
    made_of = audit(GroupSet((), name="x"), tokens, budget=(4, 4), on_overlong="drop")
    assert made_of == audit(GroupSet((), name="x"), TokenSet(tuple(groups)), budget=(4, 4), on_overlong="drop")


def config_of(**loss: Any) -> RunConfig:
    return resolve_config({"loss": loss, "model": {"name": "m"}, "data": {"train": "rows.jsonl"}})


@pytest.mark.parametrize("on_overlong", ["drop", "truncate"])
@pytest.mark.parametrize("budget", [(3, 100), (100, 3), (2, 2)])
def test_every_step_of_the_preparation_gives_what_it_gives_in_memory(
    tmp_path: Path, on_overlong: str, budget: tuple[int, int]
) -> None:
    groups = made(60, kinds=FEEDBACKS[:2] + FEEDBACKS[3:])
    in_memory, on_disk = TokenSet(tuple(groups)), TokenSet(stored(tmp_path, groups))
    fitted, stored_fitted = (fit_budget(tokens, budget, on_overlong=on_overlong) for tokens in (in_memory, on_disk))
    assert isinstance(stored_fitted.groups, TokenRows)
    best, stored_best = demonstrations(fitted), demonstrations(stored_fitted)
    assert isinstance(stored_best.groups, TokenRows)
    pairs = with_mismatched(fitted.groups, seed=3), with_mismatched(stored_fitted.groups, seed=3)
    for one, other in ((fitted, stored_fitted), (best, stored_best), (TokenSet(pairs[0]), TokenSet(pairs[1]))):
        assert same(one.groups, other.groups)
        assert (one.bad, one.truncated) == (other.bad, other.truncated)
        assert lengths_of(one.groups).unique_G.tolist() == lengths_of(other.groups).unique_G.tolist()
        assert list(feedbacks_of(one.groups)) == list(feedbacks_of(other.groups))
        assert prompt_digests(one.groups) == prompt_digests(other.groups)
        assert unfinished_responses(one.groups) == unfinished_responses(other.groups)
    assert same(mismatched(fitted.groups, seed=3), Counterparts(pairs[1]))
    joined = JoinedRows([fitted.groups, (), Counterparts(pairs[1])])
    assert same([*fitted.groups, *mismatched(fitted.groups, seed=3)], joined)
    assert plain(joined[-1]) == plain(pairs[0][-1].mismatched) and same(joined[:2], fitted.groups[:2])
    with pytest.raises(DataError):
        fit_budget(on_disk, budget, on_overlong="error")


def test_rows_that_a_loss_refuses_are_left_out_of_the_view(tmp_path: Path) -> None:
    groups = made(30, kinds=FEEDBACKS[:3])
    results = [suitable(TokenSet(rows), config_of(name="dpo")) for rows in (tuple(groups), stored(tmp_path, groups))]
    assert same(results[0].groups, results[1].groups) and len(results[0].groups) == 20
    assert results[0].bad == results[1].bad and results[1].bad[0].source == "rows.jsonl:3"
    wrong = TokenSet(stored(tmp_path / "wrong", made(8)))
    with pytest.raises(DataError, match=r"rows\.jsonl:4: the loss"):
        suitable(wrong, config_of(name="dpo"))


@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_or_a_missing_end_is_found(tmp_path: Path, at: float) -> None:
    groups = made(200)
    stored(tmp_path, groups)
    path, damaged = tmp_path / "tokens.arrow", tmp_path / "damaged.arrow"
    body = bytearray(path.read_bytes())
    place = int(at * len(body))
    cut = bytes(body[:place])
    body[place] ^= 4
    for content in (bytes(body), cut, cut + b"\0" * 64):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="is not as it was written"):
            read_tokens(damaged, [group.feedback for group in groups])


def test_a_file_of_other_rows_or_columns_is_refused(tmp_path: Path) -> None:
    groups = made(9)
    rows = stored(tmp_path, groups)
    with pytest.raises(ValueError, match="rows up to 8 of 8"):
        read_tokens(tmp_path / "tokens.arrow", feedbacks_of(rows)[:8])
    path = tmp_path / "other.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema({"x": pa.int32()})):
        pass
    body = path.read_bytes()
    path.write_bytes(body + token_store._crc(path, len(body)).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="has other columns"):
        read_tokens(path, [])


def test_a_killed_writer_leaves_nothing(tmp_path: Path) -> None:
    def killed() -> None:
        with writing_tokens(tmp_path / "tokens.arrow") as writer:
            writer.add(next(token_batches([(0, made(1)[0])])))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_or_removed_stays_readable(tmp_path: Path) -> None:
    groups = made(30)
    rows = stored(tmp_path, groups)
    stored(tmp_path, made(30, seed=1))
    (tmp_path / "tokens.arrow").unlink()
    assert same(groups, rows)


def test_groups_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    rows = stored(tmp_path, made(3))
    rows[0].prompt_ids[0] = -1
    rows[0].scored[0][:] = False
    assert same(made(3), rows)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Python's own memory of writing and of going through 2,500 and 5,000 groups of about 1 kB; the map is not in it."""
    like = made(1, longest=2, kinds=FEEDBACKS[:1])[0]
    ids = np.arange(100, dtype=np.int32)
    group = replace(like, prompt_ids=ids, response_ids=(ids, ids), scored=(ids > 9, ids > 9))

    def peak(count: int) -> tuple[int, int]:
        peaks = []
        path = tmp_path / f"{count}.arrow"
        tracemalloc.start()
        with writing_tokens(path) as writer:
            add_all(writer, ((place, group) for place in range(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        rows, _ = read_tokens(path, [group.feedback] * count)
        assert sum(len(row.prompt_ids) for row in rows) == 100 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return peaks[0], peaks[1]

    few, many = peak(2_500), peak(5_000)
    assert many[0] < 1.2 * few[0]
    assert many[1] - few[1] < 2_500 * 150  # places, offsets, feedback: some tens of bytes a row
