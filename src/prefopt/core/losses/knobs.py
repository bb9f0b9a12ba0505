"""Options that many losses share."""

from __future__ import annotations

from prefopt.core.losses.facts import Knob


def beta(default: float, about: str) -> dict[str, Knob]:
    """The option `beta`, with the reason for its default in `about`."""
    return {"beta": Knob(default, about, low=0.0, low_open=True)}


PRICE_OF_KL = beta(0.1, "price of KL, in reward per nat; the paper uses 0.1 to 0.5")

LABEL_SMOOTHING = {
    "label_smoothing": Knob(0.0, "share e of labels believed to be flipped", low=0.0, high=0.5),
}

LD = {
    "ld_alpha": Knob(
        1.0,
        "weight of the tokens of a response beyond the length of the pair's shorter one: 1 counts all, 0 none"
        " (LD-DPO, arXiv 2409.06411)",
        low=0.0,
        high=1.0,
    ),
}

WPO = {
    "wpo": Knob(
        False,
        "weigh each pair by how likely the policy is to write its responses itself (WPO, arXiv 2406.11827 eq. 2)",
    ),
}

DIVERGENCE = {
    "divergence": Knob(
        "reverse_kl",
        "which f-divergence to the reference is paid for (arXiv 2309.16240)",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
    ),
    "divergence_alpha": Knob(
        0.5, "order of the alpha divergence", low=0.0, high=1.0, low_open=True, only_with=("divergence", "alpha")
    ),
}

READ_TOKENS = {**LD, **WPO}
EVERY_READING = {**LD, **WPO, **DIVERGENCE}
