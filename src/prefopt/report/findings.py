"""Plain-language findings: each rule is a small function of what is known about a run, with its threshold named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prefopt.core.events import Event
from prefopt.report.history import (
    History,
    Interval,
    interval,
    num,
    number,
    part,
    percent,
    percent_spread,
    plural,
    spread,
    start_loss,
)

START_LOSS_TOLERANCE = 0.01  # bf16 noise moves the loss of a step by less; a wrong reference by far more
FEWEST_STEPS = 10  # a shorter run has had no time to show anything
FELL_NATS = 1.0  # less than that is within the noise of small runs
FAR_FALL_NATS = 20.0  # chosen responses became e^20 times less likely ...
FAR_FALL_NATS_PER_TOKEN = 0.1  # ... and each token of them 10 %; long responses alone must not trigger it
TRAIN_NEAR_ONE = 0.9
OVERFIT_GAP = 0.25
KL_LARGE_NATS = 25.0  # best-of-n with n = e^25 is out of reach: the policy is nowhere near its reference
LENGTH_GROWTH = 0.25  # rewards and judges favour length; a quarter more is visible to a reader
LENGTH_BIAS_AUC = 0.6  # length alone tells the chosen response in six of ten pairs
DIVERSITY_DROP = 0.3
UNFINISHED_RISE = 0.05
CLIPPED_SHARE = 0.5
DUPLICATE_SHARE = 0.01
CONTRADICTION_SHARE = 0.01
REFUSED_SHARE = 0.05
OVERLONG_SHARE = 0.05

Level = Literal["good", "note", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a run: how serious it is, what it means and what to do, and the numbers behind it."""

    level: Level
    text: str
    evidence: str


@dataclass(frozen=True)
class Known:
    """All that the rules look at. `evaluation` and `audit` are empty where the run has none."""

    history: History
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def heldout_accuracy(self) -> Interval | None:
        """From `prefopt evaluate` where there is one, else from the last evaluation during training."""
        return interval(part(self.evaluation, "heldout", "accuracy")) or self.history.heldout_accuracy()


