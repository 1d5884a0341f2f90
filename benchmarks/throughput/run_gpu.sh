#!/usr/bin/env bash
# The throughput comparison on a machine with a GPU, one part a call; its rows end within DEADLINE_S (525) seconds, the
# build included.
#   bash benchmarks/throughput/run_gpu.sh RESULTS_DIR PART [TEXT...]
# PART: of run.py --list. TEXT: only the part's rows that contain one of these, as zero2 or :clip.
#   bash benchmarks/throughput/run_gpu.sh RESULTS_DIR rows ROW...
# ROW: a name, as 8B@8GiB:16x1x2048:overspill-host.
#   DEEPSPEED_ENV  file to source first, so that deepspeed imports with its CPU Adam compiled; without it its rows say that it is missing
#   TORCHAO_SITE   folder with an installed torchao, for its rows alone
#   SSD_DIR        for rows that need a drive (/tmp/throughput-ssd)
#   STEPS, WARMUP  counted steps (5), steps before them (2)
#   INSTALL=0      overspill is importable already
#   SPANS          file for the timelines of overspill's counted steps
#   PLOTS=1        draw plots too, a file a workload; plot.py draws them from the results at any time, anywhere
# Writes RESULTS_DIR/throughput-PART.jsonl (a line a row, failures too), .log, and throughput.md over all parts there.
set -uo pipefail
results=$1 part=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$results"
out=$results/throughput-$part.jsonl log=$results/throughput-$part.log
export PYTHONUNBUFFERED=1
[ -n "${DEEPSPEED_ENV:-}" ] && . "$DEEPSPEED_ENV"
if [ "${INSTALL:-1}" = 1 ]; then
  (cd "$here/../.." && env -u CFLAGS -u LDFLAGS python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target /tmp/site .) || exit 1
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
fi
ssd=${SSD_DIR:-/tmp/throughput-ssd}
only=()
[ -n "${SPANS:-}" ] && only+=(--spans "$SPANS")
[ "$part" != rows ] && only+=(--part "$part")
[ $# -gt 0 ] && only+=(--rows "$@")
python3 "$here/run.py" "${only[@]}" --ssd-dir "$ssd" --steps "${STEPS:-5}" --warmup "${WARMUP:-2}" \
  --deadline-s "$((${DEADLINE_S:-525} - SECONDS))" --dtype "${DTYPE:-bfloat16}" --out "$out" 2>&1 | tee -a "$log" |
  grep -E '^==|tokens/s|step|rror|limit|not started' | tail -200
code=${PIPESTATUS[0]}
python3 "$here/summarize.py" "$results"/throughput-*.jsonl --out "$results/throughput.md" || code=1
[ "${PLOTS:-0}" = 1 ] && python3 "$here/plot.py" "$results" "$results"/throughput-*.jsonl
exit "$code"
