"""The tensor cache: what autograd's two hooks do with every saved tensor.

Pack decides once: leave it alone, or make it a view of a record (new, or one that is there already), which stays or leaves. What pack
returns is a *saved* object that autograd holds for exactly as long as it may unpack; when the last one of a record dies, all of the record
goes. So nothing needs to be told when a graph is done, kept (`retain_graph`), dropped by an exception, or built twice (double backward).

Rules:

1. Every saved tensor has its version checked when it is unpacked, also one that is left alone: with hooks active nobody else does.
2. No saved object refers to the tensor that was packed, only to a detached alias or to bytes: an output that knows its own graph would keep
   it alive for ever.
3. Views of one storage are views of one record, as long as they share their version and it is the same. A record takes the whole storage
   where the view that is saved first covers at least half of it, for nothing is freed while another view holds the rest; else its span
   alone.
4. What is saved during backward (recomputation, double backward) is left alone: it is wanted at once.
5. Whatever is still alive is not fetched: a storage that somebody else holds is looked up by its weak reference.
6. Unpacking a record fetches others before they are wanted (`fetching.py`).
7. A saved object that dies only notes it; the books are changed by whoever holds the lock, because the collector may run anywhere.
8. What was cast to a wider dtype is stored in the one that it was cast from, where that is chosen as rebuilding is: a place that is rebuilt
   and takes memory all the same.
9. Storages of a micro-batch have places, in the order in which they are saved, stored or rebuilt. A module that is run again takes as many
   as when it was not, so what comes behind it has the same.

Based on SSDTrain's tensor cache (Wu et al., arXiv:2408.10013).
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Sequence

import torch

from overspill.activations.amounts import Target
from overspill.activations.fetching import Fetching
from overspill.activations.forms import CastFrom, Form
from overspill.activations.identity import (
    PLAIN_KINDS,
    Geometry,
    ParameterStorages,
    aligned_start,
    byte_span,
    bytes_of,
)
from overspill.activations.links import THREAD_PREFIX, Mark
from overspill.activations.mover import Mover
from overspill.activations.rebuild import Rebuild, Rebuilder, SavedRebuilt
from overspill.activations.records import Record
from overspill.activations.repeating import Buried, Kept, Repeating, SavedKept
from overspill.activations.rounds import Rounds
from overspill.activations.saved import SavedAlone, SavedView
from overspill.activations.segments import PLAIN_CALL, Call
from overspill.activations.timeline import WatchedCall


class TensorCache:
    """Packs and unpacks; thread-safe, for backward has threads of its own.

    Args:
        min_bytes: smaller saved tensors are left alone.
        form: how records are stored; None: as they are.
        rebuilder: None: nothing is rebuilt.
    """

    def __init__(
        self,
        mover: Mover,
        parameters: ParameterStorages,
        rounds: Rounds,
        *,
        min_bytes: int,
        form: Form | None,
        rebuilder: Rebuilder | None = None,
    ) -> None:
        self.mover, self.parameters, self.rounds, self.rebuilder = mover, parameters, rounds, rebuilder
        self._min_bytes, self._form = min_bytes, form
        self.device = mover.device
        self._lock = threading.Lock()
        self._dead: collections.deque[Record | Buried] = collections.deque()
        """Records a view of which has died; and what was kept again, without one."""
        self._by_storage: dict[int, list[Record]] = {}
        self.fetching = Fetching(mover, rounds, self._note_backward)
        self.repeating = Repeating(rounds, parameters, mover.device, min_bytes)
        self._micro_batch = 0
        self._backward_id = -1
        self.num_live = 0
        self.num_packed = 0
        """Places of this micro-batch so far (rule 9)."""
        self._num_calls = 0
        """Of modules that may be run again, in this micro-batch so far."""
        self._open_call: _OpenCall | None = None
        """The one of these whose forward runs."""
        self.is_innermost: Callable[[], bool] = lambda: True
        """Whether no hooks of others lie over ours."""
        self._when_empty: Callable[[], None] | None = None
        """Called once the last record has died, if set."""

    # -- the hooks ---------------------------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> SavedAlone | SavedView | SavedRebuilt | torch.Tensor:
        """Autograd's pack hook.

        Raises:
            StorageError: a write to the SSD has failed.
        """
        if torch.compiler.is_compiling():
            return tensor
        if self._open_call is not None:
            self._open_call.note_packed()
        if self.repeating.is_on and torch._C._current_graph_task_id() == -1:
            kept = self.repeating.next_pack(tensor, self._micro_batch)
            if kept is not None and (again := self._keep_again(tensor, *kept)) is not None:
                return again
        has_graph = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # a context takes three times as long, and Ctrl-C can come between its lines
            reason, storage = self._reason_to_leave(tensor)
            if reason is not None:
                self.rounds.tally.left_alone[reason] += 1
                restore = self.parameters.restorer(storage) if storage is not None else None
                return SavedAlone(tensor, restore)
            assert storage is not None
            with self._lock:
                num_before, is_shared = self.num_packed, self.repeating.is_on and self._has_saved(storage._cdata)
                saved = self._pack(tensor, storage)
                if self.repeating.is_on:  # perhaps only now: the first record begins a round
                    self.repeating.note(tensor, saved, is_new=self.num_packed != num_before, is_shared=is_shared)
                return saved
        finally:
            torch._C._set_grad_enabled(has_graph)
            if self._dead:
                self._burial()

    def unpack(self, saved: SavedAlone | SavedView | SavedRebuilt | torch.Tensor) -> torch.Tensor:
        """Autograd's unpack hook.

        Raises:
            RuntimeError: the tensor was changed in place after it was packed.
            StorageError: it cannot be read, or a write to the SSD has failed.
        """
        with torch.no_grad():
            return saved if isinstance(saved, torch.Tensor) else saved.unpack()

    def bring(self, record: Record, geometry: Geometry) -> torch.Tensor:
        """A view of a record, on the device and ready for compute."""
        try:
            with self._lock:
                self._look_around()
                if record.watch.is_changed:
                    record.watch.check(record.name)
                if self.rounds.timeline is not None:
                    self.rounds.timeline.need(record)
                record.is_wanted = True
                self._expect_decision()
                span = self._on_device(record) if not record.is_whole else None
                self._drop_left_in_backward()
                self.fetching.fetch_around(record)
                view = geometry.view(span) if span is not None else geometry.within(record.watch.alias, record.start)
                return record.watch.counting(view)
        finally:
            self._burial()

    def want(self, place: int, micro_batch: int) -> None:
        """Backward wants what was kept there (`repeating.py`)."""
        if not self.fetching.num_moved and not self.rounds.awaits_backward:
            return
        try:
            with self._lock:
                self._look_around()
                self._expect_decision()
                self._drop_left_in_backward()
                self.fetching.fetch_in_turn(place, micro_batch)
        finally:
            self._burial()

    def _drop_left_in_backward(self) -> None:
        """What is wanted soon stays: it would be fetched again at once."""
        self.mover.drop_left(self.rounds.gone_in_backward(), spared_bytes=self.mover.back_window_bytes)

    def bury(self, what: Record | Buried) -> None:
        """A view of a record has died (rule 7), or something that was kept again; from any thread, at any time."""
        self._dead.append(what)
        if not threading.current_thread().name.startswith(THREAD_PREFIX):  # which would wait for itself
            self._burial()

    def _look_around(self) -> None:
        """What every hook does first."""
        if self.mover.ssd is not None:  # all other tiers have neither
            self.mover.raise_failure()
            self.mover.reap()

    # -- packing -----------------------------------------------------------------------------------------------------

    def _reason_to_leave(self, tensor: torch.Tensor) -> tuple[str | None, torch.UntypedStorage | None]:
        if type(tensor) not in PLAIN_KINDS or tensor.layout != torch.strided or tensor.is_nested:
            return "unsupported", None
        if tensor.device != self.device:
            return "other_device", None
        storage = tensor.untyped_storage()
        if self.parameters.holds(tensor, storage):
            return "parameter", storage
        num_bytes = tensor.numel() * tensor.itemsize
        if num_bytes < self._min_bytes or num_bytes == 0 or storage.nbytes() < self._min_bytes:
            return "small", storage
        if storage._cdata not in self._by_storage and self.parameters.is_cast(tensor):
            return "cast_of_parameter", storage
        if torch._C._current_graph_task_id() != -1:
            return "in_backward", storage
        if tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor() or tensor.is_quantized or tensor.is_inference():
            return "unsupported", storage
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "capturing", storage
        return None, storage

    def _find(self, tensor: torch.Tensor, storage: torch.UntypedStorage, span: tuple[int, int]) -> Record | None:
        """A record that covers the tensor in the version that it has now (rule 3)."""
        start, stop = span
        for record in self._by_storage.get(storage._cdata, ()):
            if record.covers(start, stop, tensor.dtype) and record.watch.covers(tensor):
                return record
        return None

    def _pack(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> SavedView | SavedRebuilt | SavedKept:
        """A view of a record, or what rebuilds it."""
        self._look_around()
        span = byte_span(tensor)
        record = self._find(tensor, storage, span)
        if record is not None:
            record.num_users += 1
            return SavedView(self, record, Geometry.of(tensor, record.start))
        place = self.repeating.place_of(self._micro_batch, storage._cdata)
        if place is not None:
            return self._make_kept(tensor, place, Buried(0, self._micro_batch, storage._cdata))
        moved_bytes = 0
        if self.rebuilder is not None and (self._is_asked(self.num_packed) or self.rebuilder.knows(storage)):

            def is_wanted(num_bytes: int) -> bool:
                nonlocal moved_bytes
                moved_bytes = num_bytes
                return self.rounds.rebuilds(self.num_packed)

            rebuilt = self.rebuilder.pack(tensor, storage, is_wanted)
            if rebuilt is not None:
                if rebuilt[1]:
                    self._note_rebuilt(rebuilt[0].rebuild)
                return rebuilt[0]
        record = self._make(tensor, storage, span, moved_bytes)
        record.num_users += 1
        saved = SavedView(self, record, Geometry.of(tensor, record.start))  # buries the record if the wait is broken off
        self._drop_left()
        return saved

    def _has_saved(self, storage: int) -> bool:
        """Whether something that lives was saved of a storage in this micro-batch; by its `_cdata`."""
        is_here = any(record.micro_batch == self._micro_batch for record in self._by_storage.get(storage, ()))
        return is_here or self.repeating.place_of(self._micro_batch, storage) is not None

    def _keep_again(self, tensor: torch.Tensor, kept: Kept, counts: Buried) -> SavedKept | None:
        """What stays as in the round before; None: this is another round."""
        with self._lock:
            self._look_around()
            is_other = (kept.is_new and kept.place != self.num_packed) or kept.is_shared != self._has_saved(counts.storage)
            if not self.num_live or is_other:
                self.repeating.stop()
                return None
            saved = self._make_kept(tensor, kept.place, counts)
            if kept.is_new:
                self.num_packed += 1
                self.rounds.tally.note_kept(counts.num_bytes)
                self._drop_left()
        return saved

    def _make_kept(self, tensor: torch.Tensor, place: int, counts: Buried) -> SavedKept:
        """A saved tensor that stays and has no record, counted as one."""
        saved = SavedKept(self, tensor, place, self._micro_batch)
        self.num_live += 1
        self.mover.count(counts.num_bytes)
        self.repeating.note_kept(place, counts)
        saved.buried = counts
        return saved

    def _drop_left(self) -> None:
        """Something was made in forward: let go of what should have left by now."""
        if self.mover.is_leaving:
            self.mover.drop_left(self.rounds.gone_when_packed(self._micro_batch, self.num_packed), forward_of=self._micro_batch)

    def _note_rebuilt(self, rebuild: Rebuild) -> None:
        """It has a place of its own, unless it comes before the first record of the round."""
        self.rounds.tally.note_rebuilt(rebuild.num_bytes)
        if self.num_live:
            place, self.num_packed = self.num_packed, self.num_packed + 1
            if self.rounds.timeline is not None:
                self.rounds.timeline.pack_rebuilt(place, self._micro_batch, rebuild)

    def _make(self, tensor: torch.Tensor, storage: torch.UntypedStorage, span: tuple[int, int], moved_bytes: int) -> Record:
        if self.num_live == 0:
            self._begin_round()
        else:
            self.fetching.compact(self.num_live, self._by_storage.values())
        start, stop = span
        form, rest_bytes = self._form_of(tensor, stop - start) if self._form is not None else None, 0
        index, self.num_packed = self.num_packed, self.num_packed + 1
        if form is None and not moved_bytes and self._is_asked(index) and (narrow := self._narrow_of(tensor, storage)) is not None:
            rest_bytes = tensor.numel() * narrow.narrow.itemsize
            moved_bytes = 2 * (stop - start + rest_bytes)
            form = narrow if self.rounds.rebuilds(index) else None
        if form is None and 2 * (stop - start) >= storage.nbytes():
            start, stop = 0, storage.nbytes()
        elif form is None:
            start = aligned_start(start)
        target = self.rounds.target(index)
        record = Record(
            tensor, storage, (start, stop), form,
            index=index, micro_batch=self._micro_batch, position=self.fetching.num_moved, is_whole=form is None and target is Target.KEEP,
        )  # fmt: skip
        try:
            self._send(record, storage, target, moved_bytes, rest_bytes)
        except BaseException:  # Ctrl-C, or no memory: nobody will have a view of it
            self.mover.release(record)
            raise
        self._by_storage.setdefault(record.cdata, []).append(record)
        self.num_live += 1
        self.rounds.tally.note_packed(record)
        return record

    def _form_of(self, tensor: torch.Tensor, span_bytes: int) -> Form | None:
        """The form to store it in; None: as it is."""
        form = self._form
        is_dense = tensor.numel() * tensor.itemsize == span_bytes
        return form if form is not None and is_dense and tensor.requires_grad and form.applies(tensor.dtype) else None

    def _is_asked(self, place: int) -> bool:
        """Whether it matters if what is saved there has a recipe: it shall be rebuilt, or somebody watches what could be."""
        return self.rounds.timeline is not None or self.num_live == 0 or self.rounds.rebuilds(place)

    def _narrow_of(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> CastFrom | None:
        """Rule 8."""
        narrow = self.rebuilder.cast_from(tensor, storage) if self.rebuilder is not None else None
        return CastFrom(narrow) if narrow is not None else None

    def _send(self, record: Record, storage: torch.UntypedStorage, target: Target, moved_bytes: int, rest_bytes: int) -> None:
        """Keep it, or start its way out."""
        timeline = self.rounds.timeline
        if target is Target.KEEP:
            self.mover.keep(record, storage)
        else:
            may_wait = self.rounds.may_wait(record)
            self.mover.leave(record, storage, target, may_wait=may_wait, is_timed=timeline is not None)
        self.fetching.note_packed(record)
        if timeline is not None:
            timeline.pack(record, moved_bytes, rest_bytes)

    # -- modules that may be run again ------------------------------------------------------------------------------

    def begin_call(self, inputs: Callable[[], Sequence[torch.Tensor]]) -> Call:
        """Forward of a module begins that may be run again. Meets `CallBook`.

        In backward, and inside of hooks of others, none is: these would have to be told the same when they run it themselves.
        """
        if torch._C._current_graph_task_id() != -1 or not self.is_innermost():
            return PLAIN_CALL
        with self._lock:
            if self.num_live == 0:
                self.num_packed = self._num_calls = 0
                self.rounds.decide_in_forward()
            number, self._num_calls = self._num_calls, self._num_calls + 1
            # The round of a call that comes before its first record is not known to be watched yet.
            is_watched = self.rounds.timeline is not None or self.num_live == 0
            self._open_call = _OpenCall(
                self, number, self._micro_batch, self.num_packed,
                input_bytes=self._new_bytes(inputs()) if is_watched else (),
                stop=self.rounds.stop_of_again(number),
                is_checked=is_watched or not self.rounds.is_decided,
            )  # fmt: skip
            return self._open_call

    def end_call(self, call: _OpenCall) -> None:
        """It has returned, or raised."""
        with self._lock:
            self._open_call = None
            if call.stop is not None:
                self.num_packed = max(self.num_packed, call.stop)
                self.rounds.tally.note_run_again()
            timeline = self.rounds.timeline
            if timeline is not None and self._micro_batch == call.micro_batch:
                timeline.call(call.number, call.micro_batch, call.watched(max(call.first, self.num_packed)))

    def _new_bytes(self, inputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Of each of these that would be saved and is not yet."""
        found: dict[int, int] = {}
        for tensor in inputs:
            reason, storage = self._reason_to_leave(tensor)
            if reason is not None or storage is None or self._find(tensor, storage, byte_span(tensor)) is not None:
                continue
            if self.rebuilder is None or not self.rebuilder.knows(storage):
                found[storage._cdata] = storage.nbytes()
        return tuple(found.values())

    # -- unpacking ---------------------------------------------------------------------------------------------------

    def _on_device(self, record: Record) -> torch.Tensor:
        """Its bytes, ready for what compute does next."""
        self.mover.forward(record)
        if record.payload is None and record.coming is None:
            alive = self._look_up(record)
            if alive is not None:
                return alive
            self._note_backward()
            self.mover.fetch(record, must=True, is_timed=self.rounds.timeline is not None)
            self.fetching.note_fetched(record)
        elif record.form is not None:
            self._note_backward()
            self.fetching.note_fetched(record)
        self.fetching.note_wanted(record)
        return self.mover.arrive(record)

    def _look_up(self, record: Record) -> torch.Tensor | None:
        """Rule 5: the storage itself, if it lives; a lossy record is always given in its form."""
        if record.form is not None and not record.is_narrowed:
            return None
        assert record.weak is not None
        storage = torch.UntypedStorage._new_with_weak_ptr(record.weak.cdata)
        if storage is None or storage.nbytes() < record.stop:
            return None
        return bytes_of(storage, record.start, record.stop)

    def prefetch_last(self, micro_batch: int | None = None) -> None:
        """Begin as the first unpack of a micro-batch's backward would; None: of the one that was packed last.

        Raises:
            ValueError: nothing was packed for that micro-batch.
        """
        with self._lock:
            self.fetching.fetch_last(micro_batch)

    def _expect_decision(self) -> None:
        if self.rounds.awaits_backward:
            self._note_backward()

    def _note_backward(self) -> None:
        """At the end of this backward, decide what there is to decide, and let go of what was fetched and still lives: its graph is kept
        for another one."""
        task = torch._C._current_graph_task_id()
        if task in (-1, self._backward_id):
            return
        self._backward_id = task
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        if self.rebuilder is not None:
            self.rebuilder.forget_results()
        with self._lock:
            self._backward_id = -1
            self.fetching.end_backward()
        self._burial()
        with self._lock:
            if self.num_live == 0:
                self.rounds.decide_in_backward()

    # -- lifetimes ---------------------------------------------------------------------------------------------------

    def _burial(self) -> None:
        """Release the records whose last view has died; not while another one is at it (rule 7)."""
        while self._dead and self._lock.acquire(blocking=False):
            try:
                while self._dead:
                    what = self._dead.popleft()
                    if isinstance(what, Buried):
                        self.mover.count(-what.num_bytes)
                        self.repeating.forget(what)
                        self._note_dead()
                        continue
                    what.num_users -= 1
                    if what.num_users == 0:
                        self._release(what)
                is_empty = self.num_live == 0
            finally:
                self._lock.release()
            if is_empty and self._when_empty is not None:
                when_empty, self._when_empty = self._when_empty, None
                when_empty()

    def _release(self, record: Record) -> None:
        same = self._by_storage[record.cdata]
        same.remove(record)
        if not same:
            del self._by_storage[record.cdata]
        self.fetching.forget(record)
        self.mover.release(record)
        self._note_dead()

    def _note_dead(self) -> None:
        """One less is alive."""
        self.num_live -= 1
        if self.num_live == 0:
            self.rounds.end()
            self.repeating.end_round()
            self.num_packed = self._num_calls = 0

    # -- rounds ------------------------------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        self.fetching.begin_round()
        self.num_packed = 0
        self.rounds.begin()
        self.repeating.begin_round()
        if self.rounds.timeline is None:
            self.mover.host.mend()

    def close_when_empty(self, close: Callable[[], None]) -> None:
        """Call `close` as soon as no record is alive: now, or when the last one dies."""
        self._burial()
        with self._lock:
            self.mover.reap(wait=True)
            is_empty = self.num_live == 0
            if not is_empty:
                self._when_empty = close
        if is_empty:
            close()

    def next_micro_batch(self, number: int | None = None) -> None:
        """What is packed from here on belongs to another micro-batch than before; None: the one after it."""
        with self._lock:
            self._micro_batch = number if number is not None else self._micro_batch + 1
            self.repeating.begin_micro_batch()
            self.num_packed = self._num_calls = 0


