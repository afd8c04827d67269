"""Tokens to the shard that holds their expert and back: expert parallelism in bounded rounds.

Expert weights stay where they are. Every shard of the expert axis cuts its rows by destination and
exchanges a fixed number of them with every other one; what exceeds that number goes in further
rounds, as many as the most uneven pair of shards needs, so no row is ever dropped. When routing is
even, the first round is the only one and the loop over the rest ends before it begins; memory is
that of one round however uneven routing is.

The first round's products are kept for the backward pass, the others are formed again there.

Letters: see `models.layers`; m rows (tokens · experts per token), n shards of the expert axis,
r rows that one shard sends to another in a round.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l4jax import sharding
from l4jax.kernels.experts import grouped_swiglu

AXIS = "expert"
SLACK = 1.25
"""Rows in a round, relative to an even split: routing even but for chance needs one round."""
FEW = 32
"""Fewest rows in a round, unless there are not so many: rounds cost more than they carry."""

Weights = tuple[Array, Array, Array]


class Sorted(NamedTuple):
    """Rows by group: `order` are their numbers, sorted stably; `place` is where each row then lies.

    sizes: rows in each group. Rows of no group come last.
    """

    order: Int[Array, " m"]
    place: Int[Array, " m"]
    sizes: Int[Array, " e"]


def by_group(groups: Int[Array, " m"], count: int) -> Sorted:
    """Sorts rows by their group; `count` or more is none.

    A counting sort: a comparison sort of 10,000 numbers takes a TPU longer to compile than to run.
    """
    groups = jnp.minimum(groups, count)
    one_hot = (groups[:, None] == jnp.arange(count + 1)).astype(jnp.int32)
    upto = jnp.cumsum(one_hot, axis=0)
    sizes = upto[-1]
    first = jnp.cumsum(sizes) - sizes
    place = jnp.take_along_axis(first + upto - 1, groups[:, None], axis=1)[:, 0]
    rows = jnp.arange(groups.shape[0], dtype=jnp.int32)
    order = jnp.zeros_like(place).at[place].set(rows, unique_indices=True)
    return Sorted(order, place, sizes[:-1])


def through_experts(
    x: Float[Array, "m d"],
    weights: Weights,
    experts: Int[Array, " m"],
    num_experts: int,
    *,
    replicated: bool = False,
    axes: tuple[str, ...] = (),
) -> Float[Array, "m d"]:
    """Each row through its own expert: SwiGLU of `kernels.experts`; rows assigned to none give 0.

    Args:
        x: rows.
        weights: gate, up [e d f] and down [e f d] of this shard's experts.
        experts: the one of each row; `num_experts` for none.
        num_experts: of all shards.
        replicated: every shard of the expert axis has the same rows. Each does its own experts'
            share, and the results are added up.
        axes: mesh axes that cut the weights' d; see `sharding.apart`. All shards then get all rows.
    """
    if axes or replicated:
        return _everywhere(x, weights, experts, () if replicated else (AXIS,), axes)
    shards = sharding.size(AXIS)
    if shards == 1:
        return _own(x, weights, by_group(experts, num_experts))
    rows = _round_rows(x.shape[0], shards)
    to = by_group(experts, num_experts)
    return _exchanged(x, weights, _Trip(experts, to, _routes(to, rows)), rows)


def _round_rows(rows: int, shards: int) -> int:
    """Rows that a shard sends to another in a round."""
    even = math.ceil(SLACK * rows / shards)
    # Multiples of 8 keep rows whole in a TPU's registers.
    return min(rows, -(-max(even, FEW) // 8) * 8)


def _own(x: Array, weights: Weights, to: Sorted, axes: tuple[str, ...] = ()) -> Array:
    """Rows through experts that are all here: sorted, multiplied, put back."""
    y = grouped_swiglu(_take(x, to.order, to.place), *weights, to.sizes, axes=axes)
    return _take(y, to.place, to.order)


def _everywhere(
    x: Array, weights: Weights, experts: Array, others: tuple[str, ...], axes: tuple[str, ...]
) -> Array:
    """Rows of all shards along `others` and, in columns that cut d, along `axes`: each shard does
    its experts' share of them."""
    x, experts = (sharding.gather(rows, 0, *others) for rows in (x, experts))
    x, experts = sharding.exchange(x, 1, 0, *axes), sharding.gather(experts, 0, *axes)
    here = weights[0].shape[0]
    local = experts - sharding.index(AXIS) * here
    to = by_group(jnp.where(local < 0, here, local), here)
    y = sharding.exchange(_own(x, weights, to, axes), 0, 1, *axes)
    return sharding.scatter(y, 0, *others) if others else sharding.total(y, AXIS)


