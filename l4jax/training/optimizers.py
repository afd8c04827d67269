"""Optimizers, put together from Optax: gradient in, update out, for any part of the parameters.

Each one is: clip the gradient by its global norm, turn it into a direction, add decoupled weight
decay (Loshchilov & Hutter 2019), multiply by the learning rate. `with_rates` and `averaged` wrap
any of them. Parameters are meant by patterns on their names; see `l4jax.paths`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from l4jax import paths

Name = Literal["adamw", "muon", "adafactor", "lion"]
"""For a command line's own type."""
Rates = Mapping[str, float]

NORMS = ("*scale",)
"""Never shrunk: a norm's scale is recognised by its name, as stacked layers add dimensions."""
EMBEDDINGS = ("embed", "head")
"""To be named beside `NORMS` by who does not want them to decay."""
MATRICES = {
    **dict.fromkeys(("gate", "up", "down"), MuonDimensionNumbers(-2, -1)),
    **dict.fromkeys(("q", "k", "v"), MuonDimensionNumbers(-3, (-2, -1))),
    "o": MuonDimensionNumbers((-3, -2), -1),
}
"""Which dimensions of a weight are the matrix's rows (summed over) and columns. All others, layers
and experts, count matrices. Router, embedding and head are not here: they are no inner matrices
(Jordan et al. 2024, "Muon")."""
PER_HEAD = {
    **dict.fromkeys(("q", "k", "v"), MuonDimensionNumbers(-3, -1)),
    "o": MuonDimensionNumbers(-2, -1),
}
"""The same for heads that are matrices of their own."""
MUON_RMS = 0.2
"""Of an entry of Muon's update, as AdamW's is (Liu et al. 2025, "Muon is Scalable", §2.2): one
learning rate and one weight decay fit both."""


def make(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    moments: str = "float32",
    exempt: Sequence[str] = NORMS,
    rates: Rates | None = None,
    average: float = 0.0,
) -> optax.GradientTransformation:
    """The optimizer of this name, for a command line; see the functions below for the rest.

    Args:
        name: "adamw", "muon", "adafactor" or "lion".
        schedule: learning rate by step.
        weight_decay: share of a parameter, times the learning rate, that each step takes off.
        clip_norm: largest global norm of a gradient.
        moments: type that the state is kept in between steps.
        exempt: patterns of parameters that do not decay.
        rates: see `with_rates`.
        average: see `averaged`; 0 keeps no average.

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """
    if name not in get_args(Name):
        raise ValueError(f"optimizer {name!r} must be one of {', '.join(get_args(Name))}")
    makers: dict[str, Callable[..., optax.GradientTransformation]] = {
        "adamw": adamw,
        "muon": muon,
        "adafactor": adafactor,
        "lion": lion,
    }
    made = makers[name](
        schedule, weight_decay=weight_decay, clip_norm=clip_norm, moments=moments, exempt=exempt
    )
    if rates:
        made = with_rates(made, rates)
    return averaged(made, average) if average else made


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    moments: str = "float32",
    exempt: Sequence[str] = NORMS,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by global norm; norm scales do not decay.

    `moments` is the type that both moments are kept in between steps; the arithmetic is float32.
    """
    direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return _finished(direction, schedule, weight_decay, clip_norm, moments, exempt)


def lion(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    moments: str = "float32",
    exempt: Sequence[str] = NORMS,
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023): the sign of a momentum; half of AdamW's memory.

    It wants a learning rate 3 to 10 times smaller than AdamW's, and as much more weight decay.
    """
    direction = optax.scale_by_lion(b1=b1, b2=b2)
    return _finished(direction, schedule, weight_decay, clip_norm, moments, exempt)


def adafactor(
    schedule: optax.Schedule,
    *,
    min_size: int = 128,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    moments: str = "float32",
    exempt: Sequence[str] = NORMS,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018): second moments by row and column, hardly any memory.

    Without momentum and without learning rates relative to a parameter's size, so that AdamW's
    learning rate fits (as Zhai et al. 2021). Weights with two dimensions of at least `min_size`
    have factored moments; each layer and expert has its own. The update's root mean square is cut
    at 1, over all that is stacked in an array.
    """
    direction = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=min_size),
        optax.clip_by_block_rms(1.0),
    )
    return _finished(direction, schedule, weight_decay, clip_norm, moments, exempt)


def muon(
    schedule: optax.Schedule,
    *,
    beta: float = 0.95,
    per_head: bool = False,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    moments: str = "float32",
    exempt: Sequence[str] = NORMS,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): the momentum of each inner matrix, orthogonalized by itself.

    Every layer's and every expert's matrix is one; `q` is [d, n·h], or one matrix for each head
    with `per_head`. Updates are scaled by 0.2 · √(larger side), after which AdamW's learning rate
    and weight decay fit (Liu et al. 2025). Embedding, head, router, norms and whatever else has no
    line in `MATRICES` are AdamW's.
    """
    known = MATRICES | PER_HEAD if per_head else MATRICES

    def dimensions(params: Any) -> Any:
        return _by_name(lambda name, _: known[name.rpartition(".")[2]], params)

    def labels(params: Any) -> Any:
        def label(name: str, _: Any) -> str:
            return "matrix" if name.rpartition(".")[2] in known else "other"

        return _by_name(label, params)

    direction = optax.partition(
        {
            "matrix": optax.chain(
                scale_by_muon(beta=beta, weight_dimension_numbers=dimensions), _even(dimensions)
            ),
            "other": optax.scale_by_adam(b1=0.9, b2=0.95),
        },
        labels,
    )
    return _finished(direction, schedule, weight_decay, clip_norm, moments, exempt)


