"""Hyperparameters found on a small model, carried over to a large one, parameter by parameter.

Meta says of Llama 4 that "MetaP" sets per-layer learning rates and initial scales that transfer
across width, depth, batch size and training tokens, and gives no formula. These are ours:
CompleteP (Dey et al. 2025, Table 1, α = 1), which is μP (Yang et al. 2022, "Tensor Programs V",
Tables 3 and 8) with depth, for AdamW, with its ε (Everett et al. 2024, "Scaling Exponents Across
Parameterizations and Optimizers") and with experts (a router is an output: Małaśnicki et al. 2025,
"μ-Parametrization for Mixture of Experts").

Numbers are tuned on a base model; the table multiplies them. With each m a size over the base's: in
and out, a weight's own fan-in and fan-out; d, the width; L, the layers:

| parameter                | initial scale ×    | learning rate × | ε ×            |
|--------------------------|--------------------|-----------------|----------------|
| embed                    | 1                  | 1               | 1 / m_d        |
| q k v, gate up           | m_in^-½ †          | 1 / m_in        | 1 / (m_out m_L) |
| o, down                  | m_in^-½ † / m_L    | 1 / (m_in m_L)  | 1 / m_d        |
| router                   | 1 / m_d            | 1 / m_d         | 1 / m_L        |
| head                     | 1 / m_d            | 1 / m_d         | 1              |
| norms of layers          | 1                  | 1               | 1 / (m_d m_L)  |
| last norm                | 1                  | 1               | 1 / m_d        |
| last norm of a tied head | 1 / m_d            | 1 / m_d         | 1              |

† which the model's own initialization does: `Multiplier.init` is relative to that. Experts and the
shared expert are as a dense layer. Weight decay is divided by what the learning rate is multiplied
by, so that a step takes the same share off every weight, whatever the size.

**No multipliers in the model.** μP and CompleteP multiply activations: logits by 1 / m_d, and what
a layer adds by 1 / m_L. A weight W behind a factor a is a weight V = a·W without one. V's gradient
is W's divided by a, which Adam's quotient does not see if ε is divided by a too. So V moves as a·W
does when its learning rate is multiplied by a; and it shrinks alike when its decay, which comes
times the learning rate, is divided by a. The factor of a layer's output thus goes into `o` and
`down`, that of the logits into `head`. A tied head is the embedding too, so there it goes into the
last norm's scale, which nothing else reads.

**Why.** Each step an entry of an inner weight moves by the learning rate η, in the direction of its
input, so the output moves by η · m_in: hence 1 / m_in. What layers add sums up over m_L of them:
hence 1 / m_L. Gradients shrink, with 1 / m_out in an inner weight and 1 / m_L inside a layer; an ε
that did not would turn Adam into momentum.

Batch and tokens: see `transfer`. What the theory does not carry over must be equal: head width (the
softmax divides by √h, μP by h; Llama has more heads instead), experts, pattern, tied head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from l4jax import paths
from l4jax.config import FeedForwardKind, TextConfig
from l4jax.inference.decoding import unrolled
from l4jax.models.attention import describe
from l4jax.models.llama4 import How, Llama, lookup
from l4jax.models.moe import Tiling
from l4jax.training.optimizers import NORMS, decaying, stored_as
from l4jax.training.trainer import Training


class Multiplier(NamedTuple):
    """What a parameter's initial values, learning rate, weight decay and ε are multiplied by."""

    init: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


Table = Mapping[str, Multiplier]


class Adam(NamedTuple):
    """AdamW's numbers; `rate` multiplies the schedule."""

    rate: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


class Run(NamedTuple):
    """How much a run trains: tokens of a step, and of all steps."""

    batch: int
    tokens: int


