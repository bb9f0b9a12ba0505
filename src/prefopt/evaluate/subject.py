"""What is measured: a run folder or a model, with the reference, beta and held-out rows that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.config import DataConfig, RunConfig
from prefopt.core.errors import ConfigError
from prefopt.core.past_run import run_config as run_config
from prefopt.core.run_folder import RunFolder
from prefopt.data.budget import fit_budget, token_budget
from prefopt.data.encode import TokenGroup, encode_groups
from prefopt.data.load import load_groups
from prefopt.data.splits import load_held_out
from prefopt.evaluate.implicit import ImplicitReward
from prefopt.model.engine import LanguageModel
from prefopt.model.reference import Logps


@dataclass(frozen=True)
class Subject:
    """Names of policy and reference, beta, the folder for results, and the configuration of the run, if it is one."""

    policy: str
    reference: str
    beta: float
    folder: RunFolder | None
    config: RunConfig | None

    def held_out_pairs(self, model: LanguageModel, source: str | None) -> list[TokenGroup] | None:
        """Pairs of the file `source`, else the run's own held-out rows, else None."""
        data = self.config.data if self.config is not None else DataConfig()
        groups = load_groups(source) if source is not None else load_held_out(data)
        if groups is None:
            return None
        tokens = encode_groups(groups, model.tokenizer, template=data.template, train_on=data.train_on)
        tokens = fit_budget(tokens, token_budget(data, model.context_tokens), on_overlong=data.on_overlong)
        return [group for group in tokens.groups if group.feedback.kind == "pair"]


def subject_of(name: str, *, reference: str | None, beta: float | None, output: Path | None) -> Subject:
    """The subject called `name`. ConfigError where a model that is no run is given without a reference."""
    config = run_config(name)
    if config is not None:
        own = config.reference.model or config.model.name
        used = beta if beta is not None else (config.loss.beta or 0.1)
        return Subject(name, reference or own, used, RunFolder(output or Path(name)), config)
    if reference is None:
        raise ConfigError(
            f'"{name}" is not a run folder, so its reference is not known',
            todo="Give the model it started from with --reference.",
        )
    return Subject(name, reference, beta if beta is not None else 0.1, RunFolder(output) if output else None, None)


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """The evaluation as plain text: a line for each measure, with its 95 % interval."""
    lines = [f"{result['checkpoint']} against {result['settings']['reference']} (95 % intervals)"]
    if heldout := result.get("heldout"):
        lines.append(
            f"held-out accuracy   {_interval(heldout['accuracy'])} on {heldout['pairs']} pairs; loss {heldout['loss']:.4f}"
        )
        lines.append(f"held-out margin     {_interval(heldout['margin'])} nats")
    if reward := result.get("reward"):
        lines.append(f"{reward['name']:<19} {_interval(reward['policy'])}, reference {_interval(reward['reference'])}")
        lines.append(f"  difference        {_interval(reward['difference'])}")
    if wins := result.get("win_rate"):
        lines.append(
            f"win rate            {_interval(wins['rate'])}: {wins['wins']} won, {wins['ties']} tied, {wins['losses']} lost"
        )
    if kl := result.get("kl"):
        response, token = kl["per_response"], kl["per_token"]
        lines.append(
            f"KL(policy || ref)   {response['value']:.2f} ± {response['standard_error']:.2f} nats a response, {token['value']:.4f} a token"
        )
    if length := result.get("length"):
        lines.append(f"length, tokens      {_interval(length['policy'])}, reference {_interval(length['reference'])}")
    if diversity := result.get("diversity"):
        ours, theirs = diversity["policy"], diversity["reference"]
        lines.append(f"distinct-2          {ours['distinct_2']:.3f}, reference {theirs['distinct_2']:.3f}")
        for name, title in (("self_bleu", "self-BLEU"), ("spread", "embedding spread")):
            if name in ours:
                lines.append(f"{title:<19} {ours[name]:.3f}, reference {theirs[name]:.3f}")
    return lines + list(result.get("notes", []))


def _interval(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def scored_rows(
    groups: Sequence[TokenGroup],
    policy: Sequence[Logps],
    reference: Sequence[Logps],
    rewards: Sequence[tuple[ImplicitReward, ...]],
    tokenizer: Any | None,
) -> list[dict[str, Any]]:
    """Lines of `prefopt score`: sums per response, and with a tokenizer the reward and text of every scored token."""
    rows = []
    for group, ours, theirs, totals in zip(groups, policy, reference, rewards, strict=True):
        row: dict[str, Any] = {
            "source": group.source,
            "rewards": [round(reward.total, 6) for reward in totals],
            "logps": [round(float(values.sum()), 6) for values in ours],
            "reference_logps": [round(float(values.sum()), 6) for values in theirs],
        }
        if tokenizer is not None:
            row["tokens"] = [
                [
                    {"text": tokenizer.decode([int(token)]), "reward": round(float(value), 6)}
                    for token, value in zip(ids[flags], reward.tokens, strict=True)
                ]
                for ids, flags, reward in zip(group.response_ids, group.scored, totals, strict=True)
            ]
        rows.append(row)
    return rows
