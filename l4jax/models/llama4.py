"""The decoder of the Llama 3 and Llama 4 families: start here.

A layer is x + attention(norm(x)) followed by x + ffn(norm(x)); `TextConfig.pattern` says which kind
of attention and feed-forward each layer has, and nothing below asks for a model's name. Layers are
run as a scan over the period of the pattern, so that 48 layers compile about as fast as four; what
the period does not divide is unrolled behind it.

Parameters: `embed` [v d], `layers` (one block per layer of the pattern, every array stacked over
the periods), `tail` (blocks that are not scanned), `norm`, `head` [d v] unless tied.

Letters: see `models.layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from l4jax import sharding
from l4jax.config import Execution, Layer, TextConfig
from l4jax.kernels import on_tpu
from l4jax.kernels.attention import SAVED as ATTENTION
from l4jax.kernels.attention import Where
from l4jax.models.attention import Attention, Step, Tokens, describe
from l4jax.models.cache import Cache, KeyValues, Slots
from l4jax.models.layers import RMSNorm, SwiGLU, materialize, weight
from l4jax.models.moe import Experts, Routing, Tiling
from l4jax.models.sequence import Split, split
from l4jax.sharding import read, total

LAYER_INPUT = "layer_input"
REMAT: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(LAYER_INPUT, ATTENTION),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the backward pass of a layer finds saved; see `config.Execution.remat`."""
Ints = Int[Array, "b t"]


class Outputs(NamedTuple):
    """What a forward pass gives beside its logits.

    routing: of every routed layer, first to last, stacked; None without routed layers.
    """

    logits: Float32[Array, "b t v"]
    routing: Routing | None


