"""Rewards: any function of prompts and responses, by name. Built in are a sentiment score and checks by program."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.core.errors import ConfigError, DataError, PrefoptError, nearest
from prefopt.rollout.prompts import Given

RewardFunction = Callable[..., Sequence[float]]  # of (prompts, responses)
Check = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward; higher is better. `reads_ends`: its function also takes `finished`, for a model reads the end of turn."""

    name: str
    function: RewardFunction
    reads_ends: bool = False

    def __call__(
        self, prompts: Sequence[Given], responses: Sequence[str], finished: Sequence[bool] | None = None
    ) -> list[float]:
        """One finite score a response; DataError names the reward and the first index that has none.

        `finished`: whether each response came to its end, where that is known; all did otherwise.
        """
        more = {"finished": finished} if self.reads_ends and finished is not None else {}
        try:
            scores = self.function(prompts, responses, **more)
        except PrefoptError:
            raise
        except Exception as error:  # whatever a reward of the user's own does
            raise DataError(
                f"reward {self.name}: failed ({type(error).__name__}: {error})", todo="Mend the function; nothing was written."
            ) from error
        try:
            values = list(scores)
        except TypeError:
            raise DataError(f"reward {self.name}: gave {type(scores).__name__}", todo="Return a list of numbers.") from None
        if len(values) != len(responses):
            raise DataError(
                f"reward {self.name}: gave {len(values)} scores for {len(responses)} responses",
                todo="Return one score for each response, in order.",
            )
        return [self._checked(at, value) for at, value in enumerate(values)]

    def _checked(self, at: int, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, str):
            raise DataError(f"reward {self.name}: score {at} is {value!r}, not a finite number", todo="Return finite numbers.")
        return number


def load_reward(name: str) -> Reward:
    """The reward `name`: a built-in one (`reward_table()`), a check with its argument as in `min_words:20`, a trained
    reward model as `model:PATH`, a run's implicit reward as `implicit:RUN`, or `module:function` of your own, imported
    from the current folder or the installed packages.

    A function takes (prompts, responses) and gives as many numbers; a prompt is a string or a message list.
    ConfigError for an unknown name, a missing or wrong argument, or a function that cannot be imported.
    """
    head, sign, argument = name.partition(":")
    if head in _SCORES and not sign:
        return Reward(name, _SCORES[head]())
    if head in _CHECKS:
        if sign:
            raise ConfigError(f'reward: "{head}" takes no argument, found "{name}"', todo=f'Use "{head}".')
        return _check_reward(name, _CHECKS[head])
    if head in _CHECKS_OF_NUMBER:
        if not argument.isdecimal():
            raise ConfigError(f'reward: "{name}": "{head}" needs a whole number', todo=f"For example {head}:3.")
        return _check_reward(name, _CHECKS_OF_NUMBER[head](int(argument)))
    if head in _CHECKS_OF_TEXT:
        if not argument:
            raise ConfigError(f'reward: "{name}": "{head}" needs a text', todo=f"For example {head}:hello.")
        return _check_reward(name, _CHECKS_OF_TEXT[head](argument))
    if head == "model":
        if not argument:
            raise ConfigError(f'reward: "{name}" needs a trained reward model', todo="For example model:runs/reward.")
        return Reward(name, _trained(argument), reads_ends=True)
    if head == "implicit":
        if not argument:
            raise ConfigError(f'reward: "{name}" needs a run folder', todo="For example implicit:runs/dpo.")
        return Reward(name, _implicit(argument), reads_ends=True)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return Reward(name, _imported(name, head, argument))
    raise ConfigError(f'reward: "{name}" is not a reward', todo=_known(head))


def reward_table() -> list[tuple[str, str]]:
    """(name, what it scores) of the built-in rewards, for the docs and the command line."""
    return [
        ("vader", "sentiment of the text in [-1, 1] by vaderSentiment: a defined reward, weak as a classifier"),
        ("length", "number of words"),
        *((name, "1 where the response passes, else 0") for name in _CHECKS),
        *((f"{name}:N", "1 where the response passes, else 0") for name in _CHECKS_OF_NUMBER),
        *((f"{name}:TEXT", "1 where the response passes, else 0") for name in _CHECKS_OF_TEXT),
        ("model:PATH", "score of a trained reward model: the run of one, or its folder"),
        (
            "implicit:RUN",
            "beta * log(policy / reference) of a run: only differences between responses to a prompt mean something",
        ),
        ("module:function", "a function of your own: (prompts, responses) -> scores"),
    ]


