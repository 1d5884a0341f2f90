#!/usr/bin/env bash
# The table of saved tensors on a machine with a GPU, in calls that each end within DEADLINE_S (535) seconds, the build included.
#   bash benchmarks/activations/run_gpu.sh RESULTS_DIR [EARLIER.jsonl...]
# EARLIER: results of the calls before; what has a line there is not run again.
#   SSD_DIR     a directory on the drive (/tmp/activations-ssd)
#   SHM_DIR     one in RAM (/dev/shm/activations)
#   ARGS        further arguments of run.py, such as "--jobs core ssd --rows 8"
#   PEERS_SITE  folder with trl or torchtune (pip install --no-deps --target FOLDER trl accelerate: 12 MB, beside transformers); without it
#               their rows say that they are missing
#   HOST_TIME   shapes of which host_time.py says first where the host's time goes, about 90 s each (host-time.jsonl)
#   PLOTS=1     draw plots too, a file a shape; plot.py draws them from the results at any time, anywhere
#   INSTALL=0   overspill is importable already
# Writes RESULTS_DIR/activations.jsonl (a line a mode, failures too), .log, and activations.md over all results.
set -uo pipefail
results=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$results"
out=$results/activations.jsonl
export PYTHONUNBUFFERED=1
[ -n "${PEERS_SITE:-}" ] && export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PEERS_SITE
if [ "${INSTALL:-1}" = 1 ]; then
  # What the processes load later is read from the disk while the compiler runs.
  python3 -c 'import torch, transformers.models.llama.modeling_llama, trl.models.activation_offloading' > /dev/null 2>&1 &
  (cd "$here/../.." && env -u CFLAGS -u LDFLAGS python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target /tmp/site .) || exit 1
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
  wait $!
  echo "built after $SECONDS s"
fi
for shape in ${HOST_TIME:-}; do
  python3 "$here/host_time.py" --shape "$shape" --modes keep counted host mix-97 --rounds 10 --out "$results/host-time.jsonl"
done
python3 "$here/run.py" --out "$out" --done "$@" --ssd-dir "${SSD_DIR:-/tmp/activations-ssd}" --shm-dir "${SHM_DIR:-/dev/shm/activations}" \
  --deadline-s "$((${DEADLINE_S:-535} - SECONDS))" ${ARGS:-} 2>&1 | tee "$results/activations.log" | tail -c 11000
code=${PIPESTATUS[0]}
python3 "$here/tables.py" "$@" "$out" --out "$results/activations.md" > /dev/null || code=1
[ "${PLOTS:-0}" = 1 ] && python3 "$here/plot.py" "$results" "$@" "$out"
exit "$code"
