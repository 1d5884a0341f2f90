#!/usr/bin/env bash
# Everything of the spine that needs a GPU, in one go: build, the tests marked `gpu`, the 1.10B run with states on host and on SSD.
#   bash benchmarks/spine/run_gpu.sh RESULTS_DIR SSD_DIR
set -uo pipefail
results=$1 ssd=$2
mkdir -p "$results"
python3 -m pip install -q --no-deps --no-build-isolation --target /tmp/site . || exit 1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
  timeout 330 python3 -m pytest tests -m gpu -q --maxfail=10 -p no:cacheprovider
} 2>&1 | tee "$results/spine-gpu-tests.txt" | tail -40
timeout 120 python3 benchmarks/spine/train_llama.py --parameters host --states host --out "$results/spine-1.10B-host.json"
timeout 150 python3 benchmarks/spine/train_llama.py --parameters ssd --states ssd --boundaries ssd --ssd-dir "$ssd" --steps 3 --out "$results/spine-1.10B-ssd.json"