class _Routes(NamedTuple):
    """What both ends of an exchange know.

    first: where each destination's rows begin in the sorted order. there: how many there are.
    coming: rows from each shard to each expert here. rounds: that the most uneven pair needs.
    """

    first: Int[Array, " n"]
    there: Int[Array, " n"]
    coming: Int[Array, "n e"]
    rounds: Int[Array, ""]


def _routes(to: Sorted, rows: int) -> _Routes:
    shards = sharding.size(AXIS)
    sent = to.sizes.reshape(shards, -1)
    count = sent.sum(1)
    coming = sharding.exchange(sent, 0, 0, AXIS)
    most = jax.lax.pmax(count.max(), AXIS)
    return _Routes(jnp.cumsum(count) - count, count, coming, -(-most // rows))


class _Trip(NamedTuple):
    """Everything about an exchange but its rows and weights."""

    experts: Int[Array, " m"]
    to: Sorted
    routes: _Routes


def _round(x: Array, weights: Weights, trip: _Trip, number: Any, rows: int) -> Array:
    """One round: its rows sent, multiplied and sent back, each in its row's place, others 0."""
    experts, to, routes = trip
    m = x.shape[0]
    shards, here = routes.coming.shape
    done = number * rows
    # Slot j for shard s takes sorted row first[s] + done + j; a row knows its slot likewise.
    slot = done + jnp.arange(rows, dtype=jnp.int32)
    filled = slot < routes.there[:, None]
    taken = to.order[jnp.clip(routes.first[:, None] + slot, 0, m - 1)]
    row = jnp.where(filled, taken, m).reshape(-1)
    shard = jnp.minimum(experts // here, shards - 1)
    behind = to.place - routes.first[shard] - done
    goes = (behind >= 0) & (behind < rows) & (experts < shards * here)
    back = jnp.where(goes, shard * rows + behind, shards * rows)
    received = sharding.exchange(_take(x, row, back), 0, 0, AXIS)
    # Of each sender's slots, the first ones hold rows, sorted by expert.
    upto = jnp.cumsum(routes.coming, 1)
    expert = (slot[:, None] >= upto[:, None]).sum(-1).reshape(-1)
    y = _own(received, weights, by_group(expert, here))
    return _take(sharding.exchange(y, 0, 0, AXIS), back, row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchanged(x: Array, weights: Weights, trip: _Trip, rows: int) -> Array:
    """All rounds; see the module."""
    return _exchanged_forward(x, weights, trip, rows)[0]


def _exchanged_forward(
    x: Array, weights: Weights, trip: _Trip, rows: int
) -> tuple[Array, tuple[Any, ...]]:
    y, pull = jax.vjp(lambda x, weights: _round(x, weights, trip, 0, rows), x, weights)
    if rows < x.shape[0]:
        y = _further(trip, y, lambda number, y: y + _round(x, weights, trip, number, rows))
    return y, (x, weights, trip, pull)


def _exchanged_backward(rows: int, saved: tuple, d_y: Array) -> tuple[Any, ...]:
    x, weights, trip, pull = saved
    gradients = pull(d_y)
    if rows < x.shape[0]:

        def more(number: Array, gradients: Any) -> Any:
            again = jax.vjp(lambda x, w: _round(x, w, trip, number, rows), x, weights)[1]
            return jax.tree.map(jnp.add, gradients, again(d_y))

        gradients = _further(trip, gradients, more)
    return (*gradients, None)


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _further(trip: _Trip, start: Any, step: Any) -> Any:
    """The rounds after the first, if there are any."""
    with jax.named_scope("further_rounds"):
        return jax.lax.while_loop(
            lambda carry: carry[0] < trip.routes.rounds,
            lambda carry: (carry[0] + 1, step(*carry)),
            (jnp.int32(1), start),
        )[1]


@jax.custom_vjp
def _take(x: Float[Array, "m d"], index: Array, inverse: Array) -> Float[Array, "i d"]:
    """x[index], zeros where the index is past the end.

    Its gradient is a gather by `inverse`, which has for each row of x where it went, or past the
    end; plain indexing would scatter, one row after the other.
    """
    return x.at[index].get(mode="fill", fill_value=0)


_take.defvjp(
    lambda x, index, inverse: (_take(x, index, inverse), inverse),
    lambda inverse, d_y: (d_y.at[inverse].get(mode="fill", fill_value=0), None, None),
)
