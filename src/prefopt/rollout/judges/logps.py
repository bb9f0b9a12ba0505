"""Log-probs of whole responses under a local model, each kept on disk as it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefopt.core.progress import progress, silence
from prefopt.data.tokens import TokenGroup
from prefopt.model.engine import LanguageModel
from prefopt.model.reference import response_keys
from prefopt.rollout.judges.answers import AnswerStore, Request

BATCHES_KEPT_TOGETHER = 4  # a run that is killed loses at most the answers of so many batches


class GroupLogps(NamedTuple):
    """The sum of the log-probs of each response of a group, in nats, and whether they were on disk."""

    logps: list[float]
    cached: bool


def kept_logps(model: LanguageModel, groups: Sequence[TokenGroup], store: AnswerStore, *, batch_size: int) -> list[GroupLogps]:
    """The log-probs of the responses of every group, under the model's weights and numerics and the tokens."""
    requests = [_request(model, group) for group in groups]
    found: dict[int, GroupLogps] = {}
    for number, request in enumerate(requests):
        kept = store.get(request)
        if kept is not None:
            found[number] = GroupLogps([float(value) for value in kept["logps"]], cached=True)
    missing = [number for number in range(len(groups)) if number not in found]
    if missing:
        store.check()
        together = BATCHES_KEPT_TOGETHER * batch_size
        with progress(f"asking {model.name}", len(missing), "comparisons") as shown:
            for at in range(0, len(missing), together):
                part = missing[at : at + together]
                with silence():
                    scored = model.score([groups[number] for number in part])
                for number, responses in zip(part, scored, strict=True):
                    logps = [float(response.sum()) for response in responses]
                    store.put(requests[number], {"logps": logps})
                    found[number] = GroupLogps(logps, cached=False)
                shown.advance(len(part))
    return [found[number] for number in range(len(groups))]


def _request(model: LanguageModel, group: TokenGroup) -> Request:
    responses = [key.hex() for key in response_keys(group)]
    return {"weights": model.identity, "numerics": model.numerics, "verdicts": responses}
