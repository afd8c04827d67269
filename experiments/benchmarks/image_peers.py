"""The image processors of transformers and of Meta, where torchvision is not installed.

Both call a handful of torchvision's functions, which only pass on to torch and to Pillow. The few
lines below do the same; with torchvision 0.28 in their place, tiles come out bit for bit the same
(checked on the photos and sizes of `tests/parity/test_image_references.py`).
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


class Interpolation(enum.Enum):
    """Called InterpolationMode in torchvision."""

    BILINEAR = "bilinear"
    LANCZOS = "lanczos"  # named, but not used


def resize(
    image: Any,
    size: Sequence[int],
    interpolation: Interpolation = Interpolation.BILINEAR,
    *,
    antialias: bool = True,
) -> Any:
    """An image of Pillow, or a tensor [... c y x] uint8, in another size (height, width)."""
    if isinstance(image, Image.Image):
        return image.resize(tuple(size)[::-1], Image.Resampling[interpolation.name])
    flat = image.reshape(-1, *image.shape[-3:])
    mode = interpolation.value
    # Without these instructions torch has no kernel for uint8, and torchvision goes by float32.
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    pixels = flat if native else flat.to(torch.float32)
    pixels = torch.nn.functional.interpolate(pixels, list(size), mode=mode, antialias=antialias)
    if not native:
        pixels = pixels.clamp_(0, 255).round_().to(torch.uint8)
    return pixels.reshape(*image.shape[:-2], *size)


def pad(image: torch.Tensor, padding: Sequence[int], fill: Sequence[int] = (0,)) -> torch.Tensor:
    """[... y x] with left, top, right and bottom borders of zeros."""
    left, top, right, bottom = padding
    assert not any(fill)
    return torch.nn.functional.pad(image, (left, right, top, bottom))


def normalize(
    image: torch.Tensor, mean: Sequence[float], std: Sequence[float], *, inplace: bool = False
) -> torch.Tensor:
    """(image - mean) / std of [... c y x], in the image's type."""
    shift, scale = (torch.as_tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
    return image.sub_(shift).div_(scale) if inplace else image.sub(shift).div_(scale)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[c y x] from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def _functions() -> types.SimpleNamespace:
    """What transformers takes from torchvision.transforms.v2.functional."""
    return types.SimpleNamespace(
        InterpolationMode=Interpolation,
        resize=resize,
        pad=pad,
        normalize=normalize,
        grayscale_to_rgb=lambda image: image,
    )


def _transforms() -> types.SimpleNamespace:
    """What Meta takes from torchvision.transforms."""

    def compose(steps):
        def run(image):
            for step in steps:
                image = step(image)
            return image

        return run

    return types.SimpleNamespace(
        InterpolationMode=Interpolation,
        Compose=compose,
        Resize=lambda size: lambda image: resize(image, size),
        ToTensor=lambda: to_tensor,
        Normalize=lambda mean, std, inplace: (
            lambda image: normalize(image, mean, std, inplace=inplace)
        ),
    )


def has_torchvision() -> bool:
    """Whether the peers can have what they ask for."""
    return importlib.util.find_spec("torchvision") is not None


def transformers_processor(**options: Any) -> Any:
    """transformers' Llama4ImageProcessor."""
    name = "transformers.models.llama4.image_processing_llama4"
    if has_torchvision():
        return importlib.import_module(name).Llama4ImageProcessor(**options)
    functions = _functions()
    # Imported first, as it looks for torchvision and had better not find a pretence.
    backends = importlib.import_module("transformers.image_processing_backends")
    with _pretended(functional=functions):
        module = importlib.import_module(name)
    backends.tvF = module.tvF = functions
    backends.pil_torch_interpolation_mapping = {Image.Resampling.BILINEAR: Interpolation.BILINEAR}
    return module.Llama4ImageProcessor(**options)


def meta_preprocess() -> Any:
    """Meta's module llama4/preprocess.py."""
    name = "llama_models.llama4.preprocess"
    if has_torchvision():
        return importlib.import_module(name)
    with _pretended(functional=types.SimpleNamespace(resize=resize)):
        module = importlib.import_module(name)
    # It may have been imported before, with something else in torchvision's place.
    module.tv, module.F = _transforms(), types.SimpleNamespace(resize=resize)
    return module


@contextlib.contextmanager
def _pretended(functional: Any) -> Iterator[None]:
    """While this is open, torchvision's modules can be imported."""
    v2 = types.SimpleNamespace(functional=functional)
    transforms = types.SimpleNamespace(**vars(_transforms()), functional=functional, v2=v2)
    modules: dict[str, Any] = {
        "torchvision": types.SimpleNamespace(transforms=transforms),
        "torchvision.transforms": transforms,
        "torchvision.transforms.v2": v2,
        "torchvision.transforms.functional": functional,
    }
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
