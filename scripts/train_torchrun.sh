#!/usr/bin/env bash
# Train on one machine or several with torch's elastic launcher, which torchrun is the command of.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/train_torchrun.sh CONFIG.yaml [OPTION OF mtmoe train ...]

Run the same command on each machine, with the same run folder on a shared file system. Which machine gets which ranks
is agreed when they meet. Environment:
  NPROC         processes on this machine; default: one for each GPU, or one where there is none
  NNODES        machines; default: 1
  MASTER_ADDR   name or address of one of the machines; needed where there are several
  MASTER_PORT   a free port of that machine; default: 29500
  RUN_ID        name of the run at that address; default: mtmoe
  MAX_RESTARTS  times that all processes start again after a failure; default: 0

One machine:   NPROC=2 scripts/train_torchrun.sh scripts/train/tiny.yaml --set data=DATA --set output=runs/NAME
Two machines:  NNODES=2 MASTER_ADDR=node1 scripts/train_torchrun.sh scripts/train/base.yaml --set output=/shared/run
TEXT
}

gpus() {
    local found=0
    if command -v nvidia-smi > /dev/null; then
        found=$(nvidia-smi --list-gpus 2> /dev/null | grep --count '^GPU' || true)
    fi
    echo "$found"
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    "" | -*)
        usage >&2
        exit 2
        ;;
esac
nnodes=${NNODES:-1}
if [[ -z ${NPROC:-} ]]; then
    NPROC=$(gpus)
    if [[ $NPROC == 0 ]]; then NPROC=1; fi
fi
words=(--nproc "$NPROC" --nnodes "$nnodes" --max-restarts "${MAX_RESTARTS:-0}")
if [[ $nnodes != 1 ]]; then
    if [[ -z ${MASTER_ADDR:-} ]]; then
        printf 'NNODES=%s needs MASTER_ADDR: the name or address of one of the machines\n\n' "$nnodes" >&2
        usage >&2
        exit 2
    fi
    words+=(--rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-mtmoe}")
fi
# exec: a signal to this script is one to training.
exec mtmoe train "$@" "${words[@]}"
