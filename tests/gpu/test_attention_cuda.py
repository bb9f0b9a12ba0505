"""Every attention backend on a real GPU: values and gradients against attention by definition in float64.

Bounds are relative to the largest value of each tensor. bf16 has 8 bits of mantissa (rounding 0.4 %), and the kernels round
the softmax weights to it as well: 2 % in values, 3 % in gradients. In fp32 1e-4. Masks are read out exactly besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from model.attention_cases import allowed_pairs, layout_of, tensors, with_gradients
from model.tiny_models import token_group
from prefopt.model import attention, attention_segments
from prefopt.model.attention_request import request_of
from prefopt.model.batch import packed_batch, sum_per_response
from prefopt.model.engine import LanguageModel, cast_parameters
from prefopt.model.layout import Layout, use_layout

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn of what they like
]

BACKENDS = ["varlen", "flex", "segments"]
SHORT = [(5, (4, 7, 1)), (0, (3, 2)), (6, (9,)), (1, (1, 1, 1, 1)), (4, (2,))]  # an empty prompt, single tokens
LONG = [(300, (200, 150, 90)), (17, (400,)), (129, (127, 128, 1, 64)), (2, (3, 300))]  # across blocks of 128
WINDOWS = [None, 1, 7, 130]
BOUNDS = {torch.bfloat16: (2e-2, 3e-2), torch.float16: (5e-3, 1e-2), torch.float32: (1e-4, 1e-4)}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """So that no test inherits the variants of another, and none falls back to scores written out."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def by_definition(query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None, **options: Any) -> Tensor:
    mask = allowed_pairs(layout, window).to(query.device)
    output = attention_segments.explicit(query, key, value, mask, options["scaling"], options["softcap"], options["s_aux"])
    return output.transpose(1, 2)


def follow(query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None, **options: Any) -> Tensor:
    """Through the function that transformers calls."""
    with use_layout(layout):
        return attention.attention(torch.nn.Module(), query, key, value, None, sliding_window=window, **options)[0]


def skip_where_unsupported(backend: str, inputs: tuple[Tensor, ...], softcap: float | None = None) -> None:
    sink = inputs[3] if len(inputs) > 3 else None
    reason = attention.BACKENDS[backend].unsupported(request_of(*inputs[:3], softcap, sink))
    if reason is not None:
        pytest.skip(reason)


def deviations(
    backend: str,
    shapes: list[tuple[int, tuple[int, ...]]],
    window: int | None,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int],
    size: int,
    softcap: float | None = None,
    sinks: bool = False,
) -> dict[str, float]:
    """How far output and gradients are from the definition in float64, by name, as a share of what the dtype allows."""
    layout = layout_of(shapes)
    inputs = tensors(layout, heads=heads, size=size, dtype=dtype, device="cuda")
    if sinks:
        inputs = (*inputs, torch.linspace(-1, 3, heads[0], device="cuda").to(dtype).requires_grad_())
    skip_where_unsupported(backend, inputs, softcap)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    # Larger than 1 / sqrt(size): weights are far from equal, so a key too many shows.
    options: dict[str, Any] = {"scaling": 2.5 * size**-0.5, "softcap": softcap}
    wanted = with_gradients(by_definition, exact, layout, window, s_aux=exact[3] if sinks else None, **options)
    before = attention.calls.copy()
    with attention.use_backend(backend):
        found = with_gradients(follow, inputs, layout, window, s_aux=inputs[3] if sinks else None, **options)
    assert attention.calls - before == {backend: 1}
    names = ["output", "query", "key", "value", "sinks"]
    shares = {}
    for name, ours, theirs in zip(names, found, wanted, strict=False):
        assert ours.dtype == dtype and ours.shape == theirs.shape and bool(ours.isfinite().all()), name
        if theirs.any():  # in a window of one the only key has all weight, whatever its score
            worst = float((ours.double() - theirs).abs().max()) / float(theirs.abs().max())
            shares[name] = worst / BOUNDS[dtype][0 if name == "output" else 1]
    return shares


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "heads", "size"),
    [
        (torch.bfloat16, (8, 2), 64),
        (torch.bfloat16, (6, 1), 128),
        (torch.bfloat16, (4, 4), 256),
        (torch.bfloat16, (6, 3), 80),
        (torch.float16, (4, 2), 64),
        (torch.float32, (4, 2), 64),
    ],
    ids=["bf16-gqa-64", "bf16-mqa-128", "bf16-256", "bf16-80", "fp16-64", "fp32-64"],
)
def test_a_backend_is_the_definition_in_values_and_gradients(
    backend: str, dtype: torch.dtype, heads: tuple[int, int], size: int
) -> None:
    for shapes in (LONG, SHORT):
        for window in WINDOWS:
            shares = deviations(backend, shapes, window, dtype, heads=heads, size=size)
            assert max(shares.values()) < 1, (shares, window, shapes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("softcap", "sinks"), [(4.0, False), (None, True), (4.0, True)], ids=["cap", "sinks", "both"])
def test_soft_caps_and_sinks(backend: str, softcap: float | None, sinks: bool) -> None:
    for window in (None, 7):
        shares = deviations(backend, LONG, window, torch.bfloat16, heads=(4, 2), size=64, softcap=softcap, sinks=sinks)
        assert max(shares.values()) < 1, (shares, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 2, 6])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
