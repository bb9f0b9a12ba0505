"""Options that contradict each other, or of which one would be ignored: refused by their names, with what would work."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.checks import SYNC_EVERY_STEPS, accepted_kinds, check_reference_given, check_reference_moves, losses_for
from prefopt.core.config import RunConfig
from prefopt.core.errors import ConfigError
from prefopt.core.losses.custom import custom_facts
from prefopt.core.losses.facts import INPUTS, Input
from prefopt.core.losses.table import LOSSES
from prefopt.core.resolve import resolve_config

LORA = "model.lora={}"

# words, what is wrong, what to do
REFUSED: list[tuple[list[str], str, str]] = [
    (
        ["loss.name=kto", "data.shape=ranking"],
        'data.shape=ranking gives ranking rows, and the loss "kto" learns from label or pair rows',
        "Losses for ranking rows: ",
    ),
    (["loss.name=kto", "data.shape=demonstration"], "gives demonstration rows", "Losses for demonstration rows: sft."),
    (["data.shape=label"], 'the loss "dpo" learns from pair rows', "Losses for label rows: "),
    (["data.shape=scores"], 'the loss "dpo" learns from pair rows', "plackett_luce"),
    (
        ["loss.kto=1", "loss.plackett_luce=1", "data.shape=label"],
        'the loss "kto + plackett_luce" learns from pair rows',
        "Losses for label rows: ",
    ),
    (
        ["loss.name=simpo", "loss.label_smoothing=0.1"],
        'loss.label_smoothing: the loss "simpo" has no such option',
        "Options of simpo: beta, gamma.",
    ),
    (["loss.bta=0.2"], 'loss.bta: the loss "dpo" has no such option', 'did you mean "beta"?'),
    (["loss.divergence_alpha=0.3"], "dpo uses it only with loss.divergence=alpha", "Set loss.divergence=alpha"),
    (
        ["loss.name=tdpo", "loss.version=tdpo1", "loss.alpha=0.1"],
        "tdpo uses it only with loss.version=tdpo2",
        "remove loss.alpha",
    ),
    (["loss.name=dpo", "loss.sft=0.1"], 'loss.name is set, and so is the weight of "sft"', "loss: {dpo: 1.0, sft: 0.2}"),
    (["loss.dpo=1", "loss.sft=0"], "loss.sft: 0 is outside (0.0, inf)", "weight of this loss in the sum"),
    (["loss.dpo=1", "loss.sft=-0.5"], "loss.sft: -0.5 is outside (0.0, inf)", "weight of this loss in the sum"),
    (
        ["loss.reward=1", "loss.dpo=1"],
        '"reward + dpo" mixes the loss of a reward model with that of a policy',
        "run of its own",
    ),
    (
        ["loss.name=reward", "data.train_on=last"],
        "data.train_on=last is set, and a reward model scores whole",
        "Remove data.train_on",
    ),
    (["loss.name=reward", LORA], 'model.lora is set, and the loss "reward" trains a reward model', "Remove model.lora"),
    (
        ["loss.name=simpo", "reference.model=x"],
        'reference.model=x is set and the loss "simpo" uses no reference',
        "Remove reference.model",
    ),
    (["loss.name=simpo", "reference.kind=live"], "reference.kind=live is set", "Remove reference.kind"),
    (["loss.name=sft", "reference.kind=ema"], "reference.kind=ema is set", "Remove reference.kind"),
    (
        ["loss.name=reward", "reference.cache_dir=x"],
        "reference.cache_dir=x is set",
        "Remove reference.cache_dir, or choose a loss",
    ),
    (["loss.name=sft", "reference.ema_decay=0.9"], "reference.ema_decay=0.9 is set", "Remove reference.ema_decay, or choose"),
    (
        ["reference.kind=none"],
        'reference.kind=none, and the loss "dpo" is defined against a reference',
        "simpo, cpo, orpo, unlikelihood, sft",
    ),
    (
        ["loss.dpo=1", "loss.sft=1", "reference.kind=none"],
        '"dpo + sft" is defined against a reference',
        "Remove reference.kind",
    ),
    (
        ["loss.name=tdpo", "reference.kind=cached"],
        'reference.kind=cached, and the loss "tdpo" needs the reference\'s whole distribution',
        "Use reference.kind=live (or adapter-off with LoRA).",
    ),
    (["loss.dpo=1", "loss.tdpo=1", "reference.kind=cached"], '"dpo + tdpo" needs', "Use reference.kind=live"),
    (
        ["reference.kind=tr-dpo", "reference.cache_dir=x"],
        "reference.cache_dir is set and reference.kind is tr-dpo: it would be ignored",
        "Remove reference.cache_dir, or use reference.kind=cached.",
    ),
    (["loss.name=tdpo", "reference.cache_dir=x"], "reference.kind is live", "Remove reference.cache_dir."),
    *(
        (
            [f"reference.kind={kind}", word],
            f"reference.{word.split('=')[0].removeprefix('reference.')} is set and reference.kind is {kind}",
            f"or use reference.kind={wanted}.",
        )
        for kind in ("cached", "live")
        for word, wanted in (
            ("reference.sync_every_steps=4", "tr-dpo"),
            ("reference.sync_mix=0.5", "tr-dpo"),
            ("reference.ema_decay=0.9", "ema"),
        )
    ),
    (["reference.kind=ema", "reference.sync_mix=0.5"], "reference.sync_mix is set and reference.kind is ema", "tr-dpo"),
    (["reference.kind=tr-dpo", "reference.ema_decay=0.5"], "reference.kind is tr-dpo", "use reference.kind=ema"),
    (["reference.sync_mix=0.5"], "reference.kind is cached: it would be ignored", "use reference.kind=tr-dpo"),
    (
        ["reference.kind=adapter-off"],
        "reference.kind=adapter-off, and no adapter is trained",
        "Set model.lora, or remove reference.kind.",
    ),
    (
        ["reference.kind=adapter-off", LORA, "reference.model=x"],
        "reference.model is set and reference.kind is adapter-off",
        "one of them",
    ),
    (["reference.kind=tr-dpo", LORA], "reference.kind=tr-dpo moves the reference's weights", "model.lora=null"),
    (["reference.kind=ema", LORA], "reference.kind=ema moves the reference's weights", "model.lora=null"),
    (
        ["reference.kind=tr-dpo", "reference.sync_every_steps=10", "train.max_steps=10"],
        "moves the reference every 10 steps (reference.sync_every_steps), and the run has 10",
        "Set reference.sync_every_steps below 10, or use reference.kind=live.",
    ),
    (["model.quantize=nf4"], "model.quantize=nf4 is set without model.lora", "Set model.lora, for example model.lora.r=16"),
    (
        ["train.optimizer=adamw_bf16", "train.precision=fp32"],
        "train.optimizer=adamw_bf16 holds the weights in bf16, and train.precision is fp32",
        "Set train.precision=bf16, or use train.optimizer=adamw_8bit",
    ),
    (
        ["train.offload_activations=true", "train.activation_checkpointing=selective"],
        "almost nothing would be offloaded",
        "Use train.activation_checkpointing=full or none with it.",
    ),
    (["reference.kind=tr-dpo", "train.max_steps=100"], f"every {SYNC_EVERY_STEPS} steps", "below 100"),
]

ACCEPTED: list[list[str]] = [
    ["loss.kto=1", "loss.plackett_luce=1"],
    ["loss.kto=1", "loss.sft=0.1", "data.shape=label"],
    ["loss.plackett_luce=1", "loss.sft=0.1", "data.shape=ranking"],
    ["loss.reward=1", "loss.reward_ranking=1"],
    ["loss.name=simpo", "reference.kind=none"],
    ["loss.name=sft", "data.train_on=last", LORA],
    ["loss.divergence=alpha", "loss.divergence_alpha=0.3"],
    ["loss.name=tdpo", LORA],
    ["loss.name=tdpo", LORA, "reference.model=x"],
    ["loss.name=tdpo", "reference.kind=ema"],
    ["reference.kind=adapter-off", LORA],
    ["reference.kind=live", "reference.model=x", LORA],
    ["reference.kind=tr-dpo", "reference.sync_every_steps=9", "reference.sync_mix=1", "train.max_steps=10"],
    ["reference.kind=tr-dpo"],
    ["loss.name=kto", "reference.kind=ema", "reference.ema_decay=0.5", "train.max_steps=1"],
]


def config_of(*words: str) -> RunConfig:
    return resolve_config({}, words, source="mine.yaml")


@pytest.mark.parametrize(("words", "what", "todo"), REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_refused(words: list[str], what: str, todo: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(*words)
    assert what in raised.value.what and "(mine.yaml)" in raised.value.what
    assert todo in raised.value.todo
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("words", ACCEPTED, ids=" ".join)
def test_accepted_and_saved_as_a_recipe_of_itself(words: list[str]) -> None:
    config = config_of(*words)
    assert resolve_config(config.resolved()).resolved() == config.resolved()


def test_any_two_losses_of_the_table_have_pairs_in_common() -> None:
    """Every quantity is there for pairs, so a mix of a policy's losses always has rows to learn from."""
    assert all("pair" in quantity.kinds for quantity in INPUTS.values() if not quantity.sampled)
    of_rows = [name for name, facts in LOSSES.items() if not (facts.trains_reward_model or facts.needs_samples)]
    for first, second in combinations(of_rows, 2):
        config = RunConfig.model_validate({"loss": {first: 1.0, second: 1.0}})
        assert "pair" in accepted_kinds(config)
        assert set(accepted_kinds(config)) == set(LOSSES[first].accepts) & set(LOSSES[second].accepts)