class Fused(NamedTuple):
    """Tokens that are not all words: an id from the vocabulary's size on is a row of `features`."""

    ids: Ints
    features: Float[Array, "r d"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the ids."""
        return self.ids.shape


Ids = Ints | Fused


class How(NamedTuple):
    """What every layer of a pass is told, beside its tokens.

    tiling: how tokens lie on the mesh. step: of a pass with a cache. capacity: see `Experts`.
    """

    tiling: Tiling
    step: Step | None = None
    capacity: float | None = None


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: TextConfig, layer: Layer, *, rngs: nnx.Rngs) -> None:
        d = config.embed_dim
        self.attention_norm = RMSNorm(d, eps=config.norm_eps)
        self.attention = Attention(config, layer.attention, rngs=rngs)
        self.ffn_norm = RMSNorm(d, eps=config.norm_eps)
        self.ffn: Experts | SwiGLU
        if layer.ffn == "moe":
            assert config.moe is not None
            self.ffn = Experts(d, config.moe, rngs=rngs)
        else:
            self.ffn = SwiGLU(d, config.mlp_dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens,
        cache: KeyValues | None,
        how: How,
        number: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValues | None, Routing | None]:
        """The layer's output, its cache if it has one, and what its router did if it has one.

        With `number`, `cache` holds several layers', and this is the one of that number.
        """
        normal = materialize(self.attention_norm(x))
        attended, cache = self.attention(normal, tokens, cache, how.step, number)
        x = x + attended
        normal = materialize(self.ffn_norm(x))
        if isinstance(self.ffn, SwiGLU):
            return x + self.ffn(normal), cache, None
        y, routing = self.ffn(normal, how.tiling, how.capacity)
        return x + y, cache, routing


class Llama(nnx.Module):
    """A decoder-only language model.

    Args:
        config: the architecture.
        execution: how to compute it; `Execution()` is float32, scanned, nothing rematerialized.
        rngs: random keys of the initial parameters. Use `sharding.create(lambda: Llama(…))` to make
            every parameter in its place on a mesh.

    Raises:
        ValueError: the current mesh does not divide the model; see `sharding.check`.
    """

    def __init__(
        self, config: TextConfig, *, execution: Execution = Execution(), rngs: nnx.Rngs
    ) -> None:
        sharding.check(config, jax.sharding.get_abstract_mesh().shape)
        d, v, period = config.embed_dim, config.vocab_size, len(config.pattern)
        self.config = config
        self.execution = execution
        self.periods = config.num_layers // period if execution.scan else 0
        # A table that is the head too starts small, so that logits start near 1.
        spread = d if config.tie_embeddings else 1
        self.embed = weight(rngs, (v, d), ("vocab", "embed"), fan_in=spread)
        scanned = config.pattern if self.periods else ()
        self.layers = nnx.List([_stacked(config, layer, self.periods, rngs) for layer in scanned])
        rest = config.layers[self.periods * period :]
        self.tail = nnx.List([Block(config, layer, rngs=rngs) for layer in rest])
        self.norm = RMSNorm(d, eps=config.norm_eps)
        self.head = (
            None if config.tie_embeddings else weight(rngs, (d, v), ("embed", "vocab"), fan_in=d)
        )

    def __call__(
        self, tokens: Ids, *, positions: Ints | None = None, segment_ids: Ints | None = None
    ) -> Float32[Array, "b t v"]:
        """Logits of the token after each token.

        Args:
            tokens: ids below the vocabulary size, or fused; any other gives NaN.
            positions: each token's absolute position; where they do not grow by one, another
                segment begins. By default 0, 1, …, t-1, and with `segment_ids` counted from each
                segment's start.
            segment_ids: tokens see only tokens of their own run of equal ids.
        """
        return self.outputs(tokens, positions=positions, segment_ids=segment_ids).logits

    def outputs(
        self, tokens: Ids, *, positions: Ints | None = None, segment_ids: Ints | None = None
    ) -> Outputs:
        """Logits and what the routers did; arguments as for a plain call."""
        x, routing = self.hidden(tokens, positions=positions, segment_ids=segment_ids)
        return Outputs(self.logits(x), routing)

    def hidden(
        self, tokens: Ids, *, positions: Ints | None = None, segment_ids: Ints | None = None
    ) -> tuple[Float[Array, "b t d"], Routing | None]:
        """What `logits` turns into logits, and what the routers did; arguments as for a call."""
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        where = None if positions is None else Where(positions, _runs(positions, segment_ids))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x, _, routing = self._decode(tokens, positions, where)
        return x, routing

    def prefill(
        self, tokens: Ids, counts: Int[Array, " b"] | None = None, *, context: int
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """A new cache for up to `context` tokens per row, holding each row's first `counts` tokens.

        Rows shorter than t are padded on the right with any token. Returns the final hidden states
        too; `logits` turns the ones that are wanted into logits.
        """
        return self._extend(tokens, self.empty_cache(tokens.shape[0], context), counts, fresh=True)

    def extend(
        self, tokens: Ids, cache: Cache, counts: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Final hidden states of tokens that continue each row, and the cache that holds them.

        Args:
            tokens: one token per row or a piece of any length, padded on the right.
            cache: from `prefill` or `extend`; a row must not outgrow the context it was made for.
            counts: how many of each row's tokens are real; all by default, 0 leaves a row alone.
        """
        return self._extend(tokens, cache, counts, fresh=False)

    def empty_cache(self, batch: int, context: int) -> Cache:
        """A cache for `batch` rows of up to `context` tokens, holding none."""
        a, dtype = self.config.attention, jnp.dtype(self.execution.dtype)

        def empty(layer: Layer, *stack: int) -> KeyValues:
            size = self.config.cache_slots(layer.attention, context)
            shape = (*stack, batch, size, a.num_kv_heads, a.head_dim)
            return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        scanned = self.periods * len(self.config.pattern)
        return Cache(
            tuple(empty(x, self.periods) for x in self.config.pattern[:scanned]),
            tuple(empty(x) for x in self.config.layers[scanned:]),
            jnp.zeros((batch,), jnp.int32),
        )

    def logits(self, x: Float[Array, "*b d"]) -> Float32[Array, "*b v"]:
        """Float32 logits of final hidden states."""
        head, tied = (self.embed, True) if self.head is None else (self.head, False)

        def shard(head: nnx.Variable, x: Array) -> Array:
            axes = sharding.apart(head, x)
            w = read(head, x.dtype, whole=not axes)
            columns = sharding.exchange(x.reshape(-1, x.shape[-1]), 1, 0, *axes)
            y = jnp.matmul(columns, w.T if tied else w, preferred_element_type=jnp.float32)
            return sharding.scatter(y, 0, *axes).reshape(*x.shape[:-1], y.shape[1])

        cut = [*sharding.token_axes(*(*x.shape[:-1], 1)[:2]), *[None] * x.ndim][: x.ndim - 1]
        specs = sharding.specs(head), PartitionSpec(*cut)
        return sharding.per_shard(shard, specs, PartitionSpec(*cut, "tensor"))(head, self.norm(x))

    def _extend(
        self, tokens: Ids, cache: Cache, counts: Array | None, *, fresh: bool
    ) -> tuple[Array, Cache]:
        b, t = tokens.shape
        counts = jnp.full((b,), t, jnp.int32) if counts is None else counts
        positions = cache.lengths[:, None] + jnp.arange(t, dtype=jnp.int32)
        step = Step(cache.lengths, counts, fresh, _slots(cache))
        x, cache, _ = self._decode(tokens, positions, None, cache, step)
        return x, cache

    def _decode(
        self,
        tokens: Ids,
        positions: Array,
        where: Where | None,
        cache: Cache | None = None,
        step: Step | None = None,
    ) -> tuple[Array, Any, Routing | None]:
        """Hidden states before the final norm, the cache and every layer's routing, on any mesh."""
        sharding.check(self.config, jax.sharding.get_abstract_mesh().shape)
        ids, features = tokens if isinstance(tokens, Fused) else (tokens, None)
        rows, _ = sharding.token_axes(ids.shape[0])
        # Tokens that follow a cache meet it where it lies, so they are not cut.
        follows = step is not None and not step.fresh
        # Capacity is for the first tokens of a row, so its shards must lie in their order.
        in_order = self.execution.capacity is not None
        cut = None if follows else split(self.config, ids.shape[1], in_order=in_order)
        if cut is not None and cut.balanced:
            order = cut.rows.reshape(-1)
            ids, positions, where = jax.tree.map(lambda x: x[:, order], (ids, positions, where))
        tiling = Tiling(rows, ("context",) if cut else ())
        graph, state = nnx.split((self.embed, self.layers, self.tail))

        def shard(state: nnx.State, *arrays: Any) -> tuple:
            return self._shard(nnx.merge(graph, state), arrays, step, cut, tiling)

        row = PartitionSpec(rows or None)
        token = PartitionSpec(*row, *tiling.tokens)
        place = cache_specs(cache, row)
        run = sharding.per_shard(
            shard,
            (sharding.specs(state), token, sharding.spec(None, "embed"), token, token, place, row),
            (token, place, PartitionSpec()),
        )
        return run(state, ids, features, positions, where, cache, step and step.counts)

    def _shard(
        self, modules: tuple, arrays: tuple, step: Step | None, cut: Split | None, tiling: Tiling
    ) -> tuple[Array, Any, Routing | None]:
        """`_decode` on one shard: its part of the arrays, and of these modules' parameters."""
        (embed, layers, tail), (ids, features, positions, where, cache, counts) = modules, arrays
        x = lookup(embed, ids, self.config.vocab_size, self.execution.dtype, features)
        tokens = describe(self.config, positions, where, cut)
        how = How(tiling, capacity=self.execution.capacity)
        if step is not None:
            how = How(tiling, step._replace(lengths=cache.lengths, counts=counts))

        def layer(block: Block, x: Array, cache: KeyValues | None, number: Array | None) -> tuple:
            return block(checkpoint_name(x, LAYER_INPUT), tokens, cache, how, number)

        if self.execution.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.execution.remat])

        def run(carry: tuple[Array, tuple], args: tuple) -> tuple[tuple[Array, tuple], tuple]:
            (x, caches), (blocks, number) = carry, args
            new, routings = [], []
            for block, cache in zip(blocks, caches, strict=True):
                x, cache, routing = layer(block, x, cache, number)
                new.append(cache)
                routings.append(routing)
            return (x, tuple(new)), tuple(routings)

        new: Any = (None,) * len(layers)
        new_tail: Any = (None,) * len(tail)
        if cache is not None:
            new, new_tail = cache.layers, cache.tail
        routing: tuple = ()
        if layers:
            # Caches are carried, not stacked anew: a step changes one slot of them, in place.
            numbers = jnp.arange(self.periods, dtype=jnp.int32)
            (x, new), routing = jax.lax.scan(run, (x, new), (tuple(layers), numbers))
        (x, new_tail), tail_routing = run((x, new_tail), (tuple(tail), None))
        if cache is not None:
            cache = Cache(new, new_tail, cache.lengths + counts)
        if cut is not None:
            x = cut.contiguous(x)
        return x, cache, _in_layer_order(routing, tail_routing)


