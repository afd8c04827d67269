"""What a client does in a round: steps of any Optax optimizer on its own examples.

A loss is `(params, batch, key) → number`, params any tree of arrays. A batch has the pool's arrays
by name, [b …], and "mask", Float[b]: 1 for an example, 0 for what only fills the last batch up.
`mean` leaves the latter out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l4jax import paths

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], jax.Array]
Rate = float | Callable[[Any], Any]
"""A learning rate, or one by the number of the round."""


def mean(values: jax.Array, batch: Batch) -> jax.Array:
    """The mean over a batch's examples of values [b]; 0 where there are none."""
    return jnp.sum(values * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), 1)


class Client(NamedTuple):
    """One client in a round; with a leading axis, several.

    id: its number. rows, size: its examples, see `clients.Data`. steps: to be done, 0 if it never
    answers. alive: whether it does. state: what it keeps between rounds.
    """

    id: jax.Array
    rows: jax.Array
    size: jax.Array
    steps: jax.Array
    alive: jax.Array
    state: Any


class Trained(NamedTuple):
    """What a client ends with. params: those that are trained. loss: mean over its steps."""

    params: Any
    optimizer: Any
    loss: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """A client's training."""

    loss: Loss
    rate: Rate
    """Learning rate, given to `optimizer`."""
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd
    """Makes an optimizer of a learning rate."""
    batch: int | None = None
    """Examples of a step; None for all that a client has."""
    epochs: int = 1
    """Passes over its examples."""
    draws: int | None = None
    """Steps of a round on rows drawn at random, with replacement, instead of passes: as many for
    every client, whatever it has."""
    shuffle: bool = True
    """Whether each pass has an order of its own; else the order is that of the rows."""
    trained: Callable[[str], bool] | None = None
    """Which parameters are trained, and sent, by their dotted names (`paths`); all by default."""
    proximal: float = 0.0
    """μ of FedProx: the loss has μ/2 ‖w − w at the round's start‖² added (Li et al. 2020, §3)."""
    keep: bool = False
    """Whether the optimizer's state lives on between rounds; else each begins with a new one."""

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1 or self.epochs < 1:
            raise ValueError(f"batch {self.batch} and epochs {self.epochs} must be at least 1")
        if self.draws is not None and (self.draws < 1 or self.batch is None):
            raise ValueError(f"draws {self.draws} must be at least 1, each of a batch that is set")
        if self.draws is not None and (self.epochs != 1 or not self.shuffle):
            raise ValueError("draws take the place of passes: set neither epochs nor shuffle")
        if not self.proximal >= 0:
            raise ValueError(f"proximal {self.proximal} must not be negative")

    def rate_at(self, number: Any) -> Any:
        """The learning rate of a round."""
        return self.rate(number) if callable(self.rate) else self.rate

    def steps(self, size: jax.Array) -> jax.Array:
        """Steps of a round for clients of these sizes."""
        if self.draws is not None:
            return jnp.full_like(size, self.draws)
        batch = size if self.batch is None else self.batch
        return self.epochs * -(-size // batch)

    def parts(self, params: Any) -> tuple[Any, Any]:
        """Trained and fixed parameters, each in the whole tree with None for the others.

        Raises:
            ValueError: nothing is trained.
        """
        if self.trained is None:
            return params, jax.tree.map(lambda _: None, params)
        names, (leaves, tree) = paths.names(params), jax.tree.flatten(params)
        moving = [x if self.trained(name) else None for name, x in zip(names, leaves, strict=True)]
        if all(x is None for x in moving):
            raise ValueError(f"none of the parameters {', '.join(names[:6])} … is trained")
        fixed = [x if y is None else None for x, y in zip(leaves, moving, strict=True)]
        return jax.tree.unflatten(tree, moving), jax.tree.unflatten(tree, fixed)

    def order(self, client: Client, key: jax.Array) -> jax.Array:
        """Places in `client.rows` by epoch, Int[epochs n], its own rows in front."""
        places = jnp.arange(client.rows.shape[0])
        if not self.shuffle:
            return jnp.tile(places, (self.epochs, 1))
        keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(jnp.arange(self.epochs))
        draws = jax.vmap(lambda k: jax.random.uniform(k, places.shape))(keys)
        return jnp.argsort(jnp.where(places < client.size, draws, 2.0), axis=1)

    def train(
        self,
        start: Any,
        client: Client,
        pool: dict[str, jax.Array],
        *,
        key: jax.Array,
        rate: Any,
        bound: jax.Array,
        optimizer: Any = None,
        correction: Any = None,
    ) -> Trained:
        """Trains on a client's examples.

        Args:
            start: the round's parameters, of which `parts` says what changes.
            client: who.
            pool: everybody's examples.
            key: of this client in this round.
            rate: learning rate.
            bound: steps to go through; those from `client.steps` on change nothing.
            optimizer: its state; a new one by default.
            correction: tree to be added to every gradient (SCAFFOLD).
        """
        rule = self.optimizer(rate)
        order_key, loss_key = jax.random.split(key)
        moving, fixed = self.parts(start)
        taken = self._taken(client, order_key)

        def of(moving: Any, batch: Batch, key: jax.Array) -> jax.Array:
            return self.loss(joined(moving, fixed), batch, key)

        def step(t: jax.Array, now: Trained) -> Trained:
            places, mask = taken(t)
            batch = {name: x[client.rows[places]] for name, x in pool.items()}
            batch["mask"] = mask.astype(jnp.float32)
            key = jax.random.fold_in(loss_key, t)
            loss, gradient = jax.value_and_grad(of)(now.params, batch, key)
            if self.proximal:
                gradient = jax.tree.map(
                    lambda g, w, w0: g + self.proximal * (w - w0), gradient, now.params, moving
                )
            if correction is not None:
                gradient = jax.tree.map(jnp.add, gradient, correction)
            updates, state = rule.update(gradient, now.optimizer, now.params)
            after = Trained(optax.apply_updates(now.params, updates), state, now.loss + loss)
            return choose(t < client.steps, after, now)

        state = rule.init(moving) if optimizer is None else optimizer
        begun = Trained(moving, state, jnp.zeros(()))
        done = jax.lax.fori_loop(0, bound, step, begun)
        return done._replace(loss=done.loss / jnp.maximum(client.steps, 1))

    def _taken(
        self, client: Client, key: jax.Array
    ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        """By step: places in `client.rows`, Int[b], and which of them count, Bool[b]."""
        width = client.rows.shape[0]
        if self.draws is not None:
            assert self.batch is not None
            count, most = self.batch, jnp.maximum(client.size, 1)

            def drawn(t: jax.Array) -> tuple[jax.Array, jax.Array]:
                places = jax.random.randint(jax.random.fold_in(key, t), (count,), 0, most)
                return places, jnp.ones(count, bool)

            return drawn
        count = width if self.batch is None else min(self.batch, width)
        order = jnp.pad(self.order(client, key), ((0, 0), (0, -width % count)))
        per_epoch = jnp.maximum(-(-client.size // count), 1)

        def passing(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            epoch, place = t // per_epoch, t % per_epoch * count
            places = jax.lax.dynamic_slice(order, (epoch, place), (1, count))[0]
            return places, place + jnp.arange(count) < client.size

        return passing


def joined(trained: Any, fixed: Any) -> Any:
    """The inverse of `Local.parts`."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, trained, fixed, is_leaf=lambda x: x is None
    )


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees, by a single truth value."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
