"""Options of judges and of what answers for them, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from prefopt.core.errors import ConfigError, nearest
from prefopt.core.resolve import parse_override
from prefopt.core.section import Section


class JudgeSettings(Section):
    """How a judge is asked. An option that the kind of judge does not have is an error where it is given."""

    tolerance: float = Field(0.0, ge=0, description="Scores that differ by no more than this are a tie.")
    verdict_by: Literal["text", "letters"] = Field(
        "text",
        description="local: by `text` the verdict is read that the model writes; by `letters` it is the likelier one of the"
        " answers A and B: it needs no writing, so any model gives one, however small.",
    )
    temperature: float | None = Field(0.0, ge=0, description="0 is greedy; null leaves it to the endpoint.")
    max_answer_tokens: int = Field(512, ge=1, description="Longest answer.")
    seed: int | None = Field(None, description="Of sampling; an endpoint is told it where it is given.")
    batch_size: int = Field(
        16, ge=1, description="local: answers in progress at once; contrast: comparisons kept on disk together, by fours."
    )
    concurrency: int = Field(8, ge=1, le=256, description="endpoint: requests in progress at once.")
    requests_per_minute: float | None = Field(None, gt=0, description="endpoint: at most so many requests a minute.")
    timeout_seconds: float = Field(120.0, gt=0, description="endpoint: longest time for one request.")
    retries: int = Field(6, ge=0, description="endpoint: how often a request that failed is sent again.")
    first_wait_seconds: float = Field(
        1.0, ge=0, description="endpoint: pause before the first repetition; each further one doubles it."
    )
    longest_wait_seconds: float = Field(
        120.0,
        gt=0,
        description="endpoint: longest pause before a request is sent again; a server that asks for more ends the run.",
    )
    api_key_env: str | None = Field(None, description="endpoint: name of the environment variable that holds the API key.")
    limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="endpoint: what it calls the limit of tokens."
    )
    prompt_price: float | None = Field(None, ge=0, description="endpoint: dollars for a million prompt tokens.")
    answer_price: float | None = Field(None, ge=0, description="endpoint: dollars for a million answer tokens.")
    max_cost: float | None = Field(None, gt=0, description="endpoint: dollars that this command may spend.")
    max_requests: int | None = Field(None, ge=1, description="endpoint: requests that this command may send.")


_OF_SCORES = ("tolerance",)
_OF_LOCAL = ("tolerance", "verdict_by", "temperature", "max_answer_tokens", "seed", "batch_size")
_OF_ENDPOINT = tuple(name for name in JudgeSettings.model_fields if name not in ("verdict_by", "batch_size"))
SETTINGS_OF = {
    "reward": _OF_SCORES,
    "implicit": _OF_SCORES,
    "local": _OF_LOCAL,
    "contrast": ("tolerance", "batch_size"),
    "endpoint": _OF_ENDPOINT,
}


def judge_settings(given: Sequence[str] | Mapping[str, Any] = ()) -> JudgeSettings:
    """The settings in words such as `concurrency=4`, or in a mapping. ConfigError names an unknown one, or a wrong value."""
    if isinstance(given, Mapping):
        values = dict(given)
    else:
        values = {".".join(path): value for path, value in map(parse_override, given)}
    try:
        settings = JudgeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        known = JudgeSettings.model_fields
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f'judge settings: there is no "{name}"', todo=f"{nearest(name, known)}Known: {', '.join(known)}."
            ) from None
        raise ConfigError(
            f"judge settings: {name}: {first['msg'].lower()}, found {first.get('input')!r}",
            todo=f"{name}: {known[name].description}" if name in known else "Mend the value.",
        ) from None
    if (settings.prompt_price is None) != (settings.answer_price is None):
        raise ConfigError(
            "judge settings: one of prompt_price and answer_price is given", todo="Give both, in dollars for a million tokens."
        )
    if settings.max_cost is not None and settings.prompt_price is None:
        raise ConfigError(
            "judge settings: max_cost needs prices", todo="Give prompt_price and answer_price, or limit max_requests."
        )
    return settings


def check_settings_of(kind: str, settings: JudgeSettings) -> None:
    """ConfigError where a setting was given that judges of `kind` do not have."""
    foreign = sorted(settings.model_fields_set - set(SETTINGS_OF[kind]))
    if foreign:
        raise ConfigError(
            f'judge settings: "{foreign[0]}" does not apply to a judge of the kind {kind}:',
            todo=f"Remove it. A {kind} judge has: {', '.join(SETTINGS_OF[kind])}.",
        )


def settings_table() -> list[tuple[str, str, str, str]]:
    """(name, default, kinds of judge, what it does) of every setting, for the docs."""
    rows = []
    for name, field in JudgeSettings.model_fields.items():
        kinds = ", ".join(kind for kind, names in SETTINGS_OF.items() if name in names)
        default = "null" if field.default is None else str(field.default)
        what = str(field.description).removeprefix("endpoint: ").removeprefix("local: ")
        rows.append((name, default, kinds, what[0].upper() + what[1:]))
    return rows
