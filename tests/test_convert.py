"""What conversion keeps, casts and quantizes, told from the files it writes by other packages."""

from __future__ import annotations

import json
import re

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    COMPANIONS,
    EXPERT,
    INDEX,
    convert,
    copied,
    fused,
    in_memory,
    model_of,
    multiplied,
    numbers,
    place_of,
    rewrite,
    same,
    snapshot,
    stored,
    vision_of,
    write_hf,
)
from conftest import FAMILIES, forward
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

BFLOAT16 = ml_dtypes.bfloat16
LLAMA4 = ("llama4-scout", "llama4-maverick", "llama-guard-4")
GROUP = 32
TOKENS = np.arange(40, dtype=np.int32).reshape(2, 20) * 7


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def tmp_path():
    with in_memory() as directory:
        yield directory


@pytest.fixture(scope="module")
def kept():
    with in_memory() as directory:
        yield directory


@pytest.fixture(scope="module")
def hf(kept):
    """Makes Hugging Face directories, each once; nobody may change them."""
    made = {}

    def get(name, dtype="float32", *, vision=False, layers=None, **attention):
        key = (name, dtype, vision, layers, *attention.items())
        if key not in made:
            model = model_of(name, dtype, layers, **attention)
            directory = kept / f"hf{len(made)}"
            made[key] = write_hf(directory, model, vision=vision_of(name) if vision else None)
        return made[key]

    return get


def model_in(directory):
    from l4jax import checkpoints

    return checkpoints.read_model(directory)


def load(directory, **settings):
    from l4jax import checkpoints

    return checkpoints.load(directory, **settings)


def whole(directory):
    from l4jax import checkpoints

    return checkpoints.verify(directory)["whole"]


