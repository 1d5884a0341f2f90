"""Claims about `report`: what a person sees and what is on file."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from overspill.report.memory import host_peak_bytes, host_resident_bytes, reset_host_peak
from overspill.report.tables import placement_table


def test_the_placement_table_sums_each_tier() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(
        placement_table([("parameters", {"device": 0, "host": 1 << 20, "ssd": 0}), ("states", {"host": 2 << 20, "ssd": 5 << 30})])
    )
    text = console.file.getvalue()
    assert [line.split() for line in text.splitlines() if "sum" in line][0] == [
        "│",
        "sum",
        "│",
        "–",
        "│",
        "3.00",
        "MiB",
        "│",
        "5.00",
        "GiB",
        "│",
    ]


def test_the_host_peak_sees_what_was_freed_again_and_can_be_reset() -> None:
    size = 64 << 20
    before = host_resident_bytes()
    block = np.ones(size, dtype=np.uint8)
    del block
    assert host_peak_bytes() >= before + size * 0.9
    if reset_host_peak():
        assert host_peak_bytes() < before + size * 0.5
