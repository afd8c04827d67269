"""Models on disk: loading and saving in Hugging Face's format and in Orbax's."""

from l4jax.checkpoints.directory import detect as detect
from l4jax.checkpoints.directory import load as load
from l4jax.checkpoints.directory import read_config as read_config
from l4jax.checkpoints.directory import save as save
