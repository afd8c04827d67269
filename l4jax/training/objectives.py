"""What is minimised: pure functions (model, batch) → (loss, metrics).

A batch has `tokens` [b t], and may have `segment_ids` (from 1 in each row, 0 is padding) with
`positions`, and a `loss_mask` of the tokens that are to be predicted; without it all are. The first
token of a segment never is. Images come as `tiles` [m c y x] and `places` [b t]; see
`models.multimodal.Images`. No objective ever holds the logits of all its tokens.

Letters: see `models.layers`; here s is segments in a row, and k what a teacher says of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import log_sigmoid
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Num

from l4jax import sharding
from l4jax.kernels import cross_entropy as kernel
from l4jax.models.llama4 import Llama
from l4jax.models.moe import Routing
from l4jax.models.multimodal import Images
from l4jax.training.rewards import RewardModel

Batch = Mapping[str, Any]
Metrics = dict[str, Array]
"""Has at least `loss`, what the objective is named after, and `count`, how many things (tokens,
pairs) that is the mean of: evaluation and accumulated gradients weigh batches by it."""
Objective = Callable[[Any, Batch], tuple[Float32[Array, ""], Metrics]]
Reference = Callable[[Any, Batch], Float32[Array, "b s"]]
"""What a reference model gives each segment: `segment_log_probs` of some model."""

LEAST = 1e-6
"""Least probability that is left to all that a teacher does not list."""


# --- Next tokens ---------------------------------------------------------------------------------
def next_token(*, balance: float = 0.0, z_loss: float = 0.0) -> Objective:
    """Mean cross-entropy, in nats, of each token given those before it in its segment.

    With a `loss_mask` this is supervised fine-tuning. The metric `loss` is without the other terms.

    Args:
        balance: weight of the routers' load-balance term (see `models.moe.Routing`); 0 leaves the
            loss as it is, 0.01 keeps experts in use when training from scratch.
        z_loss: weight of the mean squared log-sum-exp of the logits; PaLM has 1e-4.
    """

    def objective(model: Llama, batch: Batch) -> tuple[Float32[Array, ""], Metrics]:
        found = hidden_states(model, batch)
        return next_token_after(model, batch, *found, balance=balance, z_loss=z_loss)

    return objective


def next_token_after(
    model: Llama,
    batch: Batch,
    hidden: Float[Array, "b t d"],
    routing: Routing | None,
    *,
    balance: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float32[Array, ""], Metrics]:
    """`next_token` of hidden states that are there already."""
    labels, counted = targets(batch)
    count = counted.sum()
    weights = counted / jnp.maximum(count, 1).astype(jnp.float32)
    loss, penalty = cross_entropy(model, hidden, labels, weights, z_loss)
    metrics = {"loss": loss, "count": count}
    if penalty is not None:
        metrics |= {"loss": loss - penalty, "z_loss": penalty}
    return _with_routing(loss, metrics, routing, balance)


def targets(batch: Batch) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """The token after each token, and whether it is one to predict."""
    tokens, segments, mask = (batch.get(key) for key in ("tokens", "segment_ids", "loss_mask"))
    assert tokens is not None
    last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
    counted = jnp.broadcast_to(~last, tokens.shape)
    if segments is not None:
        counted &= (jnp.roll(segments, -1, axis=1) == segments) & (segments > 0)
    if mask is not None:
        counted &= jnp.roll(mask, -1, axis=1)
    return jnp.roll(tokens, -1, axis=1), counted


# --- Preferences ---------------------------------------------------------------------------------
Preference = Literal["sigmoid", "robust", "ipo", "hinge"]
PREFERENCES: dict[str, Callable[[Array, float, float], Array]] = {
    "sigmoid": lambda h, beta, e: (
        -(1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h)  # e: cDPO, Mitchell 2023
    ),
    "robust": lambda h, beta, e: (
        (e * log_sigmoid(-beta * h) - (1 - e) * log_sigmoid(beta * h)) / (1 - 2 * e)
    ),
    "ipo": lambda h, beta, _: jnp.square(h - 1 / (2 * beta)),
    "hinge": lambda h, beta, _: jax.nn.relu(1 - beta * h),
}
"""Losses of h, how much more a model prefers the chosen answer than its reference does. sigmoid:
Rafailov et al. 2023, eq. 7. robust: Chowdhury et al. 2024, eq. 12. ipo: Azar et al. 2023, eq. 17.
hinge: SLiC, Zhao et al. 2023, as DPO's implementations have it."""


