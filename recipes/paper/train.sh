# For the run.sh of each experiment, which set $here (its recipes) and $out (its runs): a run that is finished is kept, one with a
# checkpoint goes on, any other starts anew.
train() { # train NAME KEY=VALUE ...
    local name=$1 folder="$out/$1"
    shift
    if grep -qs '"kind": *"end"' "$folder/events.jsonl"; then
        echo "$folder: there already"
    elif compgen -G "$folder/checkpoints/*/manifest.json" >/dev/null; then
        prefopt train "$folder/config.json" --resume
    else
        rm -rf "$folder" # died before its first checkpoint
        prefopt train "$here/$name.yaml" "train.output_dir=$folder" "$@"
    fi
}
