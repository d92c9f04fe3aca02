#!/usr/bin/env bash
# What Protea does on one NVIDIA GPU, in nine minutes at most.
#
#   benchmarks/gpu/run.sh                    on a machine with an H100 or H200
#   benchmarks/gpu/run.sh --dry-run          toy sizes on the CPU, by the same code, within a minute
#   benchmarks/gpu/run.sh --parts "device gradients"       these parts alone
#   FLIP=flip FLIP_MODEL=650M/ benchmarks/gpu/run.sh --parts "device flip-lora"
#   benchmarks/gpu/run.sh --bound train-650M=120           other seconds for a part
#
# Parts, by importance: device, prepare (beside the next two), gradients, tests, train-SIZE and embed-SIZE for each of
# SIZES, after those of 650M lora-650M (training of LoRA adapters, which needs peft) and ranks-650M-N (training with
# FSDP2 in N processes, one on each GPU: 1, 2, 4 and so on up to the number of GPUs), then peers-SIZE (transformers). A
# part that fails or runs out of time is recorded so, and the next begins; one whose bound is more than what is left of
# TOTAL is skipped.
#
# With FLIP, a folder of FLIP's tasks, and FLIP_MODEL, a checkpoint, flip-lora comes last and takes the time that is
# left; as it takes minutes, name it alone in --parts. FLIP_TASKS and FLIP_SEEDS (0 1 2) choose.
#
# OUT (build/gpu) gets results.jsonl, summary.md and log.txt, which grow as parts end. WHEELS is a folder of wheels that
# the machine lacks; PYTHON the interpreter (python3); TOTAL the seconds for everything (535); SIZES the models.
# Protea need not be installed. The exit code is 1 if a part failed.

set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=${OUT:-build/gpu}
TOTAL=${TOTAL:-535}
. "$HERE/parts.sh"

if [ ${#DRY[@]} -gt 0 ]; then SIZES=${SIZES:-8M}; else SIZES=${SIZES:-650M 8M 3B 150M}; fi
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
if [ ${#DRY[@]} -gt 0 ]; then GPUS=2; fi
case $ONLY in *train-* | *embed-* | *peers-* | *ranks-* | *lora-[0-9]*) ONLY="$ONLY prepare" ;; esac

run() { part "$1" "$2" "$PYTHON" "$HERE/$3" "$OUT" "${@:4}" "${DRY[@]}"; }

# seconds SIZE: the bounds of its training, embedding and peers.
seconds() {
  case $1 in
    8M) echo 50 40 30 ;;
    150M) echo 55 45 35 ;;
    650M) echo 75 70 45 ;;
    *) echo 85 95 60 ;;
  esac
}

wheels
run device 40 machine.py

# Models and data are made on the CPU while the GPU shows whether its attention is right, which is not timed.
{
  run prepare 300 prepare.py "$WORK" $SIZES
  touch "$WORK/prepare.done"
} &
run gradients 60 gradients.py
run tests 90 gpu_tests.py

for size in $SIZES; do
  read -r train embed _ <<<"$(seconds "$size")"
  run "train-$size" "$train" training.py "$WORK" "$size"
  run "embed-$size" "$embed" embedding.py "$WORK" "$size"
  # LoRA is measured at the size that its goal is for, and at any that is asked for.
  if [ "$size" = 650M ] || [ -n "$ONLY" ] || [ ${#DRY[@]} -gt 0 ]; then run "lora-$size" 90 lora.py "$WORK" "$size"; fi
  # So are processes with FSDP2: their cost in one, and how they scale.
  if [ "$size" = 650M ] || [ -n "$ONLY" ] || [ ${#DRY[@]} -gt 0 ]; then
    for ((count = 1; count <= GPUS; count *= 2)); do
      run "ranks-$size-$count" "$train" training.py "$WORK" "$size" --processes "$count"
    done
  fi
done

if [ ${#DRY[@]} -eq 0 ]; then
  for size in $SIZES; do
    read -r _ _ peers <<<"$(seconds "$size")"
    run "peers-$size" "$peers" peers.py "$WORK" "$size"
    # Larger packs, where memory holds them, once the most important is known.
    [ "$size" = 650M ] && run train-650M-32768 60 training.py "$WORK" 650M --pack 32768
  done
fi

if [ -n "${FLIP:-}" ] && [ -n "${FLIP_MODEL:-}" ]; then
  rest=$(awk -v left="$(left)" -v slack="$SLACK" 'BEGIN {rest = int((left - 5) / slack); print rest < 60 ? 60 : rest}')
  run flip-lora "$rest" lora_flip.py "$WORK" "$FLIP" "$FLIP_MODEL" \
    --tasks "${FLIP_TASKS:-}" --seeds "${FLIP_SEEDS:-0 1 2}"
elif [ -n "${FLIP:-}${FLIP_MODEL:-}" ] || [[ " $ONLY " == *" flip-lora "* ]]; then
  wanted flip-lora && note flip-lora skipped 0 0 --reason "it needs FLIP, a folder, and FLIP_MODEL, a checkpoint"
fi
finish
