"""What backward needs: kept, computed again, or moved to the CPU's memory meanwhile. The gradients are the same."""

from __future__ import annotations

from prefopt.core.config import TrainConfig
from prefopt.model.engine import LanguageModel
from prefopt.model.offload import ActivationOffload


def set_activations(policy: LanguageModel, config: TrainConfig, *, without_data: bool = False) -> None:
    """Make the passes of `policy` keep what train.activation_checkpointing and train.offload_activations say.

    `without_data`: its tensors have no data, and nothing is copied.
    """
    if config.activation_checkpointing != "none":
        policy.enable_activation_checkpointing(selective=config.activation_checkpointing == "selective")
    if config.offload_activations:
        weights = list(policy.model.parameters())
        policy.saving = ActivationOffload(policy.device, weights, beside=not without_data).saving
