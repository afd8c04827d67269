"""Logits against Meta's own code, prefilled over several chunks, under its own weight names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import build, outputs

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")
pytest.importorskip("fairscale", reason="needs fairscale: pip install l4jax[parity]")

pytestmark = pytest.mark.parity

TOLERANCE = 3e-5
"""Of the logits' standard deviation; Meta's code and transformers differ by up to 2e-5 or so."""
ROWS, LENGTH = 2, 150


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """Meta's code runs on one CPU process: model-parallel groups of one, and no move to CUDA."""
    import fairscale.nn.model_parallel.initialize as parallel

    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    parallel.initialize_model_parallel(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
        patch.setattr(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
        yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def tiny(name: str, **attention):
    """Sizes that Meta's arguments can say: widths follow from the model's width there."""
    from l4jax import presets
    from l4jax.config import MoE

    config = presets.get(f"tiny-{name}").make()
    scaling = config.attention.rope.scaling
    rope = dataclasses.replace(
        config.attention.rope,
        scaling=scaling and dataclasses.replace(scaling, original_context=8192),
    )
    if config.attention.chunk_size:
        attention["chunk_size"] = 32
    return dataclasses.replace(
        config,
        mlp_dim=192,
        attention=dataclasses.replace(config.attention, rope=rope, **attention),
        moe=config.moe and MoE(num_experts=4, mlp_dim=96, shared_mlp_dim=96),
    )


def arguments(config) -> dict:
    a = config.attention
    return {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": a.num_heads,
        "n_kv_heads": a.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 32,
        "ffn_dim_multiplier": 1.0,
        "rope_theta": a.rope.theta,
        "use_scaled_rope": a.rope.scaling is not None,
        "max_batch_size": ROWS,
        "max_seq_len": 256,
    }


def llama4_arguments(config) -> dict:
    a, moe = config.attention, config.moe
    return arguments(config) | {
        "ffn_exp": 4.0,
        "attention_chunk_size": a.chunk_size,
        "nope_layer_interval": 4 if a.temperature else None,
        "use_qk_norm": a.qk_norm,
        "attn_temperature_tuning": a.temperature is not None,
        "floor_scale": a.temperature.floor if a.temperature else 8192.0,
        "moe_args": moe
        and {
            "num_experts": moe.num_experts,
            "interleave_moe_layer_step": 1 if config.pattern[0].ffn == "moe" else 2,
        },
    }


def t(x):
    return torch.tensor(np.array(x, np.float32))


def rows(x, *, pairs: bool):
    """Ours (d, heads, h), half-split, to theirs (heads · h, d), rotated pairs side by side."""
    d, n, h = x.shape
    if pairs:
        x = np.stack([x[:, :, : h // 2], x[:, :, h // 2 :]], axis=-1).reshape(d, n, h)
    return t(x.reshape(d, n * h).T)


def block_weights(block, i, family) -> dict:
    """One layer under the names of Meta's published files."""
    attention, ffn, prefix = block["attention"], block["ffn"], f"layers.{i}."
    q, k, v = (rows(attention[n], pairs=n != "v") for n in "qkv")
    norms = [t(block[name]["scale"]) for name in ("attention_norm", "ffn_norm")]
    names = {"attention.wo.weight": t(attention["o"].reshape(-1, attention["o"].shape[-1]).T)}
    if family == 3:
        names |= {"attention.wq.weight": q, "attention.wk.weight": k, "attention.wv.weight": v}
        names |= {"attention_norm.weight": norms[0], "ffn_norm.weight": norms[1]}
        for theirs, ours in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            names[f"feed_forward.{theirs}.weight"] = t(ffn[ours].T)
        return {prefix + name: value for name, value in names.items()}
    names |= {"attention.wqkv.weight": torch.cat([q, k, v])}
    names |= {"attention.wqkv.layer_norm_weight": norms[0]}
    if "router" not in ffn:
        both = torch.cat([t(ffn["gate"].T), t(ffn["up"].T)])
        names |= {
            "feed_forward.mlp.fc1_weight": both,
            "feed_forward.mlp.fc2_weight": t(ffn["down"].T),
        }
        names |= {"feed_forward.mlp.layer_norm_weight": norms[1]}
        return {prefix + name: value for name, value in names.items()}
    ours = {
        "norm.weight": norms[1],
        "router_DE": t(ffn["router"]),
        "experts.moe_w_in_eD_F": t(ffn["gate"]).flatten(0, 1),
        "experts.moe_w_swiglu_eD_F": t(ffn["up"]).flatten(0, 1),
        "experts.moe_w_out_eF_D": t(ffn["down"]).flatten(0, 1),
        "w_in_shared_FD.weight": t(ffn["shared"]["gate"].T),
        "w_swiglu_FD.weight": t(ffn["shared"]["up"].T),
        "w_out_shared_DF.weight": t(ffn["shared"]["down"].T),
    }
    names |= {f"feed_forward.{name}": value for name, value in ours.items()}
    return {prefix + name: value for name, value in names.items()}


def state_dict(model, family) -> dict:
    import reference

    weights = reference.weights_of(model)
    state = {
        "tok_embeddings.weight": t(weights["embed"]),
        "norm.weight": t(weights["norm"]),
        "output.weight": t(weights["head"].T),
    }
    for i, block in enumerate(weights["blocks"]):
        state |= block_weights(block, i, family)
    return state


def compare(model, theirs, run, family) -> float:
    """Largest difference of all logits, relative to their standard deviation."""
    theirs.load_state_dict(state_dict(model, family))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, LENGTH), np.int32)
    expected = run(torch.tensor(tokens).long()).numpy()
    assert expected.std() > 0.9
    return np.abs(np.asarray(outputs(model, tokens).logits) - expected).max() / expected.std()


@pytest.mark.parametrize("name", ["llama4-scout", "llama4-maverick", "llama-guard-4"])
def test_llama_4_logits_equal_metas(name, meta):
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.datatypes import TransformerInput
    from llama_models.llama4.model import Transformer

    model = build(tiny(name))
    theirs = Transformer(ModelArgs(**llama4_arguments(model.config)))
    difference = compare(
        model, theirs, lambda ids: theirs(TransformerInput(ids, tokens_position=0)).logits, 4
    )
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", ["llama3-8b", "llama3.1-8b"])
def test_llama_3_logits_equal_metas(name, meta):
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    model = build(tiny(name))
    theirs = Transformer(ModelArgs(**arguments(model.config)))
    assert compare(model, theirs, lambda ids: theirs(ids, 0), 3) <= TOLERANCE


def test_the_comparison_notices_another_rope(meta):
    """The original context is fixed in Meta's code: at this length scaling acts, but a little."""
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.datatypes import TransformerInput
    from llama_models.llama4.model import Transformer

    model = build(tiny("llama4-scout"))
    theirs = Transformer(ModelArgs(**llama4_arguments(model.config) | {"use_scaled_rope": False}))
    difference = compare(
        model, theirs, lambda ids: theirs(TransformerInput(ids, tokens_position=0)).logits, 4
    )
    assert difference > 10 * TOLERANCE