def lookup(
    table: nnx.Param, ids: Ints, vocab_size: int, dtype: str, features: Array | None = None
) -> Float[Array, "b t d"]:
    """The rows of an embedding table, of which each shard has some columns and some rows.

    Ids from `vocab_size` on are rows of `features`, of which each shard has the same columns.

    Ids are few bytes, so each shard looks up its columns for all shards' ids and sends them there:
    the table itself, a thousand times larger than the answers, is never gathered.
    """
    axes, part = sharding.param_mesh_axes(table)[1], table[...]
    asked = sharding.gather(ids[None], 0, *axes)
    # Compiled code cannot raise, so an id outside the vocabulary gives NaN, not a neighbour.
    first = sharding.index("tensor") * part.shape[0]
    local = jnp.where(asked < first, part.shape[0], asked - first)
    if sharding.platform() == "tpu":
        found = on_tpu("embedding").take_rows(part, local)
    else:
        found = part.at[local].get(mode="fill", fill_value=0)
    found = total(found.astype(dtype), "tensor")
    if features is not None:
        fused = features.astype(dtype)[asked - vocab_size]
        found = jnp.where((asked < vocab_size)[..., None], found, fused)
        vocab_size += features.shape[0]
    found = jnp.where(((asked < 0) | (asked >= vocab_size))[..., None], jnp.nan, found)
    # As columns: the TPU compiler lays out rows anew to be sent, and again when they have come.
    columns = jnp.moveaxis(found, -1, 1).reshape(-1, ids.size)
    return sharding.exchange(columns, 0, 0, *axes).T.reshape(*ids.shape, -1)


