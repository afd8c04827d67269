"""Writes fedjax.npz: what FedJAX 0.0.17 computes, for tests/test_federated_algorithms.py.

It runs with an old JAX only, so in an environment of its own, by Python 3.11:

    python3.11 -m venv .venv-fedjax && . .venv-fedjax/bin/activate
    pip install fedjax==0.0.17 jax==0.4.23 jaxlib==0.4.23 'numpy<2' 'scipy<1.12' \
        dm-haiku==0.0.11 optax==0.1.9 chex==0.1.85
    python tests/golden/fedjax_oracle.py
"""

import pathlib

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

ROUNDS, EPOCHS, RATE = 5, 3, 0.1
EQUAL, UNEQUAL = [15] * 6, [5, 20, 15, 10, 5, 35]
"""Sizes of the clients: one batch of 15 each, or batches of 5 in the rows' order."""


def grad(params, batch, rng):
    def loss(params):
        hidden = jnp.tanh(batch["x"] @ params["fc1"]["kernel"] + params["fc1"]["bias"])
        logits = hidden @ params["output"]["kernel"] + params["output"]["bias"]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(batch["y"])), batch["y"]])

    return jax.grad(loss)(params)


def main():
    rng = np.random.default_rng(5)
    y = np.repeat(np.arange(3), 30).astype(np.int32)
    x = (rng.standard_normal((90, 7)) + np.eye(7)[y]).astype(np.float32)
    params = {
        "fc1": {"kernel": rng.standard_normal((7, 5)), "bias": np.zeros(5)},
        "output": {"kernel": rng.standard_normal((5, 3)), "bias": np.zeros(3)},
    }
    params = jax.tree_util.tree_map(lambda a: jnp.asarray(a, jnp.float32), params)
    found = {"x": x, "y": y, "equal": np.array(EQUAL), "unequal": np.array(UNEQUAL)}

    def record(name, params):
        for layer, arrays in params.items():
            for kind, array in arrays.items():
                found[f"{name}/{layer}/{kind}"] = np.asarray(array)

    record("start", params)
    servers = {
        "sgd": fedjax.optimizers.sgd(1.0),
        "momentum": fedjax.optimizers.sgd(0.7, momentum=0.9),
        "adam": fedjax.optimizers.adam(0.01, b1=0.9, b2=0.99, eps=1e-3),
        "yogi": fedjax.optimizers.yogi(0.01, b1=0.9, b2=0.99, eps=1e-3),
    }
    for partition, sizes, batch in (("equal", EQUAL, 15), ("unequal", UNEQUAL, 5)):
        edges = np.cumsum([0, *sizes])
        for name, server in servers.items():
            hparams = fedjax.ShuffleRepeatBatchHParams(
                batch_size=batch, num_epochs=EPOCHS, skip_shuffle=True
            )
            algorithm = fedjax.algorithms.fed_avg.federated_averaging(
                grad, fedjax.optimizers.sgd(RATE), server, hparams
            )
            state = algorithm.init(params)
            for _ in range(ROUNDS):
                clients = [
                    (
                        str(k).encode(),
                        fedjax.ClientDataset({"x": x[a:b], "y": y[a:b]}),
                        jax.random.PRNGKey(k),
                    )
                    for k, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
                ]
                state, _ = algorithm.apply(state, clients)
            record(f"{partition}/{name}", state.params)
    np.savez_compressed(pathlib.Path(__file__).with_name("fedjax.npz"), **found)


if __name__ == "__main__":
    main()