def findings(
    events: Sequence[Event],
    evaluation: Mapping[str, Any] | None,
    audit: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> list[Finding]:
    """Everything worth saying about a run: warnings first, then what went well, then notes. Pure."""
    known = Known(History(events), evaluation or {}, audit or {}, config or {})
    found = [finding for rule in RULES if (finding := rule(known)) is not None]
    return sorted(found, key=lambda finding: ("warning", "good", "note").index(finding.level))


def start_differs(known: Known) -> Finding | None:
    """Policy == reference at the first step, so its loss is known exactly."""
    expected, first = start_loss(known.config), next(iter(known.history.steps), None)
    if expected is None or first is None or first["step"] > 1 or part(known.config, "reference", "model"):
        return None
    loss = number(first.get("loss"))
    if loss is None or abs(loss - expected) <= START_LOSS_TOLERANCE * max(1.0, expected):
        return None
    return Finding(
        "warning",
        "The first step does not start where it must: with the policy equal to its reference the loss is known exactly."
        " The reference log-probs belong to other weights or other tokens, or dropout is on. Delete the reference cache"
        " and run `prefopt selfcheck` before you trust this run.",
        f"loss at step {first['step']}: {loss:.4f}; expected {expected:.4f}",
    )


def loss_stuck(known: Known) -> Finding | None:
    """A loss that ends where it began has learned nothing."""
    expected, history = start_loss(known.config), known.history
    heldout = len(history.series("eval/loss")[1]) > 1
    loss = history.last("eval/loss") if heldout else history.final("loss")
    if expected is None or loss is None or len(history.steps) < FEWEST_STEPS or loss < expected:
        return None
    return Finding(
        "warning",
        f"The {'held-out' if heldout else 'training'} loss is not below its start: the model has learned nothing that"
        " carries over. Try a learning rate three times larger or more steps; if the training loss did fall, train for"
        " fewer epochs or with more data.",
        f"{'held-out' if heldout else 'training'} loss at the end {loss:.4f}; at the start {expected:.4f}",
    )


def overfitted(known: Known) -> Finding | None:
    """Near-perfect on its own rows, much worse on others."""
    train, heldout = known.history.final("rewards/accuracies"), known.heldout_accuracy()
    if train is None or heldout is None or train < TRAIN_NEAR_ONE:
        return None
    if not (heldout[1] <= 0.5 <= heldout[2]) and train - heldout[0] <= OVERFIT_GAP:
        return None
    return Finding(
        "warning",
        "Over-fitted: the model tells its training pairs apart almost perfectly and held-out pairs much worse."
        " Train for fewer epochs, with a lower learning rate or with more pairs.",
        f"accuracy on training pairs {percent(train)}, held-out {percent(heldout[0])} ({percent_spread(heldout)})",
    )


def heldout_evidence(known: Known) -> Finding | None:
    """Whether held-out accuracy can be told from a coin."""
    heldout = known.heldout_accuracy()
    if heldout is None:
        return None
    evidence = f"held-out accuracy {percent(heldout[0])} ({percent_spread(heldout)}, {plural(heldout[3], 'pair')})"
    if heldout[1] > 0.5:
        return Finding("good", "The model has learned the preference: it ranks held-out pairs better than chance.", evidence)
    if heldout[2] < 0.5:
        text = "The model ranks held-out pairs the wrong way round. Check whether chosen and rejected are swapped in one of the files."
        return Finding("warning", text, evidence)
    text = (
        "No evidence of learning: held-out accuracy cannot be told from chance. Use more held-out pairs for a narrower"
        " interval, or train longer or with a larger learning rate."
    )
    return Finding("warning", text, evidence)


def log_probs_fell(known: Known) -> Finding | None:
    """The likelihood of both responses falls in DPO; of the chosen one it should not fall far."""
    chosen, rejected = _drift(known.history, "chosen"), _drift(known.history, "rejected")
    if chosen is None or rejected is None:
        return None
    tokens = known.history.final("lengths/chosen")
    per_token = -chosen / tokens if tokens else FAR_FALL_NATS_PER_TOKEN * 2
    evidence = f"log-prob of chosen {num(chosen, sign=True)} nats a response, of rejected {num(rejected, sign=True)}"
    if tokens:
        evidence += f"; chosen {num(-per_token, sign=True)} nats a token"
    if -chosen > FAR_FALL_NATS and per_token > FAR_FALL_NATS_PER_TOKEN:
        return Finding(
            "warning",
            "The chosen responses themselves became much less likely: the run is probably over-optimised."
            " Try a larger beta, a smaller learning rate or fewer steps, or a loss with an SFT term.",
            evidence,
        )
    if -chosen >= FELL_NATS and -rejected >= FELL_NATS and chosen > rejected:
        return Finding(
            "note",
            "Both responses became less likely and the rejected one more so: usual for DPO, which only learns their difference.",
            evidence,
        )
    return None


def _drift(history: History, side: str) -> float | None:
    """Change of a side's log-prob in nats a response: on the same held-out rows, else against the reference's start."""
    change = history.change(f"eval/logps/{side}")
    if change is not None or len(history.steps) < FEWEST_STEPS:
        return change
    return history.final(f"drift/{side}")


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


def clipped(known: Known) -> Finding | None:
    """Where most gradients are clipped, the clip sets the step size."""
    limit, norms = number(part(known.config, "train", "max_grad_norm")), known.history.series("grad_norm")[1]
    if not limit or len(norms) < FEWEST_STEPS:
        return None
    share = sum(norm > limit for norm in norms) / len(norms)
    if share <= CLIPPED_SHARE:
        return None
    return Finding(
        "note",
        "Most gradients were clipped. With Adam this is rarely harmful, but it hides how gradients grow: raise"
        " train.max_grad_norm or use more groups per step if the loss is unsteady.",
        f"gradient norm above {num(limit)} in {percent(share)} of the steps",
    )


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


def contradictions(known: Known) -> Finding | None:
    """The same pair with both labels."""
    count = number(part(known.audit, "contradictions", "count")) or 0
    if not count:
        return None
    share = _share_of_rows(known, count)
    text = "Some pairs occur with both labels. They cancel out at best: remove them, or set loss.label_smoothing to the share of wrong labels."
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


RULES: tuple[Callable[[Known], Finding | None], ...] = (
    start_differs,
    reward_change,
    win_rate,
    heldout_evidence,
    overfitted,
    loss_stuck,
    kl_large,
    log_probs_fell,
    longer,
    less_diverse,
    unfinished,
    leakage,
    length_bias,
    contradictions,
    duplicates,
    refused,
    overlong,
    clipped,
)
