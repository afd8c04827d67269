"""Training with images is the same however a batch is cut and laid out, and in every recipe."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from image_toys import encoded, noise, tokenizer
from test_distributed import spawn
from toy_recipes import call, lines
from vision_toys import VISION, model_of

from experiments import dpo, pretrain, sft
from l4jax import checkpoints, presets, sharding
from l4jax.config import Layer
from l4jax.data import images, pipeline, tokenizing
from l4jax.data.conversations import Conversations, Preferences
from l4jax.data.mixture import Mixture
from l4jax.models.multimodal import Multimodal
from l4jax.training import objectives, optimizers
from l4jax.training.trainer import Training, Update, spread

SETTINGS = images.Settings(tile_size=18, max_tiles=4, tokens_per_tile=4)
# In published models the adapter is as wide as a layer, and transformers wants it so.
SEES = dataclasses.replace(VISION, mlp_dim=180)
TEXT = dataclasses.replace(
    presets.tiny(presets.llama4_scout()),
    num_layers=2,
    pattern=(Layer("chunked", "dense"), Layer("global", "dense")),
    moe=None,
    vocab_size=tokenizer().vocab_size,
)
FILES = [encoded(noise(*size, seed=n)) for n, size in enumerate([(18, 18), (30, 50), (60, 18)])]


def records(count=12):
    """Questions about no picture, one, and two."""
    return [
        {"prompt": f"What is {n}?", "completion": "A cat.", "images": FILES[n % 3 : n % 4]}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def mixture():
    return Mixture([tokenizing.encoded(records(), Conversations(tokenizer(), images=SETTINGS))])


def batch_of(mixture, **how):
    made = pipeline.batches(mixture, length=128, batch_size=8, seed=1, packing="none")
    patch = tokenizer().special["<|patch|>"]
    batch = next(iter(made.with_images(pipeline.Images(settings=SETTINGS, patch_id=patch, **how))))
    assert (batch["places"] >= 0).any()
    assert (batch["places"] < 0).all(axis=1).any()
    return batch


def gradients(batch, pieces, objective=None):
    model = model_of(TEXT, SEES)
    objective = objective or objectives.next_token()
    update = Update(model, objective, optax.identity(), accumulate=pieces)
    parts = update.parts(nnx.to_pure_dict(nnx.state(model)))
    loss, found, _ = jax.jit(update._gradients)(*parts, batch)
    return float(loss), jax.device_get(found)


def close(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(other[1]))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6 * largest),
        one[1],
        other[1],
    )


def test_a_batch_in_pieces_has_the_gradients_of_the_whole(mixture):
    whole = gradients(batch_of(mixture), 1)
    assert np.abs(whole[1]["vision"]["projector"]).max() > 0
    close(gradients(batch_of(mixture, pieces=4), 4), whole)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(objectives.next_token(), marks=pytest.mark.slow),
        objectives.dpo(reference_free=True),
    ],
)
def test_a_picture_of_both_answers_counts_as_two_would(objective):
    """It is encoded once, and gets the gradients of each."""
    said = {"chosen": "A cat.", "rejected": "A dog."}
    pairs = [said | {"prompt": f"What is {n}?", "images": FILES[n % 3 : n % 4]} for n in range(8)]
    store = tokenizing.encoded(pairs, Preferences(tokenizer(), images=SETTINGS))
    made = pipeline.batches(
        Mixture([store]), length=256, batch_size=4, seed=1, packing="none", segments=2
    )
    patch = tokenizer().special["<|patch|>"]
    batch = next(iter(made.with_images(pipeline.Images(settings=SETTINGS, patch_id=patch))))
    there = batch["places"] >= 0
    own = batch["tiles"][batch["places"][there][::4] // 4]
    assert len(own) == 2 * len(np.unique(batch["places"][there] // 4)) > 0
    places = np.where(there, np.cumsum(there).reshape(there.shape) - 1, -1).astype(np.int32)
    expected = gradients(batch | {"tiles": own, "places": places}, 1, objective)
    assert np.abs(expected[1]["vision"]["projector"]).max() > 0
    close(gradients(batch, 1, objective), expected)


@pytest.mark.parametrize("pieces", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_batch_on_a_mesh_has_the_gradients_of_one_device(mixture, pieces):
    """Tiles lie where they are encoded, whichever rows they are for."""
    expected = gradients(batch_of(mixture), 1)
    with sharding.use(sharding.make_mesh(fsdp=2, expert=2, context=2)):
        batch = spread(batch_of(mixture, multiple=4, pieces=pieces))
        rows = batch["tokens"].sharding.spec[0]
        assert batch["tiles"].sharding.spec[0] == rows
        made = sharding.create(lambda: Multimodal(TEXT, SEES, rngs=nnx.Rngs(0)))
        plain = nnx.to_pure_dict(nnx.state(model_of(TEXT, SEES)))
        state = jax.tree.map(
            lambda x, y: jax.device_put(y, x.sharding),
            nnx.to_pure_dict(nnx.state(made)),
            jax.device_get(plain),
        )
        update = Update(made, objectives.next_token(), optax.identity(), accumulate=pieces)
        loss, found, _ = jax.jit(update._gradients)(*update.parts(state), batch)
        found = float(loss), jax.device_get(found)
    close(found, expected)


@pytest.mark.slow
def test_the_encoder_may_learn_slower_or_not_at_all(mixture):
    batch = batch_of(mixture)

    def moved(trainable=None, rates=None):
        model = model_of(TEXT, SEES)
        graph, state = nnx.split(model)
        state = jax.tree.map(np.asarray, state)
        model = nnx.merge(graph, jax.tree.map(jax.numpy.asarray, state))
        before = nnx.to_pure_dict(state)
        make = optimizers.make("adamw", lambda _: 1e-3, weight_decay=0.0, rates=rates)
        training = Training(model, objectives.next_token(), make, trainable=trainable)
        training.step(batch)
        after = jax.device_get(nnx.to_pure_dict(nnx.state(training.model)))
        return {
            name: max(
                float(np.abs(x - y).max())
                for x, y in zip(
                    jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True
                )
            )
            for name in ("vision", "head")
        }

    assert moved(lambda name: not name.startswith("vision."))["vision"] == 0
    slow, fast = moved(rates={"vision.*": 0.1}), moved()
    assert slow["vision"] == pytest.approx(0.1 * fast["vision"], rel=0.01)
    assert slow["head"] == pytest.approx(fast["head"], rel=0.01)


# --- Recipes -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that sees, and records of each kind with images in files beside them."""
    folder = tmp_path_factory.mktemp("files")
    checkpoints.save(model_of(TEXT, SEES), folder / "model", to="orbax")
    tokenizer().save(folder / "model")
    for number, content in enumerate(FILES):
        (folder / f"{number}.png").write_bytes(content)

    def named(record):
        names = [f"{FILES.index(content)}.png" for content in record["images"]]
        return {**record, "images": names}

    chats = [named(record) for record in records(16)]
    pairs = [
        {name: x for name, x in chat.items() if name != "completion"}
        | {"chosen": "A cat.", "rejected": "A dog."}
        for chat in chats
    ]
    texts = [{"text": f"<image>See {n}.", "images": [f"{n % 3}.png"]} for n in range(16)]
    for name, values in (("chats", chats), ("pairs", pairs), ("texts", texts)):
        text = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def arguments(files, data, out, *more):
    return (
        *("--out", out, "--checkpoint", files / "model"),
        *("--data", files / f"{data}.jsonl", "--eval-data", files / f"{data}.jsonl"),
        *("--images", "--image-folder", files, "--length=256", "--batch=4", "--steps=3"),
        *("--evaluate-every=3", "--checkpoint-every=2", "--warmup=1", "--too-long=raise", *more),
    )


