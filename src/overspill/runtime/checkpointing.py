"""Making checkpoints of a session, and starting a session from one.

How saving works:

1. Pending updates are flushed, so the homes hold the newest state.
2. What rests on the SSD is in the data file already: nothing is moved. What rests in host or device memory is written to its
   record's free slot.
3. The data file is flushed to the drive, then the manifest is written, flushed, and renamed into place (`checkpoint/manifests`).
4. The slots it names are pinned: the next steps write elsewhere. Checkpoints beyond `keep` are removed, their slots are free; of a
   directory that was resumed, first those that were newer than the one it went on from.

How starting works: the records of the newest manifest become the current ones. Where the new plan has a home on the SSD of
that same directory, nothing is copied; every other home is filled record by record, verified.

Rule: a failure after step 2 has begun ends the session's use, because the manifest may or may not have been published; the
last checkpoint that was published is whole in either case.

Costs: `keep + 1` times the state in the data file, reserved when the session opens; one chunk of host memory.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from overspill.checkpoint import discard_manifests, find_manifests, manifest_path, open_records, remove_manifest, write_manifest
from overspill.errors import BudgetError
from overspill.runtime.residency import Residency
from overspill.spec.checkpoint import CheckpointPolicy, Manifest, RecordEntry
from overspill.spec.plan import Plan
from overspill.spec.schedule import Piece, initial_copies
from overspill.spec.tensors import Tier
from overspill.spec.update_rule import LearningRate, LossScale, Optimizer
from overspill.tiers import RecordStore, SsdStore
from overspill.tiers.block_device import is_block_device
from overspill.tiers.calls import FileCalls, SpacePolicy, SpaceWaiter
from overspill.tiers.checksums import ALGORITHM, BLOCK_BYTES, to_hex
from overspill.tiers.extent_file import FILE_NAME
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES
from overspill.tiers.records import Generation
from overspill.tiers.run_lock import DirectoryLock
from overspill.units import align_up, format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionState:
    """What a checkpoint holds besides records."""

    step: int
    optimizer: Optimizer
    learning_rate: LearningRate
    loss_scale: LossScale | None
    seed: int
    chunk_bytes: int
    config: Any
    data_position: Any


class Checkpointer:
    """The checkpoints of one session; owns nothing that the residency does not close.

    Args:
        source: the manifest to start from and its directory; None for a fresh run.

    Raises:
        ValueError: no directory, or another one than the SSD directory of the plan.
        StorageError: checkpoints of an earlier run are in the way, or the data file cannot be used.
        BudgetError: there is no room for `keep + 1` times the state.
    """

    def __init__(
        self,
        policy: CheckpointPolicy,
        plan: Plan,
        *,
        source: tuple[Manifest, Path] | None,
        calls: FileCalls,
        space: SpacePolicy,
        num_threads: int,
        overwrite: Sequence[str] = (),
    ) -> None:
        self.plan, self.keep, self._calls = plan, policy.keep, calls
        self.directory = resolve_directory(policy, plan)
        self._space = SpaceWaiter(space)
        pieces = initial_copies(plan, pending=False)
        self.capacity_bytes = room_bytes(policy, plan)
        budget = plan.ssd_budget_bytes
        if budget is not None and plan.ssd_dir is not None and self.capacity_bytes > budget:
            raise BudgetError(
                f"{policy.keep} checkpoint{'s' if policy.keep > 1 else ''} beside the state need {format_bytes(self.capacity_bytes)} in "
                f"{self.directory}, the budget leaves {format_bytes(budget)}; raise --ssd-budget, or lower --keep"
            )
        self._generations: dict[int, Generation] = {}
        self._passed_over: set[int] = set()
        """Checkpoints that are newer than the one this run goes on from."""
        places = data_places(self.directory, plan)
        self._lock = None if any(_is_same(place, self.directory) for place in places) else DirectoryLock(self.directory)
        try:
            self._open(policy, pieces, places, source, calls, space, num_threads, overwrite)
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise

    def _open(
        self,
        policy: CheckpointPolicy,
        pieces: Mapping[tuple[Piece, Tier], int],
        places: tuple[str, ...],
        source: tuple[Manifest, Path] | None,
        calls: FileCalls,
        space: SpacePolicy,
        num_threads: int,
        overwrite: Sequence[str],
    ) -> None:
        """The records: those of the checkpoint that is resumed, or new ones."""
        self._is_new_file = source is None or source[1].resolve() != self.directory.resolve()
        if source is not None and source[1].resolve() == self.directory.resolve():
            self.records, self._generations = open_records(
                self.directory, source[0], keep=policy.keep, calls=calls, space=space, num_threads=num_threads, places=places
            )
            self._passed_over = {number for number in self._generations if number > source[0].generation}
        else:
            store = SsdStore(
                places,
                capacity_bytes=self.capacity_bytes,
                num_threads=num_threads * len(places),
                overwrite=overwrite,
                calls=calls,
                space=space,
                before_discarding=lambda: discard_manifests(self.directory, allowed=policy.discard),
            )
            self.records = RecordStore(store, num_slots=policy.keep + 1)
            try:
                for (piece, _), size in pieces.items():
                    self.records.create(str(piece), size)
            except BaseException:
                store.close()
                raise

    @property
    def _store(self) -> SsdStore:
        store = self.records.store
        assert isinstance(store, SsdStore)
        return store

    def save(self, residency: Residency, state: SessionState) -> Manifest:
        """Publish a checkpoint of what the homes hold now.

        Raises:
            StorageError: a call failed; see the rule above.
        """
        self._write_memory(residency)
        self._store.flush()
        manifest = self._build_manifest(state)
        generation = self.records.current()
        self._store.keep()
        write_manifest(self.directory, manifest, calls=self._calls, space=self._space)
        self.records.pin(generation)
        self._generations[manifest.generation] = generation
        while len(self._generations) > self.keep:
            oldest = min(self._passed_over or self._generations)
            self._passed_over.discard(oldest)
            remove_manifest(manifest_path(self.directory, oldest), calls=self._calls)
            self.records.unpin(self._generations.pop(oldest))
        return manifest

    def close(self) -> None:
        """End a pause for space; without a checkpoint the data file goes with the session that made it."""
        self._space.stop()
        if self._is_new_file and not find_manifests(self.directory):
            self._store.keep(False)
        if self._lock is not None:
            self._lock.close()

    def _write_memory(self, residency: Residency) -> None:
        """Step 2. A frozen weight that was written before has not changed."""
        for piece, tier in initial_copies(self.plan, pending=False):
            is_frozen = not self.plan.bundles[piece.owner].trainable
            if tier is Tier.SSD or (is_frozen and self.records.is_written(str(piece))):
                continue
            data = residency.bytes_of(piece, tier)
            if data.device.type == "cpu":
                self.records.start_write(str(piece), data).wait()
                continue
            with residency.host_pool.borrow(data.numel()) as slot:
                slot.tensor.copy_(data)
                self.records.start_write(str(piece), slot.tensor).wait()

    def _build_manifest(self, state: SessionState) -> Manifest:
        entries = []
        for name in self.records.names:
            version = self.records.version(name)
            entries.append(
                RecordEntry(
                    name=name,
                    num_bytes=version.num_bytes,
                    slots=version.slots,
                    positions=tuple(self._store.position(slot) for slot in version.slots),
                    slot=version.slot,
                    checksums=to_hex(version.checksums),
                )
            )
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return Manifest(
            generation=max(self._generations, default=0) + 1,
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            plan=self.plan,
            data_file=FILE_NAME,
            data_file_bytes=self._store.capacity_bytes,
            block_bytes=BLOCK_BYTES,
            checksum=ALGORITHM,
            records=tuple(entries),
            stripes=self._store.stripe_set,
            **fields,
        )


def room_bytes(policy: CheckpointPolicy, plan: Plan) -> int:
    """Size of the data file: every record once more than checkpoints are kept."""
    state = sum(align_up(size, EXTENT_ALIGNMENT_BYTES) for size in initial_copies(plan, pending=False).values())
    return (policy.keep + 1) * state


def describe_room(policy: CheckpointPolicy, plan: Plan) -> str:
    """What checkpoints take, for the plan's notes."""
    number = f"{policy.keep} checkpoint{'s' if policy.keep > 1 else ''}"
    return (
        f"{number} kept in {resolve_directory(policy, plan)}: {format_bytes(room_bytes(policy, plan))} are reserved there, "
        f"{policy.keep + 1} times the state"
    )


