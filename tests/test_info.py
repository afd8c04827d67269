"""What `info` says of a preset or a checkpoint is what the model is."""

import io
import json

import pytest
from conftest import build
from rich.console import Console

from l4jax import checkpoints, info, presets, roofline
from l4jax.checkpoints.orbax import from_json
from l4jax.config import TextConfig

NAMES = [name for base in presets.PRESETS for name in (base, f"tiny-{base}")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Scout as a Hugging Face checkpoint, in a folder whose name looks like markup."""
    path = tmp_path_factory.mktemp("runs") / "scout[red]"
    checkpoints.save(build(presets.get("tiny-llama4-scout").make()), path, to="hf")
    return path


def printed(facts):
    console = Console(width=200, file=io.StringIO())
    info.show(facts, console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_a_preset_are_plain_json_and_consistent(name):
    facts = info.describe(name)
    config = presets.get(name).make()
    assert from_json(TextConfig, json.loads(json.dumps(facts))["config"]) == config
    parts = facts["parameters"]
    named = ("embedding", "head", "attention", "dense", "routers", "routed", "norms", "encoder")
    assert parts["total"] == sum(parts[part] for part in named)
    assert parts["active"] == parts["decoder"] - parts["routed"] + parts["routed_active"]
    assert (parts["encoder"] > 0) == (facts["vision"] is not None)
    assert facts["bytes"]["bfloat16"] == 2 * parts["total"]
    assert facts["bytes"]["int4"] == parts["total"] // 2
    assert len(facts["layers"]) == config.num_layers
    assert facts["flops_per_token"]["context"] == min(8192, config.max_context)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_printed_with_its_name_and_sizes(name):
    text = printed(info.describe(name))
    assert text.startswith(f"{name}\n")
    for word in ("in total", "active", "per token", "G forward", "bfloat16"):
        assert word in text
    for line in presets.get(name).assumed:
        assert line in text


def test_scout_in_words():
    text = printed(info.describe("llama4-scout"))
    assert "108.64 B in total, 17.17 B active" in text
    assert "107.77 B in the decoder, 871.93 M in the image encoder" in text
    assert "bfloat16 202.4 GiB" in text
    assert "36 chunked moe, 12 global moe" in text
    assert "192.0 KiB per token, 48.0 KiB after the first chunk; 481.1 GiB at 10,485,760" in text


def test_a_model_without_chunks_has_one_cache_price():
    assert "after the first chunk" not in printed(info.describe("llama3-8b"))


@pytest.mark.parametrize(
    ("name", "billions"), [("llama4-scout", 109), ("llama4-maverick", 402), ("llama-guard-4", 12)]
)
def test_totals_are_those_of_model_cards(name, billions):
    """109B, 400B and 12B: the whole model, with its image encoder."""
    assert round(info.describe(name)["parameters"]["total"] / 1e9) == billions


def test_a_checkpoint_is_described_by_what_is_in_it(directory):
    facts = info.describe(str(directory))
    preset = info.describe("tiny-llama4-scout")
    assert facts["parameters"]["total"] == preset["parameters"]["decoder"]
    assert facts["bytes"]["float32"] == 4 * facts["parameters"]["total"]
    for key in ("kv_cache_bfloat16", "flops_per_token", "layers"):
        assert facts[key] == preset[key], key
    assert facts["format"] == "Hugging Face safetensors"
    assert facts["checkpoint"] == str(directory)
    assert facts["bytes_on_disk"] == sum(file.stat().st_size for file in directory.iterdir())
    assert facts["bytes_on_disk"] > facts["bytes"]["float32"]


def test_names_that_look_like_markup_are_printed_as_they_are(directory):
    assert printed(info.describe(str(directory))).startswith(f"{directory}\n")


def test_context_decides_the_operations(directory):
    config = presets.get("tiny-llama4-scout").make()
    for name in ("tiny-llama4-scout", str(directory)):
        facts = info.describe(name, context=33)["flops_per_token"]
        assert facts["forward"] == roofline.forward_flops(config, 33)
        assert facts["training"] == roofline.training_flops(config, 33)


@pytest.mark.parametrize("context", [0, -1, 257])
def test_a_context_that_the_model_does_not_have_is_refused(context):
    with pytest.raises(ValueError, match=f"context {context} must be from 1 to the model's 256"):
        info.describe("tiny-llama4-scout", context=context)


@pytest.mark.parametrize("name", ["lama4-scout", "llama4_scout", "tiny-llama4-scuot"])
def test_an_unknown_name_gives_the_nearest_presets(name):
    with pytest.raises(ValueError, match=f"no preset is called '{name}'; .*llama4-scout"):
        info.describe(name)


def test_a_path_that_is_missing_is_not_taken_for_a_preset(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        info.describe(str(tmp_path / "llama4-scout"))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        info.describe("./llama4-scout")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        info.describe(str(tmp_path))
