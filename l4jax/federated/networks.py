"""Small networks for images and spectrograms, with layers that keep their names.

Layers are called `conv1`, `conv2`, … `fc1`, … `output`: the groups that divergence is told by. On
CPUs a convolution is a product over patches: in the body of a loop XLA's own is about ten times
slower there (github.com/jax-ml/jax/issues/12868).

Letters: b batch, h height, w width, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l4jax import sharding
from l4jax.federated.local import Batch, Loss, mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What a classifier is made of."""

    shape: tuple[int, int, int]
    """Of an input: height, width, channels."""
    classes: int = 10
    convolutions: tuple[int, ...] = (16, 32)
    """Channels of each; every one is followed by ReLU and max-pooling by 2."""
    kernel: int = 3
    dense: tuple[int, ...] = (64,)
    """Widths of hidden layers behind them."""
    provenance: str = "our own"
    """Where the sizes come from."""


_RECALLED = "recalled from memory of Zhao et al. (2018), not read in it: a candidate"
PAPER = {
    "mnist": Network(
        shape=(28, 28, 1),
        convolutions=(32, 64),
        kernel=5,
        dense=(512,),
        provenance=f"{_RECALLED}; the network of McMahan et al. (2017)",
    ),
    "cifar10": Network(
        shape=(32, 32, 3),
        convolutions=(64, 64),
        kernel=5,
        dense=(384, 192),
        provenance=f"{_RECALLED}; the network of TensorFlow's CIFAR-10 tutorial",
    ),
    "speech_commands": Network(
        shape=(50, 10, 1),
        convolutions=(64, 64),
        kernel=5,
        dense=(128,),
        provenance="two convolutions and dense layers as the paper has; its sizes are not known",
    ),
}
"""Candidates for the networks of the paper."""


class Dense(nnx.Module):
    """x @ kernel + bias."""

    def __init__(self, inputs: int, outputs: int, *, gain: float, rngs: nnx.Rngs) -> None:
        scale = gain * inputs**-0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """From [… inputs] to [… outputs]."""
        return x @ self.kernel[...] + self.bias[...]


class Convolution(nnx.Module):
    """A convolution that keeps height and width."""

    def __init__(self, size: int, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        shape = (size, size, inputs, outputs)
        scale = (2 / (size * size * inputs)) ** 0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """From [b h w c] to [b h w c']."""
        kernel = self.kernel[...]
        if sharding.platform() != "cpu":
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
            return y + self.bias[...]
        size, (_, h, w, _) = kernel.shape[0], x.shape
        low, high = (size - 1) // 2, size // 2
        padded = jnp.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
        shifts = [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
        patches = jnp.concatenate(shifts, -1)
        return patches @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...]


class Classifier(nnx.Module):
    """A network, as an NNX module."""

    def __init__(self, network: Network, *, rngs: nnx.Rngs) -> None:
        h, w, channels = network.shape
        self.names: tuple[str, ...] = ()
        for number, outputs in enumerate(network.convolutions, 1):
            layer = Convolution(network.kernel, channels, outputs, rngs=rngs)
            self._add(f"conv{number}", layer)
            h, w, channels = -(-h // 2), -(-w // 2), outputs
        width = h * w * channels
        for number, outputs in enumerate(network.dense, 1):
            self._add(f"fc{number}", Dense(width, outputs, gain=2**0.5, rngs=rngs))
            width = outputs
        self._add("output", Dense(width, network.classes, gain=0.5**0.5, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [b classes] of inputs [b h w c]."""
        for name in self.names:
            layer = getattr(self, name)
            if isinstance(layer, Convolution):
                x = _pool(jax.nn.relu(layer(x)))
                continue
            x = layer(x.reshape(x.shape[0], -1))
            x = x if name == "output" else jax.nn.relu(x)
        return x

    def _add(self, name: str, layer: nnx.Module) -> None:
        setattr(self, name, layer)
        self.names = (*self.names, name)


def _pool(x: jax.Array) -> jax.Array:
    """Largest of 2 × 2; a last odd row or column stays by itself."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf)
    return x.reshape(b, -(-h // 2), 2, -(-w // 2), 2, c).max((2, 4))


def functional(module: nnx.Module) -> tuple[dict[str, Any], Callable[[Any, jax.Array], jax.Array]]:
    """A module's parameters as a nested dict, and its function of parameters and input."""
    graph, state = nnx.split(module)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        abstract = jax.tree.map(lambda v: v, state)
        nnx.replace_by_pure_dict(abstract, params)
        return nnx.merge(graph, abstract)(x)

    return nnx.to_pure_dict(state), apply


def classification(apply: Callable[[Any, jax.Array], jax.Array]) -> Loss:
    """Mean cross-entropy of batches with inputs "x" and labels "y", Int[b]."""

    def loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        logits = apply(params, batch["x"])
        return mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]), batch)

    return loss


def accuracy(
    apply: Callable[[Any, jax.Array], jax.Array], x: Any, y: Any, *, batch: int = 1000
) -> Callable[[Any], dict[str, float]]:
    """A function of parameters: the share of inputs whose label gets the largest logit."""
    x, y = jnp.asarray(x), jnp.asarray(y)

    @jax.jit
    def right(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.argmax(apply(params, x), -1) == y)

    def measure(params: Any) -> dict[str, float]:
        pieces = range(0, len(y), batch)
        found = sum(int(right(params, x[i : i + batch], y[i : i + batch])) for i in pieces)
        return {"accuracy": found / len(y)}

    return measure
