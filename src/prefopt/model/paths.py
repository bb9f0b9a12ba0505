"""The fast ways that a model's passes take, each with the plain one beside it, and the proof on real rows that they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefopt.core.progress import say
from prefopt.data.encode import TokenGroup
from prefopt.model import attention
from prefopt.model.batch import Batch
from prefopt.model.compiled import give_up_compiling
from prefopt.model.engine import GRADIENT_TOLERANCE, TOLERANCE, LanguageModel
from prefopt.model.fused import ADAPTERS, COMPILED, EMBEDDING, MLPS, NORMS

_ABOUT = {
    NORMS: "RMS norms that keep their input only for backward",
    MLPS: "MLPs that keep their two projections only for backward",
    ADAPTERS: "LoRA layers that add their product into their base's output",
    EMBEDDING: "an embedding whose gradient is added where the optimizer keeps it",
    COMPILED: "decoder layers through torch.compile",
}
_ABOUT_ATTENTION = {
    "varlen": "one kernel for all groups, against a call for each segment",
    "flex": "one kernel for all groups, against a call for each segment",
    "direct": "torch's kernel for the CPU without autograd around each segment",
}
_SMALL = 2**20  # numbers of a weight whose gradient is compared


@dataclass(frozen=True, slots=True)
class FastPath:
    """A fast way by name. Within `without()` the model takes the plain one; `give_up()` makes that permanent."""

    name: str
    about: str
    without: Callable[[], AbstractContextManager[None]]
    give_up: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Deviation:
    """Largest difference between two ways: of a compared number (nats), and of a gradient relative to the largest."""

    value: float
    gradient: float

    def within(self, dtype: torch.dtype) -> bool:
        """Whether both are rounding in this compute dtype; False for NaN."""
        return self.value <= TOLERANCE[dtype] and self.gradient <= GRADIENT_TOLERANCE[dtype]


def fast_paths(model: LanguageModel) -> list[FastPath]:
    """The fast paths that `model` takes now."""
    fused = model.fused

    def give_up(kind: str) -> Callable[[], None]:
        return partial(give_up_compiling, model) if kind == COMPILED else partial(fused.remove, kind)

    paths = [FastPath(kind, _ABOUT[kind], partial(fused.without, kind), give_up(kind)) for kind in fused.kinds]
    *_, last = backends = _attention_backends(model)
    place = backends.index(model.attention_backend) if model.attention_backend else 0
    if model.sharing and backends[place] != last:
        paths.append(
            FastPath(
                f"{backends[place]} attention",
                _ABOUT_ATTENTION[backends[place]],
                partial(attention.use_backend, last),
                partial(setattr, model, "attention_backend", backends[place + 1]),
            )
        )
    return paths


def _attention_backends(model: LanguageModel) -> list[str]:
    config = model.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if isinstance(heads, int) else None)
    return attention.backends_for(
        model.dtype,
        model.device,
        head_size=size,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=any(name.endswith(".sinks") for name, _ in model.model.named_parameters()),
    )


def deviation(model: LanguageModel, batch: Batch, paths: Sequence[FastPath], *, beside: Sequence[FastPath] = ()) -> Deviation:
    """What `paths` together change on one batch, with those `beside` them switched off."""
    was_training = model.model.training
    model.model.eval()
    try:
        with ExitStack() as plainly:
            for path in beside:
                plainly.enter_context(path.without())
            fast = _computed(model, batch)
            for path in paths:
                plainly.enter_context(path.without())
            plain = _computed(model, batch)
    finally:
        model.model.train(was_training)
    largest = max((float(gradient.abs().max()) for gradient in plain[1:]), default=0.0)
    worst = max((_worst(ours, theirs) for ours, theirs in zip(fast[1:], plain[1:], strict=True)), default=0.0)
    return Deviation(_worst(fast[0], plain[0]), worst / max(largest, 1e-30))


def confirm(model: LanguageModel, groups: Sequence[TokenGroup]) -> None:
    """Compare all fast paths with the plain ones on `groups`; those that differ by more than rounding are given up, with a line."""
    paths = fast_paths(model)
    if not paths:
        return
    batch = model.batch(groups)
    if _agrees(model, batch, paths):
        return
    refused = [path for path in paths if not _agrees(model, batch, [path], beside=[o for o in paths if o is not path])] or paths
    for path in refused:
        path.give_up()
    confirm(model, groups)  # what takes their place is compared as well


def _agrees(model: LanguageModel, batch: Batch, paths: Sequence[FastPath], *, beside: Sequence[FastPath] = ()) -> bool:
    names = ", ".join(path.name for path in paths)
    try:
        found = deviation(model, batch, paths, beside=beside)
    except Exception as error:  # a kernel or compiler raises what it likes, and the plain path is still there
        say(f"{model.name}: {names} failed ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})")
        return False
    if found.within(model.dtype):
        return True
    say(
        f"{model.name}: {names} differ from the plain way by {found.value:.2g} nats (at most {TOLERANCE[model.dtype]:.2g}) and"
        f" {found.gradient:.2g} of the largest gradient (at most {GRADIENT_TOLERANCE[model.dtype]:.2g})"
    )
    return False


def _computed(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """The compared numbers and the gradients of the small weights: norms, biases, adapters, of which every layer has some."""
    trained: list[Any] = [weight for weight in model.model.parameters() if weight.requires_grad]
    weights = [weight for weight in trained if weight.numel() <= _SMALL]
    with torch.enable_grad():
        values = model.compared(batch)
        if not weights:
            return [values.detach().float()]
        signs = 1.0 - 2.0 * (torch.arange(len(values), device=values.device) % 2)  # as in a preference loss
        gradients = torch.autograd.grad((values * signs).sum(), weights, allow_unused=True, materialize_grads=True)
    return [values.detach().float(), *(gradient.float() for gradient in gradients)]


def _worst(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max()) if first.numel() else 0.0
