"""An endpoint that fails in every way: no answer is lost, paid for twice, or made up; and limits hold."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import ConfigError, ModelError, StorageError
from prefopt.rollout.judges.answers import AnswerStore
from prefopt.rollout.judges.asked import PairwiseJudge
from prefopt.rollout.judges.chat import Usage
from prefopt.rollout.judges.endpoint import Endpoint, completions_url
from prefopt.rollout.judges.limits import Ledger
from prefopt.rollout.judges.sending import Failure, Reply, retry_after
from prefopt.rollout.judges.settings import judge_settings
from prefopt.rollout.judges.templates import load_template
from rollout.fake_endpoint import FAULTS, FakeEndpoint

pytestmark = pytest.mark.slow

FAST = {"first_wait_seconds": 0.001, "longest_wait_seconds": 2.0, "retries": 25, "timeout_seconds": 4.0}
KEY = "sk-do-not-tell"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(fake: FakeEndpoint, folder: Path, **settings: Any) -> Endpoint:
    return Endpoint("judge", fake.url, judge_settings(FAST | settings), store=AnswerStore(folder))


def compare(fake: FakeEndpoint, folder: Path, count: int, **settings: Any) -> tuple[list[str | None], Endpoint]:
    """Verdicts of `count` comparisons of which the right ones are known (`expected`)."""
    model = endpoint(fake, folder, **settings)
    judge = PairwiseJudge(model, load_template())
    first = ["x" * (1 + number % 3) for number in range(count)]
    verdicts = judge.compare([f"question {number}" for number in range(count)], first, ["xx"] * count)
    return [verdict.winner for verdict in verdicts], model


def expected(count: int) -> list[str]:
    return [("second", "tie", "first")[number % 3] for number in range(count)]


def one(fake: FakeEndpoint, folder: Path, **settings: Any) -> str:
    return endpoint(fake, folder, **settings).answer([[{"role": "user", "content": "q"}]])[0].text


def seeded_faults(seed: int, share: float) -> Callable[[int], str]:
    """Every fault, of which the slow ones come once each: faults do not repeat when requests come in another order."""
    dice = random.Random(seed)
    quick = [fault for fault in FAULTS if fault not in ("stall", "drip")]
    script = [dice.choice(quick) if dice.random() < share else "ok" for _ in range(2000)]
    script[20], script[31] = "stall", "drip"
    return lambda number: script[number]


def test_no_comparison_is_lost_double_counted_or_invented(tmp_path: Path) -> None:
    with FakeEndpoint(fault=seeded_faults(1, 0.5)) as fake:
        winners, model = compare(fake, tmp_path, 90, concurrency=8)
        assert winners == expected(90)
        assert set(fake.faults) >= set(FAULTS)
        assert len(fake.delivered) == 90
        assert set(fake.delivered.values()) == {1}
        assert model.usage.requests == len(fake.requests) == 90 + fake.faults.total()
        assert sum(model.usage.failures.values()) == fake.faults.total()
        assert model.usage.failures["timeouts"] == 2
        assert (model.usage.prompt_tokens, model.usage.answer_tokens) == (fake.prompt_tokens, fake.answer_tokens)
        assert (model.usage.answers, model.usage.cached) == (90, 0)

        sent = len(fake.requests)
        again, second = compare(fake, tmp_path, 90)
        assert again == winners
        assert len(fake.requests) == sent
        assert (second.usage.cached, second.usage.requests, second.usage.prompt_tokens) == (90, 0, 0)


def test_what_arrived_before_the_endpoint_died_is_not_asked_again(tmp_path: Path) -> None:
    fake = FakeEndpoint(dies_after=15)
    with fake, pytest.raises(ModelError) as caught:
        compare(fake, tmp_path, 40, retries=2)
    done = re.search(r"; (\d+) of 40 comparisons are done\n.*the same command goes on", str(caught.value))
    assert done is not None
    assert int(done[1]) == fake.delivered.total() >= 15
    fake.dies_after = None
    with fake:
        winners, model = compare(fake, tmp_path, 40)
    assert winners == expected(40)
    assert model.usage.cached == int(done[1])
    assert set(fake.delivered.values()) == {1}
    assert len(fake.delivered) == 40


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_asks_again_only_for_what_was_in_progress(tmp_path: Path, how: signal.Signals) -> None:
    """Killed, it may lose the answers in progress; stopped by Ctrl-C, it waits for them and keeps them."""
    program = (
        "from pathlib import Path\n"
        "from rollout.fake_endpoint import FakeEndpoint\n"
        "from rollout.test_endpoint import compare\n"
        f"fake = FakeEndpoint(); fake.port = PORT; compare(fake, Path({str(tmp_path)!r}), 60, concurrency=3)\n"
    )
    with FakeEndpoint(seconds=0.02) as fake:
        paths = os.pathsep.join(path for path in sys.path if path)
        words = [sys.executable, "-c", program.replace("PORT", str(fake.port))]
        process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while fake.delivered.total() < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(how)
        process.wait(timeout=60)
        time.sleep(0.1)
        before = fake.delivered.total()
        assert 12 <= before < 60
        winners, model = compare(fake, tmp_path, 60)
        assert winners == expected(60)
        assert before - (3 if how == signal.SIGKILL else 0) <= model.usage.cached <= before
        assert len(fake.delivered) == 60
        assert sum(count - 1 for count in fake.delivered.values()) == before - model.usage.cached


def test_a_broken_or_foreign_file_in_the_store_is_no_answer(tmp_path: Path) -> None:
    with FakeEndpoint() as fake:
        compare(fake, tmp_path, 3)
        broken, foreign, _ = sorted(tmp_path.rglob("*.json"))
        text = broken.read_text(encoding="utf-8")
        broken.write_text(text[: len(text) // 2], encoding="utf-8")
        foreign.write_text(text, encoding="utf-8")
        winners, model = compare(fake, tmp_path, 3)
        assert winners == expected(3)
        assert (model.usage.cached, len(fake.requests)) == (1, 5)


def test_an_answer_is_kept_under_all_that_it_depends_on(tmp_path: Path) -> None:
    with FakeEndpoint(answer=str.upper) as fake:
        assert one(fake, tmp_path) == one(fake, tmp_path) == "Q"
        assert len(fake.requests) == 1
        for number, settings in enumerate([{"temperature": 0.5}, {"max_answer_tokens": 7}, {"seed": 1}], start=2):
            one(fake, tmp_path, **settings)
            assert len(fake.requests) == number
        Endpoint("other", fake.url, judge_settings(), store=AnswerStore(tmp_path)).answer([[{"role": "user", "content": "q"}]])
        assert [body["model"] for body in fake.requests] == ["judge"] * 4 + ["other"]
        one(fake, tmp_path, timeout_seconds=3.0, concurrency=1, requests_per_minute=1e6)
        assert len(fake.requests) == 5
        bodies = fake.requests
        assert (bodies[0]["temperature"], bodies[1]["temperature"], bodies[2]["max_tokens"], bodies[3]["seed"]) == (
            0,
            0.5,
            7,
            1,
        )
        one(fake, tmp_path, temperature=None, limit_field="max_completion_tokens")
        assert set(bodies[5]) == {"model", "messages", "max_completion_tokens"}


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    with FakeEndpoint(answer=str.upper) as fake:
        asked = [[{"role": "user", "content": text}] for text in ("a", "b", "a", "a", "b")]
        answers = endpoint(fake, tmp_path).answer(asked)
        assert [answer.text for answer in answers] == ["A", "B", "A", "A", "B"]
        assert sorted(fake.delivered.items()) == [("a", 1), ("b", 1)]


def test_a_cut_answer_has_no_verdict(tmp_path: Path) -> None:
    with FakeEndpoint(finish_reason="length") as fake:
        assert compare(fake, tmp_path, 3)[0] == [None] * 3
        assert compare(fake, tmp_path, 3)[0] == [None] * 3
        assert len(fake.requests) == 3


def test_a_refused_request_is_not_repeated_and_tells_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeEndpoint(answer=str.upper, fault=lambda number: "ok" if number else "401") as fake:
        with pytest.raises(ModelError, match="api_key_env") as caught:
            one(fake, tmp_path, api_key_env="JUDGE_KEY")
        assert "answered 401" in str(caught.value)
        assert "0 of 1 answers are done" in str(caught.value)
        assert len(fake.requests) == 1
        assert one(fake, tmp_path, api_key_env="JUDGE_KEY") == "Q"
        assert fake.keys == {f"Bearer {KEY}"}
    assert KEY not in str(caught.value)
    kept = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 1
    assert KEY not in kept[0]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
        endpoint(fake, tmp_path, api_key_env="JUDGE_KEY")


def test_a_question_that_is_too_long_for_the_model_is_left_out_and_counted(tmp_path: Path) -> None:
    with FakeEndpoint(fault=lambda number: "context" if number in (1, 3) else "ok") as fake:
        winners, model = compare(fake, tmp_path, 6, concurrency=1)
        assert winners == [None if number in (1, 3) else winner for number, winner in enumerate(expected(6))]
        assert (model.usage.too_long, model.usage.failures, model.usage.requests) == (2, {}, 6)
        assert compare(fake, tmp_path, 6)[0] == expected(6)  # nothing was kept of them
    with FakeEndpoint(fault=lambda number: "context") as fake, pytest.raises(ModelError, match="all 4 questions are longer"):
        compare(fake, tmp_path / "none", 4)


def test_the_pause_that_the_server_asks_for_is_kept(tmp_path: Path) -> None:
    with FakeEndpoint(answer=str.upper, fault=lambda number: "ok" if number else "429 after 1") as fake:
        assert one(fake, tmp_path) == "Q"
        assert fake.times[1] - fake.times[0] >= 0.95
    with FakeEndpoint(answer=str.upper, fault=lambda number: "429 after 3600") as fake:
        started = time.monotonic()
        with pytest.raises(ModelError, match="asks for a pause of 3600 seconds"):
            one(fake, tmp_path, seed=2)
        assert time.monotonic() - started < 30
        assert len(fake.requests) == 1


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after("0.5") == 0.5
    assert retry_after("-3") == 0
    assert [retry_after(value) for value in (None, "", "soon", "nan")] == [None] * 4
    soon = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True))
    assert soon is not None and 45 < soon <= 50
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_requests_keep_their_pace_and_their_number(tmp_path: Path) -> None:
    with FakeEndpoint(seconds=0.05) as fake:
        compare(fake, tmp_path / "fast", 24, concurrency=4)
        assert 1 < fake.most_in_progress <= 4
    with FakeEndpoint() as fake:
        compare(fake, tmp_path / "slow", 12, requests_per_minute=1200)  # 50 ms apart
        assert fake.times[-1] - fake.times[0] >= 11 * 0.05 - 0.03


def test_a_budget_of_requests_stops_and_goes_on(tmp_path: Path) -> None:
    with FakeEndpoint(fault=lambda number: "500" if number == 1 else "ok") as fake:
        with pytest.raises(ModelError, match=r"max_requests=5 is reached; 4 of 9 comparisons are done\n.*Raise the budget"):
            compare(fake, tmp_path, 9, max_requests=5, concurrency=3)
        assert len(fake.requests) == 5
        assert compare(fake, tmp_path, 9, max_requests=5)[0] == expected(9)
        assert len(fake.requests) == 10
        assert set(fake.delivered.values()) == {1}


@pytest.mark.parametrize("count_tokens", [True, False])
def test_a_budget_of_dollars_is_never_gone_beyond(tmp_path: Path, count_tokens: bool) -> None:
    """The price is that of the tokens that the server counted; where it counts none, of the most that there can be."""
    prices = {"prompt_price": 1000.0, "answer_price": 2000.0, "max_answer_tokens": 50, "concurrency": 4}
    with FakeEndpoint(count_tokens=count_tokens, seconds=0.01) as fake:
        with pytest.raises(ModelError, match=r"max_cost=5: the next request could go beyond it"):
            compare(fake, tmp_path, 60, max_cost=5.0, **prices)
        charged = (fake.prompt_tokens * 1000 + fake.answer_tokens * 2000) / 1e6
        assert 0 < charged <= 5
        done = fake.delivered.total()
        winners, model = compare(fake, tmp_path, 60, **prices)
        assert winners == expected(60)
        assert model.usage.cached == done
        spent = ((fake.prompt_tokens * 1000 + fake.answer_tokens * 2000) / 1e6) - charged
        assert model.usage.cost_dollars == pytest.approx(spent if count_tokens else 0)
        assert model.usage.unknown == (0 if count_tokens else 60 - done)


def test_money_that_is_set_aside_for_one_request_is_not_there_for_another() -> None:
    """Two requests of at most $0.40 fit into $1; a third waits until it is known what they cost."""
    prices = {"prompt_price": 0.0, "answer_price": 0.4e6, "max_answer_tokens": 1}
    ledger = Ledger(judge_settings(prices | {"max_cost": 1.0}), Usage())
    first, second = ledger.reserve(b"q"), ledger.reserve(b"q")
    with ThreadPoolExecutor(2) as pool:
        third = pool.submit(ledger.reserve, b"q")
        with pytest.raises(TimeoutError):
            third.result(timeout=0.2)
        ledger.answered(first, Reply("", True, prompt_tokens=0, answer_tokens=0))
        third_reserved = third.result(timeout=10)
        fourth = pool.submit(ledger.reserve, b"q")
        ledger.answered(second, Reply("", True, prompt_tokens=0, answer_tokens=1))
        with pytest.raises(TimeoutError):
            fourth.result(timeout=0.2)
        ledger.failed(third_reserved, Failure("timeouts", "no answer", again=True, charged=True))
        with pytest.raises(Failure, match=r"max_cost=1: .* \(\$0\.8000 may be spent\)"):
            fourth.result(timeout=10)
    assert ledger.usage.cost_dollars == pytest.approx(0.4)
    assert (ledger.usage.requests, ledger.usage.unknown) == (3, 1)


def test_a_store_that_cannot_be_written_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with FakeEndpoint() as fake, pytest.raises(StorageError):
        compare(fake, tmp_path / "file" / "answers", 3)
    assert not fake.requests


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host/v1", "http://", "http://me:secret@host/v1", "http://host/v1?key=1", "http://host/v1 x"],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of an endpoint"):
        completions_url(url)


def test_the_address_of_completions() -> None:
    wanted = "https://host:8/v1/chat/completions"
    assert {completions_url(f"https://host:8/v1{end}") for end in ("", "/", "/chat/completions")} == {wanted}
