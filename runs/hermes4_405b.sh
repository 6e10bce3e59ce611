#!/usr/bin/env bash
# Hermes-4-405B to NVFP4, both columns of its card, from a blank node: Python 3.11 or later, one GPU, the hub in reach.
#
#   runs/hermes4_405b.sh             does it all; stopped anywhere, the same command goes on
#   runs/hermes4_405b.sh --print     says what it would run
#   GPUS=8 runs/hermes4_405b.sh      the same bytes, the work shared by eight GPUs (docs/ranks.md)
#
# Nothing of this has run on a GPU yet, and nothing of this size anywhere. Bytes are exact, computed from the model's
# config. Of times this much is known (docs/LOG.md, 2026-11-26, "What Hermes-4-405B takes"):
#
#   step       bytes                                                arithmetic    time
#   fetch      811.7 GB read from the hub and written               none          the network's
#   plan       a config.json, 10 s of measuring                     none          half a minute; then it says the next step's
#   quantize   55.2 TB read and 19.9 TB written, most of it hidden  3,290 PFLOP   at least 56 min on an H100: its dense BF16 peak,
#              states that fit in no cache; 543.6 GB of disk                      989.5 TFLOP/s. 803 days at the 50 GFLOP/s of one busy
#              beside the source, 18.1 GB of GPU memory                           CPU core that plan found where this was written
#   verify     811.7 + 234.3 GB read                                one rounding  the disk's: 7 min at 2.5 GB/s
#   evaluate   811.7 + 234.3 GB read for log-likelihoods, once      1.6 EFLOP a   at least 27 min a million tokens on an H100; it says how
#              more a pass for answers that are generated           million tokens  many there are before it begins
#   card       the answers                                          none          seconds
#
# The disk's real rate and the arithmetic's are measured by `fourge plan` on the node: its estimate is the one to go by.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-NousResearch/Hermes-4-405B}
OUT=${OUT:-Hermes-4-405B-NVFP4}
GPUS=${GPUS:-1}
SUITE=${SUITE:-openllm-v1}
QUESTIONS=${QUESTIONS:-$OUT-questions}
THREADS=${THREADS:-8}
BIN=.venv/bin

step() {
  printf '+ %s\n' "$*"
  [ "${PRINT:-}" ] || "$@"
}
# A verb that several GPUs may share.
shared() {
  if [ "$GPUS" -gt 1 ]; then
    step "$BIN/torchrun" --nproc-per-node "$GPUS" -m fourge "$@" --threads "$THREADS"
  else
    step "$BIN/fourge" "$@" --threads "$THREADS"
  fi
}
[ "${1:-}" = --print ] && PRINT=1

step make setup
step "$BIN/hf" download "$MODEL"
step "$BIN/fourge" plan "$MODEL" --output "$(dirname "$OUT")" --gpu b200:2
shared quantize "$MODEL" --output "$OUT"
step "$BIN/fourge" verify "$OUT" --source "$MODEL"
step "$BIN/fourge" evaluate --suite "$SUITE" --fetch-data "$QUESTIONS"
shared evaluate "$OUT" --baseline "$MODEL" --suite "$SUITE" --task-data "$QUESTIONS" --engine walk
step "$BIN/fourge" card "$OUT" --base-model "$MODEL"
step "$BIN/fourge" page "$OUT"
