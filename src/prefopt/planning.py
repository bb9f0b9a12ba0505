"""What a run will do and need, from its rows and its model's configuration: `prefopt plan` and `prefopt train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefopt.core.config import RunConfig
from prefopt.data.merge import merged
from prefopt.data.tokens import lengths_of
from prefopt.model.load import load_tokenizer, model_config, model_facts
from prefopt.pipeline import prepare
from prefopt.preparing import Prepared, steps_of
from prefopt.train.flops import training_flops
from prefopt.train.plan import Change, Machine, MemoryPlan, changes_that_fit, fitting_budget, plan_memory
from prefopt.train.requirements import check_machine

_ROWS_LOOKED_AT = 10_000  # at least, of longer files, for the work to do


@dataclass(frozen=True)
class RunPlan:
    """What a run will do and need: `unique_tokens` of an epoch, floating-point operations of all steps, memory, and changes
    that would make it fit where it does not."""

    rows: Prepared
    machine: Machine
    memory: MemoryPlan
    steps: int
    unique_tokens: int
    flops: float
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machine.room


def plan_run(config: RunConfig, *, total: int | None = None) -> RunPlan:
    """Read and encode the rows of `config`, and plan its training; no weights are read.

    `total`: bytes that the program may hold; by default what is free here.
    """
    check_machine(config)
    source: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    facts = model_facts(config.model.name, **source)
    rows = prepare(config, load_tokenizer(config.model.name, **source), facts.context_tokens)
    architecture, groups = model_config(config.model.name, **source), rows.train.groups
    machine = Machine.here(config, total=total)
    auto = config.train.micro_batch_tokens == "auto"
    budget = fitting_budget(config, architecture, groups, machine) if auto else config.train.budget_tokens
    memory = plan_memory(config, architecture, groups, machine, micro_batch_tokens=budget)
    fits = memory.peak <= machine.room
    steps = steps_of(config, rows.train)
    counted = config.train.max_steps is not None or config.rollout is not None
    passes = steps * config.train.groups_per_step / len(groups) if counted else config.train.epochs
    adapter = memory.trained if config.model.lora is not None else 0
    head = not config.loss.facts[0].trains_reward_model
    computed = merged(groups).groups if config.data.by_prompt else groups
    tokens = lengths_of(computed).unique_G
    looked_at = range(0, len(computed), max(1, len(computed) // _ROWS_LOOKED_AT))  # one row more or less changes nothing
    share = float(tokens[looked_at].sum() / tokens.sum())
    some = [computed[at] for at in looked_at]
    flops = training_flops(architecture, memory.weights, some, adapter=adapter, head=head) / share
    return RunPlan(
        rows=rows,
        machine=machine,
        memory=memory,
        steps=steps,
        unique_tokens=int(tokens.sum()),
        flops=passes * flops,
        changes=() if fits else tuple(changes_that_fit(config, architecture, groups, machine)),
    )
