"""CUDA graphs of blocks: where launching a block's kernels takes longer than running them, they are recorded once and launched as one.

A block of a 1B model on 2048 tokens is some 60 kernels forward and 200 backward; Python and autograd take longer to launch these than
an H100 takes to run them. A recording replays them with the same bits, in the time of one launch.

Words:

* **recording**: the kernels of one block's forward, or of its recomputation, backward and accumulation, with the addresses that
  they were recorded with.
* **static tensors**: fixed tensors that recordings read and write; inputs are copied in before a replay, the output is copied out.

Rules:

1. A recording is replayed only if all that it depends on is as it was: the block, the phase, training mode, autocast and its dtype, shapes
   and dtypes, the addresses of the block's parameters and of its partial gradients, which tensors already have a contribution, and the
   arguments that are no tensors. Else the block runs as ever; so do the embedding and the tail. Autocast's casts of weights are made in
   the recording: none is kept from op to op (`runtime/step`), whose values would be those of the step in which it was recorded.
2. Not recorded: blocks that draw random numbers, and all blocks of a model of which any has side inputs or side outputs.
3. A block is recorded at the earliest when it has run `RUNS_BEFORE` times with the same dependencies. Which are recorded is decided once,
   by what comes first: those of `choose`, from timed templates (`planning/graphs.py`); or all, after a training step whose device
   waited for launches (`judge`), and this stays, for recordings keep their memory. `spec/launches.py` has both rules. Predictions
   do not decide it again: they ask `replayed`.
4. A replay needs no memory after it has begun: a backward has added to gradients then, and cannot be done again.
5. A recording that fails, or the first one whose static tensors have no memory, ends all recording in this session; nothing has run then,
   and the block runs as ever.
6. Recordings share one memory pool: at a time one is replayed, and what it leaves in the pool nobody reads.

Limits: at most `MOST_RECORDINGS`; the memory of one block's activations is held for good.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from overspill.huggingface import StreamedModel
from overspill.huggingface.stand_ins import BlockArguments, RecordedCall
from overspill.runtime.visit import Visit
from overspill.spec.launches import do_waits_bind
from overspill.tiers.cuda import cuda_index, forget_workspaces

RUNS_WATCHED = 4
RUNS_BEFORE = 2
"""Kernels are chosen and loaded by then."""
MOST_RECORDINGS = 512
MOST_SHAPES = 4
"""Shapes of hidden states with recordings; chosen: a batch of samples of many lengths is not worth their memory."""
STEPS_UNJUDGED = 2
"""The first ones load code and choose kernels, which looks like launching."""
STEPS_JUDGED = 8
"""After these, one in `STEPS_JUDGED` is: batches may become smaller."""

Replay = Callable[[], None]


class LaunchRecorder(Protocol):
    """Records what is launched."""

    def record(self, run: Callable[[], None]) -> Replay:
        """What does the work of `run`, whenever it is called; recording itself does none of it.

        Raises:
            RuntimeError: it does something that cannot be recorded.
        """
        ...

    def random_state(self) -> bytes:
        """Changes when random numbers are drawn on the device."""
        ...


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._has_recorded = False

    def record(self, run: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        if not self._has_recorded:  # streams are handed out in turn: this one may have a workspace, which others would free
            forget_workspaces()
            self._has_recorded = True
        collects = gc.isenabled()
        gc.disable()  # a tensor that is collected now may belong to another stream
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                # Other threads go on copying and waiting for events meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    self._give_up(graph)
                    raise
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph.replay

    def random_state(self) -> bytes:
        return bytes(torch.cuda.get_rng_state(self._device).numpy())

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
            return
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):
                end(cuda_index(self._device), self._pool)


class Static:
    """The static tensors of one shape of hidden states."""

    def __init__(self, like: torch.Tensor) -> None:
        self.hidden, self.above, self.output = torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)
        self._argument_tensors: tuple[torch.Tensor, ...] = ()
        self._loaded: tuple[torch.Tensor, ...] = ()
        """What the argument tensors were copied from last; kept alive, so that the same object is the same values."""

    def load_arguments(self, arguments: BlockArguments) -> tuple[torch.Tensor, ...] | None:
        """Copy the arguments' tensors in; the static ones, or None if they do not fit those that recordings know."""
        given = arguments.tensors
        if not self._loaded and not self._argument_tensors:
            self._argument_tensors = tuple(_static_copy(tensor) for tensor in given)
        if len(given) != len(self._argument_tensors) or not all(map(_is_alike, given, self._argument_tensors)):
            return None
        for index, (static, tensor) in enumerate(zip(self._argument_tensors, given, strict=True)):
            if index >= len(self._loaded) or self._loaded[index] is not tensor:
                _without_repeats(static).copy_(_without_repeats(tensor))
        self._loaded = given
        return self._argument_tensors


