"""Meta's int4 and fp8 files: made by its own functions and read by us, and made by us."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import shutil
import typing

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")
pytest.importorskip("fairscale", reason="needs fairscale: pip install l4jax[parity]")
pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")
from test_convert_meta import written_by_meta  # noqa: E402
from test_convert_transformers import params, stored  # noqa: E402
from test_meta import meta as one_process  # noqa: E402, F401

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("one_process")]

SIZES = {"dim": 128, "n_layers": 4, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
"""Experts of 128 × 256: the smallest that groups of 128 divide in two shards."""
EXPERTS, WIDTH = 4, 128
KEYS = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}
INNER = {"llama4-scout": (1, 2), "llama4-maverick": (1,)}
"""Layers with experts, but the first and last."""


@pytest.fixture(scope="module")
def theirs():
    """`int4_row_quantize` and `pack_int4`, out of a module that cannot be imported here.

    It needs fbgemm, which needs a GPU.
    """
    (folder,) = importlib.util.find_spec("llama_models").submodule_search_locations
    tree = ast.parse((pathlib.Path(folder) / "quantize_impls.py").read_text())
    names = ("int4_row_quantize", "pack_int4")
    tree.body = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in names]
    found = {"torch": torch, "Tuple": typing.Tuple}  # noqa: UP006
    exec(compile(tree, "quantize_impls.py", "exec"), found)
    return found


def fp8_rows(x):
    """fbgemm's `quantize_fp8_per_row`: one scale for each row, its largest number becomes 448."""
    scale = x.float().abs().amax(-1) / 448
    values = (x.float() / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scale


def int4_rows(theirs, weight):
    """What Meta's script does with the experts of a layer, (e, outputs, inputs)."""
    values, scales = zip(*(theirs["int4_row_quantize"](x) for x in weight), strict=True)
    return torch.stack([theirs["pack_int4"](x) for x in values]), torch.stack(scales)


def quantized_by_meta(theirs, source, new, scheme, layers) -> dict:
    """Does what Meta's `scripts/quantize.py` does to every shard.

    Returns value · scale of every expert tensor of those layers, (e, in, out), whole.
    """
    new.mkdir()
    shutil.copy(source / "params.json", new)
    wide: dict[str, list] = {}
    for rank, file in enumerate(sorted(source.glob("*.pth"))):
        state, scales = torch.load(file, weights_only=False), {}
        for layer in layers:
            for key, last in KEYS.items():
                name = f"layers.{layer}.feed_forward.experts."
                shape = (EXPERTS, -1, WIDTH) if key == "w2" else (EXPERTS, WIDTH, -1)
                param = state[name + last].view(shape)
                weight = param.transpose(1, 2).contiguous()
                if scheme == "int4":
                    values, scale = int4_rows(theirs, weight)
                    stacked = values.transpose(1, 2).reshape(-1, param.shape[-1]).contiguous()
                    stacked = stacked.view(torch.float8_e4m3fn)
                    low, high = (values << 4).to(torch.int8) >> 4, values >> 4
                    plain = torch.stack([low, high], -1).flatten(2).float().transpose(1, 2)
                    product = plain.unflatten(1, (-1, 128)) * scale[:, :, None]
                    product = product.flatten(1, 2)
                else:
                    values, scale = fp8_rows(weight)
                    stacked = values.transpose(1, 2).reshape(-1, param.shape[-1]).contiguous()
                    product = (values.float() * scale[..., None]).transpose(1, 2)
                state[name + last] = torch.nn.Parameter(stacked, requires_grad=False)
                scales[name + key] = scale
                wide.setdefault(name + last, []).append(product)
        torch.save(scales, new / f"{scheme}_scales_{rank}.pt")
        torch.save(state, new / file.name)
    return {
        name: torch.cat(parts, 1 if name.endswith("eF_D") else 2) for name, parts in wide.items()
    }


def convert(directory, new, to, **values):
    from l4jax import checkpoints

    options = checkpoints.Options(**values)
    checkpoints.convert(directory, new, to=to, options=options, licence="none")
    return new


def experts_of(directory, layers) -> dict:
    """The expert tensors of a Hugging Face directory under Meta's names."""
    found = {}
    tensors = stored(directory)
    for layer in layers:
        prefix, name = f"model.layers.{layer}.feed_forward.", f"layers.{layer}.feed_forward."
        gate, up = tensors[f"{prefix}experts.gate_up_proj"].chunk(2, dim=-1)
        down = tensors[f"{prefix}experts.down_proj"]
        for last, x in (("moe_w_in_eD_F", gate), ("moe_w_swiglu_eD_F", up)):
            found[f"{name}experts.{last}"] = x
        found[f"{name}experts.moe_w_out_eF_D"] = down
    return found


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].float(), tensor.float()), name