def test_a_mix_without_rows_in_common_says_what_each_part_learns_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "story_losses.py").write_text("def of_stories(story_G): ...\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(INPUTS, "story_G", Input("of demonstrations alone", ("demonstration",)))
    values: dict[str, Any] = {"loss": {"dpo": 1.0, "story_losses:of_stories": 1.0}}
    with pytest.raises(ConfigError) as raised:
        resolve_config(values)
    custom_facts.cache_clear()
    assert raised.value.what == (
        'loss: no kind of row serves all parts of "dpo + story_losses:of_stories":'
        " dpo learns from pair rows; story_losses:of_stories learns from demonstration rows"
    )


def test_losses_for_each_kind_of_rows() -> None:
    assert losses_for("demonstration") == "sft"
    assert set(losses_for("ranking").split(", ")) == {"plackett_luce", "all_pairs", "best_of_k", "sft", "reward_ranking"}
    assert set(losses_for("label").split(", ")) == {"kto", "bco", "apo_zero_unpaired", "aot_unpaired", "sft"}
    assert set(losses_for("pair").split(", ")) == {name for name, facts in LOSSES.items() if not facts.needs_samples}


@pytest.mark.parametrize(("every", "steps", "moves"), [(5, 6, True), (5, 5, False), (None, 512, False), (None, 513, True)])
def test_a_reference_that_should_move_moves_within_the_run(every: int | None, steps: int, moves: bool) -> None:
    config = RunConfig.model_validate({"reference": {"kind": "tr-dpo", "sync_every_steps": every}})
    if moves:
        check_reference_moves(config, steps)
    else:
        with pytest.raises(ConfigError, match=f"and the run has {steps}: it would stay where it is"):
            check_reference_moves(config, steps)
    check_reference_moves(RunConfig.model_validate({"reference": {"kind": "ema"}}), 1)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["reference.model=x"], "a reference model is given, and so is reference.model"),
        (["loss.name=simpo"], 'a reference model is given, and the loss "simpo" uses no reference'),
        (["reference.kind=adapter-off", LORA], "a reference model is given, and reference.kind is adapter-off"),
    ],
)
def test_a_reference_in_memory_is_not_ignored(words: list[str], what: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_reference_given(config_of(*words))
    assert raised.value.what.startswith(what) and raised.value.todo


@pytest.mark.parametrize(
    "words", [[], ["reference.kind=live"], ["reference.kind=ema"], ["loss.name=tdpo", LORA, "reference.kind=live"]]
)
def test_a_reference_in_memory_serves_otherwise(words: list[str]) -> None:
    check_reference_given(config_of(*words))