def multipliers(config: TextConfig, base: TextConfig) -> dict[str, Multiplier]:
    """By pattern on names, what turns the base model's numbers into `config`'s.

    Raises:
        ValueError: the two differ in what does not carry over.
    """
    _check(config, base)
    depth, width = config.num_layers / base.num_layers, config.embed_dim / base.embed_dim
    query, key = (
        _heads(config, name) / _heads(base, name) for name in ("num_heads", "num_kv_heads")
    )

    def entering(out: float) -> Multiplier:
        return _scaled(1.0, 1 / width, 1 / (out * depth))

    def leaving(fan_in: float) -> Multiplier:
        return _scaled(1 / depth, 1 / (fan_in * depth), 1 / width)

    def feed_forward(hidden: float) -> dict[str, Multiplier]:
        inner = entering(hidden)
        return {"gate": inner, "up": inner, "down": leaving(hidden)}

    feeds: dict[FeedForwardKind, dict[str, Multiplier]] = {}
    feeds["dense"] = feed_forward(config.mlp_dim / base.mlp_dim)
    if config.moe is not None and base.moe is not None:
        feeds["moe"] = {"router": _scaled(width**-0.5, 1 / width, 1 / depth)}
        feeds["moe"] |= feed_forward(config.moe.mlp_dim / base.moe.mlp_dim)
        if config.moe.shared_mlp_dim:
            shared = feed_forward(config.moe.shared_mlp_dim / base.moe.shared_mlp_dim)
            feeds["moe"] |= {f"shared.{name}": x for name, x in shared.items()}
    tied = config.tie_embeddings
    table = {
        # The model makes a tied table small, for the head's sake; the base's scale is what stays.
        "embed": _scaled(width**0.5 if tied else 1.0, 1.0, 1 / width),
        "*_norm.scale": Multiplier(eps=1 / (width * depth)),
        "norm.scale": Multiplier(1 / width, 1 / width) if tied else Multiplier(eps=1 / width),
        "*.attention.q": entering(query),
        "*.attention.[kv]": entering(key),
        "*.attention.o": leaving(query),
    }
    if not tied:
        table["head"] = _scaled(width**-0.5, 1 / width, 1.0)
    for place, kind in _places(config).items():
        table |= {f"{place}.ffn.{name}": x for name, x in feeds[kind].items()}
    return table


def init(model: Llama, base: TextConfig) -> Llama:
    """The model with its initial parameters rescaled; the base model itself stays as it is.

    Parameters are made in place on a mesh by
    `sharding.create(lambda: metap.init(Llama(config, rngs=nnx.Rngs(0)), base))`.
    """
    table = multipliers(model.config, base)
    graph, state = nnx.split(model)
    params = _by_name(lambda name, x: x * of(table, name).init, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def transfer(adam: Adam, run: Run, base: Run) -> Adam:
    """AdamW's numbers for another batch size and another number of tokens.

    With κ = (batch / base's) / (tokens / base's), which is base's steps over these: learning rate
    and weight decay times √κ, 1 - β times κ, ε times √(base's batch / batch). For the batch alone
    this is the square-root rule (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive
    Gradient Algorithms"): the gradient's noise, the same after as many tokens, averages out alike.
    More tokens prolong the same noisy path (Mlodozeniec et al. 2025, "Completed Hyperparameter
    Transfer"), and steps · learning rate · decay, how much of the start is forgotten, stays.

    Raises:
        ValueError: a number is not positive, or so few steps are left that a β would be negative.
    """
    for name, value in [*run._asdict().items(), *base._asdict().items()]:
        if not value > 0:
            raise ValueError(f"{name} {value} must be positive")
    larger = run.batch / base.batch
    kappa = larger * base.tokens / run.tokens
    b1, b2 = (1 - kappa * (1 - b) for b in (adam.b1, adam.b2))
    if min(b1, b2) < 0:
        raise ValueError(
            f"{run} has 1/{kappa:.3g} of the steps of {base}, so a β would be {min(b1, b2):.3g}; "
            f"at most 1/{1 / (1 - min(adam.b1, adam.b2)):.3g} of them will do"
        )
    return Adam(
        rate=adam.rate * kappa**0.5,
        b1=b1,
        b2=b2,
        eps=adam.eps * larger**-0.5,
        weight_decay=adam.weight_decay * kappa**0.5,
    )


def optimizer(
    schedule: optax.Schedule,
    table: Table,
    *,
    adam: Adam = Adam(),
    clip_norm: float = 1.0,
    moments: str = "float32",
    exempt: Sequence[str] = NORMS,
) -> optax.GradientTransformation:
    """AdamW with each parameter's own learning rate, decay and ε.

    Args:
        schedule: the base model's learning rate by step.
        table: from `multipliers`; empty for AdamW as it is (standard parameterization).
        adam: for this run; see `transfer`.
        clip_norm: largest global norm of a gradient. Norms grow with the model; Adam's quotient
            makes that count only where gradients jump.
        moments: type that both moments are kept in between steps.
        exempt: patterns of parameters that do not decay.
    """

    def apart(gradients: Any, _: Any) -> Any:
        """Adam of g / c with ε is Adam of g with c · ε."""
        return _by_name(lambda name, g: g / of(table, name).eps, gradients)

    def moved(directions: Any, params: Any) -> Any:
        def one(path: Any, direction: Array, param: Array, decays: bool) -> Array:
            m = of(table, paths.name(path))
            shrink = adam.weight_decay * m.decay if decays else 0.0
            return m.rate * (direction + shrink * param)

        masks = decaying(exempt)(params)
        return jax.tree_util.tree_map_with_path(one, directions, params, masks)

    direction = optax.scale_by_adam(adam.b1, adam.b2, adam.eps)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.stateless(apart),
        direction if moments == "float32" else stored_as(direction, moments),
        optax.stateless(moved),
        optax.scale_by_learning_rate(lambda step: adam.rate * schedule(step)),
    )