def state(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_same_state(one, other):
    assert one.config == other.config
    chex.assert_trees_all_equal_shapes_and_dtypes(state(one), state(other))
    chex.assert_trees_all_equal(state(one), state(other))


# --- There and back ------------------------------------------------------------------------------
DTYPES = ("float32", "bfloat16")
EVERY = [(name, dtype, False) for name in FAMILIES for dtype in DTYPES]
EVERY += [(name, dtype, True) for name in LLAMA4 for dtype in DTYPES]
OFTEN = {
    ("llama4-maverick", "float32", False, 1),
    *(("llama-guard-4", "bfloat16", True, 2), ("llama3-8b", "float32", False, 4)),
    *(("llama3.1-8b", "bfloat16", False, None), ("llama3.2-1b", "bfloat16", False, 2)),
}
"""In every run; all together are slow."""
EVERY = [
    pytest.param(*case, shards, marks=[] if (*case, shards) in OFTEN else pytest.mark.slow)
    for case in EVERY
    for shards in (None, 1, 2, 4)
]


@pytest.mark.parametrize(("name", "dtype", "vision", "shards"), EVERY)
def test_every_format_gives_back_what_it_got(name, dtype, vision, shards, hf, tmp_path):
    """By Orbax alone without shards, by Meta's format with some, by both one after the other."""
    # Llama 3's shards may outnumber the key-value heads, of which the tiny models have two.
    heads = {"num_kv_heads": 4} if shards == 4 and name in LLAMA4 else {}
    last = source = hf(name, dtype, vision=vision, **heads)
    if shards:
        last = convert(last, tmp_path / "meta", "meta", shards=shards)
        assert len(list(last.glob("*.pth"))) == shards
        assert model_in(last) == model_in(source)
    if shards in (None, 2):
        last = convert(last, tmp_path / "orbax", "orbax")
        assert model_in(last) == model_in(source)
    back = convert(last, tmp_path / "back", "hf")
    same(source, back)
    assert model_in(back) == model_in(source)
    assert (model_in(back).vision is None) == (not vision)


def test_shards_can_be_counted_anew(hf, tmp_path):
    source = hf("llama-guard-4", "bfloat16", vision=True)
    one = convert(source, tmp_path / "one", "meta")
    two = convert(one, tmp_path / "two", "meta", shards=2)
    again = convert(two, tmp_path / "three", "meta", shards=1)
    names = ("consolidated.00.pth", "params.json")
    assert all((one / name).read_bytes() == (again / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("name", "shards"), [("llama4-scout", 3), ("llama4-scout", 4), ("llama3-8b", 8)]
)
def test_shards_that_cut_through_a_head_are_refused(name, shards, hf, tmp_path):
    """Meta's `n_local_heads`, and Llama 4's `n_local_kv_heads`, would be 0."""
    with pytest.raises(ValueError, match=f"{shards} shards do not divide"):
        convert(hf(name), tmp_path / "x", "meta", shards=shards)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["orbax", "meta"])
def test_what_lies_beside_the_weights_is_carried_byte_for_byte(by, tmp_path):
    model = model_of("llama3.2-1b")
    source = write_hf(tmp_path / "source", model, files=COMPANIONS)
    (source / "optimizer.bin").write_bytes(b"not ours")
    convert(source, tmp_path / "between", by)
    back = convert(tmp_path / "between", tmp_path / "back", "hf")
    for name, content in COMPANIONS.items():
        assert (back / name).read_bytes() == content
    assert not (back / "optimizer.bin").exists()


def test_fields_of_a_config_that_are_no_architecture_are_kept_through_orbax(tmp_path):
    source = write_hf(tmp_path / "source", model_of("llama4-maverick"), vision=vision_of(LLAMA4[1]))
    values = json.loads((source / "config.json").read_text())
    values |= {"eos_token_id": [5, 6], "boi_token_index": 11}
    values["text_config"] |= {"pad_token_id": 7, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "orbax", "orbax")
    back = convert(tmp_path / "orbax", tmp_path / "back", "hf")
    found = json.loads((back / "config.json").read_text())
    assert found == values | {"torch_dtype": "float32"}


def test_files_may_be_links_and_paths_relative_and_odd(hf, tmp_path, monkeypatch):
    """As in Hugging Face's cache, where every file of a snapshot is a link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    for file in hf("llama3.2-1b").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    convert("snapshot", "döst [1] #%20*", "orbax")
    back = convert("döst [1] #%20*", "deep/er/ba?k", "hf")
    same(hf("llama3.2-1b"), back)
    assert not any(file.is_symlink() for file in back.iterdir())


def test_types_may_differ_between_tensors(hf, tmp_path):
    """Norms in float32 beside bfloat16 come back; where the files allow one type, the wider."""
    source = copied(hf("llama4-scout", "bfloat16"), tmp_path / "source")
    q = "model.layers.1.self_attn.q_proj.weight"

    def change(tensors):
        wide = [q, *(name for name in tensors if "norm" in name)]
        tensors |= {name: tensors[name].astype(np.float32) for name in wide}

    rewrite(source, change)
    same(source, convert(source, tmp_path / "hf", "hf"))
    for to in ("orbax", "meta"):
        convert(source, tmp_path / to, to)
        convert(tmp_path / to, tmp_path / f"{to}-hf", "hf")
        found = numbers(tmp_path / f"{to}-hf")
        for name, x in numbers(source).items():
            np.testing.assert_array_equal(found[name], x.astype(found[name].dtype))
            assert found[name].dtype == x.dtype or found[name].dtype == np.float32


# --- Orbax directories ---------------------------------------------------------------------------
def test_plain_orbax_restores_them_onto_eight_devices(hf, tmp_path):
    """Without any code of ours, from the names and shapes that are recorded there."""
    from orbax.checkpoint import v1 as ocp

    source = hf("llama4-maverick", vision=True)
    convert(source, tmp_path / "x", "orbax")
    mesh = jax.make_mesh((4, 2), ("a", "b"))

    def wanted(x):
        axes = [None] * len(x.shape)
        for axis, name, parts in ((len(axes) - 1, "a", 4), (len(axes) - 2, "b", 2)):
            if axis >= 0 and x.shape[axis] % parts == 0:
                axes[axis] = name
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    there = ocp.metadata(tmp_path / "x" / "parameters").metadata
    plain = ocp.load(tmp_path / "x" / "parameters", jax.tree.map(wanted, there))
    expected = state(load(source, vision=False))
    up = plain["vision"]["adapter"]["up"]
    assert len(up.addressable_shards) == 8
    assert up.addressable_shards[0].data.size == up.size // 8
    kept = numbers(source)["vision_model.vision_adapter.mlp.fc1.weight"]
    np.testing.assert_array_equal(up, kept.T)
    del plain["vision"]
    chex.assert_trees_all_equal(jax.tree.leaves(plain), jax.tree.leaves(expected))


@pytest.mark.parametrize("name", ["llama4-maverick", slow("llama3.2-1b")])
def test_the_same_model_is_loaded_from_every_format(name, hf, tmp_path):
    from l4jax import sharding

    source = hf(name)
    others = [convert(source, tmp_path / "orbax", "orbax")]
    others.append(convert(source, tmp_path / "meta", "meta", shards=2))
    model, half = load(source), load(source, dtype="bfloat16")
    expected = forward(model, TOKENS)
    with sharding.use(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        placed = load(source)
        expected_there = forward(placed, TOKENS)
    for other in others:
        assert_same_state(load(other), model)
        assert_same_state(load(other, dtype="bfloat16"), half)
        np.testing.assert_array_equal(forward(load(other), TOKENS), expected)
        with sharding.use(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
            found = load(other)
            np.testing.assert_array_equal(forward(found, TOKENS), expected_there)
        assert_same_state(found, placed)
        q = found.layers[0].attention.q[...]
        assert len({shard.device for shard in q.addressable_shards}) == 8
        assert q.sharding == placed.layers[0].attention.q[...].sharding


# --- Sizes and types -----------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [100_000, 1])
def test_no_file_is_larger_than_asked_and_the_index_is_right(limit, hf, tmp_path):
    source = hf("llama4-maverick", "bfloat16", vision=True)
    out = convert(source, tmp_path / "x", "hf", max_shard_bytes=limit)
    same(source, out)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(x[2]) for x in stored(out).values())
    assert index["weight_map"].keys() == stored(out).keys()
    files = sorted(file.name for file in out.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        names = [name for name, place in index["weight_map"].items() if place == file]
        sizes = [place_of(out / file, name)[1] for name in names]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert limit > 1 or count == len(stored(out))


def test_a_narrower_type_is_rounded_and_a_wider_one_exact(hf, tmp_path):
    source = hf("llama-guard-4", vision=True)
    half = convert(source, tmp_path / "half", "orbax", dtype="bfloat16")
    narrow = convert(half, tmp_path / "narrow", "hf")
    same(narrow, convert(source, tmp_path / "direct", "hf", dtype="bfloat16"))
    wide = convert(half, tmp_path / "wide", "hf", dtype="float32")
    for name, x in numbers(source).items():
        rounded = x.astype(BFLOAT16)
        assert numbers(narrow)[name].tobytes() == rounded.tobytes()
        assert numbers(wide)[name].tobytes() == rounded.astype(np.float32).tobytes()
    assert json.loads((wide / "config.json").read_text())["torch_dtype"] == "float32"
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("to", ["hf", "orbax", "meta"])
@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", -70_000), ("bfloat16", np.finfo(np.float32).max)]
)
def test_numbers_beyond_a_type_are_refused(dtype, value, to, hf, tmp_path):
    source = copied(hf("llama3.2-1b"), tmp_path / "source")
    norm = "model.layers.1.input_layernorm.weight"
    rewrite(source, lambda tensors: tensors[norm].__setitem__(3, value))
    with pytest.raises(ValueError, match=rf"layers\.1\..*norm.* {dtype}"):
        convert(source, tmp_path / "x", to, dtype=dtype)
    assert not (tmp_path / "x").exists()


# --- Few bits ------------------------------------------------------------------------------------
SCHEMES = ("int8", "fp8", "int4")


def assert_within(scheme, original, found, scale):
    error = np.abs(original - found)
    if scheme == "fp8":  # three bits behind the first, and numbers below the smallest exponent
        bound = np.maximum(np.abs(original) / 16, scale * 2.0**-10)
    elif scheme == "int4":  # the largest number has no value of its own
        bound = np.where(original > 7.5 * scale, scale, scale / 2)
    else:
        bound = scale / 2
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0


@pytest.fixture(scope="module")
def few(hf, kept):
    """Quantized directories of tiny Maverick, each made once; int8 has vision as well."""
    made = {}

    def get(scheme):
        if scheme not in made:
            source = hf("llama4-maverick", layers=4, vision=scheme == "int8")
            made[scheme] = convert(source, kept / scheme, "hf", scheme=scheme, group=GROUP)
        return made[scheme]

    return get


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_experts_are_near_and_everything_else_is_untouched(scheme, hf, few, tmp_path):
    source = numbers(hf("llama4-maverick", layers=4, vision=scheme == "int8"))
    out, plain = few(scheme), convert(few(scheme), tmp_path / "x", "hf", dtype="float32")
    experts, scales = {}, {}
    for name, (found, scale) in multiplied(out).items():
        short = name.removeprefix("language_model.")
        experts[short], scales[short] = found, scale
    layers = sorted({EXPERT.fullmatch(name)[2] for name in experts})
    assert layers == ["1", "3"]
    dequantized = numbers(plain)
    assert dequantized.keys() == source.keys()
    for name, original in source.items():
        prefix, _, last = name.removeprefix("language_model.").rpartition("experts.")
        if not prefix:
            assert dequantized[name].tobytes() == original.tobytes()
            assert numbers(out)[name].tobytes() == original.tobytes()
            continue
        parts = ("down",) if last == "down_proj" else ("gate", "up")
        whole_ = fused(experts, prefix, parts)
        assert dequantized[name].tobytes() == whole_.tobytes()
        assert_within(scheme, original, whole_, fused(scales, prefix, parts))
    kept = {n for n in numbers(out) if ".experts." not in n}
    assert kept == {n for n in source if ".experts." not in n}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("llama3.1-8b", "int8"), slow("llama3.1-8b", "fp8"), slow("llama3.1-8b", "int4")),
        *(("llama-guard-4", "int4"), slow("llama-guard-4", "int8"), slow("llama-guard-4", "fp8")),
    ],
)
def test_dense_models_are_quantized_inside(name, scheme, hf, tmp_path):
    source = hf(name, layers=4)
    out = convert(source, tmp_path / "x", "hf", scheme=scheme, group=GROUP)
    found, originals = multiplied(out), numbers(source)
    assert len(found) == 6
    for weight, (values, scale) in found.items():
        assert re.search(r"layers\.[12]\.(mlp|feed_forward)\.(gate|up|down)_proj.weight", weight)
        assert_within(scheme, originals[weight], values, scale)
    orbax = convert(source, tmp_path / "orbax", "orbax", scheme=scheme, group=GROUP)
    same(out, convert(orbax, tmp_path / "y", "hf"))
    wide = convert(orbax, tmp_path / "wide", "hf", dtype="float32")
    for weight, x in numbers(wide).items():
        expected = found[weight][0] if weight in found else originals[weight]
        assert x.tobytes() == expected.tobytes()
    assert_same_state(load(orbax), load(out))


@pytest.mark.parametrize("scheme", [slow("int8"), slow("fp8"), "int4"])
def test_a_quantized_model_is_loaded_as_it_lies(scheme, hf, few, tmp_path):
    """In few bits, also through Orbax and on a mesh; its logits are those of values · scale."""
    from l4jax import sharding

    out = few(scheme)
    orbax = convert(out, tmp_path / "orbax", "orbax")
    same(out, convert(orbax, tmp_path / "back", "hf"))
    assert whole(orbax)
    assert whole(out)
    model, plain = load(out), load(convert(out, tmp_path / "plain", "hf", dtype="float32"))
    assert_same_state(load(orbax), model)
    assert_same_state(load(orbax, dtype="float32"), plain)
    assert_same_state(load(out, dtype="float32"), plain)
    narrow = [x for x in jax.tree.leaves(state(model)) if x.dtype.itemsize == 1]
    values, scale = model.layers[1].ffn.gate[...].values, model.layers[1].ffn.gate[...].scale
    assert len(narrow) == 3 * 2
    assert values.dtype == {"fp8": ml_dtypes.float8_e4m3fn}.get(scheme, scheme)
    assert values.size >= 32 * scale.size
    expected = forward(plain, TOKENS)
    np.testing.assert_allclose(forward(model, TOKENS), expected, rtol=1e-4, atol=1e-5)
    with sharding.use(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        for place in (out, orbax):
            placed = load(place)
            assert_same_state(placed, model)
            gate = placed.layers[1].ffn.gate[...].values
            assert gate.addressable_shards[0].data.size == gate.size // 8


@pytest.mark.parametrize(("scheme", "shards"), [slow("fp8", 1), ("fp8", 2), ("int4", 1)])
def test_meta_s_quantized_files_hold_the_same_values(scheme, shards, hf, few, tmp_path):
    """In all routed layers but the first and last, as in Meta's own packages."""
    source = hf("llama4-maverick", layers=4)
    meta = convert(source, tmp_path / "a", "meta", scheme=scheme, group=GROUP, shards=shards)
    assert len(list(meta.glob(f"{scheme}_scales_*.pt"))) == shards
    assert whole(meta)
    orbax = convert(meta, tmp_path / "b", "orbax")
    again = convert(orbax, tmp_path / "c", "meta", shards=shards)
    assert {k: v for k, v in snapshot(again).items() if k.startswith((scheme, "conso"))} == {
        k: v for k, v in snapshot(meta).items() if k.startswith((scheme, "conso"))
    }
    assert_same_state(load(meta), load(orbax))
    wide = numbers(convert(meta, tmp_path / "d", "hf", dtype="float32"))
    every = numbers(convert(few(scheme), tmp_path / "e", "hf", dtype="float32"))
    for name, original in numbers(source).items():
        inner = re.search(r"layers\.1\.feed_forward\.experts", name)
        assert wide[name].tobytes() == (every if inner else {name: original})[name].tobytes()
    if shards == 1:  # two would have scales of their own, which Hugging Face's package has not
        other = convert(few(scheme), tmp_path / "f", "meta", shards=1)
        same(few(scheme), convert(other, tmp_path / "g", "hf"))


@pytest.mark.parametrize(
    ("to", "settings", "message"),
    [
        ("meta", {"scheme": "int8"}, "int8"),
        ("hf", {"scheme": "int4", "group": 40}, "groups of 40 do not divide the 64 inputs"),
        ("hf", {"scheme": "int4", "group": 12}, "group 12 must be a multiple of 8"),
        ("hf", {"scheme": "int4"}, "groups of 128 do not divide"),
        ("meta", {"scheme": "int4", "group": 32, "shards": 2}, "2 shards do not divide"),
        ("hf", {"scheme": "int2"}, "int2"),
        ("hf", {"dtype": "int8"}, "int8"),
        ("gguf", {}, "gguf"),
    ],
)
def test_what_cannot_be_quantized_is_refused(to, settings, message, hf, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        convert(hf("llama4-scout"), tmp_path / "x", to, **settings)
    assert list(tmp_path.iterdir()) == []


def test_meta_has_no_quantized_dense_weights(hf, tmp_path):
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.\w+: Meta's format has no fp8"):
        convert(hf("llama3.1-8b", layers=4), tmp_path / "x", "meta", scheme="fp8")


@pytest.mark.parametrize(
    ("have", "settings"),
    [
        ("int8", {"scheme": "fp8"}),
        ("int4", {"scheme": "int8"}),
        ("int4", {"scheme": "int4", "group": 16}),
    ],
)
def test_a_quantized_model_is_not_quantized_otherwise(have, settings, few, tmp_path):
    with pytest.raises(ValueError, match=rf"{have}.*floating-point type|group"):
        convert(few(have), tmp_path / "x", "hf", **settings)


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_with_a_type_it_is_multiplied_out_first_or_refused(scheme, few, tmp_path):
    wide = convert(few("int8"), tmp_path / "wide", "hf", dtype="float32")
    settings = {"scheme": scheme, "group": GROUP}
    try:
        found = convert(few("int8"), tmp_path / "x", "hf", dtype="float32", **settings)
    except ValueError:
        assert not (tmp_path / "x").exists()
    else:
        same(found, convert(wide, tmp_path / "expected", "hf", **settings))


def test_a_quantized_checkpoint_that_meta_cannot_hold_says_what_to_do(few, tmp_path):
    with pytest.raises(ValueError, match="Meta's format has no int8 .* such as bfloat16"):
        convert(few("int8"), tmp_path / "x", "meta")
    convert(few("int8"), tmp_path / "x", "meta", dtype="bfloat16", shards=2)
    assert whole(tmp_path / "x")
