"""One side of a comparison, in a process of its own: `python one_side.py TASKS.json SIDE`, started by benchmarks/sides.py.

A line for each task says RESULT and its figures as JSON.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_model, random_transformers, shape_config
from sides import Task, groups_of

from prefopt.core.memory import peak_bytes
from prefopt.core.progress import set_quiet
from prefopt.data.encode import TokenGroup
from prefopt.model.paths import confirm
from prefopt.model.precision import compute_dtype, matmul_flops, pick_device


class Clock:
    """Seconds of each step, the device's work included, and the peak of memory over all of them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def begin(self) -> None:
        if not self.seconds and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        _wait()
        self.started = time.monotonic()

    def end(self) -> None:
        _wait()
        self.seconds.append(time.monotonic() - self.started)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_prefopt(task: Task) -> dict[str, Any]:
    from prefopt.core.resolve import resolve_config
    from prefopt.data.encode import TokenSet
    from prefopt.data.groups import GroupSet
    from prefopt.model.load import load_model
    from prefopt.pipeline import Prepared, start_training
    from prefopt.train.plan import FIRST_TRIED

    groups = groups_of(task.rows)
    budget = task.micro_batch_tokens or FIRST_TRIED[pick_device().type]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = resolve_config(
            {
                "model": {"name": task.model, "lora": {"r": task.lora_rank} if task.lora_rank else None},
                "loss": {"name": "dpo", "beta": task.beta},
                "reference": {"cache_dir": folder},
                "train": {
                    "groups_per_step": task.batch,
                    "micro_batch_tokens": budget,
                    "lr": task.lr,
                    "schedule": "constant",
                    "warmup_fraction": 0.0,
                    "precision": task.precision,
                    "max_steps": task.steps,
                },
            },
            task.options,
        )
        if task.model in SHAPES:
            model = random_model(task.model, precision=task.precision, overrides=task.overrides)
        else:
            model = load_model(task.model, precision=task.precision, for_training=True)
        if not model.sharing:
            raise SystemExit(f"{task.model}: prompts are not shared, so this is not what the benchmark is about")
        prove_paths(model, groups)
        started = time.monotonic()
        training = start_training(config, model, Prepared(GroupSet(()), TokenSet(tuple(groups)), TokenSet(()), {}))
        _wait()
        reference_seconds = time.monotonic() - started
        losses = []
        for step in range(task.steps):
            clock.begin()
            record = training.train_step(groups[step * task.batch : (step + 1) * task.batch])
            clock.end()
            losses.append(record.metrics()["loss"])
    smaller = training.micro_batch_tokens
    return {
        "losses": losses,
        "seconds": clock.seconds,
        "reference_seconds": reference_seconds,
        "dtype": str(model.dtype),
        "peak_bytes": clock.peak_bytes,
        "note": f"{smaller} tokens a pass" if smaller != budget else "",
    }


def prove_paths(model: Any, groups: Sequence[TokenGroup]) -> None:
    """Compare the fast paths with the plain ones on real rows first, as `prefopt train` does."""
    model.confirm_sharing(groups[:2])
    confirm(model, [min(groups[:16], key=lambda group: group.unique_tokens)])


def trl_config(task: Task, folder: str, *, bf16: bool, precomputed: bool) -> Any:
    """TRL's settings for the same work: its fastest ones on the device."""
    from trl import DPOConfig

    cuda = torch.cuda.is_available()
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=task.trl_batch,
        gradient_accumulation_steps=task.batch // task.trl_batch,
        max_steps=task.steps,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        beta=task.beta,
        bf16=bf16,
        gradient_checkpointing=task.trl_checkpointing,
        precompute_ref_log_probs=precomputed,
        max_length=None,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        use_liger_kernel=cuda and importlib.util.find_spec("liger_kernel") is not None,
    )


