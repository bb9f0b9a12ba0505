"""Which results of a layer are kept where the rest is computed again in backward (train.activation_checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from prefopt.model.layout import active_layout, use_layout
from prefopt.model.low_rank import results_kept

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
# Products of two matrices. Batched ones are those of attention written out, whose T x T results are larger than all else.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::_grouped_mm")


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name: str = operation._schema.name if hasattr(operation, "_schema") else operation.name()
    dear = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _all(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def recompute_contexts(*, selective: bool) -> Callable[[], Contexts]:
    """`context_fn` of torch's checkpoint: what surrounds a layer's forward and its recomputation.

    The recomputation sees the layout of its own forward. With `selective` the results of matrix products and of attention
    are kept, and what lies between them, elementwise and cheap, is computed again.
    """

    def contexts() -> Contexts:
        layout = use_layout(active_layout())
        if not selective:
            return nullcontext(), layout
        forward, again = create_selective_checkpoint_contexts(_policy)
        return _all(forward, results_kept()), _all(again, results_kept(), layout)

    return contexts
