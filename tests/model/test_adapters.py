"""LoRA computes what peft computes, starts as its base, can be switched off, and goes where it has an effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch

from model.tiny_models import CONFIGS, UNSHARED, awkward_groups, causal_model, language_model, plain_logps
from prefopt.core.config import LoraConfig
from prefopt.core.errors import ConfigError, ModelError, PrefoptError
from prefopt.model import adapters
from prefopt.model.adapters import (
    adapters_off,
    add_lora,
    default_targets,
    lora_identity,
    lora_options,
    merged_state,
    seed_dropout,
    target_layers,
)
from prefopt.model.batch import packed_batch, padded_batch
from prefopt.model.engine import LanguageModel, weights_identity

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def adapted(name: str = "llama", *, trained: bool = True, **options: Any) -> LanguageModel:
    """A tiny model with an adapter; `trained` stands for training: B of a size that moves log-probs by nats."""
    model = language_model(name)
    add_lora(model, LoraConfig(**{"r": 3, "alpha": 5, **options}))
    if trained:
        random = torch.Generator().manual_seed(7)
        for parameter_name, parameter in model.model.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return model


def weights_that_train(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.model.named_parameters() if value.requires_grad}


def flat(model: LanguageModel) -> np.ndarray[Any, Any]:
    return np.concatenate([values for group in model.score(awkward_groups()) for values in group])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_changes_no_bit_and_only_it_trains(name: str) -> None:
    model = adapted(name, trained=False)
    assert np.array_equal(flat(model), flat(language_model(name)))
    assert model.sharing
    trained = weights_that_train(model)
    assert trained and all(".lora_A." in key or ".lora_B." in key for key in trained)
    assert model.identity == weights_identity(causal_model(name)), "an adapter does not rename its base"


@pytest.mark.parametrize("name", CONFIGS)
def test_switched_off_it_is_the_base_to_the_bit(name: str) -> None:
    model, base = adapted(name), flat(language_model(name))
    on = flat(model)
    assert np.abs(on - base).max() > 0.1
    with adapters_off(model):
        assert np.array_equal(flat(model), base)
        with adapters_off(model):
            assert np.array_equal(flat(model), base)
        assert np.array_equal(flat(model), base)
    assert np.array_equal(flat(model), on)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert np.array_equal(flat(model), on)


def test_switching_off_between_forward_and_backward_leaves_the_gradient() -> None:
    model = adapted()
    batch = packed_batch(awkward_groups(), CPU)
    weights = list(weights_that_train(model).values())
    wanted = torch.autograd.grad(model.token_logps(batch).sum(), weights)
    total = model.token_logps(batch).sum()
    with adapters_off(model):
        model.score(awkward_groups())
    assert all(weight.requires_grad for weight in weights)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(total, weights), wanted, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_those_of_peft_in_plain_transformers(name: str) -> None:
    model, groups = adapted(name), awkward_groups()[:4]
    settings = model.model.peft_config["default"]
    theirs = peft.get_peft_model(causal_model(name), peft.LoraConfig(**{**settings.to_dict(), "revision": None}))
    ours = weights_that_train(model)
    own = {key.removeprefix("base_model.model."): value for key, value in theirs.named_parameters() if value.requires_grad}
    assert own.keys() == ours.keys()
    for key, value in own.items():
        value.data = ours[key].detach().clone()
    batch = packed_batch(groups, CPU)
    logps = model.token_logps(batch)
    plain = plain_logps(theirs, groups)
    assert (torch.cat(plain) - logps).abs().max() < 1e-4
    signs = (-1.0) ** batch.response_N
    (logps * signs).sum().backward()
    sum((-1.0) ** number * values.sum() for number, values in enumerate(plain)).backward()
    largest = max(float(value.grad.abs().max()) for value in own.values())
    assert largest > 0.1
    for key, value in own.items():
        assert ours[key].grad is not None
        assert (ours[key].grad - value.grad).abs().max() < 1e-4 * largest, key
    assert all(value.grad is None for value in model.model.parameters() if not value.requires_grad)


def test_packed_and_padded_rows_agree_with_a_trained_adapter() -> None:
    model, groups = adapted(), awkward_groups()
    with torch.no_grad():
        packed, padded = (model.token_logps(make(groups, CPU)) for make in (packed_batch, padded_batch))
    assert (packed - padded).abs().max() < 1e-4
    assert model.sharing_deviation(groups) < 1e-4  # type: ignore[operator]


def test_activation_checkpointing_leaves_the_gradients() -> None:
    """The frozen embedding gives the first layer an input without a gradient, which must not end the recomputation."""
    gradients = []
    for recompute in (False, True):
        model = adapted()
        model.model.train()
        if recompute:
            model.enable_activation_checkpointing()
        total = model.token_logps(packed_batch(awkward_groups(), CPU)).sum()
        gradients.append(torch.autograd.grad(total, list(weights_that_train(model).values())))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_compute_what_base_and_adapter_do(name: str) -> None:
    model = adapted(name)
    state = merged_state(model, weights_that_train(model))
    plain = causal_model(name, attention=None)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    merged = LanguageModel(plain, None, name=name, dtype=torch.float32, device=CPU)
    assert np.abs(flat(merged) - flat(model)).max() < 2e-4
    groups = awkward_groups()[:2]
    with torch.no_grad():
        row = torch.tensor([[*groups[0].prompt_ids, *groups[0].response_ids[0]]], dtype=torch.long)
        torch.testing.assert_close(
            plain(input_ids=row, use_cache=False).logits,
            model.model(input_ids=row, use_cache=False).logits,
            atol=1e-4,
            rtol=1e-5,
        )


def test_merged_weights_hold_the_scaled_product_and_share_what_was_shared() -> None:
    model = adapted("cohere", targets=["q_proj"])
    masters = weights_that_train(model)
    state = merged_state(model, masters)
    base = causal_model("cohere").state_dict()
    layer = "model.layers.1.self_attn.q_proj"
    product = masters[f"{layer}.lora_B.default.weight"] @ masters[f"{layer}.lora_A.default.weight"]
    assert torch.equal(state[f"{layer}.weight"], base[f"{layer}.weight"] + product * (5 / 3))
    changed = [name for name, value in state.items() if not torch.equal(value, base[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight", f"{layer}.weight"]
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_in_bf16_merged_weights_keep_the_digits_of_the_base() -> None:
    """The compute copy of the base is rounded; what is saved adds the adapter to what was loaded."""
    base = causal_model("cohere").state_dict()
    for held_by_bf16 in (False, True):
        source = causal_model("cohere", attention=None)
        if held_by_bf16:
            source = source.to(torch.bfloat16).float()
            base = {name: value.clone() for name, value in source.state_dict().items()}
        model = LanguageModel(source, None, name="cohere", dtype=torch.bfloat16, device=CPU)
        add_lora(model, LoraConfig(r=2, save="merged"))
        assert adapters.adapter_of(model).unrounded.keys() == (set() if held_by_bf16 else base.keys())
        masters = {name: value.detach().clone() for name, value in weights_that_train(model).items()}
        model.model.to(torch.bfloat16)
        state = merged_state(model, masters)
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert all(torch.equal(state[name], value) for name, value in base.items())
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_the_first_weights_are_a_function_of_the_seed() -> None:
    def first(seed: int) -> dict[str, torch.Tensor]:
        model = language_model()
        add_lora(model, LoraConfig(r=3), seed=seed)
        return {name: value.detach() for name, value in weights_that_train(model).items()}

    one = first(0)
    torch.rand(5)
    again, other = first(0), first(1)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    for name, value in one.items():
        assert torch.equal(value, other[name]) == (".lora_B." in name)
        bound = value.shape[1] ** -0.5  # uniform in +-1/sqrt(in), as peft draws it
        assert (not value.any()) if ".lora_B." in name else 0.8 * bound < value.abs().max() <= bound


def test_identity_names_what_makes_two_adapters_the_same() -> None:
    one = lora_identity(adapted())
    assert one == lora_identity(adapted(trained=False)) == lora_identity(adapted(save="merged"))
    assert one["targets"] == sorted(one["targets"])
    assert len(one["targets"]) == 14
    for option, value in {"r": 4, "alpha": 6, "dropout": 0.1, "targets": ["q_proj"]}.items():
        other = lora_identity(adapted(**{option: value}))
        assert [key for key in one if one[key] != other[key]] == [option]
    elsewhere = language_model(seed=1)
    add_lora(elsewhere, LoraConfig(r=3, alpha=5))
    assert [key for key in one if one[key] != lora_identity(elsewhere)[key]] == ["base"]
    assert lora_identity(adapted(targets=list(one["targets"])))["targets"] == one["targets"]


def test_dropout_of_the_adapter_survives_when_the_models_own_is_switched_off() -> None:
    model = adapted("gpt2", dropout=0.25)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0:
            module.p = 0.1
    model.disable_dropout()
    rates = {name: module.p for name, module in model.model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {p for name, p in rates.items() if ".lora_dropout." in name} == {0.25}
    assert {p for name, p in rates.items() if ".lora_dropout." not in name} == {0.0}


def test_dropout_is_a_function_of_seed_and_step() -> None:
    model = adapted(dropout=0.5)
    model.model.train()
    batch = packed_batch(awkward_groups(), CPU)

    def at(*place: int) -> torch.Tensor:
        seed_dropout(*place)
        with torch.no_grad():
            return model.token_logps(batch)

    first = at(0, 3)
    assert torch.equal(at(0, 3), first)
    assert not torch.equal(at(0, 4), first)
    assert not torch.equal(at(1, 3), first)
    assert not torch.equal(at(0, 3, 1), first)
    assert torch.equal(at(0, 3, 1), at(0, 3, 1))
    assert np.array_equal(flat(model), flat(model)), "scoring is without dropout"
    with adapters_off(model), torch.no_grad():
        assert torch.equal(model.token_logps(batch), language_model().token_logps(batch)), "the reference is without dropout"


@pytest.mark.parametrize(
    ("targets", "what", "todo"),
    [
        (["q_prj"], 'no module of llama is called "q_prj"', 'did you mean "q_proj"?'),
        (["q_proj", "proj"], 'no module of llama is called "proj"', f"Linear layers of this model: {LINEAR}."),
        (["lm_head"], '"lm_head" is the output head or the embedding; log-probs are computed', "Leave it out"),
        (["embed_tokens"], "would be ignored", LINEAR),
        (["q_proj", "mlp"], '"mlp" reaches model.layers.0.mlp, a LlamaMLP', LINEAR),
        (["layers.1.input_layernorm"], "a LlamaRMSNorm, and not a linear layer", LINEAR),
        (["model"], "reaches model, a LlamaModel", LINEAR),
    ],
)
def test_targets_without_an_effect_are_refused(targets: list[str], what: str, todo: str) -> None:
    model = language_model()
    with pytest.raises(ConfigError) as raised:
        add_lora(model, LoraConfig(targets=targets))
    assert what in raised.value.what
    assert todo in raised.value.todo
    assert model.adapter is None and all(parameter.requires_grad for parameter in model.model.parameters())


def test_targets_are_names_or_their_ends() -> None:
    model = language_model()
    assert target_layers(model, ("self_attn.q_proj",)) == tuple(f"model.layers.{at}.self_attn.q_proj" for at in (0, 1))
    one = ("model.layers.1.mlp.up_proj",)
    assert target_layers(model, one) == target_layers(model, ("1.mlp.up_proj", *one)) == one
    for name in CONFIGS:
        reached = target_layers(language_model(name), "all-linear")
        assert reached and not any("lm_head" in layer or "embed" in layer for layer in reached)


def test_what_peft_cannot_adapt_is_refused() -> None:
    assert "mamba" in UNSHARED
    with pytest.raises(ConfigError, match="peft cannot adapt mamba"):
        add_lora(language_model("mamba"), LoraConfig())


def test_there_is_one_adapter_at_most_and_none_is_not_one() -> None:
    with pytest.raises(ModelError, match="carries an adapter already"):
        add_lora(adapted(), LoraConfig())
    plain = language_model()
    for use in (lora_identity, lambda model: merged_state(model, {}), lambda model: adapters_off(model).__enter__()):
        with pytest.raises(ModelError, match="has no LoRA adapter"):
            use(plain)


def test_a_peft_config_means_what_it_means_there() -> None:
    given = peft.LoraConfig(r=4, lora_alpha=9, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    assert lora_options(given) == {"r": 4, "alpha": 9, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
    assert lora_options(peft.LoraConfig(target_modules="all-linear"))["targets"] == "all-linear"
    assert lora_options(peft.LoraConfig()) == {"r": 8, "alpha": 8, "dropout": 0.0, "targets": None}
    model = causal_model("llama")
    peft.get_peft_model(model, peft.LoraConfig())
    theirs = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "base_layer")}
    assert set(default_targets("llama")) == theirs
    with pytest.raises(ConfigError, match="no default for the architecture"):
        default_targets("no-such-model")


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"init_lora_weights": "gaussian"},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["v_proj"]},
        {"lora_bias": True},
        {"target_parameters": ["experts"]},
        {"task_type": "SEQ_CLS"},
        {"inference_mode": True},
        {"target_modules": ".*q_proj"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_peft_that_would_be_ignored_are_refused(options: dict[str, Any]) -> None:
    given = peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
    with pytest.raises(ConfigError, match=f"peft_config.{next(iter(options))} is") as raised:
        lora_options(given)
    assert raised.value.todo


def test_another_kind_of_peft_config_is_refused() -> None:
    given: Any
    for given in (peft.IA3Config(), peft.AdaLoraConfig(total_step=3), {"r": 3}):
        with pytest.raises(PrefoptError, match=r"Give a peft\.LoraConfig"):
            lora_options(given)