# --- Wrappers ------------------------------------------------------------------------------------
def with_rates(
    optimizer: optax.GradientTransformation, rates: Rates
) -> optax.GradientTransformation:
    """`optimizer` with the learning rates of some parameters multiplied.

    Weight decay follows the learning rate. Parameters whose rate is 0 are frozen: they have no
    state, and their gradients do not count when the others' are clipped. (What is frozen for a
    whole run should be left out of `trainer.Update`'s `trainable`, which saves its gradients too.)

    Args:
        optimizer: of all the others, too.
        rates: by pattern; the first one that fits a name counts.

    Raises:
        ValueError: a rate is negative; or, at the start, a pattern fits no parameter.
    """
    for pattern, rate in rates.items():
        if not rate >= 0:
            raise ValueError(f"rate {rate} of {pattern!r} must not be negative")

    def rate_of(name: str) -> float:
        return next((rate for pattern, rate in rates.items() if paths.fits(name, pattern)), 1.0)

    def label(name: str, _: Any) -> str:
        return "trained" if rate_of(name) else "frozen"

    if not all(rates.values()):
        optimizer = optax.partition(
            {"trained": optimizer, "frozen": optax.set_to_zero()},
            lambda params: _by_name(label, params),
        )

    def init(params: Any) -> Any:
        names = paths.names(params)
        if names:  # Optax also starts with a tree of none, to find out what a state is made of
            paths.chosen(rates, names)
        return optimizer.init(params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return _by_name(lambda name, x: x * rate_of(name), updates), state

    return optax.GradientTransformation(init, update)


def apart(
    optimizer: optax.GradientTransformation, parts: Sequence[str]
) -> optax.GradientTransformation:
    """`optimizer` for each part of the parameters, by first name, as if it were alone.

    What it computes over all parameters, such as the norm that it clips, is then each part's own.
    """

    def part(name: str, _: Any) -> str:
        # Optax also asks about a tree without names, to find out what a state is made of.
        return name.partition(".")[0] or parts[0]

    return optax.partition(dict.fromkeys(parts, optimizer), lambda params: _by_name(part, params))


class Averaged(NamedTuple):
    """The state of `averaged`: the wrapped optimizer's, and the average, float32."""

    inner: optax.OptState
    average: Any


def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`optimizer` that also keeps an exponential average of the parameters.

    average ← decay · average + (1 - decay) · parameters after each update, from the first
    parameters on. It is float32 whatever they are: a bfloat16 average could not move by less than
    one part in 256. `average_of` reads it; a DPO reference may be one.

    Raises:
        ValueError: the decay is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise ValueError(f"average {decay} must lie between 0 and 1, as 0.999 does")

    def init(params: Any) -> Averaged:
        # A true copy: a step gives up the parameters' memory and this one's.
        first = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return Averaged(optimizer.init(params), first)

    def update(gradients: Any, state: Averaged, params: Any = None) -> tuple[Any, Averaged]:
        updates, inner = optimizer.update(gradients, state.inner, params)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda old, x: old + (1 - decay) * (x.astype(jnp.float32) - old), state.average, new
        )
        return updates, Averaged(inner, average)

    return optax.GradientTransformation(init, update)


def average_of(state: optax.OptState) -> Any:
    """The averaged parameters in an optimizer's state, float32, in the tree that was trained.

    Raises:
        ValueError: the optimizer keeps none.
    """
    found = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Averaged))
        if isinstance(x, Averaged)
    ]
    if not found:
        raise ValueError("this optimizer keeps no average of the parameters; see `averaged`")
    return found[0].average


def stored_as(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner`, whose moments are kept in `dtype` and are float32 while it works.

    What belongs to no parameter, such as counts, stays as it is.
    """

    def cast(state: Any, kind: str) -> Any:
        return optax.tree.map_params(inner, lambda x: x.astype(kind), state)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


# --- Parts ---------------------------------------------------------------------------------------
def decaying(exempt: Sequence[str]) -> Callable[[Any], Any]:
    """For Optax's `mask`: False for vectors and for names that a pattern fits."""
    spared = paths.chosen(exempt)
    return lambda params: _by_name(lambda name, x: x.ndim > 1 and not spared(name), params)


def _finished(
    direction: optax.GradientTransformation,
    schedule: optax.Schedule,
    weight_decay: float,
    clip_norm: float,
    moments: str,
    exempt: Sequence[str],
) -> optax.GradientTransformation:
    """Clipping, a direction, decay and the learning rate."""
    if moments != "float32":
        direction = stored_as(direction, moments)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        direction,
        optax.add_decayed_weights(weight_decay, decaying(exempt)),
        optax.scale_by_learning_rate(schedule),
    )


def _even(dimensions: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Scales orthogonalized matrices so that their entries' root mean square is `MUON_RMS`.

    All singular values of a matrix with sides a ≥ b being 1, it is a^-½.
    """

    def scale(x: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
        sides = (math.prod(x.shape[i] for i in jax.tree.leaves(axes)) for axes in dims)
        return x * (MUON_RMS * math.sqrt(max(sides)))

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, dimensions(updates)))


def _by_name(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: function(paths.name(path), x), tree)
