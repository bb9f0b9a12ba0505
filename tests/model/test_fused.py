"""Fused norms and gated MLPs: the modules' own results to the bit, their gradients, and less kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.tiny_models import CONFIGS, awkward_groups, causal_model, language_model
from prefopt.core.config import LoraConfig
from prefopt.model.adapters import add_lora
from prefopt.model.engine import LanguageModel, cast_parameters
from prefopt.model.fused import ADAPTERS, EMBEDDING, MLPS, NORMS, fuse

BOTH = (NORMS, MLPS)
EXPECTED = {
    "llama": BOTH, "qwen3": BOTH, "mistral": BOTH, "phi3": BOTH, "olmo2": BOTH, "granite": BOTH, "gemma2": BOTH, "gemma3": BOTH,
    "qwen3-moe": (NORMS,), "gpt-oss": (NORMS,), "cohere": (MLPS,), "gpt2": (), "gpt-neox": (), "opt": (),
}  # fmt: skip


def kept_bytes(model: LanguageModel) -> int:
    """Bytes that a forward of the model keeps for its backward, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        values = model.token_logps(model.batch(awkward_groups()))
    del values
    return sum(kept.values())


def gradients(model: LanguageModel) -> tuple[Tensor, list[Tensor]]:
    weights = [weight for weight in model.model.parameters() if weight.requires_grad]
    values = model.token_logps(model.batch(awkward_groups()))
    random = torch.randn(len(values), generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((values * random).sum(), weights, allow_unused=True, materialize_grads=True)
    return values.detach(), list(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS])
def test_values_are_equal_to_the_bit_and_gradients_to_rounding(name: str, dtype: torch.dtype) -> None:
    model = language_model(name)
    assert tuple(kind for kind in model.fused.kinds if kind != EMBEDDING) == EXPECTED[name]
    _ = model.sharing
    model.dtype = dtype
    cast_parameters(model.model, dtype)
    ours, our_gradients = gradients(model)
    with model.fused.plain():
        plain, plain_gradients = gradients(model)
    assert torch.equal(ours, plain)
    largest = max(float(gradient.abs().max()) for gradient in plain_gradients)
    for mine, theirs in zip(our_gradients, plain_gradients, strict=True):
        assert float((mine - theirs).abs().max()) <= (1e-6 if dtype == torch.float32 else 0.03) * largest


@pytest.mark.parametrize(("name", "at_most"), [("llama", 0.75), ("qwen3", 0.75), ("phi3", 0.75), ("gemma2", 0.8)])
def test_a_forward_keeps_less(name: str, at_most: float) -> None:
    model = language_model(name)
    ours = kept_bytes(model)
    with model.fused.plain():
        plain = kept_bytes(model)
    assert ours < at_most * plain


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_that_of_peft_in_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = language_model(name)
    add_lora(model, LoraConfig(r=2, alpha=6.0, targets="all-linear"), seed=0)
    model.dtype = dtype
    cast_parameters(model.model, dtype)
    assert ADAPTERS in model.fused.kinds
    with torch.no_grad():
        for weight_name, weight in model.model.named_parameters():
            if "lora_B" in weight_name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    ours, our_gradients = gradients(model)
    with model.fused.without(ADAPTERS):
        plain, plain_gradients = gradients(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in plain_gradients)
    assert largest > 0 and not torch.equal(our_gradients[0], plain_gradients[0])
    for mine, theirs in zip(our_gradients, plain_gradients, strict=True):
        assert float((mine - theirs).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.05) * largest


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_keeps_its_input_alone(name: str) -> None:
    model = language_model(name)
    before = kept_bytes(model)
    add_lora(model, LoraConfig(r=8, targets="all-linear"), seed=0)
    ours = kept_bytes(model)
    with model.fused.without(ADAPTERS):
        plain = kept_bytes(model)
    assert ours < before and ours < plain


@pytest.mark.parametrize("spoil", ["dropout", "hook", "trained base", "another adapter", "switched off"])
def test_an_adapter_of_another_kind_computes_as_peft_says(spoil: str) -> None:
    model = language_model("llama")
    add_lora(model, LoraConfig(r=2, dropout=0.5 if spoil == "dropout" else 0.0, targets=("q_proj",)), seed=0)
    layer = model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
    plain = layer(x).detach()
    if spoil == "hook":
        layer.base_layer.register_forward_hook(lambda module, given, result: 2 * result)
        assert torch.equal(layer(x), type(layer).forward(layer, x)) and not torch.equal(layer(x), plain)
    elif spoil == "trained base":
        layer.base_layer.weight.requires_grad_(True)
        layer(x).sum().backward()
        assert layer.base_layer.weight.grad is not None
    elif spoil == "another adapter":
        layer.update_layer("second", 2, 4, config=model.model.peft_config["default"])
        layer.set_adapter(["default", "second"])
        torch.nn.init.ones_(layer.lora_B["second"].weight)
        assert not torch.allclose(layer(x), plain, atol=1e-2)
    elif spoil == "switched off":
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))
    else:
        layer.train()
        torch.manual_seed(0)
        assert not torch.equal(layer(x), layer(x))


def test_gradients_in_float64() -> None:
    model = causal_model("llama")
    layer = model.model.layers[0].double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    fused = fuse(layer)
    assert torch.autograd.gradcheck(
        lambda x, w1, w2: layer.mlp(x) * w1.sum() * w2.sum(), (x, *list(layer.mlp.parameters())[:2])
    )
    plain = torch.autograd.grad(layer.mlp(x).square().sum(), [x, *layer.mlp.parameters()])
    with fused.plain():
        theirs = torch.autograd.grad(layer.mlp(x).square().sum(), [x, *layer.mlp.parameters()])
    for mine, other in zip(plain, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


class OtherNorm(nn.Module):
    """Looks like an RMS norm and subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class OtherMLP(nn.Module):
    """Has the projections of a gated MLP and clamps one of them."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=self.limit) * self.up_proj(x))
        return out


@pytest.mark.parametrize("module", [OtherNorm(), OtherMLP(0.1), OtherMLP(20.0), nn.LayerNorm(8), nn.Linear(8, 8)])
def test_a_module_that_computes_something_else_stays_as_it_is(module: Any) -> None:
    assert fuse(nn.ModuleList([module])).kinds == ()
    assert "forward" not in module.__dict__


def test_recognising_draws_no_random_numbers() -> None:
    model = causal_model("llama")
    before = torch.get_rng_state()
    assert fuse(model).kinds
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forward_that_someone_else_replaced_stays() -> None:
    model = causal_model("llama")
    norm = model.model.norm
    norm.forward = lambda x: 2 * x
    fused = fuse(model)
    assert all(module is not norm for module, _ in fused.forwards[NORMS])
    assert torch.equal(norm(torch.ones(2)), 2 * torch.ones(2))


def test_a_copy_of_a_fused_model_computes_with_its_own_weights() -> None:
    import copy

    model = causal_model("llama")
    fuse(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    ids = torch.tensor([[3, 5, 7]])
    theirs = causal_model("llama")
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(2)
    assert torch.equal(other(ids).logits, theirs(ids).logits)
