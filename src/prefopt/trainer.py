"""The Python API: `DPOTrainer(model=..., train_dataset=...).train()`, with TRL's argument names where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from prefopt.core.config import IN_MEMORY, RunConfig
from prefopt.core.errors import ConfigError
from prefopt.core.progress import set_quiet
from prefopt.core.resolve import resolve_config, set_option
from prefopt.core.run_folder import RunFolder
from prefopt.model.adapters import default_targets, lora_options
from prefopt.model.engine import LanguageModel
from prefopt.model.load import as_language_model, load_model, load_tokenizer, model_facts
from prefopt.model.precision import compute_dtype, pick_device
from prefopt.pipeline import train_run


@dataclass(frozen=True)
class DPOConfig:
    """Settings of a DPOTrainer, under TRL's names.

    `per_device_train_batch_size * gradient_accumulation_steps` pairs make one optimizer step; how they fall into
    micro-batches is decided by `micro_batch_tokens` and changes speed and memory only. `loss_type` is "sigmoid" (the
    paper's DPO) or a name of `prefopt losses`; TRL's names are understood. A list is a sum, with `loss_weights` (1 each by
    default). `beta` None is the default of the loss. `extra` holds any other option by its dotted name, for example
    `{"train.keep_last": 3, "loss.ld_alpha": 0.5}`; all of them: `prefopt train --options`.
    """

    output_dir: str = "runs/latest"
    beta: float | None = None
    label_smoothing: float = 0.0
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    learning_rate: float = 1e-6
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 2
    micro_batch_tokens: int | Literal["auto"] = "auto"
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 1
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def resolved(self, model_name: str, *, lora: dict[str, Any] | None = None) -> RunConfig:
        """The RunConfig of these settings for the model `model_name`. ConfigError where a value cannot be.

        `lora`: the section model.lora of a `peft_config`.
        """
        precision = "auto" if self.bf16 is None else "bf16" if self.bf16 else "fp32"
        recipe: dict[str, Any] = {
            "model": {"name": model_name, "lora": lora},
            "loss": self._loss(),
            "data": {
                "max_prompt_tokens": self.max_prompt_length,
                "max_response_tokens": self.max_completion_length,
                "seed": self.seed,
            },
            "train": {
                "output_dir": self.output_dir,
                "epochs": self.num_train_epochs,
                "max_steps": self.max_steps,
                "groups_per_step": self.per_device_train_batch_size * self.gradient_accumulation_steps,
                "micro_batch_tokens": self.micro_batch_tokens,
                "lr": self.learning_rate,
                "schedule": self.lr_scheduler_type,
                "warmup_fraction": self.warmup_ratio,
                "weight_decay": self.weight_decay,
                "max_grad_norm": self.max_grad_norm,
                "precision": precision,
                "activation_checkpointing": self.gradient_checkpointing,
                "save_every_steps": self.save_steps,
                "keep_last": self.save_total_limit,
            },
        }
        for key, value in self.extra.items():
            if lora is not None and key.startswith("model.lora") and key != "model.lora.save":
                raise ConfigError(f"peft_config and extra both set {key}", todo="Set it in one of them.")
            set_option(recipe, key.split("."), value)
        return resolve_config(recipe, source="DPOConfig")

    def _loss(self) -> dict[str, Any]:
        """The loss section of these settings."""
        types = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        names = [_TRL_NAMES.get(name, name) for name in types]
        weights = self.loss_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ConfigError(
                f"loss_weights has {len(weights)} values for {len(names)} losses", todo="Give one weight for each loss_type."
            )
        loss: dict[str, Any] = {"name": names[0]} if weights == [1.0] else dict(zip(names, weights, strict=True))
        if self.beta is not None:
            loss["beta"] = self.beta
        if self.label_smoothing:
            loss["label_smoothing"] = self.label_smoothing
        return loss


_TRL_NAMES = {
    "sigmoid": "dpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
}


class DPOTrainer:
    """Trains a policy on preference rows with DPO (or another loss of the table) against a frozen reference.

    `model`: folder, Hub id, .gguf file, or a transformers model in memory (then with `processing_class`).
    `train_dataset`, `eval_dataset`: a Hugging Face Dataset, a list of rows, a file, or a Hub dataset id.
    `ref_model`: another reference than the model's first weights: a name or a transformers model.
    `peft_config`: a peft.LoraConfig, to train an adapter (`model.lora`) instead of all weights.
    Raises ConfigError for unknown arguments and everything that `prefopt.train_run` raises.
    """

    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        args: DPOConfig | None = None,
        processing_class: Any = None,
        ref_model: Any = None,
        peft_config: Any = None,
        quiet: bool = False,
    ) -> None:
        if args is not None and not isinstance(args, DPOConfig):
            known = ", ".join(entry.name for entry in fields(DPOConfig))
            raise ConfigError(f"args is a {type(args).__name__}", todo=f"Give a prefopt.DPOConfig; it knows {known}.")
        self.args = args or DPOConfig()
        self.model = model
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.processing_class = processing_class
        self.ref_model = ref_model
        self.lora = lora_options(peft_config) if peft_config is not None else None
        self.quiet = quiet
        self.policy: LanguageModel | None = None

    def train(self, *, resume_from_checkpoint: bool = False) -> RunFolder:
        """Train and return the run folder; the newest checkpoint is `run.complete_checkpoints()[-1]`."""
        set_quiet(self.quiet)
        name = (
            self.model if isinstance(self.model, str | Path) else getattr(self.model, "name_or_path", "") or "model in memory"
        )
        lora = self.lora
        if lora is not None and lora["targets"] is None:
            known = isinstance(self.model, str | Path)
            architecture = model_facts(str(name)).architecture if known else self.model.config.model_type
            lora = {**lora, "targets": default_targets(architecture)}
        config = self.args.resolved(str(name), lora=lora)
        if self.args.eval_steps is not None and self.eval_dataset is None:
            raise ConfigError(
                "eval_steps is set and there is no eval_dataset", todo="Give eval_dataset or leave eval_steps out."
            )
        values = config.resolved()
        for key, rows in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if rows is not None:
                values["data"][key] = str(rows) if isinstance(rows, str | Path) else IN_MEMORY
        if self.args.eval_steps is not None:
            values["train"]["eval_every_steps"] = self.args.eval_steps
        config = resolve_config(values, source="DPOConfig")
        self.policy = self._load(self.model, config, for_training=True)
        reference = self._load(self.ref_model, config, for_training=False) if self.ref_model is not None else None
        return train_run(
            config,
            model=self.policy,
            reference_model=reference,
            train_rows=self.train_dataset,
            eval_rows=self.eval_dataset,
            resume=resume_from_checkpoint,
        )

    def _load(self, model: Any, config: RunConfig, *, for_training: bool) -> LanguageModel:
        if isinstance(model, str | Path):
            quantize = config.model.quantize if for_training else None
            loaded = load_model(str(model), precision=config.train.precision, for_training=for_training, quantize=quantize)
            if self.processing_class is not None:
                loaded.tokenizer = self.processing_class
            return loaded
        name = getattr(model, "name_or_path", "") or "model in memory"
        tokenizer = self.processing_class
        if tokenizer is None:
            if not getattr(model, "name_or_path", ""):
                raise ConfigError("The model is in memory and there is no tokenizer", todo="Give processing_class=tokenizer.")
            tokenizer = load_tokenizer(name)
        device = pick_device()
        dtype, _ = compute_dtype(config.train.precision, device)
        return as_language_model(model.float(), tokenizer, name=name, dtype=dtype, device=device, for_training=for_training)