def _is_same(place: str | Path, other: Path) -> bool:
    return Path(place).resolve() == other.resolve()


def data_places(directory: Path, plan: Plan) -> tuple[str, ...]:
    """Where the data of checkpoints in `directory` rests: all places of the plan if it is one of them, or if they are block devices."""
    folders = [place for place in plan.ssd_places if not is_block_device(place)]
    is_ours = bool(plan.ssd_places) and (not folders or Path(folders[0]).resolve() == directory.resolve())
    return plan.ssd_places if is_ours else (str(directory),)


def resolve_directory(policy: CheckpointPolicy, plan: Plan) -> Path:
    """Where the checkpoints of `plan` go.

    Raises:
        ValueError: nowhere, or not where the state rests.
    """
    on_ssd = any(tier is Tier.SSD for _, tier in initial_copies(plan, pending=False))
    folder = next((place for place in plan.ssd_places if not is_block_device(place)), None)
    directory = folder if policy.directory is None else policy.directory
    if directory is None:
        which = f"on {plan.ssd_dir} there are no files; " if plan.ssd_dir is not None else ""
        raise ValueError(f"checkpoints need a directory: {which}name one in CheckpointPolicy(directory=...), or give --ssd-dir")
    if on_ssd and folder is not None and Path(directory).resolve() != Path(folder).resolve():
        raise ValueError(
            f"state rests in {folder} and checkpoints would go to {directory}: with state on the SSD both are one directory, "
            "since a checkpoint copies nothing; leave the checkpoint directory out"
        )
    return Path(directory)


