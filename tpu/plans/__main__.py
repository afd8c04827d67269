"""Redoes the recorded plans: `python -m tpu.plans [--only TEXT] [--force] [--list]`.

Each row of the table is one `l4jax plan`, run by itself and one after another; it takes minutes,
the whole table hours. What was recorded with the same code and the same compiler is left as it is,
so the same command goes on where it stopped. README.md is written anew after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from l4jax import presets
from l4jax.planning import chips, meshes

HERE = pathlib.Path(__file__).parent
LIBRARY = HERE.parent.parent / "l4jax"
# What a compiled step depends on.
SOURCES = ("config.py", "presets.py", "sharding.py", "roofline.py")
FOLDERS = ("models", "kernels", "training", "inference", "planning")

PRESETS = (
    "llama4-scout",
    "llama4-maverick",
    "llama4-behemoth",
    "llama-guard-4",
    "llama3.1-8b",
    "llama3.1-70b",
    "llama3.1-405b",
)
TASKS: tuple[meshes.Task, ...] = ("train", "sft", "prefill", "decode")
LARGE = {"v5p": "v5p:4x8x8", "v6e": "v6e:16x16", "tpu7x": "tpu7x:4x8x8"}
SLICES = {"v5p": ("v5p:8x16x16", 2), "v6e": ("v6e:16x16", 4), "tpu7x": ("tpu7x:8x8x16", 2)}
"""What the largest model is trained on."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan of the table."""

    preset: str
    topology: str
    slices: int
    task: meshes.Task

    @property
    def name(self) -> str:
        """Of its file."""
        place = self.topology.replace(":", "-") + (f"x{self.slices}" if self.slices > 1 else "")
        return f"{self.preset}_{place}_{self.task}"

    @property
    def command(self) -> list[str]:
        """Of this plan, to be typed."""
        slices = ["--slices", str(self.slices)] if self.slices > 1 else []
        return [
            *("l4jax", "plan", self.preset, "--topology", self.topology, *slices),
            *("--task", self.task),
        ]


def rows() -> Iterator[Row]:
    """The table: on each generation the smallest slice that should do, and a large one."""
    for preset in PRESETS:
        for generation, large in LARGE.items():
            for task in TASKS:
                place = (large, 1)
                if preset == "llama4-behemoth" and task in ("train", "sft"):
                    place = SLICES[generation]
                small = smallest(preset, generation, task)
                if small is not None:
                    yield Row(preset, small, 1, task)
                if place != (small, 1):
                    yield Row(preset, *place, task)


def smallest(preset: str, generation: str, task: meshes.Task) -> str | None:
    """The smallest slice on which the estimate finds room, a chip short of a host excepted."""
    config = presets.get(preset).make()
    for shape in chips.GENERATIONS[generation].shapes:
        topology = chips.parse(f"{generation}:{shape}")
        if topology.chips < 4:
            continue
        length = min(8192, config.max_context)
        work = meshes.Work(task=task, batch=meshes.rows(task, topology), length=length)
        ranked = meshes.rank(config, topology, work)
        if ranked and meshes.fits(config, topology, work, *ranked[0]):
            return topology.name
    return None


def version() -> str:
    """Of the code that makes the plans, and of the compiler."""
    digest = hashlib.sha256()
    files = [LIBRARY / name for name in SOURCES]
    for folder in FOLDERS:
        files += sorted((LIBRARY / folder).rglob("*.py"))
    for file in files:
        digest.update(file.read_bytes())
    for package in ("jax", "libtpu"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:12]


def record(row: Row, code: str, folder: pathlib.Path) -> dict[str, Any]:
    """Makes a plan, and where it does not fit one of fewer sequences, and keeps what came of it."""
    found = last = {"code": code} | _made(row.command)
    # Advice is an estimate: what follows it may not fit either, and advises again.
    while fewer := [advice for advice in last.get("advice", ()) if advice.startswith("--batch")]:
        last = found["instead"] = _made([*row.command, *fewer[0].split()])
    partial = folder / f"{row.name}.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.rename(folder / f"{row.name}.json")
    return found


