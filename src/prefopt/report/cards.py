"""The key numbers of a run as cards: what it is worth, what it changed, how training ended."""

from __future__ import annotations

from prefopt.core.losses.table import parts_of_section
from prefopt.report.history import (
    History,
    Maybe,
    Row,
    duration,
    interval,
    num,
    number,
    part,
    percent,
    percent_spread,
    perplexity,
    plural,
    spread,
)
from prefopt.report.known import Known


def cards(known: Known) -> list[Row]:
    """Cards with a label, a value and a detail; those without numbers are left out."""
    found = (*_quality(known), *_change(known.evaluation), *_training(known))
    return [card for card in found if card]


def _card(label: str, value: str, detail: str = "") -> Row:
    return {"label": label, "value": value, "detail": detail}


def _quality(known: Known) -> list[Row | None]:
    evaluation = known.evaluation
    difference, rate = interval(part(evaluation, "reward", "difference")), interval(part(evaluation, "win_rate", "rate"))
    policy, reference = (interval(part(evaluation, "reward", side)) for side in ("policy", "reference"))
    levels = f"; {num(reference[0])}\u00a0→\u00a0{num(policy[0])}" if policy and reference else ""
    return [
        difference and _card("Reward difference", num(difference[0], sign=True), f"{spread(difference, sign=True)}{levels}"),
        rate and _card("Win rate", percent(rate[0]), f"{percent_spread(rate)}, {plural(rate[3], 'prompt')}"),
        _accuracy(known),
        _perplexity(known),
    ]


def _accuracy(known: Known) -> Row | None:
    found = known.heldout_accuracy()
    if found is None:
        return None
    value, said = found
    details = [said.share_spread(value), *([plural(value[3], said.words.row)] if value[3] else [])]
    details += [] if interval(part(known.evaluation, "heldout", "accuracy")) else ["last look in training"]
    label = "Held-out AUC" if said.is_area else "Held-out accuracy"
    return _card(label, said.share(value[0]), ", ".join(details) + (f"; {said.words.accuracy}" if said.is_area else ""))


def _perplexity(known: Known) -> Row | None:
    """exp of the imitation loss, which is in nats a token: held out, else in training."""
    history = known.history
    imitating = [one.name for one in parts_of_section(part(known.config, "loss")) if one.facts.unit == "token"]
    if not imitating:
        return None
    key = "loss" if known.wording.imitates else f"loss/{imitating[0]}"
    held_out = history.series(f"eval/{key}")[0]
    seen = f"eval/{key}" if held_out and held_out[-1] > 0 else key
    last, first = history.final(seen), history.first(seen)
    if last is None or first is None:
        return None
    title = "Held-out perplexity" if seen.startswith("eval/") else "Training perplexity"
    return _card(title, num(perplexity(last)), f"from {num(perplexity(first))}; {num(last)} nats a token")


def _change(evaluation: Maybe) -> list[Row | None]:
    kl, error = (number(part(evaluation, "kl", "per_response", key)) for key in ("value", "standard_error"))
    token = number(part(evaluation, "kl", "per_token", "value"))
    detail = [f"± {num(1.96 * error)} nats a response"] if error is not None else ["nats a response"]
    detail += [f"{num(token)} a token"] if token is not None else []
    cards: list[Row | None] = [_card("KL from reference", num(kl), "; ".join(detail)) if kl is not None else None]
    lengths = [interval(part(evaluation, "length", side)) for side in ("policy", "reference")]
    if lengths[0] and lengths[1]:
        cards.append(_card("Length", f"{num(lengths[0][0])} tokens", f"reference {num(lengths[1][0])} ({spread(lengths[1])})"))
    for label, keys, show in (
        ("Distinct word pairs", ("diversity", "distinct_2"), num),
        ("Finished responses", ("finished", ""), percent),
    ):
        values = [number(part(evaluation, keys[0], side, *filter(None, keys[1:]))) for side in ("policy", "reference")]
        if values[0] is not None and values[1] is not None:
            cards.append(_card(label, show(values[0]), f"reference {show(values[1])}"))
    return cards


def _training(known: Known) -> list[Row | None]:
    history, said = known.history, known.wording
    loss, first = history.final("loss"), history.first("loss")
    steps, margin = len(history.series("loss")[1]), history.final("rewards/margins")
    window = f"mean of last {plural(history.tail_steps(steps), 'step')}" if steps > 1 else "one step"
    evaluated, heldout = history.series("eval/loss")
    state, tokens, seconds = history.state(now=0.0), history.last("num_tokens"), _seconds(history)
    return [
        _card("Training loss", num(loss), f"from {num(first)}; {window}") if loss is not None and first is not None else None,
        _card("Held-out loss", num(heldout[-1]), f"from {num(heldout[0])} at step {evaluated[0]:.0f}")
        if len(heldout) > 1
        else None,
        _card("Training margin", num(margin, sign=True), f"{said.reward}, {said.words.difference}")
        if margin is not None
        else None,
        _card(
            "Steps",
            f"{state.step:,}" + (f" of {state.total_steps:,}" if state.total_steps > state.step else ""),
            ", ".join(([f"{tokens:,.0f} tokens"] if tokens else []) + ([duration(seconds)] if seconds else [])),
        ),
    ]


def _seconds(history: History) -> float:
    ends = [number(event.get("seconds")) for event in history.of_kind("end")]
    steps = history.series("step_seconds")[1]
    return (ends[-1] if ends else None) or sum(steps)
