#!/usr/bin/env bash
# The controlled sentiment task up to its runs: data -> sft -> samples -> labels -> reward model -> one run of each method.
# Run again after a kill: what is whole is kept, a run goes on from its newest checkpoint.
#   bash recipes/paper/sentiment/run.sh              # into runs/paper/sentiment
#   bash recipes/paper/sentiment/run.sh --quick      # into runs/paper/sentiment-quick: a few rows and steps of each
#   METHODS="dpo ppo-gt" bash recipes/paper/sentiment/run.sh
# $PREFOPT_SENTIMENT_MODEL is the language model to start from; by default stories15M in $PREFOPT_SHARED.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."
out=runs/paper/sentiment
quick=()
of_pairs=()
of_rounds=()
if [ "${1:-}" = --quick ]; then
    out=runs/paper/sentiment-quick
    quick=(--quick)
    of_pairs=(train.max_steps=4)
    of_rounds=(rollout.rounds=2 rollout.prompts_per_round=16 rollout.max_new_tokens=16 train.groups_per_step=16)
fi
model=${PREFOPT_SENTIMENT_MODEL:-${PREFOPT_SHARED:-../shared}/models/stories15M}
methods=${METHODS:-dpo ipo preferred-ft unlikelihood ppo-gt ppo}
data=$out/data
export PREFOPT_SENTIMENT_REWARD="$PWD/$data/reward.npz"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

source "$here/../train.sh"

make() { # make FILE COMMAND ...: unless the file is there
    local file=$1
    shift
    if [ -e "$file" ]; then echo "$file: there already"; else "$@" --output "$file"; fi
}

python "$here/prepare.py" --output "$data" "${quick[@]}"
train sft "model.name=$model" "data.train=$data/sft_train.jsonl" "data.eval=$data/sft_eval.jsonl" "${of_pairs[@]}"
pairs=("model.name=$out/sft" "data.train=$out/pairs_train.jsonl" "data.eval=$out/pairs_eval.jsonl" "${of_pairs[@]}")
rounds=("model.name=$out/sft" "rollout.prompts=$data/prompts_train.jsonl" "${of_rounds[@]}")
for part in train eval; do
    prompts=$data/prompts_$part.jsonl
    [ "$part" = eval ] && prompts=$data/prompts_held_out.jsonl # those of prompts_eval are for the evaluation alone
    make "$out/samples_$part.jsonl" prefopt sample "$prompts" --model "$out/sft" --template plain -n 4 --max-new-tokens 48 --batch-size 64
    make "$out/pairs_$part.jsonl" prefopt label "$out/samples_$part.jsonl" --reward sentiment_reward:score --how bradley-terry
done
train reward "${pairs[@]}"
for method in $methods; do
    case $method in
        ppo) train ppo "${rounds[@]}" "rollout.reward=model:$out/reward" ;;
        ppo-gt) train ppo-gt "${rounds[@]}" ;;
        *) train "$method" "${pairs[@]}" ;;
    esac
done
echo "$out: ${methods// /, } are trained; evaluation prompts are in $data/prompts_eval.jsonl"
