"""The table of losses against the functions that it names, and against what is set in a loss section."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import pytest

from prefopt.core.errors import ConfigError
from prefopt.core.losses import pair_variants, pairs
from prefopt.core.losses.facts import INPUTS, LossFacts
from prefopt.core.losses.table import LOSSES, loss_facts, resolve_knobs
from prefopt.objective.apply import Objective
from prefopt.objective.quantities import Quantities

READING = {"reduce", "ld_alpha", "divergence", "divergence_alpha", "wpo"}  # of the objective, not of the formula
OF_PAIRS = [facts.name for table in (pairs, pair_variants) for facts in table.FACTS]
KNOBS = [(name, key) for name, facts in LOSSES.items() for key in facts.knobs]
NUMBERS = [(name, key) for name, key in KNOBS if isinstance(LOSSES[name].knobs[key].default, float)]


def function_of(facts: LossFacts) -> Any:
    module, _, function = facts.function.partition(":")
    return getattr(importlib.import_module(module), function)


def companion(name: str, key: str) -> dict[str, Any]:
    """The other option without which this one does nothing."""
    only_with = loss_facts(name).knobs[key].only_with
    return {} if only_with is None else {only_with[0]: only_with[1]}


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_and_the_function_agree(name: str) -> None:
    """Inputs are the positional parameters in their order, options the keyword-only ones with the same defaults; a loss
    that is another one's function under a name of its own may have a default of its own."""
    facts = loss_facts(name)
    function = function_of(facts)
    parameters = inspect.signature(function).parameters.values()
    assert tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY) == facts.inputs
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    options = {key: knob.default for key, knob in facts.knobs.items() if key not in READING}
    assert defaults.keys() == options.keys()
    assert function.__name__ != name or defaults == options
    assert ("reduce" in facts.knobs) is (facts.reduce == "choice")
    assert not any("mean_logp" in entry for entry in facts.inputs) or facts.reduce == "sum"


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_what_it_is(name: str) -> None:
    facts = loss_facts(name)
    assert facts.name == name and facts.title and facts.formula and facts.paper and facts.accepts
    assert all(len(knob.about) > 10 for knob in facts.knobs.values())
    assert facts.since == ("0.1" if name in ("dpo", "ipo") else "0.2")
    function = function_of(facts)
    about = f"{inspect.getdoc(inspect.getmodule(function))} {inspect.getdoc(function)}"
    assert function.__doc__ and "shape" in about.lower()
    assert name not in OF_PAIRS or "arXiv" in about or "cDPO" in about


@pytest.mark.parametrize("name", OF_PAIRS)
def test_the_formula_names_every_option_of_a_loss_of_pairs(name: str) -> None:
    facts = loss_facts(name)
    symbols = {"label_smoothing": " e", "momentum": "moving average", "version": "tdpo2", "scaling": "f = log or identity"}
    unnamed = {key for key in facts.knobs if key not in READING and symbols.get(key, key) not in facts.formula}
    assert not unnamed


@pytest.mark.parametrize("name", OF_PAIRS)
def test_modifiers_are_options_where_they_do_something(name: str) -> None:
    """Divergences need the constant of the prompt to cancel, so a loss of the margin; ld_alpha needs log-ratios and nothing
    else of the tokens; weights of pairs need values of pairs."""
    knobs, inputs = loss_facts(name).knobs, set(loss_facts(name).inputs)
    of_each_response = {"nca", "bco_pair", "sppo", "apo_zero", "apo_down", "dpop", "cal_dpo", "aot_unpaired"}
    token_level = {"tdpo", "aot"}  # the KL of each token and log-probs themselves, which no option of reading changes
    assert ("divergence" in knobs) is (name not in of_each_response | token_level)
    assert ("divergence" in knobs) is ("divergence_alpha" in knobs)
    assert ("ld_alpha" in knobs) is ({"chosen_G", "rejected_G"} <= inputs and name != "tdpo")
    assert ("wpo" in knobs) is (loss_facts(name).unit == "group")
    assert loss_facts(name).unit == "group" or loss_facts(name).step_wide


@pytest.mark.parametrize("name", INPUTS)
def test_every_quantity_can_be_made(name: str) -> None:
    """A name of the table is a name that Quantities knows: what it then lacks is a measurement, not a recipe."""
    assert name.startswith(("chosen", "rejected")) or name in inspect.getmodule(Quantities)._NAMED


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_every_number_is_held_to_its_range(name: str, key: str) -> None:
    knob, more = loss_facts(name).knobs[key], companion(name, key)
    inside: list[Any] = [knob.default, str(knob.default)]
    outside: list[Any] = [float("nan"), float("inf"), "much", True]
    for bound, is_open, beyond in ((knob.low, knob.low_open, -1e-6), (knob.high, knob.high_open, 1e-6)):
        if math.isfinite(bound):
            outside += [bound + beyond]
            (outside if is_open else inside).append(bound)
    for value in inside:
        assert resolve_knobs(name, {key: value, **more})[key] == float(value)
    for value in outside:
        with pytest.raises(ConfigError, match=rf"loss\.{key}"):
            resolve_knobs(name, {key: value, **more})


@pytest.mark.parametrize(("name", "key"), [entry for entry in KNOBS if entry not in NUMBERS])
def test_a_choice_is_one_of_the_choices(name: str, key: str) -> None:
    knob = loss_facts(name).knobs[key]
    choices = knob.choices or (True, False)
    for choice in choices:
        assert resolve_knobs(name, {key: choice})[key] == choice
    with pytest.raises(ConfigError, match=rf"loss\.{key}"):
        resolve_knobs(name, {key: "nonesuch"})


@pytest.mark.parametrize(("name", "key"), [entry for entry in KNOBS if companion(*entry)])
def test_an_option_without_the_one_it_belongs_to_is_refused(name: str, key: str) -> None:
    ((other, wanted),) = companion(name, key).items()
    knobs = loss_facts(name).knobs
    value = knobs[key].default / 2
    assert resolve_knobs(name, {key: value, other: wanted})[key] == value
    elsewhere = next(choice for choice in knobs[other].choices if choice != wanted)
    with pytest.raises(ConfigError, match=rf"loss\.{other}={wanted}"):
        resolve_knobs(name, {key: value, other: elsewhere})


def test_flipped_labels_and_ties_have_the_ranges_that_their_formulas_need() -> None:
    """robust divides by 1 - 2 e, exo takes log e, Rao-Kupper log(nu^2 - 1), Davidson log nu."""
    for name, value in (("robust", 0.5), ("exo", 0.0), ("rao_kupper", 1.0), ("davidson", 0.0), ("discopop", 0.0)):
        key = next(key for key in ("label_smoothing", "nu", "tau") if key in loss_facts(name).knobs)
        with pytest.raises(ConfigError, match=rf"loss\.{key}"):
            Objective({"name": name, key: value})
    assert Objective({"name": "dpo", "label_smoothing": 0.5}) and Objective({"name": "robust", "label_smoothing": 0.0})
