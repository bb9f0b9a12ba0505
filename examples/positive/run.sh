#!/usr/bin/env bash
# The main job, end to end, on two CPU cores: SmolLM2-135M-Instruct learns to answer positively.
# prompts -> sampled responses -> preferences by a sentiment score -> DPO -> evaluation on held-out prompts -> report
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/positive}
model=smollm2-135m-instruct

if [ -e "$out" ]; then
    old="$out.$(date +%Y%m%d-%H%M%S)"
    echo "$out exists: moved to $old"
    mv "$out" "$old"
fi
mkdir -p "$out"

echo "1/5  sample: 4 responses to each of 160 prompts"
prefopt sample "$here/prompts_train.jsonl" --model $model -n 4 --max-new-tokens 32 --batch-size 64 --output "$out/samples_train.jsonl"

echo "2/5  label: the most positive response against the least, by VADER's sentiment score"
prefopt label "$out/samples_train.jsonl" --reward vader --min-margin 0.3 --output "$out/pairs.jsonl"

echo "3/5  train: DPO, beta 0.1"
prefopt train "$here/recipe.yaml" "data.train=$out/pairs.jsonl" "train.output_dir=$out"

echo "4/5  evaluate: policy and reference on prompts that were not trained on"
prefopt evaluate "$out" --prompts "$here/prompts_eval.jsonl" --reward vader --max-new-tokens 32 -n 2 --batch-size 64

echo "5/5  report"
prefopt report "$out"
