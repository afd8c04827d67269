"""Companion files of an export: their values, and that transformers takes them."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4jax.data import tokenizer as tk
from l4jax.data.companions import generation_config, processor_configs
from l4jax.data.templates import chat_template

CONFIG = generation_config(bos_id=200_000, stop_ids=(200_001, 200_007, 200_008), pad_id=200_018)


def test_generation_config() -> None:
    assert CONFIG == {
        "bos_token_id": 200_000,
        "eos_token_id": [200_001, 200_007, 200_008],
        "pad_token_id": 200_018,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert json.loads(json.dumps(CONFIG)) == CONFIG
    bare = generation_config(bos_id=None, stop_ids=[0], pad_id=None)
    assert list(bare) == ["eos_token_id", "do_sample", "temperature", "top_p"]
    with pytest.raises(ValueError, match="stop_ids is empty"):
        generation_config(bos_id=1, stop_ids=[], pad_id=0)


def test_processor_configs() -> None:
    files = processor_configs()
    assert list(files) == ["preprocessor_config.json", "processor_config.json"]
    assert json.loads(json.dumps(files)) == files
    assert files["preprocessor_config.json"]["size"] == {"height": 336, "width": 336}
    # Whatever an image or a text names is a special token of Llama 4.
    names = {v for k, v in files["processor_config.json"].items() if k.endswith("_token")}
    assert len(names) == 6
    assert names <= set(tk.SPECIAL_NAMES["llama4"])
    other = processor_configs(image_size=28, patch_size=7, max_tiles=3, shuffle_ratio=0.25)
    assert other["preprocessor_config.json"]["max_patches"] == 3
    assert other["processor_config.json"]["patch_size"] == 7
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of patch_size 14"):
        processor_configs(image_size=30)


@pytest.mark.parity
def test_transformers_reads_the_generation_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
    (tmp_path / "generation_config.json").write_text(json.dumps(CONFIG))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert CONFIG.items() <= theirs.to_dict().items()
    theirs.validate(strict=True)


@pytest.mark.parity
def test_processor_arguments_are_those_of_transformers() -> None:
    """Names and values that Llama4Processor has by default; its class needs no torchvision."""
    processing = pytest.importorskip("transformers.models.llama4.processing_llama4")
    accepted = inspect.signature(processing.Llama4Processor.__init__).parameters
    config: dict[str, Any] = processor_configs()["processor_config.json"]
    assert config.pop("processor_class") == processing.Llama4Processor.__name__
    assert config == {name: accepted[name].default for name in config}
    left = set(accepted) - set(config)
    assert left == {"self", "image_processor", "tokenizer", "chat_template", "kwargs"}


@pytest.mark.parity
def test_transformers_loads_the_processors(tmp_path: Path) -> None:
    """An export's companions make a processor that expands images and writes our template."""
    pytest.importorskip("torchvision", reason="the image processor of transformers needs it")
    transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
    imaging = pytest.importorskip("transformers.models.llama4.image_processing_llama4")

    ours = processor_configs()
    default = json.loads(json.dumps(imaging.Llama4ImageProcessor().to_dict()))
    known = {name: ours["preprocessor_config.json"][name] for name in default}
    assert known == default | {"image_processor_type": "Llama4ImageProcessorFast"}

    tok = tk.train(["What is this?"] * 3, vocab_size=280)
    names = [n for n in tk.SPECIAL_NAMES["llama4"] if n not in tok.special]
    spec = json.loads(tok._files["tokenizer.json"])
    spec["added_tokens"] += [
        spec["added_tokens"][0] | {"content": name, "id": tok.vocab_size + i}
        for i, name in enumerate(names)
    ]
    tok.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "chat_template.jinja").write_text(chat_template("llama4"))
    (tmp_path / "config.json").write_text('{"model_type": "llama4"}')
    for name, content in ours.items():
        (tmp_path / name).write_text(json.dumps(content))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == "Llama4Processor"

    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert text.endswith("\n\n<|image|>What is this?<|eot|>")
    image = np.zeros((480, 640, 3), np.uint8)
    out = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    assert out["pixel_values"].shape == (5, 3, 336, 336)
    ids = [int(i) for i in out["input_ids"][0]]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|patch|>")) == 5 * 144
    assert ids.count(tok.bos_id) == 1