class _Recording:
    def __init__(self, replay: Replay, call: RecordedCall, used: Sequence[str]) -> None:
        self.replay, self.call, self.used = replay, call, used


class BlockGraphs:
    """Recordings of one session's blocks.

    Args:
        recorder: None: nothing is ever recorded.
        has_room: whether the memory of one block's activations can be held.
    """

    def __init__(self, model: StreamedModel, recorder: LaunchRecorder | None, *, has_room: Callable[[], bool] = lambda: True) -> None:
        self.model, self.recorder, self._has_room = model, recorder, has_room
        self.is_wanted = False
        """Whether launches bind, by `judge` (rule 3)."""
        self.chosen: frozenset[str] | None = None
        """Blocks to record, by `choose`; None: by `is_wanted`, all or none."""
        self.num_replays = 0
        self._num_steps = self._num_judged = 0
        self._runs: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording | None] = {}
        """None: this one cannot be replayed as it was asked for."""
        self._static: dict[Hashable, Static] = {}
        self._visit: Visit | None = None
        """The one whose block is recorded or replayed."""
        self._watched: dict[tuple[str, bool], int] = {}
        """(block, training mode) -> runs in which nobody drew a random number."""
        self._draws: set[tuple[str, bool]] = set()
        self._was_recorded: dict[tuple[str, bool], bool] = {}
        """Likewise, of blocks that were to be recorded: whether any recording was made; if not, there was a reason against it."""

    def __len__(self) -> int:
        return sum(recording is not None for recording in self._recordings.values())

    def wants_judgement(self) -> bool:
        """Whether the training step that has ended is one that `judge` shall be told about; asked once a step."""
        if self.recorder is None or self.is_wanted or self.chosen is not None:
            return False
        self._num_steps += 1
        return self._num_steps <= STEPS_JUDGED or self._num_steps % STEPS_JUDGED == 0

    @property
    def replayed(self) -> frozenset[str] | None:
        """Blocks that training steps replay from here on, those whose graphs are kept and limits of number left aside; None: nobody has
        chosen or judged yet, and none is."""
        if self.recorder is None or self._has_sides:
            return frozenset()
        if self.chosen is None and not self.is_wanted and self._num_judged <= STEPS_UNJUDGED:
            return None
        wanted, has_room = filter(self._is_wanted, self.model.block_names), self._has_room()
        return frozenset(unit for unit in wanted if (unit, True) not in self._draws and self._was_recorded.get((unit, True), has_room))

    @property
    def _has_sides(self) -> bool:
        """Whether any block has side inputs or outputs (rule 2)."""
        return self.model.has_router_loss or bool(self.model.inspection.side_paths)

    def judge(self, *, waited_s: float, device_s: float) -> None:
        """After a training step: how long the host launched blocks that the device had to wait for (`waited_for_s`), and how long the
        device had all of them under way."""
        self._num_judged += 1
        if self._num_judged > STEPS_UNJUDGED and self.recorder is not None:
            self.is_wanted = self.is_wanted or do_waits_bind(waited_s=waited_s, device_s=device_s)

    def choose(self, units: Collection[str]) -> bool:
        """Record these blocks and no others, without judging; False: steps have said already that all are, and it stays so (rule 3).

        Asked again, the last answer holds: recordings of other blocks are not replayed any more. They are kept, for a pool of CUDA graphs
        that has lost all of them takes no other.
        """
        if not self.is_wanted:
            self.chosen = frozenset(units)
        return not self.is_wanted

    def _is_wanted(self, unit: str) -> bool:
        return self.is_wanted if self.chosen is None else unit in self.chosen

    def forward(self, unit: str, visit: Visit, hidden: torch.Tensor, arguments: BlockArguments) -> torch.Tensor | None:
        """The block's output by a replay, a new tensor; None: run it."""
        if self.recorder is None or arguments.side_inputs:
            return None
        key = (unit, "forward", *self._conditions(hidden), visit.addresses)

        def run(static: Static, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
            launch_forward(self.model, unit, static, arguments.replace_tensors(tensors))
            return ()

        recording, static = self._find(key, unit, hidden, arguments, run)
        if recording is None or static is None:
            return None
        result = torch.empty_like(static.output)  # before the replay: what runs out of memory after it would be counted twice
        static.hidden.copy_(hidden)
        recording.replay()
        self.num_replays += 1
        return result.copy_(static.output)

    def backward(
        self,
        unit: str,
        visit: Visit,
        hidden: torch.Tensor,
        above: torch.Tensor,
        arguments: BlockArguments,
        targets: Mapping[str, tuple[torch.Tensor, bool]],
    ) -> tuple[torch.Tensor, tuple[str, ...]] | None:
        """Recomputation and backward by a replay; None: run it.

        Args:
            above: gradient of the block's output.
            targets: trainable parameter -> its partial gradient, and whether that has a contribution already.

        Returns:
            The gradient of the hidden states, a new tensor, and the parameters that got a contribution.
        """
        if self.recorder is None or arguments.side_inputs:
            return None
        places = tuple((name, target.data_ptr(), target.dtype, is_begun) for name, (target, is_begun) in targets.items())
        key = (unit, "backward", *self._conditions(hidden), visit.addresses, places)

        def run(static: Static, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
            assert self._visit is not None
            return launch_backward(self.model, unit, static, arguments.replace_tensors(tensors), self._visit.parameters, targets)

        self._visit = visit
        recording, static = self._find(key, unit, hidden, arguments, run)
        if recording is None or static is None:
            return None
        result = torch.empty_like(static.output)  # before the replay: what runs out of memory after it would be added twice
        static.hidden.copy_(hidden)
        static.above.copy_(above)
        recording.replay()
        self.num_replays += 1
        return result.copy_(static.output), tuple(recording.used)

    @contextlib.contextmanager
    def watch(self, unit: str) -> Iterator[None]:
        """Around a run of a block that is not a replay: notes whether it draws random numbers (rule 2)."""
        watched = (unit, self.model.model.training)
        if self.recorder is None or watched in self._draws or self._watched.get(watched, 0) >= RUNS_WATCHED:
            yield
            return
        before = self.recorder.random_state()
        yield
        if self.recorder.random_state() == before:
            self._watched[watched] = self._watched.get(watched, 0) + 1
        else:
            self._draws.add(watched)

    def give_up(self, reason: str) -> None:
        """Free what recordings hold, for who needs it more; blocks are launched kernel by kernel from here on."""
        warnings.warn(f"blocks are not replayed as CUDA graphs any more: {reason}", RuntimeWarning, stacklevel=2)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # a replay may be under way
        self.close()

    def close(self) -> None:
        """Give the recordings' memory back; nothing is recorded afterwards."""
        self.recorder = None
        self._recordings.clear()
        self._static.clear()

    def _conditions(self, hidden: torch.Tensor) -> tuple[Hashable, ...]:
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return hidden.shape, hidden.dtype, hidden.device, self.model.model.training, autocast

    def _find(
        self,
        key: Hashable,
        unit: str,
        hidden: torch.Tensor,
        arguments: BlockArguments,
        run: Callable[[Static, Sequence[torch.Tensor]], tuple[str, ...]],
    ) -> tuple[_Recording | None, Static | None]:
        """The recording for `key`, made now if it is time; its arguments are loaded."""
        call = arguments.calls[unit]
        if key not in self._recordings:
            runs = self._runs[key] = self._runs.get(key, 0) + 1
            if len(self._runs) > 64 * MOST_RECORDINGS:
                self._runs.clear()
            if not self._is_wanted(unit) or runs <= RUNS_BEFORE or len(self._recordings) >= MOST_RECORDINGS:
                return None, None
            watched = (unit, self.model.model.training)
            if watched in self._draws or watched not in self._watched or self._has_sides or not self._has_room():
                self._recordings[key] = None
                self._was_recorded.setdefault(watched, False)
                return None, None
        elif self._recordings[key] is None or not self._is_wanted(unit):
            return None, None
        try:
            static = self._static_for(hidden)
            tensors = static.load_arguments(arguments) if static is not None else None
        except torch.OutOfMemoryError as error:
            if len(self):  # which can be given up for it
                raise
            self._fail(error)
            return None, None
        if static is None or tensors is None:
            return None, None
        if key not in self._recordings:
            self._recordings[key] = self._record(static, tensors, call, run)
            self._was_recorded[unit, self.model.model.training] = self._recordings[key] is not None
        recording = self._recordings[key]
        if recording is None or not _is_same_call(recording.call, call):
            return None, None
        return recording, static

    def _static_for(self, hidden: torch.Tensor) -> Static | None:
        key = (hidden.shape, hidden.dtype)
        if key not in self._static:
            if len(self._static) >= MOST_SHAPES:
                return None
            self._static[key] = Static(hidden)
        return self._static[key]

    def _record(
        self,
        static: Static,
        tensors: Sequence[torch.Tensor],
        call: RecordedCall,
        run: Callable[[Static, Sequence[torch.Tensor]], tuple[str, ...]],
    ) -> _Recording | None:
        assert self.recorder is not None
        used: list[str] = []

        def launch() -> None:
            used[:] = run(static, tensors)

        try:
            replay = self.recorder.record(launch)
        except RuntimeError as error:
            self._fail(error)
            return None
        return _Recording(replay, call, used)

    def _fail(self, error: RuntimeError) -> None:
        """Rule 5."""
        warnings.warn(f"blocks are launched kernel by kernel from now on: recording one failed: {error}", stacklevel=2)
        self.close()


def waited_for_s(launches_s: Sequence[tuple[float, float]], spans_s: Sequence[tuple[float, float]]) -> float:
    """Seconds that the host launched what the device was ready for before its launching had ended.

    Where the device began later, the host was ahead: nothing waited for it, and the driver, whose queue is full then, lets a launch take
    as long as the device takes for another one.

    Args:
        launches_s: of each run of a block, when the host launched it: begin and end.
        spans_s: when the device ran it, on the same clock.
    """
    pairs = zip(launches_s, spans_s, strict=True)
    return sum(end_s - begin_s for (begin_s, end_s), (started_s, _) in pairs if started_s < end_s)


def launch_forward(model: StreamedModel, unit: str, static: Static, arguments: BlockArguments) -> None:
    """A block's forward from static tensors into static tensors: what a recording of it holds."""
    with torch.no_grad():
        static.output.copy_(model.run_block(unit, static.hidden, arguments).hidden)


def launch_backward(
    model: StreamedModel,
    unit: str,
    static: Static,
    arguments: BlockArguments,
    parameters: Mapping[str, torch.Tensor],
    targets: Mapping[str, tuple[torch.Tensor, bool]],
) -> tuple[str, ...]:
    """Recomputation, gradients and their addition to `targets`, likewise; the parameters that got a contribution."""
    leaf = static.hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = model.run_block(unit, leaf, arguments)
    inputs = [leaf, *(parameters[name] for name in targets)]
    by_hidden, *by_parameters = torch.autograd.grad([output.hidden], inputs, [static.above], allow_unused=True)
    if by_hidden is None:
        static.output.zero_()
    else:
        static.output.copy_(by_hidden)
    used = []
    for (name, (target, is_begun)), gradient in zip(targets.items(), by_parameters, strict=True):
        if gradient is not None:
            used.append(name)
            target.add_(gradient) if is_begun else target.copy_(gradient)
    return tuple(used)


def _is_same_call(one: RecordedCall, other: RecordedCall) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # an argument that cannot be compared
        return False


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """One of each element that an expanded tensor repeats."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _static_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(_without_repeats(tensor)).expand(tensor.shape)


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    repeats = [stride == 0 and size > 1 for stride, size in zip(one.stride(), one.shape, strict=True)]
    others = [stride == 0 and size > 1 for stride, size in zip(other.stride(), other.shape, strict=True)]
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and repeats == others
