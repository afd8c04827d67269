"""On a GPU or TPU: the same numbers as on the CPU beside it, in float32 at full precision.

    L4JAX_TEST_PLATFORMS=cuda,cpu pytest -m accelerator tests/test_accelerator.py

The CPU's own numbers are held against independent references by the other tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES, build
from flax import nnx

from l4jax import inference, presets
from l4jax.kernels import attention, experts
from l4jax.training import objectives, optimizers, trainer

pytestmark = pytest.mark.accelerator


@pytest.fixture(autouse=True)
def precise():
    """Without this, float32 products run on matrix units that round their inputs."""
    with jax.default_matmul_precision("highest"):
        yield


def on_both(function, *arguments):
    """What `function` gives on the accelerator and on the CPU, as NumPy."""
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            placed = jax.device_put(arguments, device)
            found.append(jax.tree.map(np.asarray, jax.jit(function)(*placed)))
    return found


def close(found, expected, bound):
    """Within `bound` of the expected values' spread."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= bound * max(float(np.std(b)), 1e-3), np.abs(a - b).max()


def test_there_is_an_accelerator():
    assert jax.default_backend() in ("gpu", "tpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients(name):
    config = presets.get(f"tiny-{name}").make()
    model = build(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (3, 75), np.int32))
    segments = jnp.sort(jax.random.randint(jax.random.key(2), (3, 75), 1, 4), axis=1)
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)

    def logits(params):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(tokens, segment_ids=segments)

    def loss(params):
        nnx.replace_by_pure_dict(state, params)
        batch = {"tokens": tokens, "segment_ids": segments}
        return objectives.next_token()(nnx.merge(graph, state), batch)[0]

    close(*on_both(logits, params), bound=1e-4)
    close(*on_both(jax.grad(loss), params), bound=2e-3)


@pytest.mark.parametrize("chunk", [None, 96, 700])
@pytest.mark.parametrize("length", [75, 1500])
def test_attention_and_its_gradient(chunk, length):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, length, heads, 32)).astype(np.float32) * 32**-0.25
        for heads in (4, 2, 2)
    )
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    segments = (positions > length // 3).astype(np.int32)

    def weighed(q, k, v):
        where = attention.Where(jnp.asarray(positions), jnp.asarray(segments))
        plain = attention.self_attention(q, k, v, chunk=chunk)
        out = plain + attention.self_attention(q, k, v, where, chunk=chunk)
        return (out**2).sum(), out

    gradient = jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)
    close(*on_both(gradient, q, k, v), bound=1e-4)


def test_experts_with_and_without_rows():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((37, 24)).astype(np.float32)
    weights = [
        rng.standard_normal(shape).astype(np.float32) / 5
        for shape in ((5, 24, 40), (5, 24, 40), (5, 40, 24))
    ]
    sizes = np.array([11, 0, 20, 0, 4], np.int32)

    def total(x, *weights):
        y = experts.grouped_swiglu(x, *weights, jnp.asarray(sizes))
        return (y**2).sum(), y

    close(*on_both(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True), x, *weights), bound=1e-4)


def test_greedy_tokens():
    config = presets.get("tiny-llama4-scout").make()
    prompts = np.random.default_rng(4).integers(0, config.vocab_size, (2, 21)).tolist()
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            model = jax.device_put(build(config), device)
            found.append(inference.generate(model, prompts, max_new_tokens=40).tokens)
    assert found[0] == found[1]


def test_training_learns_in_bfloat16():
    config = presets.get("tiny-llama4-scout").make()
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (4, 50), np.int32)
    run = trainer.Training(
        build(config, dtype="bfloat16"),
        objectives.next_token(),
        optimizers.adamw(optax.constant_schedule(3e-3)),
    )
    losses = [float(m["loss"]) for m in run.run([{"tokens": tokens}] * 30, 30)]
    assert losses[-1] < 0.5 * losses[0]
