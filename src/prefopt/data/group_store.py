"""Groups that do not lie in memory: written to a file without a name as they are read, made again when they are asked for."""

from __future__ import annotations

import marshal
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, starmap
from typing import IO, overload

import numpy as np

from prefopt.core.files import cache_root, storage_errors
from prefopt.data.groups import Feedback, Group, Turn
from prefopt.data.tokens import Counts

IN_MEMORY_GROUPS = 4096  # with texts of some KiB a group, about as much memory as one batch of them needs elsewhere
_BUFFER_BYTES = 2**20
_FORM_WITHOUT_REFERENCES = 2  # later forms of marshal depend on which objects are shared, too


class _Texts:
    """A file without a name, closed with the last object that reads it; `ends`: where each of its texts ends."""

    def __init__(self, file: IO[bytes], ends: Counts) -> None:
        self._file = file
        self._ends = ends
        weakref.finalize(self, file.close)

    def __getitem__(self, place: int) -> bytes:
        start = int(self._ends[place - 1]) if place else 0
        self._file.seek(start)
        return self._file.read(int(self._ends[place]) - start)


class StoredGroups(Sequence[Group]):
    """Groups of a file, those at `places`. Only what is known about them (`feedbacks`) is held in memory.

    The file has no name, so nothing else can change it, and it is gone with the last object that reads it.
    """

    def __init__(self, texts: _Texts, feedbacks: Sequence[Feedback], places: Counts) -> None:
        self._texts = texts
        self._feedbacks = feedbacks
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def feedbacks(self) -> Sequence[Feedback]:
        """The feedback of each group, without reading its text."""
        return [self._feedbacks[place] for place in self._places.tolist()]

    def pick(self, places: Iterable[int] | Counts) -> StoredGroups:
        """The groups at `places` of these, in that order; the text is not copied."""
        chosen = self._places[np.fromiter(places, dtype=np.int64)]
        return StoredGroups(self._texts, self._feedbacks, chosen)

    @overload
    def __getitem__(self, place: int) -> Group: ...
    @overload
    def __getitem__(self, place: slice) -> StoredGroups: ...
    def __getitem__(self, place: int | slice) -> Group | StoredGroups:
        if isinstance(place, slice):
            return self.pick(range(*place.indices(len(self))))
        return self._group(int(self._places[place]))

    def __iter__(self) -> Iterator[Group]:
        return (self._group(place) for place in self._places.tolist())

    def contents(self) -> Iterator[bytes]:
        """What `group_contents` gives, without making the groups."""
        return (self._texts[place] for place in self._places.tolist())

    def _group(self, place: int) -> Group:
        return group_of(self._texts[place], self._feedbacks[place])


def kept(groups: Iterable[Group]) -> Sequence[Group]:
    """`groups` as a sequence: a tuple where there are few, else StoredGroups in the cache's folder.

    StorageError where that folder has no room.
    """
    source = iter(groups)
    first = tuple(islice(source, IN_MEMORY_GROUPS + 1))
    if len(first) <= IN_MEMORY_GROUPS:
        return first
    return stored(([_content(group)], [group.feedback]) for group in chain(first, source))


def stored(parts: Iterable[tuple[list[bytes], list[Feedback]]]) -> StoredGroups:
    """Groups of which some at a time are given: their `group_contents`, and what is known about each of them."""
    folder = cache_root()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder, buffering=_BUFFER_BYTES)  # noqa: SIM115
        try:
            return _written(file, parts)
        except BaseException:
            file.close()
            raise


def _written(file: IO[bytes], parts: Iterable[tuple[list[bytes], list[Feedback]]]) -> StoredGroups:
    ends, feedbacks = array("q"), list[Feedback]()
    known: dict[Feedback, Feedback] = {}  # most rows of a file say the same
    end = 0
    for contents, found in parts:
        for content, feedback in zip(contents, found, strict=True):
            end += file.write(content)
            ends.append(end)
            feedbacks.append(known.setdefault(feedback, feedback))
    file.flush()
    return StoredGroups(_Texts(file, np.frombuffer(ends, dtype=np.int64)), feedbacks, np.arange(len(feedbacks)))


def _content(group: Group) -> bytes:
    """All of a group but its feedback, the same bytes for groups that are equal."""
    responses = tuple([_texts(turns) for turns in group.responses])
    plain = (_texts(group.prompt), responses, group.form, group.source, group.tools, group.finished)
    return marshal.dumps(plain, _FORM_WITHOUT_REFERENCES)


def group_of(content: bytes, feedback: Feedback) -> Group:
    """The group with that feedback of which `group_contents` gives `content`."""
    prompt, responses, form, source, tools, finished = marshal.loads(content)
    return Group(
        prompt=tuple(starmap(Turn, prompt)),
        responses=tuple([tuple(starmap(Turn, turns)) for turns in responses]),
        feedback=feedback,
        form=form,
        source=source,
        tools=tools,
        finished=finished,
    )


def _texts(turns: Sequence[Turn]) -> tuple[tuple[str, str, str], ...]:
    return tuple([(role, content, calls) for role, content, calls in turns])  # marshal knows no named tuples


def pick_groups(groups: Sequence[Group], places: Iterable[int]) -> Sequence[Group]:
    """The groups at `places`: a tuple of those in memory, a view of those that are not."""
    return groups.pick(places) if isinstance(groups, StoredGroups) else tuple(groups[place] for place in places)


def group_contents(groups: Sequence[Group]) -> Iterator[bytes]:
    """Bytes for each group that are the same for groups which are equal but for their feedback."""
    return groups.contents() if isinstance(groups, StoredGroups) else map(_content, groups)


def group_feedbacks(groups: Sequence[Group]) -> Sequence[Feedback]:
    """The feedback of all `groups`, without reading the text of those that are not in memory."""
    return groups.feedbacks if isinstance(groups, StoredGroups) else [group.feedback for group in groups]
