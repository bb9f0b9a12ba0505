"""What a run will need before it starts: memory by part, whether it fits, what would make it fit, and the work to do.

Sizes are in bytes. The largest micro-batch of the run, and the largest that meets the gradients of one before it, go forward
and backward through the real code on tensors without data (prefopt.model.footprint), with the masters in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.core.config import FEWEST_TOKENS, MICRO_BATCH_TOKENS, RunConfig
from prefopt.core.errors import ConfigError, ModelError, PrefoptError
from prefopt.core.memory import available_bytes, process_bytes
from prefopt.core.progress import say, silence
from prefopt.core.resolve import resolve_config
from prefopt.data.encode import TokenGroup
from prefopt.data.pack import groups_of_step, micro_batches, total_steps
from prefopt.data.tokens import lengths_of
from prefopt.model.adapters import add_lora, target_layers
from prefopt.model.engine import LanguageModel
from prefopt.model.footprint import Ledger, forward, forward_backward, model_without_weights, put_on_device, without_data
from prefopt.model.precision import compute_dtype, pick_device
from prefopt.model.quantized import count_as_quantized
from prefopt.model.reference import GROUPS_PER_PART
from prefopt.model.tables import gradients_into
from prefopt.train.activations import set_activations
from prefopt.train.optimizer import MasterOptimizer, make_optimizer

FIRST_TRIED = {"cpu": MICRO_BATCH_TOKENS, "cuda": 16384, "mps": 4096}  # fast on the device, where memory allows
SAFE_SHARE = 0.9  # of the memory that is left: other programs and the allocator's gaps need some
_STEPS_LOOKED_AT = 200
_PARTS_LOOKED_AT = 16  # of the reference pass
_GAPS = 0.15  # share of the passes
_KERNELS = 100 << 20  # buffers of the libraries that multiply matrices
_IN_BF16 = 8  # bytes of such buffers for each number of the largest weight
_SMALL_SHARE = 0.3  # a rough bound below this share of the room needs no closer look


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for: device, compute dtype, `total` memory that this program may hold, and what it holds
    before a model is loaded (`process`)."""

    device: torch.device
    dtype: torch.dtype
    total: int
    process: int

    @classmethod
    def here(cls, config: RunConfig, *, total: int | None = None, held: int = 0) -> Machine:
        """The machine that this program runs on, or one like it where the program may hold `total` bytes.

        `held`: bytes of weights in memory already, which a plan counts itself.
        """
        device = pick_device()
        dtype, _ = compute_dtype(config.train.precision, device)
        if device.type == "cuda":
            return cls(device, dtype, total or torch.cuda.mem_get_info(device)[0] + held, process=0)
        process = process_bytes()
        return cls(device, dtype, total or process + available_bytes(), max(0, process - held))

    @property
    def room(self) -> int:
        """What a plan's peak may be."""
        return self.process + int(SAFE_SHARE * (self.total - self.process))


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one configuration.

    `parts`: what is held through training, by name, and the passes over the largest micro-batch. `process`: what the
    program takes before a model is loaded. `reference_pass`: peak of the pass that fills the reference cache, which is
    over before the first step. `largest`: computed tokens of the largest micro-batch, of the `micro_batch_tokens` that it
    may have. `trained`: weights that train; `weights`: all of them.
    """

    parts: dict[str, int]
    process: int
    reference_pass: int
    micro_batch_tokens: int
    largest: int
    trained: int
    weights: int

    @property
    def peak(self) -> int:
        return self.process + max(sum(self.parts.values()), self.reference_pass)


@dataclass(frozen=True)
class Change:
    """Options that would change the memory of a run, and its plan with them."""

    words: tuple[str, ...]
    plan: MemoryPlan


def plan_memory(
    config: RunConfig, model_config: Any, groups: Sequence[TokenGroup], machine: Machine, *, micro_batch_tokens: int
) -> MemoryPlan:
    """The plan of `config` for the rows `groups` with a budget of `micro_batch_tokens`.

    ModelError where the model's passes cannot be followed without data: those of a mixture of experts depend on it.
    """
    try:
        return _counted(config, model_config, groups, machine, micro_batch_tokens)
    except PrefoptError:
        raise
    except Exception as error:  # any kind that the model's own code or a tensor without data raises
        raise ModelError(
            f"{config.model.name}: its memory cannot be counted without its weights ({type(error).__name__})",
            todo="Set train.micro_batch_tokens yourself; a step that runs out of memory is made again in smaller pieces.",
        ) from error


def _counted(
    config: RunConfig, model_config: Any, groups: Sequence[TokenGroup], machine: Machine, micro_batch_tokens: int
) -> MemoryPlan:
    fullest = fullest_micro_batches(config, groups, micro_batch_tokens)
    lora = config.model.lora
    policy = model_without_weights(
        model_config,
        name=config.model.name,
        dtype=machine.dtype,
        device=machine.device,
        classifier=config.loss.facts[0].trains_reward_model,
        trust_remote_code=config.model.trust_remote_code,
    )
    weights = policy.model.num_parameters()
    quantized = (0, 0)
    if config.model.quantize is not None:
        quantized = count_as_quantized(policy.model, target_layers(policy, "all-linear"), config.model.quantize)
    if lora is not None:
        with silence():
            add_lora(policy, lora.model_copy(update={"save": "adapter"}), seed=0)
    with without_data(machine.device) as ledger:
        put_on_device(policy)
        policy.disable_dropout()
        policy.model.train()
        set_activations(policy, config.train, without_data=True)
        optimizer = make_optimizer(policy.model, config.train, machine.dtype)
        trained = sum(master.numel() for master in optimizer.masters.values())
        held = ledger.live
        if isinstance(optimizer, MasterOptimizer) and not optimizer.keeps_gradients:
            held += 4 * trained  # they come with the first backward pass, while activations go
        with ledger.peak_of() as passes:
            for micro_batch in fullest:
                with gradients_into(optimizer.table_gradients(policy.model)):
                    forward_backward(policy, policy.batch(micro_batch))
        loaded = 4 * (weights - quantized[0]) + quantized[1]
        reference_peak = _reference_pass(config, policy, groups, ledger, micro_batch_tokens, loaded)
    size = machine.dtype.itemsize
    parts = {
        "weights, quantised": quantized[1],
        **_weight_parts(config, size, weights - quantized[0], trained),
        "AdamW moments": optimizer.moment_bytes,
        "passes over the largest micro-batch": max(passes[0] - held, optimizer.update_bytes),  # an update comes after them
        "gaps and kernels": _gaps(passes[0] - held, machine, largest=max(map(torch.Tensor.numel, policy.model.parameters()))),
        "reference model": weights * {"live": size, "tr-dpo": 4, "ema": 4}.get(config.reference_kind, 0),
    }
    return MemoryPlan(
        parts={name: part for name, part in parts.items() if part},
        process=machine.process,
        reference_pass=reference_peak,
        micro_batch_tokens=micro_batch_tokens,
        largest=sum(policy.computed_tokens(group) for group in fullest[0]),
        trained=trained,
        weights=weights,
    )


def _weight_parts(config: RunConfig, size: int, weights: int, trained: int) -> dict[str, int]:
    """Bytes of weights and gradients by name; `size`: bytes of a number in the compute dtype."""
    if config.train.optimizer == "adamw_bf16":
        own = trained if config.model.lora is not None else 0  # A and B besides the model's own
        return {"weights, bf16": size * (weights + own), "gradients, bf16": size * trained}
    return {
        "weights, fp32": 4 * (weights if size == 4 or config.model.lora is None else trained),
        "weights, compute copy": size * weights if size < 4 else 0,
        "gradients, fp32": 4 * trained,
    }


def _gaps(passes: int, machine: Machine, *, largest: int) -> int:
    """What the CPU's allocator loses between blocks that come and go, and what kernels take for themselves: in bf16 copies of the
    matrices that they multiply, of which the `largest` has so many numbers. By measurement (benchmarks/RESULTS.md)."""
    if machine.device.type != "cpu":
        return 0
    return int(_GAPS * passes) + _KERNELS + (_IN_BF16 * largest if machine.dtype == torch.bfloat16 else 0)


def _reference_pass(
    config: RunConfig, policy: LanguageModel, groups: Sequence[TokenGroup], ledger: Ledger, budget: int, weight_bytes: int
) -> int:
    """Peak of weights and one forward pass of the reference, where it is made before training; 0 where it is not."""
    if config.reference_kind != "cached":
        return 0
    lengths = lengths_of(groups).unique_G.tolist()
    fullest = [max(range(len(groups)), key=lengths.__getitem__)]
    for start in range(0, min(len(groups), _PARTS_LOOKED_AT * GROUPS_PER_PART), GROUPS_PER_PART):
        for cut in micro_batches(lengths[start : start + GROUPS_PER_PART], budget_tokens=2 * budget):
            found_here = [start + place for place in cut]
            fullest = max(fullest, found_here, key=lambda chosen: sum(lengths[place] for place in chosen))
    policy.model.eval()
    held = ledger.live
    with ledger.peak_of() as found:
        forward(policy, [groups[place] for place in fullest])
    trained: int = sum(4 * weight.numel() for weight in policy.model.parameters() if weight.requires_grad)
    return found[0] - held + weight_bytes + (trained if config.model.lora is not None else 0)


def fullest_micro_batches(config: RunConfig, groups: Sequence[TokenGroup], micro_batch_tokens: int) -> list[list[TokenGroup]]:
    """Of the first steps of the run the micro-batch with the most tokens, or the longest group if that has more, and the
    largest of those that are not the first of their step, which meet its gradients; without that where steps have only one."""
    train = config.train
    lengths = lengths_of(groups).unique_G.tolist()
    total = train.max_steps * train.groups_per_step if train.max_steps is not None else round(len(groups) * train.epochs)
    steps = total_steps(len(groups), epochs=train.epochs, groups_per_step=train.groups_per_step, max_steps=train.max_steps)

    def tokens_of(places: Sequence[int]) -> int:
        return sum(lengths[place] for place in places)

    first = [max(range(len(groups)), key=lengths.__getitem__)]
    later: list[int] = []
    for step in range(min(steps, _STEPS_LOOKED_AT)):
        places = groups_of_step(
            step, groups=len(groups), groups_per_step=train.groups_per_step, total_groups=total, seed=config.data.seed
        )
        cuts = micro_batches([lengths[place] for place in places], budget_tokens=micro_batch_tokens)
        found = [[places[number] for number in cut] for cut in cuts]
        first = max(first, *found, key=tokens_of)
        later = max(later, *found[1:], key=tokens_of) if found[1:] else later
    return [[groups[place] for place in places] for places in (first, later) if places]


def fitting_budget(config: RunConfig, model_config: Any, groups: Sequence[TokenGroup], machine: Machine) -> int:
    """train.micro_batch_tokens of `auto`: the first tried on the device, halved until its plan fits or holds one group only."""
    budget = FIRST_TRIED[machine.device.type]
    if _rough_bound(model_config, groups, budget) < _SMALL_SHARE * machine.room:
        return budget
    while True:
        try:
            plan = plan_memory(config, model_config, groups, machine, micro_batch_tokens=budget)
        except ModelError as error:
            say(f"{error.what}; micro-batches of at most {budget} tokens")
            return budget
        if plan.peak <= machine.room or budget // 2 < max(FEWEST_TOKENS, _longest(groups)):
            return budget
        budget //= 2


def _rough_bound(model_config: Any, groups: Sequence[TokenGroup], budget: int) -> float:
    """More than a run needs, from the shapes of a usual decoder alone; infinite where the configuration names them otherwise."""
    text = model_config.get_text_config()
    if not all(isinstance(getattr(text, name, None), int) for name in ("hidden_size", "num_hidden_layers", "vocab_size")):
        return float("inf")
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    weights = 2 * int(text.vocab_size) * hidden + layers * (4 * hidden * hidden + 3 * hidden * inner)
    tokens = max(budget, _longest(groups))
    return 24 * weights + 4.0 * tokens * layers * (20 * hidden + 6 * inner) + 2**29


def _longest(groups: Sequence[TokenGroup]) -> int:
    """Tokens of the longest group."""
    return int(lengths_of(groups).unique_G.max())


def changes_that_fit(config: RunConfig, model_config: Any, groups: Sequence[TokenGroup], machine: Machine) -> Iterator[Change]:
    """Other configurations of the same run that fit into the machine, the mildest first."""
    longest = _longest(groups)
    wanted = FIRST_TRIED[machine.device.type] if config.train.micro_batch_tokens == "auto" else config.train.budget_tokens
    smallest = max(256, min(wanted, longest))
    fewer = (f"train.micro_batch_tokens={smallest}",)
    some, recompute = ("train.activation_checkpointing=selective",), ("train.activation_checkpointing=full",)
    lora, half = ("model.lora={}",), ("train.optimizer=adamw_bf16",)
    changes = [fewer, some, recompute, (*recompute, *fewer)]
    changes += [half, (*half, *recompute, *fewer)] if machine.dtype == torch.bfloat16 else []
    changes += [(*lora, *fewer), (*lora, *recompute, *fewer)]
    for words in changes:
        try:
            other = resolve_config(config.resolved(), words)
        except ConfigError:  # a reward model takes no adapter, for example
            continue
        if other == config:
            continue
        budget = other.train.budget_tokens if other.train.micro_batch_tokens != "auto" else wanted
        plan = plan_memory(other, model_config, groups, machine, micro_batch_tokens=budget)
        if plan.peak <= machine.room:
            yield Change(words, plan)
