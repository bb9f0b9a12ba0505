"""What backward needs, kept, recomputed or moved away: the gradients are those of a plain pass, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.tiny_models import awkward_groups, language_model
from prefopt.core.config import LoraConfig
from prefopt.core.errors import ConfigError
from prefopt.core.resolve import resolve_config
from prefopt.model.adapters import add_lora
from prefopt.model.batch import packed_batch, padded_batch
from prefopt.model.engine import LanguageModel
from prefopt.model.footprint import Ledger
from prefopt.model.offload import ActivationOffload, _Moved, check_offload

CPU = torch.device("cpu")


class Counting(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def passes(
    name: str,
    change: Callable[[LanguageModel], Any] = lambda model: None,
    *,
    lora: bool = False,
    pack: bool = True,
    mode: Any = None,
) -> tuple[list[Tensor], Any]:
    """Gradients of two batches whose graphs live side by side, and what `change` gave back."""
    model, groups = language_model(name), awkward_groups()
    if lora:
        add_lora(model, LoraConfig(r=3))
        for parameter_name, parameter in model.model.named_parameters():
            if ".lora_B." in parameter_name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.model.train()
    model.disable_dropout()
    made = change(model)
    make = packed_batch if pack else padded_batch
    with mode or nullcontext():
        first, second = (model.token_logps(make(part, CPU)) for part in (groups[:3], groups[3:]))
        weights = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
        total = first[0::2].sum() - second.pow(2).sum()
        return list(torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)), made


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and any(bool(a.any()) for a in first)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_selective_recomputation_changes_no_gradient(name: str, lora: bool, pack: bool) -> None:
    plain, _ = passes(name, lora=lora, pack=pack)
    again, _ = passes(name, lambda model: model.enable_activation_checkpointing(selective=True), lora=lora, pack=pack)
    assert equal(plain, again)


def test_selective_recomputation_repeats_no_product_and_no_attention() -> None:
    """Full recomputation runs every product of the forward again; selective none, but everything between them."""
    counts = {}
    for kind in ("none", "selective", "full"):
        mode = Counting()

        def change(model: LanguageModel, kind: str = kind) -> None:
            if kind != "none":
                model.enable_activation_checkpointing(selective=kind == "selective")

        passes("llama", change, mode=mode)
        counts[kind] = mode.calls
    dear = [name for name in counts["none"] if name in ("aten::mm", "aten::addmm") or "dot_product" in name]
    assert len(dear) >= 2
    for name in dear:
        assert counts["selective"][name] == counts["none"][name]
    assert counts["full"]["aten::mm"] > counts["none"]["aten::mm"]
    assert counts["selective"]["aten::rsqrt"] == counts["full"]["aten::rsqrt"] > counts["none"]["aten::rsqrt"]


def test_less_is_kept_the_more_is_recomputed() -> None:
    peaks = []
    for kind in ("none", "selective", "full"):
        ledger = Ledger()

        def change(model: LanguageModel, kind: str = kind) -> None:
            if kind != "none":
                model.enable_activation_checkpointing(selective=kind == "selective")

        passes("llama", change, mode=ledger)
        peaks.append(ledger.peak)
    assert peaks == sorted(set(peaks), reverse=True)


def offloaded(smallest_bytes: int = 0, checkpoint: bool = False) -> Callable[[LanguageModel], ActivationOffload]:
    def change(model: LanguageModel) -> ActivationOffload:
        if checkpoint:
            model.enable_activation_checkpointing()
        offload = ActivationOffload(CPU, list(model.model.parameters()), smallest_bytes=smallest_bytes)
        model.saving = offload.saving
        return offload

    return change


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_what_was_moved_away_comes_back_as_it_was(name: str, lora: bool, checkpoint: bool) -> None:
    plain, _ = passes(name, lora=lora)
    moved, offload = passes(name, offloaded(checkpoint=checkpoint), lora=lora)
    assert equal(plain, moved)
    assert offload.moved_bytes > 0


def test_with_recomputation_only_the_inputs_of_layers_move() -> None:
    _, alone = passes("llama", offloaded())
    _, together = passes("llama", offloaded(checkpoint=True))
    assert together.moved_bytes < alone.moved_bytes / 5


class TestOffload:
    def test_weights_small_tensors_and_passes_without_gradients_stay(self) -> None:
        weight = torch.nn.Parameter(torch.ones(64, 64))
        offload = ActivationOffload(CPU, [weight], smallest_bytes=4096)
        small, large = torch.ones(8, 64, requires_grad=True), torch.ones(32, 64, requires_grad=True)
        with offload.saving():
            torch.nn.functional.linear(small * 1, weight)
            torch.nn.functional.linear(large.detach(), weight.detach())
            assert offload.moved_bytes == 0
            kept = torch.nn.functional.linear(large * 1, weight)
        assert offload.moved_bytes == 32 * 64 * 4
        with torch.no_grad(), offload.saving():
            torch.nn.functional.linear(large * 1, weight)
        assert offload.moved_bytes == 32 * 64 * 4
        assert kept.requires_grad

    def test_a_tensor_that_is_saved_often_moves_once_and_its_memory_is_not_mistaken_for_it(self) -> None:
        offload = ActivationOffload(CPU, [], smallest_bytes=0)
        with offload.saving():
            state = torch.rand(100)
            packed = [offload._pack(state), offload._pack(state), offload._pack(state[:50])]
            assert packed[0] is packed[1] and packed[2] is not packed[0]
            held = state.clone()
            state.add_(1)  # another version is another tensor
            changed = offload._pack(state)
            assert changed is not packed[0]
            del state
            for _ in range(50):  # the allocator gives the same place again
                other = torch.rand(100)
                away = offload._pack(other)
                assert isinstance(away, _Moved) and away is not packed[0] and torch.equal(away.away, other)
                del other
        assert torch.equal(offload._unpack(packed[0]), held) and torch.equal(offload._unpack(changed), held + 1)
        assert torch.equal(offload._unpack(packed[2]), held[:50])

    def test_a_broadcast_tensor_is_not_written_out(self) -> None:
        offload = ActivationOffload(CPU, [], smallest_bytes=0)
        wide = torch.ones(1, 100).expand(1000, 100)
        assert offload._pack(wide) is wide

    def test_strides_come_back(self) -> None:
        offload = ActivationOffload(CPU, [], smallest_bytes=0)
        turned = torch.rand(3, 5, 7).transpose(0, 2)
        back = offload._unpack(offload._pack(turned))
        assert back.stride() == turned.stride() and torch.equal(back, turned)

    def test_a_cpu_has_nowhere_to_move_to(self) -> None:
        with pytest.raises(ConfigError, match="this run is on cpu"):
            check_offload(CPU)
        check_offload(torch.device("cuda"))


def test_true_and_false_are_full_and_none() -> None:
    for given, meant in (("true", "full"), ("false", "none"), ("selective", "selective"), ("none", "none")):
        assert resolve_config({}, [f"train.activation_checkpointing={given}"]).train.activation_checkpointing == meant
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        resolve_config({}, ["train.activation_checkpointing=some"])
