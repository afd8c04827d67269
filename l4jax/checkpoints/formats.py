"""What the formats have in common: a checkpoint to read from, and one to be written.

Between them stand our canonical arrays, by name. A quantized array has a second name beside its
own, for its scale.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

import l4jax.checkpoints.llama3 as llama3
import l4jax.checkpoints.llama4 as llama4
import l4jax.checkpoints.vision as vision
from l4jax.checkpoints.rows import Rows, Sum
from l4jax.checkpoints.tables import Layout, Match, Place, expand, places
from l4jax.config import Execution, TextConfig, VisionConfig
from l4jax.models.llama4 import Llama
from l4jax.models.multimodal import Multimodal

Format = Literal["orbax", "hf", "meta"]
SCALE = "#scale"
"""Ends the name of a quantized array's scale."""
FLOATS = ("float32", "bfloat16", "float16", "float64")


class Model(NamedTuple):
    """What a checkpoint is a checkpoint of."""

    text: TextConfig
    vision: VisionConfig | None = None


def model_of(model: Llama) -> Model:
    """What a model is a model of."""
    return Model(model.config, model.vision.config if isinstance(model, Multimodal) else None)


def outline(model: Model, execution: Execution) -> Llama:
    """A model whose parameters have shapes and places, but no numbers yet."""

    def make() -> Llama:
        settings: Any = {"execution": execution, "rngs": nnx.Rngs(0)}
        text, images = model
        return Llama(text, **settings) if images is None else Multimodal(text, images, **settings)

    found: Llama = nnx.eval_shape(make)
    return found


def execution_in(dtype: Any) -> Execution:
    """Computes in the parameters' type, if it is one to compute in, else in float32."""
    return Execution(dtype="bfloat16" if str(dtype) == "bfloat16" else "float32")


def places_in(model: Llama) -> dict[str, Place]:
    """Where each canonical array lies in the parameters of a model."""
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    found = places(model.config, model.periods, (x for x in paths if x[0] != "vision"))
    if isinstance(model, Multimodal):
        found |= vision.places(model.vision.config, (x for x in paths if x[0] == "vision"))
    return found


class Spec(NamedTuple):
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Of all its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Source(NamedTuple):
    """A checkpoint to read.

    arrays: every canonical array in it.
    matches: which of their tensors hold which arrays.
    tensors: theirs, by the name in `matches`.
    described: the format's own description of the model, by format.
    files: all that was looked at, to notice a change.
    """

    kind: Format
    directory: pathlib.Path
    model: Model
    arrays: Mapping[str, Spec]
    matches: list[Match]
    tensors: Mapping[str, Rows]
    described: Mapping[str, Any]
    files: tuple[pathlib.Path, ...]


class Target(NamedTuple):
    """A checkpoint to write.

    size: bytes that it will take on disk.
    intact: whether all that `create` made is there, so that a journal can be believed.
    create: makes the files, without contents.
    finish: given the sums of all stored tensors, makes them valid.
    """

    matches: list[Match]
    tensors: Mapping[str, Rows]
    size: int
    intact: Callable[[], bool]
    create: Callable[[], None]
    finish: Callable[[Mapping[str, Sum]], None]


def is_llama3(model: Model) -> bool:
    """Whether a model is written under the Llama 3 names; all others are under Llama 4's."""
    return model.vision is None and llama3.fits(model.text)


def cuts(model: Model) -> dict[str, int | None]:
    """Along which dimension each array is divided: as the rows of Hugging Face's tensors run."""
    rules = llama3.rules(model.text) if is_llama3(model) else llama4.rules(model.text)
    matches = [match for match, _ in expand(rules, model.text)]
    return {name: match.layout.cut for match in matches for name in match.ours}


@functools.cache
def text_places(config: TextConfig, *, scanned: bool) -> dict[str, tuple[Place, tuple[int, ...]]]:
    """Where each array of a decoder lies in its parameters, and the array's shape."""
    text = outline(Model(config), Execution(scan=scanned))
    flat = dict(nnx.to_flat_state(nnx.state(text, nnx.Param)))
    return {
        name: (place, flat[place.path].shape[place.period is not None :])
        for name, place in places_in(text).items()
    }


def array_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every canonical array of an unquantized model."""
    config, images = model
    shapes = {name: shape for name, (_, shape) in text_places(config, scanned=True).items()}
    if images is not None:
        shapes |= {array.ours: array.shape for array in vision.arrays(images, config.embed_dim)}
    return shapes


def base(name: str) -> str:
    """The array that a name belongs to: itself, or the one of which it is the scale."""
    return name.removesuffix(SCALE)


def our_shape(layout: Layout, theirs: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our one array, given the shape of their tensor."""
    (ours,) = jax.eval_shape(layout.load, jax.ShapeDtypeStruct(theirs, np.float32))
    return tuple(ours.shape)


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The smallest type that holds every number of these."""
    found: np.dtype | None = None
    for dtype in dtypes:
        try:
            found = dtype if found is None else np.promote_types(found, dtype)
        except TypeError:  # bfloat16 and float16: range of the one, digits of the other
            found = np.dtype(np.float32)
    assert found is not None
    return found


def have_sizes(files: Mapping[pathlib.Path, int]) -> bool:
    """Whether files of these sizes are there."""
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def make_files(files: Mapping[pathlib.Path, int]) -> None:
    """Makes files of these sizes; what they hold already stays."""
    for file, size in files.items():
        with open(file, "ab") as stream:
            stream.truncate(size)


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
