"""Rules about how training went: its start, its losses, its accuracies, its log-probs."""

from __future__ import annotations

from prefopt.report.history import History, num, number, part, percent, perplexity
from prefopt.report.known import FEWEST_STEPS, Finding, Known

START_LOSS_TOLERANCE = 0.01  # bf16 noise moves the loss of a step by less; a wrong reference by far more
FELL_NATS = 1.0  # less than that is within the noise of small runs
FAR_FALL_NATS = 20.0  # chosen responses became e^20 times less likely ...
FAR_FALL_NATS_PER_TOKEN = 0.1  # ... and each token of them 10 %; long responses alone must not trigger it
TRAIN_NEAR_ONE = 0.9
OVERFIT_GAP = 0.25
PAST_BEST_SHARE = 0.2  # of what the held-out loss had gained since the start; less comes and goes between evaluations
CLIPPED_SHARE = 0.5


def start_differs(known: Known) -> Finding | None:
    """Policy == reference at the first step, so its loss is known exactly; a moving reference moves after it."""
    expected, first = known.start, next(iter(known.history.steps), None)
    if expected is None or first is None or first["step"] > 1 or known.wording.reward_model:
        return None
    loss = number(first.get("loss"))
    if (
        loss is None
        or part(known.config, "reference", "model")
        or abs(loss - expected) <= START_LOSS_TOLERANCE * max(1.0, expected)
    ):
        return None
    return Finding(
        "warning",
        "The first step does not start where it must: with the policy equal to its reference the loss is known exactly."
        " The reference log-probs belong to other weights or other tokens, or dropout is on. Delete the reference cache"
        " and run `prefopt selfcheck` before you trust this run.",
        f"loss at step {first['step']}: {loss:.4f}; expected {expected:.4f}",
    )


def loss_stuck(known: Known) -> Finding | None:
    """A loss that ends where it began has learned nothing; against a moving reference it begins anew with every move."""
    history = known.history
    if len(history.steps) < FEWEST_STEPS or known.wording.moving_reference:
        return None
    heldout = len(history.series("eval/loss")[1]) > 1
    at_start = history.at_start("eval/loss") if heldout else None
    start = known.start if at_start is None else at_start
    loss = history.last("eval/loss") if heldout else history.final("loss")
    if start is None or loss is None or loss < start:
        return None
    return Finding(
        "warning",
        f"The {'held-out' if heldout else 'training'} loss is not below its start: the model has learned nothing that"
        " carries over. Try a learning rate three times larger or more steps; if the training loss did fall, train for"
        " fewer epochs or with more data.",
        f"{'held-out' if heldout else 'training'} loss at the end {loss:.4f}; at the start {start:.4f}",
    )


def imitation(known: Known) -> Finding | None:
    """What imitation has to show for itself: held-out demonstrations that became likelier. It has no accuracy."""
    history = known.history
    start, loss = history.at_start("eval/loss"), history.last("eval/loss")
    if not known.wording.imitates or start is None or loss is None or loss >= start:
        return None
    return Finding(
        "good",
        "The model has learned from the demonstrations: those held out became more likely.",
        f"held-out loss {num(start)} to {num(loss)} nats a token; perplexity {num(perplexity(start))} to {num(perplexity(loss))}",
    )


def past_best(known: Known) -> Finding | None:
    """A held-out loss that fell and rose again."""
    steps, losses = known.history.series("eval/loss")
    if len(losses) < 3 or known.wording.moving_reference:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    gained, lost = losses[0] - losses[best], losses[-1] - losses[best]
    if gained <= 0 or lost <= PAST_BEST_SHARE * gained:
        return None
    return Finding(
        "note",
        "The held-out loss was lowest before the end. It may rise while accuracy still does; if accuracy does not, train"
        " for fewer steps, or keep that checkpoint with train.keep_best=true.",
        f"held-out loss {losses[0]:.4f} at first, {losses[best]:.4f} at step {steps[best]:.0f}, {losses[-1]:.4f} at the end",
    )


