"""Rules about what `prefopt evaluate` measured: reward, win rate, KL, length, diversity, unfinished responses."""

from __future__ import annotations

from prefopt.report.history import interval, num, number, part, percent, percent_spread, plural, spread
from prefopt.report.known import Finding, Known

KL_LARGE_NATS = 25.0  # best-of-n with n = e^25 is out of reach: the policy is nowhere near its reference
LENGTH_GROWTH = 0.25  # rewards and judges favour length; a quarter more is visible to a reader
DIVERSITY_DROP = 0.3
UNFINISHED_RISE = 0.05


def reward_change(known: Known) -> Finding | None:
    """The policy's reward against the reference's on the same prompts."""
    difference = interval(part(known.evaluation, "reward", "difference"))
    if difference is None:
        return None
    name = part(known.evaluation, "reward", "name") or "the reward"
    evidence = f"{name}: difference {num(difference[0], sign=True)} ({spread(difference, sign=True)}, {plural(difference[3], 'prompt')})"
    if difference[1] > 0:
        return Finding("good", "Improved: the policy's responses earn more reward than the reference's.", evidence)
    if difference[2] < 0:
        text = "Worse: the policy's responses earn less reward than the reference's. Look at the samples before anything else."
        return Finding("warning", text, evidence)
    text = "No measurable change of the reward: its interval includes 0. Evaluate on more prompts to narrow it."
    return Finding("note", text, evidence)


def win_rate(known: Known) -> Finding | None:
    """Whether the policy beats its reference in more than half of the comparisons."""
    rate = interval(part(known.evaluation, "win_rate", "rate"))
    if rate is None or rate[1] <= 0.5 <= rate[2]:
        return None
    wins, losses, ties = (part(known.evaluation, "win_rate", key) for key in ("wins", "losses", "ties"))
    evidence = f"win rate {percent(rate[0])} ({percent_spread(rate)}): {wins} won, {losses} lost, {ties} tied"
    if rate[1] > 0.5:
        return Finding("good", "The policy wins more comparisons than it loses against its reference.", evidence)
    return Finding("warning", "The policy loses more comparisons than it wins against its reference.", evidence)


def kl_large(known: Known) -> Finding | None:
    """Far from the reference, rewards and log-ratios mean little."""
    kl = number(part(known.evaluation, "kl", "per_response", "value"))
    if kl is None or kl <= KL_LARGE_NATS:
        return None
    return Finding(
        "warning",
        "The policy has moved far from its reference. Read the samples for damage, and try a larger beta, a smaller"
        " learning rate or an earlier checkpoint: much of the gain usually comes at a fraction of this KL.",
        f"KL {num(kl)} nats a response; large is above {KL_LARGE_NATS:.0f}",
    )


def longer(known: Known) -> Finding | None:
    """Length is the cheapest way to please a reward or a judge."""
    policy, reference = (number(part(known.evaluation, "length", side, "value")) for side in ("policy", "reference"))
    if policy is None or not reference or policy <= (1 + LENGTH_GROWTH) * reference:
        return None
    return Finding(
        "warning",
        "Responses grew much longer: part of any gain may be length alone. Compare at equal length, balance length in"
        " the pairs, or use a length-normalised loss.",
        f"{num(policy)} tokens a response against the reference's {num(reference)} ({num(100 * (policy / reference - 1), sign=True)} %)",
    )


def less_diverse(known: Known) -> Finding | None:
    """Repetition and sameness show as fewer distinct pairs of words."""
    policy, reference = (number(part(known.evaluation, "diversity", side, "distinct_2")) for side in ("policy", "reference"))
    if policy is None or not reference or policy >= (1 - DIVERSITY_DROP) * reference:
        return None
    return Finding(
        "warning",
        "Responses became less varied: look for repetition in the samples. Try a larger beta or fewer steps.",
        f"distinct_2 {num(policy)} against the reference's {num(reference)}",
    )


def unfinished(known: Known) -> Finding | None:
    """Responses that run into the token limit instead of ending."""
    policy, reference = (number(part(known.evaluation, "finished", side)) for side in ("policy", "reference"))
    if policy is None or reference is None or round(reference - policy, 9) <= UNFINISHED_RISE:
        return None
    return Finding(
        "warning",
        "More responses run into the token limit without ending. Check that responses in the data end with the"
        " end-of-turn token and were not truncated, or sample with a larger limit.",
        f"unfinished: {percent(1 - policy)} of the policy's responses, {percent(1 - reference)} of the reference's",
    )