def _slots(cache: Cache) -> Slots:
    """How the slots of a cache lie on the current mesh: cut where every layer's can be."""
    shards = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    sizes = {x.k.shape[-3] for x in (*cache.layers, *cache.tail)}
    return Slots(shards > 1 and all(size % shards == 0 for size in sizes))


def cache_specs(cache: Cache | None, rows: PartitionSpec) -> Any:
    """The layout of a cache: slots over context, heads over tensor."""
    if cache is None:
        return PartitionSpec()
    slots = "context" if _slots(cache).cut else None
    plain = PartitionSpec(*rows, slots, "tensor", None)
    stacked = PartitionSpec(None, *plain)
    layers = jax.tree.map(lambda _: stacked, cache.layers)
    tail = jax.tree.map(lambda _: plain, cache.tail)
    return Cache(layers, tail, rows)  # type: ignore[arg-type]


def segment_positions(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Positions that start from 0 where the segment id changes."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changed = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(changed, index, 0), axis=1)


def _runs(positions: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None) -> Int[Array, "b t"]:
    """Numbers the stretches along which positions grow by one and the segment id stays."""
    begins = jnp.diff(positions, axis=1) != 1
    if segment_ids is not None:
        begins |= jnp.diff(segment_ids, axis=1) != 0
    return jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def _stacked(config: TextConfig, layer: Layer, periods: int, rngs: nnx.Rngs) -> Block:
    """A block whose arrays have a leading dimension, one entry for each period."""
    keys = jax.random.split(rngs.params(), periods)
    return jax.vmap(lambda key: Block(config, layer, rngs=nnx.Rngs(params=key)))(keys)


def _in_layer_order(scanned: tuple, tail: tuple) -> Routing | None:
    """All routings stacked by layer: scanned ones come by place in the pattern, then period."""
    places = [routing for routing in scanned if routing is not None]
    rest = [routing for routing in tail if routing is not None]
    parts = []
    if places:
        interleaved = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *places)
        parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), interleaved))
    if rest:
        parts.append(jax.tree.map(lambda *x: jnp.stack(x), *rest))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if parts else None
