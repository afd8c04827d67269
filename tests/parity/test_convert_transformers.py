"""Conversions of checkpoints that transformers made: bytes, loading and logits, with images too."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import numpy as np
import pytest
from conftest import FAMILIES as PRESETS
from conftest import forward

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")
from test_transformers import FAMILIES, TOLERANCE, TOLERANCES, randomize, relative  # noqa: E402

pytestmark = pytest.mark.parity

VOCABULARY, IMAGE, ROWS, LENGTH = 512, 500, 2, 101
TILES, PER_TILE = 3, 4
"""Tiles in the batch, and tokens that one becomes: (24 / 6)² patches, four of which join."""
VISION = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "vision_output_dim": 48,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "image_size": 24,
    "patch_size": 6,
    "pixel_shuffle_ratio": 0.5,
}
IDS = {"boi_token_index": 498, "eoi_token_index": 499, "image_token_index": IMAGE}
MODELS = {
    "scout with vision": ("scout", torch.float32),
    "maverick with vision": ("maverick", torch.bfloat16),
    "llama 3.1": ("llama 3.1", torch.bfloat16),
    "llama 3.2": ("llama 3.2", torch.float32),
}
"""The last one's head is tied."""
ROUTES = {
    "orbax": ("orbax", "hf"),
    "meta": ("meta", "hf"),
    "both": ("orbax", "meta", "orbax", "hf"),
}


def params(values, quick):
    """Values to try, of which all but these belong to the longer checks."""
    found = []
    for value in values:
        marks = () if value in quick else pytest.mark.slow
        found.append(pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks))
    return found


class Origin(NamedTuple):
    """A model of transformers', and the directory where it saved it."""

    name: str
    model: object
    directory: object


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    """transformers 5.24's Llama 4 with vision asks its language model for this and fails."""
    outputs = transformers.modeling_outputs.MoeCausalLMOutputWithPast
    monkeypatch.setattr(outputs, "image_outputs", None, raising=False)


def make(name):
    family, dtype = MODELS[name]
    sizes = FAMILIES[family] | ({"num_hidden_layers": 7} if family == "maverick" else {})
    if "vision" not in name:
        config = transformers.LlamaConfig(**sizes, attn_implementation="eager")
        return cast(randomize(transformers.LlamaForCausalLM(config)), dtype)
    config = transformers.Llama4Config(
        text_config=transformers.Llama4TextConfig(**sizes),
        vision_config=transformers.Llama4VisionConfig(**VISION),
        attn_implementation="eager",
        **IDS,
    )
    return cast(randomize(transformers.Llama4ForConditionalGeneration(config)), dtype)


def cast(model, dtype):
    """Parameters only: torch's own cast would take the rotary buffer's imaginary part away."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def origin_of(tmp_path_factory):
    @functools.cache
    def build(name) -> Origin:
        model, directory = make(name), tmp_path_factory.mktemp("origin")
        model.save_pretrained(directory, max_shard_size="200KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
        return Origin(name, model, directory)

    return build


@pytest.fixture(scope="module", params=params(MODELS, {*MODELS} - {"maverick with vision"}))
def origin(request, origin_of) -> Origin:
    return origin_of(request.param)


def travel(directory, folder, route, **options):
    """The last of the directories that converting from one format to the next gives."""
    from l4jax import checkpoints

    for number, to in enumerate(route):
        shards = {"shards": 2} if to == "meta" else {}
        chosen = checkpoints.Options(max_shard_bytes=200_000, **shards, **options)
        new = folder / f"{number}-{to}"
        checkpoints.convert(directory, new, to=to, options=chosen, licence="none")
        directory = new
    return directory


def stored(directory) -> dict:
    """Every tensor by name, as the safetensors package reads it."""
    from safetensors.torch import load_file

    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def inputs(seed=0) -> dict:
    """Tokens over several chunks; the first row has two tiles, the second has one."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 490, (ROWS, LENGTH))
    ids[0, 20 : 20 + 2 * PER_TILE] = IMAGE
    ids[1, 61 : 61 + PER_TILE] = IMAGE
    pixels = rng.uniform(-1, 1, (TILES, 3, VISION["image_size"], VISION["image_size"]))
    return {"input_ids": torch.tensor(ids), "pixel_values": torch.tensor(pixels).float()}


