"""One process of a run: trains a tiny Scout on eight devices, whatever the number of processes.

python distributed_worker.py FOLDER STEPS [KILLED KILLED_AT]

Process 0 writes a line of metrics for each step. A checkpoint of everything follows every second
step; a run in the same folder goes on at the last one. Process KILLED ends itself at a step, the
way a lost machine would.
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from l4jax import distributed, presets, sharding
from l4jax.data import pipeline
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, trainer

DEVICES, ROWS, LENGTH, EVERY = 8, 8, 40, 2


def main(folder: pathlib.Path, steps: int, killed: int, killed_at: int) -> None:
    processes = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    distributed.initialize(heartbeat_seconds=15)
    assert jax.process_count() == processes
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, expert=2)):
        train(folder, steps, killed, killed_at)


def small_scout() -> Llama:
    """A tiny Scout of one layer, as every process compiles; made without compiling anything."""
    config = presets.get("tiny-llama4-scout").make()
    config = dataclasses.replace(config, num_layers=1, pattern=config.pattern[2:3])
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(7)

    def fill(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
        return jax.device_put(rng.normal(0, 0.1, x.shape).astype(x.dtype), place)

    return nnx.merge(graph, jax.tree.map(fill, abstract, sharding.shardings(abstract)))


def train(folder: pathlib.Path, steps: int, killed: int, killed_at: int) -> None:
    model = small_scout()
    vocabulary = model.config.vocab_size
    training = trainer.Training(model, objectives.next_token(), optax.adam(1e-2))
    place = trainer.batch_sharding(ROWS, LENGTH)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocabulary, n) for n in rng.integers(1, 90, 200)]
    context = ocp.Context()
    # Replicas that write a slice each compile one more program for every array.
    context.array.saving.use_replica_parallel = False
    with context, ocp.training.Checkpointer(folder / "checkpoints") as checkpoints:
        start = checkpoints.latest.step if checkpoints.latest else 0
        if start:
            shapes = jax.tree.map(ocp.arrays.to_shape_dtype_struct, training.state)
            training.state = checkpoints.load(start, shapes)
        rows = distributed.local_rows(place, ROWS)
        (folder / f"rows-{jax.process_count()}-{jax.process_index()}").write_text(json.dumps(rows))
        data = pipeline.packed(
            documents, length=LENGTH, batch_size=ROWS, seed=1, skip=start, rows=rows
        )
        batches = (distributed.global_batch(batch, place) for batch in data)
        # Metrics come late, so that a run's state is its last step's only once it has ended.
        for begin in range(start, steps, EVERY):
            for metrics in training.run(batches, EVERY):
                step = begin + metrics["step"] + 1
                record(folder, metrics | {"step": step})
                if (jax.process_index(), step) == (killed, killed_at):
                    os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.save(begin + EVERY, training.state)


def record(folder: pathlib.Path, metrics: dict) -> None:
    if jax.process_index() == 0:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({k: np.asarray(v).tolist() for k, v in metrics.items()}) + "\n")


if __name__ == "__main__":
    where, count, *rest = sys.argv[1:]
    main(pathlib.Path(where), int(count), *map(int, rest or (-1, -1)))
