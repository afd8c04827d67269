"""Adapters of ours in PEFT's hands, and PEFT's in ours: logits of both are the same."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, forward

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")
peft = pytest.importorskip("peft", reason="needs peft: pip install l4jax[parity]")
from safetensors.numpy import load_file, save_file  # noqa: E402
from test_transformers import TOLERANCE, relative  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # It heeds them: the logits tell.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:[`\\w ]*is deprecated:FutureWarning"),
]

FAMILIES = ("llama4-scout", "llama4-maverick", "llama3.1-8b")
ROWS, LENGTH = 2, 53


@functools.cache
def plain(name):
    from l4jax import presets

    config = presets.get(f"tiny-{name}").make()
    return build(dataclasses.replace(config, num_layers=5, pattern=config.pattern[-2:]))


def adapted(name, layers=((("*",), 3, 6.0),)):
    """Adapters of these matrices, ranks and alphas, which really change the logits."""
    from l4jax import lora, weights

    model = plain(name)
    for patterns, rank, alpha in layers:
        every = weights.EVERY if patterns == ("*",) else patterns
        model = lora.apply(model, every, rank=rank, alpha=alpha, key=jax.random.key(0))
    rng = np.random.default_rng(3)
    return lora.restore(
        model,
        {
            name: x + np.float32(0.1) * rng.standard_normal(x.shape, np.float32)
            for name, x in lora.state(model).items()
        },
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory of a family's model, as transformers reads it."""
    from l4jax import checkpoints

    @functools.cache
    def write(name):
        directory = tmp_path_factory.mktemp("hf") / name
        checkpoints.save(plain(name), directory, to="hf")
        return directory

    return write


def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def tokens_of(name):
    rng = np.random.default_rng(0)
    return rng.integers(3, plain(name).config.vocab_size, (ROWS, LENGTH), np.int32)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


PARTIAL = (
    (("*.attention.k", "*.attention.o"), 2, 3.0),
    (("*.shared.down", "layers.0.ffn.up"), 5, 1.0),
    (("*.1.ffn.down",), 1, 2.0),
)
CASES = [
    pytest.param(name, ((("*",), 3, 6.0),), id=name, marks=pytest.mark.slow) for name in FAMILIES
]


@pytest.mark.parametrize(
    ("name", "layers"), [*CASES, pytest.param("llama4-scout", PARTIAL, id="partial")]
)
def test_peft_computes_what_our_adapters_do(name, layers, written, tmp_path):
    from l4jax import checkpoints, lora
    from l4jax.checkpoints import peft as ours

    model, tokens = adapted(name, layers), tokens_of(name)
    wanted = forward(model, tokens)
    ours.save(model, tmp_path / "adapter", base="somewhere")
    base = theirs(written(name))
    before = logits_of(base, tokens)
    assert relative(wanted, before) > 0.1
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert relative(logits_of(loaded, tokens), wanted) < TOLERANCE
    again = ours.load(plain(name), tmp_path / "adapter")
    assert relative(forward(again, tokens), wanted) < TOLERANCE / 4
    checkpoints.save(lora.merge(model), tmp_path / "merged", to="hf")
    assert relative(logits_of(theirs(tmp_path / "merged"), tokens), wanted) < TOLERANCE


SETTINGS = {
    "llama4-scout": {
        "target_modules": ["q_proj", "v_proj", "o_proj", "shared_expert.gate_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "llama4-maverick": {"target_modules": "all-linear", "use_rslora": True},
    "llama3.1-8b": {
        "target_modules": ["k_proj", "down_proj"],
        "layers_to_transform": [1, 3],
        "rank_pattern": {"model.layers.1.self_attn.k_proj": 2},
        "alpha_pattern": {"model.layers.1.self_attn.k_proj": 9},
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_we_compute_what_adapters_of_pefts_do(name, written, tmp_path):
    from l4jax.checkpoints import peft as ours

    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **SETTINGS[name])
    if name == "llama4-maverick":
        config.exclude_modules = r".*\.router"
    made = peft.get_peft_model(theirs(written(name)), config)
    with torch.no_grad():
        for key, x in made.named_parameters():
            if "lora_" in key:
                x.mul_(0.3)
    made.save_pretrained(tmp_path)
    tokens = tokens_of(name)
    model = ours.load(plain(name), tmp_path)
    wanted = logits_of(made.eval(), tokens)
    assert relative(forward(plain(name), tokens), wanted) > 0.1
    assert relative(forward(model, tokens), wanted) < TOLERANCE


def test_adapters_beside_vision_have_other_names(tmp_path):
    from l4jax import lora
    from l4jax.checkpoints import peft as ours

    model = adapted("llama4-scout")
    ours.save(model, tmp_path / "a", prefix="language_model.")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    start = "base_model.model.language_model.model.layers.0"
    assert f"{start}.self_attn.q_proj.lora_A.weight" in names
    assert f"{start}.feed_forward.experts.base_layer.lora_B.weight" in names
    again = ours.load(plain("llama4-scout"), tmp_path / "a", prefix="language_model.")
    for name, x in lora.state(again).items():
        if ".ffn.gate" not in name and ".ffn.up" not in name:
            np.testing.assert_allclose(x, lora.state(model)[name], rtol=1e-6)
    with pytest.raises(ValueError, match=r"the model has no place for base_model\.model\.language"):
        ours.load(plain("llama4-scout"), tmp_path / "a")


def test_quantized_bases_keep_their_adapters(tmp_path):
    from l4jax import lora, quantization, weights
    from l4jax.checkpoints import peft as ours

    model = adapted("llama3.1-8b")
    ours.save(model, tmp_path / "a")
    small = quantization.quantize(plain("llama3.1-8b"), weights.EVERY, "int8")
    loaded = lora.state(ours.load(small, tmp_path / "a"))
    for name, x in lora.state(model).items():
        np.testing.assert_allclose(loaded[name], x, rtol=1e-6)
    assert loaded["layers.0.attention.q.a"].dtype == jnp.float32


def test_what_is_no_plain_adapter_is_refused(tmp_path):
    from l4jax.checkpoints import peft as ours

    model = plain("llama3.1-8b")
    with pytest.raises(ValueError, match="no adapters to save"):
        ours.save(model, tmp_path / "a")
    ours.save(adapted("llama3.1-8b"), tmp_path / "a")
    with pytest.raises(FileExistsError, match="already exists"):
        ours.save(adapted("llama3.1-8b"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora True is not supported; only False is"):
        ours.load(model, tmp_path / "a")
    file.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {key: tensors[key][:, 1:]}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.* do not fit model\.layers\.0\.self_attn"):
        ours.load(model, tmp_path / "a")
    save_file(
        {name: x for name, x in tensors.items() if name != key.replace("lora_A", "lora_B")},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="lacks .*q_proj.lora_B"):
        ours.load(model, tmp_path / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        ours.load(model, tmp_path / "a")
