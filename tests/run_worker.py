"""One run of a tiny model on packed batches, resumed if it was killed before.

python run_worker.py FOLDER STEPS [SECONDS [WHEN STEP]]

Each batch takes SECONDS. At the save of STEP the process kills itself: "begun" when the arrays are
being written, "written" when they are, and only what makes them a checkpoint is missing. Or the
last process is "told" to stop when it takes batch STEP. Several have eight devices together.
"""

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import optax
from conftest import build
from flax import nnx
from toy_runs import CONFIG

from l4jax import distributed, sharding
from l4jax.data import mixture, pipeline, store
from l4jax.training import checkpointing, loop, objectives, schedules, trainer

ROWS, LENGTH, EVERY = 8, 24, 4
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def batches(rows=None):
    """Packed rows of several epochs of documents of all lengths."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in rng.integers(2, 24, 60)]
    stores = [store.MemoryStore(documents[:20]), store.MemoryStore(documents[20:])]
    return pipeline.batches(
        mixture.Mixture(stores, [1, 3]),
        length=LENGTH,
        batch_size=ROWS,
        seed=3,
        packing="best_fit",
        rows=rows,
    )


class Slow:
    """Batches that take their time."""

    def __init__(self, batches, seconds, told):
        self._batches, self._seconds, self._told = iter(batches), seconds, told
        self.get_state, self.set_state = self._batches.get_state, self._batches.set_state

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self._seconds)
        last = jax.process_index() == jax.process_count() - 1
        if last and self.get_state()["batch"] == self._told:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._batches)


def run(folder, steps, *, seconds=0.0, told=-1, rows=None, model=None, **options):
    """The run; resumed if there is something to resume."""
    rate = schedules.warmup_cosine(0.02, steps=40, warmup=4)
    training = trainer.Training(
        model or build(CONFIG), objectives.next_token(), optax.adam(rate), **options
    )
    settings = loop.Settings(steps=steps, checkpoint_every=EVERY)
    data = Slow(batches(rows), seconds, told)
    return loop.fit(training, data, folder, settings=settings, schedule=rate, resume=True)


def dies(when, step):
    """Makes the process kill itself at a save."""
    real = checkpointing.begin

    def begin(path, arrays):
        written = real(path, arrays)
        if path.name != step:
            return written
        if when == "begun":
            os.kill(os.getpid(), signal.SIGKILL)

        def late():
            written()
            os.kill(os.getpid(), signal.SIGKILL)

        return late

    checkpointing.begin = begin


def placed():
    """The model on the current mesh."""
    graph, state = nnx.split(build(CONFIG))
    return nnx.merge(graph, jax.device_put(state, sharding.shardings(state)))


def check_batches():
    """Every device has the part of a batch that is its own, whatever the processes share."""
    rng = np.random.default_rng(0)
    whole = {
        "tokens": rng.integers(0, 99, (ROWS, LENGTH)).astype(np.int32),
        "teacher": rng.random((ROWS, LENGTH, 2)).astype(np.float32),
        "reference": rng.random((ROWS, 6)).astype(np.float32),
        "scale": np.float32(3),
    }
    for sizes in ({"data": 2, "fsdp": 2, "context": 2}, {"context": 8}, {"tensor": 8}):
        with sharding.use(sharding.make_mesh(**sizes)):
            place = trainer.batch_sharding(ROWS, LENGTH)
            rows = distributed.local_rows(place, ROWS)
            mine = {name: x[rows] if np.ndim(x) else x for name, x in whole.items()}
            for name, x in trainer.spread(mine).items():
                assert x.shape == np.shape(whole[name])
                for part in x.addressable_shards:
                    np.testing.assert_array_equal(part.data, whole[name][part.index])


def main(folder, steps, seconds="0", when="", step="-1"):
    processes = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if when in ("begun", "written"):
        dies(when, step)
    how = {"seconds": float(seconds), "told": int(step) if when == "told" else -1}
    if processes == 1:
        run(pathlib.Path(folder), int(steps), **how)
        return
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    distributed.initialize(heartbeat_seconds=15)
    check_batches()
    with sharding.use(sharding.make_mesh(**MESH)):
        rows = distributed.local_rows(trainer.batch_sharding(ROWS, LENGTH), ROWS)
        print(run(pathlib.Path(folder), int(steps), rows=rows, model=placed(), **how))


if __name__ == "__main__":
    main(*sys.argv[1:])
