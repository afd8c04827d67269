"""Meta's own code loads the Meta directories that we write; we load those that it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import warnings

import numpy as np
import pytest
from conftest import build, forward

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")
pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")
pytest.importorskip("fairscale", reason="needs fairscale: pip install l4jax[parity]")
from test_convert_transformers import VISION, inputs, mended, params  # noqa: E402, F401
from test_meta import LENGTH, ROWS, TOLERANCE, arguments, llama4_arguments, tiny  # noqa: E402
from test_meta import meta as one_process  # noqa: E402, F401
from test_transformers import LLAMA_4, SCOUT_ROPE, randomize, relative  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("one_process")]

LLAMA_4_NAMES = ("llama4-scout", "llama4-maverick", "llama-guard-4")
NAMES = (*LLAMA_4_NAMES, "llama3-8b", "llama3.1-8b")
RUN = {"max_seq_len": 256, "max_batch_size": ROWS}
"""What Meta's generation code adds to the file's arguments."""


def is_3(name) -> bool:
    return name.startswith("llama3")


def transformer(name, values):
    """Meta's model for a params.json, its parameters not set yet, and its arguments."""
    if is_3(name):
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer
    else:
        from llama_models.llama4.args import ModelArgs
        from llama_models.llama4.model import Transformer
    args = ModelArgs(**values, **RUN)
    return Transformer(args).float(), args


def merged(directory, args) -> dict:
    """What Meta's generation code loads, on one process, from however many shards."""
    from llama_models.checkpoint import maybe_reshard_state_dict

    files = sorted(directory.glob("*.pth"))
    experts = getattr(args, "moe_args", None)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*set_default_tensor_type", category=UserWarning)
        try:
            return maybe_reshard_state_dict(
                files,
                n_kv_heads=args.n_kv_heads or args.n_heads,
                moe_num_experts=experts.num_experts if experts else None,
            )
        finally:
            torch.set_default_dtype(torch.float32)


def theirs_from(name, directory):
    """Meta's model with the weights of a directory; its own code is less strict."""
    values = json.loads((directory / "params.json").read_text())
    model, args = transformer(name, values)
    state = {key: x.float() for key, x in merged(directory, args).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def their_logits(name, model, ids, image=None):
    from llama_models.llama4.datatypes import TransformerInput

    ids = torch.tensor(np.asarray(ids)).long()
    with torch.inference_mode():
        if is_3(name):
            return model(ids, 0).numpy()
        given = TransformerInput(ids, tokens_position=0, image_embedding=image)
        return model(given).logits.numpy()


def tokens(vocabulary=512, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, (ROWS, LENGTH), np.int32)


def convert(directory, new, to, **options):
    from l4jax import checkpoints

    chosen = checkpoints.Options(max_shard_bytes=200_000, **options)
    checkpoints.convert(directory, new, to=to, options=chosen, licence="none")
    return new


# --- What we write -------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", params([1, 2, 4], [2]))
@pytest.mark.parametrize("name", NAMES)
def test_metas_code_loads_what_we_write(name, shards, tmp_path):
    """With as many shards as there are key-value heads, too; from both other formats."""
    from l4jax import checkpoints

    ours = build(tiny(name, num_heads=8, num_kv_heads=4, head_dim=8))
    start = "orbax" if shards == 2 else "hf"
    checkpoints.save(ours, tmp_path / start, to=start)
    new = convert(tmp_path / start, tmp_path / "meta", "meta", shards=shards)
    names = [f"consolidated.{number:02}.pth" for number in range(shards)]
    assert sorted(file.name for file in new.glob("*.pth")) == names
    for file in names:
        loaded = torch.load(new / file, weights_only=True, mmap=True)
        assert all(x.dtype == torch.float32 for x in loaded.values())
    expected = forward(ours, tokens())
    found = their_logits(name, theirs_from(name, new), tokens())
    assert expected.std() > 0.9
    assert relative(found, expected) <= TOLERANCE


def test_tied_heads_are_repeated_for_metas_code(tmp_path):
    """Its Llama 3.2 has a head of its own, which the published files fill with the table."""
    from l4jax import checkpoints

    config = tiny("llama3.2-1b")
    # Meta's code knows the factor 8 only.
    rope = config.attention.rope
    rope = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, factor=8.0))
    attention = dataclasses.replace(config.attention, rope=rope)
    ours = build(dataclasses.replace(config, attention=attention))
    checkpoints.save(ours, tmp_path / "hf", to="hf")
    new = convert(tmp_path / "hf", tmp_path / "meta", "meta", shards=2)
    theirs = theirs_from("llama3.2-1b", new)
    assert torch.equal(theirs.output.weight, theirs.tok_embeddings.weight)
    found = their_logits("llama3.2-1b", theirs, tokens())
    assert relative(found, forward(ours, tokens())) <= TOLERANCE


