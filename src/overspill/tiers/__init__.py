"""Tiers: where bytes rest, and how they move. Host and device memory, slots borrowed from it, and stores on an SSD.

The protocols and the rules they share are in `protocol.py`; read that first. Each other file is one mechanism and can be
replaced by another that meets its protocol.
"""

from __future__ import annotations

from overspill.tiers.arena import Arena
from overspill.tiers.fake import Failure, FailureRule, FakeStore
from overspill.tiers.faults import Fault, FaultInjector, FaultKind
from overspill.tiers.load import TransferSpan, load_profile, peak_to_mean
from overspill.tiers.memory import DeviceMemory, HostMemory
from overspill.tiers.pool import Slot, SlotPool
from overspill.tiers.protocol import CheckedTransfer, Memory, Store, Transfer
from overspill.tiers.records import RecordStore
from overspill.tiers.ssd import SsdStore

__all__ = [
    "Arena",
    "CheckedTransfer",
    "DeviceMemory",
    "Failure",
    "FailureRule",
    "FakeStore",
    "Fault",
    "FaultInjector",
    "FaultKind",
    "HostMemory",
    "Memory",
    "RecordStore",
    "Slot",
    "SlotPool",
    "SsdStore",
    "Store",
    "Transfer",
    "TransferSpan",
    "load_profile",
    "peak_to_mean",
]
