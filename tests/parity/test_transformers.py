"""Logits, checkpoints and greedy tokens against transformers, weights made by transformers.

Every model crosses at least three chunks and the temperature's floor many times, has logits of
standard deviation above 1, and really uses every expert.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import numpy as np
import pytest
from conftest import outputs

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")

pytestmark = pytest.mark.parity

ROWS, LENGTH, VOCABULARY = 3, 150, 512
TOLERANCE = 2e-5
"""Largest logit difference over their standard deviation. From the same models in float64, both
sides differ by about 1e-5 (ours by less, in every family), and eager from sdpa by up to 1e-5."""
TOLERANCES = {"llama 3": 2.5e-5}
"""Both sides are up to 1.4e-5 from float64 there, so they may be twice that apart."""
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_4 = SIZES | {
    "intermediate_size": 96,
    "intermediate_size_mlp": 160,
    "num_hidden_layers": 8,
    "head_dim": 16,
    "num_local_experts": 4,
    "attention_chunk_size": 32,
    "floor_scale": 16,
}
LLAMA_3 = SIZES | {"intermediate_size": 160, "num_hidden_layers": 4, "rms_norm_eps": 1e-5}
THETA = {"rope_theta": 500_000.0}
SCOUT_ROPE = SCALED | {"factor": 16.0, "high_freq_factor": 1.0} | THETA
PLAIN_ROPE = {"rope_type": "default"} | THETA
FAMILIES = {
    "scout": LLAMA_4 | {"use_qk_norm": True, "rope_parameters": SCOUT_ROPE},
    "scout top 2": LLAMA_4
    | {"use_qk_norm": True, "rope_parameters": SCOUT_ROPE, "num_experts_per_tok": 2}
    | {"num_hidden_layers": 4, "num_local_experts": 5},
    "maverick": LLAMA_4
    | {"use_qk_norm": False, "rope_parameters": PLAIN_ROPE, "interleave_moe_layer_step": 2}
    | {"attention_chunk_size": 16},
    "guard": LLAMA_4
    | {"no_rope_layers": [1] * 4, "moe_layers": [], "num_hidden_layers": 4, "use_qk_norm": True}
    | {"attention_chunk_size": 512, "rope_parameters": SCOUT_ROPE},
    "llama 3": LLAMA_3 | {"rope_parameters": PLAIN_ROPE},
    "llama 3.1": LLAMA_3 | {"rope_parameters": SCALED | THETA},
    "llama 3.2": LLAMA_3 | {"rope_parameters": SCALED | THETA, "tie_word_embeddings": True},
}


class Pair(NamedTuple):
    """The same model on both sides, and the directory it was saved to."""

    name: str
    theirs: object
    ours: object
    directory: object


def randomize(module, seed=0):
    """Weights that do not degenerate: unit-sized activations, norm scales other than 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            elif "experts" in name and "shared" not in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
    return module.eval()


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """A family's pair; the checkpoint is written by transformers, in several shards."""

    @functools.cache
    def make(name: str) -> Pair:
        from l4jax import checkpoints

        kind, config = (
            (transformers.LlamaForCausalLM, transformers.LlamaConfig)
            if name.startswith("llama 3")
            else (transformers.Llama4ForCausalLM, transformers.Llama4TextConfig)
        )
        theirs = randomize(kind(config(**FAMILIES[name], attn_implementation="eager")))
        directory = tmp_path_factory.mktemp("transformers")
        theirs.save_pretrained(directory, max_shard_size="300KB")
        assert len(list(directory.glob("*.safetensors"))) > 1
        return Pair(name, theirs, checkpoints.load(directory, dtype="float32"), directory)

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def pair(request, pair_of) -> Pair:
    return pair_of(request.param)


def tokens(seed=0, shape=(ROWS, LENGTH)):
    return np.random.default_rng(seed).integers(3, VOCABULARY, shape).astype(np.int32)


def their_logits(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor(ids).long(), use_cache=False, **inputs).logits.numpy()


def relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / expected.std()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal(pair, attention):
    pair.theirs.set_attn_implementation(attention)
    expected = their_logits(pair.theirs, tokens())
    pair.theirs.set_attn_implementation("eager")
    found = outputs(pair.ours, tokens())
    assert expected.std() > 1
    assert relative(found.logits, expected) <= TOLERANCES.get(pair.name, TOLERANCE)
    if pair.ours.config.moe is not None:
        routed = sum(layer.ffn == "moe" for layer in pair.ours.config.layers)
        load = np.asarray(found.routing.load)
        assert load.shape == (routed, pair.ours.config.moe.num_experts)
        assert load.min() > 0


def test_the_configuration_is_read_as_it_was_meant(pair_of):
    scout, maverick, guard = (pair_of(n).ours.config for n in ("scout", "maverick", "guard"))
    chunked = ("chunked", "chunked", "chunked", "global")
    assert scout.pattern == tuple((kind, "moe") for kind in chunked)
    assert [layer.ffn for layer in maverick.pattern] == ["dense", "moe"] * 2
    assert maverick.attention.chunk_size == 16
    assert maverick.attention.temperature.floor == 16
    assert set(guard.layers) <= {("causal", "dense"), ("chunked", "dense")}
    assert (scout.attention.qk_norm, maverick.attention.qk_norm) == (True, False)
    assert pair_of("llama 3.2").ours.config.tie_embeddings


