"""A model from and to our own directory: `l4jax.json` beside an Orbax checkpoint of the parameters.

Plain Orbax restores `parameters/` by itself, onto any mesh: a nested dict of arrays.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1 as ocp

from l4jax import sharding
from l4jax.checkpoints.safetensors import write_json
from l4jax.config import Execution, TextConfig, from_json
from l4jax.models.llama4 import Llama

MARKER = "l4jax.json"
_FORMAT = 1


def read_config(directory: pathlib.Path) -> TextConfig:
    """The architecture in a directory of ours.

    Raises:
        ValueError: the marker file is not ours, or of a newer format.
    """
    file = directory / MARKER
    try:
        values = json.loads(file.read_text())
        number, config = values["format"], values["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a valid marker: {error!r}") from None
    if number != _FORMAT:
        raise ValueError(f"{file}: format {number}; this version of l4jax reads format {_FORMAT}")
    try:
        return from_json(TextConfig, config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load(directory: pathlib.Path, *, dtype: str | None, execution: Execution | None) -> Llama:
    """The model in a directory; see `checkpoints.load` for the arguments."""
    config = read_config(directory)
    there = _same_keys(ocp.metadata(_parameters(directory)).metadata)
    execution = execution or Execution.for_parameters(dtype or there["embed"].dtype)
    execution = dataclasses.replace(execution, scan="layers" in there)
    model = nnx.eval_shape(lambda: Llama(config, execution=execution, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    layout = nnx.to_pure_dict(sharding.shardings(abstract))
    shapes = nnx.to_pure_dict(abstract)
    _check_same(shapes, there, directory)
    wanted = jax.tree.map(
        lambda param, place, saved: jax.ShapeDtypeStruct(
            param.shape, jnp.dtype(dtype or saved.dtype), sharding=place
        ),
        shapes,
        layout,
        there,
    )
    try:
        values = ocp.load(_parameters(directory), wanted)
    except Exception as error:  # whatever the storage library raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: its parameters cannot be read: {reason}") from error
    nnx.replace_by_pure_dict(abstract, values)
    return nnx.merge(graph, abstract)


def save(model: Llama, directory: pathlib.Path) -> None:
    """Writes the parameters and, last of all, the marker into an existing directory."""
    ocp.save(_parameters(directory), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    marker = {
        "format": _FORMAT,
        "config": dataclasses.asdict(model.config),
    }
    write_json(directory / MARKER, marker)


def _check_same(wanted: Any, found: Any, directory: pathlib.Path) -> None:
    """Raises ValueError naming the first parameter that is missing, unknown or of another shape."""
    sides = [
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in tree}
        for tree in map(jax.tree_util.tree_leaves_with_path, (wanted, found))
    ]
    for name in sorted(sides[0] | sides[1]):
        ours, theirs = (side.get(name) for side in sides)
        if ours != theirs:
            raise ValueError(
                f"{directory}: parameter {name} has shape {theirs}; the configuration in {MARKER} "
                f"calls for {ours}"
            )


def _parameters(directory: pathlib.Path) -> pathlib.Path:
    """Orbax refuses relative paths."""
    return directory.absolute() / "parameters"


def _same_keys(tree: Any) -> Any:
    """Orbax returns list positions as strings where ours are integers."""
    if isinstance(tree, dict):
        return {
            int(key) if isinstance(key, str) and key.isdigit() else key: _same_keys(value)
            for key, value in tree.items()
        }
    return tree
