#!/usr/bin/env bash
# The demo: fetch real parallel text, train a multilingual MoE model on it, evaluate every direction, translate.
#
# Each step is restartable: run it again after an interruption and it goes on where it stopped.
# MTMOE_DEMO_RUN names the run folder (default runs/demo), MTMOE_DEMO_WHEEL a data wheel that is already on disk.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${MTMOE_DEMO_RUN:-runs/demo}
mkdir -p "$run"
started=$SECONDS

step() {
    local title=$1 begun=$SECONDS
    shift
    printf '\n== %s\n' "$title"
    "$@"
    printf '== %s: %d s\n' "$title" $((SECONDS - begun)) | tee -a "$run/times.txt"
}

evaluate() {
    # The length penalty was the best of 1, 1.5 and 2 on the validation set for an earlier, weaker model of this size.
    mtmoe evaluate "$run/model" --data "$run/data" --split test --limit 300 --length-penalty 1.5 --output "$run"
    mtmoe convert "$run/model" --evaluation "$run/evaluation.json" --output "$run/model"  # its card tells the figures
}

translate() {
    local text="Turn off the light in the living room when nobody is home."
    printf 'en     %s\n' "$text"
    for target in de fr hu ro mk; do
        printf '%s     ' "$target"
        mtmoe translate --model "$run/model" --from en --to "$target" "$text"
    done
}

: > "$run/times.txt"
step "1/5 prepare the data" mtmoe prepare data/quickstart.yaml --output "$run/data" \
    ${MTMOE_DEMO_WHEEL:+--wheel "$MTMOE_DEMO_WHEEL"}
step "2/5 train" mtmoe train scripts/train/demo.yaml --set data="$run/data" --set output="$run"
step "3/5 convert to a portable model" mtmoe convert "$run/checkpoints/checkpoint_best.pt" \
    --data "$run/data" --output "$run/model"
step "4/5 evaluate every direction" evaluate
step "5/5 translate" translate
printf '\nThe demo took %d s. Look at %s/evaluation.html, evaluation.md and samples.md.\n' $((SECONDS - started)) "$run"
