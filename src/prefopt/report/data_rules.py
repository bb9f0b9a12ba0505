"""Rules about the rows: what the audit found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefopt.core.losses.facts import Value
from prefopt.core.losses.table import parts_of_section
from prefopt.report.history import number, part, percent, plural
from prefopt.report.known import Finding, Known, Level

LENGTH_BIAS_AUC = 0.6  # length alone tells the chosen response in six of ten pairs
DUPLICATE_SHARE = 0.01
CONTRADICTION_SHARE = 0.01
REFUSED_SHARE = 0.05
OVERLONG_SHARE = 0.05
PARTLY_CUT_SHARE = 0.05
RARE_CLASS_SHARE = 0.1


def length_bias(known: Known) -> Finding | None:
    """Pairs in which length gives the answer away teach length."""
    auc = number(part(known.audit, "length_bias", "auc"))
    if auc is None or 1 - LENGTH_BIAS_AUC <= auc <= LENGTH_BIAS_AUC:
        return None
    longer_side = auc > 0.5
    longer_share = number(part(known.audit, "length_bias", "chosen_longer"))
    share = f"; chosen is longer in {percent(longer_share)} of the pairs" if longer_share is not None else ""
    return Finding(
        "warning" if longer_side else "note",
        f"In the data the {'longer' if longer_side else 'shorter'} response is usually the chosen one, so the model can learn"
        " length instead of quality. Balance the pairs by length, or watch the length of the samples.",
        f"AUC of the length difference {auc:.2f} (0.50: no information){share}",
    )


def _share_of_rows(known: Known, count: float) -> float:
    return count / (number(known.audit.get("rows")) or count)


def duplicates(known: Known) -> Finding | None:
    """The same row again counts twice and can leak into the held-out rows."""
    count = number(part(known.audit, "duplicates", "count")) or 0
    if not count:
        return None
    share = _share_of_rows(known, count)
    text = "Rows occur more than once in the data: each copy counts again. Remove them if they were not meant as weights."
    return Finding(
        "warning" if share > DUPLICATE_SHARE else "note",
        text,
        f"{plural(int(count), 'duplicate')} ({percent(share)} of the rows)",
    )


_BOTH_WAYS = {
    "pair": "Some pairs occur with both labels.",
    "response": "Some responses occur with both labels.",
    "prompt": "Some responses are preferred to each other both ways.",
}


def contradictions(known: Known) -> Finding | None:
    """The same responses with both labels, or preferred both ways."""
    count = number(part(known.audit, "contradictions", "count")) or 0
    if not count:
        return None
    share = _share_of_rows(known, count)
    losses = [one.facts for one in parts_of_section(part(known.config, "loss"))]
    smoothed = any("label_smoothing" in facts.knobs for facts in losses)
    text = f"{_BOTH_WAYS.get(known.wording.words.row, _BOTH_WAYS['pair'])} They cancel out at best: remove them" + (
        ", or set loss.label_smoothing to the share of wrong labels." if smoothed else "."
    )
    level: Level = "warning" if share > CONTRADICTION_SHARE else "note"
    return Finding(level, text, f"{plural(int(count), 'contradiction')} ({percent(share)} of the rows)")


def leakage(known: Known) -> Finding | None:
    """Held-out prompts that were trained on."""
    prompts, groups = (int(number(part(known.audit, "leakage", key)) or 0) for key in ("prompts", "groups"))
    if not prompts and not groups:
        return None
    return Finding(
        "warning",
        "Held-out rows share prompts with the training rows, so held-out numbers are too good. Split by prompt.",
        f"{plural(prompts, 'prompt')} and {plural(groups, 'whole row')} shared with {part(known.audit, 'leakage', 'against')}",
    )


def refused(known: Known) -> Finding | None:
    """Rows that could not be used."""
    reasons = known.audit.get("refused") or {}
    counts = {reason: int(number(part(entry, "count")) or 0) for reason, entry in reasons.items()}
    total = sum(counts.values())
    if not total or _share_of_rows(known, total) <= REFUSED_SHARE:
        return None
    listed = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
    text = "A visible share of the rows was refused; the data section names examples. Mend them or make sure that they are not special."
    return Finding("warning", text, f"{plural(total, 'row')} of {int(known.audit.get('rows') or total):,}: {listed}")


def overlong(known: Known) -> Finding | None:
    """Rows over the token budget."""
    over, groups = (number(value) for value in (part(known.audit, "truncation", "groups_over"), known.audit.get("groups")))
    if not over or not groups or over / groups <= OVERLONG_SHARE:
        return None
    return Finding(
        "warning",
        "Many rows are over the token budget. Raise data.max_prompt_tokens or data.max_response_tokens if memory allows.",
        f"{int(over):,} of {int(groups):,} groups; on_overlong: {part(known.audit, 'truncation', 'on_overlong')}",
    )


def partly_cut(known: Known) -> Finding | None:
    """Responses that were cut beside ones that end: telling them apart needs no preference."""
    cut = part(known.audit, "truncation") or {}
    partly, groups = (number(value) for value in (cut.get("partly_over"), known.audit.get("groups")))
    if cut.get("on_overlong") != "truncate" or not partly or not groups or partly / groups <= PARTLY_CUT_SHARE:
        return None
    return Finding(
        "warning",
        "In many groups one response was cut and another ends. Which of them ends can be learned instead of which is better: set"
        " data.on_overlong=drop, or raise data.max_response_tokens.",
        f"{int(partly):,} of {int(groups):,} groups; cut at {cut.get('max_response_tokens')} tokens",
    )


def rare_class(known: Known) -> Finding | None:
    """Labels nearly all of one class: the loss hardly sees the other one. Weights of the classes are counted in."""
    labels = part(known.audit, "feedback", "labels") or {}
    good, bad = (int(number(labels.get(key)) or 0) for key in ("desirable", "undesirable"))
    weights = [one.knobs for one in parts_of_section(part(known.config, "loss")) if "desirable_weight" in one.knobs]
    of_good, of_bad = good * _weight(weights, "desirable_weight"), bad * _weight(weights, "undesirable_weight")
    rare, name = min((of_good, "desirable"), (of_bad, "undesirable"))
    if known.wording.imitates or not of_good + of_bad or rare / (of_good + of_bad) >= RARE_CLASS_SHARE:
        return None
    todo = (
        "Set loss.desirable_weight and loss.undesirable_weight so that both count about the same, or" if weights else "Try to"
    )
    return Finding(
        "note",
        f"Few responses are {name}, so the loss is mostly of the others. {todo} find more of them.",
        f"{good:,} desirable and {bad:,} undesirable responses",
    )


def _weight(knobs: Sequence[Mapping[str, Value]], key: str) -> float:
    return float(knobs[0][key]) if knobs else 1.0