def run_trl(task: Task, *, precomputed: bool) -> dict[str, Any]:
    import transformers
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOTrainer

    transformers.utils.logging.set_verbosity_error()
    clock = Clock()

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *arguments: Any, **options: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            if "prompt_ids" in dataset.column_names:
                return dataset
            return super()._prepare_dataset(dataset, *arguments, **options)

    class Timed(transformers.TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            clock.begin()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.end()

    dtype, _ = compute_dtype(task.precision, pick_device())
    model = trl_model(task, dtype)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        trainer = InOrder(
            model=model,
            # A model made in memory has no folder that a reference could be loaded from.
            ref_model=None if precomputed or task.lora_rank or task.model not in SHAPES else copy.deepcopy(model),
            args=trl_config(task, folder, bf16=dtype == torch.bfloat16, precomputed=precomputed),
            train_dataset=Dataset.from_list([trl_row(row) for row in task.rows]),
            processing_class=trl_tokenizer(task),
            peft_config=trl_adapter(task),
            callbacks=[Timed()],
        )
        prepare_seconds = time.monotonic() - started
        trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.seconds,
        "reference_seconds": prepare_seconds if precomputed else 0.0,
        "dtype": str(dtype),
        "peak_bytes": clock.peak_bytes,
        "note": f"{task.trl_batch} pairs a pass, {model.config._attn_implementation}",
    }


def trl_model(task: Task, dtype: torch.dtype) -> Any:
    """fp32 weights, as the masters of the other side; frozen ones under LoRA in the compute dtype."""
    import transformers

    from prefopt.model.load import model_folder

    attention = "sdpa"
    if torch.cuda.is_available() and dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None:
        attention = "flash_attention_2"
    kept = dtype if task.lora_rank else torch.float32
    if task.model not in SHAPES:
        return transformers.AutoModelForCausalLM.from_pretrained(
            model_folder(task.model), dtype=kept, attn_implementation=attention
        )
    model = random_transformers(shape_config(task.model, task.overrides), pick_device()).to(kept)
    model.set_attn_implementation(attention)
    return model


def trl_tokenizer(task: Task) -> Any:
    """The model's tokenizer; for random weights one that only pads, since their rows are token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from prefopt.model.load import load_tokenizer

    if task.model not in SHAPES:
        return load_tokenizer(task.model)
    words = WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )


def trl_row(row: dict[str, Any]) -> dict[str, Any]:
    if "text" in row:
        return dict(zip(("prompt", "chosen", "rejected"), row["text"], strict=True))
    chosen, rejected = row["responses"]
    return {"prompt_ids": row["prompt"], "chosen_ids": chosen, "rejected_ids": rejected}


def trl_adapter(task: Task) -> Any:
    if not task.lora_rank:
        return None
    import peft

    return peft.LoraConfig(r=task.lora_rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def print_peak(precision: str) -> None:
    device = pick_device()
    dtype, _ = compute_dtype(precision, device)
    large = device.type == "cuda"
    print(matmul_flops(device, dtype, size=8192 if large else 1024, seconds=1.0), dtype)


SIDES: dict[str, Callable[[Task], dict[str, Any]]] = {
    "prefopt": run_prefopt,
    "trl-live": partial(run_trl, precomputed=False),
    "trl-precomputed": partial(run_trl, precomputed=True),
}


def run(task: Task, side: str) -> dict[str, Any]:
    """The figures of one task, or its error. Where the GPU's memory runs out TRL gets half as many pairs a pass."""
    while True:
        try:
            return SIDES[side](task)
        except torch.OutOfMemoryError as error:
            why = f"out of memory: {error}"
        except (Exception, SystemExit):  # the tasks behind it are still to be run
            return {"error": traceback.format_exc()[-3000:]}
        gc.collect()
        torch.cuda.empty_cache()
        smaller = task.with_smaller_passes() if side != "prefopt" else None
        if smaller is None:
            return {"error": why}
        task = smaller


def main() -> None:
    set_quiet(True)
    if sys.argv[1] == "--peak":
        print_peak(sys.argv[2])
        return
    for values in json.loads(Path(sys.argv[1]).read_text()):
        print("RESULT " + json.dumps(run(Task(**values), sys.argv[2])), flush=True)
        gc.collect()  # models and optimizers hold cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