def dpo(
    beta: float = 0.1,
    *,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll: float = 0.2,
    length_normalized: bool = False,
    reference: Reference | None = None,
    reference_free: bool = False,
    balance: float = 0.0,
) -> Objective:
    """Direct preference optimization; its defaults are Llama 3's (Dubey et al. 2024, §4.1.4).

    Pair k of a row is its segments 2k+1, chosen, and 2k+2, rejected. A pair counts if both have a
    token to predict. Llama 3 leaves tokens that end a turn out of both sides, as
    `data.conversations.Preferences` can. The metrics are means over pairs; a reward is
    β · (log π - log π_ref), of which the loss compares two, and `accuracy` says how often the
    chosen one is larger.

    Args:
        beta: how far the model may go from its reference: the less, the further.
        kind: see `PREFERENCES`.
        label_smoothing: the share of pairs whose labels are taken to be wrong, below ½.
        nll: weight of the chosen answer's mean cross-entropy, a mean over its tokens, then over
            pairs (Pang et al. 2024, eq. 1); 0.2 in Llama 3.
        length_normalized: whether rewards are means over an answer's tokens, not sums. IPO's
            authors mean it so, says TRL.
        reference: computes log π_ref [b s], for any s that is at least a row's segments; by default
            it is the batch's `reference`. Another model belongs into the batches, by
            `teacher.reference`; this is for what the model itself knows, such as its base without
            adapters.
        reference_free: whether log π_ref is 0.
        balance: as in `next_token`.

    Raises:
        ValueError: an argument is impossible; or, when it is called, there is no reference.
    """
    _check_preference(kind, beta, label_smoothing)
    if reference_free and reference is not None:
        raise ValueError("a reference is given to a loss that is reference_free; leave one out")

    def objective(model: Llama, batch: Batch) -> tuple[Float32[Array, ""], Metrics]:
        base = None
        if reference is not None:
            base = jax.lax.stop_gradient(reference(model, batch))
        elif not reference_free:
            base = _given_reference(batch)
        segments = None if base is None else base.shape[1]
        log_probs, lengths, routing = _segments(model, batch, segments)
        ratios = log_probs if base is None else log_probs - base
        if length_normalized:
            ratios /= jnp.maximum(lengths, 1)
        valid = jnp.all(_pairs(lengths) != 0, axis=-1)
        count = valid.sum()

        def mean(x: Array) -> Array:
            return jnp.where(valid, x, 0).sum() / jnp.maximum(count, 1)

        # Where there is no pair, a reference may be anything.
        ratios = jnp.where(valid[..., None], _pairs(ratios), 0)
        preferred = ratios[..., 0] - ratios[..., 1]
        loss = mean(PREFERENCES[kind](preferred, beta, label_smoothing))
        mean_nll = mean(_pairs(-log_probs / jnp.maximum(lengths, 1))[..., 0])
        metrics = {
            "loss": loss,
            "count": count,
            "nll": mean_nll,
            "accuracy": mean(preferred > 0),
            "margin": beta * mean(preferred),
        }
        for i, side in enumerate(("chosen", "rejected")):
            metrics[f"{side}_reward"] = beta * mean(ratios[..., i])
            metrics[f"{side}_log_prob"] = mean(_pairs(log_probs)[..., i])
        return _with_routing(loss + nll * mean_nll, metrics, routing, balance)

    return objective


def _check_preference(kind: str, beta: float, label_smoothing: float) -> None:
    if kind not in PREFERENCES:
        raise ValueError(
            f"preference loss {kind!r} is unknown; use one of {', '.join(PREFERENCES)}"
        )
    if not beta > 0:
        raise ValueError(f"beta {beta} must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing} must be at least 0 and below 0.5")
    if label_smoothing and kind in ("ipo", "hinge"):
        raise ValueError(f"label_smoothing {label_smoothing} has no meaning for {kind!r}; leave it")


