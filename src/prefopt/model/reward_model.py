"""A reward model after Bradley and Terry: one number for a prompt with its response, read at the response's last token.

Shapes: S responses, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prefopt.core.errors import DataError, ModelError
from prefopt.core.progress import progress
from prefopt.data.encode import TokenGroup
from prefopt.data.merge import merged, merged_batches
from prefopt.model.batch import Batch, padded_batch
from prefopt.model.engine import TOLERANCE, LanguageModel, TokenStatistics, probe_group

HEAD_NAMES = ("score", "classifier")  # where transformers' sequence classifiers keep their last layer


class RewardModel(LanguageModel):
    """A transformers sequence classifier with one label, its tokenizer, and the way its rows are computed.

    What `model.save_pretrained` writes is a whole reward model for others: AutoModelForSequenceClassification reads the
    same scores from rows that are padded on the right with the tokenizer's padding token.
    """

    @property
    def head(self) -> torch.nn.Linear:
        """The layer from a hidden state to the score. ModelError where the model has none with one output, or an adapter."""
        if self.adapter is not None:
            raise ModelError(
                f"{self.name}: a LoRA adapter freezes the head of a reward model, which starts at 0 and would stay there",
                todo="Train all weights of a reward model: model.lora=null.",
            )
        for name in HEAD_NAMES:
            head = getattr(self.model, name, None)
            if isinstance(head, torch.nn.Linear) and head.out_features == 1:
                return head
        raise ModelError(
            f"{self.name}: {type(self.model).__name__} has no linear layer with one output called {' or '.join(HEAD_NAMES)}",
            todo="Use a decoder's sequence classifier with num_labels=1.",
        )

    @property
    def pad_id(self) -> int:
        """The padding token, by which transformers finds the last token of a row. ModelError where there is none."""
        found = self.model.config.get_text_config().pad_token_id
        if found is None:
            raise ModelError(f"{self.name}: its configuration has no pad_token_id", todo="Load it with load_reward_model.")
        return int(found)

    def batch(self, groups: Sequence[TokenGroup]) -> Batch:
        """The tensors of one micro-batch. DataError where a response ends with the padding token.

        transformers would read such a response's score in front of its last token, so the saved model would differ.
        """
        for group in groups:
            if any(ids[-1] == self.pad_id for ids in group.response_ids):
                raise DataError(
                    f"{group.source}: a response ends with token {self.pad_id}, which pads the rows of the reward model",
                    todo="Set another pad_token in the tokenizer of the base model.",
                )
        return super().batch(groups)

    def scores(self, batch: Batch) -> Tensor:
        """Score of each response, shape (S,), fp32, differentiable in the model's weights.

        The head is applied in fp32 whatever the compute dtype: in bf16 a score of 4 could not tell 0.03 from 0.
        """
        return self._read(batch, self.head.weight)

    def _read(self, batch: Batch, weight_1D: Tensor) -> Tensor:
        hidden_SD = self.hidden_states(batch)[batch.last_S].float()
        bias = self.head.bias
        return F.linear(hidden_SD, weight_1D.float(), None if bias is None else bias.float())[:, 0]

    @torch.no_grad()
    def score_groups(
        self, groups: Sequence[TokenGroup], *, micro_batch_tokens: int = 4096, title: str = ""
    ) -> list[NDArray[np.float32]]:
        """One float32 score a response, in an array for each group, in the order of `groups`."""
        results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(groups)
        if not groups:
            return results
        lengths = [self.computed_tokens(group) for group in groups]
        was_training = self.model.training
        self.model.eval()
        with progress(title or "scoring", sum(lengths), "tokens") as bar:
            for members in merged_batches(groups, self.computed_tokens, budget_tokens=micro_batch_tokens):
                chosen = [groups[place] for place in members]
                unique = merged(chosen)
                values = self.scores(self.batch(unique.groups)).cpu().numpy()
                if unique.response_S is not None:
                    values = values[unique.response_S]
                pieces = np.split(values, np.cumsum([len(group.response_ids) for group in chosen])[:-1])
                for place, piece in zip(members, pieces, strict=True):
                    results[place] = piece
                bar.advance(sum(lengths[place] for place in members))
        self.model.train(was_training)
        return results

    def token_statistics(self, batch: Batch, **asked: Any) -> TokenStatistics:
        """ModelError: a reward model has no vocabulary head."""
        raise ModelError(
            f"{self.name} is a reward model: it gives scores, and no log-probs", todo="Use a causal language model here."
        )

    def compared(self, batch: Batch) -> Tensor:
        """Scores of the head plus a fixed random one, shape (S,): a new head alone is 0 and would agree with anything."""
        return self._read(batch, self._trial_weight)

    @property
    def _trial_weight(self) -> Tensor:
        return self.head.weight.float() + self._random_weight

    @cached_property
    def _random_weight(self) -> Tensor:
        shape = self.head.weight.shape
        random: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
        return random.to(self.device)

    def _check_head(self) -> None:
        """ModelError where scores from hidden states and head are not those of transformers' own forward."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        probe = probe_group(vocabulary, self.context_tokens)
        other = (self.pad_id + 1) % vocabulary
        probe = replace(probe, response_ids=tuple(np.where(ids == self.pad_id, other, ids) for ids in probe.response_ids))
        batch = padded_batch([probe], self.device, pad_id=self.pad_id)
        columns = batch.token_ids.shape[1]
        mask = batch.position_ids <= (batch.last_S % columns)[:, None]
        name = next(name for name, module in self.model.named_modules() if module is self.head)
        with torch.no_grad():
            ours = self.compared(batch)
            trial = {f"{name}.weight": self._trial_weight.to(self.head.weight.dtype)}
            inputs = {"input_ids": batch.token_ids, "attention_mask": mask.long(), "use_cache": False}
            theirs = torch.func.functional_call(self.model, trial, kwargs=inputs).logits.float()[:, 0]
        worst = float((ours - theirs).abs().max())
        if not worst <= TOLERANCE[self.dtype]:
            raise ModelError(
                f"{self.name}: scores at the last token differ from transformers' own by {worst:.2g}; this architecture"
                " pools or scales in a way that is not known here",
                todo="Use a decoder whose sequence classifier reads the last token, for example a Llama, Qwen or Gemma.",
            )
