"""The same pairs in the same order through TRL's DPOTrainer and through ours: the same run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.core.resolve import resolve_config
from prefopt.pipeline import train_run
from train.tiny_runs import preference_rows, tiny_config, tiny_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

STEPS, PAIRS_A_STEP, LR, BETA = 8, 5, 2e-3, 0.3
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm", "lr")
THEIR_NAMES = {"lr": "learning_rate"}


def as_text(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, str]]:
    """Rows whose prompt is the rendered text, so that TRL ends a response with the end-of-turn token and nothing behind it.

    Of conversations TRL also trains on the newline that ChatML writes behind that token.
    """
    return [
        {
            **row,
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
            ),
        }
        for row in rows
    ]


def trl_run(model: Path, rows: list[dict[str, Any]], folder: Path, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl")

    class InOrder(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS_A_STEP,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        beta=BETA,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"name": "dpo", "label_smoothing": 0.0}, {"loss_type": "sigmoid", "label_smoothing": 0.0}),
        ({"name": "ipo", "reduce": "mean"}, {"loss_type": "ipo"}),
    ],
    ids=["dpo", "ipo"],
)
def test_eight_steps_agree_with_trl(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    config = tiny_config(
        tmp_path,
        loss={"beta": BETA, **ours},
        train={
            "max_steps": STEPS,
            "groups_per_step": PAIRS_A_STEP,
            "lr": LR,
            "schedule": "constant",
            "warmup_fraction": 0,
            "micro_batch_tokens": 128,
        },
    )
    training = tiny_training(config)
    place = {group.source: number for number, group in enumerate(training.groups)}
    order = [place[group.source] for step in range(STEPS) for group in training.groups_of(step)]
    rows = as_text(preference_rows(), training.policy.tokenizer)
    trainer, reported = trl_run(tmp_path / "model", [rows[number] for number in order], tmp_path / "trl", **theirs)

    for number, row in zip(order, trainer.train_dataset, strict=True):
        group = training.groups[number]
        assert group.prompt_ids.tolist() == row["prompt_ids"]
        assert [ids.tolist() for ids in group.response_ids] == [row["chosen_ids"], row["rejected_ids"]]

    run = train_run(resolve_config(config.resolved()))
    steps = [event for event in run.events() if event["kind"] == "step"]
    assert len(steps) == len(reported) == STEPS
    deviations = {
        name: max(abs(mine[name] - other[THEIR_NAMES.get(name, name)]) for mine, other in zip(steps, reported, strict=True))
        for name in NAMES
    }
    worst = max(deviations, key=lambda name: deviations[name])
    print("largest deviations from TRL:", {name: f"{value:.2g}" for name, value in deviations.items()})
    assert deviations[worst] <= 1e-4, f"{worst} differs by {deviations[worst]:.3g}; all: {deviations}"

    final = trainer.model.state_dict()
    mine = load_file(run.complete_checkpoints()[-1] / "model.safetensors")
    difference = max(float((value - final[name]).abs().max()) for name, value in mine.items())
    print(f"final weights differ by {difference:.2g}")
    assert difference <= 1e-4, f"final weights differ by {difference:.3g}"
