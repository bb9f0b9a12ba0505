"""Losses of your own: `module:function`, with facts read from the function's signature."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from functools import cache
from typing import Any, Literal

from prefopt.core.errors import ConfigError, nearest
from prefopt.core.losses.facts import INPUTS, Knob, LossFacts
from prefopt.core.losses.knobs import EVERY_READING

_TAKEN = ("name", "weight", "reduce", *EVERY_READING)


@cache
def custom_facts(name: str) -> LossFacts:
    """Facts of the loss `module:function`, imported from the working folder or the Python path.

    Positional parameters name quantities of INPUTS; keyword-only parameters with defaults are its options. It returns
    one loss a group, shape (G,), or one a response, (S,), or a token, (N,), where it takes quantities of those; a module attribute
    `STEP_WIDE = {"function"}` says that it needs all groups of a step at once. ConfigError where it is not like that.
    """
    module_name, _, function_name = name.partition(":")
    function, module = _import(name, module_name, function_name)
    inputs: list[str] = []
    knobs: dict[str, Knob] = {}
    for parameter in _parameters(name, function):
        if parameter.kind is parameter.KEYWORD_ONLY:
            knobs[parameter.name] = _knob(name, parameter)
            continue
        if parameter.name not in INPUTS:
            raise ConfigError(
                f'loss "{name}": its parameter {parameter.name} is no known quantity',
                todo=f"{nearest(parameter.name, INPUTS)}Quantities: {', '.join(INPUTS)}. Options are keyword-only, after *.",
            )
        inputs.append(parameter.name)
    facts = LossFacts(
        name=name,
        title=(inspect.getdoc(function) or "a loss of your own").splitlines()[0],
        function=name,
        formula=f"{function_name}({', '.join(inputs)})",
        paper="your own",
        inputs=tuple(inputs),
        knobs=knobs,
        unit=_unit(name, inputs),
        step_wide=function_name in getattr(module, "STEP_WIDE", ()) or any(INPUTS[entry].running for entry in inputs),
    )
    if not facts.accepts:
        raise ConfigError(
            f'loss "{name}": no kind of row has all of {", ".join(inputs)}', todo="Use quantities of one kind of row."
        )
    return facts


def _parameters(name: str, function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError as error:  # some functions that are not written in Python have none
        raise ConfigError(f'loss "{name}": its parameters cannot be read', todo="Wrap it in a function of your own.") from error


def _unit(name: str, inputs: list[str]) -> Literal["group", "response", "every token"]:
    """What the loss gives one value of: groups, responses or tokens, by the quantities that it takes."""
    tokens = [entry for entry in inputs if entry.endswith("_N")]
    responses = [entry for entry in inputs if entry.endswith("_S")]
    groups = [entry for entry in inputs if entry.endswith(("_G", "_GK"))]
    if not inputs:
        raise ConfigError(
            f'loss "{name}": it takes no quantity', todo=f"Name some as positional parameters: {', '.join(INPUTS)}."
        )
    if responses and groups:
        raise ConfigError(
            f'loss "{name}": it takes {responses[0]}, of each response, and {groups[0]}, of each group',
            todo="Use one kind: of pairs, chosen_G and rejected_G are what ratio_S is of responses.",
        )
    if tokens and (responses or groups):
        raise ConfigError(
            f'loss "{name}": it takes {tokens[0]}, of each token, and {(responses or groups)[0]}, of something larger',
            todo="Use quantities of one kind.",
        )
    return "every token" if tokens else "response" if responses else "group"


def _import(name: str, module_name: str, function_name: str) -> tuple[Any, Any]:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not hide an installed module
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: anything may happen in it
        raise ConfigError(
            f'loss "{name}": {module_name} cannot be imported ({type(error).__name__}: {error})',
            todo="Name a module in the working folder or on the Python path.",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f'loss "{name}": {module_name} has no function {function_name}', todo=nearest(function_name, known) or "Name one."
        )
    return function, module


def _knob(name: str, parameter: inspect.Parameter) -> Knob:
    if parameter.name in _TAKEN:
        raise ConfigError(
            f'loss "{name}": its option {parameter.name} has a name that means something else in every loss section',
            todo=f"Rename it; taken are {', '.join(_TAKEN)}.",
        )
    default = parameter.default
    if not isinstance(default, bool | int | float | str):
        raise ConfigError(
            f'loss "{name}": its option {parameter.name} has no default that is a number, text or true/false',
            todo=f"For example {parameter.name}=0.1.",
        )
    return Knob(float(default) if isinstance(default, int) and not isinstance(default, bool) else default, "option of your own")