def test_each_query_sees_exactly_its_prompt_and_itself(backend: str, window: int | None, heads: tuple[int, int]) -> None:
    """With equal scores and one-hot values, each row of the result is its row of the mask, divided by its sum."""
    layout = layout_of([(5, (4, 7, 1)), (0, (3, 2)), (6, (9,)), (3, (2, 8, 5))])
    tokens, size = layout.tokens, 64
    assert tokens <= size
    query = torch.zeros(1, heads[0], tokens, size, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, heads[1], tokens, size, device="cuda").bfloat16()
    value = torch.eye(tokens, size, device="cuda", dtype=torch.bfloat16).expand(1, heads[1], tokens, size).contiguous()
    skip_where_unsupported(backend, (query, key, value))
    with torch.no_grad(), attention.use_backend(backend):
        rows = follow(query, key, value, layout, window)[0].float()[:, :, :tokens].transpose(0, 1)
    mask = allowed_pairs(layout, window).to("cuda")
    assert bool(((rows > 0) == mask).all())
    assert torch.allclose(rows, (mask / mask.sum(1, keepdim=True)).expand_as(rows), rtol=1e-2, atol=0)


def test_the_preferred_backend_is_the_flash_kernel() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash kernels need compute capability 8.0")
    device = torch.device("cuda", torch.cuda.current_device())
    assert attention.backends_for(torch.bfloat16, device, head_size=128) == ["varlen", "flex", "segments"]
    assert attention.backends_for(torch.float32, device) == ["flex", "segments"]
    inputs = tensors(layout_of(SHORT), size=64, dtype=torch.bfloat16, device="cuda")
    before = attention.calls.copy()
    follow(*inputs, layout_of(SHORT), None)
    assert attention.calls - before == {"varlen": 1}


def test_with_deterministic_algorithms_the_flash_kernel_gives_the_same_bits() -> None:
    layout = layout_of(LONG)
    inputs = tensors(layout, heads=(8, 2), size=64, dtype=torch.bfloat16, device="cuda")
    skip_where_unsupported("varlen", inputs)
    torch.use_deterministic_algorithms(True)
    try:
        with attention.use_backend("varlen"):
            first, second = (with_gradients(follow, inputs, layout, None) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_after_the_first_layer_nothing_waits_for_the_gpu(backend: str) -> None:
    layout = layout_of(LONG)
    inputs = tensors(layout, heads=(8, 2), size=64, dtype=torch.bfloat16, device="cuda")
    skip_where_unsupported(backend, inputs)
    weights = torch.ones(1, layout.tokens, 8, 64, device="cuda", dtype=torch.bfloat16)
    with attention.use_backend(backend):
        first = torch.autograd.grad((follow(*inputs, layout, None) * weights).sum(), inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:  # whatever waits raises here
            again = torch.autograd.grad((follow(*inputs, layout, None) * weights).sum(), inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=1e-3)  # the flash kernel adds in no fixed order


def small_model(dtype: torch.dtype) -> LanguageModel:
    """Sliding windows in every other layer, grouped heads of 64; larger weights than usual, so that mistakes show."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=61,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.1,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().to("cuda")
    cast_parameters(model, dtype)
    return LanguageModel(model, None, name="small", dtype=dtype, device=torch.device("cuda"))


def model_gradients(model: LanguageModel, backend: str) -> list[Tensor]:
    """Log-probs of every scored token, then the gradients of a mix of them."""
    random = np.random.default_rng(0)
    groups = [token_group(random, prompt, responses) for prompt, responses in [(40, (60, 90, 7)), (150, (33,)), (3, (2, 80))]]
    batch = packed_batch(groups, model.device)
    signs = torch.tensor([(-1.0) ** number for number in range(batch.responses)], device=model.device)
    with attention.use_backend(backend):
        logps = model.token_logps(batch)
        loss = (sum_per_response(logps, batch) * signs).sum()
    weights = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    return [logps.detach(), *torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", ["none", "all", "selective"])
def test_a_model_trains_alike_with_every_backend(backend: str, dtype: torch.dtype, checkpointing: str) -> None:
    """As near to fp32 segments as bf16 segments are, three times over; with activation checkpointing as without."""
    if attention.BACKENDS[backend].unsupported(
        request_of(*[torch.empty(1, 4, 1, 64, device="cuda", dtype=dtype)] * 3, None, None)
    ):
        pytest.skip(f"{backend} cannot serve {dtype}")
    exact = model_gradients(small_model(torch.float32), "segments")
    plain = model_gradients(small_model(dtype), "segments")
    model = small_model(dtype)
    model.model.train()
    if checkpointing != "none":
        model.enable_activation_checkpointing(selective=checkpointing == "selective")
    before = attention.calls.copy()
    found = model_gradients(model, backend)
    assert set(attention.calls - before) == {backend}

    def distances(values: list[Tensor]) -> tuple[float, float]:
        apart = [float((a.float() - b.float()).abs().max()) for a, b in zip(values, exact, strict=True)]
        return apart[0], max(apart[1:]) / max(float(gradient.abs().max()) for gradient in exact[1:])

    rounding = {torch.bfloat16: (0.05, 0.01), torch.float32: (1e-3, 1e-3)}[dtype]
    for ours, theirs, least in zip(distances(found), distances(plain), rounding, strict=True):
        assert ours < 3 * theirs + least, f"{ours:.3g} against {theirs:.3g}"
