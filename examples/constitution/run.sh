#!/usr/bin/env bash
# Constitutional AI without a large model, on two CPU cores: SmolLM2-135M-Instruct prefers among its own answers by five principles.
# prompts -> sampled responses -> preferences by the principles -> DPO -> evaluation by VADER, which had no part in it -> report
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
prompts=$here/../positive
out=${1:-runs/constitution}
model=smollm2-135m-instruct

if [ -e "$out" ]; then
    old="$out.$(date +%Y%m%d-%H%M%S)"
    echo "$out exists: moved to $old"
    mv "$out" "$old"
fi
mkdir -p "$out"

echo "1/5  sample: 4 responses to each of 160 prompts"
prefopt sample "$prompts/prompts_train.jsonl" --model $model -n 4 --max-new-tokens 32 --batch-size 64 --output "$out/samples_train.jsonl"

echo "2/5  label: two pairs of each prompt, by how likely the model is to write them when it keeps to a principle, and when it breaks it"
prefopt label "$out/samples_train.jsonl" --judge contrast:$model --constitution "$here/constitution.yaml" --pairs-per-prompt 2 --output "$out/pairs.jsonl"

echo "3/5  train: DPO, beta 0.1"
prefopt train "$prompts/recipe.yaml" "data.train=$out/pairs.jsonl" "train.output_dir=$out"

echo "4/5  evaluate on prompts that were not trained on, by VADER's sentiment score: word counts that no judge of ours has seen"
prefopt evaluate "$out" --prompts "$prompts/prompts_eval.jsonl" --reward vader --max-new-tokens 32 -n 2 --batch-size 64

echo "5/5  report"
prefopt report "$out"
