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

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from l4jax.config import Execution, Layer, TextConfig
from l4jax.kernels.attention import Where
from l4jax.models.attention import Attention, Step, Tokens, describe
from l4jax.models.cache import Cache, KeyValues
from l4jax.models.layers import RMSNorm, SwiGLU, weight
from l4jax.models.moe import Experts, Routing
from l4jax.sharding import constrain

REMAT: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class Outputs(NamedTuple):
    """What a forward pass gives beside its logits.

    routing: of every routed layer, first to last, stacked; None without routed layers.
    """

    logits: Float32[Array, "b t v"]
    routing: Routing | None


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
        cache: KeyValues | None = None,
        step: Step | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValues | None, Routing | None]:
        """The layer's output, its cache if it has one, and what its router did if it has one."""
        attended, cache = self.attention(self.attention_norm(x), tokens, cache, step)
        x = constrain(x + attended, "batch", "sequence", None)
        y, routing = self.ffn(self.ffn_norm(x)), None
        if isinstance(y, tuple):
            y, routing = y
        return constrain(x + y, "batch", "sequence", None), cache, routing


class Llama(nnx.Module):
    """A decoder-only language model.

    Args:
        config: the architecture.
        execution: how to compute it; `Execution()` is float32, scanned, nothing rematerialized.
        rngs: random keys of the initial parameters. Use `sharding.create(lambda: Llama(…))` to make
            every parameter in its place on a mesh.
    """

    def __init__(
        self, config: TextConfig, *, execution: Execution = Execution(), rngs: nnx.Rngs
    ) -> None:
        d, v, period = config.embed_dim, config.vocab_size, len(config.pattern)
        self.config = config
        self.execution = execution
        self.periods = config.num_layers // period if execution.scan else 0
        # A table that is the head too starts small, so that logits start near 1.
        spread = d if config.tie_embeddings else 1
        self.embed = weight(rngs, (v, d), ("vocab", "embed"), fan_in=spread)
        self.layers = nnx.List(
            [_stacked(config, layer, self.periods, rngs) for layer in config.pattern]
            if self.periods
            else []
        )
        rest = config.layers[self.periods * period :]
        self.tail = nnx.List([Block(config, layer, rngs=rngs) for layer in rest])
        self.norm = RMSNorm(d, eps=config.norm_eps)
        self.head = (
            None if config.tie_embeddings else weight(rngs, (d, v), ("embed", "vocab"), fan_in=d)
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float32[Array, "b t v"]:
        """Logits of the token after each token.

        Args:
            tokens: ids below the vocabulary size; any other gives NaN.
            positions: each token's absolute position; where they do not grow by one, another
                segment begins. By default 0, 1, …, t-1, and with `segment_ids` counted from each
                segment's start.
            segment_ids: tokens see only tokens of their own run of equal ids.
        """
        return self.outputs(tokens, positions=positions, segment_ids=segment_ids).logits

    def outputs(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Outputs:
        """Logits and what the routers did; arguments as for a plain call."""
        where = None
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        else:
            where = Where(positions, _runs(positions, segment_ids))
        x, _, _, routing = self._decode(tokens, describe(self.config, positions, where))
        return Outputs(self.logits(x), routing)

    def prefill(
        self, tokens: Int[Array, "b t"], counts: Int[Array, " b"] | None = None, *, context: int
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """A new cache for up to `context` tokens per row, holding each row's first `counts` tokens.

        Rows shorter than t are padded on the right with any token. Returns the final hidden states
        too; `logits` turns the ones that are wanted into logits.
        """
        return self._extend(tokens, self.empty_cache(tokens.shape[0], context), counts, fresh=True)

    def extend(
        self, tokens: Int[Array, "b t"], cache: Cache, counts: Int[Array, " b"] | None = None
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
        head = self.embed[...].T if self.head is None else self.head[...]
        return jnp.einsum(
            "...d,dv->...v",
            self.norm(x),
            head.astype(x.dtype),
            preferred_element_type=jnp.float32,
        )

    def _extend(
        self, tokens: Array, cache: Cache, counts: Array | None, *, fresh: bool
    ) -> tuple[Array, Cache]:
        b, t = tokens.shape
        counts = jnp.full((b,), t, jnp.int32) if counts is None else counts
        positions = cache.lengths[:, None] + jnp.arange(t, dtype=jnp.int32)
        step = Step(cache.lengths, counts, fresh)
        x, layers, tail, _ = self._decode(
            tokens, describe(self.config, positions), cache.layers, cache.tail, step
        )
        return x, Cache(layers, tail, cache.lengths + counts)

    def _decode(
        self,
        ids: Array,
        tokens: Tokens,
        layer_caches: tuple = (),
        tail_caches: tuple = (),
        step: Step | None = None,
    ) -> tuple[Array, tuple, tuple, Routing | None]:
        """Hidden states before the final norm, both kinds of caches, and every layer's routing."""
        # Compiled code cannot raise, so an id outside the vocabulary gives NaN, not a neighbour.
        ids = jnp.where(ids < 0, self.config.vocab_size, ids)
        x = self.embed[...].at[ids].get(mode="fill", fill_value=jnp.nan)
        x = x.astype(self.execution.dtype)
        x = constrain(x, "batch", "sequence", None)

        def period(x: Array, args: tuple) -> tuple[Array, tuple]:
            return _run(args[0], x, tokens, args[1], step)

        if self.execution.remat != "none":
            period = jax.checkpoint(period, policy=REMAT[self.execution.remat])
        layer_caches = layer_caches or (None,) * len(self.layers)
        tail_caches = tail_caches or (None,) * len(self.tail)
        routing: tuple = ()
        if self.periods:
            x, (layer_caches, routing) = jax.lax.scan(period, x, (tuple(self.layers), layer_caches))
        new, tail_routing = [], []
        for block, cache in zip(self.tail, tail_caches, strict=True):
            x, ((cache,), (routed,)) = period(x, ((block,), (cache,)))
            new.append(cache)
            tail_routing.append(routed)
        return x, layer_caches, tuple(new), _in_layer_order(routing, tail_routing)


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


def _run(
    blocks: tuple[Block, ...],
    x: Array,
    tokens: Tokens,
    caches: tuple[KeyValues | None, ...],
    step: Step | None,
) -> tuple[Array, tuple[tuple, tuple]]:
    """`blocks` one after the other; also their new caches and routings."""
    new, routings = [], []
    for block, cache in zip(blocks, caches, strict=True):
        x, cache, routing = block(x, tokens, cache, step)
        new.append(cache)
        routings.append(routing)
    return x, (tuple(new), tuple(routings))


def _in_layer_order(scanned: tuple, tail: list) -> Routing | None:
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


def unrolled(model: Llama) -> Llama:
    """The same model with every layer in `tail`; its scanned parameters are sliced, so copied.

    For decoding on CPU: there a scan copies each layer's weights at every step.
    """
    if not model.periods:
        return model
    blocks = [
        jax.tree.map(lambda x, i=i: x[i], block)
        for i in range(model.periods)
        for block in model.layers
    ]
    new: Llama = jax.tree.map(lambda x: x, model)
    new.periods = 0
    new.execution = dataclasses.replace(model.execution, scan=False)
    new.layers = nnx.List([])
    new.tail = nnx.List([*blocks, *new.tail])
    return new
