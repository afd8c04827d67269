"""Our own directory: `l4jax.json` beside an Orbax checkpoint of the arrays.

Plain Orbax restores `parameters/` by itself, onto any mesh: a nested dict of arrays. Layers that
the model scans lie stacked in one array; converting writes them slice by slice, as zarr3 chunks
that hold one slice each, divided further so that a host reads little beyond its own part.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from l4jax import sharding
from l4jax.checkpoints.formats import Model, execution_in, model_of, outline
from l4jax.checkpoints.safetensors import write_json
from l4jax.config import Execution, Layer, TextConfig, VisionConfig
from l4jax.kernels.quantized import Quantized
from l4jax.models.llama4 import Llama

MARKER = "l4jax.json"
PARAMETERS = "parameters"
CHUNK_BYTES = 32 << 20
"""Of one stored chunk, unless a single row is larger."""
_FORMAT = 2
_READABLE = (1, 2)
VALUES, SCALES = "values", "scale"
"""Names of the two arrays that lie in the place of a quantized one."""


class Marker(NamedTuple):
    """What the marker file says. described: the source's own words, by format."""

    model: Model
    described: dict[str, Any]


def read_marker(directory: pathlib.Path) -> Marker:
    """What is in a directory of ours.

    Raises:
        ValueError: the marker file is not ours, or of a newer format.
    """
    file = directory / MARKER
    try:
        values = json.loads(file.read_text())
        number, config = values["format"], values["config"]
        vision, described = values.get("vision"), values.get("described") or {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a valid marker: {error!r}") from None
    if number not in _READABLE:
        raise ValueError(
            f"{file}: format {number}; this version of l4jax reads format {_FORMAT} and older"
        )
    try:
        text = from_json(TextConfig, config)
        return Marker(Model(text, vision and from_json(VisionConfig, vision)), described)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def write_marker(directory: pathlib.Path, marker: Marker) -> None:
    """Says what is in a directory; the last file to be written there."""
    vision = marker.model.vision
    values = {
        "format": _FORMAT,
        "config": dataclasses.asdict(marker.model.text),
        "vision": vision and dataclasses.asdict(vision),
        "described": marker.described,
    }
    write_json(directory / MARKER, values)


# --- Models --------------------------------------------------------------------------------------
def load(
    directory: pathlib.Path, *, vision: bool, dtype: str | None, execution: Execution | None
) -> Llama:
    """The model in a directory; see `checkpoints.load` for the arguments."""
    kind = read_marker(directory).model
    there = _same_keys(ocp.metadata(_parameters(directory)).metadata)
    if not vision or "vision" not in there:
        kind = Model(kind.text)
        there.pop("vision", None)
    execution = execution or execution_in(dtype or _first(there["embed"]).dtype)
    execution = dataclasses.replace(execution, scan="layers" in there)
    graph, abstract = nnx.split(outline(kind, execution))
    layout = dict(nnx.to_flat_state(sharding.shardings(abstract)))
    flat = dict(nnx.to_flat_state(abstract))
    found = {path: _leaf(there, path) for path in flat}
    _check_same(flat, found, there, directory)
    wanted: dict[str, Any] = {}
    for path, saved in found.items():
        place = layout[path].get_raw_value()
        leaf: Any
        if isinstance(saved, Quantized):
            leaf = {
                VALUES: _abstract(saved.values, saved.values.dtype, place),
                SCALES: _abstract(
                    saved.scale,
                    saved.scale.dtype,
                    of_scale(place, saved.shape, saved.scale),
                ),
            }
        else:
            leaf = _abstract(saved, jnp.dtype(dtype or saved.dtype), place)
        _put(wanted, path, leaf)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            values = ocp.load(_parameters(directory), wanted)
    except Exception as error:  # whatever the storage library raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: its parameters cannot be read: {reason}") from error
    state = {}
    for path, param in flat.items():
        value = _leaf(_same_keys(values), path)
        if isinstance(value, Quantized) and dtype is not None:
            value = jax.jit(lambda x: x.astype(dtype), out_shardings=layout[path].get_raw_value())(
                value
            )
        state[path] = param.replace(value)
    return nnx.merge(graph, nnx.from_flat_state(state))


def from_json(kind: Any, value: Any) -> Any:
    """The section that `dataclasses.asdict` turned into `value`, perhaps by way of JSON.

    Raises:
        ValueError: a field is unknown or missing, or its value is not allowed.
    """
    if isinstance(kind, types.UnionType):
        return None if value is None else from_json(get_args(kind)[0], value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{kind.__name__} {value!r} must be an object with fields")
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")
        try:
            return kind(**{name: from_json(hints[name], x) for name, x in value.items()})
        except TypeError as error:
            raise ValueError(f"{kind.__name__}: {error}") from None
    if kind == tuple[Layer, ...]:
        return tuple(Layer(*layer) for layer in value)
    return value


def save(model: Llama, directory: pathlib.Path) -> None:
    """Writes the parameters and, last of all, the marker into an existing directory."""
    save_parameters(model, _parameters(directory))
    if jax.process_index() == 0:  # arrays are written by all processes, the marker by one
        write_marker(directory, Marker(model_of(model), {}))


def save_parameters(model: Llama, place: Any) -> None:
    """Writes the parameters at an absolute path, or at a gs:// address (`epath.Path`)."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = jax.tree.map(
        lambda x: {VALUES: x.values, SCALES: x.scale} if isinstance(x, Quantized) else x,
        state,
        is_leaf=lambda x: isinstance(x, Quantized),
    )
    context = ocp.Context()
    # One chunk as large as the array could not be read back in constant memory.
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with context:
        ocp.save(place, state)


def of_scale(
    place: jax.sharding.Sharding, shape: tuple[int, ...], scale: Any
) -> jax.sharding.Sharding:
    """Where the scales beside a quantized weight of this shape at `place` lie."""
    if isinstance(place, jax.sharding.NamedSharding):
        spec = sharding.beside(place.spec, shape, scale)
        place = jax.sharding.NamedSharding(place.mesh, spec)
    return place


def _abstract(saved: Any, dtype: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(saved.shape, dtype, sharding=place)


def _first(leaf: Any) -> Any:
    return leaf[VALUES] if isinstance(leaf, dict) else leaf


def _leaf(tree: Any, path: tuple) -> Any:
    """The array at a path, or the quantized one; None if there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        return Quantized(tree[VALUES], tree[SCALES]) if tree.keys() == {VALUES, SCALES} else None
    return tree


def _put(tree: dict[str, Any], path: tuple, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(str(key), {})
    tree[str(path[-1])] = leaf


def _check_same(
    wanted: Mapping[tuple, Any], found: Mapping[tuple, Any], there: Any, directory: pathlib.Path
) -> None:
    """Raises ValueError naming the first parameter that is missing, unknown or of another shape."""
    sides = [
        {".".join(map(str, path)): tuple(x.shape) for path, x in wanted.items()},
        {".".join(map(str, path)): tuple(x.shape) for path, x in found.items() if x is not None},
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(there):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stem = name.rpartition(".")[0]
        if name not in sides[0] and stem not in sides[0]:
            sides[1][name] = tuple(leaf.shape)
    for name in sorted(sides[0] | sides[1]):
        ours, theirs = (side.get(name) for side in sides)
        if ours != theirs:
            raise ValueError(
                f"{directory}: parameter {name} has shape {theirs}; the configuration in {MARKER} "
                f"calls for {ours}"
            )


def _parameters(directory: pathlib.Path) -> pathlib.Path:
    """Orbax refuses relative paths."""
    return directory.absolute() / PARAMETERS


def _same_keys(tree: Any) -> Any:
    """Orbax returns list positions as strings where ours are integers."""
    if isinstance(tree, dict):
        return {
            int(key) if isinstance(key, str) and key.isdigit() else key: _same_keys(value)
            for key, value in tree.items()
        }
    return tree
