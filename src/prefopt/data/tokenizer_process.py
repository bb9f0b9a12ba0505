"""Processes that tokenise beside this one: cutting and looking up words is Python, which runs on one core a process.

A child is sent the tokenizer's description, then lists of texts, and answers each with the ids of its texts. It ends when
its input does. Whatever goes wrong with one costs time only: the texts are then tokenised by who wanted them.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from prefopt.data.tokens import Ids
from prefopt.data.words import PROBES, word_encoder

ROWS_TO_SHARE = 4096  # fewer are done before another process is there
FAILURES = (OSError, EOFError, pickle.PickleError)  # of a child that has ended, or never was
_MOST_PROCESSES = 2  # this one reads, renders and writes, and keeps no more of them busy
_BATCHES_EACH = 2  # one in work, one that waits


class TokenizerProcess:
    """A child that tokenises with the word encoder of the `tokenizers.Tokenizer` described by `body` (JSON)."""

    def __init__(self, body: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        words = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._send(body)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, read-only. One of FAILURES where the child has ended."""
        self._send(list(texts))
        assert self.process.stdout is not None
        return [np.frombuffer(ids, dtype=np.int32) for ids in pickle.load(self.process.stdout)]

    def _send(self, value: object) -> None:
        assert self.process.stdin is not None
        pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self.process.kill()
        self.process.communicate()


class TokenizerProcesses:
    """Several children, started when they are first needed, and a thread for each that waits for it.

    A child is used once it has given the ids of `probes`; after a failure none is.
    """

    def __init__(self, body: str, count: int, probes: Sequence[tuple[str, Ids]]) -> None:
        self._body = body
        self._probes = probes
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenizer")
        self._idle: queue.LifoQueue[TokenizerProcess | None] = queue.LifoQueue()
        self._children: list[TokenizerProcess] = []
        self._most = count * _BATCHES_EACH
        self._failed = False
        self._unfinished: set[Future[list[Ids]]] = set()
        for _ in range(count):
            self._idle.put(None)

    @property
    def free(self) -> bool:
        """Whether a child will soon have nothing to do."""
        self._unfinished = {batch for batch in self._unfinished if not batch.done()}
        return not self._failed and len(self._unfinished) < self._most

    def submit(self, texts: Sequence[str]) -> Future[list[Ids]]:
        """The ids of `texts`, read-only, when they are there; the result may raise one of FAILURES."""
        batch = self._threads.submit(self._encode, texts)
        self._unfinished.add(batch)
        return batch

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        child = self._idle.get()
        try:
            if child is None:
                child = self._started()
            return child.encode(texts)
        except FAILURES:
            self._failed = True
            raise
        finally:
            self._idle.put(child)

    def _started(self) -> TokenizerProcess:
        child = TokenizerProcess(self._body)
        self._children.append(child)
        found = child.encode([text for text, _ in self._probes])
        if not all(np.array_equal(a, b) for a, (_, b) in zip(found, self._probes, strict=True)):
            raise OSError("the child tokenises otherwise")
        return child

    def close(self) -> None:
        """End all children; what they have not done is not done."""
        for child in self._children:
            child.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()


@contextmanager
def tokenizer_processes(tokenizer: Any, rows: int) -> Iterator[TokenizerProcesses | None]:
    """Children for so many rows; None where there are few rows, one core, or no word encoder for this tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    count = min(_cores() - 1, _MOST_PROCESSES)
    if backend is None or rows < ROWS_TO_SHARE or count < 1 or not sys.executable:  # no name where Python is embedded
        yield None
        return

    def whole(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return found

    if word_encoder(backend, whole) is None:
        yield None
        return
    probes = [(text, np.array(ids, dtype=np.int32)) for text, ids in zip(PROBES, whole(list(PROBES)), strict=True)]
    processes = TokenizerProcesses(backend.to_str(), count, probes)
    try:
        yield processes
    finally:
        processes.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve() -> None:
    """What a child does."""
    from tokenizers import Tokenizer

    source = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    backend = Tokenizer.from_str(pickle.load(source))
    backend.no_truncation()
    backend.no_padding()
    encoder = word_encoder(
        backend, lambda texts: [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
    )
    if encoder is None:
        raise SystemExit("no word encoder")
    while True:
        try:
            texts = pickle.load(source)
        except EOFError:
            return
        pickle.dump([ids.tobytes() for ids in encoder.encode(texts)], answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve()
