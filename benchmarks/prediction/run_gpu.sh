#!/usr/bin/env bash
# Predictions against runs on a machine with a GPU, in one call that ends within DEADLINE_S (540) seconds, the build included.
#   bash benchmarks/prediction/run_gpu.sh RESULTS_DIR [run.py's arguments, such as --runs 160M:512:host]
#   SSD_DIR    a directory on the drive (/tmp/prediction-ssd)
#   INSTALL=0  overspill is importable already
# Writes RESULTS_DIR/predictions.jsonl (a line a run, failures too), its machine file, spans.jsonl (timelines of each run's last step),
# clocks.csv (the GPU's clocks and power, four times a second) and predictions.log with the summary.
set -uo pipefail
results=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$results"
export PYTHONUNBUFFERED=1
if [ "${INSTALL:-1}" = 1 ]; then
  (cd "$here/../.." && env -u CFLAGS -u LDFLAGS python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target /tmp/site .) || exit 1
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
fi
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,nounits -lms 250 > "$results/clocks.csv" &
  clocks=$!
  trap 'kill "$clocks" 2> /dev/null' EXIT
fi
python3 "$here/run.py" --out "$results/predictions.jsonl" --spans "$results/spans.jsonl" --ssd-dir "${SSD_DIR:-/tmp/prediction-ssd}" \
  --deadline-s "$((${DEADLINE_S:-540} - SECONDS))" "$@" 2>&1 | tee "$results/predictions.log" | tail -c 11000
exit "${PIPESTATUS[0]}"
