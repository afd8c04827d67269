"""Images as Llama 4 takes them: tiles of pixels for the encoder, tokens for the prompt.

An image goes on the canvas of whole tiles that suits it best, is cut into them, and comes once more
as a whole, squeezed into one tile. In the prompt each tile has a run of patch tokens.

    settings = of_checkpoint(directory, vision_config)
    (photo,) = process(["photo.jpg"], settings)
    ids = layout(photo.grid, tok, settings.tokens_per_tile)

Pixels are resized by Pillow in 8 bits. That is what Meta's `llama4/preprocess.py` does, and tiles
are bit for bit its own. transformers' Llama4ImageProcessor resizes with torch, whose coefficients
have fewer bits: of photos that are shrunk less than one in a thousand of its values lies one step
of 1/255 away, of tiny ones that are enlarged up to one in ten; and it rounds all to bfloat16.

Letters: n tiles of an image, c channels, y and x pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from l4jax.config import VisionConfig
from l4jax.data.images_reading import read as read
from l4jax.data.images_reading import title as title
from l4jax.data.tokenizer import Tokenizer

Grid = tuple[int, int]
"""Rows and columns of tiles."""
PLACEHOLDER = "<|image|>"
"""Where an image belongs in the text of a prompt."""
PATCH = "<|patch|>"
"""The token in whose place a feature of an image stands."""
_BILINEAR = Image.Resampling.BILINEAR  # antialiased; transformers' files have its number, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How images become tiles; the defaults are those of all published Llama 4 models."""

    tile_size: int = 336
    """Pixels of a tile's side."""
    max_tiles: int = 16
    """Most tiles of an image, besides the one of the whole."""
    resize_to_max_canvas: bool = False
    """Enlarge every image as far as the tiles go. Else it is only shrunk, if it has too many
    pixels, or enlarged to the side of a tile, if it is smaller than one."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Taken from red, green and blue, which go from 0 to 1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides what is left."""
    tokens_per_tile: int = 144
    """Features of a tile, and patch tokens in the prompt."""

    def __post_init__(self) -> None:
        for name in ("tile_size", "max_tiles", "tokens_per_tile"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive: pixels are divided by it")


class Tiled(NamedTuple):
    """An image as the encoder takes it.

    tiles: normalised pixels, row by row, and the whole image last if there are several.
    grid: rows and columns of tiles.
    """

    tiles: Float32[np.ndarray, "n c y x"]
    grid: Grid


class Picture(NamedTuple):
    """An image that is measured, but not cut yet: its tokens need no more.

    content: of its file.
    grid: as of `Tiled`.
    """

    content: bytes
    grid: Grid

    @property
    def tiles(self) -> int:
        """How many there will be."""
        count = self.grid[0] * self.grid[1]
        return count + (count > 1)


class Fit(NamedTuple):
    """Where an image goes: a grid of tiles, of which it covers `height` by `width` pixels."""

    grid: Grid
    height: int
    width: int


# --- Settings ------------------------------------------------------------------------------------
def of_checkpoint(
    directory: str | os.PathLike[str], vision: VisionConfig, *, max_tiles: int = 16
) -> Settings:
    """The settings that a checkpoint's processor files give, or else those of its encoder.

    Args:
        directory: may hold a processor_config.json with an "image_processor", as transformers 5
            writes it, or a preprocessor_config.json.
        vision: the encoder's configuration.
        max_tiles: where no file says it.

    Raises:
        ValueError: a file asks for what is not supported, or for tiles of another size than the
            encoder's.
    """
    base = Settings(
        tile_size=vision.image_size,
        max_tiles=max_tiles,
        tokens_per_tile=(vision.side // vision.pixel_shuffle) ** 2,
    )
    folder = pathlib.Path(directory)
    whole = folder / "processor_config.json"
    values = _object(whole).get("image_processor") if whole.is_file() else None
    file = whole
    if values is None and (file := folder / "preprocessor_config.json").is_file():
        values = _object(file)
    if values is None:
        return base
    try:
        return _from_fields(values, base)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _object(file: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object")
    return values


def _from_fields(values: Mapping[str, Any], base: Settings) -> Settings:
    """Settings from the fields of transformers' Llama4ImageProcessor; null is its default."""
    given = {name: value for name, value in values.items() if value is not None}
    size = given.get("size", {"height": base.tile_size, "width": base.tile_size})
    side = base.tile_size
    if not isinstance(size, Mapping) or (size.get("height"), size.get("width")) != (side, side):
        raise ValueError(f"size {size} must be the encoder's, {side} by {side} pixels")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(step, True) is not True:
            raise ValueError(f"{step} {given[step]} is not supported: the encoder needs the step")
    scale = given.get("rescale_factor", 1 / 255)
    if not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor {scale} must be 1/255, for pixels from 0 to 1")
    how, most = given.get("resample", _BILINEAR), given.get("max_patches", base.max_tiles)
    if how != _BILINEAR:
        raise ValueError(f"resample {how!r} is not supported, only {_BILINEAR:d}, bilinear")
    if not isinstance(most, int):
        raise ValueError(f"max_patches {most!r} must be a whole number")
    return dataclasses.replace(
        base,
        max_tiles=most,
        resize_to_max_canvas=bool(given.get("resize_to_max_canvas", False)),
        mean=_channels(given.get("image_mean", base.mean), "image_mean"),
        std=_channels(given.get("image_std", base.std), "image_std"),
    )


def _channels(values: Any, name: str) -> tuple[float, float, float]:
    if not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"{name} {values} must hold a number for red, green and blue each")
    red, green, blue = map(float, values)
    return red, green, blue


# --- Pixels --------------------------------------------------------------------------------------
def process(
    sources: Sequence[Any], settings: Settings = Settings(), *, names: Sequence[str] | None = None
) -> list[Tiled]:
    """The tiles of every image; several are worked on at once, in threads.

    Args:
        sources: whatever `read` takes.
        settings: how they become tiles.
        names: what to call them in errors.

    Raises:
        ValueError: as `read` does.
    """
    called = [None] * len(sources) if names is None else names

    def one(source: Any, name: str | None) -> Tiled:
        return tile(read(source, name=name), settings)

    threads = min(len(sources), os.cpu_count() or 1)
    if threads < 2:
        return list(map(one, sources, called))
    # Pillow and NumPy let other threads run while they work on pixels.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, sources, called))


def tile(image: Image.Image, settings: Settings = Settings()) -> Tiled:
    """The tiles of an image that is in RGB."""
    side, place = settings.tile_size, fit(*image.size[::-1], settings)
    rows, columns = place.grid
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(_resized(image, place.width, place.height))
    several = rows * columns > 1
    tiles = np.empty((rows * columns + several, 3, side, side), np.float32)
    _normalise(canvas, settings, tiles[: rows * columns].reshape(rows, columns, 3, side, side))
    if several:
        _normalise(_resized(image, side, side), settings, tiles[-1][None, None])
    return Tiled(tiles, (rows, columns))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), _BILINEAR)


