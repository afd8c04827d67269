"""Data sets made by arithmetic, for where nothing can be downloaded: they stand for no real ones.

Textures and keywords have ten classes and arrays "x" [n h w c], Float32, and "y" [n], Int32, as
many of each class, in the classes' order; languages have words instead. The classes are always the
same; the seed draws the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

CLASSES = 10
TEXTURES, KEYWORDS = (16, 16, 3), (50, 10, 1)
"""Shapes of an example."""
_PROTOTYPES = 3
"""Patterns of a class of textures, and tracks of one of keywords."""


def textures(each: int, *, seed: int, noise: float = 0.5) -> dict[str, np.ndarray]:
    """Images: one of three smooth colour patterns of their class, shifted and perhaps mirrored.

    Contrast varies; a faint pattern of any class and band-limited noise lie over it, and a cast of
    colour.

    Args:
        each: examples of a class.
        seed: of the examples.
        noise: standard deviation.
    """
    rng, height = np.random.default_rng(1234), TEXTURES[0]
    patterns = [[_smooth(rng, 0.12) for _ in range(_PROTOTYPES)] for _ in range(CLASSES)]

    def one(label: int, rng: np.random.Generator) -> np.ndarray:
        image = patterns[label][rng.integers(_PROTOTYPES)]
        image = np.roll(image, rng.integers(-3, 4, 2), (0, 1))
        if rng.random() < 0.5:
            image = image[:, ::-1]
        clutter = patterns[rng.integers(CLASSES)][rng.integers(_PROTOTYPES)]
        clutter = np.roll(clutter, rng.integers(-(height // 2), height // 2 + 1, 2), (0, 1))
        image = rng.uniform(0.6, 1.4) * image + rng.uniform(0, 0.7) * clutter
        image = image + noise * _smooth(rng, 0.3) + 0.3 * rng.standard_normal(3)
        return 0.5 * image

    return _collect(one, each, seed)


def keywords(each: int, *, seed: int, noise: float = 0.7) -> dict[str, np.ndarray]:
    """Spectrograms, 50 frames of 10 bands: three drifting, swaying tracks as formants of a word.

    Spoken earlier or later, faster or slower, higher or lower, louder or softer, over noise.

    Args:
        each: examples of a class.
        seed: of the examples.
        noise: standard deviation in a band, beside tracks of height 2.
    """
    frames, bands = KEYWORDS[:2]
    rng = np.random.default_rng(77)
    words = [
        {
            "center": rng.uniform(0, bands, _PROTOTYPES),
            "drift": rng.uniform(-0.25, 0.25, _PROTOTYPES),
            "phase": rng.uniform(0, 2 * np.pi, _PROTOTYPES),
            "sway": rng.uniform(0.05, 0.2, _PROTOTYPES),
            "ends": rng.uniform(8, 20, 2),
        }
        for _ in range(CLASSES)
    ]

    def one(label: int, rng: np.random.Generator) -> np.ndarray:
        word = words[label]
        time = (np.arange(frames) - rng.integers(-8, 9)) * rng.uniform(0.8, 1.25)
        speaker, x = rng.normal(), np.zeros((frames, bands))
        spoken = (time > word["ends"][0] - 4) & (time < frames + 8 - word["ends"][1])
        for track in range(_PROTOTYPES):
            sway = 2 * np.sin(word["sway"][track] * time + word["phase"][track])
            drift = word["drift"][track] * (time - frames / 2)
            center = (word["center"][track] + speaker + drift + sway) % bands
            distance = np.abs(np.arange(bands) - center[:, None])
            distance = np.minimum(distance, bands - distance)
            x += spoken[:, None] * np.exp(-(distance**2) / 2) * (1 - 0.2 * track)
        x = 2 * rng.uniform(0.6, 1.4) * x + noise * rng.standard_normal(x.shape)
        return 0.5 * (x + rng.normal(0, 0.4, bands))[..., None]

    return _collect(one, each, seed)


def _collect(
    one: Callable[[int, np.random.Generator], np.ndarray], each: int, seed: int
) -> dict[str, np.ndarray]:
    if each < 1:
        raise ValueError(f"each {each}: there must be at least one example of a class")

    def examples() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for label in range(CLASSES):
            for _ in range(each):
                yield one(label, rng)

    x = np.stack(list(examples())).astype(np.float32)
    return {"x": x, "y": np.repeat(np.arange(CLASSES, dtype=np.int32), each)}


def _smooth(rng: np.random.Generator, cut: float) -> np.ndarray:
    """An image of noise of standard deviation 1 without frequencies much above `cut`."""
    h, w, _ = TEXTURES
    spectrum = np.fft.fft2(rng.standard_normal(TEXTURES), axes=(0, 1))
    squared = np.fft.fftfreq(h)[:, None, None] ** 2 + np.fft.fftfreq(w)[None, :, None] ** 2
    image = np.real(np.fft.ifft2(spectrum * np.exp(-squared / (2 * cut**2)), axes=(0, 1)))
    return image / image.std()


def languages(
    count: int, each: int, *, length: int, vocabulary: int, seed: int
) -> dict[str, np.ndarray]:
    """Texts of languages that share their words, and not what follows what: domains far apart.

    A language is a table of which word comes after which, its rows from a sparse Dirichlet
    distribution (concentration 0.08). The tables are always the same; the seed draws the texts.

    Args:
        count: languages.
        each: texts of a language.
        length: words of a text.
        vocabulary: words there are.
        seed: of the texts.

    Returns:
        "tokens", Int32[count · each, length], and "y", the language of each, in their order.
    """
    tables, rng = np.random.default_rng(0), np.random.default_rng([seed, 1])
    found = []
    for _ in range(count):
        table = tables.dirichlet(np.full(vocabulary, 0.08), vocabulary).cumsum(1)
        text = np.zeros((each, length), np.int32)
        text[:, 0] = rng.integers(vocabulary, size=each)
        for t in range(1, length):
            below = table[text[:, t - 1]] < rng.random((each, 1))
            text[:, t] = np.minimum(below.sum(1), vocabulary - 1)
        found.append(text)
    return {
        "tokens": np.concatenate(found),
        "y": np.repeat(np.arange(count, dtype=np.int32), each),
    }
