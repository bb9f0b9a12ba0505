"""One request to an OpenAI-compatible chat endpoint: a whole answer, or a failure that says whether to try again."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

_AGAIN = (408, 425, 429)  # and every 5xx
_SHOWN_CHARACTERS = 300
TOO_LONG = "questions too long"
_SAYS_TOO_LONG = re.compile(rb"context.{0,3}(length|window|size)|maximum context|too many tokens", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; tokens are None where the server did not count them."""

    text: str
    finished: bool
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


class Failure(Exception):
    """Why a request gave no answer.

    `kind` is counted, `what` is for people. `again`: the same request may succeed later, after `wait_seconds` where the
    server named a time. `charged`: the server may have written an answer that did not arrive.
    """

    def __init__(self, kind: str, what: str, *, again: bool, wait_seconds: float | None = None, charged: bool = False) -> None:
        self.kind = kind
        self.what = what
        self.again = again
        self.wait_seconds = wait_seconds
        self.charged = charged
        super().__init__(what)


def send(httpx: Any, client: Any, url: str, body: bytes, *, timeout_seconds: float) -> Reply:
    """Post `body`, and read the answer to its end. Failure where none came, or not all of it.

    httpx bounds the time between two pieces; a server that sends a byte now and then is stopped by the deadline here.
    """
    deadline = time.monotonic() + timeout_seconds
    content = bytearray()
    try:
        with client.stream("POST", url, content=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise Failure("timeouts", f"no whole answer in {timeout_seconds:g} seconds", again=True, charged=True)
            status, headers = int(response.status_code), response.headers
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise Failure("failed connections", f"no connection to {url} ({error})", again=True) from error
    except httpx.TimeoutException as error:
        raise Failure("timeouts", f"no answer in {timeout_seconds:g} seconds", again=True, charged=True) from error
    except httpx.RequestError as error:
        what = f"the connection broke ({type(error).__name__}: {error})"
        raise Failure("broken connections", what, again=True, charged=True) from error
    if status != HTTPStatus.OK:
        again = status in _AGAIN or status >= 500
        what = f"the endpoint answered {status}: {_shown(content)}"
        if status in (400, 413) and _SAYS_TOO_LONG.search(content):
            raise Failure(TOO_LONG, what, again=False)
        raise Failure(f"answers {status}", what, again=again, wait_seconds=retry_after(headers.get("retry-after")))
    return _reply(content)


def _reply(content: bytes | bytearray) -> Reply:
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        what = f"an answer that is not a whole chat completion: {_shown(content)}"
        raise Failure("broken answers", what, again=True, charged=True) from error
    if text is None:  # a refusal, or nothing but reasoning
        text = ""
    if not isinstance(text, str):
        what = f"an answer whose content is no text: {_shown(content)}"
        raise Failure("broken answers", what, again=True, charged=True)
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text.encode("utf-8", "replace").decode("utf-8"),  # half a surrogate pair could not be written to a file
        finished=choice.get("finish_reason") != "length",
        prompt_tokens=_count(counts.get("prompt_tokens")),
        answer_tokens=_count(counts.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _shown(content: bytes | bytearray) -> str:
    text = " ".join(bytes(content[: 4 * _SHOWN_CHARACTERS]).decode("utf-8", "replace").split())
    return f"{text[:_SHOWN_CHARACTERS]} ..." if len(text) > _SHOWN_CHARACTERS else text or "nothing"


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (seconds or a date, RFC 9110 section 10.2.3); None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