@pytest.mark.parametrize("shards", params([1, 2], [2]))
@pytest.mark.parametrize("scheme", ["int4", "fp8"])
@pytest.mark.parametrize("name", params(list(INNER), ["llama4-scout"]))
def test_what_metas_script_quantizes_is_read(name, scheme, shards, theirs, tmp_path):
    """Also by way of Orbax; the other layers, first and last, stay as they were."""
    layers = INNER[name]
    written_by_meta(name, tmp_path / "plain", shards, **SIZES)
    expected = quantized_by_meta(
        theirs, tmp_path / "plain", tmp_path / "narrow", scheme, layers=layers
    )
    wide = convert(tmp_path / "narrow", tmp_path / "wide", "hf", dtype="float32")
    assert_same(experts_of(wide, layers), expected)
    orbax = convert(tmp_path / "narrow", tmp_path / "orbax", "orbax")
    again = convert(orbax, tmp_path / "again", "hf", dtype="float32")
    assert_same(stored(again), stored(wide))
    plain = stored(convert(tmp_path / "plain", tmp_path / "plain-hf", "hf", dtype="float32"))
    for key, tensor in stored(wide).items():
        inner = any(f"layers.{layer}.feed_forward.experts" in key for layer in layers)
        assert torch.equal(tensor, plain[key]) != inner, key


@pytest.mark.parametrize("shards", params([1, 2], [2]))
@pytest.mark.parametrize("name", params(list(INNER), ["llama4-scout"]))
def test_our_int4_files_are_metas_bit_for_bit(name, shards, theirs, tmp_path):
    written_by_meta(name, tmp_path / "plain", shards, **SIZES)
    quantized_by_meta(theirs, tmp_path / "plain", tmp_path / "theirs", "int4", INNER[name])
    orbax = convert(tmp_path / "plain", tmp_path / "orbax", "orbax")
    ours = convert(orbax, tmp_path / "ours", "meta", scheme="int4", shards=shards)
    count = 0
    for file in sorted((tmp_path / "theirs").glob("*.pt*")):
        expected = torch.load(file, weights_only=False)
        found = torch.load(ours / file.name, weights_only=True)
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype, key
            assert tensor.shape == expected[key].shape, key
            same = torch.equal(tensor.view(torch.uint8), expected[key].data.view(torch.uint8))
            assert same, key
            count += "experts" in key
    routed = {"llama4-scout": 4, "llama4-maverick": 2}[name]
    assert count == 3 * shards * (routed + len(INNER[name]))


@pytest.mark.parametrize("shards", params([1, 2], [2]))
def test_our_fp8_files_are_metas_bit_for_bit_but_for_shared_scales(shards, theirs, tmp_path):
    """Meta has a scale of w2 for every shard's part of the inputs; ours is the same for all."""
    name = "llama4-scout"
    written_by_meta(name, tmp_path / "plain", shards, **SIZES)
    quantized_by_meta(theirs, tmp_path / "plain", tmp_path / "theirs", "fp8", INNER[name])
    ours = convert(tmp_path / "plain", tmp_path / "ours", "meta", scheme="fp8", shards=shards)
    wide = experts_of(convert(ours, tmp_path / "wide", "hf", dtype="float32"), INNER[name])
    for rank in range(shards):
        places = [tmp_path / side / f"fp8_scales_{rank}.pt" for side in ("theirs", "ours")]
        expected, found = (torch.load(place, weights_only=True) for place in places)
        assert set(found) == set(expected)
        file = ours / f"consolidated.{rank:02}.pth"
        shard = torch.load(file, weights_only=True)
        for key, scale in found.items():
            assert scale.shape == expected[key].shape
            assert scale.dtype == torch.float32
            prefix, _, last = key.rpartition(".")
            values = shard[f"{prefix}.{KEYS[last]}"].float().view(EXPERTS, -1, scale.shape[-1])
            if shards == 1 or last != "w2":
                assert torch.equal(scale, expected[key]), key
                both = torch.load(tmp_path / "theirs" / file.name, weights_only=False)
                same = both[f"{prefix}.{KEYS[last]}"].data.float().view(values.shape)
                assert torch.equal(values, same), key
            axis = 1 if last == "w2" else 2
            part = wide[f"{prefix}.{KEYS[last]}"].chunk(shards, axis)[rank]
            assert torch.equal(values * scale[:, None], part), key


@pytest.mark.parametrize("shards", params([1, 2], [2]))
@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_metas_quantized_files_keep_their_values_as_a_package(scheme, shards, theirs, tmp_path):
    """compressed-tensors multiplies out what Meta's script quantized, or we say why not."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from test_convert_quantized import multiplied_out

    written_by_meta("llama4-scout", tmp_path / "plain", shards, **SIZES)
    expected = quantized_by_meta(
        theirs, tmp_path / "plain", tmp_path / "narrow", scheme, INNER["llama4-scout"]
    )
    if scheme == "fp8" and shards > 1:
        # w2 has one scale for each shard's inputs; the package knows one for each output only.
        with pytest.raises(ValueError, match="scale"):
            convert(tmp_path / "narrow", tmp_path / "hf", "hf")
        return
    directory = convert(tmp_path / "narrow", tmp_path / "hf", "hf")
    tensors = multiplied_out(directory)
    for name, tensor in expected.items():
        layer, last = name.split(".")[1], name.rpartition(".")[2]
        which = "down_proj" if last == "moe_w_out_eF_D" else "gate_up_proj"
        found = tensors[f"model.layers.{layer}.feed_forward.experts.{which}"]
        if which == "gate_up_proj":
            found = found.chunk(2, dim=-1)[last == "moe_w_swiglu_eD_F"]
        assert torch.equal(found.float(), tensor), name
