"""Activations: what autograd saved in forward, kept on the device or moved to host memory and SSD until backward wants it.

Read `context.py` first (what a user sees), then `cache.py` (what happens to a saved tensor). Each other file is one mechanism:

* `identity.py`: which bytes a saved tensor is, whether they changed, and which of them are weights.
* `amounts.py`: how much leaves, decided from measured times; pure.
* `mover.py`, with `links.py` (device ↔ host), `arena.py` (host memory) and `drive.py` (the SSD: from host memory in `ssd_lane.py`, from the
  device itself in `direct_lane.py`): how it moves.
* `rebuild.py` and `segments.py`: what is recomputed instead, op by op and module by module.
* `timeline.py`, `tally.py`: what is measured and counted. `forms.py`: fewer bits. `settings.py`: what is refused.
"""

from __future__ import annotations

from overspill.activations.amounts import Adaptive, Amount, Everything, Nothing, SsdTrain
from overspill.activations.context import OffloadActivations, offload_activations

__all__ = ["Adaptive", "Amount", "Everything", "Nothing", "OffloadActivations", "SsdTrain", "offload_activations"]