def fit(height: int, width: int, settings: Settings = Settings()) -> Fit:
    """Where an image of this size goes.

    Of all grids the one that enlarges the image least; if none can hold it whole, the one that
    shrinks it least; of equals, the one with the fewest tiles.
    """
    grids, side = _grids(settings.max_tiles), settings.tile_size
    # In float32, as both references compare them.
    sizes = (grids * side).astype(np.float32)
    scales = np.minimum(sizes[:, 0] / np.float32(height), sizes[:, 1] / np.float32(width))
    grows = scales[scales >= 1]
    wanted = scales.max() if settings.resize_to_max_canvas or not len(grows) else grows.min()
    equal = grids[scales == wanted]
    rows, columns = (int(n) for n in equal[equal.prod(axis=1).argmin()])
    box = rows * side, columns * side
    if not settings.resize_to_max_canvas:
        box = min(max(height, side), box[0]), min(max(width, side), box[1])
    by_height, by_width = box[0] / height, box[1] / width
    if by_width < by_height:
        return Fit((rows, columns), max(1, min(math.floor(height * by_width), box[0])), box[1])
    return Fit((rows, columns), box[0], max(1, min(math.floor(width * by_height), box[1])))


@functools.cache
def _grids(most: int) -> np.ndarray:
    """All grids of up to `most` tiles, [g 2]."""
    every = range(1, most + 1)
    return np.array([(rows, columns) for rows in every for columns in every[: most // rows]])


def _normalise(canvas: Image.Image, settings: Settings, out: np.ndarray) -> None:
    """Writes (pixels / 255 - mean) / std of a canvas into tiles [rows columns c y x] of float32.

    It is rounded after every step, as Meta's is. Where std is a power of two, as in all published
    models, the last division is exact, and comes with the first.
    """
    rows, columns, _, y, x = out.shape
    for n, band in enumerate(canvas.split()):
        pixels = np.asarray(band).reshape(rows, y, columns, x).swapaxes(1, 2)
        channel = out[:, :, n]
        mean, std = np.float32(settings.mean[n]), np.float32(settings.std[n])
        exact = np.frexp(std)[0] == 0.5
        first = std if exact else np.float32(1)
        np.divide(pixels, np.float32(255) * first, out=channel, dtype=np.float32)
        np.subtract(channel, mean / first, out=channel)
        if not exact:
            np.divide(channel, std, out=channel)


# --- Tokens --------------------------------------------------------------------------------------
def layout(grid: Grid, tokenizer: Tokenizer, tokens_per_tile: int = 144) -> list[int]:
    """The tokens of an image in a prompt.

    One tile is `<|image_start|> <|image|> patches <|image_end|>`. Of several, those of a row are
    separated by `<|tile_x_separator|>`, every row ends with `<|tile_y_separator|>`, and the tile of
    the whole comes after `<|image|>`.

    Raises:
        ValueError: the tokenizer lacks one of these tokens.
    """
    patches = [special(tokenizer, PATCH)] * tokens_per_tile
    start, image, end = (
        special(tokenizer, name) for name in ("<|image_start|>", "<|image|>", "<|image_end|>")
    )
    rows, columns = grid
    ids = [start]
    if rows * columns > 1:
        beside = special(tokenizer, "<|tile_x_separator|>")
        below = special(tokenizer, "<|tile_y_separator|>")
        row = ([*patches, beside] * columns)[:-1]
        ids += [*row, below] * rows
    return [*ids, image, *patches, end]


def special(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token that images need; a ValueError if there is none."""
    if name not in tokenizer.special:
        raise ValueError(
            f"the tokenizer has no {name}, which images need; use the tokenizer of a Llama 4 that "
            f"reads images"
        )
    return tokenizer.special[name]


def prompt(
    text: str, images: Sequence[Tiled], tokenizer: Tokenizer, tokens_per_tile: int = 144
) -> list[int]:
    """The tokens of a prompt with images, begin_of_text first if the tokenizer has it.

    Args:
        text: each `<|image|>` in it stands for an image; if there is none, all come before it.
        images: in order.
        tokenizer: supplies the ids.
        tokens_per_tile: patch tokens of a tile.

    Raises:
        ValueError: there are more or fewer `<|image|>` than images, or the tokenizer lacks a token.
    """
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for part in parts(text, images):
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            ids += layout(part.grid, tokenizer, tokens_per_tile)
    return ids


def parts(text: str, images: Sequence[Any]) -> list[Any]:
    """The pieces of a text and, where its `<|image|>` stand or else in front, the images.

    Raises:
        ValueError: there are more or fewer `<|image|>` than images.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return [*images, text]
    if len(pieces) - 1 != len(images):
        raise ValueError(
            f"the text has {len(pieces) - 1} {PLACEHOLDER} for {len(images)} images; write one for "
            f"each, or none to have them in front"
        )
    mixed = [x for pair in zip(pieces, images, strict=False) for x in pair]
    return [part for part in (*mixed, pieces[-1]) if not isinstance(part, str) or part]
