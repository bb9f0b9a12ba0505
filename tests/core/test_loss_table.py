"""The loss section: names, options, mixes; and what is refused, in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.core.errors import ConfigError
from prefopt.core.losses.facts import INPUTS, LossFacts
from prefopt.core.losses.table import LOSSES, Part, loss_facts, resolve_knobs, resolve_parts
from prefopt.core.resolve import resolve_config

REFERENCE_FREE = {"simpo", "cpo", "orpo", "sft", "reward", "reward_ranking"}
SAMPLES = {"ppo", "rloo", "grpo"}
RANKINGS = {"plackett_luce", "all_pairs", "best_of_k", "reward_ranking", "sft"}


def names_that(condition: Any) -> set[str]:
    return {name for name, facts in LOSSES.items() if condition(facts)}


class TestFacts:
    def test_every_name_is_its_key_and_every_input_is_known(self) -> None:
        for name, facts in LOSSES.items():
            assert facts.name == name and set(facts.inputs) <= set(INPUTS)

    def test_what_each_asks_for(self) -> None:
        assert names_that(lambda facts: not facts.needs_reference) >= REFERENCE_FREE
        assert names_that(lambda facts: "ranking" in facts.accepts) == RANKINGS
        assert names_that(lambda facts: "demonstration" in facts.accepts) == {"sft"}
        assert {"kto", "bco", "apo_zero_unpaired", "sft"} <= names_that(lambda facts: "label" in facts.accepts)
        assert names_that(lambda facts: facts.trains_reward_model) == {"reward", "reward_ranking"}
        assert names_that(lambda facts: facts.needs_mismatched) == {"kto"}
        assert names_that(lambda facts: facts.unit == "response") == {"kto", "bco", "apo_zero_unpaired", "rloo"}
        assert names_that(lambda facts: facts.unit == "every token") == {"ppo", "grpo"}
        assert names_that(lambda facts: facts.needs_samples) == SAMPLES
        assert names_that(lambda facts: facts.needs_value_head) == {"ppo"}
        assert names_that(lambda facts: facts.unit == "token") == {"sft"}
        assert names_that(lambda facts: facts.strict_order) == {"plackett_luce"}
        assert "pair" in loss_facts("dpo").accepts

    def test_every_loss_of_rows_takes_pairs(self) -> None:
        assert names_that(lambda facts: "pair" not in facts.accepts) == SAMPLES

    @pytest.mark.parametrize(
        ("name", "reward"),
        [
            ("dpo", "ratio"),
            ("kto", "ratio"),
            ("plackett_luce", "ratio"),
            ("simpo", "mean_logp"),
            ("orpo", "mean_logp"),
            ("cpo", "logp"),
            ("sft", "none"),
            ("reward", "score"),
            ("reward_ranking", "score"),
        ],
    )
    def test_what_the_reward_of_a_response_is(self, name: str, reward: str) -> None:
        assert loss_facts(name).implicit_reward == reward

    def test_statistics_that_are_carried_need_the_whole_step_first(self) -> None:
        def runs(facts: LossFacts) -> bool:
            return any(INPUTS[name].running for name in facts.inputs)

        assert all(facts.step_wide for facts in LOSSES.values() if runs(facts))


class TestOneLoss:
    def test_without_a_name_it_is_dpo(self) -> None:
        (part,) = resolve_parts({})
        assert part == Part("dpo", 1.0, resolve_knobs("dpo", {})) and part.knobs["beta"] == 0.1

    def test_options_over_defaults(self) -> None:
        assert resolve_parts({"name": "simpo", "gamma": 0.3})[0].knobs == {"beta": 2.0, "gamma": 0.3}
        assert resolve_parts({"beta": "1e-5"})[0].knobs["beta"] == 1e-5, "YAML 1.1 reads 1e-5 as text"
        assert resolve_parts({"name": "cpo", "alpha": 0})[0].knobs["alpha"] == 0.0

    def test_defaults_are_in_their_own_ranges(self) -> None:
        for name, facts in LOSSES.items():
            assert resolve_knobs(name, {key: knob.default for key, knob in facts.knobs.items()}) == resolve_knobs(name, {})

    def test_an_option_for_one_choice_may_be_set_with_that_choice(self) -> None:
        knobs = resolve_knobs("dpo", {"divergence": "alpha", "divergence_alpha": 0.25})
        assert knobs["divergence_alpha"] == 0.25


class TestMixes:
    def test_weights_and_shared_options(self) -> None:
        """beta goes to every part that has one; sft has none."""
        dpo, sft = resolve_parts({"dpo": 1.0, "sft": 0.2, "beta": 0.3})
        assert (dpo.name, dpo.weight, dpo.knobs["beta"]) == ("dpo", 1.0, 0.3)
        assert sft == Part("sft", 0.2, {})

    def test_options_of_one_part_come_first(self) -> None:
        cpo, simpo = resolve_parts({"cpo": {"weight": 2, "beta": 0.5, "alpha": 0}, "simpo": {"gamma": 0.4}, "beta": 0.9})
        assert cpo == Part("cpo", 2.0, {"beta": 0.5, "alpha": 0.0})
        assert simpo == Part("simpo", 1.0, {"beta": 0.9, "gamma": 0.4})

    def test_a_mix_of_one_is_a_scaled_loss(self) -> None:
        assert [(part.name, part.weight) for part in resolve_parts({"orpo": 0.5})] == [("orpo", 0.5)]

    def test_the_order_is_that_of_the_section(self) -> None:
        assert [part.name for part in resolve_parts({"sft": 1, "kto": 1})] == ["sft", "kto"]

    @pytest.mark.parametrize("section", [{"name": "kto"}, {"dpo": 1.0, "sft": 0.2, "beta": 0.3}, {"simpo": {"gamma": 0.0}}])
    def test_a_resolved_configuration_says_the_same(self, section: dict[str, Any]) -> None:
        config = resolve_config({"data": {"train": "rows.jsonl"}, "loss": section})
        assert config.loss.parts == resolve_parts(section)
        again = resolve_config(config.resolved())
        assert again.loss.parts == config.loss.parts and again.resolved() == config.resolved()

    def test_a_loss_of_your_own_in_a_configuration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        source = "def hinge(chosen_G, rejected_G, *, beta=1.0): return (1 - beta * (chosen_G - rejected_G)).relu()"
        (tmp_path / "losses_in_a_recipe.py").write_text(source, encoding="utf-8")
        for section in (
            {"name": "losses_in_a_recipe:hinge", "beta": 0.4},
            {"losses_in_a_recipe:hinge": {"beta": 0.4}, "sft": 0.1},
        ):
            config = resolve_config({"data": {"train": "rows.jsonl"}, "loss": section})
            assert config.loss.parts[0].knobs == {"beta": 0.4} and config.loss.needs_reference
            assert resolve_config(config.resolved()).loss.parts == config.loss.parts
        config = resolve_config({"data": {"train": "rows.jsonl"}}, ["loss.name=losses_in_a_recipe:hinge", "loss.beta=0.4"])
        assert config.loss.title == "losses_in_a_recipe:hinge" and config.loss.beta == 0.4


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"name": "dpoo"},
        'loss.name: "dpoo" is not a loss',
        'did you mean "dpo"? All of them: prefopt losses; your own: module:function.',
    ),
    ({"name": "xyzzy"}, 'loss.name: "xyzzy" is not a loss', "All of them: prefopt losses; your own: module:function."),
    ({"name": 3}, "loss.name: 3 is not a name", "For example loss.name=dpo."),
    ({"name": None}, "loss.name: None is not a name", "For example loss.name=dpo."),
    (
        {"name": "dpo", "sft": 0.2},
        'loss.name is set, and so is the weight of "sft"',
        "Use loss.name for one loss, or a weight for each loss of a mix: loss: {dpo: 1.0, sft: 0.2}.",
    ),
    (
        {"name": "simpo", "gama": 1},
        'loss.gama: the loss "simpo" has no such option',
        'did you mean "gamma"? Options of simpo: beta, gamma.',
    ),
    ({"name": "sft", "qqq": 1}, 'loss.qqq: the loss "sft" has no such option', "sft has no options."),
    (
        {"name": "orpo", "centering": 1},
        'loss.centering: the loss "orpo" has no such option',
        "It belongs to: reward, reward_ranking. Options of orpo: beta.",
    ),
    ({"dpoo": 1.0, "sft": 0.2}, 'loss.dpoo: the loss "sft" has no such option', 'did you mean "dpo"? sft has no options.'),
    (
        {"simpo": 1.0, "sft": 0.2, "centering": 1},
        'loss.centering: the loss "simpo + sft" has no such option',
        "It belongs to: reward, reward_ranking. Options of simpo + sft: beta, gamma.",
    ),
    (
        {"simpo": 1.0, "sft": {"beta": 0.1}},
        'loss.beta: the loss "sft" has no such option',
        " and others. sft has no options.",
    ),
    ({"sft": 0}, "loss.sft: 0 is outside (0.0, inf)", "weight of this loss in the sum; the default is 1.0."),
    ({"sft": {"weight": -1.0}}, "loss.sft: -1.0 is outside (0.0, inf)", "weight of this loss in the sum; the default is 1.0."),
    ({"sft": None}, "loss.sft: None is not a number", "For example loss.sft=1.0."),
    ({"sft": "much"}, "loss.sft: 'much' is not a number", "For example loss.sft=1.0."),
    ({"name": "simpo", "beta": 0}, "loss.beta: 0 is outside (0.0, inf)", "the default is 2.0."),
    ({"name": "simpo", "beta": float("nan")}, "loss.beta: nan is outside (0.0, inf)", "the default is 2.0."),
    ({"name": "simpo", "beta": float("inf")}, "loss.beta: inf is outside (0.0, inf)", "the default is 2.0."),
    ({"name": "simpo", "beta": [2.0]}, "loss.beta: [2.0] is not a number", "For example loss.beta=2.0."),
    ({"name": "simpo", "beta": True}, "loss.beta: True is not a number", "For example loss.beta=2.0."),
    ({"label_smoothing": 0.6}, "loss.label_smoothing: 0.6 is outside [0.0, 0.5]", "the default is 0.0."),
    ({"wpo": 1}, "loss.wpo: 1 is neither true nor false", "WPO"),
    (
        {"name": "all_pairs", "weighting": "gaps"},
        "loss.weighting: 'gaps' is not a choice of all_pairs",
        "Use uniform or gap or lambda.",
    ),
    (
        {"divergence_alpha": 0.3},
        "loss.divergence_alpha is set, and dpo uses it only with loss.divergence=alpha",
        "Set loss.divergence=alpha, or remove loss.divergence_alpha.",
    ),
    (
        {"dpo": 1.0, "sft": 1.0, "divergence_alpha": 0.3, "divergence": "js"},
        "loss.divergence_alpha is set, and dpo uses it only with loss.divergence=alpha",
        "Set loss.divergence=alpha, or remove loss.divergence_alpha.",
    ),
]


@pytest.mark.parametrize(("section", "what", "todo"), REFUSED, ids=[what for _, what, _ in REFUSED])
def test_refused(section: dict[str, Any], what: str, todo: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_parts(section)
    assert refused.value.what == what
    assert todo in refused.value.todo
