"""Quantized checkpoints against the compressed-tensors package and against Meta's own functions."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
from conftest import build, forward

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")
from test_convert_transformers import params, stored  # noqa: E402
from test_transformers import TOLERANCE, relative  # noqa: E402

pytestmark = pytest.mark.parity

NAMES = ("llama4-scout", "llama4-maverick", "llama3.1-8b")
SCHEMES = ("fp8", "int8", "int4")
PAIRS = [(name, scheme) for name in NAMES for scheme in SCHEMES]
QUICK = [("llama4-scout", "fp8"), ("llama4-scout", "int4"), ("llama3.1-8b", "int8")]
GROUP = 32


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")


def options(**values):
    from l4jax import checkpoints

    return checkpoints.Options(max_shard_bytes=300_000, group=GROUP, **values)


def convert(directory, new, to, **values):
    from l4jax import checkpoints

    checkpoints.convert(directory, new, to=to, options=options(**values), licence="none")
    return new


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """Our quantized export of a tiny model, and that export multiplied out to float32."""

    @functools.cache
    def plain(name):
        from l4jax import checkpoints, presets

        config = presets.get(f"tiny-{name}").make()
        if config.moe is None:
            config = dataclasses.replace(config, num_layers=4)
        directory = tmp_path_factory.mktemp("plain") / "hf"
        checkpoints.save(build(config), directory, to="hf")
        return directory

    @functools.cache
    def make(name, scheme):
        folder = tmp_path_factory.mktemp("quantized")
        narrow = convert(plain(name), folder / "narrow", "hf", scheme=scheme)
        return narrow, convert(narrow, folder / "wide", "hf", dtype="float32")

    return make


def section_of(directory) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def multiplied_out(directory) -> dict:
    """Every weight of a directory as the package itself decompresses it, experts together."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(section_of(directory))
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors = stored(directory)
    found = {}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        stem = name.removesuffix("weight_scale")
        inside = {
            key.removeprefix(stem): tensors[key] for key in list(tensors) if key.startswith(stem)
        }
        assert inside.keys() <= set(compressor.compression_param_names(scheme))
        for key in inside:
            del tensors[stem + key]
        inside["weight_scale"] = inside["weight_scale"].float()
        found[stem + "weight"] = compressor.decompress(inside, scheme)["weight"]
    return together(tensors | found)


def together(tensors) -> dict:
    """Experts of their own, (out, in), put into the two tensors of an unquantized checkpoint."""
    found = dict(tensors)
    for layer in sorted({n.partition("experts.")[0] for n in tensors if ".experts.0." in n}):
        parts = {}
        for which in ("gate", "up", "down"):
            names = [
                n for n in found if re.fullmatch(rf"{layer}experts\.\d+\.{which}_proj.weight", n)
            ]
            names.sort(key=lambda n: int(n.split(".")[-3]))
            parts[which] = torch.stack([found.pop(n).T for n in names])
        found[f"{layer}experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=-1)
        found[f"{layer}experts.down_proj"] = parts["down"]
    return found


def apart(tensors) -> dict:
    """The inverse of `together`."""
    found = {}
    for name, x in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(x):
                for which, half in zip(("gate", "up"), both.chunk(2, dim=-1), strict=True):
                    own = name.replace("gate_up_proj", f"{e}.{which}_proj.weight")
                    found[own] = half.T.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(x):
                found[name.replace("down_proj", f"{e}.down_proj.weight")] = down.T.contiguous()
        else:
            found[name] = x
    return found


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


# --- What we write, read by the package ----------------------------------------------------------
@pytest.mark.parametrize(("name", "scheme"), params(PAIRS, QUICK))
def test_the_package_multiplies_our_exports_out_to_what_we_do(name, scheme, export_of, package):
    narrow, wide = export_of(name, scheme)
    assert_same(multiplied_out(narrow), stored(wide))
    assert "quantization_config" not in json.loads((wide / "config.json").read_text())


@pytest.mark.parametrize(("name", "scheme"), params(PAIRS, QUICK))
def test_targets_and_ignored_names_are_what_is_quantized(name, scheme, export_of, package):
    """A linear layer is matched by the section, as the package matches, if it has a scale."""
    from compressed_tensors.utils.match import is_match

    narrow, _ = export_of(name, scheme)
    section, names = section_of(narrow), set(stored(narrow))
    (group,) = section["config_groups"].values()
    layers = {n.rpartition(".")[0] for n in names if re.search(r"(proj|router|head)\.weight", n)}
    assert len(layers) > 10
    some = torch.nn.Linear(1, 1)
    for layer in sorted(layers):
        matched = is_match(layer, some, group["targets"], section["ignore"])
        assert matched == (f"{layer}.weight_scale" in names), layer


@pytest.mark.parametrize(("name", "scheme"), params(PAIRS, QUICK))
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_loads_our_exports(name, scheme, export_of, package):
    """Whole, and with the same logits; of Llama 4 it can load only what it multiplies out."""
    from l4jax import checkpoints

    narrow, wide = export_of(name, scheme)
    ids = np.random.default_rng(3).integers(0, 512, (2, 75), np.int32)
    results = []
    for directory in (narrow, wide):
        given = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            output_loading_info=True,
            dtype=torch.float32,
            **(given if directory == narrow else {}),
        )
        assert {key: list(keys) for key, keys in info.items() if keys} == {}
        with torch.no_grad():
            results.append(model(torch.tensor(ids).long(), use_cache=False).logits.numpy())
    np.testing.assert_array_equal(*results)
    for dtype in ("float32", None):
        ours = forward(checkpoints.load(narrow, dtype=dtype), ids)
        assert relative(ours, results[0]) <= 1.5 * TOLERANCE, dtype


