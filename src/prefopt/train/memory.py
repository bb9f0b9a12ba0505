"""What to do when memory runs out in the middle of a step."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from prefopt.core.config import FEWEST_TOKENS
from prefopt.data.pack import micro_batches
from prefopt.model.allocator import release_freed_memory


@contextmanager
def out_of_memory_noted() -> Iterator[list[bool]]:
    """Swallow the error of an allocation that failed, and note it in the list; every other error goes on its way.

    What the failed pass held is let go here, with the traceback that kept it alive.
    """
    ran_out: list[bool] = []
    try:
        yield ran_out
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ran_out.append(True)
    if ran_out:
        gc.collect()  # autograd's graph of the failed pass holds cycles
        release_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, whose allocator has no error type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def smaller_budget(lengths: Sequence[int], budget: int) -> int | None:
    """About half of `budget`, small enough that groups of these lengths are cut more finely; None where none is."""
    cuts = len(micro_batches(lengths, budget_tokens=budget))
    while budget > FEWEST_TOKENS:
        budget = max(FEWEST_TOKENS, min(budget, sum(lengths)) // 2)
        if len(micro_batches(lengths, budget_tokens=budget)) > cuts:
            return budget
    return None
