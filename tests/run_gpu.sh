#!/usr/bin/env bash
# The tests that need a GPU, some files side by side, within DEADLINE_S (300) seconds.
#   bash tests/run_gpu.sh RESULTS_DIR [FILE...]
# FILE: test files, the most wanted first; without: all that have the marker.
#   PROCESSES  files at a time (6)
#   INSTALL=0  overspill is importable already
# Writes RESULTS_DIR/gpu-tests.txt: each test's verdict, and of files that the deadline ended what they had come to.
set -uo pipefail
mkdir -p "$1" && results=$(cd "$1" && pwd) || exit 1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
cd "$root" || exit 1
if [ "${INSTALL:-1}" = 1 ]; then
  env -u CFLAGS -u LDFLAGS python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target /tmp/site . || exit 1
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
fi
[ $# -gt 0 ] || mapfile -t files < <(grep -rlE 'pytest\.mark\.gpu\b' tests --include='test_*.py' | sort)
[ $# -gt 0 ] && files=("$@")
export LOGS=$logs END=$(($(date +%s) + ${DEADLINE_S:-300} - SECONDS - 15))
run_file() { # SIGINT lets pytest tell what it has come to; what does not end then is killed
  local left=$((END - $(date +%s)))
  [ "$left" -gt 0 ] && timeout -s INT -k 10 "$left" python3 -m pytest -m gpu -v --tb=short --durations=5 -p no:cacheprovider "$1" > "$LOGS/${1//\//-}.txt" 2>&1
  true
}
export -f run_file
printf '%s\n' "${files[@]}" | xargs -P "${PROCESSES:-6}" -I FILE bash -c 'run_file FILE'
cat "$logs"/*.txt > "$results/gpu-tests-full.txt" 2> /dev/null
grep -hoE '^tests/\S+::.* (PASSED|FAILED|ERROR|SKIPPED)|^(FAILED|ERROR) tests/.*' "$logs"/*.txt | sort -u > "$results/gpu-tests.txt"
grep -hE '^(E  |FAILED|ERROR)|(passed|failed|error).* in [0-9.]+s' "$logs"/*.txt | cut -c1-300 | tail -60
echo "$(grep -c PASSED "$results/gpu-tests.txt") passed, $(grep -c '^FAILED' "$results/gpu-tests.txt") failed, of ${#files[@]} files, in $SECONDS s"