def _known(head: str) -> str:
    names = [*_SCORES, *_CHECKS, *_CHECKS_OF_NUMBER, *_CHECKS_OF_TEXT]
    return f"{nearest(head, names)}Built in: {', '.join(names)}; or model:PATH, implicit:RUN, or module:function of your own."


def _imported(name: str, module: str, function: str) -> RewardFunction:
    here = os.getcwd()
    sys.path.insert(0, here)  # console scripts do not have the current folder on the path
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f'reward: "{name}": there is no module "{error.name}"', todo=_known(module)) from error
    except Exception as error:
        raise ConfigError(f'reward: "{name}": importing it failed ({error})', todo=f'Mend the module "{module}".') from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f'reward: "{name}": {module} has no function "{function}"', todo="Give module:function.")
    return found  # type: ignore[no-any-return]


def _trained(path: str) -> RewardFunction:
    from prefopt.rollout.trained import trained_reward  # with torch, which other rewards do without

    return trained_reward(path)


def _implicit(run: str) -> RewardFunction:
    from prefopt.rollout.judges.implicit import implicit_reward_of  # with torch

    return implicit_reward_of(run)


def _vader() -> RewardFunction:
    try:
        analyzer = importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    except ModuleNotFoundError as error:
        raise ConfigError(
            'reward: "vader" needs the package vaderSentiment, which is not installed',
            todo="pip install 'prefopt[demo]'",
        ) from error
    return lambda prompts, responses: [analyzer.polarity_scores(response)["compound"] for response in responses]


def count_words(text: str) -> int:
    """Number of runs of letters, digits and underscores, as IFEval counts words."""
    return len(re.findall(r"\w+", text))


def _length() -> RewardFunction:
    return lambda prompts, responses: [float(count_words(response)) for response in responses]


def _check_reward(name: str, check: Check) -> Reward:
    # as in IFEval, an empty response follows no instruction
    return Reward(name, lambda prompts, responses: [float(bool(text.strip()) and check(text)) for text in responses])


def _is_json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except ValueError:
        return False
    return True


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE))


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if re.search(r"\w", part)])


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])


def _highlights(text: str) -> int:
    double = re.findall(r"\*\*[^\n\*]+\*\*", text)
    single = re.findall(r"\*[^\n\*]+\*", re.sub(r"\*\*[^\n\*]+\*\*", "", text))
    return sum(bool(found.strip("* ")) for found in double + single)


def _regex(pattern: str) -> Check:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f'reward: "regex:{pattern}" is not a regular expression ({error})', todo="Mend the pattern."
        ) from error
    return lambda text: compiled.search(text) is not None


_SCORES: dict[str, Callable[[], RewardFunction]] = {"vader": _vader, "length": _length}

# after IFEval (arXiv 2311.07911), without its language detection
_CHECKS: dict[str, Check] = {
    "no_comma": lambda text: "," not in text,
    "all_lowercase": str.islower,
    "all_uppercase": str.isupper,
    "json_format": _is_json,
    "quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "title": lambda text: re.search(r"<<[^\n>]*[^\s>][^\n>]*>>", text) is not None,
    "postscript": lambda text: re.search(r"^\s*p\.\s?s\.", text, re.IGNORECASE | re.MULTILINE) is not None,
}
_CHECKS_OF_NUMBER: dict[str, Callable[[int], Check]] = {
    "min_words": lambda n: lambda text: count_words(text) >= n,
    "max_words": lambda n: lambda text: count_words(text) <= n,
    "min_sentences": lambda n: lambda text: _sentences(text) >= n,
    "max_sentences": lambda n: lambda text: _sentences(text) <= n,
    "paragraphs": lambda n: lambda text: _paragraphs(text) == n,
    "bullet_lists": lambda n: lambda text: _bullets(text) == n,
    "highlights": lambda n: lambda text: _highlights(text) >= n,
    "placeholders": lambda n: lambda text: len(re.findall(r"\[.*?\]", text)) >= n,
}
_CHECKS_OF_TEXT: dict[str, Callable[[str], Check]] = {
    "regex": _regex,
    "contains": lambda part: lambda text: part.lower() in text.lower(),
    "excludes": lambda part: lambda text: part.lower() not in text.lower(),
    "starts_with": lambda part: lambda text: text.strip().lower().startswith(part.strip().lower()),
    "ends_with": lambda part: lambda text: text.strip().strip('"').lower().endswith(part.strip().lower()),
}
