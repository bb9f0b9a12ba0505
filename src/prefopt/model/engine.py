"""The language model as this project uses it: token groups in, per-token log-probs out.

Everything above this file (losses, reference cache, evaluation) is built on `token_logps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefopt.core.errors import ModelError
from prefopt.core.files import digest_of
from prefopt.core.progress import progress, say
from prefopt.data.encode import TokenGroup
from prefopt.data.groups import Feedback
from prefopt.data.merge import merged, merged_batches
from prefopt.model import attention
from prefopt.model.batch import Batch, packed_batch, padded_batch
from prefopt.model.fused import FusedModules, fuse
from prefopt.model.head import Head, head_of
from prefopt.model.layout import in_force, wanted_backend
from prefopt.model.precision import even_tokens
from prefopt.model.recompute import recompute_contexts
from prefopt.model.transfer import to_device

if TYPE_CHECKING:
    from prefopt.model.adapters import Adapter

TokenNumbers = tuple[NDArray[np.float32], ...]  # of a group: for each response one number a scored token

# Raised whenever a change to this package can change log-probs: part of every cache key.
NUMERICS_VERSION = 2

# Largest difference of a token's log-prob (nats) between two ways of computing it that is still rounding.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}
# The same for gradients, relative to the largest of them.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """What the vocabulary head says about each scored token, shapes (N,), fp32, in nats; None where it was not asked for.

    `logp_N`: log-prob. `log_square_N`: log of the sum of the squared probabilities, without a gradient (WPO).
    `kl_N`: KL(reference || policy) over the vocabulary, with a gradient in the policy only (TDPO). `value_N`: the value head's
    number at the position that predicts the token, in units of the reward.
    """

    logp_N: Tensor
    log_square_N: Tensor | None
    kl_N: Tensor | None
    value_N: Tensor | None = None

    def taken(self, token_N: NDArray[np.int64] | None) -> TokenStatistics:
        """Those of the tokens `token_N`, which may come several times; all as they are where it is None."""
        if token_N is None:
            return self
        at = to_device(token_N, self.logp_N.device)
        parts = (self.logp_N, self.log_square_N, self.kl_N, self.value_N)
        return TokenStatistics(*(None if part is None else part[at] for part in parts))  # type: ignore[arg-type]


class LanguageModel:
    """A causal language model, its tokenizer, and the way its rows are computed.

    `identity` names the weights by content. `sharing` says whether prompts are computed once per group; it is decided
    by comparing this model with its plain forward, the first time that it is needed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        identity: str = "",
        quantized: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.dtype = dtype
        self.device = device
        self.identity = identity or weights_identity(model)
        self.quantized = quantized  # nf4 or int8, of its linear layers
        self.adapter: Adapter | None = None  # set by prefopt.model.adapters.add_lora
        self.value_head: torch.nn.Linear | None = None  # of PPO; see add_value_head
        self.saving: Callable[[], AbstractContextManager[None]] = nullcontext  # around what a forward saves for backward
        self.fused: FusedModules = fuse(model)
        self.attention_backend: str | None = None  # None: the first that can serve
        attention.register()
        if not isinstance(model.config._attn_implementation, str) or model.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)

    @property
    def context_tokens(self) -> int:
        """Longest sequence of positions that the model knows."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20)

    @property
    def numerics(self) -> str:
        """What, besides weights and tokens, the log-probs depend on."""
        return f"{str(self.dtype).removeprefix('torch.')}-{self.device.type}-v{NUMERICS_VERSION}"

    @cached_property
    def sharing(self) -> bool:
        """True where the packed, shared forward agrees with the plain one on a probe; says so in one line where not."""
        self._check_head()
        worst = self.sharing_deviation()
        if worst is None:
            say(f"{self.name}: its attention cannot follow a packed layout; prompts are computed once per response instead")
            return False
        if not worst <= TOLERANCE[self.dtype]:
            say(
                f"{self.name}: packed and plain forward differ by {worst:.2g} nats; prompts are computed once per response instead"
            )
            return False
        return True

    def confirm_sharing(self, groups: Sequence[TokenGroup]) -> None:
        """Compare both ways on real rows as well, which reach windows and lengths that the probe does not."""
        if not self.sharing:
            return
        worst = self.sharing_deviation(groups)
        if worst is None or not worst <= TOLERANCE[self.dtype]:
            say(
                f"{self.name}: packed and plain forward differ by {worst} nats on these rows; prompts are computed once per response"
            )
            self.__dict__["sharing"] = False

    def _check_head(self) -> None:
        """ModelError where log-probs from hidden states and head are not those of transformers' own logits."""
        probe = probe_group(int(self.model.config.get_text_config().vocab_size), self.context_tokens)
        batch = padded_batch([probe], self.device)
        with self._without_dropout():
            ours = self.token_logps(batch)
            with self.fused.plain():
                logits = self.model(input_ids=batch.token_ids, use_cache=False).logits.float()
        plain = torch.log_softmax(logits.flatten(0, 1)[batch.predictor_N], dim=-1).gather(1, batch.target_N[:, None])[:, 0]
        worst = float((ours - plain).abs().max())
        if not worst <= TOLERANCE[self.dtype]:
            raise ModelError(
                f"{self.name}: log-probs from its vocabulary head differ from transformers' logits by {worst:.2g} nats;"
                " this architecture scales its logits in a way that is not known here",
                todo="Report the model's architecture; training on it would be wrong.",
            )

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """No gradients and no dropout: two ways of computing are compared on the same numbers."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def sharing_deviation(self, groups: Sequence[TokenGroup] | None = None) -> float | None:
        """Largest difference of a token's log-prob (nats) between packed and padded rows; None where packing is ignored."""
        groups = groups or [probe_group(int(self.model.config.get_text_config().vocab_size), self.context_tokens)]
        before = attention.calls_in_layout
        cast_later = next(self.model.parameters()).dtype != self.dtype  # then the kernel in use now is not that of training
        plain_kernel = attention.use_backend("segments") if cast_later else nullcontext()
        with self._without_dropout(), plain_kernel:
            packed = self.compared(packed_batch(groups, self.device))
            followed = attention.calls_in_layout - before
            if followed < int(getattr(self.model.config.get_text_config(), "num_hidden_layers", 1)):
                return None
            with self.fused.plain():
                plain = self.compared(padded_batch(groups, self.device))
        return float((packed - plain).abs().max())

    def computed_tokens(self, group: TokenGroup) -> int:
        """Tokens that a group costs in a forward pass: unique ones where prompts are shared, else padded rows."""
        if self.sharing:
            return group.unique_tokens
        return len(group.response_ids) * (len(group.prompt_ids) + max(len(ids) for ids in group.response_ids))

    def batch(self, groups: Sequence[TokenGroup]) -> Batch:
        """The tensors of one micro-batch, packed where that is valid for this model."""
        if self.sharing:
            return packed_batch(groups, self.device, multiple_of=even_tokens(self.dtype, self.device))
        return padded_batch(groups, self.device)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states, one row a position of the flattened batch, shape (rows * columns, D)."""
        with in_force(batch.layout, wanted_backend() or self.attention_backend), self.saving():
            hidden: Tensor = self.model.base_model(
                input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False, return_dict=True
            ).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])

    def token_logps(self, batch: Batch) -> Tensor:
        """Log-prob of each scored token in nats, shape (N,), fp32, differentiable in the model's weights."""
        return self.token_statistics(batch).logp_N

    def token_statistics(
        self,
        batch: Batch,
        *,
        log_square: bool = False,
        values: bool = False,
        reference: LanguageModel | None = None,
        reference_scope: AbstractContextManager[Any] | None = None,
    ) -> TokenStatistics:
        """Log-prob of each scored token and, where asked for, what WPO, TDPO and PPO need besides, from one forward of this model.

        With a `reference` its forward on the same batch comes first, without gradients and inside `reference_scope`.
        A policy with adapters is its own reference: pass itself, and the context that turns the adapters off.
        ModelError where the reference cannot follow a packed batch or has another vocabulary size.
        """
        states = None if reference is None else self._reference_states(batch, reference, reference_scope or nullcontext())
        head = head_of(self.model)
        hidden_ND = self.hidden_states(batch)[batch.predictor_N]
        return TokenStatistics(
            value_N=self._values(hidden_ND) if values else None,
            logp_N=head.logps(hidden_ND, batch.target_N),
            log_square_N=head.log_square(hidden_ND) if log_square else None,
            kl_N=None if states is None else head.kl_from(hidden_ND, *states),
        )

    @torch.no_grad()
    def _reference_states(
        self, batch: Batch, reference: LanguageModel, scope: AbstractContextManager[Any]
    ) -> tuple[Tensor, Head]:
        """The reference's hidden states at the scored positions, shape (N, D), and its head."""
        if batch.layout is not None and not reference.sharing:
            raise ModelError(
                f"{reference.name}: this reference cannot follow the packed batches of {self.name}",
                todo="Use a reference of the policy's architecture, or pass padded batches.",
            )
        with scope:
            return reference.hidden_states(batch)[batch.predictor_N], head_of(reference.model)

    def compared(self, batch: Batch) -> Tensor:
        """The numbers by which two ways of computing a batch are compared: here the log-prob of each scored token."""
        return self.token_logps(batch)

    def add_value_head(self) -> None:
        """Give the model a linear value head, 0 at first: what the reward to come is before each token. It computes in fp32
        whatever the model does, and is no part of what `model` saves."""
        size = int(self.model.get_output_embeddings().weight.shape[1])
        self.value_head = torch.nn.Linear(size, 1, device=self.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def _values(self, hidden_ND: Tensor) -> Tensor:
        assert self.value_head is not None, "the model has no value head"
        value_N1: Tensor = self.value_head(hidden_ND.float())
        return value_N1[:, 0]

    def score(self, groups: Sequence[TokenGroup], *, micro_batch_tokens: int = 4096, title: str = "") -> list[TokenNumbers]:
        """Log-probs in nats of the scored tokens: per group, per response, one float32 array in token order."""
        if not groups:
            return []
        return self._scored(groups, lambda batch: (self.token_logps(batch),), micro_batch_tokens, title)[0]

    def score_with_values(
        self, groups: Sequence[TokenGroup], *, micro_batch_tokens: int = 4096, title: str = ""
    ) -> tuple[list[TokenNumbers], list[TokenNumbers]]:
        """(log-probs as `score` gives them, values of the value head before the same tokens), from one forward."""

        def compute(batch: Batch) -> tuple[Tensor, ...]:
            said = self.token_statistics(batch, values=True)
            assert said.value_N is not None
            return said.logp_N, said.value_N

        if not groups:
            return [], []
        logps, values = self._scored(groups, compute, micro_batch_tokens, title)
        return logps, values

    @torch.no_grad()
    def _scored(
        self, groups: Sequence[TokenGroup], compute: Callable[[Batch], tuple[Tensor, ...]], micro_batch_tokens: int, title: str
    ) -> list[list[TokenNumbers]]:
        """What `compute` gives for each scored token, (N,) each, for all `groups`, each in its place."""
        results: list[list[TokenNumbers]] = []
        lengths = [self.computed_tokens(group) for group in groups]
        was_training = self.model.training
        self.model.eval()
        with progress(title or "scoring", sum(lengths), "tokens") as bar:
            for members in merged_batches(groups, self.computed_tokens, budget_tokens=micro_batch_tokens):
                chosen = [groups[place] for place in members]
                unique = merged(chosen)
                token_N = unique.token_N
                found = [values.cpu().numpy() for values in compute(self.batch(unique.groups))]
                if token_N is not None:
                    found = [values[token_N] for values in found]
                results = results or [[()] * len(groups) for _ in found]
                counts = [int(flags.sum()) for group in chosen for flags in group.scored]
                for result, values in zip(results, found, strict=True):
                    pieces = iter(np.split(values, np.cumsum(counts)[:-1]))
                    for place, group in zip(members, chosen, strict=True):
                        result[place] = tuple(next(pieces) for _ in group.scored)
                bar.advance(sum(lengths[place] for place in members))
        self.model.train(was_training)
        return results

    def enable_activation_checkpointing(self, *, selective: bool = False) -> None:
        """Recompute each layer in backward; with `selective` only what lies between its matrix products and attention."""
        options = {"use_reentrant": False, "context_fn": recompute_contexts(selective=selective)}
        if hasattr(self.model, "activation_checkpointing_enable"):  # transformers >= 5.20 renamed it
            self.model.activation_checkpointing_enable(options)
        else:
            self.model.gradient_checkpointing_enable(options)

    def disable_dropout(self) -> None:
        """Set every dropout to 0, for a policy with dropout differs from its reference at step 0; a LoRA adapter keeps
        its own (model.lora.dropout), which changes nothing while B is 0."""
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and ".lora_dropout." not in name:
                module.p = 0.0
            for option in ("attention_dropout", "dropout", "activation_dropout", "attn_dropout"):
                if isinstance(getattr(module, option, None), float):
                    setattr(module, option, 0.0)


def probe_group(vocabulary: int, context: int) -> TokenGroup:
    """A prompt with two unequal responses of fixed pseudo-random tokens, within any model's context."""
    random = np.random.default_rng(0)
    scale = min(1.0, (context - 1) / 24)
    prompt, first, second = (random.integers(0, vocabulary, max(2, int(size * scale)), dtype=np.int32) for size in (11, 6, 9))
    return TokenGroup(
        prompt_ids=prompt,
        response_ids=(first, second),
        scored=(np.ones(len(first), bool), np.ones(len(second), bool)),
        feedback=Feedback("pair"),
    )


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Cast the parameters in place. Buffers stay: rotary frequencies in bf16 would move every position."""
    for parameter in model.parameters():
        if parameter.dtype != dtype and parameter.is_floating_point():  # a quantised weight is of integers
            parameter.data = parameter.data.to(dtype)


def weights_identity(model: Any) -> str:
    """Digest of names, shapes, dtypes and bytes of all weights; ModelError where one is not finite."""

    def parts() -> Iterator[str | bytes | memoryview]:
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ModelError(
                    f"The weight {name} holds NaN or infinite values", todo="Use a checkpoint whose training did not diverge."
                )
            yield f"{name} {tuple(value.shape)} {value.dtype}"
            flat = value.detach().cpu().contiguous().flatten()
            yield memoryview(flat.view(torch.uint8).numpy()) if value.numel() else b""

    return digest_of(parts())
