"""XLA flags for each TPU generation, every one with its reason and its source.

The table is short on purpose. Asynchronous all-gathers fused with compute (v5e, v5p, v6e) and
collectives on the SparseCores (TPU7x) are defaults: a small sharded training step, compiled with
and without their flags, had the same numbers of collectives and fusions and the same temporaries on
all four (libtpu 0.0.42.1, 2026-11). A flag that the installed libtpu doesn't know ends the process,
so every one added is one more to keep alive.
"""

from __future__ import annotations

from typing import NamedTuple

from l4jax.planning import chips

_XLA = "https://openxla.org/xla/flags_guidance"
_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main"
_EVERY = tuple(chips.GENERATIONS)


class Flag(NamedTuple):
    """One flag."""

    name: str
    value: str
    generations: tuple[str, ...]
    purpose: str
    source: str
    multislice: bool = False
    """Only of use between slices."""
    effect: str | None = None
    """What was seen when compiling for a described topology; None where nothing was."""


FLAGS = (
    Flag(
        name="xla_tpu_scoped_vmem_limit_kib",
        value="81920",
        generations=("v5p", "v6e"),
        purpose="Scratch memory for one operation, 16384 by default: room for the larger blocks "
        "of attention and grouped matrix products.",
        source=f"{_MAXTEXT}/benchmarks/maxtext_v5p_model_configs.py (Llama 4), "
        f"{_MAXTEXT}/benchmarks/maxtext_trillium_model_configs.py (Mixtral); {_XLA}",
        effect="temporaries of a small sharded training step: v5p 235 → 248 MB, v6e 151 → 227 MB",
    ),
    Flag(
        name="xla_tpu_scoped_vmem_limit_kib",
        value="65536",
        generations=("tpu7x",),
        purpose="As above; a TensorCore of TPU7x has 64 MiB.",
        source=f"{_MAXTEXT}/docs/guides/optimization/benchmark_and_performance.md (DeepSeek-V3)",
        effect="temporaries of a small sharded training step: 244 → 248 MB",
    ),
    Flag(
        name="xla_tpu_enable_async_all_to_all",
        value="true",
        generations=_EVERY,
        purpose="Tokens travel to their experts while other work goes on; off by default.",
        source=_XLA,
    ),
    Flag(
        name="xla_tpu_enable_data_parallel_all_reduce_opt",
        value="true",
        generations=_EVERY,
        purpose="Gradient sums over the data centre's network overlap with compute.",
        source=f"{_MAXTEXT}/src/maxtext/configs/README.md",
        multislice=True,
    ),
    Flag(
        name="xla_tpu_data_parallel_opt_different_sized_ops",
        value="true",
        generations=_EVERY,
        purpose="The same across iterations of the layer loop, for operations of any size.",
        source=f"{_MAXTEXT}/src/maxtext/configs/README.md",
        multislice=True,
    ),
)


def libtpu_init_args(topology: chips.Topology) -> str:
    """The value of LIBTPU_INIT_ARGS for a topology."""
    return " ".join(
        f"--{flag.name}={flag.value}"
        for flag in FLAGS
        if topology.generation.name in flag.generations
        and (topology.slices > 1 or not flag.multislice)
    )
