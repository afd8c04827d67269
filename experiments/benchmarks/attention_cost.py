"""What attention costs per token as the context grows from 1 to 64 chunks, forward and backward.

A chunked layer's time and memory per token should stay flat; a causal layer's time grows with the
context. "chunked, packed" gives positions explicitly, as packed or left-padded batches do. Memory
is what the compiled program needs beside its inputs, as the compiler reports it.

    python -m experiments.benchmarks.attention_cost [--chunk 128] [--out DIR] [--json]
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from experiments.benchmarks import peers

CHUNKS = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("chunked", "chunked, packed", "causal")


def main() -> None:
    args = peers.arguments(__doc__ or "", chunk=128, heads=4, head_dim=64, repetitions=5)
    peers.keep_memory()
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for chunks in CHUNKS:
        tokens = chunks * args.chunk
        compiled = {kind: step(kind, tokens, args) for kind in KINDS}
        for run, _ in compiled.values():
            run()
        times = peers.alternate(
            {kind: run for kind, (run, _) in compiled.items()}, args.repetitions
        )
        for kind, (_, memory) in compiled.items():
            results[kind].append(
                {
                    "chunks": chunks,
                    "tokens": tokens,
                    "microseconds_per_token": times[kind]["seconds"] / tokens * 1e6,
                    "cpu_microseconds_per_token": times[kind]["cpu_seconds"] / tokens * 1e6,
                    "bytes_per_token": memory / tokens,
                }
            )
    report = {
        "benchmark": "attention_cost",
        **peers.environment(),
        "chunk": args.chunk,
        "heads": args.heads,
        "head_dim": args.head_dim,
        "growth_from_8_to_64_chunks": {
            kind: {
                key: points[-1][key] / points[CHUNKS.index(8)][key]
                for key in ("cpu_microseconds_per_token", "bytes_per_token")
            }
            for kind, points in results.items()
        },
        "results": results,
    }
    peers.write("attention_cost", report, args, plot(results, args.chunk))


def step(kind: str, tokens: int, args) -> tuple[Callable[[], object], int]:
    """Output and gradients of one layer's attention; the bytes that the program works in."""
    import jax
    import jax.numpy as jnp

    from l4jax.kernels.attention import Where, self_attention

    rng = np.random.default_rng(0)
    shape = (1, tokens, args.heads, args.head_dim)
    q, k, v = (jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(3))
    where = Where(jnp.arange(tokens, dtype=jnp.int32)[None]) if "packed" in kind else None
    chunk = args.chunk if "chunked" in kind else None

    def loss(q, k, v, where):
        return jnp.sum(jnp.square(self_attention(q, k, v, where, chunk=chunk)))

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v, where).compile()
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    run = functools.partial(compiled, q, k, v, where)
    return lambda: jax.block_until_ready(run()), used


def plot(results: dict[str, list[dict[str, float]]], chunk: int):
    """Time and memory per token over the length of the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    panels = (
        ("cpu_microseconds_per_token", "CPU microseconds per token"),
        ("bytes_per_token", "bytes per token"),
    )
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for kind, points in results.items():
            axes.plot([p["chunks"] for p in points], [p[key] for p in points], "o-", label=kind)
        axes.set(xlabel=f"context, in chunks of {chunk} tokens", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle("Attention, forward and backward")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
