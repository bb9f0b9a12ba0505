"""Every attention backend computes what the per-segment one does; which one is taken follows device, call and wish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from model.attention_cases import (
    SHAPES,
    WINDOWS,
    allowed_pairs,
    flash_attn_2,
    furthest,
    layout_of,
    tensors,
    torch_2_11,
    torch_2_13,
    with_gradients,
)
from prefopt.model import attention_direct, attention_flex, attention_segments, attention_varlen
from prefopt.model import layout as layout_module
from prefopt.model.layout import GroupSpan

CPU = torch.device("cpu")
EXACT = 1e-12  # float64
HEADS = st.sampled_from([(4, 2), (3, 3), (4, 1)])
EVERY_LENGTH = [(5, (4, 7, 1)), (0, (3, 2)), (6, (9,)), (1, (1, 1, 1, 1))]

Shapes = list[tuple[int, tuple[int, ...]]]


@pytest.fixture(autouse=True, scope="module")
def a_segment_for_each_response() -> Iterator[None]:
    """Also of the short groups here, which would be computed as masked squares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "_CALL_COST", {"cpu": 0})
        yield


@pytest.fixture(params=[torch_2_11, torch_2_13, flash_attn_2], ids=lambda function: function.__name__)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A variable-length kernel by definition in place of the real one, with the signature of each that is known."""
    package = request.param is flash_attn_2
    monkeypatch.setattr(attention_varlen, "_torch_function", lambda: None if package else request.param)
    monkeypatch.setattr(attention_varlen, "_package_function", lambda: request.param if package else None)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own eager FlexAttention, whose gradients are right on the CPU although it refuses them there."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


@given(SHAPES, st.sampled_from(WINDOWS), HEADS, st.sampled_from([None, 0.7]))
@settings(max_examples=25, deadline=None)
def check_varlen(shapes: Shapes, window: int | None, heads: tuple[int, int], scaling: float | None) -> None:
    layout = layout_of(shapes)
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": None, "s_aux": None}
    wanted = with_gradients(attention_segments.attend, tensors(layout, heads=heads), layout, **options)
    found = with_gradients(attention_varlen.attend, tensors(layout, heads=heads), layout, **options)
    assert furthest(found, wanted) < EXACT


def test_varlen_is_the_segments_in_values_and_gradients(kernel: Callable[..., Any]) -> None:
    check_varlen()


def test_the_package_caps_scores(kernel: Callable[..., Any]) -> None:
    layout = layout_of(EVERY_LENGTH)
    options: dict[str, Any] = {"scaling": 0.9, "window": 4, "softcap": 1.5, "s_aux": None}
    if kernel is not flash_attn_2:
        with pytest.raises(AssertionError):
            attention_varlen.attend(*tensors(layout), layout, **options)
        return
    wanted = with_gradients(attention_segments.attend, tensors(layout), layout, **options)
    assert furthest(with_gradients(attention_varlen.attend, tensors(layout), layout, **options), wanted) < EXACT


@given(SHAPES, st.sampled_from(WINDOWS), HEADS, st.sampled_from([None, 0.7]), st.booleans(), st.sampled_from([1, 64]))
@settings(max_examples=60, deadline=None)
def test_the_kernel_called_directly_is_the_segments_in_values_and_gradients(
    shapes: Shapes, window: int | None, heads: tuple[int, int], scaling: float | None, knows_shared_keys: bool, threads: int
) -> None:
    """Also with a kernel of an older torch, which wants every key for every query head, and with more threads than key heads."""
    layout = layout_of(shapes)
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": None, "s_aux": None}
    wanted = with_gradients(attention_segments.attend, tensors(layout, heads=heads), layout, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_direct, "_KNOWS_SHARED_KEYS", knows_shared_keys and attention_direct._KNOWS_SHARED_KEYS)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        found = with_gradients(attention_direct.attend, tensors(layout, heads=heads), layout, **options)
    assert furthest(found, wanted) < EXACT


@pytest.mark.parametrize("fp32_backward", [0, 768])
def test_the_kernel_called_directly_is_as_close_in_bf16_as_the_segments(
    fp32_backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the same inputs; in fp32 its backward is the closer one."""
    monkeypatch.setattr(attention_direct, "_FP32_BACKWARD", fp32_backward)
    layout = layout_of([(40, (30, 25)), (0, (50,)), (3, (60, 1, 9))])
    options: dict[str, Any] = {"scaling": None, "window": None, "softcap": None, "s_aux": None}
    rounded = tensors(layout, heads=(6, 2), dtype=torch.bfloat16)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in rounded)
    wanted = with_gradients(attention_segments.attend, exact, layout, **options)
    ours, theirs = (
        [
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(with_gradients(attend, rounded, layout, **options), wanted, strict=True)
        ]
        for attend in (attention_direct.attend, attention_segments.attend)
    )
    assert all(mine <= (1.0 if fp32_backward else 1.1) * other for mine, other in zip(ours, theirs, strict=True)), (
        ours,
        theirs,
    )
    assert max(ours) < 0.01


