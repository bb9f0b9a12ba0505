"""Imitation of a response."""

from __future__ import annotations

from torch import Tensor


def sft(best_logp_G: Tensor) -> Tensor:
    """Negative log-prob of each best or only response, shape (G,), in nats, summed over its scored tokens.

    A step divides by the tokens of all responses that it imitates, so that every token counts the same.
    """
    return -best_logp_G
