"""How fast requests may go, and how many and how dear they may be."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from prefopt.rollout.judges.chat import Usage
from prefopt.rollout.judges.sending import TOO_LONG, Failure, Reply
from prefopt.rollout.judges.settings import JudgeSettings

_MILLION = 1e6


class Stopped(Exception):
    """Another request ended the run; this one is not sent."""


class Pace:
    """Turns to send: `requests_per_minute` apart from each other, and none while the server asked for a pause."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.stop = threading.Event()
        self._apart = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def turn(self) -> None:
        """Return when the next request may be sent. Stopped where the run ends before."""
        while True:
            with self._lock:
                now = time.monotonic()
                wait = self._next - now
                if wait <= 0:
                    self._next = now + self._apart
            if self.stop.is_set():
                raise Stopped
            if wait <= 0:
                return
            self.stop.wait(wait)

    def hold(self, seconds: float) -> None:
        """No request before `seconds` from now."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


@dataclass(frozen=True, slots=True)
class Reserved:
    """The most that a request can cost, in dollars."""

    dollars: float


class Ledger:
    """Counts requests, tokens and dollars, and refuses a request that the budget might not cover.

    What a request can cost at most is set aside before it is sent: a token has at least one byte, and an answer at most
    `max_answer_tokens`. A request that failed in a way that may be charged stays set aside whole.
    """

    def __init__(self, settings: JudgeSettings, usage: Usage) -> None:
        self.usage = usage
        self._settings = settings
        self._aside = 0.0  # of requests in progress
        self._gone = 0.0  # charged, or perhaps charged
        self._changed = threading.Condition()
        if settings.prompt_price is not None:
            usage.cost_dollars = 0.0

    def reserve(self, body: bytes) -> Reserved:
        """Count a request that is about to be sent. Failure where that would go beyond the budget."""
        most = self._dollars(len(body), self._settings.max_answer_tokens)
        with self._changed:
            limit = self._settings.max_requests
            if limit is not None and self.usage.requests >= limit:
                raise Failure("budget", f"max_requests={limit} is reached", again=False)
            budget = self._settings.max_cost
            if budget is not None:
                while self._gone + self._aside + most > budget and self._aside > 0:
                    self._changed.wait()
                if self._gone + most > budget:
                    what = f"max_cost={budget:g}: the next request could go beyond it (${self._gone:.4f} may be spent)"
                    raise Failure("budget", what, again=False)
                if limit is not None and self.usage.requests >= limit:
                    raise Failure("budget", f"max_requests={limit} is reached", again=False)
            self._aside += most
            self.usage.requests += 1
        return Reserved(most)

    def answered(self, reserved: Reserved, reply: Reply) -> None:
        """The request gave `reply`."""
        with self._changed:
            counted = reply.prompt_tokens is not None and reply.answer_tokens is not None
            self.usage.prompt_tokens += reply.prompt_tokens or 0
            self.usage.answer_tokens += reply.answer_tokens or 0
            self.usage.unknown += not counted
            dollars = self._dollars(reply.prompt_tokens or 0, reply.answer_tokens or 0)
            if self.usage.cost_dollars is not None:
                self.usage.cost_dollars += dollars
            self._settle(reserved, dollars if counted else reserved.dollars)

    def failed(self, reserved: Reserved, failure: Failure) -> None:
        """The request failed."""
        with self._changed:
            if failure.kind != TOO_LONG:
                self.usage.failures[failure.kind] = self.usage.failures.get(failure.kind, 0) + 1
            self.usage.unknown += failure.charged
            self._settle(reserved, reserved.dollars if failure.charged else 0.0)

    def _settle(self, reserved: Reserved, dollars: float) -> None:
        self._aside -= reserved.dollars
        if abs(self._aside) < 1e-12:  # sums of floats; what is left would be waited for
            self._aside = 0.0
        self._gone += dollars
        self._changed.notify_all()

    def _dollars(self, prompt_tokens: int, answer_tokens: int) -> float:
        prices = self._settings
        return (prompt_tokens * (prices.prompt_price or 0) + answer_tokens * (prices.answer_price or 0)) / _MILLION
