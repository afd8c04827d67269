"""What a conversion will do: which arrays of which types, which tensors go together."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import ml_dtypes
import numpy as np

import l4jax.checkpoints.arrays as arrays
import l4jax.checkpoints.huggingface as huggingface
import l4jax.checkpoints.meta as meta
from l4jax.checkpoints.formats import (
    FLOATS,
    SCALE,
    Format,
    Model,
    Source,
    Spec,
    Target,
    base,
    widest,
)
from l4jax.checkpoints.tables import Match
from l4jax.kernels.quantized import DTYPES, GROUP, Scheme, scale_shape, scheme_of


class Options(NamedTuple):
    """How to write.

    dtype: of floating-point tensors; as they are by default, quantized ones included.
    scheme: in which to quantize routed experts, or the feed-forward layers of dense models.
    group: inputs that share a scale in int4.
    max_shard_bytes: size at which a new safetensors file begins.
    shards: of Meta's format.
    staging: folder for checkpoints from or for an address; a temporary one by default.
    """

    dtype: str | None = None
    scheme: Scheme | None = None
    group: int = GROUP
    max_shard_bytes: int = 5_000_000_000
    shards: int = 1
    staging: pathlib.Path | None = None


class Component(NamedTuple):
    """Tensors of both sides that hold the same arrays.

    length: in how many slices it can be cut at most; 1 if it is moved as a whole.
    nbytes: of its arrays on the side where they are larger.
    """

    name: str
    source: tuple[Match, ...]
    target: tuple[Match, ...]
    length: int
    nbytes: int


class Plan(NamedTuple):
    """All that a conversion needs to know before it writes."""

    source: Source
    target: Target
    wanted: Mapping[str, Spec]
    components: list[Component]


def check_options(to: str, options: Options) -> None:
    """Raises ValueError if an option is unknown or out of range, or does not go with the format."""
    if to not in get_args(Format):
        raise ValueError(f"format {to!r} must be one of {', '.join(get_args(Format))}")
    if options.dtype is not None and options.dtype not in FLOATS:
        raise ValueError(f"dtype {options.dtype!r} must be one of {', '.join(FLOATS)}")
    if options.scheme is not None and options.scheme not in get_args(Scheme):
        raise ValueError(
            f"quantize {options.scheme!r} must be one of {', '.join(get_args(Scheme))}"
        )
    for name in ("group", "max_shard_bytes", "shards"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} must be at least 1")
    if options.group % 8:
        raise ValueError(f"group {options.group} must be a multiple of 8")
    if options.scheme == "int8" and to == "meta":
        raise ValueError("Meta's format has no int8; quantize to fp8 or int4, or write orbax or hf")


def make_plan(
    source: Source,
    directory: pathlib.Path,
    *,
    to: Format,
    options: Options,
    described: Mapping[str, Any] | None = None,
) -> Plan:
    """What a conversion will do; nothing is written.

    Raises:
        ValueError: the format or the types cannot hold the model.
    """
    described = source.described if described is None else described

    def build(wanted: Mapping[str, Spec]) -> Target:
        if to == "orbax":
            return arrays.target(source.model, wanted, directory, described=described)
        if to == "hf":
            return huggingface.target(
                source.model,
                wanted,
                directory,
                described=described,
                max_shard_bytes=options.max_shard_bytes,
            )
        return meta.target(
            source.model, wanted, directory, described=described, shards=options.shards
        )

    wanted = _wanted(source, to, options)
    if to == "orbax":
        _, wanted = arrays.stackable(source.model, wanted)
    target = build(wanted)
    if _widen(wanted, target.matches):
        target = build(wanted)
    return Plan(source, target, wanted, list(_components(source, target, wanted)))


def _widen(wanted: dict[str, Spec], matches: Iterable[Match]) -> bool:
    """Gives arrays that share a tensor the widest of their types; whether any type changed."""
    changed = False
    for match in matches:
        kinds = {wanted[name].dtype for name in match.ours}
        if len(kinds) > 1:
            wide = widest(kinds)
            wanted.update((name, wanted[name]._replace(dtype=wide)) for name in match.ours)
            changed = True
    return changed


def _wanted(source: Source, to: Format, options: Options) -> dict[str, Spec]:
    """Shape and type of every array to be written."""
    found: dict[str, Spec] = {}
    if options.scheme and not any(to_quantize(n, source.model, to) for n in source.arrays):
        raise ValueError(
            f"{source.directory}: there is nothing to quantize: routed experts are, or of dense "
            f"models the feed-forward layers but the first and last; this model has neither"
        )
    for name, spec in source.arrays.items():
        if name.endswith(SCALE):
            continue
        dtype = np.dtype(_numpy_name(options.dtype)) if options.dtype else spec.dtype
        scale = source.arrays.get(name + SCALE)
        if scale is not None and options.scheme is not None:
            _check_same_scheme(source, name, scale, options)
        if scale is not None and options.dtype is None:
            found[name], found[name + SCALE] = spec, scale
        elif options.scheme and to_quantize(name, source.model, to):
            found[name] = Spec(spec.shape, DTYPES[options.scheme])
            shape = scale_shape(spec.shape, options.scheme, group=options.group)
            found[name + SCALE] = Spec(shape, np.dtype(np.float32))
        else:
            found[name] = Spec(spec.shape, dtype)
    return found


def _check_same_scheme(source: Source, name: str, scale: Spec, options: Options) -> None:
    """Raises ValueError unless an array is quantized already as it is asked to be."""
    spec = source.arrays[name]
    scheme, group = scheme_of(spec.dtype), spec.shape[-2] // scale.shape[-2]
    if options.dtype or options.scheme != scheme or (scheme == "int4" and group != options.group):
        groups = f" in groups of {group}" if scheme == "int4" else ""
        raise ValueError(
            f"{source.directory}: {name} is {scheme}{groups} already; to change that, convert it "
            f"to a floating-point type first, and quantize the result"
        )


def _numpy_name(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype


def to_quantize(name: str, model: Model, to: Format) -> bool:
    """Whether an array is one that published packages quantize.

    Routed experts, in every layer in Hugging Face's FP8 package of Maverick, in all but the first
    and last in Meta's; in dense models the feed-forward layers but the first and last, as in Meta's
    FP8 package of Llama 3.1 405B (Llama 3 paper, section 6.2).
    """
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "layers" or parts[2] != "ffn":
        return False
    if parts[3] not in ("gate", "up", "down"):
        return False
    number, text = int(parts[1]), model.text
    if text.moe is not None and text.layers[number].ffn != "moe":
        return False
    inner = 0 < number < text.num_layers - 1
    return inner or (text.moe is not None and to != "meta")


def _components(source: Source, target: Target, wanted: Mapping[str, Spec]) -> Iterator[Component]:
    """Joins the matches of both sides that share arrays, in the order of the source's."""
    group_of: dict[str, set[str]] = {}
    for match in (*source.matches, *target.matches):
        merged = set().union(*(group_of.get(base(n), {base(n)}) for n in match.ours))
        for name in merged:
            group_of[name] = merged
    by_group: dict[int, tuple[list[Match], list[Match]]] = {}
    for side, matches in enumerate((source.matches, target.matches)):
        for match in matches:
            if match.ours:
                key = id(group_of[base(match.ours[0])])
                by_group.setdefault(key, ([], []))[side].append(match)
            elif side == 1:
                yield Component(match.theirs, (), (match,), 1, 0)
    for ours, theirs in by_group.values():
        assert ours, theirs
        if not theirs:
            raise AssertionError(f"nothing takes {ours[0].ours}")
        sizes = [
            sum(side[n].nbytes for match in matches for n in match.ours)
            for side, matches in ((source.arrays, ours), (wanted, theirs))
        ]
        length = _length(source, ours + theirs)
        yield Component(ours[0].theirs, tuple(ours), tuple(theirs), length, max(sizes))


def _length(source: Source, matches: Iterable[Match]) -> int:
    """Along how many slices all these tensors can be cut alike; 1 if they cannot."""
    cut: dict[str, int | None] = {}
    lengths = set()
    for match in matches:
        for name in match.ours:
            axis = match.layout.cut
            if axis is None or cut.setdefault(base(name), axis) != axis:
                return 1
            if not name.endswith(SCALE):
                lengths.add(source.arrays[name].shape[axis])
    return lengths.pop() if len(lengths) == 1 else 1
