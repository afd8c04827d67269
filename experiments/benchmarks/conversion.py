"""Conversion of a checkpoint in Scout's layout: speed against a plain copy and Orbax's own save.

python -m experiments.benchmarks.conversion [--gigabytes 6] [--repetitions 3] [--scratch FOLDER]

Every run is a process of its own on the same disk, and ends when its bytes are on the disk. Memory
is what the process has beyond what it has after its imports: resident in all, and anonymous (not
backed by files). The plain copy is the fastest there is: whole files, no look at what is in them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from experiments.benchmarks import peers

RUNS = {
    "plain copy": ("copy", "hf"),
    "Orbax's own save": ("orbax save", "hf"),
    "hf → orbax": ("orbax", "hf"),
    "hf → meta, 8 shards": ("meta", "hf"),
    "hf → hf, other shards": ("hf", "hf"),
    "orbax → hf": ("hf", "hf → orbax"),
    "meta → hf": ("hf", "hf → meta, 8 shards"),
}
"""Name: what is done, and the run whose result it is done to ("hf" is the source)."""


def config(gigabytes: float):
    """Scout with narrower layers, its 16 experts and its proportions, of about this size."""
    from l4jax import presets, roofline

    scout = presets.llama4_scout()

    def narrow(periods: int):
        return dataclasses.replace(
            scout,
            num_layers=4 * periods,
            embed_dim=2048,
            vocab_size=50_512,
            mlp_dim=8192,
            attention=dataclasses.replace(scout.attention, num_heads=16, num_kv_heads=8),
            moe=dataclasses.replace(scout.moe, mlp_dim=4096, shared_mlp_dim=4096),
        )

    def size(periods: int) -> float:
        return 2 * roofline.parameters(narrow(periods)).total / 1e9

    return narrow(max(1, round(gigabytes / (size(2) - size(1)))))


def make_source(directory: Path, gigabytes: float) -> int:
    """Writes random bfloat16 weights as Hugging Face shards; returns their bytes."""
    import ml_dtypes

    from l4jax.checkpoints import formats, huggingface

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    model = formats.Model(config(gigabytes))
    wanted = {n: formats.Spec(s, bfloat16) for n, s in formats.array_shapes(model).items()}
    directory.mkdir(parents=True)
    target = huggingface.target(
        model, wanted, directory, described={}, max_shard_bytes=2_000_000_000
    )
    target.create()
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(1 << 24, np.float32) * 0.02).astype(bfloat16)
    sums = {}
    for tensor in target.tensors.values():
        step = max(1, (1 << 24) * tensor.length // int(np.prod(tensor.shape)))
        for start in range(0, tensor.length, step):
            rows = min(step, tensor.length - start)
            tensor.write(start, np.resize(numbers, (rows, *tensor.shape[1:])))
        sums |= tensor.sums()
    target.finish(sums)
    return sum(spec.nbytes for spec in wanted.values())


def work(kind: str, source: str, destination: str) -> None:
    """What one process does, after it has said that it is ready."""
    from l4jax import checkpoints, cli

    cli.reuse_memory()
    if kind == "orbax save":
        import jax
        from orbax.checkpoint import v1 as ocp

        from l4jax.checkpoints import safetensors

        arrays = {n: jax.numpy.asarray(e.read()) for n, e in safetensors.scan(Path(source)).items()}
        jax.block_until_ready(arrays)
    print("ready", flush=True)
    if kind == "copy":
        for file in Path(source).iterdir():
            Path(destination).mkdir(exist_ok=True)
            shutil.copyfile(file, Path(destination) / file.name)
        for file in Path(destination).iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    elif kind == "orbax save":
        ocp.save(destination, arrays)
    else:
        shards = {"shards": 8 if kind == "meta" else 1, "max_shard_bytes": 1_500_000_000}
        options = checkpoints.Options(**shards)
        checkpoints.convert(source, destination, to=kind, options=options, licence="none")
    print("done", flush=True)


def measure(kind: str, source: Path, destination: Path) -> dict[str, float]:
    """Wall-clock seconds of the work, and the memory that it took beyond the imports."""
    os.sync()
    command = [sys.executable, "-m", "experiments.benchmarks.conversion", "--work"]
    process = subprocess.Popen(
        [*command, kind, str(source), str(destination)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "ready\n"
    begun, before = time.perf_counter(), memory(process.pid)
    peak, seconds = before, None
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        peak = tuple(map(max, peak, memory(process.pid)))
        if seconds is None and process.stdout.readline():
            seconds = time.perf_counter() - begun
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{kind} of {source} failed")
    return {
        "seconds": seconds or time.perf_counter() - begun,
        "resident_gb": (peak[0] - before[0]) / 1e9,
        "anonymous_gb": (peak[1] - before[1]) / 1e9,
    }


def memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        found = [re.search(rf"{name}:\s+(\d+)", text) for name in ("VmRSS", "RssAnon")]
        return tuple(1024 * int(match[1]) for match in found)
    except (OSError, TypeError):
        return 0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0, help="default 6")
    parser.add_argument("--repetitions", type=int, default=3, help="default 3")
    parser.add_argument("--scratch", type=Path, default=Path("runs/conversion"), help="on the disk")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder")
    parser.add_argument("--json", action="store_true", help="print only the JSON report")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    scratch = args.scratch.absolute()
    shutil.rmtree(scratch, ignore_errors=True)
    nbytes = make_source(scratch / "hf", args.gigabytes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(args.repetitions):
        for name, (kind, origin) in RUNS.items():
            shutil.rmtree(scratch / name, ignore_errors=True)
            found[name].append(measure(kind, scratch / origin, scratch / name))
            print(name, found[name][-1], file=sys.stderr)
            if not any(origin == name for _, origin in RUNS.values()):
                shutil.rmtree(scratch / name)
        for name in RUNS:
            shutil.rmtree(scratch / name, ignore_errors=True)
    shutil.rmtree(scratch)
    results = {}
    for name, runs in found.items():
        rate = nbytes / 1e6 / statistics.median(run["seconds"] for run in runs)
        results[name] = {
            "megabytes_per_second": rate,
            "all_seconds": [run["seconds"] for run in runs],
            "resident_gb": max(run["resident_gb"] for run in runs),
            "anonymous_gb": max(run["anonymous_gb"] for run in runs),
        }
    for name in results:
        for other, key in (("plain copy", "of_copy"), ("Orbax's own save", "of_orbax_save")):
            fast = results[other]["megabytes_per_second"]
            results[name][key] = results[name]["megabytes_per_second"] / fast
    report = {"bytes": nbytes, "results": results, "environment": peers.environment()}
    figure = peers.bars(
        f"Conversion of {nbytes / 1e9:.1f} GB",
        {"MB/s": {name: item["megabytes_per_second"] for name, item in results.items()}},
        unit="megabytes per second",
    )
    peers.write("conversion", report, args, figure)


if __name__ == "__main__":
    main()
