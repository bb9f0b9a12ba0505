"""Training an adapter: it starts at its base and moves nothing else; what is saved loads elsewhere and goes on to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from cli.command_line import prefopt
from prefopt import DPOConfig, DPOTrainer
from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError, ModelError, PrefoptError, TrainingError
from prefopt.core.resolve import resolve_config
from prefopt.core.run_folder import RunFolder, checkpoint_is_complete
from prefopt.model.load import load_model
from prefopt.pipeline import train_run
from train.tiny_runs import preference_rows, stop_after, tiny_config, tiny_training, weights_of, write_model, write_rows

pytestmark = pytest.mark.slow  # whole runs
STEPS = 4
LN_2 = 0.6931471805599453


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config_of(folder: Path, name: str = "run", *, lora: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    train = {
        "output_dir": str(folder / name),
        "max_steps": STEPS,
        "save_every_steps": 1,
        "lr": 3e-2,
        **sections.pop("train", {}),
    }
    return tiny_config(folder, model={"lora": {"r": 4, "alpha": 8, **(lora or {})}}, train=train, **sections)


def newest(run: RunFolder) -> Path:
    return run.complete_checkpoints()[-1]


def steps(run: RunFolder, *names: str) -> list[tuple[float, ...]]:
    return [tuple(event[name] for name in names) for event in run.events() if event["kind"] == "step"]


def adapter_of(run: RunFolder) -> dict[str, torch.Tensor]:
    folder = newest(run)
    return load_file((folder / "adapter" if (folder / "adapter").is_dir() else folder) / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=torch.arange(5, 45)[None], use_cache=False).logits
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_adapter_moves(tmp_path: Path, precision: str) -> None:
    training = tiny_training(config_of(tmp_path, train={"precision": precision}))
    frozen = {name: value.clone() for name, value in training.policy.model.state_dict().items() if ".lora_" not in name}
    before = weights_of(training)
    assert len(before) == 28 and all(".lora_" in name for name in before)
    training.run([])
    after = weights_of(training)
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    assert {value.dtype for value in after.values()} == {torch.float32}
    state = training.policy.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in frozen.items())


def test_the_first_step_is_at_ln_2_and_the_loss_falls(tmp_path: Path) -> None:
    values = [loss for (loss,) in steps(train_run(config_of(tmp_path, train={"max_steps": 12})), "loss")]
    assert values[0] == pytest.approx(LN_2, abs=1e-6)
    assert values[-1] < 0.9 * LN_2


def test_how_a_step_falls_into_micro_batches_does_not_change_it(tmp_path: Path) -> None:
    runs = [
        train_run(config_of(tmp_path, f"run{budget}", train={"micro_batch_tokens": budget, "lr": 1e-3}))
        for budget in (64, 4096)
    ]
    for (one, norm), (other, other_norm) in zip(*(steps(run, "loss", "grad_norm") for run in runs), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-3)


def test_an_adapter_checkpoint_holds_no_base_weights_and_loads_with_peft(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = newest(train_run(config))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    assert files == {*adapter, *tokenizer, "optimizer.safetensors", "training.json", "manifest.json"}
    assert sum(value.numel() for value in load_file(folder / "adapter_model.safetensors").values()) == 4 * sum(
        rows + columns for rows, columns in 2 * [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    before = logits(base)
    wanted = logits(peft.PeftModel.from_pretrained(base, folder))
    assert (wanted - before).abs().max() > 0.01
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(str(tmp_path / "run"), precision="fp32")
    for other in (plain, ours.model):
        torch.testing.assert_close(logits(other), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merged_checkpoint_is_a_plain_model_with_the_adapter_beside_it(tmp_path: Path, precision: str, tied: bool) -> None:
    write_model(tmp_path / "model", tied=tied)
    whole = train_run(config_of(tmp_path, "merged", lora={"save": "merged"}, train={"precision": precision}))
    alone = train_run(config_of(tmp_path, "alone", train={"precision": precision}))
    folder = newest(whole)
    assert same(adapter_of(whole), adapter_of(alone))
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    from_adapter = load_model(str(newest(alone)), precision="fp32").model
    assert same(plain.state_dict(), from_adapter.state_dict()), "merged while saving or while loading is the same"
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base, folder / "adapter")), logits(plain), atol=1e-5, rtol=1e-5
    )


def test_a_merged_checkpoint_is_complete_with_its_adapter_only(tmp_path: Path) -> None:
    folder = newest(train_run(config_of(tmp_path, lora={"save": "merged"})))
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model.safetensors"} <= listed.keys()
    assert checkpoint_is_complete(folder)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert not checkpoint_is_complete(folder)


@pytest.mark.parametrize(
    ("lora", "precision"),
    [({}, "fp32"), ({}, "bf16"), ({"save": "merged"}, "bf16"), ({"dropout": 0.3}, "fp32"), ({"targets": ["v_proj"]}, "fp32")],
)
def test_a_resumed_run_equals_the_unbroken_one(tmp_path: Path, lora: dict[str, Any], precision: str) -> None:
    unbroken = train_run(config_of(tmp_path, "unbroken", lora=lora, train={"precision": precision}))
    torch.rand(3)
    config = config_of(tmp_path, "broken", lora=lora, train={"precision": precision})
    stop_after(2, config)
    run = train_run(config, resume=True)
    assert same(adapter_of(run), adapter_of(unbroken))
    assert same(*(load_file(newest(one) / "optimizer.safetensors") for one in (run, unbroken)))
    names = ("loss", "rewards/margins", "grad_norm", "num_tokens")
    assert steps(run, *names) == steps(unbroken, *names)


def test_dropout_takes_part_in_training_and_not_in_evaluation(tmp_path: Path) -> None:
    runs = [train_run(config_of(tmp_path, name, lora={"dropout": rate})) for name, rate in (("a", 0.0), ("b", 0.5), ("c", 0.5))]
    without, with_dropout, again = (steps(run, "loss") for run in runs)
    assert without[0] == with_dropout[0], "while B is 0 dropout changes nothing"
    assert without[1:] != with_dropout[1:]
    assert with_dropout == again
    training = tiny_training(config_of(tmp_path, "d", lora={"dropout": 0.5}))
    training.run([])
    groups = training.groups[:8]
    assert np.array_equal(training.evaluate(groups).logp, training.evaluate(groups).logp)


def test_saving_another_way_goes_on_from_the_same_adapter(tmp_path: Path) -> None:
    unbroken = train_run(config_of(tmp_path, "unbroken"))
    for save, other in (("adapter", "merged"), ("merged", "adapter")):
        stop_after(2, config_of(tmp_path, save, lora={"save": save}))
        run = train_run(config_of(tmp_path, save, lora={"save": other}), resume=True)
        assert same(adapter_of(run), adapter_of(unbroken))


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"r": 2}, "its lora.r was 4 and is now 2"),
        ({"alpha": 9}, "its lora.alpha was 8.0 and is now 9.0"),
        ({"dropout": 0.1}, "its lora.dropout was 0.0 and is now 0.1"),
        ({"targets": ["q_proj", "v_proj"]}, r"its lora.targets was \['model.layers.0.mlp.down_proj'.* and is now \[\]"),
        (None, r"its lora was \{.*\} and is now None"),
    ],
)
def test_another_adapter_is_not_resumed(tmp_path: Path, lora: dict[str, Any] | None, named: str) -> None:
    config = config_of(tmp_path)
    stop_after(1, config)
    values = config.resolved()
    values["model"]["lora"] = None if lora is None else {**values["model"]["lora"], **lora}
    with pytest.raises(TrainingError, match=f"cannot be resumed, {named}"):
        train_run(resolve_config(values), resume=True)


def test_an_adapter_is_not_resumed_on_other_weights_nor_a_full_run_with_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    stop_after(1, config)
    write_model(tmp_path / "model", seed=3)
    with pytest.raises(TrainingError, match=r"its reference was|its lora.base was"):
        train_run(config, resume=True)
    values = config.resolved()
    values["model"]["lora"], values["train"]["output_dir"] = None, str(tmp_path / "full")
    train_run(resolve_config(values))
    values["model"]["lora"] = {"r": 4}
    with pytest.raises(TrainingError, match=r"its lora was None and is now \{'r': 4"):
        train_run(resolve_config(values), resume=True)


def test_the_policy_without_its_adapter_serves_as_the_reference(tmp_path: Path) -> None:
    cached = train_run(config_of(tmp_path, "cached"))
    values = config_of(tmp_path, "off").resolved()
    values["reference"] = {"kind": "adapter-off"}
    off = train_run(resolve_config(values))
    assert steps(off, "loss")[0] == (pytest.approx(LN_2, abs=1e-6),)
    for one, other in zip(steps(off, "loss", "grad_norm"), steps(cached, "loss", "grad_norm"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_run_of_an_adapter_is_evaluated_sampled_and_scored_like_any(tmp_path: Path) -> None:
    config = config_of(tmp_path, data={"eval_rows": 8})
    train_run(config)
    run, rows = tmp_path / "run", write_rows(tmp_path / "some.jsonl", preference_rows(4))
    evaluated = prefopt("evaluate", run, "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["heldout"]["pairs"] == 8
    merged, loaded = tmp_path / "plain", load_model(str(run), precision="fp32")
    loaded.model.save_pretrained(merged)
    loaded.tokenizer.save_pretrained(merged)
    (tmp_path / "prompts.txt").write_text("What of a stone?\nWhat of the night?\n")
    written = []
    for at, policy in enumerate((run, merged)):
        scores, samples = tmp_path / f"scores-{at}.jsonl", tmp_path / f"samples-{at}.jsonl"
        done = prefopt("score", policy, rows, "--reference", config.model.name, "-o", scores)
        assert done.code == 0, done.err
        done = prefopt("sample", tmp_path / "prompts.txt", "-m", policy, "-n", 1, "--max-new-tokens", 4, "-o", samples)
        assert done.code == 0, done.err
        written.append((scores.read_text(), samples.read_text()))
    assert written[0] == written[1]
    assert len(written[0][0].splitlines()) == 4


def test_a_run_whose_base_is_gone_says_which(tmp_path: Path) -> None:
    train_run(config_of(tmp_path))
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f'the base of its adapter, "{tmp_path / "model"}", is not there'):
        load_model(str(tmp_path / "run"))


def test_an_adapter_is_trained_on_top_of_a_run_of_one(tmp_path: Path) -> None:
    first = train_run(config_of(tmp_path, "first"))
    values = config_of(tmp_path, "second").resolved()
    values["model"]["name"] = str(tmp_path / "first")
    second = train_run(resolve_config(values))
    assert steps(second, "loss")[0] == (pytest.approx(LN_2, abs=1e-6),)
    settings = json.loads((newest(second) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(newest(first).resolve())
    moved = load_model(str(tmp_path / "second"), precision="fp32").model.state_dict()
    before = load_model(str(tmp_path / "first"), precision="fp32").model.state_dict()
    assert not same(moved, before)


def settings_of(folder: Path, **extra: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=3e-2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        bf16=False,
        extra=extra,
    )


def test_a_peft_config_trains_the_run_that_its_options_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    given = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    args = settings_of(tmp_path / "api", **{"model.lora.save": "merged"})
    api = DPOTrainer(model=model, args=args, train_dataset=preference_rows(), peft_config=given, quiet=True).train()
    lora = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "save": "merged"}
    assert api.read("config.json")["model"]["lora"] == lora  # type: ignore[index]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    memory = DPOTrainer(
        model=loaded, args=settings_of(tmp_path / "memory"), train_dataset=preference_rows(), peft_config=given, quiet=True
    ).train()
    assert same(adapter_of(api), adapter_of(memory))
    own = peft.LoraConfig(r=4, lora_alpha=8)
    named = DPOTrainer(
        model=model, args=settings_of(tmp_path / "own"), train_dataset=preference_rows(), peft_config=own, quiet=True
    ).train()
    assert same(adapter_of(named), adapter_of(api)), "peft adapts q_proj and v_proj of a Llama where none are named"
    given_with_extra = settings_of(tmp_path / "extra", **{"model.lora.r": 4})
    with pytest.raises(ConfigError, match=r"both set model\.lora\.r"):
        DPOTrainer(model=model, args=given_with_extra, train_dataset=[], peft_config=given, quiet=True).train()
    only_extra = settings_of(
        tmp_path / "only", **{"model.lora.r": 4, "model.lora.alpha": 8, "model.lora.targets": ["q_proj", "v_proj"]}
    )
    extra = DPOTrainer(model=model, args=only_extra, train_dataset=preference_rows(), quiet=True).train()
    assert same(adapter_of(extra), adapter_of(api))


def test_a_model_made_in_memory_trains_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.name_or_path = model.config._name_or_path = ""
    run = DPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=settings_of(tmp_path / "run"),
        train_dataset=preference_rows(),
        peft_config=peft.LoraConfig(target_modules="all-linear"),
        quiet=True,
    ).train()
    with pytest.raises(ModelError, match="does not name the model"):
        load_model(str(run.path))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert np.isfinite(logits(peft.PeftModel.from_pretrained(base, newest(run))).numpy()).all()


def test_bad_targets_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match="is the output head"):
        train_run(config_of(tmp_path, lora={"targets": ["lm_head"]}))
    assert not RunFolder(tmp_path / "run").complete_checkpoints()
