"""Where a run stands in its data: small enough for a checkpoint, exact enough to go on from.

A **row** is one row of a micro-batch: a sample, or several samples packed into one row. Within an epoch rows come in an order that
seed, epoch, data and settings fix, so (epoch, index) says everything: the feed makes the same order again and passes over
`index` rows. A position is taken between optimizer steps. It is only good for the same data and the same settings; what differs
is named, with both values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from overspill.errors import DataError
from overspill.spec.documents import from_plain, to_plain

Setting = str | int | float | bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPosition:
    """See the module's docstring; a checkpoint stores `to_plain()` and looks at nothing inside."""

    seed: int
    """Of the order of rows and of the held-out split."""
    epoch: int
    """Passes over the data that are complete, from 0."""
    index: int
    """Rows of this epoch that were given to optimizer steps; may be all of them."""
    fingerprint: str
    """Of the data as tokenized (a stream: of its files and its first samples)."""
    settings: Mapping[str, Setting]
    """What else decides which rows a step gets, by the flag's name: micro-batch, accumulate, packing …"""

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return to_plain(self)

    @classmethod
    def from_plain(cls, plain: Any) -> Self:
        """Read `to_plain()` back.

        Raises:
            ValueError: a field is missing or unknown.
        """
        return from_plain(cls, plain)

    def validate_same_data(self, here: DataPosition) -> None:
        """Refuse to go on from this position in a run that starts at `here`.

        Raises:
            DataError: with everything that differs and both values.
        """
        differing = [] if self.seed == here.seed else [f"--seed {self.seed} there, {here.seed} here"]
        for name in sorted({*self.settings, *here.settings}):
            there_value, here_value = self.settings.get(name), here.settings.get(name)
            if there_value != here_value:
                differing.append(f"--{name} {there_value} there, {here_value} here")
        if self.fingerprint != here.fingerprint:
            differing.append(f"the data (fingerprint {self.fingerprint[:12]} there, {here.fingerprint[:12]} here)")
        if differing:
            raise DataError(
                f"cannot go on from epoch {self.epoch}, row {self.index}: this run differs in {'; '.join(differing)}; "
                "give the same data and flags, or start a new run"
            )
