"""An OpenAI-compatible chat endpoint: POST URL/chat/completions. Standard library and httpx; no torch."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prefopt.core.errors import ConfigError, ModelError, PrefoptError
from prefopt.core.packages import needed
from prefopt.core.progress import Progress, progress
from prefopt.rollout.judges.answers import AnswerStore, Request, key_of
from prefopt.rollout.judges.chat import TOO_LONG, Answer, Conversation, Usage, without_room
from prefopt.rollout.judges.limits import Ledger, Pace, Stopped
from prefopt.rollout.judges.sending import TOO_LONG as TOO_LONG_FAILURE
from prefopt.rollout.judges.sending import Failure, Reply, send
from prefopt.rollout.judges.settings import JudgeSettings


class Endpoint:
    """The model `model` behind `url` as a ChatModel.

    An answer is kept under the URL, the model's name, the conversation and the sampling options. Requests that fail with
    429, 5xx, a timeout, a broken connection or an answer that is not whole are sent again, after the pause that the server
    names or one that doubles from time to time, with jitter. `usage` counts what this process asked for.
    """

    def __init__(self, model: str, url: str, settings: JudgeSettings, *, store: AnswerStore | None = None) -> None:
        self.name = f"endpoint:{model}@{url}"
        self.settings = settings
        self.usage = Usage()
        self._model = model
        self._url = completions_url(url)
        self._store = store or AnswerStore()
        self._ledger = Ledger(settings, self.usage)
        self._httpx = needed("httpx", extra="judges", option=f"judge={self.name}")
        self._key = _key_in(settings.api_key_env)

    def answer(self, conversations: Sequence[Conversation], *, unit: str = "answers") -> list[Answer]:
        """See `ChatModel`. ModelError where a request was refused, or failed once more after all retries, and where the budget
        is spent; it says how many are done."""
        requests = [self._request(conversation) for conversation in conversations]
        keys = [key_of(request) for request in requests]
        by_key = dict(zip(keys, requests, strict=True))
        found = {key: _read(kept) for key, request in by_key.items() if (kept := self._store.get(request)) is not None}
        missing = [(key, request) for key, request in by_key.items() if key not in found]
        self.usage.answers += len(requests)
        self.usage.cached += sum(key in found for key in keys)
        if missing:
            self._store.check()
            with progress(f"asking {self._model}", len(missing), unit) as shown:
                problem = _Asking(self, missing, found, shown).run()
            if problem is not None:
                done = sum(key in found for key in keys)
                raise self._error(problem, f"{done} of {len(keys)} {unit} are done")
        return without_room([found[key] for key in keys], self.usage, self.name)

    def _request(self, conversation: Conversation) -> Request:
        body: dict[str, Any] = {"model": self._model, "messages": list(conversation)}
        body[self.settings.limit_field] = self.settings.max_answer_tokens
        if self.settings.temperature is not None:
            body["temperature"] = self.settings.temperature
        if self.settings.seed is not None:
            body["seed"] = self.settings.seed
        return {"url": self._url, "body": body}

    def client(self) -> Any:
        """An httpx client for all requests of a call."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        limits = self._httpx.Limits(max_connections=self.settings.concurrency)
        return self._httpx.Client(headers=headers, limits=limits, timeout=self.settings.timeout_seconds)

    def ask(self, client: Any, pace: Pace, request: Request) -> Reply:
        """One answer, with retries. Failure where none can be had, Stopped where the run ends meanwhile."""
        body = json.dumps(request["body"]).encode()
        for tries in range(self.settings.retries + 1):
            pace.turn()
            reserved = self._ledger.reserve(body)
            try:
                reply = send(self._httpx, client, self._url, body, timeout_seconds=self.settings.timeout_seconds)
            except Failure as failure:
                self._ledger.failed(reserved, failure)
                if not failure.again or tries == self.settings.retries:
                    failure.what += f" (tried {tries + 1} times)" if tries else ""
                    raise
                self._pause(pace, failure, tries)
            else:
                self._ledger.answered(reserved, reply)
                return reply
        raise AssertionError("the last try returns or raises")

    def _pause(self, pace: Pace, failure: Failure, tries: int) -> None:
        longest = self.settings.longest_wait_seconds
        asked = failure.wait_seconds
        if asked is None:
            doubled = min(longest, self.settings.first_wait_seconds * 2.0**tries)
            pace.stop.wait(doubled * random.uniform(0.5, 1.0))
        elif asked <= longest:
            pace.hold(asked)
        else:
            failure.what += f"; it asks for a pause of {asked:.0f} seconds, longest_wait_seconds is {longest:g}"
            raise failure

    def keep(self, request: Request, reply: Reply) -> Answer:
        """Put the answer on disk."""
        kept = {
            "text": reply.text,
            "finished": reply.finished,
            "prompt_tokens": reply.prompt_tokens,
            "answer_tokens": reply.answer_tokens,
        }
        self._store.put(request, kept)
        return _read(kept)

    def _error(self, problem: Failure | PrefoptError, done: str) -> PrefoptError:
        if isinstance(problem, PrefoptError):
            return type(problem)(f"{problem.what}; {done}", todo=problem.todo)
        what = problem.what.replace(self._key, "...") if self._key else problem.what
        return ModelError(
            f"{self.name}: {what}; {done}",
            todo=f"{_way_out(problem.kind)} the same command goes on with the rest, what is done is kept.",
        )