def restore_homes(residency: Residency, source: RecordStore) -> None:
    """Fill every home that is not one of `source`'s own records, record by record, verified.

    Raises:
        StorageError: a record is damaged or cannot be read; it names it.
    """
    for piece, tier in initial_copies(residency.plan, pending=False):
        if tier is Tier.SSD and residency.store is source:
            continue
        if tier is not Tier.SSD and residency.bytes_of(piece, tier).device.type == "cpu":
            source.start_read(str(piece), residency.bytes_of(piece, tier)).wait()
            continue
        with residency.host_pool.borrow(source.version(str(piece)).num_bytes) as slot:
            source.start_read(str(piece), slot.tensor).wait()
            if tier is Tier.SSD:
                store, name = residency.record_of(piece)
                store.start_write(name, slot.tensor).wait()
            else:
                residency.bytes_of(piece, tier).copy_(slot.tensor)


_VOLATILE = {"transformers_version", "_name_or_path", "name_or_path", "use_cache", "dtype", "torch_dtype", "architectures"}
"""Of a configuration: what says nothing about the model's function."""


def config_facts(config: Any) -> Any:
    """A transformers configuration as plain JSON."""
    return json.loads(config.to_json_string(use_diff=False))


def validate_same_run(manifest: Manifest, plan: Plan, config: Any) -> None:
    """Refuse to go on with another model, or with what would give other weights.

    Raises:
        ValueError: with what differs, the checkpoint's value and the new one.
    """
    differences = list(_differences(manifest, plan, config))
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ValueError(f"the checkpoint of step {manifest.step} does not continue this run: {shown}")


def _differences(manifest: Manifest, plan: Plan, config: Any) -> Iterator[str]:
    old = manifest.plan
    if old.model != plan.model:
        yield f"it is of a {old.model}, this is a {plan.model}"
        return
    for field in ("dtype", "optimizer", "state_format", "clip", "micro_batch", "accumulate"):
        if getattr(old, field) != getattr(plan, field):
            yield f"{field} was {getattr(old, field)}, now {getattr(plan, field)}"
    before, now = _tensors(old), _tensors(plan)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name, 'not there')}, now {now.get(name, 'not there')}"
    if before == now and dict(old.bundles) != dict(plan.bundles):
        yield "its tensors are laid out in other chunks"
    new_config = config_facts(config)
    for key in sorted(manifest.config.keys() | new_config.keys()):
        if key not in _VOLATILE and manifest.config.get(key) != new_config.get(key):
            yield f"the model's {key} was {manifest.config.get(key)}, now {new_config.get(key)}"


def _tensors(plan: Plan) -> Mapping[str, str]:
    return {
        slot.tensor.name: f"{slot.tensor.dtype}{list(slot.tensor.shape)}{'' if bundle.trainable else ' frozen'}"
        for bundle in plan.bundles.values()
        for slot in bundle.slots
    }


__all__ = [
    "Checkpointer",
    "SessionState",
    "config_facts",
    "describe_room",
    "data_places",
    "resolve_directory",
    "restore_homes",
    "validate_same_run",
]
