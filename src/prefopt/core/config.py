"""The configuration of a run: frozen, every field documented, unknown keys refused.

`defaults < recipe.yaml < key=value on the command line`; `prefopt.core.resolve` does the merging.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefopt.core.errors import ConfigError
from prefopt.core.facts import loss_facts, resolve_knobs

IN_MEMORY = "(in memory)"  # data.train or data.eval of rows that were given as an object

ROW_SHAPES = (
    "auto",
    "pair",  # prompt + chosen + rejected, strings or message lists
    "transcripts",  # chosen + rejected are whole conversations, the prompt is what they share
    "label",  # prompt + completion (or messages) + label
    "scores",  # prompt + responses + scores
    "ranking",  # prompt + responses + ranking
    "demonstration",  # messages, prompt + completion, or instruction + output
)


class Section(BaseModel):
    """A frozen part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """The policy that is trained."""

    name: str = Field(
        "smollm2-135m-instruct", description="Folder, Hub id, .gguf file, or the demo model smollm2-135m-instruct."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights.")


class DataConfig(Section):
    """The rows, and how they become tokens."""

    train: str | None = Field(None, description="File (.jsonl, .json, .csv, .parquet, also .gz) or Hub dataset id.")
    eval: str | None = Field(None, description="Held-out rows of the same kinds.")
    eval_rows: int = Field(0, ge=0, description="Rows to hold out of train when there is no data.eval; drawn with data.seed.")
    split: str = Field("train", description="Split of a Hub dataset used for train.")
    eval_split: str = Field("test", description="Split of a Hub dataset used for eval.")
    shape: Literal["auto", "pair", "transcripts", "label", "scores", "ranking", "demonstration"] = Field(
        "auto", description="Shape of a row; auto detects it and says so."
    )
    template: str = Field(
        "auto",
        description="auto: the model's chat template where it has one, else plain text; chat; plain; or a .jinja file.",
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Prompt budget; by default half of the context, at most 1024."
    )
    max_response_tokens: int | None = Field(
        None, ge=1, description="Response budget; by default half of the context, at most 1024."
    )
    on_overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="What happens to rows over a budget. truncate keeps the end of a prompt and the start of a response.",
    )
    on_bad_row: Literal["drop", "error"] = Field(
        "drop", description="What happens to rows that cannot be used; always counted."
    )
    seed: int = Field(0, description="Seed of the order of rows and of the held-out draw.")


class LossConfig(BaseModel):
    """The objective: a name of the loss table and its options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field("dpo", description="Which loss; all of them: prefopt losses.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        resolve_knobs(self.name, dict(self.model_extra or {}))
        return self

    @property
    def knobs(self) -> dict[str, float | str]:
        """Every option of the loss, with its defaults filled in."""
        return resolve_knobs(self.name, dict(self.model_extra or {}))


class ReferenceConfig(Section):
    """The frozen reference of the log-ratios."""

    kind: Literal["cached", "live"] = Field(
        "cached", description="cached: log-probs computed once and kept on disk; live: a second model in memory."
    )
    model: str | None = Field(None, description="Another reference than the policy's first weights: folder, Hub id or .gguf.")
    cache_dir: str | None = Field(None, description="Folder of the cache; by default below $PREFOPT_CACHE or ~/.cache/prefopt.")


class TrainConfig(Section):
    """The loop."""

    output_dir: str = Field("runs/latest", description="The run folder.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows, when max_steps is not set.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; wins over epochs.")
    groups_per_step: int = Field(16, ge=1, description="Groups (pairs) of one optimizer step, over all micro-batches.")
    micro_batch_tokens: int = Field(
        1024, ge=16, description="Unique tokens of one forward and backward pass; changes speed and memory only."
    )
    lr: float = Field(1e-6, ge=0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after the warm-up, down to 0 for linear and cosine."
    )
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps in which lr rises linearly.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's betas.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Compute dtype; masters are fp32. auto: bf16 where the hardware multiplies it natively, else fp32."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, about a third more time."
    )
    eval_every_steps: int | None = Field(
        None, ge=1, description="Held-out evaluation; by default four times, evenly, the last at the end."
    )
    save_every_steps: int | None = Field(None, ge=1, description="Checkpoints; by default only at the end and on Ctrl-C.")
    keep_last: int = Field(1, ge=1, description="Checkpoints to keep, newest first.")
    keep_best: bool = Field(False, description="Also keep the checkpoint with the lowest held-out loss.")
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="Where metrics also go; they never break a run."
    )


class RunConfig(Section):
    """Everything `prefopt train` needs."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.data.eval is not None and self.data.eval_rows:
            raise ConfigError(
                "data.eval and data.eval_rows are both set: held-out rows come from one of them",
                todo="Remove data.eval_rows to use the file, or data.eval to draw from data.train.",
            )
        has_eval = self.data.eval is not None or self.data.eval_rows > 0
        if self.train.keep_best and not has_eval:
            raise ConfigError(
                "train.keep_best needs held-out rows to compare checkpoints, and there are none",
                todo="Set data.eval=FILE or data.eval_rows=200, or remove train.keep_best.",
            )
        if self.train.eval_every_steps and not has_eval:
            raise ConfigError(
                "train.eval_every_steps is set and there are no held-out rows",
                todo="Set data.eval=FILE or data.eval_rows=200, or remove train.eval_every_steps.",
            )
        if self.reference.kind == "live" and self.reference.cache_dir is not None:
            raise ConfigError(
                "reference.cache_dir is set and reference.kind is live: a live reference has no cache",
                todo="Remove reference.cache_dir, or use reference.kind=cached.",
            )
        facts = loss_facts(self.loss.name)
        if self.reference.model is not None and not facts.needs_reference:
            raise ConfigError(
                f'reference.model is set and the loss "{self.loss.name}" uses no reference',
                todo="Remove reference.model or choose a loss with a reference: prefopt losses",
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain values of every field, the loss's options included, as saved in `config.json`."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["loss"] = {"name": self.loss.name, **self.loss.knobs}
        return values