def test_more_shards_than_key_value_heads_repeat_each_head(tmp_path):
    """As in the 16 shards of 405B: neighbours hold the same head."""
    from l4jax import checkpoints

    ours = build(tiny("llama3.1-8b"))
    checkpoints.save(ours, tmp_path / "hf", to="hf")
    new = convert(tmp_path / "hf", tmp_path / "meta", "meta", shards=4)
    shards = [torch.load(file, weights_only=True) for file in sorted(new.glob("*.pth"))]
    size = ours.config.attention.head_dim
    whole = torch.load(
        convert(tmp_path / "hf", tmp_path / "one", "meta") / "consolidated.00.pth",
        weights_only=True,
    )
    for name in ("wk", "wv"):
        key = f"layers.1.attention.{name}.weight"
        for rank, shard in enumerate(shards):
            head = rank // 2
            assert torch.equal(shard[key], whole[key][head * size : (head + 1) * size])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """transformers' model with vision whose sizes Meta's arguments can say."""
    rope = SCOUT_ROPE | {"original_max_position_embeddings": 8192}
    sizes = LLAMA_4 | {"use_qk_norm": True, "rope_parameters": rope, "num_key_value_heads": 4}
    config = transformers.Llama4Config(
        text_config=transformers.Llama4TextConfig(**sizes),
        vision_config=transformers.Llama4VisionConfig(**VISION),
        attn_implementation="eager",
        image_token_index=500,
    )
    model = randomize(transformers.Llama4ForConditionalGeneration(config))
    directory = tmp_path_factory.mktemp("seeing")
    model.save_pretrained(directory)
    return model, directory


def seen_by_meta(theirs, given):
    """Meta's embedding of the images, at the places of their tokens, and where these are."""
    from llama_models.llama4.datatypes import MaskedEmbedding

    ids, pixels = given["input_ids"], given["pixel_values"]
    mask = (ids == 500)[..., None]
    with torch.inference_mode():
        nothing = torch.zeros(*ids.shape, theirs.args.dim)
        # The first row has two tiles, the second has one.
        embedding = theirs.vision_embeddings([[pixels[:2]], [pixels[2:]]], mask, nothing)
        return MaskedEmbedding(embedding=embedding, mask=mask)


@pytest.mark.parametrize("shards", params([1, 2, 4], [2]))
def test_metas_code_sees_images_as_transformers_does(shards, seeing, tmp_path):
    """Weights and biases of its encoder, adapter and projector; then logits with both images."""
    model, directory = seeing
    new = convert(directory, tmp_path / "meta", "meta", shards=shards)
    theirs, given = theirs_from("llama4-scout", new), inputs()
    image = seen_by_meta(theirs, given)
    with torch.inference_mode():
        found = theirs.vision_projection(image.embedding)[image.mask[..., 0]].numpy()
        features = model.vision_model(given["pixel_values"]).last_hidden_state
        expected = model.multi_modal_projector(features.flatten(0, 1)).numpy()
        whole = model(**given, use_cache=False).logits.numpy()
    assert found.shape == expected.shape == (12, 64)
    assert relative(found, expected) <= TOLERANCE
    assert whole.std() > 1
    logits = their_logits("llama4-scout", theirs, given["input_ids"], image)
    assert relative(logits, whole) <= TOLERANCE


def test_the_comparison_notices_an_exchanged_bias(seeing, tmp_path):
    model, directory = seeing
    theirs = theirs_from("llama4-scout", convert(directory, tmp_path / "meta", "meta"))
    attn = theirs.vision_embeddings.vision_encoder.transformer.resblocks[1].attn
    attn.wq.bias.data, attn.wk.bias.data = attn.wk.bias.data, attn.wq.bias.data
    given = inputs()
    image = seen_by_meta(theirs, given)
    with torch.inference_mode():
        found = theirs.vision_projection(image.embedding)[image.mask[..., 0]].numpy()
        features = model.vision_model(given["pixel_values"]).last_hidden_state
        expected = model.multi_modal_projector(features.flatten(0, 1)).numpy()
    assert relative(found, expected) > 10 * TOLERANCE


