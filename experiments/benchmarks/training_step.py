"""Tokens per second of a training step: l4jax and transformers, dense and sparse experts.

A step is forward, backward and AdamW, on the same random tokens from the same weights, in float32
(`--dtype bfloat16`: parameters too), on the CPU or on a GPU (`--device cuda --scale 4`).
"transformers" computes every expert for every token; "transformers, sparse experts" is the same
model whose experts see only their own tokens.

    python -m experiments.benchmarks.training_step [--repetitions 7] [--out DIR] [--json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import peers

LEARNING_RATE = 1e-4


def main() -> None:
    args = peers.arguments(
        __doc__ or "", vocabulary=4096, chunk=128, batch=4, length=512, scale=1, repetitions=7
    )
    peers.keep_memory()
    import jax
    from flax import nnx

    from l4jax import roofline, sharding
    from l4jax.config import Execution
    from l4jax.inference.decoding import unrolled
    from l4jax.models.llama4 import Llama

    config = peers.config(args.vocabulary, args.chunk, args.scale)
    tokens = np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.length))
    execution = Execution(dtype=args.dtype)
    scanned = sharding.create(lambda: Llama(config, execution=execution, rngs=nnx.Rngs(params=0)))
    scanned = jax.tree.map(lambda x: x.astype(args.dtype), scanned)
    ours = {"l4jax": scanned}
    if args.device == "cpu":  # where unrolling is the faster one, and not slow to compile
        ours = {"l4jax": unrolled(scanned), "l4jax, scanned layers": scanned}
    model = ours["l4jax"]
    load = np.asarray(jax.jit(lambda m, x: m.outputs(x).routing.load)(model, tokens))
    theirs = {
        "transformers": peers.transformers_model(model, args),
        "transformers, sparse experts": peers.transformers_model(model, args, sparse=True),
    }
    parameters = sum(x.size for x in jax.tree.leaves(model))
    compile_seconds, losses, steps = {}, {}, {}
    for name, start in ours.items():
        steps[name], compile_seconds[name] = our_step(start, tokens)
    steps |= {name: their_step(model, tokens) for name, model in theirs.items()}
    for name, step in steps.items():
        losses[name] = [step() for _ in range(3)]

    speeds = peers.matmul_speed(args)
    times = peers.alternate(steps, args.repetitions)
    peak = {name: max(run() for _ in range(5)) for name, run in speeds.items()}
    flops = roofline.training_flops(config, args.length) * tokens.size
    results = {
        name: {
            **seconds,
            "tokens_per_second": tokens.size / seconds["seconds"],
            "tokens_per_cpu_second": tokens.size / seconds["cpu_seconds"],
            "fraction_of_matmul_peak": flops
            / seconds["seconds"]
            / (peak["jax" if name.startswith("l4jax") else "torch"] * 1e9),
            "first_losses": losses[name],
        }
        for name, seconds in times.items()
    }
    rates = {name: result["tokens_per_second"] for name, result in results.items()}
    report: dict[str, Any] = {
        "benchmark": "training_step",
        **peers.environment(),
        "dtype": args.dtype,
        "parameters": parameters,
        "batch": [args.batch, args.length],
        "chunk": args.chunk,
        "matmul_gflops": peak,
        "step_gflop": flops / 1e9,
        "compile_seconds": compile_seconds,
        "tokens_per_expert": {"least": int(load.min()), "most": int(load.max())},
        "ratio": {name: rates["l4jax"] / rate for name, rate in rates.items() if name != "l4jax"},
        "ratio_of_best": {
            name: seconds["seconds_best"] / times["l4jax"]["seconds_best"]
            for name, seconds in times.items()
            if name != "l4jax"
        },
        "ratio_cpu_seconds": {
            name: seconds["cpu_seconds"] / times["l4jax"]["cpu_seconds"]
            for name, seconds in times.items()
            if name != "l4jax"
        },
        "results": results,
    }
    title = f"Training step, {parameters / 1e6:.0f} M parameters, {report['device']}"
    peers.write("training_step", report, args, peers.bars(title, {f"AdamW, {args.dtype}": rates}))


def our_step(model, tokens: np.ndarray) -> tuple[Callable[[], float], float]:
    """A training step that keeps its own state and returns the loss; seconds to compile it."""
    import jax
    import optax
    from flax import nnx

    graph, params = nnx.split(jax.tree.map(lambda x: x.copy(), model))
    optimizer = optax.adamw(LEARNING_RATE)
    tokens = jax.numpy.asarray(tokens, jax.numpy.int32)

    def step(params, moments, tokens):
        def loss(params):
            logits = nnx.merge(graph, params)(tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    state = [params, jax.jit(optimizer.init)(params)]
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, tokens).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        *state[:], loss = compiled(*state, tokens)
        return float(loss)

    return run, seconds


def their_step(model, tokens: np.ndarray) -> Callable[[], float]:
    """The same in torch; fused and foreach AdamW were within the noise of each other."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-4, fused=True)
    ids = torch.tensor(tokens, device=model.device)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


if __name__ == "__main__":
    main()
