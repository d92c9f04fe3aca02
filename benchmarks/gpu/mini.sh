#!/usr/bin/env bash
# Trains Protea-mini on one NVIDIA GPU, for some six minutes a call, and compares it with the weights in the package.
#
#   CORPUS=corpus benchmarks/gpu/mini.sh                   one call
#   CORPUS=corpus CALLS=3 benchmarks/gpu/mini.sh           the first of three; the others are the same command
#   CORPUS=corpus FROM=carried benchmarks/gpu/mini.sh      go on elsewhere: FROM is OUT of the call before
#   CORPUS=corpus benchmarks/gpu/mini.sh --dry-run         a toy on the CPU, by the same code, within a minute
#
# CORPUS holds part-*.fasta.zst, and valid.fasta.zst where `mini_corpus.py divide` made it; without the latter nothing
# can be concluded from the perplexities. RUN (build/mini-gpu/run) is the run's folder: where it is still there, the
# same command goes on. OUT (build/mini-gpu/out) gets results.jsonl, summary.md, log.txt, and run.tar.zst.0 and on, at
# most 60 MB in pieces of 15 MiB: the newest checkpoint, the recipe and the metrics, or, once the run is finished, the
# exported model. SETTINGS are KEY=VALUE of the recipe. WHEELS, PYTHON, TOTAL (535 s for everything), --parts and
# --bound are run.sh's. Parts: unpack, store, train, export, perplexity, pack.
#
# The weights in the package are replaced only if held-out perplexity, contacts and scans all improve.

set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=${OUT:-build/mini-gpu/out}
RUN=${RUN:-build/mini-gpu/run}
TOTAL=${TOTAL:-535}
. "$HERE/parts.sh"

[ -n "${CORPUS:-}" ] || { echo "which sequences? CORPUS=folder with part-*.fasta.zst" >&2; exit 2; }
if [ ${#DRY[@]} -gt 0 ]; then LONGEST=120 AFTER=110; else LONGEST=480 AFTER=110; fi

mkdir -p "$RUN"
wheels
if [ -n "${FROM:-}" ] && ! ls "$RUN"/checkpoints/step-* >/dev/null 2>&1; then
  part unpack 30 "$PYTHON" "$HERE/mini_state.py" unpack "$FROM" "$RUN"
fi
part store 120 "$PYTHON" "$HERE/mini_corpus.py" store "$OUT" "$WORK" "$CORPUS" "${DRY[@]}"

# Training gets what is left when the parts after it have theirs.
TRAIN=$(awk -v left="$(left)" -v after="$AFTER" -v longest="$LONGEST" \
  'BEGIN {time = left - after - 10; if (time < 60) time = 60; print int(time < longest ? time : longest)}')
part train $((TRAIN + 10)) "$PYTHON" "$HERE/mini_train.py" "$OUT" "$WORK" "$RUN" ${SETTINGS:-} \
  --seconds "$TRAIN" --calls "${CALLS:-1}" "${DRY[@]}"
part export 25 "$PYTHON" -m protea export "$RUN" -o "$WORK/model" --dtype bfloat16
part perplexity 60 "$PYTHON" "$HERE/mini_measure.py" "$OUT" "$WORK" "$WORK/model" "$CORPUS" "${DRY[@]}"
part pack 25 "$PYTHON" "$HERE/mini_state.py" pack "$OUT" "$RUN" "$WORK/model"
finish
