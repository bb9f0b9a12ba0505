"""DPO, PPO and IPO on bandits with a known reward, where theory says where each must end.

    python recipes/paper/bandit.py            # about a minute: table, bandit.json, bandit.png in runs/paper/bandit
    python recipes/paper/bandit.py --quick    # fewer seeds

A bandit has P prompts and V responses of one token. Optima are compared with closed forms; then labels are drawn, and the
distance to the optimum is measured against their number. Losses are those of `prefopt.objective`, in float64, minimised
by LBFGS over a table of logits. Shapes: P prompts, V responses.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from prefopt.core.files import check_writable, whole_file, write_json
from prefopt.objective.pairs import dpo, ipo
from prefopt.objective.policy_gradient import ppo
from prefopt.objective.reward import reward as reward_model_loss

PairLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class Bandit:
    """`reward_PV`: what a response is worth. `reference_PV`: log-probs of the reference. `beta`: price of a nat of KL."""

    reward_PV: Tensor
    reference_PV: Tensor
    beta: float

    @property
    def preference_PVV(self) -> Tensor:
        """P(i is preferred to j) = sigmoid(r_i - r_j): Bradley-Terry, arXiv 2305.18290 eq. 1."""
        return torch.sigmoid(self.reward_PV[:, :, None] - self.reward_PV[:, None, :])


def random_bandit(prompts: int, responses: int, *, beta: float, spread: float = 1.0, seed: int = 0) -> Bandit:
    """Rewards and reference logits drawn from normal distributions, rewards with the standard deviation `spread`."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, prompts, responses, generator=random, dtype=torch.float64)
    return Bandit(spread * drawn[0], drawn[1].log_softmax(1), beta)


def deterministic(bandit: Bandit) -> Tensor:
    """Preferences (P, V, V) without doubt: the larger reward always wins."""
    return 0.5 + 0.5 * torch.sign(bandit.reward_PV[:, :, None] - bandit.reward_PV[:, None, :])


def rlhf_optimum(bandit: Bandit) -> Tensor:
    """Log-probs (P, V) that maximise E[r] - beta KL(policy || reference): reference exp(r / beta) / Z; arXiv 2305.18290 eq. 4."""
    return (bandit.reference_PV + bandit.reward_PV / bandit.beta).log_softmax(1)


def ipo_optimum(bandit: Bandit, preference_PVV: Tensor) -> Tensor:
    """Log-probs (P, V) that minimise IPO's expected loss over pairs that are drawn evenly: reference exp(w / beta) / Z.

    w_i is the mean over all j of P(i is preferred to j), with 1/2 for itself. With h the difference of the two
    log-ratios, a pair (i, j) costs, over its label, p (h - c)^2 + (1 - p) (h + c)^2, c = 1 / (2 beta). That is
    (h - (2 p - 1) c)^2 plus a constant, so h is pulled to (p_ij - 1/2) / beta; the least squares of all pairs have
    log-ratios (w_i - 1/2) / beta, up to a constant. It is arXiv 2310.12036 eq. 7 with Psi the identity and a uniform mu.
    """
    return (bandit.reference_PV + preference_PVV.mean(2) / bandit.beta).log_softmax(1)


def pair_loss(loss: PairLoss, bandit: Bandit, weight_PVV: Tensor, **knobs: Any) -> Callable[[Tensor], Tensor]:
    """The sum over ordered pairs of weight_PVV[p, i, j] * loss(i chosen, j rejected), as a function of the logits."""
    first, second = (~torch.eye(weight_PVV.shape[1], dtype=torch.bool)).nonzero(as_tuple=True)

    def total(logits_PV: Tensor) -> Tensor:
        ratio_PV = logits_PV.log_softmax(1) - bandit.reference_PV
        return (weight_PVV[:, first, second] * loss(ratio_PV[:, first], ratio_PV[:, second], beta=bandit.beta, **knobs)).sum()

    return total


def rl_loss(bandit: Bandit) -> Callable[[Tensor], Tensor]:
    """-(E[r] - beta KL(policy || reference)), summed over prompts: what PPO maximises, as a function of the logits."""

    def total(logits_PV: Tensor) -> Tensor:
        logp_PV = logits_PV.log_softmax(1)
        return -(logp_PV.exp() * (bandit.reward_PV - bandit.beta * (logp_PV - bandit.reference_PV))).sum()

    return total


def ppo_surrogate(bandit: Bandit, logits_PV: Tensor, old_PV: Tensor, *, clip: float = 0.2) -> Tensor:
    """PPO's clipped loss, its expectation over samples of the policy with log-probs `old_PV` taken exactly.

    As in training, the price of KL is part of the reward, and the advantage is the reward less its mean.
    """
    reward_PV = bandit.reward_PV - bandit.beta * (old_PV - bandit.reference_PV)
    advantage_PV = reward_PV - (old_PV.exp() * reward_PV).sum(1, keepdim=True)
    none = torch.zeros_like(old_PV)
    loss_PV = ppo(logits_PV.log_softmax(1), old_PV, advantage_PV, none, none, none, clip=clip, value_weight=0.0)
    return (old_PV.exp() * loss_PV).sum()


