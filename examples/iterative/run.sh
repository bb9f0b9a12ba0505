#!/usr/bin/env bash
# Does it pay to sample again from the policy as it becomes? DPO on one set of pairs of the first policy against three rounds of
# sample -> score -> pair -> train, with as many samples and steps, as reward against KL. Goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/iterative
mkdir -p "$out"

if [ ! -e "$out/pairs.jsonl" ]; then
    prefopt sample examples/positive/prompts_train.jsonl --model smollm2-135m-instruct -n 4 --max-new-tokens 32 --batch-size 64 \
        --output "$out/samples.jsonl"
    prefopt label "$out/samples.jsonl" --reward vader --how best-worst --output "$out/pairs.jsonl"
fi
prefopt frontier examples/iterative/frontier.yaml --output "$out/frontier"
