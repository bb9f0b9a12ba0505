"""Rules about what `prefopt evaluate` found inside a run: which log-probs moved, what explains the margins, doubtful labels."""

from __future__ import annotations

from prefopt.report.history import interval, num, number, part, percent, percent_spread, spread
from prefopt.report.known import Finding, Known

CHOSEN_FELL_SHARE = 0.5  # of the pairs, with its whole interval
LENGTH_EXPLAINS = 0.25  # of the variance of the margins
DENIED = 0.1  # probability of a label that makes it doubtful


def likelihood_displaced(known: Known) -> Finding | None:
    """Chosen responses that became less likely than under the reference (arXiv 2410.08847)."""
    share = interval(part(known.evaluation, "diagnosis", "displacement", "chosen_fell"))
    moved = interval(part(known.evaluation, "diagnosis", "displacement", "chosen"))
    if share is None or moved is None or share[1] <= CHOSEN_FELL_SHARE:
        return None
    tokens = part(known.evaluation, "diagnosis", "displacement", "tokens_that_fell") or []
    named = ", ".join(f"{row['token']!r} {num(row['change'], sign=True)}" for row in tokens[:5])
    return Finding(
        "note",
        "Most held-out chosen responses have become less likely: the margin grows because rejected ones fall faster."
        " A part of sft in the loss (loss: {dpo: 1, sft: 0.2}) or dpop holds them up.",
        f"in {percent(share[0])} of pairs ({percent_spread(share)}), mean {num(moved[0], sign=True)} nats a response"
        + (f"; tokens that fell most: {named}" if named else ""),
    )


def length_explains(known: Known) -> Finding | None:
    """Margins that the difference of lengths foresees."""
    explained = number(part(known.evaluation, "diagnosis", "length", "explained"))
    if explained is None or explained <= LENGTH_EXPLAINS:
        return None
    slope, equal = (
        number(part(known.evaluation, "diagnosis", "length", key)) for key in ("nats_per_token", "margin_at_equal_length")
    )
    return Finding(
        "warning",
        "Much of the margin is length: the policy may have learned to prefer long (or short) responses rather than good"
        " ones. Try loss.ld_alpha, a length-normalised loss, or pairs of like length.",
        f"{percent(explained)} of the variance of margins; {num(slope or 0.0, sign=True)} nats a token;"
        f" {num(equal or 0.0, sign=True)} nats at equal length",
    )


def labels_denied(known: Known) -> Finding | None:
    """Pairs whose label the policy denies with confidence: the first to look at when labels may be wrong."""
    rows = part(known.evaluation, "diagnosis", "contradicted") or []
    doubtful = [row for row in rows if (number(row.get("probability_of_label")) or 1.0) < DENIED]
    if not doubtful:
        return None
    first = ", ".join(f"{row['source']} ({percent(row['probability_of_label'])})" for row in doubtful[:5])
    return Finding(
        "note",
        "Some held-out labels are denied with confidence: read these pairs. Where labels are noisy, cdpo or robust expect it.",
        f"{len(doubtful)} or more with a probability below {percent(DENIED)}: {first}",
    )


def satisfied_before(known: Known) -> Finding | None:
    """How many pairs the reference orders rightly by its log-probs alone, and how much is left to learn from each."""
    share = interval(part(known.evaluation, "diagnosis", "satisfied", "by_reference"))
    weight = number(part(known.evaluation, "diagnosis", "satisfied", "gradient_weight", "mean"))
    if share is None or weight is None:
        return None
    return Finding(
        "note",
        "The weight of a pair in DPO's gradient is sigmoid(-beta margin), one half at the start; what is already learned"
        " weighs little.",
        f"mean weight now {num(weight)}; the reference alone orders {percent(share[0])} of pairs as labelled ({percent_spread(share)})",
    )


def price_of_reward(known: Known) -> Finding | None:
    """Nats of KL for each standard deviation of reward gained, where samples were scored."""
    gained = interval(part(known.evaluation, "reward", "difference"))
    kl = number(part(known.evaluation, "kl", "per_response", "value"))
    if gained is None or kl is None or gained[1] <= 0:
        return None
    return Finding(
        "note",
        "What was paid for the gain; prefopt frontier compares it with other methods and betas.",
        f"{num(kl / gained[0])} nats of KL for each unit of reward ({num(kl)} nats for {spread(gained, sign=True)})",
    )