def test_our_export_is_loaded_whole_and_computes_the_same(pair, tmp_path):
    from l4jax import checkpoints

    checkpoints.save(pair.ours, tmp_path / "hf", to="hf", max_shard_bytes=300_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(pair.theirs)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    expected = their_logits(pair.theirs, tokens())
    np.testing.assert_array_equal(their_logits(again, tokens()), expected)


def test_there_and_back_gives_the_same_bytes(pair, tmp_path):
    from safetensors.numpy import load_file

    from l4jax import checkpoints

    checkpoints.save(pair.ours, tmp_path / "hf", to="hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {}
    for file in pair.directory.glob("*.safetensors"):
        expected |= load_file(file)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert checkpoints.read_config(tmp_path / "hf") == pair.ours.config


@pytest.mark.parametrize("name", ["scout", "llama 3.1"])
def test_both_spellings_of_rope_are_read_alike(name, pair_of, tmp_path):
    from l4jax import checkpoints

    values = json.loads((pair_of(name).directory / "config.json").read_text())
    section = values.pop("rope_parameters")
    values["rope_theta"] = section.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_scaling": section}))
    assert checkpoints.read_config(tmp_path) == pair_of(name).ours.config
    section["type"] = section.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_scaling": section}))
    assert checkpoints.read_config(tmp_path) == pair_of(name).ours.config


@pytest.mark.parametrize("name", ["scout", "maverick", "llama 3.1"])
def test_a_field_that_is_left_out_means_what_transformers_takes_it_for(name, pair_of, tmp_path):
    """Either that, or the file is refused: never another model without a word."""
    from l4jax import checkpoints

    config = type(pair_of(name).theirs.config)
    values = json.loads((pair_of(name).directory / "config.json").read_text())
    wrong = []
    for field in sorted(set(values) - {"model_type", "architectures"}):
        rest = {key: value for key, value in values.items() if key != field}
        (tmp_path / "config.json").write_text(json.dumps(rest))
        try:
            ours = checkpoints.read_config(tmp_path)
        except ValueError:
            continue
        (tmp_path / "config.json").write_text(json.dumps(config(**rest).to_dict()))
        try:
            theirs = checkpoints.read_config(tmp_path)
        except ValueError as error:
            theirs = error
        if theirs != ours:
            wrong.append(field)
    assert wrong == []


def test_the_text_part_of_a_model_with_vision_is_its_language_model(tmp_path):
    from l4jax import checkpoints

    vision = transformers.Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=28,
        patch_size=14,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
    )
    text = transformers.Llama4TextConfig(**FAMILIES["scout"] | {"num_hidden_layers": 4})
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    theirs = randomize(transformers.Llama4ForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    ours = checkpoints.load(tmp_path, dtype="float32")
    expected = their_logits(theirs.language_model, tokens())
    assert relative(outputs(ours, tokens()).logits, expected) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["scout", pytest.param("maverick", marks=pytest.mark.slow), "llama 3.1"]
)
def test_greedy_tokens_are_the_same_for_64_steps(name, pair_of):
    """From prompts within a chunk and beyond several; the two best logits are never close."""
    from l4jax.inference.decoding import generate

    pair = pair_of(name)
    for prompt in (tokens(5, (2, 27)), tokens(6, (2, 101))):
        with torch.no_grad():
            made = pair.theirs.generate(
                torch.tensor(prompt).long(),
                attention_mask=torch.ones(prompt.shape, dtype=torch.long),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack(made.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-4
        found = generate(pair.ours, prompt, max_new_tokens=64)
        np.testing.assert_array_equal(found.tokens, made.sequences[:, prompt.shape[1] :].numpy())


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_padded_and_packed_rows_equal_the_row_alone_where_transformers_differs(name, pair_of):
    """transformers scales queries by the place in the batch row, not by the token's position.

    Meta's definition uses the position, so a padded or packed row must give what it gives alone.
    Should transformers ever do so, the last assertions fail: then compare with it directly.
    """
    pair, row, padding = pair_of(name), tokens()[:1, :100], 40
    alone = their_logits(pair.theirs, row)
    padded = np.pad(row, ((0, 0), (padding, 0)))
    positions = np.arange(-padding, 100, dtype=np.int32)[None]
    ours = outputs(pair.ours, padded, positions).logits[:, padding:]
    assert relative(ours, alone) <= TOLERANCE
    segments = (positions >= 0).astype(np.int32)
    ours = outputs(pair.ours, padded, None, segments).logits[:, padding:]
    assert relative(ours, alone) <= TOLERANCE
    mask = torch.tensor(segments).long()
    theirs = their_logits(
        pair.theirs, padded, attention_mask=mask, position_ids=torch.tensor(positions).clamp(min=0)
    )
    assert relative(theirs[:, padding:], alone) > 0.1