def logits(model, *, images: bool):
    given = inputs()
    if images:
        given["pixel_values"] = given["pixel_values"].to(model.dtype)
    else:
        given = {"input_ids": given["input_ids"]}
    with torch.no_grad():
        return model(**given, use_cache=False).logits.float().numpy()


def reread(directory, kind):
    """The model that transformers loads, with nothing missing, unexpected or mismatched."""
    model, info = kind.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    return model.eval()


@pytest.fixture
def pieces(monkeypatch):
    """Tensors are moved a few rows at a time, as those of large models are."""
    from l4jax.checkpoints import arrays, stores

    engine = importlib.import_module("l4jax.checkpoints.convert")
    monkeypatch.setattr(engine, "SLAB_BYTES", 40_000)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(stores, "_READ_BYTES", 8000)


@pytest.mark.parametrize("route", params(ROUTES, ["both"]))
def test_there_and_back_gives_the_same_bytes_and_logits(origin, route, pieces, tmp_path):
    back = travel(origin.directory, tmp_path, ROUTES[route])
    expected, found = stored(origin.directory), stored(back)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    images = "vision" in origin.name
    again = reread(back, type(origin.model))
    assert again.dtype == origin.model.dtype
    if images and "meta" in ROUTES[route]:
        # Meta's format names no token ids, so that those of the published models are assumed.
        assert again.config.image_token_index == 200_092
        again.config.image_token_index = again.config.image_token_id = IMAGE
    expected = logits(origin.model, images=images)
    assert expected.std() > 1
    np.testing.assert_array_equal(logits(again, images=images), expected)
    if images:
        assert np.abs(expected - logits(origin.model, images=False)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scout with vision", "maverick with vision"])
def test_the_text_part_of_every_format_computes_the_same(name, origin_of, tmp_path):
    """Bit for bit among the formats, and within the usual tolerance of transformers."""
    from l4jax import checkpoints

    origin = origin_of(name)
    found = [checkpoints.load(origin.directory, dtype="float32")]
    for route in ("orbax",), ("meta",), ("meta", "orbax"):
        folder = tmp_path / "-".join(route)
        found.append(checkpoints.load(travel(origin.directory, folder, route), dtype="float32"))
    ids = inputs()["input_ids"].numpy().astype(np.int32)
    results = [forward(model, ids) for model in found]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    expected = logits(cast(make(name), torch.float32), images=False)
    if origin.model.dtype == torch.float32:
        assert relative(results[0], expected) <= TOLERANCE


@pytest.mark.parametrize("name", params(PRESETS, ["llama-guard-4", "llama3.2-1b"]))
def test_every_preset_computes_the_same_from_every_format(name, twin_of, tmp_path):
    from l4jax import checkpoints

    twin = twin_of(name)
    checkpoints.save(twin.model, tmp_path / "hf", to="hf", max_shard_bytes=200_000)
    places = {"hf": tmp_path / "hf"}
    for route in ("orbax",), ("meta",), ("meta", "hf"), ("orbax", "meta"):
        places["-".join(route)] = travel(tmp_path / "hf", tmp_path / "-".join(route), route)
    ids = twin.tokens()
    ours = forward(twin.model, ids)
    for route, place in places.items():
        again = checkpoints.load(place)
        assert again.config == twin.config, route
        np.testing.assert_array_equal(forward(again, ids), ours, err_msg=route)
    tolerance = TOLERANCES["llama 3"] if "llama3" in name else TOLERANCE
    for route in ("hf", "meta-hf"):
        theirs = reread(places[route], transformers.AutoModelForCausalLM)
        with torch.no_grad():
            expected = theirs(torch.tensor(ids).long(), use_cache=False).logits.numpy()
        assert relative(ours, expected) <= tolerance, route
