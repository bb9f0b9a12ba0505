"""An OpenAI-compatible endpoint on loopback that fails in every way that was asked for, and counts what it did."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

FAULTS = ("429", "500", "503", "truncated", "broken", "hangup", "empty", "error in 200", "drip", "stall")
_STALL_SECONDS = 30.0  # at most; a server that is stopped ends them


def longer_wins(question: str) -> str:
    """A judge by content: the longer response, so that every answer can be checked."""
    first = question.split("<response_a>\n")[1].split("\n</response_a>")[0]
    second = question.split("<response_b>\n")[1].split("\n</response_b>")[0]
    verdict = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return f"Counted.\nVerdict: {verdict}"


class FakeEndpoint:
    """`answer` gives the text for a question, `fault` what happens to request number 0, 1, 2 ...: "ok", one of FAULTS,
    "context" (the question is too long), or a status with its Retry-After as in "429 after 1".

    `delivered` counts the questions whose answer was sent whole. `dies_after`: so many answers, then every connection is
    dropped until it is started again.
    """

    def __init__(
        self,
        answer: Callable[[str], str] = longer_wins,
        fault: Callable[[int], str] = lambda number: "ok",
        *,
        dies_after: int | None = None,
        seconds: float = 0.0,
        finish_reason: str = "stop",
        count_tokens: bool = True,
    ) -> None:
        self.answer = answer
        self.fault = fault
        self.dies_after = dies_after
        self.seconds = seconds
        self.finish_reason = finish_reason
        self.count_tokens = count_tokens
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.faults: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.answer_tokens = 0
        self.in_progress = 0
        self.most_in_progress = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FakeEndpoint:
        self.over.clear()
        self._server = _Server(("127.0.0.1", self.port), type("Handler", (_Handler,), {"fake": self}))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.over.set()
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeEndpoint

    def log_message(self, format: str, *words: Any) -> None:
        pass

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            dead = fake.dies_after is not None and fake.delivered.total() >= fake.dies_after
            if dead or fake.over.is_set():
                self.close_connection = True
                return
            fault = fake.fault(len(fake.requests))
            fake.requests.append(body)
            fake.times.append(time.monotonic())
            fake.keys.add(self.headers.get("Authorization", ""))
            fake.faults[fault] += fault != "ok"
            fake.in_progress += 1
            fake.most_in_progress = max(fake.most_in_progress, fake.in_progress)
            if fault == "ok":  # counted before it is sent: whoever has the answer finds it counted
                fake.delivered[body["messages"][-1]["content"]] += 1
        try:
            time.sleep(fake.seconds)
            self._respond(fault, body)
        finally:
            with fake.lock:
                fake.in_progress -= 1

    def _respond(self, fault: str, body: dict[str, Any]) -> None:
        whole = self._completion(body, count=fault == "ok")
        if fault == "ok":
            self._send(200, whole)
        elif fault == "truncated":
            self._send(200, whole[: len(whole) // 2])
        elif fault == "empty":
            self._send(200, b'{"choices": []}')
        elif fault == "error in 200":
            self._send(200, b'{"error": {"message": "overloaded"}}')
        elif fault == "broken":
            self._send(200, whole, sent=len(whole) // 2)
        elif fault == "context":
            self._send(400, b'{"error": {"message": "This model has a maximum context length of 9 tokens"}}')
        elif fault == "hangup":
            self.close_connection = True
        elif fault == "stall":
            self.fake.over.wait(_STALL_SECONDS)
            self.close_connection = True
        elif fault == "drip":
            self._drip(whole)
        else:
            status, _, after = fault.partition(" after ")
            key = self.headers.get("Authorization", "")
            self._send(int(status), json.dumps({"error": {"message": f"no {key}"}}).encode(), after=after)

    def _completion(self, body: dict[str, Any], *, count: bool) -> bytes:
        question = body["messages"][-1]["content"]
        text = self.fake.answer(question)
        answer: dict[str, Any] = {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": self.fake.finish_reason}]
        }
        prompt_tokens, answer_tokens = len(question.split()), len(text.split())
        if self.fake.count_tokens:
            answer["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens}
        if count:
            with self.fake.lock:
                self.fake.prompt_tokens += prompt_tokens
                self.fake.answer_tokens += answer_tokens
        return json.dumps(answer).encode()

    def _send(self, status: int, content: bytes, *, sent: int | None = None, after: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if after:
            self.send_header("Retry-After", after)
        self.end_headers()
        self.wfile.write(content[:sent])
        self.close_connection = sent is not None

    def _drip(self, content: bytes) -> None:
        """A byte now and then, so that no read ever times out."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for byte in content:
            self.wfile.write(bytes([byte]))
            if self.fake.over.wait(0.1):
                break
        self.close_connection = True
