"""Every method through its recipe on real rows: does its own held-out figure move the right way?

    python benchmarks/methods.py                       # all recipes, stories15M; one JSON line a run in methods.jsonl,
                                                       # which is not run again while it is there
    python benchmarks/methods.py --only kto sft reward
    python benchmarks/methods.py --table               # the table of what is in methods.jsonl

Rows, all real: pairs of LLaMA-Factory's demo file; PandaLM's pairs with the votes of three annotators where a loss needs a
margin (votes for less votes against), a probability (share of the votes) or ties; KTO's and SFT's demo files; HH helpful-base
for the reward model; UltraFeedback's two scores as K = 2, and K = 4 made of pairs (see `made_groups`). The recipes are those
of recipes/; the small model needs another learning rate and short budgets, which are laid over them here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from prefopt.core.progress import set_quiet
from prefopt.core.resolve import read_recipe, resolve_config
from prefopt.pipeline import train_run

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PREFOPT_SHARED", ROOT.parent / "shared"))
DATA = SHARED / "data"
VOTED = ("odpo", "soft_dpo", "rao_kupper", "davidson")
TIES = ("rao_kupper", "davidson")
LABELLED = ("kto", "bco", "apo_zero_unpaired", "aot_unpaired")
RANKED = ("plackett_luce", "all_pairs", "best_of_k", "reward_ranking")
SCORED = "UltraFeedback, K = 2"
Rows = list[dict[str, Any]]
Source = tuple[str, Rows | str, Rows | None]
LR_FACTOR = {"sft": 10.0, "reward": 10.0, "reward_ranking": 10.0, "bco": 0.3, "dpop": 0.3, "f_dpo": 0.3}
# imitation and new heads move further; losses that grow fast on one side overshoot
TARGETS = ("sppo", "cal_dpo")  # pull log-ratios to 1 / (2 beta): 5 nats with beta 0.1, less than rows of 64 tokens scatter
LEFT_OUT = ("dpo-hh",)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "stories15M"))
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--rows", type=int, default=500, help="rows read at most, 100 of them held out")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a prompt and of a response")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("methods.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    return parser.parse_args()


def read(path: str) -> Any:
    return json.loads((DATA / path).read_text(encoding="utf-8"))


def voted_pairs(*, ties: bool) -> Rows:
    """PandaLM's pairs: the response with more votes is chosen; as many votes for either, or most for none, is a tie."""
    rows = []
    for row in read("pandalm/testset-v1.json"):
        votes = [row[f"annotator{number}"] for number in (1, 2, 3)]
        first, second = votes.count(1), votes.count(2)
        tie = first == second or votes.count(0) > 1
        responses = {row["response1"], row["response2"]}
        if len(responses) < 2 or not all(isinstance(text, str) and text for text in responses) or (tie and not ties):
            continue  # a few responses are empty, the same, or no text at all
        best, other = ("response1", "response2") if first >= second else ("response2", "response1")
        prompt = f"{row['instruction']}\n\n{row['input']}".strip()
        pair = {"prompt": prompt, "chosen": row[best], "rejected": row[other], "tie": tie}
        if not tie:
            pair |= {"margin": abs(first - second), "probability": max(first, second) / (first + second)}
        rows.append(pair)
    return rows