def go(recipe, default, files, data, out, monkeypatch, *more):
    return call(recipe, default, monkeypatch, *arguments(files, data, out, *more))


def change(before, after, prefix):
    one, other = (nnx.to_pure_dict(nnx.state(checkpoints.load(x))) for x in (before, after))
    pairs = zip(jax.tree.leaves(one[prefix]), jax.tree.leaves(other[prefix]), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.mark.parametrize(
    ("recipe", "default", "data"),
    [
        pytest.param(pretrain, pretrain.Pretrain(), "texts", marks=pytest.mark.slow),
        pytest.param(sft, sft.Sft(), "chats", marks=pytest.mark.slow),
        (dpo, dpo.Dpo(), "pairs"),
    ],
)
def test_recipes_train_on_a_users_pictures(files, tmp_path, monkeypatch, recipe, default, data):
    out = tmp_path / "out"
    more = () if recipe is pretrain else ("--accumulate=2", "--frozen", "vision.*")
    assert go(recipe, default, files, data, out, monkeypatch, *more) == 0
    found = lines(out)
    assert np.isfinite([line["loss"] for line in found]).all()
    assert np.isfinite(found[-1]["eval_loss"])
    if recipe is dpo:
        # Before the first update the model is its own reference, pictures and all.
        for side in ("chosen", "rejected"):
            assert abs(found[0][f"{side}_reward"]) < 1e-5
    moved = change(files / "model", out / "model", "vision")
    assert moved > 0 if recipe is pretrain else moved == 0
    assert change(files / "model", out / "model", "layers") > 0


def test_the_hardest_pictures_are_kept(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert go(sft, sft.Sft(), files, "chats", out, monkeypatch, "--keep-hardest", 0.5) == 0
    assert "kept 8 of 16 examples" in capsys.readouterr().err
    plain = tmp_path / "plain"
    checkpoints.save(checkpoints.load(files / "model", vision=False), plain, to="orbax")
    more = ("--keep-hardest", 0.5, "--scorer", plain)
    assert go(sft, sft.Sft(), files, "chats", tmp_path / "more", monkeypatch, *more) == 1
    assert "plain: has no image encoder; leave --images or" in capsys.readouterr().err


@pytest.mark.slow
def test_reading_again_from_hugging_faces_format(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert go(sft, sft.Sft(), files, "chats", out, monkeypatch, "--export", "--mesh=data=2") == 0
    for name in ("vision", "layers"):
        assert change(out / "model", out / "export", name) == 0


def test_what_cannot_see_says_so(files, tmp_path, monkeypatch, capsys):
    plain = tmp_path / "plain"
    checkpoints.save(checkpoints.load(files / "model", vision=False), plain / "model", to="orbax")
    tokenizer().save(plain / "model")
    for name in ("chats.jsonl", "0.png", "1.png", "2.png"):
        (plain / name).write_bytes((files / name).read_bytes())
    assert go(sft, sft.Sft(), plain, "chats", tmp_path / "out", monkeypatch) == 1
    assert "model has no image encoder; leave --images out" in capsys.readouterr().err
    argv = ("--out", tmp_path / "more", "--checkpoint", files / "model", "--length=256")
    argv += ("--data", files / "chats.jsonl")
    assert call(sft, sft.Sft(), monkeypatch, *argv) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "its image encoder is left out; --images keeps it" in told
    assert "chats.jsonl:4: the record has images, and the model reads text only" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "default", "data"), [(sft, sft.Sft(), "chats"), (dpo, dpo.Dpo(), "pairs")]
)
def test_two_processes_train_as_one_does(files, tmp_path, monkeypatch, recipe, default, data):
    """Each makes half of the tiles, whichever rows they are for."""
    more = ("--mesh=data=2", "--accumulate=2")
    assert go(recipe, default, files, data, tmp_path / "one", monkeypatch, *more) == 0
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    argv = arguments(files, data, tmp_path / "two", *more)
    ended = spawn(tmp_path, 2, "-m", recipe.__name__, *argv)
    assert ended.statuses == [0, 0], ended.outputs
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