def ppo_rounds(bandit: Bandit, *, rounds: int = 1500, epochs: int = 4, lr: float = 0.5) -> Tensor:
    """Log-probs (P, V) after rounds of `epochs` steps of gradient descent on PPO's clipped loss, from the reference.

    Within a round the price of KL is that of its first policy: steps much longer than these swing about the optimum.
    """
    logits_PV = bandit.reference_PV.clone().requires_grad_()
    for _ in range(rounds):
        old_PV = logits_PV.detach().log_softmax(1)
        for _ in range(epochs):
            (gradient_PV,) = torch.autograd.grad(ppo_surrogate(bandit, logits_PV, old_PV), logits_PV)
            with torch.no_grad():
                logits_PV -= lr * gradient_PV
    return logits_PV.detach().log_softmax(1)


def minimise(loss: Callable[[Tensor], Tensor], start_PV: Tensor, *, steps: int = 2000) -> Tensor:
    """The logits at which LBFGS, from `start_PV`, finds no slope any more, or after `steps` where there is no minimum."""
    logits_PV = start_PV.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits_PV], max_iter=steps, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0.0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits_PV)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return logits_PV.detach()


def solved(loss: PairLoss, bandit: Bandit, weight_PVV: Tensor, *, steps: int = 2000) -> Tensor:
    """Log-probs (P, V) of the policy that minimises a loss of pairs with these weights, from the reference."""
    total = weight_PVV.sum()
    return minimise(pair_loss(loss, bandit, weight_PVV / total), bandit.reference_PV, steps=steps).log_softmax(1)


