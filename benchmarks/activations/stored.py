"""How much of what a block's graph saves has to be stored, and what rebuilding the rest moves: from the configuration, without a device.

    python benchmarks/activations/stored.py --out stored.json

One block of each shape is traced with tensors that have no values, as a plan does for `--activations keep`. `stored_bytes` are what mode
`keep` holds of a block and micro-batch, `whole_bytes` all that autograd saves beside weights and hidden states, and `rebuilt_moved_bytes`
what the ops that rebuild the difference read and write; `costly_` is the same of mode `keep-costly`, between the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import SHAPES  # noqa: E402

from overspill.activations.retaining import book_without_values  # noqa: E402
from overspill.huggingface.workload import describe_workload  # noqa: E402
from overspill.spec.retention import ON_DEVICE  # noqa: E402

CASES = (("1.10B", 2048, 8), ("1.10B", 16384, 1), ("3.02B", 2048, 8), ("3.02B", 16384, 1), ("8B", 2048, 8), ("14B", 2048, 8))
"""(shape, length, rows)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    rows = []
    for name, length, samples in CASES:
        config = SHAPES[name].config(max_positions=length)
        found = describe_workload(
            config, seq_len=length, micro_batch=samples, dtype=options.dtype, device="cuda", open_book=book_without_values
        )
        for item in found.classes:
            if item.retention is not None:
                kept, costly, whole = (item.retention.of(mode) for mode in ON_DEVICE)
                row = {"shape": name, "length": length, "rows": samples}
                row |= {"stored_bytes": kept.stored_bytes, "whole_bytes": whole.stored_bytes}
                row |= {"stored_fraction": kept.stored_bytes / whole.stored_bytes, "rebuilt_moved_bytes": kept.rebuilt.moved_bytes}
                row |= {"costly_stored_bytes": costly.stored_bytes, "costly_rebuilt_moved_bytes": costly.rebuilt.moved_bytes}
                rows.append(row)
                print(f"{name:6} {samples} x {length:5}: {row['stored_fraction']:.3f} of {whole.stored_bytes / 2**30:.2f} GiB stored")
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
