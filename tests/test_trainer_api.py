"""The Python API: three lines train a policy, whatever form model and rows have."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from prefopt import DPOConfig, DPOTrainer
from prefopt.core.config import IN_MEMORY
from prefopt.core.errors import ConfigError
from prefopt.core.run_folder import RunFolder
from train.tiny_runs import preference_rows, tiny_tokenizer, write_model, write_rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def settings(folder: Path, **changes: Any) -> DPOConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "bf16": False,
    }
    return DPOConfig(**{**values, **changes})


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events() if event["kind"] == "step"]


def train(model: Any, rows: Any, folder: Path, **more: Any) -> RunFolder:
    changes = more.pop("changes", {})
    return DPOTrainer(model=model, args=settings(folder, **changes), train_dataset=rows, quiet=True, **more).train()


def test_the_two_lines_of_the_package_docstring_train(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = DPOTrainer(model=str(model), train_dataset=Dataset.from_list(preference_rows())).train()
    assert run.path == Path("runs/latest")
    assert len(losses(run)) == 3  # 40 rows, 16 a step
    assert losses(run)[0] == pytest.approx(0.693147, abs=1e-4)
    assert run.events()[-1]["kind"] == "end"


def test_a_dataset_a_list_and_a_file_of_the_same_rows_train_the_same(tmp_path: Path, model: Path) -> None:
    rows = preference_rows()
    from_file = train(str(model), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "a")
    from_list = train(model, rows, tmp_path / "b")
    from_dataset = train(model, Dataset.from_list(rows), tmp_path / "c")
    assert losses(from_file) == losses(from_list) == losses(from_dataset)
    assert from_file.read("config.json")["data"]["train"] == str(tmp_path / "rows.jsonl")  # type: ignore[index]
    assert from_list.read("config.json")["data"]["train"] == IN_MEMORY  # type: ignore[index]


def test_a_model_in_memory_trains_like_its_folder(tmp_path: Path, model: Path) -> None:
    rows = preference_rows()
    named = train(model, rows, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    own_tokenizer = train(loaded, rows, tmp_path / "b")
    given = AutoModelForCausalLM.from_pretrained(model)
    given_tokenizer = train(given, rows, tmp_path / "c", processing_class=AutoTokenizer.from_pretrained(model))
    assert losses(named) == losses(own_tokenizer) == losses(given_tokenizer)
    assert own_tokenizer.read("config.json")["model"]["name"] == str(model)  # type: ignore[index]


def test_a_model_made_in_memory_needs_its_tokenizer(tmp_path: Path, model: Path) -> None:
    made = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(model).config)
    made.config._name_or_path = ""
    made.name_or_path = ""
    with pytest.raises(ConfigError, match="there is no tokenizer") as caught:
        train(made, preference_rows(), tmp_path / "a")
    assert "processing_class" in caught.value.todo
    run = train(made, preference_rows(), tmp_path / "b", processing_class=tiny_tokenizer())
    assert losses(run)[0] == pytest.approx(0.693147, abs=1e-4)


def test_the_trained_model_loads_in_plain_transformers_with_the_same_logits(tmp_path: Path, model: Path) -> None:
    trainer = DPOTrainer(model=str(model), args=settings(tmp_path / "run"), train_dataset=preference_rows(), quiet=True)
    run = trainer.train()
    assert trainer.policy is not None
    folder = run.complete_checkpoints()[-1]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config._attn_implementation in ("sdpa", "eager")
    ids = AutoTokenizer.from_pretrained(folder)("What of my boat?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = trainer.policy.model.eval()(input_ids=ids, use_cache=False).logits
        theirs = plain(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    before = load_file(model / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in load_file(folder / "model.safetensors").items())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_checkpoint_holds_fp32_masters_and_a_tied_weight_once(tmp_path: Path, tied: bool, bf16: bool) -> None:
    folder = write_model(tmp_path / "model", tied=tied)
    run = train(folder, preference_rows(), tmp_path / "run", changes={"bf16": bf16})
    saved = load_file(run.complete_checkpoints()[-1] / "model.safetensors")
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    again = AutoModelForCausalLM.from_pretrained(run.complete_checkpoints()[-1], dtype=torch.float32)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again.model.embed_tokens.weight, saved["model.embed_tokens.weight"])


def test_another_reference_is_used_by_name_and_in_memory(tmp_path: Path, model: Path) -> None:
    rows = preference_rows()
    other = write_model(tmp_path / "other", seed=5)
    by_name = train(model, rows, tmp_path / "a", ref_model=str(other))
    in_memory = train(model, rows, tmp_path / "b", ref_model=AutoModelForCausalLM.from_pretrained(other))
    own = train(model, rows, tmp_path / "c")
    assert losses(by_name) == losses(in_memory)
    assert losses(by_name)[0] != pytest.approx(losses(own)[0], abs=1e-3)
    assert not any("drift/chosen" in event for event in by_name.events())
    assert any("drift/chosen" in event for event in own.events())


def test_trl_names_mean_what_they_mean_there(tmp_path: Path) -> None:
    config = DPOConfig(
        output_dir="out",
        beta=0.3,
        loss_type="ipo",
        learning_rate=3e-6,
        num_train_epochs=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        lr_scheduler_type="cosine",
        warmup_ratio=0.2,
        weight_decay=0.01,
        max_grad_norm=2.0,
        bf16=True,
        gradient_checkpointing=True,
        max_prompt_length=64,
        max_completion_length=32,
        save_steps=7,
        save_total_limit=2,
        seed=9,
        extra={"loss.reduce": "sum", "train.keep_last": 3},
    ).resolved("some/model")
    part = config.loss.parts[0]
    assert (part.name, part.knobs["beta"], part.knobs["reduce"]) == ("ipo", 0.3, "sum")
    train = config.train
    assert (train.output_dir, train.lr, train.epochs, train.groups_per_step) == ("out", 3e-6, 2.0, 15)
    assert (train.schedule, train.warmup_fraction, train.weight_decay, train.max_grad_norm) == ("cosine", 0.2, 0.01, 2.0)
    assert (train.precision, train.activation_checkpointing, train.save_every_steps, train.keep_last) == ("bf16", "full", 7, 3)
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens, config.data.seed) == (64, 32, 9)
    smoothed = DPOConfig(loss_type="sigmoid", label_smoothing=0.1).resolved("m").loss.parts[0]
    assert (smoothed.name, smoothed.knobs["beta"], smoothed.knobs["label_smoothing"]) == ("dpo", 0.1, 0.1)
    mixed = DPOConfig(loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.2], beta=0.3).resolved("m").loss
    assert [(part.name, part.weight, part.knobs["beta"]) for part in mixed.parts] == [("dpo", 1.0, 0.3), ("ipo", 0.2, 0.3)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"loss_type": "sigmoidal"}, "sigmoidal"),
        ({"beta": -1.0}, "loss.beta"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"learning_rate": -1.0}, "train.lr"),
        ({"extra": {"train.keep_lost": 3}}, "keep_last"),
        ({"extra": {"keep_last": 3}}, "keep_last"),
        ({"lr_scheduler_type": "polynomial"}, "train.schedule"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DPOConfig(**arguments).resolved("model")
    assert named in str(caught.value)


def test_unknown_arguments_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        DPOConfig(learning_rat=1e-5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="callbacks"):
        DPOTrainer(model=model, train_dataset=[], callbacks=None)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="args is a dict") as caught:
        DPOTrainer(model=model, train_dataset=[], args={"beta": 0.1})  # type: ignore[arg-type]
    assert all(entry.name in caught.value.todo for entry in fields(DPOConfig))


def test_evaluation_steps_need_rows_to_evaluate_on(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="there is no eval_dataset"):
        train(model, preference_rows(), tmp_path / "run", changes={"eval_steps": 1})
    rows = preference_rows()
    run = train(model, rows[:32], tmp_path / "run", eval_dataset=rows[32:], changes={"eval_steps": 1})
    assert [(event["step"], event["eval/groups"]) for event in run.events() if event["kind"] == "eval"] == [
        (0, 8),
        (1, 8),
        (2, 8),
        (3, 8),
    ]


def test_metrics_have_the_names_that_trl_logs(tmp_path: Path, model: Path) -> None:
    rows = preference_rows()
    run = train(model, rows[:32], tmp_path / "run", eval_dataset=rows[32:])
    step = next(event for event in run.events() if event["kind"] == "step")
    means = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    assert {"loss", "grad_norm", "epoch", "num_tokens", *means} <= step.keys()
    evaluation = next(event for event in run.events() if event["kind"] == "eval")
    assert {"eval/loss", *(f"eval/{name}" for name in means)} <= evaluation.keys()
    assert len(evaluation["margins"]) == evaluation["eval/groups"] == 8


def test_a_stopped_run_is_resumed_from_python(tmp_path: Path, model: Path) -> None:
    args = settings(tmp_path / "run", save_steps=1)
    trainer = DPOTrainer(model=model, args=args, train_dataset=preference_rows(), quiet=True)
    whole = trainer.train()
    before = losses(whole)
    assert losses(trainer.train(resume_from_checkpoint=True)) == before
    with pytest.raises(prefopt.PrefoptError, match="already holds a run"):
        trainer.train()