def overfitted(known: Known) -> Finding | None:
    """Near-perfect on its own rows, much worse on others."""
    train, found = known.history.final("rewards/accuracies"), known.heldout_accuracy()
    if train is None or found is None or train < TRAIN_NEAR_ONE:
        return None
    heldout, wording = found
    if not (heldout[1] <= 0.5 <= heldout[2]) and train - heldout[0] <= OVERFIT_GAP:
        return None
    ranked = known.wording.words.ranked
    return Finding(
        "warning",
        f"Over-fitted: the model tells its training {ranked} apart almost perfectly and held-out {ranked} much worse."
        f" Train for fewer epochs, with a lower learning rate or with more {ranked}.",
        f"{known.wording.words.accuracy} in training {known.wording.share(train)}, {wording.heldout(heldout)}",
    )


def heldout_evidence(known: Known) -> Finding | None:
    """Whether held-out accuracy can be told from a coin."""
    found = known.heldout_accuracy()
    if found is None:
        return None
    heldout, wording = found
    words, evidence = wording.words, wording.heldout(heldout)
    if heldout[1] > 0.5:
        text = f"The model has learned the preference: it ranks held-out {words.ranked} better than chance."
        return Finding("good", text, evidence)
    if wording.moving_reference:
        text = (
            "Held-out accuracy compares with a reference that has followed the policy, so it need not be above chance."
            " `prefopt evaluate` compares with the model that the run began with."
        )
        return Finding("note", text, evidence)
    if heldout[2] < 0.5:
        text = f"The model ranks held-out {words.ranked} the wrong way round. Check whether {words.mix_up} in one of the files."
        return Finding("warning", text, evidence)
    text = (
        f"No evidence of learning: held-out {words.accuracy} cannot be told from chance. Use more held-out {words.row}s for a"
        " narrower interval, or train longer or with a larger learning rate."
    )
    return Finding("warning", text, evidence)


def log_probs_fell(known: Known) -> Finding | None:
    """The likelihood of both responses falls in DPO; of the chosen one it should not fall far."""
    chosen, rejected = _drift(known.history, "chosen"), _drift(known.history, "rejected")
    if chosen is None or rejected is None:
        return None
    good, other = known.wording.words.good, known.wording.words.other
    tokens = known.history.final("lengths/chosen")
    per_token = -chosen / tokens if tokens else FAR_FALL_NATS_PER_TOKEN * 2
    evidence = f"log-prob of {good} {num(chosen, sign=True)} nats a response, of {other} {num(rejected, sign=True)}"
    if tokens:
        evidence += f"; {good} {num(-per_token, sign=True)} nats a token"
    if -chosen > FAR_FALL_NATS and per_token > FAR_FALL_NATS_PER_TOKEN:
        return Finding(
            "warning",
            f"The {good} responses themselves became much less likely: the run is probably over-optimised."
            " Try a larger beta, a smaller learning rate or fewer steps, or a loss with an SFT term.",
            evidence,
        )
    if -chosen >= FELL_NATS and -rejected >= FELL_NATS and chosen > rejected:
        return Finding(
            "note",
            f"The {good} and the {other} responses became less likely, the {other} more so: usual for preference losses,"
            " which learn the difference.",
            evidence,
        )
    return None


def _drift(history: History, side: str) -> float | None:
    """Change of a side's log-prob in nats a response: on the same held-out rows, else against the reference's start.

    None where the reference has moved since: drift is no longer logged then, and its last value is an old one.
    """
    change = history.change(f"eval/logps/{side}")
    if change is not None or len(history.steps) < FEWEST_STEPS:
        return change
    steps = history.series(f"drift/{side}")[0]
    return history.final(f"drift/{side}") if steps and steps[-1] == history.steps[-1]["step"] else None


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
