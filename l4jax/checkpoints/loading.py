"""A model from a checkpoint's tensors, each parameter read straight to its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from l4jax import sharding
from l4jax.checkpoints.arrays import stackable
from l4jax.checkpoints.formats import SCALE, Source, Spec, execution_in, outline, places_in
from l4jax.checkpoints.orbax import of_scale
from l4jax.checkpoints.rows import Joined, cast
from l4jax.checkpoints.tables import Match
from l4jax.config import Execution
from l4jax.kernels.quantized import Quantized, dequantize
from l4jax.models.llama4 import Llama


def build(source: Source, *, dtype: str | None, execution: Execution | None) -> Llama:
    """The model that a source holds.

    Args:
        source: what its `model` says is built; tensors of another part are not read.
        dtype: of the parameters; quantized ones are multiplied out. As stored by default.
        execution: how the model computes; by default in the parameters' type. Layers are unrolled
            where they cannot be stacked, because only some of them are quantized.
    """
    arrays = _Arrays(source, dtype)
    if execution is None:
        execution = execution_in(dtype or source.arrays["embed"].dtype)
    specs: dict[str, Spec] = {}
    for images in (False, True):
        part = {n: x for n, x in source.arrays.items() if n.startswith("vision.") == images}
        stacked, part = stackable(source.model, part)
        specs |= part
        if stacked or dtype is not None:
            continue
        if images and source.model.vision is not None:
            raise ValueError(
                f"{source.directory}: only some layers of its image encoder are quantized, but "
                "they are stacked: give a dtype to multiply them out"
            )
        execution = dataclasses.replace(execution, scan=False)
    model = outline(source.model, execution)
    graph, abstract = nnx.split(model)
    flat = nnx.to_flat_state(abstract)
    names: dict[tuple, dict[int | None, str]] = {}
    for name, place in places_in(model).items():
        names.setdefault(place.path, {})[place.period] = name
    layout = dict(nnx.to_flat_state(sharding.shardings(abstract)))

    def fill(path: tuple, param: nnx.Variable) -> nnx.Variable:
        place, by_index = layout[path].get_raw_value(), names[path]
        first = next(iter(by_index.values()))
        if dtype is None and first + SCALE in source.arrays:
            scales = {index: name + SCALE for index, name in by_index.items()}
            beside = of_scale(place, param.shape, arrays.outline(scales))
            return param.replace(
                Quantized(arrays.placed(by_index, place), arrays.placed(scales, beside))
            )
        kind = np.dtype(jax.dtypes.canonicalize_dtype(np.dtype(dtype or specs[first].dtype)))
        return param.replace(arrays.placed(by_index, place, kind))

    state = nnx.from_flat_state({path: fill(path, param) for path, param in flat})
    return nnx.merge(graph, state)


class _Arrays:
    """Reads parts of canonical arrays, and puts them on devices."""

    def __init__(self, source: Source, dtype: str | None) -> None:
        self._source, self._dtype = source, dtype
        self._holders: dict[str, tuple[Match, int]] = {
            # Of two tensors that hold the same array, the embedding table comes before the head.
            name: (match, part)
            for match in reversed(source.matches)
            for part, name in enumerate(match.ours)
        }

    def placed(
        self,
        names: Mapping[int | None, str],
        place: jax.sharding.Sharding,
        dtype: np.dtype | None = None,
    ) -> jax.Array:
        """The array that a canonical one, or several stacked by their indices, make."""

        def read(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None
            if None in names:
                return self._read(names[None], where, dtype)
            layers = range(len(names))[where[0]]
            return np.stack([self._read(names[i], where[1:], dtype) for i in layers])

        return jax.make_array_from_callback(self.outline(names).shape, place, read)

    def outline(self, names: Mapping[int | None, str]) -> jax.ShapeDtypeStruct:
        """Of the array that `placed` returns."""
        first = self._source.arrays[next(iter(names.values()))]
        shape = first.shape if None in names else (len(names), *first.shape)
        return jax.ShapeDtypeStruct(shape, first.dtype)

    def _read(self, name: str, where: tuple[slice, ...], dtype: np.dtype | None) -> np.ndarray:
        """A part of one array, in this type, multiplied out if it is quantized and a type given."""
        values = self._stored(name, where)
        if dtype is None:
            return values
        if name + SCALE not in self._source.arrays:
            return cast(values, dtype)
        shape = self._source.arrays[name].shape
        scale = self._stored(name + SCALE, (slice(None),) * len(shape))
        for axis, (groups, size) in enumerate(zip(scale.shape, shape, strict=True)):
            if groups != 1:
                scale = np.repeat(scale, size // groups, axis)[
                    (slice(None),) * axis + (where[axis],)
                ]
        return dequantize(np.asarray(values), scale, dtype)

    def _stored(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """A part of one array as it is stored; only the rows that hold it are looked at."""
        match, part = self._holders[name]
        tensor, cut = self._source.tensors[match.theirs], match.layout.cut
        assert isinstance(tensor, Joined)
        if cut is None:
            return match.layout.load(tensor.view(0, tensor.shape[0]))[part][where]
        length = self._source.arrays[name].shape[cut]
        unit = tensor.shape[0] // length
        start, stop, _ = where[cut].indices(length)
        rows = match.layout.load(tensor.view(start * unit, stop * unit))[part]
        return rows[(*where[:cut], slice(None), *where[cut + 1 :])]