def reward_model(bandit: Bandit, weight_PVV: Tensor) -> Tensor:
    """Rewards (P, V) that are most likely for these labels, by the loss of reward models without centring."""

    def scored(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
        return reward_model_loss(chosen, rejected, torch.zeros_like(chosen), centering=0.0)

    plain = Bandit(bandit.reward_PV, torch.zeros_like(bandit.reference_PV), bandit.beta)
    return minimise(pair_loss(scored, plain, weight_PVV / weight_PVV.sum()), torch.zeros_like(bandit.reward_PV))


def draw_labels(bandit: Bandit, count: int, random: np.random.Generator) -> Tensor:
    """Counts (P, V, V) of i preferred to j among `count` labels a prompt, of two different responses drawn evenly."""
    prompts, responses = bandit.reward_PV.shape
    preference = bandit.preference_PVV.numpy()
    counts = np.zeros((prompts, responses, responses))
    for prompt in range(prompts):
        one = random.integers(responses, size=count)
        other = (one + random.integers(1, responses, size=count)) % responses
        wins = random.random(count) < preference[prompt, one, other]
        np.add.at(counts[prompt], (np.where(wins, one, other), np.where(wins, other, one)), 1)
    return torch.from_numpy(counts)


def has_finite_optimum(counts_PVV: Tensor) -> bool:
    """Whether DPO has an optimum on these labels: however responses are split in two, each side won somewhere.

    That is Ford's condition (1957) for Bradley-Terry: the graph of wins is strongly connected for every prompt.
    """
    return all(connected_components(counts_VV.numpy() > 0, connection="strong")[0] == 1 for counts_VV in counts_PVV)


def distance(one_PV: Tensor, other_PV: Tensor) -> float:
    """Total variation of two policies given as log-probs, from 0 to 1, averaged over prompts."""
    return float(0.5 * (one_PV.exp() - other_PV.exp()).abs().sum(1).mean())


def described(bandit: Bandit, policy_PV: Tensor, theory_PV: Tensor) -> dict[str, float]:
    """What a policy earns and costs, averaged over prompts, and how far it is from theory."""
    kl = float((policy_PV.exp() * (policy_PV - bandit.reference_PV)).sum(1).mean())
    earned = float((policy_PV.exp() * bandit.reward_PV).sum(1).mean())
    return {
        "reward": earned,
        "kl": kl,
        "objective": earned - bandit.beta * kl,
        "largest_difference_from_theory": float((policy_PV.exp() - theory_PV.exp()).abs().max()),
    }


def exact_part(bandit: Bandit) -> dict[str, Any]:
    """Where each method ends on infinitely many labels, and where theory says it ends."""
    labels, optimum = bandit.preference_PVV, rlhf_optimum(bandit)
    of_ipo = ipo_optimum(bandit, labels)
    found = {
        "reference": (bandit.reference_PV, bandit.reference_PV),
        "RLHF, closed form": (optimum, optimum),
        "PPO's objective": (minimise(rl_loss(bandit), bandit.reference_PV).log_softmax(1), optimum),
        "PPO, clipped rounds": (ppo_rounds(bandit), optimum),
        "DPO": (solved(dpo, bandit, labels), optimum),
        "IPO": (solved(ipo, bandit, labels), of_ipo),
        "IPO, closed form": (of_ipo, of_ipo),
    }
    return {
        "beta": bandit.beta,
        "rewards": bandit.reward_PV.tolist(),
        "policies": {name: policy_PV.exp().tolist() for name, (policy_PV, _) in found.items()},
        "methods": {name: described(bandit, *both) for name, both in found.items()},
    }


def deterministic_part(bandit: Bandit, *, steps: int) -> dict[str, Any]:
    """Gradient descent on preferences without doubt: the largest log-ratio between two responses, step by step."""
    labels = deterministic(bandit)
    marks = sorted({round(10 ** (power / 8)) for power in range(int(8 * math.log10(steps)) + 1)})
    curves: dict[str, list[float]] = {}
    for name, loss, lr in (("DPO", dpo, 1.0), ("IPO", ipo, 0.1)):
        logits_PV, curves[name] = bandit.reference_PV.clone().requires_grad_(), []
        total = pair_loss(loss, bandit, labels / labels.sum())
        for step in range(1, steps + 1):
            (gradient_PV,) = torch.autograd.grad(total(logits_PV), logits_PV)
            with torch.no_grad():
                logits_PV -= lr * gradient_PV
            if step in marks:
                curves[name].append(widest(bandit, logits_PV.detach().log_softmax(1)))
    return {"steps": marks, "widest_log_ratio": curves, "ipo_theory": widest(bandit, ipo_optimum(bandit, labels))}


def widest(bandit: Bandit, policy_PV: Tensor) -> float:
    """The largest difference of log(policy / reference) between two responses of a prompt, in nats."""
    ratio_PV = policy_PV - bandit.reference_PV
    return float((ratio_PV.max(1).values - ratio_PV.min(1).values).max())


def finite_part(bandit: Bandit, *, counts: list[int], seeds: int) -> dict[str, Any]:
    """Distance to each method's own optimum against the number of labels a prompt, of every seed."""
    optima = {"DPO": (dpo, rlhf_optimum(bandit)), "IPO": (ipo, ipo_optimum(bandit, bandit.preference_PVV))}
    errors: dict[str, list[list[float]]] = {name: [] for name in optima}
    without: list[float] = []
    for count in counts:
        drawn = [draw_labels(bandit, count, np.random.default_rng([seed, count])) for seed in range(seeds)]
        without.append(sum(not has_finite_optimum(labels) for labels in drawn) / seeds)
        for name, (loss, optimum) in optima.items():
            errors[name].append([distance(solved(loss, bandit, labels, steps=200), optimum) for labels in drawn])
    slopes = {name: slope(counts, rows) for name, rows in errors.items()}
    return {"labels": counts, "seeds": seeds, "distance": errors, "slope": slopes, "without_finite_optimum": without}


def slope(counts: list[int], errors: list[list[float]]) -> float:
    """Slope of log(mean distance) in log(number of labels) over the upper half of the counts; -1/2 for 1 / sqrt(n)."""
    upper = len(counts) // 2
    means = [float(np.mean(row)) for row in errors[upper:]]
    return float(np.polyfit(np.log(counts[upper:]), np.log(means), 1)[0])


def table(exact: dict[str, Any]) -> str:
    """The exact part as Markdown."""
    lines = [
        "| policy | E[r] | KL, nats | E[r] - beta KL | largest difference from theory, in probability |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in exact["methods"].items():
        lines.append(
            f"| {name} | {row['reward']:.4f} | {row['kl']:.4f} | {row['objective']:.4f} |"
            f" {row['largest_difference_from_theory']:.1e} |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure: where each method ends, preferences without doubt, and finite data."""
    from bandit_figure import figure

    with whole_file(path) as partial:
        figure(result).savefig(partial, format="png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/paper/bandit"), help="folder of bandit.json and bandit.png")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps")
    args = parser.parse_args()
    check_writable(args.output)
    torch.set_num_threads(1)
    one, several = random_bandit(1, 8, beta=0.7, seed=4), random_bandit(3, 5, beta=0.7, seed=1)
    counts = [round(16 * 2**power) for power in range(0, 11, 2 if args.quick else 1)]
    result = {
        "one prompt, 8 responses": exact_part(one),
        "3 prompts, 5 responses": exact_part(several),
        "deterministic": deterministic_part(one, steps=1_000 if args.quick else 10_000),
        "finite": finite_part(several, counts=counts, seeds=5 if args.quick else 40),
    }
    write_json(args.output / "bandit.json", result)
    draw(result, args.output / "bandit.png")
    for name in ("one prompt, 8 responses", "3 prompts, 5 responses"):
        print(f"{name}, beta {result[name]['beta']:g}\n\n{table(result[name])}\n")
    last = {name: curve[-1] for name, curve in result["deterministic"]["widest_log_ratio"].items()}
    print(
        f"Preferences without doubt, widest log-ratio after {result['deterministic']['steps'][-1]} steps: DPO {last['DPO']:.1f}"
    )
    print(f"and rising, IPO {last['IPO']:.4f} (theory {result['deterministic']['ipo_theory']:.4f}), in nats.")
    slopes = ", ".join(f"{name} {value:.2f}" for name, value in result["finite"]["slope"].items())
    print(f"Finite labels: distance to the optimum falls as n to the power of: {slopes}.")
    print(f"{args.output / 'bandit.json'}, {args.output / 'bandit.png'}")


if __name__ == "__main__":
    main()
