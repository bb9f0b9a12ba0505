"""Which attention backend is taken: the first of the device's that can serve, or the one that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from model.attention_cases import flash_attn_2, torch_2_13
from model.tiny_models import awkward_groups, language_model
from prefopt.core.errors import ConfigError, ModelError
from prefopt.model import attention, attention_flex, attention_varlen, layout
from prefopt.model.attention_request import Request
from prefopt.model.batch import packed_batch, sum_per_response

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 with torch's own kernels and without the package flash-attn, as far as the choice can see."""
    monkeypatch.setattr(attention_varlen, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_varlen, "_torch_function", lambda: torch_2_13)
    monkeypatch.setattr(attention_varlen, "_package_function", lambda: None)
    monkeypatch.setattr(attention_flex, "_has_triton", lambda: True)
    return monkeypatch


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both fused backends on the CPU: a flash kernel by definition and torch's eager FlexAttention."""
    monkeypatch.setattr(attention_varlen, "_torch_function", lambda: torch_2_13)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    for name in ("varlen", "flex"):
        able = attention.BACKENDS[name]._replace(unsupported=lambda request: None)
        monkeypatch.setitem(attention.BACKENDS, name, able)


def test_the_cpu_takes_its_own_kernel_even_where_others_could(willing: None) -> None:
    assert attention.backends_for(FP32, CPU) == attention.backends_for(BF16, CPU) == ["direct", "segments"]
    assert attention.backends_for(FP32, CPU, softcap=True) == attention.backends_for(BF16, CPU, sinks=True) == ["segments"]
    assert attention.backends_for(FP32, torch.device("mps")) == ["segments"]
    model = language_model()
    before = attention.calls.copy()
    with torch.no_grad():
        model.token_logps(packed_batch(awkward_groups(), CPU))
    assert attention.calls - before == {"direct": 2}


@pytest.mark.parametrize(
    ("dtype", "facts", "wanted"),
    [
        (BF16, {}, ["varlen", "flex", "segments"]),
        (BF16, {"head_size": 128, "value_size": 128}, ["varlen", "flex", "segments"]),
        (torch.float16, {}, ["varlen", "flex", "segments"]),
        (FP32, {}, ["flex", "segments"]),
        (torch.float64, {}, ["segments"]),
        (BF16, {"sinks": True}, ["flex", "segments"]),
        (BF16, {"softcap": True}, ["flex", "segments"]),
        (BF16, {"head_size": 192, "value_size": 128}, ["flex", "segments"]),
        (BF16, {"head_size": 20}, ["flex", "segments"]),
        (BF16, {"head_size": 512}, ["flex", "segments"]),
        (BF16, {"head_size": 8}, ["varlen", "segments"]),
    ],
)
def test_cuda_takes_the_first_that_can_serve(
    hopper: pytest.MonkeyPatch, dtype: torch.dtype, facts: dict[str, Any], wanted: list[str]
) -> None:
    assert attention.backends_for(dtype, CUDA, **facts) == wanted
    sized = Request(CUDA, dtype, **{"head_size": 64, **facts}, gradient=True)
    assert attention._chosen(sized) == wanted[0]