def _made(command: list[str]) -> dict[str, Any]:
    """A plan, made in a process of its own, or why there is none."""
    done = subprocess.run(
        [sys.executable, "-m", "l4jax.cli", *command[1:], "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        found = json.loads(done.stdout)
    else:
        found = {"error": done.stderr.strip().splitlines()[-1].removeprefix("l4jax: ")}
    return {"command": " ".join(command)} | found


def recorded(row: Row, folder: pathlib.Path) -> dict[str, Any] | None:
    """What the folder has of a plan."""
    file = folder / f"{row.name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def readme(table: list[Row], folder: pathlib.Path) -> str:
    """The table as text."""
    lines = [
        "# Recorded plans",
        "",
        "What the TPU compiler says of each step, ahead of time and without a TPU: nothing here",
        "ran. Times are the least that compute, memory and links allow if everything overlaps, MFU",
        "what they leave at best. One sequence of 8192 tokens for each device, at least 16 when",
        "decoding; where so many do not fit, a second row may have as many as do. Meshes and",
        "rematerialization are what `l4jax plan` recommends. Each row's JSON lies beside this",
        "file; `python -m tpu.plans` redoes what the code has outgrown. In `compared/` are the",
        "steps that experiments/README.md sets beside MaxText's, in `recipes/` those of the",
        "recipes' presets for pods beside them.",
        "",
        "| model | slice | task | mesh | remat | GiB | GB sent | least s | bound | MFU | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    versions = set()
    for row in table:
        found = recorded(row, folder)
        if found is not None:
            lines.append(_line(row, row.task, found))
            if "instead" in found:
                batch = found["instead"].get("batch", "fewer")
                lines.append(_line(row, f"{row.task}, batch {batch}", found["instead"]))
            versions |= {
                f"jax {v['jax']}, libtpu {v['libtpu']}" for v in [found.get("versions")] if v
            }
    count = sum(recorded(row, folder) is not None for row in table)
    lines += (
        ["", f"{count} of {len(table)} rows are recorded so far."] if count < len(table) else []
    )
    return "\n".join(
        [*lines, "", f"Compiled with {'; '.join(sorted(versions)) or 'nothing yet'}.", ""]
    )


def _line(row: Row, task: str, found: dict[str, Any]) -> str:
    place = row.topology + (f" × {row.slices}" if row.slices > 1 else "")
    start = f"| {row.preset} | {place} | {task} |"
    if "error" in found:
        return f"{start} {found['error'].replace('|', '/')} | | | | | | | |"
    memory = f"{found['hbm_gib']['total']:.1f} of {found['hbm_gib']['capacity']}"
    start += f" {meshes.show(found['mesh'])} | {found['remat'] or ''} |"
    if not found["fits"]:
        return f"{start} {memory}: does not fit | | | | | {found['date']} |"
    return (
        f"{start} {memory} | {found['wire_gb']['total']:.4g} | "
        f"{found['roofline_seconds']['total']:.3g} | {found['bound']} | {found['mfu_bound']:.0%} | "
        f"{found['date']} |"
    )


def main(arguments: list[str] | None = None, folder: pathlib.Path = HERE) -> int:
    """Redoes what needs it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tpu.plans", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--force", action="store_true", help="also rows of the same code")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    options = parser.parse_args(arguments)
    table = list(rows())
    chosen = [row for row in table if options.only in row.name]
    if not chosen:
        print(f"no row's name contains {options.only!r}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(" ".join(row.command) for row in chosen))
        return 0
    code, failed = version(), 0
    for number, row in enumerate(chosen):
        before = recorded(row, folder)
        if before is not None and before["code"] == code and not options.force:
            continue
        print(f"{number + 1}/{len(chosen)} {row.name}", file=sys.stderr, flush=True)
        failed += "error" in record(row, code, folder)
        (folder / "README.md").write_text(readme(table, folder))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
