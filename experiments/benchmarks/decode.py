"""Greedy decoding: tokens per second of l4jax and of transformers' generate.

Both continue the same random prompts with the same weights; the report says whether the tokens
agree. Times include the prefill. torch is run with every core and with one, which is the faster on
a busy machine, where its threads wait for each other: `ratio` is against the better of the two.

    python -m experiments.benchmarks.decode [--new 128] [--repetitions 5] [--out DIR] [--json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import peers

BATCHES = (1, 8)


def main() -> None:
    args = peers.arguments(
        __doc__ or "", vocabulary=4096, chunk=128, prompt=64, new=128, scale=1, repetitions=5
    )
    peers.keep_memory()
    import jax
    from flax import nnx

    from l4jax import sharding
    from l4jax.config import Execution
    from l4jax.inference.decoding import unrolled
    from l4jax.models.llama4 import Llama

    config = peers.config(args.vocabulary, args.chunk, args.scale)
    execution = Execution(dtype=args.dtype)
    model = sharding.create(lambda: Llama(config, execution=execution, rngs=nnx.Rngs(params=0)))
    model = unrolled(jax.tree.map(lambda x: x.astype(args.dtype), model))
    theirs = {
        "transformers": peers.transformers_model(model, args),
        "transformers, sparse experts": peers.transformers_model(model, args, sparse=True),
    }
    groups, results = {}, {}
    for batch in BATCHES:
        prompts = np.random.default_rng(batch).integers(0, args.vocabulary, (batch, args.prompt))
        runs: dict[str, Callable[[], np.ndarray]] = {"l4jax": our_run(model, prompts, args.new)}
        for name, peer in theirs.items():
            for threads in sorted({1, peers.THREADS}):
                runs[f"{name} ({threads} threads)"] = their_run(peer, prompts, args.new, threads)
        start = time.perf_counter()
        tokens = {"l4jax": runs["l4jax"]()}
        first_call = time.perf_counter() - start
        tokens |= {name: run() for name, run in runs.items() if name != "l4jax"}
        times = peers.alternate(runs, args.repetitions)
        rates = {name: batch * args.new / t["seconds"] for name, t in times.items()}
        groups[f"batch {batch}"] = rates
        results[f"batch {batch}"] = {
            "first_call_seconds": first_call,
            "tokens_per_second": rates,
            "ratio": {
                name: rates["l4jax"]
                / max(r for run, r in rates.items() if run.rpartition(" (")[0] == name)
                for name in theirs
            },
            "ratio_of_best": {
                name: min(
                    t["seconds_best"] for run, t in times.items() if run.rpartition(" (")[0] == name
                )
                / times["l4jax"]["seconds_best"]
                for name in theirs
            },
            "same_tokens": {
                name: float(np.mean(found == tokens["l4jax"])) for name, found in tokens.items()
            },
            "times": times,
        }
    parameters = sum(x.size for x in jax.tree.leaves(model))
    report: dict[str, Any] = {
        "benchmark": "decode",
        **peers.environment(),
        "dtype": args.dtype,
        "parameters": parameters,
        "prompt": args.prompt,
        "new": args.new,
        "chunk": args.chunk,
        "matmul_gflops": {name: run() for name, run in peers.matmul_speed(args).items()},
        "results": results,
    }
    title = f"Greedy decoding, {parameters / 1e6:.0f} M parameters, {report['device']}"
    peers.write("decode", report, args, peers.bars(title, groups))


def our_run(model, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    """Generates with l4jax."""
    from l4jax.inference import generate

    return lambda: np.asarray(generate(model, prompts, max_new_tokens=new).tokens)


def their_run(model, prompts: np.ndarray, new: int, threads: int) -> Callable[[], np.ndarray]:
    """Generates with transformers."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)

    def run() -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return out[:, prompts.shape[1] :].cpu().numpy()

    return run


if __name__ == "__main__":
    main()
