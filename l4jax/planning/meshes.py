"""Which meshes a model, a slice and a batch allow, and which one to take when nobody says.

The choice rests on an estimate: arithmetic on the configuration, good enough to order meshes by,
which the compiler's figures then replace. Its terms follow `sharding`: parameters lie on as many
devices as hold different tokens; what is not an expert's is gathered for use over all of these in
training, over `fsdp` only when serving, and not at all by few tokens; experts are gathered over
`fsdp` and `context`, never over `expert`, to which their tokens travel instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import jax

from l4jax import roofline, sharding
from l4jax.config import Remat, TextConfig, VisionConfig
from l4jax.models import sequence
from l4jax.planning.chips import GIB, Topology

Task = Literal["train", "sft", "dpo", "distill", "teach", "prefill", "decode"]
TASKS: tuple[Task, ...] = get_args(Task)
UPDATES: tuple[Task, ...] = ("train", "sft", "dpo", "distill")
"""Those with a backward pass."""
Sizes = Mapping[str, int]


class Pictures(NamedTuple):
    """The images of a step, and the encoder that reads them."""

    config: VisionConfig
    tiles: int
    """Of each sequence."""
    frozen: bool
    """Whether the encoder is not trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done in a step."""

    task: Task
    batch: int
    """Sequences."""
    length: int
    """Tokens of each; of decoding, tokens of context."""
    weight_bytes: float = 2.0
    """Of each parameter when serving."""
    images: Pictures | None = None
    meets: bool = False
    """Whether slices train by themselves, and hold what their meetings need."""

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.task in UPDATES

    @property
    def tokens(self) -> int:
        """That a step computes."""
        return self.batch * (1 if self.task == "decode" else self.length)

    @property
    def rules(self) -> sharding.Rules:
        """Where parameters lie; a teacher's as its student's."""
        serves = self.task in ("prefill", "decode")
        return sharding.SERVING if serves else sharding.TRAINING


class Estimate(NamedTuple):
    """What a mesh costs a device, roughly."""

    gib: float
    """Of HBM at the peak."""
    seconds: float
    """Of a step, most of it overlapping."""


def rows(task: Task, topology: Topology) -> int:
    """Sequences in a step when nobody says: one for each device, of decoding no less than 16."""
    return max(16, topology.devices) if task == "decode" else topology.devices


def parse(text: str) -> dict[str, int]:
    """The sizes in e.g. "fsdp=4,expert=16"; other axes have size 1.

    Raises:
        ValueError: it is not written like that, or an axis is unknown.
    """
    sizes = dict.fromkeys(sharding.AXES, 1)
    given: set[str] = set()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise ValueError(
                f"mesh {text!r}: write axes and sizes such as fsdp=4,expert=16; "
                f"the axes are {', '.join(sharding.AXES)}"
            )
        if axis in given:
            raise ValueError(f"mesh {text!r} gives {axis} twice")
        given.add(axis)
        sizes[axis] = int(size)
    return sizes


def show(sizes: Sizes) -> str:
    """Such as "fsdp=4,expert=16"."""
    return ",".join(f"{a}={n}" for a, n in sizes.items() if n > 1) or "data=1"


def check(config: TextConfig, topology: Topology, work: Work, sizes: Sizes) -> None:
    """Whether this mesh is one of the slice, and divides the model and the batch.

    Raises:
        ValueError: it is not or does not; names the nearest meshes that are and do.
    """
    problem = _problem(config, topology, work, sizes)
    if problem is not None:
        near = sorted(candidates(config, topology, work), key=lambda other: _distance(sizes, other))
        legal = "; ".join(show(other) for other in near[:3])
        raise ValueError(
            f"mesh {show(sizes)}: {problem}"
            + (f"; nearest meshes that do: {legal}" if legal else "")
        )


def _problem(config: TextConfig, topology: Topology, work: Work, sizes: Sizes) -> str | None:
    devices = math.prod(sizes.values())
    if devices != topology.devices:
        slices = f" × {topology.slices} slices" if topology.slices > 1 else ""
        return f"has {devices} devices, but {topology.name}{slices} has {topology.devices}"
    if sizes["expert"] > 1 and not any(layer.ffn == "moe" for layer in config.layers):
        return "a dense model has no experts to split; fsdp does the same for it"
    if sizes["data"] % topology.slices:
        return f"data={sizes['data']} must be a multiple of the {topology.slices} slices it crosses"
    try:
        sharding.check(config, sizes, work.rules)
    except ValueError as error:
        return str(error)
    parts = _product(sizes, *sharding.BATCH)
    if work.rules is sharding.TRAINING and work.batch % parts:
        return f"data × fsdp × expert = {parts} must divide the batch of {work.batch}"
    if work.length % sizes["context"]:
        return f"context={sizes['context']} must divide the {work.length} tokens of a sequence"
    return None


def candidates(config: TextConfig, topology: Topology, work: Work) -> list[dict[str, int]]:
    """All meshes of the slice that divide the model and the batch."""
    found = []
    for sizes in _factorings(topology.devices):
        mesh = dict(zip(sharding.AXES, sizes, strict=True))
        if _problem(config, topology, work, mesh) is None:
            found.append(mesh)
    return found


def rank(
    config: TextConfig, topology: Topology, work: Work, remat: Remat | None = None
) -> list[tuple[dict[str, int], Remat]]:
    """Meshes and what they keep for the backward pass (or `remat`), by the estimate, best first.

    The first one is what `l4jax plan` takes when nobody says: of what should fit, the fastest; if
    nothing does, the smallest.
    """
    kept: tuple[Remat, ...] = ("dots", "attention", "full") if work.trains else ("none",)
    if remat is not None:
        kept = (remat,)
    options = list(itertools.product(candidates(config, topology, work), kept))

    def merit(option: tuple[dict[str, int], Remat]) -> tuple[bool, float, float, int]:
        guess = estimate(config, topology, work, *option)
        full = guess.gib / topology.generation.hbm_gib
        axes = sum(n > 1 for n in option[0].values())
        if full > _SAFE:
            return True, float(round(guess.gib)), guess.seconds, axes
        # Of equals, the one with room to spare, then the mesh with fewer axes.
        return False, guess.seconds * (1 + 0.1 * full), guess.gib, axes

    return sorted(options, key=merit)


def fits(config: TextConfig, topology: Topology, work: Work, sizes: Sizes, remat: Remat) -> bool:
    """Whether a mesh should have room, by the estimate."""
    guess = estimate(config, topology, work, sizes, remat)
    return guess.gib <= _SAFE * topology.generation.hbm_gib


_SAFE = 0.85
"""Part of HBM that an estimate may fill: it leaves out what the compiler adds."""


def estimate(
    config: TextConfig, topology: Topology, work: Work, sizes: Sizes, remat: Remat
) -> Estimate:
    """What a mesh costs a device."""
    hold = _memory(config, work, sizes, remat)
    generation, slices = topology.generation, topology.slices
    shards = math.prod(sizes.values())
    if work.task == "decode":
        # Shards of a cache have the same tokens; that they share its attention is little.
        shards = _parts(work, sizes) * sizes["tensor"]
    operations = _operations(config, work, sizes, remat) / shards
    ici, dcn = _wire(config, work, sizes, remat, slices)
    link = generation.link_bandwidth * 2 / generation.devices_per_chip
    read = hold.weights if work.trains else hold.weights + hold.cache
    times = (
        operations / generation.flops,
        read / generation.hbm_bandwidth,
        ici / link + _LATENCY * _exchanges(config, sizes),
        dcn / (generation.dcn_bandwidth / generation.devices_per_chip),
    )
    return Estimate(
        gib=sum(hold) / GIB,
        seconds=max(times) + _UNHIDDEN * (sum(times) - max(times)),
    )


_LATENCY = 5e-6
"""Seconds that a collective of few bytes takes: matters to decoding only."""
_MEETINGS = 8
"""Collectives of a layer whose few tokens go to its weights; see `sharding.apart`."""
_UNHIDDEN = 0.25
"""Part of the shorter times that the longest one does not hide: our guess, which tells apart what
would be equal otherwise."""


class _Held(NamedTuple):
    """Bytes in a device's HBM."""

    weights: float
    optimizer: float
    cache: float
    activations: float


