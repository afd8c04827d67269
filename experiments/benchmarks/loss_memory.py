"""Memory of losses at Llama 4's vocabulary: some tokens' logits at a time, and all of them at once.

Each is a loss with its gradients of the hidden states and of the head, in float32: cross-entropy
with z-loss, a preference between halves of the tokens, and a divergence from a teacher's 64 tokens.
Memory is what the compiled program needs beside its inputs and outputs, as the compiler reports it.

    python -m experiments.benchmarks.loss_memory [--width 64] [--piece-mb 256] [--out DIR] [--json]
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.benchmarks import peers

TOKENS = (256, 512, 1024, 2048, 4096)
LISTED = 64
Z = 1e-4


def main() -> None:
    args = peers.arguments(__doc__ or "", vocabulary=202_048, width=64, piece_mb=256)
    from l4jax.kernels import cross_entropy

    cross_entropy.PIECE_BYTES = args.piece_mb * 2**20
    losses: dict[str, dict[str, Callable]] = {
        "cross-entropy": {"pieces": weighted, "plain": plain_weighted},
        "preference": {"pieces": preference, "plain": plain_preference},
        "distillation": {"pieces": distillation, "plain": plain_distillation},
    }
    results: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {
            kind: [{"tokens": m, "bytes": memory(f, m, args)} for m in TOKENS]
            for kind, f in kinds.items()
        }
        for name, kinds in losses.items()
    }
    report = {
        "benchmark": "loss_memory",
        **peers.environment(),
        "vocabulary": args.vocabulary,
        "width": args.width,
        "piece_bytes": args.piece_mb * 2**20,
        "logits_bytes": [4 * m * args.vocabulary for m in TOKENS],
        "ratio_at_most_tokens": {
            name: kinds["plain"][-1]["bytes"] / kinds["pieces"][-1]["bytes"]
            for name, kinds in results.items()
        },
        "results": results,
    }
    peers.write("loss_memory", report, args, plot(results, args.vocabulary))


def memory(loss: Callable, m: int, args) -> int:
    """Bytes that a loss and its gradients work in; nothing is run."""
    import jax
    import jax.numpy as jnp

    shapes = (
        jax.ShapeDtypeStruct((m, args.width), jnp.float32),
        jax.ShapeDtypeStruct((args.width, args.vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((m, LISTED), jnp.int32),
        jax.ShapeDtypeStruct((m, LISTED), jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def weighted(x, head, ids, values):
    """l4jax: the first id of each token is its label, the first value its weight."""
    from l4jax.kernels.cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, head, ids[:, 0], values[:, 0], Z)[0]


def plain_weighted(x, head, ids, values):
    """The same from all logits."""
    lse, log_probs = _plain(x, head, ids[:, :1])
    return (values[:, 0] * (Z * lse**2 - log_probs[:, 0])).sum()


def preference(x, head, ids, values):
    """l4jax: -log σ of how much likelier the labels of the first half are than the others."""
    from l4jax.kernels.cross_entropy import linear_log_probs

    return _prefer(linear_log_probs(x, head, ids[:, 0])[0])


def plain_preference(x, head, ids, values):
    """The same from all logits."""
    return _prefer(_plain(x, head, ids[:, :1])[1][:, 0])


def distillation(x, head, ids, values):
    """l4jax: the values are the teacher's log-probabilities of the ids."""
    from l4jax.kernels.cross_entropy import linear_log_probs
    from l4jax.training.objectives import divergence

    return divergence(values, linear_log_probs(x, head, ids)[0], 1.0).sum()


def plain_distillation(x, head, ids, values):
    """The same from all logits."""
    from l4jax.training.objectives import divergence

    return divergence(values, _plain(x, head, ids)[1], 1.0).sum()


def _plain(x, head, ids):
    import jax
    import jax.numpy as jnp

    logits = x @ head
    lse = jax.nn.logsumexp(logits, axis=1)
    return lse, jnp.take_along_axis(logits, ids, axis=1) - lse[:, None]


def _prefer(log_probs):
    import jax

    chosen, rejected = log_probs.reshape(2, -1).sum(axis=1)
    return -jax.nn.log_sigmoid(0.1 * (chosen - rejected))


def plot(results: dict[str, dict[str, list[dict[str, float]]]], vocabulary: int):
    """Gigabytes over the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2))
    for axes, (name, kinds) in zip(
        figure.subplots(1, 3, sharey=True), results.items(), strict=True
    ):
        for kind, points in kinds.items():
            axes.plot(
                [p["tokens"] for p in points], [p["bytes"] / 1e9 for p in points], "o-", label=kind
            )
        axes.set(title=name, xlabel="tokens")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("GB beside inputs and outputs")
    figure.axes[0].legend()
    figure.suptitle(f"Losses and gradients, vocabulary {vocabulary:,}")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
