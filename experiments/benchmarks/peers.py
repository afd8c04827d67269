"""What the benchmarks share: one architecture in both libraries, fair timing, a report.

Both sides get the same weights, so equal losses and equal greedy tokens show that they compute the
same thing. On a shared machine single timings mean little: contestants take turns, and medians of
wall-clock and CPU time are reported beside the best time and the speed of large matrix products.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

THREADS = os.cpu_count() or 1


def keep_memory() -> None:
    """Lets the C library keep freed memory in the process; call it before anything allocates.

    By default large buffers go back to the system and are faulted in again, page by page, in every
    step: a fifth of the CPU time of our training step. Both sides run without it.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        for option, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
            mallopt(option, value)


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """The command line of a benchmark: integers by name, --out and --json."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, value in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}"
        )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder")
    parser.add_argument("--json", action="store_true", help="print only the JSON report")
    args = parser.parse_args()
    # Read by JAX when it is first imported. Its GPU allocator would leave torch nothing.
    os.environ["JAX_PLATFORMS"] = args.device
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.device == "cuda":  # XLA tries out Triton's products for minutes before the first step
        os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    return args


def config(vocabulary: int, chunk: int, scale: int = 1):
    """Scout's structure, every layer routed to one of 8 experts; 27 M parameters (4096 words).

    `scale` multiplies every width and the number of heads.
    """
    from l4jax.config import Attention, Layer, MoE, Temperature, TextConfig

    kinds = ("chunked", "chunked", "chunked", "global")
    return TextConfig(
        num_layers=8,
        embed_dim=384 * scale,
        vocab_size=vocabulary,
        mlp_dim=512 * scale,
        max_context=4096,
        attention=Attention(
            num_heads=6 * scale,
            num_kv_heads=2 * scale,
            head_dim=64,
            chunk_size=chunk,
            qk_norm=True,
            temperature=Temperature(floor=chunk),
        ),
        pattern=tuple(Layer(kind, "moe") for kind in kinds),
        moe=MoE(num_experts=8, mlp_dim=256 * scale, shared_mlp_dim=256 * scale),
    )


def transformers_model(model, args: argparse.Namespace, *, sparse: bool = False):
    """transformers' Llama4ForCausalLM with the weights of `model`, by way of an export."""
    import torch
    from transformers import Llama4ForCausalLM

    from l4jax import checkpoints

    torch.set_num_threads(THREADS)
    # What JAX does by default: float32 products on the matrix units.
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = {"bos_token_id": None, "eos_token_id": None}
        checkpoints.save(model, Path(scratch) / "model", to="hf", extra=tokens)
        theirs = Llama4ForCausalLM.from_pretrained(
            Path(scratch) / "model", dtype=getattr(torch, args.dtype)
        )
    theirs = theirs.to(args.device)
    theirs.generation_config.eos_token_id = None
    if sparse:
        for layer in theirs.model.layers:
            layer.feed_forward.forward = types.MethodType(_sparse_moe, layer.feed_forward)
    return theirs


def _sparse_moe(self, x):
    """Llama4TextMoe.forward with each expert on its own tokens only."""
    import torch

    x = x.reshape(-1, self.hidden_dim)
    logits = torch.nn.functional.linear(x, self.router.weight)
    top, expert = logits.max(dim=1)
    order = torch.argsort(expert, stable=True)
    sizes = torch.bincount(expert, minlength=self.num_experts).tolist()
    scaled = (x * torch.sigmoid(top)[:, None]).index_select(0, order)
    outputs = []
    for e, rows in enumerate(scaled.split(sizes)):
        if len(rows):
            gate, up = (rows @ self.experts.gate_up_proj[e]).chunk(2, dim=-1)
            outputs.append((torch.nn.functional.silu(gate) * up) @ self.experts.down_proj[e])
    return self.shared_expert(x).index_add(0, order, torch.cat(outputs)), logits


def matmul_speed(args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Functions that give GFLOP/s of one large matrix product in each library."""
    import jax
    import jax.numpy as jnp
    import torch

    size = 1536 if args.device == "cpu" else 8192
    ours = jnp.ones((size, size), args.dtype)
    theirs = torch.ones(size, size, dtype=getattr(torch, args.dtype), device=args.device)
    product = jax.jit(jnp.matmul)

    def in_torch() -> None:
        (theirs @ theirs)[0, 0].item()  # waits for the device

    def speed(run: Callable[[], object]) -> float:
        run()
        start = time.perf_counter()
        run()
        return 2 * size**3 / (time.perf_counter() - start) / 1e9

    return {
        "jax": lambda: speed(lambda: product(ours, ours).block_until_ready()),
        "torch": lambda: speed(in_torch),
    }


def alternate(
    contestants: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, dict[str, float]]:
    """Runs everyone in turn; median wall-clock and CPU seconds of each.

    Where other programs compete for the cores, torch's threads spin while they wait for each other:
    its medians of both kinds then say more about the load than about torch. The best time of each
    is nearest to an idle machine.
    """
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, run in contestants.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "seconds_best": min(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
        }
        for name in contestants
    }


def environment() -> dict[str, object]:
    """Date, machine and versions."""
    import jax

    packages = ("l4jax", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "flwr")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "threads": THREADS,
        "load_average": os.getloadavg()[0],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "versions": {
            x.name: x.version for x in importlib.metadata.distributions() if x.name in packages
        },
    }


def write(name: str, report: dict[str, object], args: argparse.Namespace, figure) -> None:
    """Writes `name`.json and `name`.png under --out and prints the report."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2)
    (args.out / f"{name}.json").write_text(text + "\n")
    figure.savefig(args.out / f"{name}.png", dpi=150, bbox_inches="tight")
    print(text)
    if not args.json:
        print(f"written to {args.out / name}.json and .png", file=sys.stderr)


def bars(title: str, groups: Mapping[str, Mapping[str, float]], unit: str = "tokens per second"):
    """A figure with the speed of every contestant; one panel for each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(groups), 3.2))
    for axes, (group, values) in zip(
        np.atleast_1d(figure.subplots(1, len(groups))), groups.items(), strict=True
    ):
        drawn = axes.barh(list(values), list(values.values()), color="tab:blue")
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(title=group, xlabel=unit)
    figure.suptitle(title)
    figure.tight_layout()
    return figure
