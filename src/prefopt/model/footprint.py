"""Memory of a model's passes, counted before it is loaded: the real code runs on tensors without data.

Tensors have shapes and no storage (torch's FakeTensorMode), so nothing is computed and nothing is read; every tensor that
the code makes is entered in a ledger while it lives. What a kernel needs inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefopt.data.encode import TokenGroup
from prefopt.model.batch import Batch
from prefopt.model.engine import LanguageModel
from prefopt.model.head import head_of


class Ledger(TorchDispatchMode):
    """Bytes of the storages that live while it is active: `live` now, `peak` at most. A storage counts once.

    `device`: where they have to be to count; None for anywhere.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.enter(value)
        return result

    def enter(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed."""
        if self.device is not None and tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    @contextmanager
    def peak_of(self) -> Iterator[list[int]]:
        """A list that holds the peak of the block once it is over."""
        before, self.peak = self.peak, self.live
        found: list[int] = []
        yield found
        found.append(self.peak)
        self.peak = max(before, self.peak)


@contextmanager
def without_data(device: torch.device | None = None) -> Iterator[Ledger]:
    """Everything made within is a tensor without data, and is counted, with `device` what is made there."""
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(device) as ledger:
        yield ledger


def model_without_weights(
    config: Any,
    *,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    classifier: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The fp32 model of a transformers configuration as a LanguageModel on torch's meta device, without a tokenizer.

    It is taken to follow packed batches: whether it really does is known only once it is loaded.
    """
    family = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        made: Any = family.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model = LanguageModel(made, None, name=name, dtype=dtype, device=device, identity="without data")
    model.__dict__["sharing"] = True
    return model


def put_on_device(model: LanguageModel) -> None:
    """Inside `without_data`: replace the meta weights and buffers by tensors of the model's device; ties stay ties."""
    made: dict[int, Any] = {}
    for module in model.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=model.device)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=model.device)


def forward_backward(model: LanguageModel, batch: Batch) -> None:
    """One pass as training makes it; the objective itself, a few numbers a response, is left out."""
    hidden = model.hidden_states(batch)
    if model.model.get_output_embeddings() is None:
        hidden[batch.last_S].float().sum().backward()
        return
    head_of(model.model).logps(hidden[batch.predictor_N], batch.target_N).sum().backward()


@torch.no_grad()
def forward(model: LanguageModel, groups: Sequence[TokenGroup]) -> None:
    """One pass without gradients, as the reference makes it."""
    batch = model.batch(groups)
    hidden = model.hidden_states(batch)
    if model.model.get_output_embeddings() is not None:
        head_of(model.model).logps(hidden[batch.predictor_N], batch.target_N)
