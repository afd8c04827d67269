"""The published checkpoints' names, shapes and sizes, in directories whose files are holes.

The lists below were written from the reference fact sheet (3.1, 3.2, 5.1) and share nothing with
the library's tables. Headers, indices and pickles are real; contents are never read.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import re
from typing import NamedTuple

import numpy as np
import pytest


class Facts(NamedTuple):
    """What is published of a model. step: every so manieth layer has experts."""

    layers: int
    d: int
    heads: int
    ffn: int
    vocab: int
    total: int
    head: int = 128
    kv: int = 8
    experts: int = 0
    step: int = 1
    routed: int = 8192
    tied: bool = False
    llama_4: bool = False
    shards: tuple[int, ...] = (8,)

    def routes(self, layer: int) -> bool:
        return bool(self.experts) and (layer + 1) % self.step == 0


SCOUT = Facts(48, 5120, 40, 16384, 202_048, 108_641_793_536, experts=16, llama_4=True)
MODELS = {
    "llama4-scout": SCOUT,
    "llama4-maverick": SCOUT._replace(experts=128, step=2, total=401_583_781_376),
    "llama-guard-4": SCOUT._replace(experts=0, ffn=8192, shards=(1,), total=12_001_097_216),
    "llama3.1-405b": Facts(126, 16384, 128, 53248, 128_256, 405_853_388_800, shards=(8, 16)),
    "llama3.1-8b": Facts(32, 4096, 32, 14336, 128_256, 8_030_261_248, shards=(1,)),
    "llama3.3-70b": Facts(80, 8192, 64, 28672, 128_256, 70_553_706_496),
    "llama3.2-1b": Facts(
        16, 2048, 32, 8192, 128_256, 1_235_814_400, head=64, tied=True, shards=(1,)
    ),
}
BILLIONS = {"llama4-scout": 108.64, "llama4-maverick": 401.58, "llama-guard-4": 12.00}
ACTIVE = {"llama4-scout": 17.17, "llama4-maverick": 17.18, "llama-guard-4": 11.13}
SHARD_BYTES = {
    ("llama4-maverick", 8): 100_426_653_046,
    ("llama3.1-405b", 8): 101_470_976_045,
    ("llama3.1-405b", 16): 51_268_302_389,
}
"""Of the instruction-tuned ones. Maverick's base shards are larger by 31,465,340 bytes: that is
`expert_activation_DE`, 24 times 5120 · 128 in bfloat16, and 8,060 bytes of zip about them."""
FP8_BYTES = 54_121_549_657
V, V_LAYERS, V_FFN, V_OUT, PATCH, PLACES = 1408, 34, 5632, 4096, 588, 577
"""The image encoder of every Llama 4."""
Shapes = dict[str, tuple[int, ...]]
NAMES = [(name,) for name in MODELS]
FILES = [(name, n) for name, m in MODELS.items() for n in m.shards]


def params(values, quick):
    """Values to try, of which all but these belong to the longer checks."""
    marks = [() if value in quick else pytest.mark.slow for value in values]
    return [pytest.param(*v, marks=m) for v, m in zip(values, marks, strict=True)]


# --- Hugging Face's names ------------------------------------------------------------------------
def hf_names(m: Facts) -> Shapes:
    start = "language_model." if m.llama_4 else ""
    found = {
        f"{start}model.embed_tokens.weight": (m.vocab, m.d),
        f"{start}model.norm.weight": (m.d,),
    }
    if not m.tied:
        found[f"{start}lm_head.weight"] = (m.vocab, m.d)
    for number in range(m.layers):
        layer = f"{start}model.layers.{number}."
        found[f"{layer}input_layernorm.weight"] = (m.d,)
        found[f"{layer}post_attention_layernorm.weight"] = (m.d,)
        found[f"{layer}self_attn.q_proj.weight"] = (m.heads * m.head, m.d)
        found[f"{layer}self_attn.k_proj.weight"] = (m.kv * m.head, m.d)
        found[f"{layer}self_attn.v_proj.weight"] = (m.kv * m.head, m.d)
        found[f"{layer}self_attn.o_proj.weight"] = (m.d, m.heads * m.head)
        ffn = f"{layer}feed_forward." if m.llama_4 else f"{layer}mlp."
        width = m.ffn
        if m.routes(number):
            found[f"{ffn}router.weight"] = (m.experts, m.d)
            found[f"{ffn}experts.gate_up_proj"] = (m.experts, m.d, 2 * m.routed)
            found[f"{ffn}experts.down_proj"] = (m.experts, m.routed, m.d)
            ffn, width = f"{ffn}shared_expert.", m.routed
        found[f"{ffn}gate_proj.weight"] = found[f"{ffn}up_proj.weight"] = (width, m.d)
        found[f"{ffn}down_proj.weight"] = (m.d, width)
    return found | (hf_vision(m.d) if m.llama_4 else {})


def hf_vision(d: int) -> Shapes:
    found: Shapes = {
        "vision_model.patch_embedding.linear.weight": (V, PATCH),
        "vision_model.class_embedding": (V,),
        "vision_model.positional_embedding_vlm": (PLACES, V),
        "vision_model.vision_adapter.mlp.fc1.weight": (V_OUT, V_FFN),
        "vision_model.vision_adapter.mlp.fc2.weight": (V_OUT, V_OUT),
        "multi_modal_projector.linear_1.weight": (d, V_OUT),
    }
    norms = ["vision_model.layernorm_pre", "vision_model.layernorm_post"]
    for number in range(V_LAYERS):
        layer = f"vision_model.model.layers.{number}."
        norms += [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
        for name in "qkvo":
            found[f"{layer}self_attn.{name}_proj.weight"] = (V, V)
            found[f"{layer}self_attn.{name}_proj.bias"] = (V,)
        found[f"{layer}mlp.fc1.weight"], found[f"{layer}mlp.fc1.bias"] = (V_FFN, V), (V_FFN,)
        found[f"{layer}mlp.fc2.weight"], found[f"{layer}mlp.fc2.bias"] = (V, V_FFN), (V,)
    return found | {f"{norm}.{x}": (V,) for norm in norms for x in ("weight", "bias")}


# --- Meta's names, with the shape of a shard's part ----------------------------------------------
def meta_names(m: Facts, n: int) -> Shapes:
    found: Shapes = {
        "tok_embeddings.weight": (m.vocab // n, m.d),
        "output.weight": (m.vocab // n, m.d),
        "norm.weight": (m.d,),
    }
    q, kv = m.heads * m.head // n, max(m.kv * m.head // n, m.head)
    for number in range(m.layers):
        layer, ffn = f"layers.{number}.", f"layers.{number}.feed_forward."
        found[f"{layer}attention.wo.weight"] = (m.d, q)
        if not m.llama_4:
            found[f"{layer}attention_norm.weight"] = found[f"{layer}ffn_norm.weight"] = (m.d,)
            found[f"{layer}attention.wq.weight"] = (q, m.d)
            found[f"{layer}attention.wk.weight"] = (kv, m.d)
            found[f"{layer}attention.wv.weight"] = (kv, m.d)
            found[f"{ffn}w1.weight"] = found[f"{ffn}w3.weight"] = (m.ffn // n, m.d)
            found[f"{ffn}w2.weight"] = (m.d, m.ffn // n)
            continue
        found[f"{layer}attention.wqkv.weight"] = (q + 2 * kv, m.d)
        found[f"{layer}attention.wqkv.layer_norm_weight"] = (m.d,)
        if not m.routes(number):
            found[f"{ffn}mlp.layer_norm_weight"] = (m.d,)
            found[f"{ffn}mlp.fc1_weight"] = (2 * m.ffn // n, m.d)
            found[f"{ffn}mlp.fc2_weight"] = (m.d, m.ffn // n)
            continue
        inner = m.routed // n
        found[f"{ffn}norm.weight"] = (m.d,)
        found[f"{ffn}router_DE"] = (m.d, m.experts)
        found[f"{ffn}experts.moe_w_in_eD_F"] = (m.experts * m.d, inner)
        found[f"{ffn}experts.moe_w_swiglu_eD_F"] = (m.experts * m.d, inner)
        found[f"{ffn}experts.moe_w_out_eF_D"] = (m.experts * inner, m.d)
        found[f"{ffn}w_in_shared_FD.weight"] = (inner, m.d)
        found[f"{ffn}w_swiglu_FD.weight"] = (inner, m.d)
        found[f"{ffn}w_out_shared_DF.weight"] = (m.d, inner)
    return found | (meta_vision(m.d, n) if m.llama_4 else {})


def meta_vision(d: int, n: int) -> Shapes:
    encoder = "vision_embeddings.vision_encoder."
    found: Shapes = {
        f"{encoder}conv1._linear.weight": (V // n, PATCH),
        f"{encoder}class_embedding": (V,),
        f"{encoder}positional_embedding_vlm": (PLACES, V),
        "vision_embeddings.vision_adapter.mlp.c_fc.weight": (V_OUT // n, V_FFN),
        "vision_embeddings.vision_adapter.mlp.c_proj.weight": (V_OUT, V_OUT // n),
        "vision_projection.weight": (d // n, V_OUT),
    }
    norms = [f"{encoder}ln_pre", f"{encoder}ln_post"]
    for number in range(V_LAYERS):
        block = f"{encoder}transformer.resblocks.{number}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        for name in ("wq", "wk", "wv"):
            found[f"{block}attn.{name}.weight"] = (V // n, V)
            found[f"{block}attn.{name}.bias"] = (V // n,)
        found[f"{block}attn.wo.weight"], found[f"{block}attn.wo.bias"] = (V, V // n), (V,)
        found[f"{block}mlp.c_fc.weight"] = (V_FFN // n, V)
        found[f"{block}mlp.c_fc.bias"] = (V_FFN // n,)
        found[f"{block}mlp.c_proj.weight"] = (V, V_FFN // n)
        found[f"{block}mlp.c_proj.bias"] = (V,)
    return found | {f"{norm}.{x}": (V,) for norm in norms for x in ("weight", "bias")}


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


# --- Directories of holes ------------------------------------------------------------------------
SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def hf_config(name: str, m: Facts) -> dict:
    common = {
        "hidden_size": m.d,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv,
        "head_dim": m.head,
        "vocab_size": m.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": m.tied,
        "torch_dtype": "bfloat16",
    }
    if not m.llama_4:
        factor = 32.0 if name == "llama3.2-1b" else 8.0
        scaling = SCALING | {"factor": factor, "high_freq_factor": 4.0}
        own = {"model_type": "llama", "intermediate_size": m.ffn, "rope_scaling": scaling}
        return common | own | {"max_position_embeddings": 131_072}
    guard, maverick = not m.experts, name == "llama4-maverick"
    text = common | {
        "model_type": "llama4_text",
        "intermediate_size": m.routed,
        "intermediate_size_mlp": m.ffn,
        "num_local_experts": m.experts,
        "num_experts_per_tok": 0 if guard else 1,
        "interleave_moe_layer_step": m.step,
        "moe_layers": [i for i in range(m.layers) if m.routes(i)],
        "no_rope_layers": [],
        "no_rope_layer_interval": 80 if guard else 4,
        "attention_chunk_size": None if guard else 8192,
        "attn_temperature_tuning": False if guard else 4,
        "use_qk_norm": not maverick,
        "rope_scaling": None if maverick else SCALING | {"factor": 16.0, "high_freq_factor": 1.0},
        "max_position_embeddings": 8192 if guard else 1_048_576 if maverick else 10_485_760,
        "cache_implementation": "hybrid",
        "for_llm_compressor": False,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    }
    vision = {
        "model_type": "llama4_vision_model",
        "hidden_size": V,
        "num_hidden_layers": V_LAYERS,
        "num_attention_heads": 16,
        "intermediate_size": V_FFN,
        "vision_output_dim": V_OUT,
        "projector_input_dim": V_OUT,
        "projector_output_dim": V_OUT,
        "image_size": 336,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "rope_theta": 10_000,
        "vision_feature_select_strategy": "default",
    }
    tokens = {"boi_token_index": 200_080, "eoi_token_index": 200_081, "image_token_index": 200_092}
    kind = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}
    return kind | tokens | {"text_config": text, "vision_config": vision}


def meta_params(name: str, m: Facts) -> dict:
    common = {"dim": m.d, "n_layers": m.layers, "n_heads": m.heads, "n_kv_heads": m.kv}
    common |= {
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "use_scaled_rope": name != "llama4-maverick",
    }
    if not m.llama_4:
        multiple, ratio = {4096: (1024, 1.3), 8192: (4096, 1.3), 16384: (4096, 1.2)}.get(
            m.d, (256, 1.5)
        )
        return common | {
            "vocab_size": m.vocab,
            "multiple_of": multiple,
            "ffn_dim_multiplier": ratio,
        }
    square = {
        size: {"height": n, "width": n} for size, n in (("image_size", 336), ("patch_size", 14))
    }
    vision = square | {"dim": V, "n_layers": V_LAYERS, "n_heads": 16, "mlp_ratio": 4.0}
    own = {
        "vocab_size": m.vocab,
        "multiple_of": 2048,
        "ffn_dim_multiplier": 1.2,
        "ffn_exp": 4.0,
        "use_qk_norm": name != "llama4-maverick",
        "vision_args": vision | {"output_dim": V_OUT, "pixel_shuffle_ratio": 0.5},
    }
    if not m.experts:
        return common | own
    own |= {"nope_layer_interval": 4, "attention_chunk_size": 8192}
    moe = {"num_experts": m.experts, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1}
    moe |= {"interleave_moe_layer_step": m.step, "use_shared_expert": True}
    return common | own | {"moe_args": moe}


def hollow_hf(directory, name: str, m: Facts, files: int = 50) -> None:
    """A header for each file, and holes for all tensors, two bytes for each number."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(name, m)))
    weight_map, items = {}, list(hf_names(m).items())
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        header, end = {}, 0
        for key, shape in items[number::files]:
            start, end = end, end + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[key] = file
        text = json.dumps(header).encode()
        with open(directory / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": 2 * m.total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def hollow_meta(directory, name: str, m: Facts, n: int, *, without: tuple[str, ...] = ()) -> None:
    import ml_dtypes

    from l4jax.checkpoints import pth

    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(meta_params(name, m)))
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = [pth.Spec(k, x, dtype) for k, x in meta_names(m, n).items() if k not in without]
    specs.append(pth.Spec("rope.freqs", (m.head // 2,), dtype))
    for number in range(n):
        plan = pth.plan(specs, archive=f"consolidated.{number:02}")
        with open(directory / f"consolidated.{number:02}.pth", "wb") as stream:
            stream.truncate(plan.size)
            for offset, data in plan.framing(dict.fromkeys(plan.offsets, 0)):
                stream.seek(offset)
                stream.write(data)


# --- What the library makes of them --------------------------------------------------------------
def plan_of(source, directory, to, **options):
    """A conversion's plan, in which every tensor of both sides is moved exactly once."""
    from l4jax.checkpoints.plan import Options, make_plan

    plan = make_plan(source, directory, to=to, options=Options(**options))
    for side in ("source", "target"):
        tensors = getattr(plan, side).tensors
        moved = collections.Counter(
            match.theirs for component in plan.components for match in getattr(component, side)
        )
        assert moved == collections.Counter(list(tensors))
        cells = [key for tensor in tensors.values() for key in tensor.stored()]
        assert len(cells) == len(set(cells))
    held = collections.Counter(name for match in plan.target.matches for name in match.ours)
    twice = {name for name, n in held.items() if n > 1}
    tied = source.model.text.tie_embeddings and to == "meta"
    assert (set(held), twice) == (set(plan.wanted), {"embed"} if tied else set())
    return plan


def shapes_of(side) -> Shapes:
    """Every stored tensor of a plan's source or target."""
    found = {}
    for tensor in side.tensors.values():
        for key, (shape, dtype) in tensor.stored().items():
            assert dtype == "bfloat16"
            found[key] = shape
    return found


def in_shards(m: Facts, n: int) -> Shapes:
    names = meta_names(m, n).items()
    return {f"consolidated.{i:02}.pth:{key}": shape for i in range(n) for key, shape in names}


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """By name, the hollow Hugging Face directory of a model as the library sees it."""

    @functools.cache
    def make(name: str):
        from l4jax.checkpoints import directory

        place = tmp_path_factory.mktemp("hollow") / "hf"
        hollow_hf(place, name, MODELS[name])
        return directory.source(place)

    return make


def test_the_lists_add_up_to_what_is_published():
    for name, m in MODELS.items():
        names = hf_names(m)
        assert count(names) == m.total
        if name in ACTIVE:
            assert round(m.total / 1e9, 2) == BILLIONS[name]
            text = {k: x for k, x in names.items() if k.startswith("language_model.")}
            experts = {k: x for k, x in text.items() if ".experts." in k}
            active = count(text) - count(experts) + count(experts) / max(1, m.experts)
            assert round(active / 1e9, 2) == ACTIVE[name]
    assert round(count(hf_vision(5120)) / 1e9, 3) == round(0.851 + 0.021, 3)
    eight = meta_names(MODELS["llama4-maverick"], 8)
    assert eight["layers.0.attention.wqkv.weight"] == (896, 5120)
    assert eight["layers.0.feed_forward.mlp.fc1_weight"] == (4096, 5120)
    assert eight["layers.1.feed_forward.experts.moe_w_out_eF_D"] == (128 * 1024, 5120)
    assert eight["output.weight"] == (25_256, 5120)


@pytest.mark.parametrize("name", params(NAMES, [("llama3.1-8b",), ("llama3.2-1b",)]))
def test_hugging_face_to_every_format(name, hollow, tmp_path):
    from l4jax import presets
    from l4jax.checkpoints import arrays

    m, source = MODELS[name], hollow(name)
    preset = presets.get(name)
    assert source.model.text == preset.make()
    assert source.model.vision == preset.vision
    assert shapes_of(source) == hf_names(m)
    assert sum(math.prod(spec.shape) for spec in source.arrays.values()) == m.total
    for n in m.shards:
        assert shapes_of(plan_of(source, tmp_path / "m", "meta", shards=n).target) == in_shards(
            m, n
        )
    assert shapes_of(plan_of(source, tmp_path / "h", "hf").target) == hf_names(m)
    plan = plan_of(source, tmp_path / "orbax", "orbax")
    assert {key: spec.shape for key, spec in source.arrays.items()} == shapes_of(plan.target)
    assert plan.target.size == 2 * m.total
    # Made without contents, it is a source as well.
    (tmp_path / "orbax").mkdir()
    plan.target.create()
    plan.target.finish({})
    ours = arrays.source(tmp_path / "orbax")
    assert ours.model == source.model
    assert ours.arrays == source.arrays
    assert shapes_of(plan_of(ours, tmp_path / "h", "hf").target) == hf_names(m)
    for n in m.shards:
        assert shapes_of(plan_of(ours, tmp_path / "m", "meta", shards=n).target) == in_shards(m, n)


@pytest.mark.parametrize(("name", "shards"), params(FILES, []))
def test_meta_to_every_format(name, shards, tmp_path):
    from l4jax import presets
    from l4jax.checkpoints import directory

    m = MODELS[name]
    hollow_meta(tmp_path / "meta", name, m, shards)
    source = directory.source(tmp_path / "meta")
    expected = presets.get(name).make()
    if name == "llama3.2-1b":  # of which Meta's own code applies 8, and its file says nothing
        assert source.model.text.attention.rope.scaling.factor == 8
    else:
        assert presets.same_but_context(source.model.text, expected)
    assert source.model.vision == presets.get(name).vision
    assert shapes_of(source) == in_shards(m, shards)
    assert shapes_of(plan_of(source, tmp_path / "h", "hf").target) == hf_names(m)
    assert plan_of(source, tmp_path / "o", "orbax").target.size == 2 * m.total
    assert shapes_of(plan_of(source, tmp_path / "m", "meta", shards=shards).target) == in_shards(
        m, shards
    )


def test_a_tied_head_may_be_left_out_of_metas_files(tmp_path):
    from l4jax.checkpoints import directory

    m = MODELS["llama3.2-1b"]
    hollow_meta(tmp_path / "meta", "llama3.2-1b", m, 1, without=("output.weight",))
    source = directory.source(tmp_path / "meta")
    assert shapes_of(plan_of(source, tmp_path / "h", "hf").target) == hf_names(m)


# --- Sizes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "shards"), params(SHARD_BYTES, [("llama4-maverick", 8)]))
def test_metas_shards_are_as_large_as_the_published_ones(name, shards, hollow, tmp_path):
    """Within what training left in these files and what the zip archives pad."""
    m = MODELS[name]
    plan = plan_of(hollow(name), tmp_path / "meta", "meta", shards=shards)
    (tmp_path / "meta").mkdir()
    plan.target.create()
    sizes = {file.stat().st_size for file in (tmp_path / "meta").glob("*.pth")}
    assert len(sizes) == 1
    (size,) = sizes
    assert size * shards == plan.target.size
    assert 0 < size - 2 * count(meta_names(m, shards)) < 1e-5 * size
    assert abs(size / SHARD_BYTES[name, shards] - 1) < 1e-6


def test_mavericks_fp8_packages_are_as_large_as_the_published_ones(hollow, tmp_path):
    """Hugging Face's has every routed expert in fp8, Meta's all but the last layer's."""
    source = hollow("llama4-maverick")
    plan = plan_of(source, tmp_path / "hf", "hf", scheme="fp8")
    assert round(plan.target.size / 2**30) == 388
    names = {key for tensor in plan.target.tensors.values() for key in tensor.stored()}
    prefix = r"language_model\.model\.layers\.\d+\.feed_forward\.experts\.\d+\.(gate|up|down)_proj"
    narrow = {key for key in names if re.fullmatch(rf"{prefix}\.weight", key)}
    assert len(narrow) == 24 * 128 * 3
    assert {key for key in names if key.endswith("_scale")} == {f"{key}_scale" for key in narrow}
    assert names - narrow - {f"{key}_scale" for key in narrow} == {
        key for key in hf_names(MODELS["llama4-maverick"]) if ".experts." not in key
    }
    plan = plan_of(source, tmp_path / "meta", "meta", scheme="fp8", shards=8)
    shards = sum(
        math.prod(shape) * (1 if dtype.startswith("float8") else 2)
        for tensor in plan.target.tensors.values()
        for key, (shape, dtype) in tensor.stored().items()
        if key.startswith("consolidated")
    )
    assert round(shards / 1e9, 1) == 433.0
    assert 0 < 8 * FP8_BYTES - shards < 1e-5 * shards
