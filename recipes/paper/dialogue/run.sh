#!/usr/bin/env bash
# The dialogue task: Preferred-FT, DPO, PPO and best-of-n, each against the preferred responses of held-out rows, as a reward
# model judges that was trained on other rows; and each at several sampling temperatures.
# Run again after a kill: what is whole is kept, a run goes on from its newest checkpoint.
#   bash recipes/paper/dialogue/run.sh              # into runs/paper/dialogue
#   bash recipes/paper/dialogue/run.sh --quick      # into runs/paper/dialogue-quick: a few rows and steps of each
# $PREFOPT_DIALOGUE_ROWS: preference rows; by default HH helpful-base in $PREFOPT_SHARED. $PREFOPT_DIALOGUE_MODEL: the model
# to start from; by default smollm2-135m-instruct.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."
out=runs/paper/dialogue
quick=()
of_rows=()
of_rounds=()
sampled=(--max-new-tokens 80 --batch-size 32)
temperatures=0,0.5,1
best=16
if [ "${1:-}" = --quick ]; then
    out=runs/paper/dialogue-quick
    quick=(--quick)
    of_rows=(train.max_steps=3 data.max_prompt_tokens=64 data.max_response_tokens=32)
    of_rounds=(rollout.rounds=2 rollout.prompts_per_round=8 rollout.max_new_tokens=12 train.groups_per_step=8)
    sampled=(--max-new-tokens 12 --batch-size 32)
    temperatures=0,1
    best=4
fi
rows=${PREFOPT_DIALOGUE_ROWS:-${PREFOPT_SHARED:-../shared}/data/hh-rlhf/helpful-base-test.jsonl.gz}
model=${PREFOPT_DIALOGUE_MODEL:-smollm2-135m-instruct}
data=$out/data

source "$here/../train.sh"

[ -e "$data/held_out.jsonl" ] || python "$here/split.py" "$rows" --output "$data" ${quick[@]+"${quick[@]}"}
of_sft=("model.name=$out/sft" "data.train=$data/policy.jsonl" "data.eval=$data/held_out.jsonl" ${of_rows[@]+"${of_rows[@]}"})
train sft "model.name=$model" "data.train=$data/policy.jsonl" ${of_rows[@]+"${of_rows[@]}"}
train reward "${of_sft[@]}"
train judge "${of_sft[@]}" "data.train=$data/judge.jsonl"
train dpo "${of_sft[@]}"
train ppo "model.name=$out/sft" "rollout.prompts=$data/prompts_policy.jsonl" "rollout.reward=model:$out/reward" ${of_rounds[@]+"${of_rounds[@]}"}

samples=$out/best-of-$best.jsonl
[ -e "$samples" ] || prefopt sample "$data/prompts_held_out.jsonl" -m "$out/sft" --best-of "$best" --reward "model:$out/reward" -o "$samples" "${sampled[@]}"
judge=reward:model:$out/judge
for policy in "$out/sft" "$out/dpo" "$out/ppo"; do
    prefopt evaluate win-rate "$policy" --against "$data/held_out.jsonl" --judge "$judge" "${sampled[@]}" -o "$out/results/$(basename "$policy")"
done
prefopt evaluate temperatures "$out/sft" "$out/dpo" "$out/ppo" --against "$data/held_out.jsonl" --reward "model:$out/judge" \
    --temperatures "$temperatures" "${sampled[@]}" -o "$out/results/temperatures"
prefopt evaluate win-rate "$samples" --against "$data/held_out.jsonl" --judge "$judge" -o "$out/results/best-of-$best"
prefopt evaluate accuracy "$data/held_out.jsonl" --policy "$out/dpo" -o "$out/results/dpo"
prefopt evaluate accuracy "$data/held_out.jsonl" --reward "model:$out/judge" -o "$out/results/judge"
echo "$out/results: win rates, temperatures and accuracies"
