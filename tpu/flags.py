"""XLA flags for each TPU generation, every one with its reason and its source.

The table is short on purpose. The training step asks for the first four by itself
(`trainer.TPU_OPTIONS`), so that `l4jax plan` compiles what will run; in the environment they reach
every other program too. What generation asks for is in `decoding.TPU_OPTIONS`. More scratch memory
(`xla_tpu_scoped_vmem_limit_kib`) is not asked for: our kernels are cut for the default, and
temporaries grew with it. Asynchronous all-gathers fused with compute (v5e, v5p, v6e) and
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
_SCATTER = "One of three that let gradients lie so that their sums become reduce-scatters."
_LAYOUT = f"{_MAXTEXT}/benchmarks/xla_flags_library.py (LAYOUT_FOR_ALL_REDUCE_SCATTER)"
_HALVED = (
    "all three, four layers of Scout's training step on v5p:4x4x4: gradients' sums from 18.1 GB "
    "sent by all-reduces to 4.8 GB, nearly all by reduce-scatters"
)


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
        name="xla_tpu_use_minor_sharding_for_major_trivial_input",
        value="true",
        generations=_EVERY,
        purpose=_SCATTER,
        source=_LAYOUT,
        effect=_HALVED,
    ),
    Flag(
        name="xla_tpu_relayout_group_size_threshold_for_reduce_scatter",
        value="1",
        generations=_EVERY,
        purpose=_SCATTER,
        source=_LAYOUT,
        effect=_HALVED,
    ),
    Flag(
        name="xla_tpu_assign_all_reduce_scatter_layout",
        value="true",
        generations=_EVERY,
        purpose=_SCATTER,
        source=_LAYOUT,
        effect=_HALVED,
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