def test_the_package_flash_attn_serves_soft_caps_and_a_torch_without_a_kernel(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(attention_varlen, "_package_function", lambda: flash_attn_2)
    assert attention.backends_for(BF16, CUDA, softcap=True)[0] == "varlen"
    hopper.setattr(attention_varlen, "_torch_function", lambda: None)
    assert attention.backends_for(BF16, CUDA)[0] == "varlen"
    hopper.setattr(attention_varlen, "_package_function", lambda: None)
    assert attention.backends_for(BF16, CUDA) == ["flex", "segments"]


def test_an_old_gpu_and_a_missing_triton_leave_the_segments(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(attention_varlen, "_capability", lambda device: (7, 5))
    hopper.setattr(attention_flex, "_has_triton", lambda: False)
    assert attention.backends_for(torch.float16, CUDA) == ["segments"]


@pytest.mark.parametrize(
    ("backend", "request_", "reason"),
    [
        ("varlen", Request(CPU, BF16), "not on cpu"),
        ("varlen", Request(CUDA, FP32), "not in float32"),
        ("varlen", Request(CUDA, BF16, sinks=True), "log-sum-exp"),
        ("varlen", Request(CUDA, BF16, softcap=True), "flash-attn"),
        ("varlen", Request(CUDA, BF16, 192, 128), "128 and 192"),
        ("varlen", Request(CUDA, BF16, 68, 68), "not 68"),
        ("varlen", Request(CUDA, BF16, 264, 264), "not 264"),
        ("direct", Request(CUDA, FP32), "not for cuda"),
        ("direct", Request(CPU, FP32, softcap=True), "soft caps"),
        ("direct", Request(CPU, torch.int8), "int8"),
        ("direct", Request(CPU, FP32, 192, 128), "128 and 192"),
        ("flex", Request(CPU, FP32, gradient=True), "no backward pass on the CPU"),
        ("flex", Request(torch.device("mps"), FP32), "mps"),
        ("flex", Request(CUDA, torch.float64), "not in float64"),
        ("flex", Request(CUDA, BF16, 8, 8), "at least 16, not 8"),
    ],
)
def test_a_backend_says_why_it_cannot_serve(hopper: pytest.MonkeyPatch, backend: str, request_: Request, reason: str) -> None:
    said = attention.BACKENDS[backend].unsupported(request_)
    assert said is not None and reason in said
    with attention.use_backend(backend), pytest.raises(ModelError, match="cannot serve") as error:
        attention._chosen(request_)
    assert reason in error.value.what


def test_every_backend_that_is_asked_for_gives_the_log_probs_of_the_segments(willing: None) -> None:
    """Whole models, one with windows in some layers and one with soft caps and windows."""
    for name, backends in (
        ("llama", ("direct", "varlen", "flex")),
        ("gemma3", ("direct", "varlen", "flex")),
        ("gemma2", ("flex",)),
    ):
        model = language_model(name)
        batch = packed_batch(awkward_groups(), CPU)
        with torch.no_grad():
            plain = model.token_logps(batch)
            for backend in backends:
                before = attention.calls.copy()
                with attention.use_backend(backend):
                    found = model.token_logps(batch)
                assert attention.calls - before == {backend: 2}
                assert (found - plain).abs().max() < 1e-4, (name, backend)


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_a_layer_computed_again_in_backward_takes_the_backend_of_its_forward(willing: None, backend: str) -> None:
    model = language_model("mistral")
    model.model.train()
    model.enable_activation_checkpointing()
    batch = packed_batch(awkward_groups(), CPU)

    def gradients(name: str) -> list[torch.Tensor]:
        model.model.zero_grad()
        with attention.use_backend(name):
            loss = sum_per_response(model.token_logps(batch), batch)[0::2].sum()
        before = attention.calls.copy()
        loss.backward()
        assert attention.calls - before == {name: 2}
        return [parameter.grad.clone() for parameter in model.model.parameters() if parameter.grad is not None]

    plain, found = gradients("segments"), gradients(backend)
    largest = max(float(gradient.abs().max()) for gradient in plain)
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(found, plain, strict=True))


def test_the_wish_ends_with_its_block_and_leaves_the_layout_alone() -> None:
    batch = packed_batch(awkward_groups(), CPU)
    with layout.use_layout(batch.layout), attention.use_backend("flex"):
        with attention.use_backend(None):
            assert layout.wanted_backend() is None and layout.active_layout() is batch.layout
        assert layout.wanted_backend() == "flex" and layout.active_layout() is batch.layout
        later = layout.use_layout(batch.layout)
    assert layout.wanted_backend() is None and layout.active_layout() is None
    with later:
        assert layout.wanted_backend() == "flex"
    assert layout.wanted_backend() is None


def test_unknown_backends_are_named_with_the_nearest_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='did you mean "varlen"') as error, attention.use_backend("varlenn"):
        pass
    assert "flex" in error.value.todo and "segments" in error.value.todo
    monkeypatch.setenv(attention.VARIABLE, "segment")
    with pytest.raises(ConfigError, match='PREFOPT_ATTENTION: "segment" is not') as error:
        language_model().token_logps(packed_batch(awkward_groups(), CPU))
    assert 'did you mean "segments"' in error.value.todo


def test_the_environment_variable_names_the_backend_and_use_backend_goes_before_it(
    willing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Request(CPU, FP32, 64, 64)
    monkeypatch.setenv(attention.VARIABLE, "varlen")
    assert attention._chosen(plain) == "varlen"
    with attention.use_backend("flex"):
        assert attention._chosen(plain) == "flex"
    monkeypatch.setenv(attention.VARIABLE, "")
    assert attention._chosen(plain) == "direct"


def test_a_variable_that_names_what_cannot_serve_is_an_error_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attention.VARIABLE, "varlen")
    with pytest.raises(ModelError, match="run on CUDA, not on cpu"):
        assert language_model().sharing


def test_a_kernel_that_is_missing_or_lacks_the_option_is_not_found() -> None:
    find: Callable[..., Any] = attention_varlen._function_with
    assert find("torch.nn.attention.varlen", "varlen_attn", "window_size") is not None
    assert find("torch.nn.attention.varlen", "varlen_attn", "no_such_option") is None
    assert find("torch.nn.attention.varlen", "no_such_function", "window_size") is None
    assert find("no_such_package_at_all", "function", "option") is None