class _Asking:
    """Threads that take one missing answer after another, until all are there or one cannot be had."""

    def __init__(
        self, endpoint: Endpoint, missing: list[tuple[str, Request]], found: dict[str, Answer], shown: Progress
    ) -> None:
        self.endpoint = endpoint
        self.found = found
        self.shown = shown
        self.pace = Pace(endpoint.settings.requests_per_minute)
        self.threads = min(endpoint.settings.concurrency, len(missing))
        self._todo: Iterator[tuple[str, Request]] = iter(missing)
        self._lock = threading.Lock()
        self._problem: Failure | PrefoptError | None = None

    def run(self) -> Failure | PrefoptError | None:
        """None where all are in `found`, else why not. Requests in progress are waited for and kept either way."""
        with self.endpoint.client() as client, ThreadPoolExecutor(self.threads) as pool:
            try:
                for thread in [pool.submit(self._work, client) for _ in range(self.threads)]:
                    thread.result()
            finally:
                self.pace.stop.set()
        return self._problem

    def _work(self, client: Any) -> None:
        while not self.pace.stop.is_set():
            with self._lock:
                key, request = next(self._todo, ("", {}))
            if not key:
                return
            try:
                reply = self.endpoint.ask(client, self.pace, request)
                answer = self.endpoint.keep(request, reply)
            except Failure as problem:
                if problem.kind != TOO_LONG_FAILURE:
                    self._end(problem)
                    return
                answer = TOO_LONG
            except Stopped:
                return
            except PrefoptError as problem:
                self._end(problem)
                return
            except BaseException:
                self.pace.stop.set()
                raise
            with self._lock:
                self.found[key] = answer
                self.shown.advance(1)

    def _end(self, problem: Failure | PrefoptError) -> None:
        with self._lock:
            self._problem = self._problem or problem
        self.pace.stop.set()


def completions_url(url: str) -> str:
    """Where completions are asked for; ConfigError where `url` is no plain http(s) address.

    An address that holds a name, a password or a query is refused: it is written into every row, and they may be secret.
    """
    scheme, sign, rest = url.partition("://")
    host = rest.partition("/")[0]
    if scheme not in ("http", "https") or not sign or not host or any(mark in url for mark in "?# \t\n") or "@" in rest:
        raise ConfigError(
            f'judge: "{url}" is not the address of an endpoint',
            todo="Give its base, http://HOST:PORT/v1 for one, without user, password or query; a key goes into a variable"
            " (api_key_env).",
        )
    base = url.rstrip("/")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def _key_in(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"judge settings: api_key_env: the environment variable {variable} is not set", todo=f"export {variable}=..."
        )
    return key


def _way_out(kind: str) -> str:
    if kind == "budget":
        return "Raise the budget:"
    if kind in ("answers 401", "answers 403"):
        return "Set the key (api_key_env=NAME_OF_A_VARIABLE):"
    if kind == "answers 404":
        return "Check the URL and the model's name:"
    if kind.startswith("answers 4") and kind != "answers 429":
        return "Mend what the endpoint refuses:"
    return "When the endpoint answers again:"


def _read(kept: dict[str, Any]) -> Answer:
    return Answer(str(kept["text"]), bool(kept["finished"]))
