"""Tokens from a model: sampling, and generation with a key-value cache."""

from l4jax.inference.decoding import generate as generate
from l4jax.inference.decoding import stream as stream