def test_a_forward_without_gradients_and_one_with_are_the_same_to_the_bit() -> None:
    layout = layout_of(EVERY_LENGTH)
    query, key, value = tensors(layout, dtype=torch.bfloat16)
    options: dict[str, Any] = {"scaling": None, "window": 4, "softcap": None, "s_aux": None}
    learnt = attention_direct.attend(query, key, value, layout, **options)
    with torch.no_grad():
        assert torch.equal(attention_direct.attend(query, key, value, layout, **options), learnt)
    assert torch.equal(attention_segments.attend(query, key, value, layout, **options), learnt)


def test_the_kernel_called_directly_reads_tensors_of_any_strides() -> None:
    layout = layout_of(EVERY_LENGTH)
    options: dict[str, Any] = {"scaling": None, "window": None, "softcap": None, "s_aux": None}
    apart = [tensor.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for tensor in tensors(layout)]
    found, wanted = (
        torch.autograd.grad(attend(*apart, layout, **options).sum(), apart)  # the gradient of a sum has no strides at all
        for attend in (attention_direct.attend, attention_segments.attend)
    )
    assert furthest(list(found), list(wanted)) < EXACT


@given(
    SHAPES,
    st.sampled_from(WINDOWS),
    HEADS,
    st.sampled_from([None, 1.5]),
    st.booleans(),
    st.sampled_from([attention_flex.BLOCK, 4]),
)
@settings(max_examples=20, deadline=None)
def check_flex(
    shapes: Shapes, window: int | None, heads: tuple[int, int], softcap: float | None, sinks: bool, block: int
) -> None:
    layout = layout_of(shapes)
    sink = torch.linspace(-1, 2, heads[0], dtype=torch.float64).requires_grad_() if sinks else None
    options: dict[str, Any] = {"scaling": 0.8, "window": window, "softcap": softcap, "s_aux": sink}
    inputs = (*tensors(layout, heads=heads), *([sink] if sink is not None else []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "BLOCK", block)
        found = with_gradients(attention_flex.attend, inputs, layout, **options)
    assert furthest(found, with_gradients(attention_segments.attend, inputs, layout, **options)) < EXACT


def test_flex_is_the_segments_in_values_and_gradients(flex_on_cpu: None) -> None:
    check_flex()


@given(SHAPES, st.sampled_from(WINDOWS), st.sampled_from([1, 4, 7, 128]))
@settings(max_examples=25, deadline=None)
def test_block_masks_list_exactly_the_blocks_with_pairs(shapes: Shapes, window: int | None, block: int) -> None:
    """A full block has every pair, a mixed one some, and an unlisted one none; the mask itself is the definition."""
    layout = layout_of(shapes)
    wanted = allowed_pairs(layout, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "BLOCK", block)
        mask = attention_flex.block_mask(layout.spans, window, CPU)
    assert torch.equal(torch_flex.create_mask(mask.mask_mod, 1, 1, layout.tokens, layout.tokens, "cpu")[0, 0], wanted)
    reference = torch_flex.create_block_mask(mask.mask_mod, 1, 1, layout.tokens, layout.tokens, "cpu", BLOCK_SIZE=block)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_indices"):
        ours, theirs = getattr(mask, name), getattr(reference, name)
        assert ours.dtype == theirs.dtype == torch.int32 and torch.equal(ours, theirs), name
    assert mask.shape == reference.shape and mask.BLOCK_SIZE == reference.BLOCK_SIZE


@given(SHAPES, st.sampled_from(WINDOWS))
@settings(max_examples=40, deadline=None)
def test_a_plan_gathers_each_prompt_for_each_further_response_and_no_more(shapes: Shapes, window: int | None) -> None:
    layout = layout_of(shapes)
    plan = attention_varlen.plan_of(layout.spans, window, CPU)
    reach = [prompt if window is None else min(prompt, window - 1) for prompt, _ in shapes]
    copied = sum(kept * (len(responses) - 1) for kept, (_, responses) in zip(reach, shapes, strict=True))
    assert int(plan.queries[-1]) == layout.tokens and int(plan.keys[-1]) == layout.tokens + copied
    assert (plan.gather is None) == (copied == 0)
    if plan.gather is None:
        assert torch.equal(plan.queries, plan.keys)
        return
    gather = plan.gather
    assert torch.equal(gather.source_U[gather.own_T], torch.arange(layout.tokens))
    assert sum(len(packed) for packed, _ in gather.copies) == copied
    for packed, gathered in gather.copies:
        assert torch.equal(gather.source_U[gathered], packed)
        assert len(packed.unique()) == len(packed)


def test_one_response_a_group_copies_no_key(kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "_gathered", lambda *args: pytest.fail("keys were gathered"))
    layout = layout_of([(3, (4,)), (1, (2,)), (7, (1,))])
    query, key, value = tensors(layout)
    options: dict[str, Any] = {"scaling": None, "window": None, "softcap": None, "s_aux": None}
    wanted = attention_segments.attend(query, key, value, layout, **options)
    assert torch.allclose(attention_varlen.attend(query, key, value, layout, **options), wanted, atol=EXACT)


def test_gradients_of_copied_prompts_are_added_in_fp32_and_rounded_once() -> None:
    plan = attention_varlen.plan_of([GroupSpan(0, 5, (2, 3, 1, 4))], None, CPU)
    assert plan.gather is not None
    rows = torch.randn(15, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    gathered = attention_varlen._gathered(rows, plan.gather)
    incoming = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (found,) = torch.autograd.grad(gathered, rows, incoming)
    exact = torch.zeros(15, 2, 4, dtype=torch.float64).index_add_(0, plan.gather.source_U, incoming.double())
    assert torch.equal(found, exact.float().bfloat16())


def test_a_layout_of_another_batch_is_refused(kernel: Callable[..., Any]) -> None:
    """A flash kernel would leave what lies behind the last sequence unset, and its gradient NaN."""
    layout = layout_of([(3, (4, 2))])
    query, key, value = tensors(layout_of([(3, (4, 3))]))
    with pytest.raises(AssertionError, match="another batch"):
        attention_varlen.attend(query, key, value, layout, scaling=None, window=None, softcap=None, s_aux=None)


def test_what_depends_on_the_layout_alone_is_made_once_for_all_layers(
    kernel: Callable[..., Any], flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int | None] = []
    for module, name in ((attention_varlen, "plan_of"), (attention_flex, "block_mask")):
        function = getattr(module, name)

        def counted(spans: Any, window: int | None, device: torch.device, function: Any = function) -> Any:
            made.append(window)
            return function(spans, window, device)

        monkeypatch.setattr(module, name, counted)
    layout = layout_of(EVERY_LENGTH)
    for backend in (attention_varlen, attention_flex):
        for _ in range(3):
            for window in (None, 3):
                backend.attend(*tensors(layout), layout, scaling=None, window=window, softcap=None, s_aux=None)
    assert made == [None, 3, None, 3]
