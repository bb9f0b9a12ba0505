"""A synthetic run with the shapes of a real one: 400 steps of DPO, evaluated, audited, sampled. Deterministic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.config import RunConfig
from prefopt.core.run_folder import RunFolder

STEPS, PAIRS, BETA = 400, 240, 0.1
STARTED = 1_767_225_600.0  # 2026-01-01 00:00 UTC


def interval(value: float, half: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def _step(step: int, rng: np.random.Generator) -> dict[str, Any]:
    grown = 1 - np.exp(-step / 150)
    chosen, rejected = -4.5 * grown + rng.normal(0, 1.2), -13.0 * grown + rng.normal(0, 1.5)
    if step == 1:
        chosen = rejected = 0.0
    margin = BETA * (chosen - rejected)
    accuracy = 0.5 if step == 1 else float(np.clip(rng.normal(0.5 + 0.25 * grown, 0.11), 0, 1))
    longer = rng.normal(142, 12)
    return {
        "loss": float(np.log1p(np.exp(-margin))),
        "rewards/chosen": BETA * chosen,
        "rewards/rejected": BETA * rejected,
        "rewards/margins": margin,
        "rewards/accuracies": round(accuracy * 16) / 16,
        "logps/chosen": -182 + chosen + rng.normal(0, 14),
        "logps/rejected": -171 + rejected + rng.normal(0, 14),
        "drift/chosen": chosen,
        "drift/rejected": rejected,
        "grad_norm": float(rng.gamma(9, 0.07)),
        "lr": 5e-7 * min(step / 40, (STEPS - step) / (STEPS - 40) if step > 40 else 1),
        "epoch": step / STEPS,
        "num_tokens": step * 5321,
        "tokens_per_second": 1830.0 + rng.normal(0, 40),
        "lengths/chosen": longer,
        "lengths/rejected": longer - 9 + rng.normal(0, 8),
        "step_seconds": 2.9,
    }


def _eval(step: int, noise: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    grown = 1 - np.exp(-step / 150)
    margins = BETA * grown * (7.5 + 11 * noise)
    accuracy = float(np.mean(margins > 0)) if step else 0.5
    return {
        "eval/loss": float(np.mean(np.log1p(np.exp(-margins)))),
        "eval/rewards/accuracies": accuracy,
        "eval/rewards/accuracies_low": accuracy - 0.06,
        "eval/rewards/accuracies_high": accuracy + 0.055,
        "eval/rewards/margins": float(margins.mean()),
        "eval/rewards/chosen": float(-0.45 * grown),
        "eval/rewards/rejected": float(-1.2 * grown),
        "eval/logps/chosen": float(-180 - 4.5 * grown),
        "eval/logps/rejected": float(-170 - 12.0 * grown),
        "eval/groups": PAIRS,
        "margins": [float(margin) for margin in margins],
    }


def synthetic_events(steps: int = STEPS) -> list[dict[str, Any]]:
    """Events of the run up to `steps`, with an end where it reaches 400."""
    rng = np.random.default_rng(7)
    noise = rng.normal(0, 1, PAIRS)
    events: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "total_steps": STEPS, "groups": 6400, "tokens": 2_130_000, "parameters": 134_515_008}
        | {"reference": "cached", "precision": "fp32", "device": "cpu"},
        {"kind": "eval", "step": 0, **_eval(0, noise)},
    ]
    for step in range(1, steps + 1):
        events.append({"kind": "step", "step": step, **_step(step, rng)})
        if step % 100 == 0:
            events.append({"kind": "eval", "step": step, **_eval(step, noise)})
        if step in (120, 130):
            events.append({"kind": "warning", "step": step, "message": "tensorboard: the sink failed and was switched off"})
    if steps == STEPS:
        events.append({"kind": "checkpoint", "step": steps, "path": "checkpoints/step-000400"})
        events.append({"kind": "end", "step": steps, "seconds": 1271.0})
    return [event | {"time": STARTED + 2.9 * event["step"]} for event in events]


def synthetic_evaluation() -> dict[str, Any]:
    return {
        "checkpoint": "checkpoints/step-000400",
        "settings": {"temperature": 1.0, "max_new_tokens": 256},
        "heldout": {
            "accuracy": interval(0.746, 0.056, PAIRS),
            "margin": interval(7.4, 1.3, PAIRS),
            "loss": 0.5731,
            "pairs": PAIRS,
        }
        | {"reference_accuracy": interval(0.521, 0.063, PAIRS)},
        "reward": {"name": "helpfulness", "policy": interval(0.813, 0.11), "reference": interval(0.402, 0.12)}
        | {"difference": interval(0.411, 0.094)},
        "win_rate": {"wins": 121, "losses": 64, "ties": 15, "rate": interval(0.6425, 0.065)},
        "kl": {
            "per_response": {"value": 6.82, "standard_error": 0.41, "n": 200},
            "per_token": {"value": 0.0437, "standard_error": 0.003},
        },
        "length": {"policy": interval(156.2, 9.4), "reference": interval(139.8, 8.8)},
        "finished": {"policy": 0.955, "reference": 0.94},
        "diversity": {
            "policy": {"distinct_1": 0.21, "distinct_2": 0.61},
            "reference": {"distinct_1": 0.22, "distinct_2": 0.64},
        },
    }


def synthetic_audit() -> dict[str, Any]:
    rng = np.random.default_rng(3)

    def tokens(mean: float) -> dict[str, Any]:
        values = rng.gamma(3, mean / 3, 6400).round()
        counts, edges = np.histogram(values, bins=40, range=(0, mean * 3.5))
        stats = {"min": values.min(), "median": np.median(values), "mean": values.mean(), "p95": np.quantile(values, 0.95)}
        stats |= {"max": values.max()}
        kept = {key: float(value) for key, value in stats.items()}
        return kept | {"histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}

    return {
        "data": "data/train.jsonl",
        "shape": "pair",
        "rows": 6500,
        "groups": 6400,
        "refused": {
            "empty response": {"count": 61, "examples": ["train.jsonl:17: empty response (rejected: found '')"]},
            "chosen equals rejected": {"count": 39, "examples": ["train.jsonl:204", "train.jsonl:977"]},
        },
        "duplicates": {"count": 12, "examples": ["train.jsonl:310 repeats train.jsonl:12"]},
        "contradictions": {"count": 0, "examples": []},
        "tokens": {"prompt": tokens(64), "chosen": tokens(142), "rejected": tokens(131)},
        "truncation": {"max_prompt_tokens": 512, "max_response_tokens": 512, "on_overlong": "drop"}
        | {"prompts_over": 4, "responses_over": 22, "groups_over": 25},
        "length_bias": {"pairs": 6400, "chosen_longer": 0.541, "low": 0.529, "high": 0.553, "auc": 0.553},
        "leakage": {"against": "data/eval.jsonl", "prompts": 0, "groups": 0, "examples": []},
        "special_text": {"rows": 3, "examples": ["train.jsonl:55"]},
    }


_PROMPTS = (
    "How do I keep basil alive indoors through the winter?",
    "Explain what a hash table is to a ten-year-old.",
    "My landlord has not returned my deposit. What should I do first?",
    "Write a two-line poem about a train at night.",
    "What does <script>alert('hello')</script> do in a web page?",
)
_POLICY = (
    "Give it the sunniest window you have, or a lamp for 12 hours a day. Water when the top centimetre of soil is dry, "
    "keep it above 10 °C, and pinch off the tips every week so that it branches.\n\nIf the leaves turn yellow, you are watering too much."
)
_REFERENCE = "Basil is a herb. It needs light and water. You can put it in a window. Basil is also used for pesto."


def synthetic_samples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(11)
    rows = []
    for index in range(40):
        prompt = _PROMPTS[index % len(_PROMPTS)]
        policy = "It runs <script>alert('hello')</script> as code & shows a box." if "<script>" in prompt else _POLICY
        rewards = {"policy_reward": float(rng.normal(0.8, 0.5)), "reference_reward": float(rng.normal(0.4, 0.5))}
        rows.append({"prompt": prompt, "policy": policy, "reference": _REFERENCE, **rewards, "kl": float(rng.normal(6.8, 2.9))})
    return rows


def write_events(run: RunFolder, events: list[dict[str, Any]]) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


def synthetic_config() -> dict[str, Any]:
    config = RunConfig.model_validate(
        {
            "data": {
                "train": "data/train.jsonl",
                "eval": "data/eval.jsonl",
                "max_prompt_tokens": 512,
                "max_response_tokens": 512,
            },
            "loss": {"name": "dpo", "beta": 0.1},
            "train": {"output_dir": "runs/helpful", "lr": 5e-7, "groups_per_step": 16, "eval_every_steps": 100},
        }
    )
    return config.resolved()


def write_run(path: Path) -> RunFolder:
    """The whole synthetic run at `path`."""
    run = RunFolder(path)
    write_events(run, synthetic_events())
    run.write("config.json", synthetic_config())
    run.write("evaluation.json", synthetic_evaluation())
    run.write("audit.json", synthetic_audit())
    packages = {"prefopt": "0.1.0", "torch": "2.9.1", "transformers": "5.23.0", "numpy": "2.3.4"}
    run.write(
        "env.json",
        {"python": "3.11.9", "platform": "Linux", "command": ["prefopt", "train"], "device": "cpu", "packages": packages},
    )
    run.write_samples(synthetic_samples())
    checkpoint = run.checkpoints / "step-000400"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"0" * 2_500_000)
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": 2_500_000}}), encoding="utf-8")
    return run
