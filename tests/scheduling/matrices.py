"""A model of matrices, and plans for it."""

from __future__ import annotations

import itertools

from overspill.planning import build_layout, build_plan
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.tensors import TensorSpec
from overspill.spec.workload import ModelLayout

HIDDEN, VOCAB, BLOCKS = 64, 256, 3
CHUNK_BYTES = 128 * 1024


def make_layout(*, tied: bool, dtype: str = "float32", blocks: int = BLOCKS) -> ModelLayout:
    """A model of matrices: 256 x 64 embedding, blocks of two 64 x 256 matrices and a norm, a norm and a head."""
    parameters = {"embed": TensorSpec(name="embed", shape=(VOCAB, HIDDEN), dtype=dtype)}
    units: dict[str, list[str]] = {"embedding": ["embed"]}
    for index in range(blocks):
        for name, shape in (("up", (256, HIDDEN)), ("down", (HIDDEN, 256)), ("norm", (HIDDEN,))):
            parameters[f"{index}.{name}"] = TensorSpec(name=f"{index}.{name}", shape=shape, dtype=dtype, decay=name != "norm")
        units[f"block.{index}"] = [f"{index}.up", f"{index}.down", f"{index}.norm"]
    parameters["norm"] = TensorSpec(name="norm", shape=(HIDDEN,), dtype=dtype, decay=False)
    units["tail"] = ["norm", "embed"] if tied else ["norm", "head"]
    if not tied:
        parameters["head"] = TensorSpec(name="head", shape=(VOCAB, HIDDEN), dtype=dtype)
    unit_list, bundles = build_layout(units, parameters, lambda kind, trainable: 16, dtype=dtype, chunk_bytes=CHUNK_BYTES)
    return ModelLayout(model="Matrices", units=unit_list, bundles=bundles, hidden_size=HIDDEN, vocab_size=VOCAB)


def make_plan(*, tied: bool = False, device: str = "cuda:0", **request: object) -> Plan:
    defaults = {"dtype": "float32", "seq_len": 8, "micro_batch": 2, "accumulate": 4, "ssd_dir": "/nowhere"}
    wanted = PlanRequest(**{**defaults, **request})  # type: ignore[arg-type]
    return build_plan(wanted, make_layout(tied=tied, dtype=wanted.dtype), HardwareSpec(), device=device)


PLACEMENTS = list(itertools.product(["device", "host", "ssd"], repeat=3))
