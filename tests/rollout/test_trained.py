"""`--reward model:PATH` scores text as the reward model scores rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefopt.core.errors import DataError, ModelError
from prefopt.data.encode import encode_groups
from prefopt.data.load import load_groups
from prefopt.model.load import load_reward_model
from prefopt.rollout.rewards import load_reward
from train.tiny_reward_runs import write_reward_model
from train.tiny_runs import preference_rows, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("trained") / "reward")


def test_a_reward_by_name_is_the_score_of_the_rows(folder: Path) -> None:
    rows = preference_rows(6)
    model = load_reward_model(str(folder))
    wanted = model.score_groups(encode_groups(load_groups(rows), model.tokenizer).groups)
    reward = load_reward(f"model:{folder}")
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[key] for row in rows for key in ("chosen", "rejected")]
    found = reward(prompts, answers)
    assert found == pytest.approx(np.concatenate(wanted).tolist(), abs=1e-5)
    assert np.std(found) > 0.1
    shuffled = [5, 0, 7, 3, 11, 1]  # prompts that come again further on
    again = reward([prompts[at] for at in shuffled], [answers[at] for at in shuffled])
    assert again == pytest.approx([found[at] for at in shuffled], abs=1e-5)
    messages = [{"role": "user", "content": prompts[0]}]
    assert reward([messages], answers[:1]) == pytest.approx(found[:1], abs=1e-5)
    assert reward([], []) == []


def test_a_response_that_was_cut_is_scored_without_its_end(folder: Path) -> None:
    rows = [
        row | {"chosen_finished": bool(place % 2), "rejected_finished": False} for place, row in enumerate(preference_rows(4))
    ]
    model = load_reward_model(str(folder))
    wanted = model.score_groups(encode_groups(load_groups(rows), model.tokenizer).groups)
    reward = load_reward(f"model:{folder}")
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[key] for row in rows for key in ("chosen", "rejected")]
    ends = [row[f"{key}_finished"] for row in rows for key in ("chosen", "rejected")]
    assert reward(prompts, answers, ends) == pytest.approx(np.concatenate(wanted).tolist(), abs=1e-5)
    assert reward(prompts, answers) != pytest.approx(reward(prompts, answers, ends), abs=1e-3)
    assert reward(prompts[:1], [""], [False]) == reward(prompts[:1], [""])  # no token but its end


def test_a_row_beyond_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"prompt 2 with its longest response has \d+ tokens"):
        load_reward(f"model:{folder}")(["a", "b"], ["short", "qz" * 100])


def test_a_language_model_is_no_reward(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="is a language model, not a reward model"):
        load_reward(f"model:{tmp_path / 'model'}")
