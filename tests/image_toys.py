"""A small Llama 4 tokenizer that knows images, and small files of images."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import tempfile

import numpy as np
from PIL import Image

NAMES = ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
TEXTS = ["What is in this picture? A cat sits by the door, and a dog lies on the mat. naïve 🙂"]


@functools.cache
def tokenizer():
    """Trained on `TEXTS`, with Llama 4's tokens for images behind its other tokens."""
    from l4jax.data import tokenizer as tk

    with tempfile.TemporaryDirectory() as folder:
        tk.train(TEXTS, vocab_size=330).save(folder)
        file = pathlib.Path(folder) / "tokenizer.json"
        spec = json.loads(file.read_text())
        last = spec["added_tokens"][-1]
        spec["added_tokens"] += [
            last | {"id": last["id"] + 1 + n, "content": f"<|{name}|>"}
            for n, name in enumerate(NAMES)
        ]
        file.write_text(json.dumps(spec))
        return tk.load(folder)


def noise(height, width, seed=0, channels=3):
    """An image of random pixels, [y x c] uint8."""
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    """The bytes of a file that holds an image, of Pillow's or [y x c]."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