def _memory(config: TextConfig, work: Work, sizes: Sizes, remat: Remat) -> _Held:
    counts, tensor = roofline.parameters(config), sizes["tensor"]
    encoder = _encoder(config, work)
    others = (counts.total - counts.routed + encoder) / tensor
    experts = counts.routed / (tensor * sizes["expert"])
    spread = _product(sizes, *work.rules["embed"]), _product(sizes, *work.rules["expert_embed"])
    held = others / spread[0] + experts / spread[1]
    tokens = work.tokens / _product(sizes, *sharding.BATCH, "context")
    layer = max(others, experts) / config.num_layers
    if not work.trains:
        here = work.batch / _parts(work, sizes)
        share = min(tensor, config.attention.num_kv_heads) * sizes["context"]
        cache = here * roofline.kv_bytes(config, work.length) / share
        if work.task == "decode":
            cache *= _padding(config)
        if work.task == "teach":
            cache = 0.0
        passing = 8 * tokens * config.embed_dim + _patches(work, sizes, "full")
        if all(_stationary(config, work, sizes)):
            passing += work.weight_bytes * _relaid(config, sizes, spread[1]) * experts / spread[1]
        else:
            passing += 2 * 2 * layer
        return _Held(work.weight_bytes * held, 0.0, cache, passing)
    widths = _kept_widths(config, remat)
    kept = 2 * tokens * (config.num_layers * (config.embed_dim + widths / tensor))
    # Gradients in the parameters' type; a layer at work, and the head: gathered weights, their
    # gradients, and what the backward pass forms again.
    head = config.vocab_size * config.embed_dim / tensor
    working = 4 * held + 3 * 2 * (layer + head)
    working += 2 * tokens * 3 * _widths(config) / tensor
    kept += _patches(work, sizes, remat)
    frozen = encoder / tensor / spread[0] if work.images is not None and work.images.frozen else 0.0
    moments = (16 if work.meets else 8) * (held - frozen)
    return _Held(4 * held, moments, 0.0, kept + working)


