"""Models on disk: Hugging Face's format, Meta's and Orbax's; loading, saving and converting.

What a file is for, from the ground up:

- files: `safetensors`, `pth` (PyTorch's, without torch), `rows` (tensors by rows, with hashes)
- names: `tables` (rules, used in both directions), `llama3`, `llama4`, `vision` (one per family)
- descriptions: `fields` (config.json), `params` (params.json), `compressed` (quantized packages)
- formats: `formats` (what they share: a `Source` to read, a `Target` to write), `huggingface`,
  `meta`, `orbax` (models), `arrays` (the same, slice by slice) and `stores` (on the disk)
- in memory: `directory` (detects the format), `loading` (a model from a `Source`)
- conversion: `plan`, `convert`, `journal` (resuming), `manifest` (checksums, `verify`),
  `companions` and `licences` (what travels beside the weights), `remote` (gs://, s3://)
"""

from l4jax.checkpoints.companions import carried as carried
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
