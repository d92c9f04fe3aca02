# What run.sh and mini.sh share: arguments, the time that is left, and parts that end as "ok", "failed", "skipped" or
# "out of time". Sourced, not run. It expects HERE, the folder of these scripts, and TOTAL, seconds for everything.

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

declare -A BOUNDS # seconds by part, where the command line gives others
DRY=() ONLY=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY=(--dry-run) ;;
    --parts) ONLY=$2; shift ;;
    --bound) BOUNDS[${2%%=*}]=${2#*=}; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1; --help tells the options" >&2; exit 2 ;;
  esac
  shift
done

PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d "${TMPDIR:-/tmp}/protea-gpu.XXXXXX")
BEGAN=$(date +%s.%N)

# The checkout's own package comes last: one that PYTHONPATH names already goes first.
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$HERE/../../src" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# A dry run's tensors are tiny: threads would wait for one another. A busy machine gets more time.
SLACK=1
if [ ${#DRY[@]} -gt 0 ]; then export OMP_NUM_THREADS=1; SLACK=4; fi
TOTAL=$((TOTAL * SLACK))

clean() {
  for each in "$WORK"/*.pid; do [ -e "$each" ] && kill -KILL -- "-$(cat "$each")" 2>/dev/null; done
  wait
  rm -rf "$WORK"
}
trap clean EXIT
trap 'exit 143' INT TERM

since() { echo "$(date +%s.%N) $1" | awk '{printf "%.1f", $1 - $2}'; }
less() { awk -v a="$1" -v b="$2" 'BEGIN {exit !(a < b)}'; }
left() { echo "$TOTAL $(since "$BEGAN")" | awk '{printf "%.1f", $1 - $2}'; }
wanted() { [ -z "$ONLY" ] || [[ " $ONLY " == *" $1 "* ]]; }

# note PART STATUS SECONDS BOUND [--reason TEXT | --log FILE]: record how a part ended.
note() { "$PYTHON" "$HERE/records.py" "$OUT" "$@"; }

# part NAME BOUND COMMAND...: run a command for BOUND seconds at most, keep its output in log.txt, record how it ended.
part() {
  local name=$1 bound=${BOUNDS[$1]:-$(($2 * SLACK))} log=$WORK/$1.log began code group seconds remains
  shift 2
  wanted "$name" || return 0
  remains=$(left)
  if less "$remains" "$bound"; then
    note "$name" skipped 0 "$bound" --reason "$remains s were left of $TOTAL, less than its bound of $bound"
    return 0
  fi
  began=$(date +%s.%N)
  timeout --kill-after=5 "$bound" "$@" >"$log" 2>&1 &
  group=$! # timeout leads a group of its own
  echo "$group" >"$WORK/$name.pid"
  wait "$group"
  code=$?
  # What the command started may still be busy saving, on the GPU that the next part measures.
  kill -KILL -- "-$group" 2>/dev/null
  rm "$WORK/$name.pid"
  seconds=$(since "$began")
  { echo "=== $name: exit code $code after $seconds s"; cat "$log"; } >>"$OUT/log.txt"
  case $code in
    0) note "$name" ok "$seconds" "$bound" ;;
    77) note "$name" skipped "$seconds" "$bound" --log "$log" ;;
    124 | 137) # stopped by timeout, or killed for memory before its time was up
      if less "$seconds" "$bound"; then
        note "$name" failed "$seconds" "$bound" --reason "killed, exit code $code"
        touch "$WORK/failed"
      else
        note "$name" "out of time" "$seconds" "$bound" --log "$log"
      fi ;;
    *) note "$name" failed "$seconds" "$bound" --log "$log" ;;
  esac
  case $code in 0 | 77 | 124 | 137) ;; *) touch "$WORK/failed" ;; esac
  return "$code"
}

# The exit code of the script: whether a part failed.
finish() {
  wait
  [ ! -e "$WORK/failed" ]
}

# Packages that the machine lacks, from a folder of wheels; no dependency is looked for.
wheels() {
  [ -n "${WHEELS:-}" ] || return 0
  local ONLY= # whatever parts are wanted
  export PYTHONPATH="$WORK/site:$PYTHONPATH"
  part wheels 60 "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" --no-deps --upgrade \
    --target "$WORK/site" "$WHEELS"/*.whl
}
