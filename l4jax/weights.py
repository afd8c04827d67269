"""The matrices of a model, chosen by path rules, and models with other values in their places.

Attention's and feed-forward layers' weights are matrices whose inputs or outputs may have several
dimensions (heads and head width), behind dimensions of which every entry is a matrix of its own
(stacked layers, experts). Patterns are those of `l4jax.paths`; `EVERY` fits them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from l4jax import paths, sharding
from l4jax.models.llama4 import Llama

EVERY = ("*.attention.*", "*.gate", "*.up", "*.down")
"""Patterns of all matrices there are: of attention, dense layers, routed and shared experts."""
_ENCODER = "vision."
"""Begins the names of an image encoder's parameters, none of which is a matrix in this sense: small
beside the decoder's, they stay as they are, as they do in published quantized checkpoints."""
_OTHERS = ("router", "norm", "vocab")
"""Logical axes of parameters that are no matrices in this sense: router, norms, embedding, head."""


class Matrix(NamedTuple):
    """A weight [stack… experts… inputs… outputs…].

    stack: how many of its dimensions are stacked layers (0 or 1). experts: how many are experts
    (0 or 1). inputs, outputs: sizes of these.
    """

    name: str
    param: nnx.Variable
    stack: int
    experts: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def value(self) -> Any:
        """The array, or what stands in its place."""
        return self.param.get_raw_value()

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the dimensions before the inputs: layers, experts."""
        return tuple(self.value.shape[: self.stack + self.experts])

    @property
    def fan_in(self) -> int:
        """Inputs of one matrix."""
        return math.prod(self.inputs)


def matrices(model: Llama, patterns: Iterable[str]) -> list[Matrix]:
    """The decoder's matrices that any of the patterns fits.

    Raises:
        ValueError: a pattern fits nothing, or something that is no matrix.
    """
    known = _parameters(nnx.state(model))
    known = {name: param for name, param in known.items() if not name.startswith(_ENCODER)}
    fits = paths.chosen(patterns, known)
    return [_matrix(name, param) for name, param in known.items() if fits(name)]


def standing(model: Llama, kind: type) -> list[Matrix]:
    """The matrices in whose place a value of this kind stands."""
    return [
        _matrix(name, param)
        for name, param in _parameters(nnx.state(model)).items()
        if isinstance(param.get_raw_value(), kind)
    ]


def replaced(model: Llama, values: Mapping[str, Any]) -> Llama:
    """The same model with these values in place of those named so; all others are shared."""
    graph, state = nnx.split(model)
    flat = [
        (path, param.replace(values[name]) if name in values else param)
        for name, (path, param) in zip(_parameters(state), nnx.to_flat_state(state), strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def place(param: nnx.Variable, value: Any) -> Any:
    """Where each array of a value lies on the current mesh, in the place of this parameter's."""
    (found,) = sharding.shardings(nnx.from_flat_state([(("",), param.replace(value))])).values()
    return found.get_raw_value()


def made(param: nnx.Variable, make: Callable[..., Any], *args: Any) -> Any:
    """`make(*args)`, compiled, each of its arrays made where it lies; see `place`."""
    places = place(param, jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=places)(*args)


def by_layer(f: Callable[[Any], Any], value: Any, stack: int) -> Any:
    """`f(value)`; of a stack, of each of its layers after the other, which saves memory."""
    return jax.lax.map(f, value) if stack else f(value)


def _parameters(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}


def _matrix(name: str, param: nnx.Variable) -> Matrix:
    axes = sharding.param_axes(param)
    if set(axes) & set(_OTHERS):
        raise ValueError(
            f"{name} is not a matrix of attention or of a feed-forward layer; "
            f"choose among {', '.join(EVERY)}"
        )
    stack, experts = axes.count("layers"), axes.count("experts")
    sizes = param.get_raw_value().shape[stack + experts :]
    # Of the model's width and the others, one side is the input.
    split = 1 if axes[stack + experts] in sharding.GATHERED else len(sizes) - 1
    return Matrix(name, param, stack, experts, tuple(sizes[:split]), tuple(sizes[split:]))
