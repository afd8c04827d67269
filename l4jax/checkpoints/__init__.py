"""Models on disk: Hugging Face's format, Meta's and Orbax's; loading, saving and converting."""

from l4jax.checkpoints.companions import licence_of as licence_of
from l4jax.checkpoints.convert import convert as convert
from l4jax.checkpoints.directory import describe as describe
from l4jax.checkpoints.directory import detect as detect
from l4jax.checkpoints.directory import load as load
from l4jax.checkpoints.directory import read_config as read_config
from l4jax.checkpoints.directory import read_model as read_model
from l4jax.checkpoints.directory import save as save
from l4jax.checkpoints.manifest import verify as verify
from l4jax.checkpoints.plan import Options as Options
