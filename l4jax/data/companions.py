"""The JSON files that stand beside the weights of an exported Hugging Face directory.

Each function returns the content of one or more files as dictionaries. The values are those of
Meta's published models as transformers' classes and converter have them; the published files
themselves were not readable when this was written.
"""

from collections.abc import Sequence
from typing import Any


def generation_config(
    *, bos_id: int | None, stop_ids: Sequence[int], pad_id: int | None
) -> dict[str, Any]:
    """generation_config.json: which tokens begin, end and pad, and how Meta samples.

    Temperature 0.6 and nucleus 0.9 are the defaults of Llama 3 and Llama 4 alike. The ids are those
    of `Tokenizer`; what is None is left out.

    Raises:
        ValueError: If no id ends a generation, which would run until its limit.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty; give the ids that end a generation")
    ids = {"bos_token_id": bos_id, "eos_token_id": list(stop_ids), "pad_token_id": pad_id}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {name: value for name, value in ids.items() if value is not None} | sampling


def processor_configs(
    *, image_size: int = 336, patch_size: int = 14, max_tiles: int = 16, shuffle_ratio: float = 0.5
) -> dict[str, dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a Llama 4 that reads images.

    The first tells how an image becomes tiles (transformers' Llama4ImageProcessor), the second how
    an image becomes tokens in a text (Llama4Processor). The image processor goes by the name that
    ends in Fast: transformers 4 has no other, and transformers 5 still takes it.

    Args:
        image_size: Height and width of a tile in pixels.
        patch_size: Height and width of a patch in pixels.
        max_tiles: The most tiles that an image is cut into.
        shuffle_ratio: By how much pixel shuffle shrinks each axis of a tile's grid of patches.

    Raises:
        ValueError: If a tile is not a whole number of patches.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    tokens = {
        "fake_image_token": "<|image|>",
        "image_token": "<|image|>",
        "start_of_image_token": "<|image_start|>",
        "end_of_image_token": "<|image_end|>",
        "patch_token": "<|patch|>",
        "tile_x_separator_token": "<|tile_x_separator|>",
        "tile_y_separator_token": "<|tile_y_separator|>",
    }
    images = {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 2,  # bilinear, in the numbering of Pillow
        "max_patches": max_tiles,  # transformers calls a tile a patch here
        "resize_to_max_canvas": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    text = {
        "processor_class": "Llama4Processor",
        "patch_size": patch_size,
        "pixel_shuffle_ratio": shuffle_ratio,
    }
    return {"preprocessor_config.json": images, "processor_config.json": text | tokens}