def scored_pairs(split: str) -> Rows:
    """UltraFeedback as K = 2: both responses with the scores that GPT-4 gave."""
    rows = []
    for line in (DATA / "ultrafeedback" / f"{split}_clean.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores = [float(row["metadata"][f"score_{side}"]) for side in ("chosen", "rejected")]
        if scores[0] > scores[1]:
            rows.append({"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": scores})
    return rows


def made_groups() -> Rows:
    """K = 4: chosen, rejected, and each of them with its words in random order, which ranks below both."""
    draw = random.Random(0)

    def shuffled(text: str) -> str:
        words = text.split()
        draw.shuffle(words)
        return " ".join(words)

    groups = []
    for row in voted_pairs(ties=False):
        texts = [row["chosen"], row["rejected"]]
        responses = [*texts, *(shuffled(text) for text in texts)]
        if len(set(responses)) == 4:
            groups.append({"prompt": row["prompt"], "responses": responses, "ranking": [1, 2, 3, 4]})
    return groups


def sources(recipe: str) -> list[Source]:
    """Row sets of a recipe: (what they are, training rows or a path, held-out rows or None to draw them by prompt)."""
    if recipe in LABELLED:
        return [("kto_en_demo", str(DATA / "llamafactory-demo" / "kto_en_demo.json"), None)]
    if recipe == "sft":
        return [("alpaca_en_demo", str(DATA / "llamafactory-demo" / "alpaca_en_demo.json"), None)]
    if recipe == "reward":
        return [("HH helpful-base", str(DATA / "hh-rlhf" / "helpful-base-test.jsonl.gz"), None)]
    if recipe in RANKED:
        made: Source = ("made of PandaLM, K = 4", made_groups(), None)
        # with K = 2 plackett_luce, all_pairs and best_of_k are one loss
        scored: Source = (SCORED, scored_pairs("train"), scored_pairs("eval"))
        return [made, scored] if recipe == "plackett_luce" else [made]
    if recipe in VOTED:
        return [("PandaLM", voted_pairs(ties=recipe in TIES), None)]
    return [("dpo_en_demo", str(DATA / "llamafactory-demo" / "dpo_en_demo.json"), None)]


def as_file(rows: Rows | str, path: Path) -> str:
    if isinstance(rows, str):
        return rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one_run(args: argparse.Namespace, recipe: str, source: Source) -> dict[str, Any]:
    title, train, held_out = source
    tokens, steps, lr = args.tokens, args.steps, args.lr * LR_FACTOR.get(recipe, 1.0)
    if title == SCORED:  # long answers, small differences: more of each row, more rows, larger steps
        tokens, steps, lr = 120, 55, 5 * args.lr
    words = [
        f"model.name={args.model}",
        "data.template=plain",
        f"data.max_prompt_tokens={tokens}",
        f"data.max_response_tokens={tokens}",
        "data.on_overlong=truncate",
        f"data.max_rows={1000 if title == SCORED else args.rows}",
        f"train.lr={lr}",
        f"train.max_steps={steps}",
        f"train.eval_every_steps={steps}",
        "train.groups_per_step=16",
        "train.micro_batch_tokens=2048",
    ]
    if recipe in RANKED and recipe != "reward_ranking":
        words.append("loss.beta=0.02")  # sums over 64 tokens of K responses: with 0.1 the first steps overshoot
    if recipe in TARGETS:
        words.append("loss.beta=0.01")
    if recipe == "tr_dpo":
        words.append("reference.sync_every_steps=8")
    with tempfile.TemporaryDirectory() as folder:
        words.append(f"data.train={as_file(train, Path(folder) / 'train.jsonl')}")
        words += (
            ["data.eval_rows=100"]
            if held_out is None
            else ["data.eval_rows=0", f"data.eval={as_file(held_out, Path(folder) / 'eval.jsonl')}"]
        )
        values = read_recipe(ROOT / "recipes" / f"{recipe}.yaml")
        config = resolve_config(values, [*words, f"train.output_dir={Path(folder) / 'run'}"], source=recipe)
        started = time.monotonic()
        evals = [event for event in train_run(config).events() if event["kind"] == "eval"]
    kept = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/accuracies_low", "eval/rewards/accuracies_high")
    return {
        "recipe": recipe,
        "rows": title,
        "seconds": round(time.monotonic() - started),
        "first": {key: evals[0].get(key) for key in kept},
        "last": {key: evals[-1].get(key) for key in kept},
        "groups": evals[-1]["eval/groups"],
    }


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | rows | held-out loss | held-out accuracy | 95 % interval | groups |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        first, last = run["first"], run["last"]
        accuracy, interval = "-", "-"
        if last["eval/rewards/accuracies"] is not None:
            before = first["eval/rewards/accuracies"]
            accuracy = f"{before:.3f} -> {last['eval/rewards/accuracies']:.3f}"
            interval = f"{last['eval/rewards/accuracies_low']:.3f} to {last['eval/rewards/accuracies_high']:.3f}"
        loss = f"{first['eval/loss']:.4f} -> {last['eval/loss']:.4f}"
        lines.append(f"| {run['recipe']} | {run['rows']} | {loss} | {accuracy} | {interval} | {run['groups']} |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    set_quiet(True)
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    done = {(run["recipe"], run["rows"]): run for run in map(json.loads, lines)}
    recipes = args.only or sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in LEFT_OUT)
    wanted = [] if args.table else [(name, source) for name in recipes for source in sources(name)]
    for recipe, source in wanted:
        if (recipe, source[0]) in done:
            continue
        run = done[recipe, source[0]] = one_run(args, recipe, source)
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), flush=True)
    print(table([run for _, run in sorted(done.items())]))


if __name__ == "__main__":
    main()