# --- What Meta's code writes ---------------------------------------------------------------------
class Published:
    """Meta's working names and whole tensors, cut up under the names of its published files.

    Written from the shapes of those files alone: every shard of wqkv holds its rows of q, then of
    k, then of v; of fc1, of gate, then of up; experts are folded into the first dimension.
    """

    COLUMNS = r"(conv1\._linear|vision_projection|w[qkv]|c_fc)\.(weight|bias)$"
    ROWS = r"(wo|c_proj)\.weight$"

    def __init__(self, state, shards) -> None:
        self.left, self.shards = dict(state), [{} for _ in range(shards)]

    def put(self, name, parts) -> None:
        for shard, part in zip(self.shards, parts, strict=True):
            assert name not in shard
            shard[name] = part.to(torch.bfloat16).clone().contiguous()

    def cut(self, name, axis):
        return self.left.pop(name).chunk(len(self.shards), axis)

    def copied(self, name, theirs=None) -> None:
        self.put(theirs or name, [self.left.pop(name)] * len(self.shards))

    def columns(self, name, theirs=None) -> None:
        self.put(theirs or name, self.cut(name, 0))

    def rows(self, name, theirs=None) -> None:
        self.put(theirs or name, self.cut(name, 1))

    def stacked(self, theirs, names) -> None:
        parts = zip(*(self.cut(name, 0) for name in names), strict=True)
        self.put(theirs, [torch.cat(part) for part in parts])

    def repeated(self, name, heads) -> None:
        parts, shards = self.left.pop(name).chunk(heads), len(self.shards)
        self.put(name, [parts[rank * heads // shards] for rank in range(shards)])

    def top(self) -> None:
        self.columns("tok_embeddings.weight")
        self.columns("output.weight")
        self.copied("norm.weight")

    def llama4_layer(self, layer) -> None:
        attention, ffn = f"{layer}attention.", f"{layer}feed_forward."
        self.stacked(f"{attention}wqkv.weight", [f"{attention}w{x}.weight" for x in "qkv"])
        self.rows(f"{attention}wo.weight")
        self.copied(f"{layer}attention_norm.weight", f"{attention}wqkv.layer_norm_weight")
        if f"{ffn}router_DE" not in self.left:
            self.copied(f"{layer}ffn_norm.weight", f"{ffn}mlp.layer_norm_weight")
            self.stacked(f"{ffn}mlp.fc1_weight", [f"{ffn}w1.weight", f"{ffn}w3.weight"])
            self.rows(f"{ffn}w2.weight", f"{ffn}mlp.fc2_weight")
            return
        self.copied(f"{layer}ffn_norm.weight", f"{ffn}norm.weight")
        self.copied(f"{ffn}router_DE")
        for ours, theirs, axis in (
            ("w1", "moe_w_in_eD_F", 2),
            ("w3", "moe_w_swiglu_eD_F", 2),
            ("w2", "moe_w_out_eF_D", 1),
        ):
            parts = self.cut(f"{ffn}experts.{ours}", axis)
            self.put(f"{ffn}experts.{theirs}", [part.flatten(0, 1) for part in parts])
        self.columns(f"{ffn}shared_expert.w1.weight", f"{ffn}w_in_shared_FD.weight")
        self.columns(f"{ffn}shared_expert.w3.weight", f"{ffn}w_swiglu_FD.weight")
        self.rows(f"{ffn}shared_expert.w2.weight", f"{ffn}w_out_shared_DF.weight")

    def llama3_layer(self, layer, heads) -> None:
        attention, ffn = f"{layer}attention.", f"{layer}feed_forward."
        self.columns(f"{attention}wq.weight")
        for name in (f"{attention}wk.weight", f"{attention}wv.weight"):
            if len(self.shards) > heads:
                self.repeated(name, heads)
            else:
                self.columns(name)
        for name in (f"{attention}wo.weight", f"{ffn}w2.weight"):
            self.rows(name)
        for name in (f"{ffn}w1.weight", f"{ffn}w3.weight"):
            self.columns(name)
        for name in ("attention_norm", "ffn_norm"):
            self.copied(f"{layer}{name}.weight")

    def rest(self) -> None:
        """The image encoder, whose working names are the published ones."""
        for name in list(self.left):
            if re.search(self.COLUMNS, name):
                self.columns(name)
            elif re.search(self.ROWS, name):
                self.rows(name)
            else:
                assert name.startswith("vision_embeddings."), name
                self.copied(name)

    def write(self, directory, values) -> None:
        """Beside what training leaves in the published files."""
        directory.mkdir()
        (directory / "params.json").write_text(json.dumps(values))
        for rank, shard in enumerate(self.shards):
            left = {
                "rope.freqs": torch.rand(8),
                "layers.0.attention.wo._extra_state": io.BytesIO(b"state"),
                "layers.1.attention.wqkv._extra_state": torch.zeros(3, dtype=torch.uint8),
                "layers.1.feed_forward.global_gate_stats_3E": torch.rand(3, 4),
                "layers.1.feed_forward.running_gate_stats_3E": torch.rand(3, 4),
                "layers.1.feed_forward.expert_activation_DE": torch.rand(64, 4),
            }
            torch.save(left | shard, directory / f"consolidated.{rank:02}.pth")


def written_by_meta(name, directory, shards, **changes):
    """Meta's model with weights that bfloat16 has, saved as its published files are."""
    values = (arguments if is_3(name) else llama4_arguments)(tiny(name))
    # Llama 4's published files do not mention the temperature.
    unsaid = {*RUN, "attn_temperature_tuning", "floor_scale"}
    values = {key: x for key, x in values.items() if key not in unsaid} | changes
    values = {key: x for key, x in values.items() if x is not None} | {"norm_eps": 1e-5}
    model, args = transformer(name, values)
    randomize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    files = Published(model.state_dict(), shards)
    files.top()
    for layer in range(args.n_layers):
        if is_3(name):
            files.llama3_layer(f"layers.{layer}.", args.n_kv_heads)
        else:
            files.llama4_layer(f"layers.{layer}.")
    files.rest()
    assert not files.left
    # Llama 3's published files may leave the vocabulary's size open.
    files.write(directory, values | ({"vocab_size": -1} if is_3(name) else {}))
    return model


TEMPERATURE = {"attn_temperature_tuning": True, "floor_scale": 16.0}


WRITTEN = [(name, shards) for name in NAMES for shards in (1, 2, 4) if shards < 4 or is_3(name)]
"""Four shards are more than there are key-value heads: Llama 3 repeats these then."""
QUICK = [("llama4-maverick", 2), ("llama-guard-4", 1), ("llama3.1-8b", 4)]


@pytest.mark.parametrize(("name", "shards"), params(WRITTEN, QUICK))
def test_what_metas_code_wrote_computes_the_same_in_every_format(name, shards, tmp_path):
    from l4jax import checkpoints

    model = written_by_meta(name, tmp_path / "meta", shards)
    expected = their_logits(name, model, tokens())
    assert expected.std() > 0.9
    places = [tmp_path / "meta", convert(tmp_path / "meta", tmp_path / "orbax", "orbax")]
    places.append(convert(tmp_path / "meta", tmp_path / "hf", "hf"))
    for place in places:
        ours = checkpoints.load(place, dtype="float32")
        assert relative(forward(ours, tokens()), expected) <= TOLERANCE, place.name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(places[-1], dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(tokens()).long(), use_cache=False).logits.numpy()
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", params(["llama4-scout", "llama4-maverick"], ["llama4-maverick"]))
def test_the_temperature_that_a_params_file_names_is_obeyed(name, tmp_path):
    """Llama 4's files do not name it: it is on then, as the published configurations say."""
    from l4jax import checkpoints

    model = written_by_meta(name, tmp_path / "on", 2, **TEMPERATURE)
    expected = their_logits(name, model, tokens())
    ours = checkpoints.load(tmp_path / "on", dtype="float32")
    assert relative(forward(ours, tokens()), expected) <= TOLERANCE
    off = {"attn_temperature_tuning": False, "floor_scale": 16.0}
    model = written_by_meta(name, tmp_path / "off", 2, **off)
    without = their_logits(name, model, tokens())
    assert relative(without, expected) > 10 * TOLERANCE
    ours = checkpoints.load(tmp_path / "off", dtype="float32")
    assert ours.config.attention.temperature is None
    assert relative(forward(ours, tokens()), without) <= TOLERANCE
    written_by_meta(name, tmp_path / "silent", 2)
    silent = checkpoints.read_config(tmp_path / "silent").attention.temperature
    assert (silent.floor, silent.scale) == (8192, 0.1)


def test_arguments_may_lie_under_model(tmp_path):
    from l4jax import checkpoints

    written_by_meta("llama4-scout", tmp_path / "meta", 1)
    file, config = tmp_path / "meta" / "params.json", checkpoints.read_config(tmp_path / "meta")
    file.write_text(json.dumps({"model": json.loads(file.read_text())}))
    assert checkpoints.read_config(tmp_path / "meta") == config


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_transformers_sees_images_as_the_metas_code_that_wrote_them(shards, tmp_path):
    vision = {
        "image_size": {"height": 24, "width": 24},
        "patch_size": {"height": 6, "width": 6},
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "mlp_ratio": 4.0,
        "output_dim": 48,
        "pixel_shuffle_ratio": 0.5,
    }
    name, given = "llama4-scout", inputs()
    model = written_by_meta(name, tmp_path / "meta", shards, vision_args=vision)
    image = seen_by_meta(model, given)
    expected = their_logits(name, model, given["input_ids"], image)
    directory = convert(tmp_path / "meta", tmp_path / "orbax", "orbax")
    theirs = transformers.Llama4ForConditionalGeneration.from_pretrained(
        convert(directory, tmp_path / "hf", "hf"), dtype=torch.float32
    )
    theirs.config.image_token_id = 500
    with torch.no_grad():
        found = theirs(**given, use_cache=False).logits.numpy()
    assert relative(found, expected) <= TOLERANCE
    blind = their_logits(name, model, given["input_ids"])
    assert relative(blind, expected) > 0.1
