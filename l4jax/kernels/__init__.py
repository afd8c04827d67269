"""The operations worth more than one implementation: each a reference and fast paths.

What only a TPU can run is in `kernels.tpu`, and imported where a TPU is about to run it.
"""

from __future__ import annotations

import importlib
from typing import Any


def on_tpu(module: str) -> Any:
    """A module of `kernels.tpu`."""
    return importlib.import_module(f"l4jax.kernels.tpu.{module}")