# --- What llm-compressor writes ------------------------------------------------------------------
PARTS = {
    "experts": r"experts\.\d+\.\w+_proj\.weight",
    "feed forward": r"(feed_forward|mlp)\.[.\w]*(gate|up|down)_proj\.weight",
    "all": r"_proj\.weight",
}
"""Quantized tensors: as in Meta's FP8 Maverick, in the usual packages of Scout, of Llama 3."""


def as_published(directory, new, what, scheme):
    """A package in bfloat16 with some weights quantized by compressed-tensors itself.

    Returns what they must be read as: value · scale, worked out here.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import save_file

    expected, saved = {}, {}
    for name, x in apart(stored(directory)).items():
        wide, stem = x.bfloat16(), name.removesuffix("weight")
        expected[name] = wide.float()
        if not re.search(PARTS[what], name):
            saved[name] = wide
            continue
        groups = wide.float().unflatten(1, (-1, GROUP if scheme == "int4" else x.shape[1]))
        largest = groups.abs().amax(-1, keepdim=True)
        scale = (largest / (448 if scheme == "fp8" else 7.5)).bfloat16().float()
        if scheme == "fp8":
            values = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            saved[name] = values.flatten(1)
        else:
            values = (groups / scale).round().clamp(-8, 7).to(torch.int8)
            saved[f"{stem}weight_packed"] = pack_to_int32(values.flatten(1), 4)
            saved[f"{stem}weight_shape"] = torch.tensor(x.shape)
        saved[f"{stem}weight_scale"] = scale.squeeze(-1).bfloat16()
        expected[name] = (values.float() * scale).flatten(1)
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    tokens = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    if scheme == "int4":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
        tokens = None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens}
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format="float-quantized" if scheme == "fp8" else "pack-quantized",
        ignore=["lm_head", "re:.*router"],
        quantization_status="compressed",
    )
    section = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    section |= {"version": "0.9.5", "sparsity_config": {}, "transform_config": {}}
    new.mkdir()
    values = json.loads((directory / "config.json").read_text())
    values |= {"torch_dtype": "bfloat16", "quantization_config": section}
    (new / "config.json").write_text(json.dumps(values))
    save_file(saved, new / "model.safetensors", metadata={"format": "pt"})
    return together(expected)


PACKAGES = [
    (name, what, scheme)
    for name, what in (
        ("llama4-maverick", "experts"),
        ("llama4-scout", "feed forward"),
        ("llama4-scout", "all"),
        ("llama3.1-8b", "all"),
    )
    for scheme in ("fp8", "int4")
]
QUICK_PACKAGES = [("llama4-maverick", "experts", "fp8"), ("llama3.1-8b", "all", "int4")]


@pytest.mark.parametrize(("name", "what", "scheme"), params(PACKAGES, QUICK_PACKAGES))
def test_packages_as_llm_compressor_writes_them_are_read(
    name, what, scheme, twin_of, tmp_path, package
):
    """Multiplied out, they are value · scale; kept as they are, the package reads them again."""
    from l4jax import checkpoints

    checkpoints.save(twin_of(name).model, tmp_path / "plain", to="hf")
    expected = as_published(tmp_path / "plain", tmp_path / "package", what, scheme)
    wide = convert(tmp_path / "package", tmp_path / "wide", "hf", dtype="float32")
    assert_same(stored(wide), expected)
    orbax = convert(tmp_path / "package", tmp_path / "orbax", "orbax")
    again = convert(orbax, tmp_path / "again", "hf")
    assert_same(multiplied_out(again), expected)
    ids = twin_of(name).tokens()
    whole = forward(checkpoints.load(wide), ids)
    for place in (tmp_path / "package", orbax):
        found = forward(checkpoints.load(place, dtype="float32"), ids)
        np.testing.assert_array_equal(found, whole)
