#!/usr/bin/env bash
# Hermes-4-405B to NVFP4, both columns of its card, from a blank node: Python 3.11 or later, one GPU, the hub in reach.
#
#   runs/hermes4_405b.sh             does it all; stopped anywhere, the same command goes on
#   runs/hermes4_405b.sh --print     says what it would run
#   GPUS=8 runs/hermes4_405b.sh      the same bytes, the work shared by eight GPUs (docs/ranks.md)
#
# Layers of this width ran on an NVIDIA H200, two of them; nothing of this size ran anywhere. Bytes are exact, computed from the
# model's config; times are what follows from them and from those layers (docs/LOG.md, 2026-11-26, "The walk on a GPU"):
#
#   fetch      811.7 GB read from the hub and written. The network's time
#   plan       a config.json, and ten seconds of measuring: its estimate of the next step, on this node, is the one to go by
#   quantize   by `replay --smooth`: the default, `tuned --smooth`, takes twice the arithmetic and half again the hidden states,
#              and was not run at this width on a GPU. 2.9 h on an H200, 83 s a layer, where the page cache holds two
#              layers' hidden states, 155 GB; 3,290 PFLOP. 28.0 TB read and 10.1 TB written and forced to disk, most of it
#              hidden states, less what the page cache keeps: 3.9 and 1.1 h, partly meanwhile, at the 2.0 and 2.6 GB/s of
#              that machine's disk, so give it memory or a fast disk. 389.0 GB of it beside the source, and 21.9 GB of GPU
#              memory. (On a core of 50 GFLOP/s: two years)
#   verify     811.7 + 234.3 GB read: 7 min at 2.5 GB/s; and compared: 9 min at 1.5 GB/s, a thread's rate
#   evaluate   811.7 + 234.3 GB read a pass: one for all log-likelihoods, more for answers that are generated. 1.6 EFLOP
#              a million tokens: 76 min at the 350 TFLOP/s of quantize's lanes. It says how many tokens there are before
#              it walks
#   card, page seconds
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-NousResearch/Hermes-4-405B}
OUT=${OUT:-Hermes-4-405B-NVFP4}
GPUS=${GPUS:-1}
SUITE=${SUITE:-openllm-v1}
QUESTIONS=${QUESTIONS:-$OUT-questions}
THREADS=${THREADS:-8}
METHOD=(--method replay --smooth)
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
step "$BIN/fourge" plan "$MODEL" --output "$(dirname "$OUT")" --gpu b200:2 "${METHOD[@]}"
shared quantize "$MODEL" --output "$OUT" "${METHOD[@]}"
step "$BIN/fourge" verify "$OUT" --source "$MODEL"
step "$BIN/fourge" evaluate --suite "$SUITE" --fetch-data "$QUESTIONS"
shared evaluate "$OUT" --baseline "$MODEL" --suite "$SUITE" --task-data "$QUESTIONS" --engine walk
step "$BIN/fourge" card "$OUT" --base-model "$MODEL"
step "$BIN/fourge" page "$OUT"