def _encoder(config: TextConfig, work: Work) -> int:
    """Parameters of the image encoder, where there is one."""
    if work.images is None:
        return 0
    return roofline.vision_parameters(work.images.config, config.embed_dim)


def _patches(work: Work, sizes: Sizes, remat: Remat) -> float:
    """Bytes of what a device's tiles need: their pixels and each layer's input, if that is kept,
    and what a layer at work, or every layer, makes of each patch."""
    if work.images is None:
        return 0.0
    c = work.images.config
    tiles = work.batch * work.images.tiles / _product(sizes, *sharding.BATCH, "context")
    tokens = tiles * (c.side**2 + 1)
    inside = 2 * tokens * (6 * c.embed_dim + 2 * c.mlp_dim + 5 * c.num_heads * (c.side**2 + 1))
    layers = c.num_layers if work.trains and not work.images.frozen else 1
    products = 5 * c.embed_dim + c.mlp_dim if remat == "dots" else 0
    return (
        4 * tiles * c.channels * c.image_size**2
        + 2 * tokens * layers * (c.embed_dim + products)
        + inside * (layers if remat == "none" else 1)
    )


def _padding(config: TextConfig) -> float:
    """What a cache takes while tokens are decoded, in its own bytes.

    Rows of a TPU's tiles have 128 lanes. Keys of other widths lie there in a copy, padded, beside
    the compact arrays that go in and out.
    """
    width = config.attention.head_dim
    lanes = -(-width // 128) * 128
    return 1.0 if lanes == width else 1.0 + lanes / width


def _relaid(config: TextConfig, sizes: Sizes, spread: int) -> float:
    """Part of the routed experts' weights that decoding holds twice.

    A TPU's own layout of a matrix has the side along its lanes that fills them; grouped products
    want the last one there, and the compiler copies what differs before it decodes.
    """
    if config.moe is None:
        return 0.0
    fills = [
        n % 128 == 0 for n in (config.embed_dim / spread, config.moe.mlp_dim / sizes["tensor"])
    ]
    return {(True, False): 2 / 3, (False, True): 1 / 3}.get((fills[0], fills[1]), 0.0)


def _kept_widths(config: TextConfig, remat: Remat) -> float:
    """Numbers that a layer keeps of each token for its backward pass, beside its input."""
    a = config.attention
    attention = float(a.num_heads * a.head_dim)
    if remat in ("full", "offload"):
        return 0.0
    if remat == "attention":
        return attention
    if remat == "none":
        return 2 * _widths(config)
    # Products of experts come from kernels, which no policy for products keeps.
    hidden = _hidden(config, routed=False)
    return attention + 2 * a.num_kv_heads * a.head_dim + config.embed_dim + 2 * hidden


def _widths(config: TextConfig) -> float:
    """Numbers that a layer's products make of each token."""
    a = config.attention
    attention = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim
    return attention + 2 * config.embed_dim + 2 * _hidden(config, routed=True)


def _hidden(config: TextConfig, *, routed: bool) -> float:
    """Hidden width of the feed-forward networks that see a token, as a mean over layers."""
    moe = config.moe
    if moe is None:
        return float(config.mlp_dim)
    part = sum(layer.ffn == "moe" for layer in config.layers) / config.num_layers
    active = moe.shared_mlp_dim + (moe.mlp_dim * moe.experts_per_token if routed else 0)
    return part * active + (1 - part) * config.mlp_dim


def _operations(config: TextConfig, work: Work, sizes: Sizes, remat: Remat) -> float:
    """Of all devices: the ideal ones, what is computed again, and waiting for the last part of a
    sequence, which attends to all the others."""
    again = {"none": 1.0, "dots": 1.1, "attention": 1.22}.get(remat, 1.27)
    ideal = ideal_flops(config, work)
    products = 2.0 * roofline.parameters(config).multiplied * work.tokens
    attention = max(0.0, ideal - products * (3 if work.trains else 1))
    late = attention * (1 - 1 / sizes["context"]) if work.task != "decode" else 0.0
    return (ideal + late) * (again if work.trains else 1.0)


def ideal_flops(config: TextConfig, work: Work) -> float:
    """Operations of the model in one step of all devices, nothing computed twice."""
    if work.task == "decode":
        return float(work.batch * roofline.forward_flops(config, work.length))
    encoded = 0.0
    if work.images is not None:
        tile = roofline.vision_flops(work.images.config, config.embed_dim)
        backward = work.trains and not work.images.frozen
        encoded = float(tile * work.batch * work.images.tiles * (3 if backward else 1))
    training = float(work.tokens * roofline.training_flops(config, work.length))
    if work.trains:
        return training + encoded
    # A prompt's last token alone needs the head; a teacher is asked about each.
    counts, unasked = roofline.parameters(config), work.tokens - work.batch
    head = 0 if work.task == "teach" else 2 * (counts.head or counts.embedding) * unasked
    return training / 3 - head + encoded


def _wire(
    config: TextConfig, work: Work, sizes: Sizes, remat: Remat, slices: int
) -> tuple[float, float]:
    """Bytes that a device sends within a slice and between slices."""
    counts, tensor, expert = roofline.parameters(config), sizes["tensor"], sizes["expert"]
    others = (counts.total - counts.routed + _encoder(config, work)) / tensor
    experts = counts.routed / (tensor * expert)
    passes = 3 if work.trains else 1
    weight = 2.0 if work.trains else work.weight_bytes
    spread = _product(sizes, *work.rules["embed"]), _product(sizes, *work.rules["expert_embed"])
    stays = _stationary(config, work, sizes)
    gathered = 0.0 if stays[0] else others * (1 - 1 / spread[0])
    gathered += 0.0 if stays[1] else experts * (1 - 1 / spread[1])
    ici = passes * weight * gathered
    tokens = work.tokens / _product(sizes, *sharding.BATCH, "context")
    mine = work.batch / _parts(work, sizes)
    if stays[0]:
        # Each layer sends its inputs and outputs twice, and what its products make of all rows.
        met = 4 * config.embed_dim + 2 * spread[0] * _widths(config) / tensor
        ici += config.num_layers * 2 * mine * met * (1 - 1 / spread[0])
    again = 1 if not work.trains else 2 if remat in ("none", "dots") else 3
    routed = sum(layer.ffn == "moe" for layer in config.layers)
    per_token = 2 * config.embed_dim * tokens * again
    chosen = config.moe.experts_per_token if config.moe is not None else 0
    ici += routed * 2 * per_token * chosen * (1 - 1 / expert)
    # Twice two halves of an all-reduce in each layer, whose products wait for them: counted double.
    ici += config.num_layers * 2 * 2 * 2 * per_token * (1 - 1 / tensor)
    a, context = config.attention, sizes["context"]
    # A part that is whole chunks needs no other part in chunked layers.
    alone = a.chunk_size is not None and work.length // context % a.chunk_size == 0
    seen = sum(not (alone and layer.attention == "chunked") for layer in config.layers)
    keys = 2 * 2 * a.num_kv_heads * a.head_dim * tokens / tensor
    if work.task == "decode":
        # Shards of a cache add up their attention, in float32, both ways.
        ici += config.num_layers * 2 * 4 * mine * a.num_heads * a.head_dim / tensor * (context > 1)
    else:
        ici += seen * keys * (context - 1) * again
    replicas = sizes["data"]
    gradient = 2 * 2 * (1 - 1 / replicas) * (others / spread[0] + experts / spread[1])
    if not work.trains or replicas == 1:
        return ici, 0.0
    return (ici, gradient) if slices > 1 else (ici + gradient, 0.0)


def _stationary(config: TextConfig, work: Work, sizes: Sizes) -> tuple[bool, bool]:
    """Whether tokens go to the weights instead of weights to them, those of routed experts last;
    see `sharding.apart`."""
    if work.task != "decode":
        return False, False
    few = config.embed_dim * min(work.weight_bytes, 2.0) / 2
    rows = work.batch / _parts(work, sizes)
    dense = 2 * rows * _product(sizes, *work.rules["embed"]) <= few
    if config.moe is None:
        return dense, dense
    here = config.moe.num_experts / sizes["expert"]
    rows *= config.moe.experts_per_token * _product(sizes, *work.rules["expert_embed"], "expert")
    return dense, 2 * rows <= few * here


def _parts(work: Work, sizes: Sizes) -> int:
    """How many parts rows are cut into: axes that do not divide the batch hold copies of it; see
    `sharding.token_axes`."""
    parts = 1
    for axis in sharding.BATCH:
        parts *= sizes[axis] if work.batch % (parts * sizes[axis]) == 0 else 1
    return parts


def _exchanges(config: TextConfig, sizes: Sizes) -> int:
    """Collectives that each token waits for."""
    routed = sum(layer.ffn == "moe" for layer in config.layers)
    axes = (
        ("tensor", 2 * config.num_layers),
        ("expert", 2 * routed),
        ("fsdp", _MEETINGS * config.num_layers),
    )
    return sum(n for axis, n in axes if sizes[axis] > 1)


def expert_rows(config: TextConfig, work: Work, sizes: Sizes) -> int:
    """Rows that a device's experts see when routing is balanced."""
    chosen = config.moe.experts_per_token if config.moe is not None else 0
    parts = _parts(work, sizes)
    if work.task != "decode":
        parts *= sizes["context"]
    return math.ceil(work.tokens * chosen / parts)


def in_order(config: TextConfig, work: Work, sizes: Sizes) -> bool:
    """Whether the sequence's shards follow each other, instead of having pieces from both ends."""
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        cut = sequence.split(config, work.length)
    return cut is not None and not cut.balanced


def _product(sizes: Sizes, *axes: str) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _distance(one: Sizes, other: Sizes) -> float:
    """How far apart two meshes are: doublings of axes."""
    return sum(abs(math.log2(one[axis] / other[axis])) for axis in sharding.AXES)


def _factorings(n: int, axes: int = len(sharding.AXES)) -> Iterator[tuple[int, ...]]:
    """All ways to write `n` as a product of `axes` sizes, in order."""
    if axes == 1:
        yield (n,)
        return
    for first in (k for k in range(1, n + 1) if n % k == 0):
        for rest in _factorings(n // first, axes - 1):
            yield (first, *rest)
