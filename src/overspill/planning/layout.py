"""Which tensors form a bundle.

Rules:

1. Tensors that the same units read, of one dtype and one trainability, form one bundle, in the model's order.
2. A tied tensor is read by the embedding and by the tail, so it falls into a bundle of its own by rule 1.
3. A bundle is named after its unit; `shared`, a dtype or `frozen` is appended where one unit has several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from overspill.errors import UnsupportedModelError
from overspill.spec.tensors import CHUNK_BYTES, Bundle, TensorSpec, Unit, build_bundle


def build_layout(
    unit_parameters: Mapping[str, Sequence[str]],
    parameters: Mapping[str, TensorSpec],
    bytes_per_element: Callable[[str, bool], float],
    *,
    dtype: str,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[tuple[Unit, ...], dict[str, Bundle]]:
    """Units and bundles of a model.

    Args:
        unit_parameters: unit -> names of the tensors it reads; first the embedding, last the tail.
        bytes_per_element: (dtype, trainable) -> bytes of all roles that an update of one element holds at once.
        dtype: what the model computes in; bundles of another dtype carry it in their name.

    Raises:
        UnsupportedModelError: a tensor is read by more than one block.
    """
    units = list(unit_parameters)
    readers: dict[str, list[str]] = {}
    for unit, names in unit_parameters.items():
        for name in names:
            readers.setdefault(name, []).append(unit)
    groups: dict[tuple[tuple[str, ...], str, bool], list[TensorSpec]] = {}
    for name, units_of in readers.items():
        if len(units_of) > 1 and set(units_of) != {units[0], units[-1]}:
            raise UnsupportedModelError(f"{name} is shared between {', '.join(units_of)}; only embedding and tail may share weights")
        spec = parameters[name]
        groups.setdefault((tuple(units_of), spec.dtype, spec.trainable), []).append(spec)
    bundles: dict[str, Bundle] = {}
    unit_bundles: dict[str, list[str]] = {unit: [] for unit in units}
    for (readers_of, kind, trainable), tensors in groups.items():
        parts = ["shared" if len(readers_of) > 1 else readers_of[0]]
        parts += [kind] if kind != dtype else []
        parts += [] if trainable else ["frozen"]
        name = ".".join(parts)
        bundles[name] = build_bundle(name, tensors, bytes_per_element=bytes_per_element(kind, trainable), chunk_bytes=chunk_bytes)
        for unit in readers_of:
            unit_bundles[unit].append(name)
    return tuple(Unit(name=unit, bundles=tuple(unit_bundles[unit])) for unit in units), bundles
