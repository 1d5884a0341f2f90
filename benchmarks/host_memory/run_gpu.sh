#!/usr/bin/env bash
# The host-memory comparison on a machine with a GPU, one part a call; every part ends within DEADLINE_S (510) seconds.
#   bash benchmarks/host_memory/run_gpu.sh RESULTS_DIR SSD_DIR PART [RUN...]
# PART: overspill   1.10B with states on SSD and on host, with and without clip
#       depth       3.02B all on SSD and its twin of half the depth
#       deepspeed   ZeRO-Infinity and ZeRO-3 beside overspill all on SSD; needs deepspeed 0.19.8 to import (DEEPSPEED_ENV: a file to
#                   source first, for this part and longest)
#       parts       MemAscend's four parts switched off one by one
#       longest     Llama-3.1-8B: longest context and largest batch, then DeepSpeed's attempts
# RUN: names of runs of the part (see below); left out: all of them, in this order.
# Writes RESULTS_DIR/host-memory-PART.jsonl (a line a run, failures too), .log, and host-memory.md from all parts found there.
set -uo pipefail
results=$1 ssd=$2 part=$3
shift 3
wanted=" $* "
here=$(cd "$(dirname "$0")" && pwd)
deadline=$((SECONDS + ${DEADLINE_S:-510}))
mkdir -p "$results" "$ssd"
out=$results/host-memory-$part.jsonl log=$results/host-memory-$part.log
export PYTHONUNBUFFERED=1
if [ "$part" = deepspeed ] || [ "$part" = longest ]; then
  [ -n "${DEEPSPEED_ENV:-}" ] && . "$DEEPSPEED_ENV"
fi
if [ "${INSTALL:-1}" = 1 ]; then
  (cd "$here/../.." && env -u CFLAGS -u LDFLAGS python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target /tmp/site .) || exit 1
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
fi
shape=${SHAPE:-1.10B} deep=${DEEP_SHAPE:-3.02B} half=${HALF_BLOCKS:-14} large=${LARGE_SHAPE:-8B}
read -r -a batch <<< "${BATCH:---samples 8 --seq-len 2048}"  # of every run of both systems
read -r -a common <<< "${COMMON:-}"                          # more arguments for every run of overspill, as --dtype float32

# run NAME SECONDS COMMAND...: run it if it is wanted and if at least half of its time is left.
run() {
  local name=$1 seconds=$2 left=$((deadline - SECONDS))
  shift 2
  [ "$wanted" = "  " ] || [[ $wanted == *" $name "* ]] || return 0
  if [ $((left * 2)) -lt "$seconds" ]; then
    echo "{\"system\": \"none\", \"name\": \"$name\", \"shape\": \"\", \"error\": \"not started: $left s left of the part\"}" >> "$out"
    return 0
  fi
  [ "$left" -lt "$seconds" ] && seconds=$left
  echo "== $name (at most $seconds s)"
  timeout -k 5 "$seconds" "$@"
  local code=$?
  if [ $code -eq 124 ] || [ $code -ge 128 ]; then
    echo "{\"system\": \"none\", \"name\": \"$name\", \"shape\": \"\", \"error\": \"ended from outside with status $code after $seconds s or less\"}" >> "$out"
  fi
}
overspill() {  # NAME SECONDS SHAPE ARGUMENTS...
  local name=$1 seconds=$2 which=$3
  shift 3
  run "$name" "$seconds" python3 "$here/run_overspill.py" --name "$name" --shape "$which" --ssd-dir "$ssd/overspill" --out "$out" \
    "${batch[@]}" ${common[@]+"${common[@]}"} "$@"
  rm -rf "$ssd/overspill"
}
deepspeed() {  # NAME SECONDS CONFIGURATION ARGUMENTS...
  local name=$1 seconds=$2 configuration=$3
  shift 3
  # Its own limit comes before the one from outside: it then writes what it saw, and removes its files.
  local left=$((deadline - SECONDS - 15))
  [ "$left" -gt 15 ] && [ "$left" -lt "$seconds" ] && seconds=$left
  run "$name" $((seconds + 15)) python3 "$here/run_deepspeed.py" --name "$configuration" --shape "$shape" --ssd-dir "$ssd" --limit-s "$seconds" \
    --out "$out" "${batch[@]}" "$@"
}
ssd_states=(--parameters ssd --states ssd --boundaries device)  # as ZeRO-Infinity: hidden states stay on the GPU
all_ssd=(--parameters ssd --states ssd --boundaries ssd)

{
  case $part in
    overspill)
      overspill host 60 "$shape" --boundaries device --steps 4
      overspill host-clip 60 "$shape" --boundaries device --clip 1.0 --steps 4
      overspill ssd 120 "$shape" "${ssd_states[@]}"
      overspill ssd-clip 140 "$shape" "${ssd_states[@]}" --clip 1.0
      overspill ssd-bf16 100 "$shape" "${ssd_states[@]}" --state-format bf16
      overspill all-ssd 130 "$shape" "${all_ssd[@]}"
      ;;
    depth)
      overspill half-depth 180 "$deep" "${all_ssd[@]}" --blocks "$half" --steps 2
      overspill whole-depth 330 "$deep" "${all_ssd[@]}" --steps 2
      ;;
    deepspeed)
      overspill ssd 120 "$shape" "${ssd_states[@]}"
      deepspeed infinity-both 150 infinity-both
      deepspeed infinity-states 120 infinity-states
      deepspeed zero3-cpu 60 zero3-cpu
      deepspeed infinity-both-clip 150 infinity-both --clip 1.0
      deepspeed infinity-both-defaults 60 infinity-both --live 1000000000 --prefetch 50000000 --buffer-count 24 --steps 1
      ;;
    parts)
      # One step shows the peak. Rounding to powers of two shows where much rests in host memory.
      overspill parts-host-as-is 40 "$shape" --steps 1
      overspill parts-host-no-pinned 40 "$shape" --steps 1 --off pinned
      overspill parts-as-is 80 "$shape" "${all_ssd[@]}" --steps 1
      for off in pool pinned check engine check-flat; do
        overspill "parts-no-$off" 90 "$shape" "${all_ssd[@]}" --steps 1 --off "$off"
      done
      ;;
    longest)
      run longest 370 python3 "$here/longest.py" --shape "$large" --ssd-dir "$ssd/overspill" --seconds 355 --out "$out" ${LONGEST:-}
      rm -rf "$ssd/overspill"
      if python3 -c 'import deepspeed' 2>/dev/null; then
        run longest-deepspeed 120 python3 "$here/longest.py" --system deepspeed --shape "$large" --ssd-dir "$ssd" --start-tokens 4096 \
          --configurations zero3-cpu infinity-both --trial-seconds 50 --seconds 100 --out "$out"
      fi
      ;;
    *)
      echo "PART is one of overspill, depth, deepspeed, parts, longest; got $part"
      exit 2
      ;;
  esac
} 2>&1 | tee -a "$log" | grep -v -i warn | tail -150
code=${PIPESTATUS[0]}
python3 "$here/summarize.py" "$results"
exit "$code"