class _OpenCall:
    """A call of a module that may be run again; see `segments.Call`."""

    def __init__(
        self, cache: TensorCache, number: int, micro_batch: int, first: int, *, input_bytes: tuple[int, ...], stop: int | None,
        is_checked: bool,
    ) -> None:  # fmt: skip
        self._cache, self.number, self.micro_batch, self.first = cache, number, micro_batch, first
        self._input_bytes, self.stop, self.is_checked = input_bytes, stop, is_checked
        self._begin = self._mark()
        self._last: Mark | None = None

    @property
    def is_again(self) -> bool:
        return self.stop is not None

    def note_packed(self) -> None:
        """Something was saved in it, wherever that goes."""
        self._last = self._mark()

    def end(self) -> None:
        self._cache.end_call(self)

    def watched(self, stop: int) -> WatchedCall:
        """What became of it."""
        last = self._last if self._last is not None else self._cache.mover.link.time_mark()
        return WatchedCall(first=self.first, stop=stop, input_bytes=self._input_bytes, is_again=self.is_again, begin=self._begin, last=last)

    def running_again(self) -> contextlib.AbstractContextManager[None]:
        timeline = self._cache.rounds.timeline
        return timeline.running_again(self.number, self.micro_batch) if timeline is not None else contextlib.nullcontext()

    def _mark(self) -> Mark | None:
        """None: nobody watches."""
        return self._cache.mover.link.time_mark() if self._cache.rounds.timeline is not None else None
