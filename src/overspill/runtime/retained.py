"""Graphs that live from a unit's forward to its backward: what a retained `Compute` does (`spec.retention`).

How. The forward runs with a graph on a detached leaf of the hidden states; a book (`activations/retaining.py`) says what becomes of each
saved tensor. Kept is the graph by the edges of its outputs, and its leaves, without their memory: slots are refilled in between. The
backward takes the gradients by these leaves, with the weights and hidden states of its own visit in place of those of the forward's.

Rules:

1. A graph that cannot be kept (out of memory on the device, for it or for another op, or a saved tensor of which the book cannot tell what
   it is) is dropped, and the unit's backward recomputes as in mode `recompute`: its hidden states are there in any mode. The same bits;
   one warning. The unit is recomputed from then on: running out of memory empties the allocator's caches, which no step should begin with.
2. The graph is taken out of these books before its backward begins: one that runs out of memory half-way is recomputed by the op's retry,
   and its unit is from then on.
3. Nothing is left of a schedule that has ended, however it did (`drop_all`).
4. What stores more than the plan has counted (`Plan.activation_bytes`) does not leave in full: the rest stays on the device.
5. The embedding's graph is kept without being planned for where it stores next to nothing (`EMBEDDING_SHARE`), as that of a mere look-up
   does. Its backward comes when the device has nothing else left to do, and would begin with the model's own code in Python. Anything may
   stand before the blocks: one that changes its weights in place (`max_norm`), or has a function of Python's in its graph, which may keep a
   weight where no hook sees it, is not kept; and if the backward by one that was kept fails, the model's code runs again after all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from overspill.activations.retaining import HIDDEN, Book, find_epsilons, shed
from overspill.huggingface import Embedded, StreamedModel
from overspill.huggingface.stand_ins import BlockArguments
from overspill.spec.schedule import Piece

Edge = torch.autograd.graph.GradientEdge
EMBEDDING_SHARE, EMBEDDING_BYTES = 1 / 32, 64 << 10
"""The most that the embedding's graph may store to be kept, the first of the bytes of its hidden states: the larger one. Chosen."""


