"""The configuration of a run: frozen, every field documented, unknown keys refused.

`defaults < recipe.yaml < key=value on the command line`; `prefopt.core.resolve` does the merging.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prefopt.core.losses.facts import LossFacts
from prefopt.core.losses.table import Part, resolve_parts
from prefopt.core.rollout_config import RolloutConfig
from prefopt.core.section import Section

MICRO_BATCH_TOKENS = 1024  # on two cores the fastest in fp32; in bf16 2,048 takes 5 % less time, a tenth more memory
FEWEST_TOKENS = 16  # of a micro-batch
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


Decay = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Section):
    """A low-rank adapter: each target computes W x + alpha / r * B A x, and only A and B train (arXiv 2106.09685)."""

    r: int = Field(16, ge=1, description="Rank of B A.")
    alpha: float = Field(32.0, gt=0, description="B A is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapter's input while training.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear: every linear layer but the output head; or a list of module names or their ends, [q_proj, v_proj].",
    )
    save: Literal["adapter", "merged"] = Field(
        "adapter",
        description="What a checkpoint holds. adapter: A and B, a few MB, in peft's layout; merged: a plain model, W + alpha / r * B A.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, list | tuple | set) else None
        if value != "all-linear" and not (names and all(isinstance(name, str) and name for name in names)):
            raise PydanticCustomError("targets", "should be all-linear or a list of module names such as [q_proj, v_proj]")
        return value if names is None else tuple(sorted(set(names)))


class ModelConfig(Section):
    """The policy that is trained."""

    name: str = Field(
        "smollm2-135m-instruct", description="Folder, Hub id, .gguf file, or the demo model smollm2-135m-instruct."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the weights.")
    lora: LoraConfig | None = Field(
        None, description="Train a low-rank adapter instead of all weights: a section, {} for its defaults; null: all weights."
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="With model.lora: hold the frozen linear layers (not the output head) in 4-bit NormalFloat with doubly quantised"
        " scales (QLoRA, arXiv 2305.14314) or in 8 bits with a scale for each row; every product is computed with the weight"
        " brought back to the compute dtype. Needs bitsandbytes: prefopt[memory].",
    )


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
    train_on: Literal["all", "last"] = Field(
        "all",
        description="Which assistant turns of a response carry loss: all, or the last one only. Turns of users and tools never do.",
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
    by_prompt: bool = Field(
        False,
        description="Rows with the same prompt come one after the other, prompts in random order, so that a step computes each"
        " response once that several of its rows have: for all pairs of K sampled responses a third of the work at K = 4"
        " (as arXiv 2203.02155 section 3.5 trains on all pairs of a prompt at once).",
    )


class LossConfig(BaseModel):
    """The objective: a loss and its options, or a weighted sum of losses: `{dpo: 1.0, sft: 0.2, beta: 0.1}`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str | None = Field(
        None,
        description="Which loss, by default dpo; all of them: prefopt losses. Your own: module:function. A mix: a weight for each.",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        resolve_parts(self._given)
        return self

    @property
    def _given(self) -> dict[str, Any]:
        return {**({} if self.name is None else {"name": self.name}), **(self.model_extra or {})}

    @property
    def parts(self) -> tuple[Part, ...]:
        """The losses of the sum, each with its weight and every option."""
        return resolve_parts(self._given)

    @property
    def title(self) -> str:
        """`dpo`, or `dpo + sft` for a mix."""
        return " + ".join(part.name for part in self.parts)

    @property
    def beta(self) -> float | None:
        """The beta of the first part whose loss has an implicit reward and a beta; None where none has."""
        values = [part.knobs["beta"] for part in self.parts if part.facts.implicit_reward != "none" and "beta" in part.knobs]
        return float(values[0]) if values else None

    @property
    def facts(self) -> tuple[LossFacts, ...]:
        """Facts of each part."""
        return tuple(part.facts for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        return any(facts.needs_reference for facts in self.facts)

    @property
    def needs_samples(self) -> bool:
        return any(facts.needs_samples for facts in self.facts)

    def resolved(self) -> dict[str, Any]:
        """The section with every option written out."""
        parts = self.parts
        if len(parts) == 1 and parts[0].weight == 1.0:
            return {"name": parts[0].name, **parts[0].knobs}
        return {part.name: {"weight": part.weight, **part.knobs} for part in parts}


class ReferenceConfig(Section):
    """The reference of the log-ratios."""

    kind: Literal["auto", "cached", "live", "adapter-off", "none", "tr-dpo", "ema"] = Field(
        "auto",
        description="auto: what the loss needs, cached where that serves. cached: log-probs computed once and kept on disk;"
        " live: a second model in memory; adapter-off: the policy without its LoRA adapter; none: for losses without a"
        " reference; tr-dpo: live, moved towards the policy every sync_every_steps (arXiv 2404.09656); ema: live, an"
        " exponential moving average of the policy.",
    )
    model: str | None = Field(None, description="Another reference than the policy's first weights: folder, Hub id or .gguf.")
    cache_dir: str | None = Field(None, description="Folder of the cache; by default below $PREFOPT_CACHE or ~/.cache/prefopt.")
    sync_every_steps: int | None = Field(None, ge=1, description="tr-dpo: optimizer steps between updates; by default 512.")
    sync_mix: float | None = Field(
        None, gt=0, le=1, description="tr-dpo: share of the policy in an update; 1 is a hard update. By default 0.6."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="ema: share of the old reference kept at each step; by default 0.99."
    )


class TrainConfig(Section):
    """The loop."""

    output_dir: str = Field("runs/latest", description="The run folder.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows, when max_steps is not set.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; wins over epochs.")
    groups_per_step: int = Field(16, ge=1, description="Groups (pairs) of one optimizer step, over all micro-batches.")
    micro_batch_tokens: int | Literal["auto"] = Field(
        "auto",
        description="Unique tokens of one forward and backward pass; changes speed and memory only. auto: a size that is fast on"
        " the device (1024 on a CPU, 16384 on a GPU), or what `prefopt plan` says fits in its memory.",
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
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"] = Field(
        "adamw",
        description="adamw: fp32 masters, gradients and moments, 16 bytes a weight (18 with bf16 compute). adamw_8bit: moments in"
        " 8 bits with a scale for each 256 (10 or 12 bytes; needs bitsandbytes: prefopt[memory]). adamw_bf16: no masters; weights,"
        " gradients and moments in bf16, 8 bytes, updated in fp32 and rounded stochastically, so that none is lost on average;"
        " needs bf16 compute.",
    )
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="Recompute activations in backward. full (or true): whole layers, least memory, about a third more time;"
        " selective: only what lies between matrix products and attention, whose results are kept; none (or false).",
    )
    compile: bool = Field(
        False,
        description="Decoder layers through torch.compile, for any number of tokens; the first step takes minutes longer on a CPU"
        " (a C++ compiler is needed there). Used only while it agrees with the layers' own code on the first rows.",
    )
    offload_activations: bool = Field(
        False,
        description="On CUDA: keep what backward needs in the CPU's memory, copied while the GPU computes; the numbers are the"
        " same. With activation_checkpointing=full only the inputs of layers travel.",
    )
    eval_every_steps: int | None = Field(
        None, ge=1, description="Held-out evaluation; by default four times, evenly, the last at the end."
    )
    eval_at_start: bool = Field(True, description="Also evaluate before the first step: what the others are compared with.")
    save_every_steps: int | None = Field(None, ge=1, description="Checkpoints; by default only at the end and on Ctrl-C.")
    keep_last: int = Field(1, ge=1, description="Checkpoints to keep, newest first.")
    keep_best: bool = Field(False, description="Also keep the checkpoint with the lowest held-out loss.")
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="Where metrics also go; they never break a run."
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _true_is_full(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("micro_batch_tokens", mode="plain")
    @classmethod
    def _tokens_or_auto(cls, value: Any) -> Any:
        if value == "auto":
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) >= FEWEST_TOKENS:
            return int(value)
        raise PydanticCustomError("micro_batch_tokens", f"input should be auto, or a whole number of at least {FEWEST_TOKENS}")

    @property
    def budget_tokens(self) -> int:
        """micro_batch_tokens, with `auto` as the size that it tries first on a CPU."""
        return MICRO_BATCH_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


class RunConfig(Section):
    """Everything `prefopt train` needs."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig | None = Field(
        None, description="Learn from the policy's own samples instead of rows: a section; null: from rows."
    )

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        from prefopt.core.checks import check_combinations

        check_combinations(self)
        return self

    @property
    def reference_kind(self) -> str:
        """reference.kind with `auto` decided: what the loss needs, cached where that serves."""
        if self.reference.kind != "auto":
            return self.reference.kind
        if not self.loss.needs_reference and self.rollout is None:
            return "none"
        if self.rollout is not None:
            return "adapter-off" if self.model.lora is not None and self.reference.model is None else "live"
        if any(facts.needs_live_reference for facts in self.loss.facts):
            return "adapter-off" if self.model.lora is not None and self.reference.model is None else "live"
        return "cached"

    def resolved(self) -> dict[str, Any]:
        """Plain values of every field, the loss's options included, as saved in `config.json`."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["loss"] = self.loss.resolved()
        values["reference"]["kind"] = self.reference_kind
        return values
