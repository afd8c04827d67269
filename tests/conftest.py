"""Strict JAX on eight CPU devices, and tiny models that tests share."""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import signal
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", os.environ.get("L4JAX_TEST_PLATFORMS", "cpu"))
if "L4JAX_TEST_PLATFORMS" not in os.environ:
    chex.set_n_cpu_devices(8)
    # Tests compile more than they compute.
    jax.config.update("jax_disable_most_optimizations", True)

# A suite that runs in the background inherits that Ctrl-C is ignored; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests make lives long: the defaults look for garbage ten times as often as it pays.
gc.set_threshold(100_000, 20, 20)

FAMILIES = (
    "llama4-scout",
    "llama4-maverick",
    "llama-guard-4",
    "llama3-8b",
    "llama3.1-8b",
    "llama3.2-1b",
)
"""One preset of every structure; the others differ from these in numbers only."""
ROWS, LENGTH = 4, 75
"""Shape of most test batches: four chunks of 16 and a rest."""

# l4jax is imported inside functions: the runtime type checker must be installed before that.


@pytest.fixture(scope="module", autouse=True)
def kept_apart():
    """What a file leaves behind does not matter to the next one.

    Compiled programs above all are not searched for garbage again; and where a recipe has turned on
    the cache of programs on disk, it is turned off: programs for TPUs cannot be read back from it.
    """
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()
    gc.collect()
    gc.freeze()


class Twin(NamedTuple):
    """A tiny model and its compiled forward pass, for tokens, positions and segment ids."""

    name: str
    model: object
    forward: object

    @property
    def config(self):
        return self.model.config

    def tokens(self, seed: int = 0, shape: tuple[int, ...] = (ROWS, LENGTH)) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, shape, np.int32)


def build(config, **execution):
    """A model made without compiling anything; norm scales differ from 1, so that each counts."""
    from flax import nnx

    from l4jax.config import Execution
    from l4jax.models.llama4 import Llama

    model = nnx.eval_shape(
        lambda: Llama(config, execution=Execution(**execution), rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    rng = np.random.default_rng(7)

    def fill(path, param):
        name, shape = str(path[-1]), param.shape
        if name == "scale":
            value = 1 + 0.3 * rng.standard_normal(shape)
        else:
            fan_in = {
                "embed": shape[-1],
                "o": shape[-3] * shape[-2] if name == "o" else 0,
                **dict.fromkeys("qkv", shape[-3] if name in "qkv" else 0),
            }.get(name, shape[-2])
            value = rng.standard_normal(shape) * fan_in**-0.5
        return param.replace(jnp.asarray(value, jnp.float32))

    flat = {path: fill(path, param) for path, param in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.cache
def _twin(name: str) -> Twin:
    from l4jax import presets

    return Twin(name, build(presets.get(f"tiny-{name}").make()), forward)


def forward(model, tokens, positions=None, segment_ids=None):
    """`model`'s logits as a NumPy array; compiled once for each structure and shape."""
    return np.asarray(outputs(model, tokens, positions, segment_ids).logits)


@jax.jit
def outputs(model, tokens, positions=None, segment_ids=None):
    """Logits and routing."""
    return model.outputs(tokens, positions=positions, segment_ids=segment_ids)


@pytest.fixture(scope="session", params=FAMILIES)
def twin(request) -> Twin:
    """The tiny twin of each family in turn."""
    return _twin(request.param)


@pytest.fixture(scope="session")
def twin_of():
    """The tiny twin of the family called so."""
    return _twin


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def s3():
    """A file system on an S3 server (moto's); one for all tests, as file systems are cached."""
    server = pytest.importorskip("moto.server", reason="needs moto: pip install l4jax[test]")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install l4jax[test]")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield s3fs.S3FileSystem()
    running.stop()


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from the present code"
    )


@pytest.fixture
def golden(request):
    """Compares a text with tests/golden/NAME, or writes it there with --update-golden."""

    def check(name: str, text: str) -> None:
        file = pathlib.Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            file.write_text(text)
        assert file.exists(), f"{file} is missing: make it with --update-golden and review it"
        assert text == file.read_text(), f"{name} changed; if meant, run pytest --update-golden"

    return check