def segment_log_probs(
    model: Llama, batch: Batch, *, segments: int | None = None
) -> Float32[Array, "b s"]:
    """The summed log-probability of what is to be predicted in each segment; 0 of absent ones.

    Args:
        model: any.
        batch: see the module.
        segments: s, an upper bound; by default that of the batch's `reference`, or else a row's
            length. A row that has more is NaN, as compiled code cannot raise.
    """
    return _segments(model, batch, segments)[0]


def _segments(
    model: Llama, batch: Batch, segments: int | None = None
) -> tuple[Float32[Array, "b s"], Float32[Array, "b s"], Routing | None]:
    """Log-probabilities, tokens to predict, and routing."""
    hidden, routing = hidden_states(model, batch)
    labels, counted = targets(batch)
    log_probs, _ = head_log_probs(model, hidden, labels)
    if segments is None:
        segments = batch["reference" if "reference" in batch else "tokens"].shape[1]
    ids = jnp.asarray(batch["segment_ids"])
    summed = _sums(jnp.where(counted, log_probs, 0), ids, segments)
    return summed, _sums(counted.astype(jnp.float32), ids, segments), routing


def _sums(
    x: Float32[Array, "b t"], segment_ids: Int[Array, "b t"], segments: int
) -> Float32[Array, "b s"]:
    """Each segment's sum; NaN in rows of more segments."""

    def row(x: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(x, ids, segments + 1)[1:]

    known = jnp.max(segment_ids, axis=1, keepdims=True) <= segments
    return jnp.where(known, jax.vmap(row)(x, segment_ids), jnp.nan)


def _pairs(x: Num[Array, "b s"]) -> Num[Array, "b pairs 2"]:
    """Chosen and rejected; a last segment alone gets a neighbour of zero."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)))
    return x.reshape(len(x), -1, 2)


def _given_reference(batch: Batch) -> Array:
    if "reference" not in batch:
        raise ValueError(
            "the batch has no 'reference': add one by teacher.reference, pass reference=, or set "
            "reference_free"
        )
    return batch["reference"]


# --- Distillation --------------------------------------------------------------------------------
def distill(
    soft: float = 0.5, *, temperature: float = 1.0, balance: float = 0.0, z_loss: float = 0.0
) -> Objective:
    """soft · T² · KL(teacher ‖ student) + (1 - soft) · cross-entropy, means over tokens.

    The teacher's k most likely next tokens come with the batch as `teacher_ids` and
    `teacher_log_probs` [b t k]; see `divergence` and `teacher`. T² keeps the gradient's size over
    temperatures (Hinton et al. 2015, §2). Llama 4 changes the weight of soft and hard targets
    through training; a scalar `soft_weight` in the batch takes the place of `soft`.

    Args:
        soft: weight of the teacher, from 0 to 1, in batches without `soft_weight`.
        temperature: T; above 1, unlikely tokens count for more.
        balance: as in `next_token`, and z_loss as well.
        z_loss: see there.

    Raises:
        ValueError: an argument is impossible.
    """
    if not 0 <= soft <= 1:
        raise ValueError(f"soft {soft} must be at least 0 and at most 1")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")

    def objective(model: Llama, batch: Batch) -> tuple[Float32[Array, ""], Metrics]:
        hidden, routing = hidden_states(model, batch)
        labels, counted = targets(batch)
        ids = jnp.concatenate([labels[..., None], batch["teacher_ids"]], axis=-1)
        log_probs, lse = head_log_probs(model, hidden, ids)
        count = counted.sum()

        def mean(x: Array) -> Array:
            return jnp.where(counted, x, 0).sum() / jnp.maximum(count, 1)

        apart = divergence(jnp.asarray(batch["teacher_log_probs"]), log_probs[..., 1:], temperature)
        weight = jnp.asarray(batch.get("soft_weight", soft), jnp.float32)
        parts = {"soft": temperature**2 * mean(apart), "hard": mean(-log_probs[..., 0])}
        loss = weight * parts["soft"] + (1 - weight) * parts["hard"]
        metrics = {"loss": loss, "count": count, **parts, "soft_weight": weight}
        if z_loss:
            metrics["z_loss"] = z_loss * mean(jnp.square(lse))
            loss += metrics["z_loss"]
        return _with_routing(loss, metrics, routing, balance)

    return objective


def divergence(
    teacher: Float32[Array, "*b k"], student: Float32[Array, "*b k"], temperature: float
) -> Float32[Array, "*b"]:
    """KL(teacher ‖ student), in nats, over k tokens and one more outcome: any other token.

    So it is a true divergence: never negative, and 0 only where both agree. To leave the other
    tokens out would let the student take their probability away. The temperature is applied to
    these k + 1 outcomes, as nobody knows the teacher's other logits.

    Args:
        teacher: log-probabilities of the k tokens, at temperature 1.
        student: of the same tokens.
        temperature: both distributions are raised to 1 / temperature and normalised.
    """

    def whole(x: Array) -> Array:
        rest = 1 - jnp.exp(x).sum(axis=-1, keepdims=True)
        outcomes = jnp.concatenate([x, jnp.log(jnp.maximum(rest, LEAST))], axis=-1)
        return jax.nn.log_softmax(outcomes / temperature, axis=-1)

    q, p = whole(teacher), whole(student)
    return (jnp.exp(q) * (q - p)).sum(axis=-1)


def soft_weight(step: int, steps: int, *, first: float = 1.0, last: float = 0.0) -> np.ndarray:
    """A batch's `soft_weight` at a step: half a cosine from first to last.

    Llama 4's report says that the weights change through training, but not how. This is ours: the
    teacher's whole distributions teach most where the student knows least, and the data have the
    last word.
    """
    done = min(max(step / max(steps - 1, 1), 0.0), 1.0)
    return np.asarray(last + (first - last) * (1 + np.cos(np.pi * done)) / 2, np.float32)


# --- Rewards -------------------------------------------------------------------------------------
def ranking(*, balance: float = 0.0) -> Objective:
    """Mean of -log σ(r_better - r_worse) over all pairs of unequal rank in a group: for rewards.

    Answers to one prompt are segments of one row: `groups` [b s] numbers each segment's group, from
    1 (0 is none), and of two `ranks` [b s] the larger is better. What both say of absent segments
    does not count. Llama 3 (§4.1.2) has edited above chosen above rejected, and no margin term;
    `count` is pairs.
    """

    def objective(model: RewardModel, batch: Batch) -> tuple[Float32[Array, ""], Metrics]:
        groups, ranks = jnp.asarray(batch["groups"]), jnp.asarray(batch["ranks"])
        rewards, routing = _segment_rewards(model, batch, groups.shape[1])
        number = jnp.arange(1, groups.shape[1] + 1)
        groups = jnp.where(number <= batch["segment_ids"].max(axis=1, keepdims=True), groups, 0)
        same = (groups[:, :, None] == groups[:, None, :]) & (groups[:, :, None] > 0)
        better = same & (ranks[:, :, None] > ranks[:, None, :])
        count = better.sum()

        def mean(x: Array) -> Array:
            return jnp.where(better, x, 0).sum() / jnp.maximum(count, 1)

        margins = rewards[:, :, None] - rewards[:, None, :]
        loss = mean(-log_sigmoid(margins))
        metrics = {"loss": loss, "count": count}
        metrics |= {"accuracy": mean(margins > 0), "margin": mean(margins)}
        return _with_routing(loss, metrics, routing, balance)

    return objective


def segment_rewards(model: RewardModel, batch: Batch, segments: int) -> Float32[Array, "b s"]:
    """The reward of each of up to `segments` segments, read at its last token; 0 of absent ones."""
    return _segment_rewards(model, batch, segments)[0]


def _segment_rewards(
    model: RewardModel, batch: Batch, segments: int
) -> tuple[Float32[Array, "b s"], Routing | None]:
    ids = jnp.asarray(batch["segment_ids"])
    rewards, routing = model.rewards(batch["tokens"], **inputs({**batch, "segment_ids": ids}))
    last = jnp.diff(ids, axis=1, append=-1) != 0
    return _sums(jnp.where(last, rewards, 0), ids, segments), routing


# --- What they share -----------------------------------------------------------------------------
def cross_entropy(
    model: Llama,
    hidden: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    weights: Float32[Array, "b t"],
    z_loss: float = 0.0,
) -> tuple[Float32[Array, ""], Float32[Array, ""] | None]:
    """Σ weight · (-log p(label) + z_loss · lse²) after these hidden states, and its last term.

    The last term is None where z_loss is 0; see `kernels.cross_entropy`.
    """

    def losses(*args: Array) -> tuple[Array, Array | None]:
        return kernel.linear_cross_entropy(*args, z_loss)

    return _by_head(model, losses, hidden, labels, weights, summed=True)


def head_log_probs(
    model: Llama, hidden: Float[Array, "b t d"], labels: Int[Array, "b t *k"]
) -> tuple[Float32[Array, "b t *k"], Float32[Array, "b t"]]:
    """log p of these labels after these hidden states, and the log-sum-exp of all logits."""
    return _by_head(model, kernel.linear_log_probs, hidden, labels)


def top_log_probs(
    model: Llama, batch: Batch, k: int
) -> tuple[Int32[Array, "b t k"], Float32[Array, "b t k"]]:
    """The k most likely tokens after each token, the likeliest first, and their log-probabilities.

    Raises:
        ValueError: the vocabulary has fewer tokens.
    """
    return likeliest(model, hidden_states(model, batch)[0], k)


def likeliest(
    model: Llama, hidden: Float[Array, "b t d"], k: int
) -> tuple[Int32[Array, "b t k"], Float32[Array, "b t k"]]:
    """`top_log_probs` of hidden states that are there already."""
    return _by_head(model, lambda x, head: kernel.linear_top_log_probs(x, head, k), hidden)


def _by_head(model: Llama, f: Callable, hidden: Array, *arrays: Array, summed: bool = False) -> Any:
    """`f` of normalised hidden states [m d], the head [d v] and arrays [m …], on each shard."""
    tied, table = model.head is None, model.embed if model.head is None else model.head
    rows, context = sharding.token_axes(*hidden.shape[:2])
    graph, state = nnx.split((table, model.norm))

    def shard(state: nnx.State, x: Array, *arrays: Array) -> Any:
        head, norm = nnx.merge(graph, state)
        matrix = sharding.read(head, x.dtype)
        b, t, d = x.shape
        x = norm(x).reshape(-1, d)
        found = f(x, matrix.T if tied else matrix, *(a.reshape(-1, *a.shape[2:]) for a in arrays))
        if summed:
            return sharding.total(found, *rows, *context)
        return jax.tree.map(lambda y: y.reshape(b, t, *y.shape[1:]), found)

    token = PartitionSpec(rows or None, *context)
    specs = (sharding.specs(state), token, *(token for _ in arrays))
    run = sharding.per_shard(shard, specs, PartitionSpec() if summed else token)
    return run(state, hidden, *arrays)


def hidden_states(model: Llama, batch: Batch) -> tuple[Float[Array, "b t d"], Routing | None]:
    """What the model makes of a batch's tokens and images, and what its routers did."""
    return model.hidden(batch["tokens"], **inputs(batch))


def inputs(batch: Batch) -> dict[str, Any]:
    """What a model is told beside the tokens, for any of its methods."""
    found = {name: batch.get(name) for name in ("positions", "segment_ids")}
    if "tiles" in batch:
        found["images"] = Images(batch["tiles"], batch["places"])
    return found


def _with_routing(
    loss: Array, metrics: Metrics, routing: Routing | None, balance: float
) -> tuple[Float32[Array, ""], Metrics]:
    """The loss with the routers' balance term, the metrics with what the routers did."""
    if routing is None:
        return loss, metrics
    metrics = metrics | {
        "router_entropy": routing.entropy.mean(),
        "router_balance": routing.balance.mean(),
        "expert_load": routing.load,
        "dropped": routing.dropped.sum(),
    }
    return loss + balance * routing.balance.mean(), metrics
