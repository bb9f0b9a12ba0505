#!/usr/bin/env bash
# The controlled sentiment task: data -> sft -> samples -> labels -> reward model -> the reward-KL frontier of all methods.
# Run again after a kill: what is whole is kept, a run goes on from its newest checkpoint.
#   bash recipes/paper/sentiment/run.sh              # into runs/paper/sentiment
#   bash recipes/paper/sentiment/run.sh --quick      # into runs/paper/sentiment-quick: a few rows and steps of each
#   METHODS=dpo,ppo-gt SEEDS=0 bash recipes/paper/sentiment/run.sh
#   WORKERS=2 OMP_NUM_THREADS=1 bash recipes/paper/sentiment/run.sh      # two runs of the frontier at a time
# $PREFOPT_SENTIMENT_MODEL is the language model to start from; by default stories15M in $PREFOPT_SHARED.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."
out=runs/paper/sentiment
quick=()
of_pairs=()
of_frontier=()
if [ "${1:-}" = --quick ]; then
    out=runs/paper/sentiment-quick
    quick=(--quick)
    of_pairs=(train.max_steps=4)
    ppo=frontier.methods.ppo-gt
    of_frontier=(--methods "dpo,ppo-gt,best-of-n" --betas 0.1 --seeds 0 --checkpoints 2 train.groups_per_step=8 frontier.methods.dpo.train.max_steps=4
        "$ppo.rollout.rounds=2" "$ppo.rollout.prompts_per_round=8" frontier.methods.best-of-n.n=4 frontier.evaluation.samples_per_prompt=1)
fi
model=${PREFOPT_SENTIMENT_MODEL:-${PREFOPT_SHARED:-../shared}/models/stories15M}
data=$out/data
export PREFOPT_SENTIMENT_REWARD="$PWD/$data/reward.npz"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

source "$here/../train.sh"

make() { # make FILE COMMAND ...: unless the file is there
    local file=$1
    shift
    if [ -e "$file" ]; then echo "$file: there already"; else "$@" --output "$file"; fi
}

python "$here/prepare.py" --output "$data" ${quick[@]+"${quick[@]}"}
train sft "model.name=$model" "data.train=$data/sft_train.jsonl" "data.eval=$data/sft_eval.jsonl" ${of_pairs[@]+"${of_pairs[@]}"}
for part in train eval; do
    prompts=$data/prompts_$part.jsonl
    [ "$part" = eval ] && prompts=$data/prompts_held_out.jsonl # those of prompts_eval are for the evaluation alone
    make "$out/samples_$part.jsonl" prefopt sample "$prompts" --model "$out/sft" --template plain -n 4 --max-new-tokens 32 --batch-size 64
    make "$out/pairs_$part.jsonl" prefopt label "$out/samples_$part.jsonl" --reward sentiment_reward:score --how bradley-terry
done
train reward "model.name=$out/sft" "data.train=$out/pairs_train.jsonl" "data.eval=$out/pairs_eval.jsonl" ${of_pairs[@]+"${of_pairs[@]}"}

[ -z "${METHODS:-}" ] || of_frontier+=(--methods "$METHODS")
[ -z "${SEEDS:-}" ] || of_frontier+=(--seeds "$SEEDS")
sed "s#runs/paper/sentiment/#$out/#g" "$here/frontier.yaml" >"$out/frontier.yaml"
frontier() { prefopt frontier "$out/frontier.yaml" --output "$out/frontier" ${of_frontier[@]+"${of_frontier[@]}"}; }
for worker in $(seq 2 "${WORKERS:-1}"); do
    frontier >"$out/worker-$worker.log" 2>&1 &
done
frontier
wait
echo "$out/frontier: the table and the figure"