def of(table: Table, name: str) -> Multiplier:
    """A parameter's multipliers; an empty table has none for any.

    Raises:
        ValueError: no pattern fits.
    """
    if not table:
        return Multiplier()
    for pattern, found in table.items():
        if paths.fits(name, pattern):
            return found
    raise ValueError(f"parameter {name!r}: no rule; there are {', '.join(table)}")


# --- Coordinate check ----------------------------------------------------------------------------
def coordinate_check(
    trainings: Iterable[Training], batches: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, float]]:
    """By width, how far activations moved after one update for each batch.

    Root mean square of the change of the embeddings, of the residual stream behind each layer, and
    of the logits, on the first batch's tokens (Yang et al. 2022, appendix D.1). Where the
    parameterization is right, it does not depend on the width.
    """
    found: dict[int, dict[str, float]] = {}
    tokens = jnp.asarray(batches[0]["tokens"])
    for training in trainings:
        before = coordinates(training.model, tokens)
        for _ in training.run(batches, len(batches)):
            pass
        after = coordinates(training.model, tokens)
        found[training.model.config.embed_dim] = {
            name: float(jnp.sqrt(jnp.mean(jnp.square(after[name] - before[name]))))
            for name in before
        }
    return found


@jax.jit
def coordinates(model: Llama, tokens: Int[Array, "b t"]) -> dict[str, Float[Array, "b t _"]]:
    """Activations by name: `embed`, `layer 0`, …, `logits`."""
    flat, config = unrolled(model), model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    where = describe(config, positions)
    x = lookup(model.embed, tokens, config.vocab_size, model.execution.dtype)
    made = {"embed": x}
    for number, block in enumerate(flat.tail):
        x, _, _ = block(x, where, None, How(Tiling()))
        made[f"layer {number}"] = x
    return made | {"logits": model.logits(x)}


def growth(check: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """By activation, the power of the width that its change grows with: 0 is flat."""
    widths = np.log(list(check))
    names = next(iter(check.values()))
    return {
        name: float(np.polyfit(widths, np.log([x[name] for x in check.values()]), 1)[0])
        for name in names
    }


# --- Parts ---------------------------------------------------------------------------------------
def _scaled(init: float, rate: float, eps: float) -> Multiplier:
    return Multiplier(init, rate, 1 / rate, eps)


def _heads(config: TextConfig, kind: str) -> int:
    number: int = getattr(config.attention, kind)
    return number * config.attention.head_dim


def _places(config: TextConfig) -> dict[str, FeedForwardKind]:
    """Patterns on the names of layers, and which kind of feed-forward those have."""
    kinds = [layer.ffn for layer in config.pattern]
    if len(set(kinds)) == 1:
        return {"*": kinds[0]}
    # What is not scanned begins with a whole period, or is all.
    tail = {f"tail.{i}": layer.ffn for i, layer in enumerate(config.layers)}
    return {f"layers.{i}": kind for i, kind in enumerate(kinds)} | tail


def _check(config: TextConfig, base: TextConfig) -> None:
    def kept(config: TextConfig) -> dict[str, Any]:
        a, moe = config.attention, config.moe
        return {
            "head_dim": a.head_dim,
            "qk_norm": a.qk_norm,
            "tie_embeddings": config.tie_embeddings,
            "pattern": [tuple(layer) for layer in config.pattern],
            "num_experts": moe and moe.num_experts,
            "experts_per_token": moe and moe.experts_per_token,
            "shared expert": moe and moe.shared_mlp_dim > 0,
        }

    there = kept(base)
    for name, value in kept(config).items():
        if value != there[name]:
            raise ValueError(
                f"{name} {value} differs from the base model's {there[name]}, and numbers do not "
                "carry over from one to the other"
            )


def _by_name(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: function(paths.name(path), x), tree)
