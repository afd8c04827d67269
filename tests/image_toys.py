"""A small Llama 4 tokenizer that knows images, and small files of images."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from l4jax.data import tokenizer as tokenizers

TEXTS = ["What is in this picture? A cat sits by the door, and a dog lies on the mat. naïve 🙂"]


@functools.cache
def tokenizer():
    """Trained on `TEXTS`."""
    return tokenizers.train(TEXTS, vocab_size=336, images=True)


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
