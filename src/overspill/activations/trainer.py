"""The transformers Trainer with saved tensors that leave the device: one callback.

    trainer = Trainer(..., callbacks=[overspill.OffloadActivationsCallback(host_budget="32GiB", ssd_dir="/nvme/overspill")])

It attaches to the model's forward instead of being a block around the loop, so an exception in training leaves no hook behind. What the
Trainer computes outside of the model (a loss of its own) stays on the device. After such an exception no hook is active, but the model has
the callback's still, with the memory: until the next training ends, or the callback dies.
"""

from __future__ import annotations

import weakref
from typing import Any

from transformers import TrainerCallback

from overspill.activations.context import OffloadActivations, offload_activations
from overspill.spec.activations import ActivationReport


class OffloadActivationsCallback(TrainerCallback):
    """Active from the beginning of training to its end.

    Args:
        settings: the arguments of `offload_activations`, but for the model.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._offload: OffloadActivations | None = None
        self._at_death: weakref.finalize[..., Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach; once more if an earlier training was broken off.

        Raises:
            ValueError: see `offload_activations`.
        """
        self._detach()
        self._offload = offload_activations(model, **self._settings)
        self._offload.attach()
        self._at_death = weakref.finalize(self, self._offload.detach)
        self._at_death.atexit = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach; the report stays."""
        self._detach()

    def report(self) -> ActivationReport:
        """Of the last training.

        Raises:
            RuntimeError: there was none.
        """
        if self._offload is None:
            raise RuntimeError("nothing was trained with this callback yet")
        return self._offload.report()

    def _detach(self) -> None:
        if self._at_death is not None:
            self._at_death.detach()
            self._at_death = None
        if self._offload is not None:
            self._offload.detach()
