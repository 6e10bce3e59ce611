#!/usr/bin/env bash
# Hermes-4-405B to NVFP4, both columns of its card, from a blank node: Python 3.11 or later, one GPU, the hub in reach.
#
#   runs/hermes4_405b.sh             does it all; stopped anywhere, the same command goes on
#   runs/hermes4_405b.sh --print     says what it would run
#   GPUS=8 runs/hermes4_405b.sh      the same bytes, the work shared by eight GPUs (docs/ranks.md)
#
# Nothing of this has run on a GPU yet, and nothing of this size anywhere. Bytes are exact, computed from the model's
# config; times are what follows from them (docs/LOG.md, 2026-11-26, "What Hermes-4-405B takes"):
#
#   fetch      811.7 GB read from the hub and written. The network's time
#   plan       a config.json, and ten seconds of measuring: its estimate of the next step, on this node, is the one to go by
#   quantize   3,290 PFLOP: more than 55 min on an H100, whose dense BF16 peak is 989.5 TFLOP/s; two years on a core of 50
#              GFLOP/s. 55.2 TB read and 19.9 TB written and forced to disk, most of it hidden states, less what the page cache
#              keeps: 6 h and 33 h at the 2.5 and .165 GB/s that plan measured where this was written, so give it a fast
#              disk. 543.6 GB of it beside the source, and 18.1 GB of GPU memory
#   verify     811.7 + 234.3 GB read: 7 min at 2.5 GB/s; and compared: 9 min at 1.5 GB/s, a thread's rate
#   evaluate   811.7 + 234.3 GB read a pass: one for all log-likelihoods, more for answers that are generated. 1.6 EFLOP
#              a million tokens: more than 27 min on an H100. It says how many tokens there are before it walks
#   card, page seconds
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