@dataclasses.dataclass(kw_only=True)
class RetainedGraph:
    """One unit's graph of one micro-batch."""

    book: Book
    outputs: tuple[Edge | None, ...]
    """Hidden states, then side outputs; None: one that depends on nothing that is differentiated by."""
    leaves: tuple[torch.Tensor, ...]
    """What the backward differentiates by, without memory: hidden states, side inputs, trainable weights."""

    def differentiate(
        self, given: Mapping[str, torch.Tensor], above: torch.Tensor, side_gradients: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients by the leaves.

        Args:
            given: the boundary and the weights, as they are now.
            above: gradient of the hidden states that the unit returned.
            side_gradients: of the side outputs; None: nobody reads that one.
        """
        outputs: list[Edge] = []
        grad_outputs: list[torch.Tensor] = []
        for edge, gradient in zip(self.outputs, (above, *side_gradients), strict=True):
            if gradient is not None and edge is not None:
                outputs.append(edge)
                grad_outputs.append(gradient)
        with self.book.bound(given):
            return torch.autograd.grad(outputs, self.leaves, grad_outputs, allow_unused=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetainedForward:
    """What a retained forward returns: values without a graph."""

    hidden: torch.Tensor
    side_outputs: tuple[torch.Tensor, ...]


class RetainedGraphs:
    """The graphs of one session's step."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._graphs: dict[Piece, RetainedGraph] = {}
        self._embeddings: dict[int, RetainedGraph] = {}
        """By micro-batch (rule 5)."""
        self._keeps_embeddings = True
        self._recomputed: set[str] = set()
        """Units that were given up (rule 1)."""
        self._epsilons: dict[str, dict[str, float]] = {}
        self.most_bytes: dict[str, int] = {}
        """Unit -> most bytes that one of its graphs has stored, to be held against the plan's."""

    def __len__(self) -> int:
        return len(self._graphs)

    def forward(
        self,
        piece: Piece,
        hidden: torch.Tensor,
        arguments: BlockArguments,
        *,
        parameters: Mapping[str, torch.Tensor],
        trainable: Sequence[str],
        side_inputs: Sequence[torch.Tensor],
        room_bytes: int,
        most_passes: float = math.inf,
    ) -> RetainedForward | None:
        """Run a block's forward and keep its graph; None: it could not be kept (rule 1), and nothing of it is left.

        Args:
            piece: the activations.
            parameters: leaves that the block is bound to; `shed` is for who bound it.
            room_bytes: what the plan has counted (rule 4).
            most_passes: what takes more of them to rebuild is stored (`spec.retention`).
        """
        unit = piece.owner
        if unit in self._recomputed:
            return None
        leaf = hidden.detach().requires_grad_()
        sides = tuple(tensor.detach().requires_grad_() for tensor in side_inputs)
        if unit not in self._epsilons:
            self._epsilons[unit] = find_epsilons(self._model.block(unit), parameters)
        fixed = (*arguments.tensors, *side_inputs, *self._model.block_buffers(unit))
        book = Book({HIDDEN: leaf, **parameters}, fixed, epsilons=self._epsilons[unit], most_passes=most_passes)
        unneeded = self._model.unneeded
        try:
            with torch.enable_grad(), book.saving(), unneeded.making_all() if unneeded is not None else contextlib.nullcontext():
                output = self._model.run_block(unit, leaf, arguments, side_inputs=sides or None)
        except torch.OutOfMemoryError:
            self.give_up(unit, "the device has no memory left for its graph")
            return None
        if book.refusal is not None:
            self.give_up(unit, book.refusal)
            return None
        values = RetainedForward(hidden=output.hidden.detach(), side_outputs=tuple(tensor.detach() for tensor in output.side_outputs))
        edges = _edges((output.hidden, *output.side_outputs))
        book.lay_out(room_bytes)
        leaves = (leaf, *sides, *(parameters[name] for name in trainable))
        shed(leaf)
        self._graphs[piece] = RetainedGraph(book=book, outputs=edges, leaves=leaves)
        self.most_bytes[unit] = max(self.most_bytes.get(unit, 0), book.stored_bytes)
        return values

    def embed(
        self,
        micro_batch: int,
        run: Callable[[], Embedded],
        *,
        parameters: Mapping[str, torch.Tensor],
        trainable: Sequence[str],
        fixed: Sequence[torch.Tensor],
    ) -> Embedded:
        """Run the embedding's forward, and keep its graph if rule 5 allows it; values without a graph.

        Args:
            micro_batch: its number.
            run: the forward; what it returns has a graph.
            parameters: leaves that the embedding is bound to; `shed` is for who bound them.
            fixed: tensors of the batch.
        """
        if not self._keeps_embeddings:
            return run()
        book = Book(parameters, fixed, epsilons={}, most_passes=0)
        embedded: Embedded | None = None
        try:
            with torch.enable_grad(), book.saving():
                embedded = run()
        except RuntimeError:
            if embedded is None:
                raise
            self.give_up_embeddings()  # it has run, and has changed its weights in place
        hidden, sides = embedded.hidden, embedded.side_inputs
        values = dataclasses.replace(embedded, hidden=hidden.detach(), side_inputs=tuple(tensor.detach() for tensor in sides))
        most_bytes = max(EMBEDDING_SHARE * hidden.nbytes, EMBEDDING_BYTES)
        is_small = book.refusal is None and book.stored_bytes <= most_bytes
        if self._keeps_embeddings and hidden.requires_grad and is_small and not _has_functions_of_python((hidden, *sides)):
            leaves = tuple(parameters[name] for name in trainable)
            self._embeddings[micro_batch] = RetainedGraph(book=book, outputs=_edges((hidden, *sides)), leaves=leaves)
        return values

    def take_embedding(self, micro_batch: int) -> RetainedGraph | None:
        """Its graph, for its backward (rule 2): the outputs are the hidden states and the side inputs; None: it was not kept."""
        return self._embeddings.pop(micro_batch, None)

    def give_up_embeddings(self) -> None:
        """From now on no embedding's graph is kept."""
        self._keeps_embeddings = False
        self._embeddings.clear()

    def take(self, piece: Piece) -> RetainedGraph | None:
        """The graph, for its backward (rule 2); None: it was not kept."""
        graph = self._graphs.pop(piece, None)
        if graph is not None:
            graph.book.hand_over()
        return graph

    def land(self, piece: Piece, source: torch.Tensor) -> None:
        """The activations have come back to `source`, uint8."""
        if piece in self._graphs:
            self._graphs[piece].book.land(source)

    def copier_out(self, piece: Piece, target: torch.Tensor) -> Callable[[], None]:
        """What copies activations on the device to `target`, uint8, in host memory."""
        graph = self._graphs.get(piece)
        book = graph.book if graph is not None else None  # nothing that waits on a lane holds the graph

        def run() -> None:
            if book is not None:
                book.copy_out(target)

        return run

    def let_go(self, piece: Piece) -> None:
        """The activations have left the device."""
        if piece in self._graphs:
            self._graphs[piece].book.let_go()

    def give_up_half(self) -> None:
        """Make room on the device: give up the first half of the units that have graphs."""
        units = list(dict.fromkeys(piece.owner for piece in self._graphs))
        for unit in units[: -(-len(units) // 2)]:
            self.give_up(unit, "the device has no memory left beside its graph")
            self._graphs = {piece: graph for piece, graph in self._graphs.items() if piece.owner != unit}

    def drop_all(self) -> None:
        """Rule 3."""
        self._graphs.clear()
        self._embeddings.clear()

    def give_up(self, unit: str, reason: str) -> None:
        """Recompute a unit from now on (rule 1)."""
        self._recomputed.add(unit)
        if len(self._recomputed) == 1:
            warnings.warn(
                f"the activations of {unit} cannot be kept: {reason}; it is recomputed, as others may be from now on without a word. "
                "Choose --activations recompute, or a smaller --micro-batch",
                RuntimeWarning,
                stacklevel=2,
            )


def _edges(outputs: Sequence[torch.Tensor]) -> tuple[Edge | None, ...]:
    return tuple(torch.autograd.graph.get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in outputs)


def _has_functions_of_python(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether the graph of `outputs` has a `torch.autograd.Function`."""
    found, left = set(), [tensor.grad_fn for tensor in outputs]
    while left:
        node = left.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return False
