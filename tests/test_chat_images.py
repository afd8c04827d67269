"""Images in conversations and prompts, from the message to the generated tokens."""

import base64
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build
from flax import nnx
from image_toys import encoded, noise, tokenizer

from l4jax import checkpoints, cli, inference, presets
from l4jax.data import chat, images
from l4jax.data.chat import Rendered
from l4jax.models.multimodal import Images, Multimodal, arrange

SETTINGS = images.Settings(tile_size=24, max_tiles=4, tokens_per_tile=4)
ONE, FOUR = noise(20, 24, seed=1), noise(40, 48, seed=2)
"""Images of one tile, and of 2 × 2 and the whole."""
ONE_TEXT = "<|image_start|><|image|>····<|image_end|>"
FOUR_TEXT = (
    "<|image_start|>" + 2 * "····<|tile_x_separator|>····<|tile_y_separator|>" + "<|image|>····"
    "<|image_end|>"
)
BEGIN, ANSWER = "<|begin_of_text|>", "<|header_start|>assistant<|header_end|>\n\n"


def picture(source):
    return {"type": "image", "image": source}


def said(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def turn(text, role="user"):
    return f"<|header_start|>{role}<|header_end|>\n\n{text}<|eot|>"


def render(*messages, settings=SETTINGS, **options):
    return chat.render(messages, tokenizer(), images=settings, **options)


def text_of(rendered):
    return tokenizer().decode(rendered.tokens).replace("<|patch|>", "·")


# --- Messages ------------------------------------------------------------------------------------
def test_images_to_be_cut_later_stand_beside_others():
    later = images.Picture(b"", (2, 2))
    rendered = render(user(picture(later), picture(ONE)))
    assert rendered.tokens == render(user(picture(FOUR), picture(ONE))).tokens
    assert rendered.images[0] is later
    assert len(rendered.images[1].tiles) == 1


def test_images_stand_where_they_are_said():
    message = user(said("Here: "), picture(FOUR), said("\nor "), picture(ONE), picture(FOUR))
    rendered = render(message, add_generation_prompt=True)
    expected = f"Here: {FOUR_TEXT}\nor {ONE_TEXT}{FOUR_TEXT}"
    assert text_of(rendered) == BEGIN + turn(expected) + ANSWER
    for found, source in zip(rendered.images, (FOUR, ONE, FOUR), strict=True):
        (alone,) = images.process([source], SETTINGS)
        assert found.grid == alone.grid
        np.testing.assert_array_equal(found.tiles, alone.tiles)
    assert [len(x.tiles) for x in rendered.images] == [5, 1, 5]


def test_every_spelling_of_an_image(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(FOUR))
    url = "data:image/png;base64," + base64.b64encode(encoded(FOUR)).decode()
    expected = render(user(picture(FOUR)))
    for part in (
        picture(file),
        picture(url),
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": {"url": str(file)}},
        {"type": "image_url", "image_url": url},
    ):
        found = render(user(part))
        assert found[:2] == expected[:2]
        np.testing.assert_array_equal(found.images[0].tiles, expected.images[0].tiles)


def test_images_of_several_messages_keep_their_order():
    conversation = (
        {"role": "system", "content": [said("Look."), picture(ONE)]},
        user(picture(FOUR), said("What?")),
        {"role": "assistant", "content": [said("This: "), picture(ONE), said("!")]},
        {"role": "tool", "content": [picture(ONE)]},
    )
    rendered = render(*conversation)
    assert text_of(rendered) == (
        BEGIN
        + turn(f"Look.{ONE_TEXT}", "system")
        + turn(f"{FOUR_TEXT}What?")
        + turn(f"This: {ONE_TEXT}!", "assistant")
        + turn(ONE_TEXT, "ipython").replace("<|eot|>", "<|eom|>")
    )
    assert [x.grid for x in rendered.images] == [(1, 1), (2, 2), (1, 1), (1, 1)]
    # An image is nothing to learn, whoever shows it.
    pairs = zip(rendered.tokens, rendered.loss_mask, strict=True)
    assert tokenizer().decode([t for t, learn in pairs if learn]) == "This: !<|eot|>"


def test_text_needs_no_settings_and_gets_no_images():
    message = user(said("What is "), said("this?"))
    assert render(message, settings=None) == render(message)
    assert render(message).images == Rendered([], []).images == ()


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"type": "image"}, "message 1, part 1 .* is no image: use a path"),
        ({"type": "image_url", "image_url": {}}, "message 1, part 1 .* is no image"),
        (picture(b"text"), r"message 1, part 1 \(an image given as bytes\) is no image of a kind"),
        (
            {"type": "image_url", "image_url": {"url": "https://a.b/c.png"}},
            r"message 1, part 1 \(https://a.b/c.png\): nothing is downloaded from https:// addr",
        ),
        ({"type": "video"}, "message 1, part 1 is .*video.*, or an image"),
    ],
)
def test_what_is_refused(part, problem):
    with pytest.raises(ValueError, match=problem) as error:
        render(user(picture(ONE)), user(said("a"), part))
    assert "\n" not in str(error.value)


def test_models_that_read_text_only():
    with pytest.raises(ValueError, match="message 1, part 0 is an image; images need the vision"):
        render(user(said("a")), user(picture(ONE)), settings=None)
    with pytest.raises(FileNotFoundError, match=r"message 0, part 0 \(nowhere.png\): no such file"):
        render(user(picture("nowhere.png")))


# --- Generation ----------------------------------------------------------------------------------
PRESET = presets.get("tiny-llama4-scout")
NEW = 5
PATCH_ID = tokenizer().special["<|patch|>"]


@pytest.fixture(scope="module")
def model():
    """A tiny Scout with its encoder, whose features are as large as its embeddings."""
    config = dataclasses.replace(PRESET.make(), num_layers=2, vocab_size=tokenizer().vocab_size)
    config = dataclasses.replace(config, pattern=config.pattern[2:])  # a chunked and a global one
    words = dict(nnx.to_flat_state(nnx.state(build(config))))
    abstract = nnx.eval_shape(lambda: Multimodal(config, PRESET.vision, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(3)

    def fill(path, param):
        if path in words:
            return words[path]
        value = rng.standard_normal(param.shape)
        if path[-1] == "scale":
            value = 1 + 0.3 * value
        elif param.get_raw_value().ndim > 1 and "bias" not in str(path[-1]):
            value *= 1.5 * param.shape[-2] ** -0.5
        return param.replace(jnp.asarray(value, jnp.float32))

    flat = {path: fill(path, param) for path, param in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def seen(tokens, tiled):
    tiles = np.concatenate([x.tiles for x in tiled])
    return arrange(np.asarray(tokens), tiles, PRESET.vision, patch_id=PATCH_ID)


def prompt_of(*parts):
    return render(user(*parts), add_generation_prompt=True)


@jax.jit
def forward(model, tokens, pictures):
    return model(tokens, images=pictures)


def test_the_tests_settings_are_the_model_s(tmp_path):
    found = images.of_checkpoint(tmp_path, PRESET.vision, max_tiles=4)
    assert found == SETTINGS


def test_rows_of_a_batch_follow_their_own_images(model):
    rows = [
        prompt_of(picture(FOUR), said("A cat")),
        prompt_of(said("The dog lies on the mat")),
        render(user(said("a"), picture(ONE), picture(np.zeros_like(ONE)))),
    ]
    pictures = [x for row in rows for x in row.images]
    lengths = [len(row.tokens) for row in rows]
    tokens = np.zeros((3, max(lengths) + NEW), int)
    for row, rendered in zip(tokens, rows, strict=True):
        row[: len(rendered.tokens)] = rendered.tokens

    def generated(pictures):
        return inference.generate(
            model,
            tokens[:, :-NEW],
            lengths=lengths,
            max_new_tokens=NEW,
            images=seen(tokens[:, :-NEW], pictures),
        ).tokens

    new = generated(pictures)
    for row, length, found in zip(tokens, lengths, new, strict=True):
        row[length : length + NEW] = found
    # Every token is the most likely one after all before it, images included.
    likely = forward(model, tokens, seen(tokens, pictures)).argmax(axis=-1)
    for row, length, found in zip(likely, lengths, new, strict=True):
        assert row[length - 1 : length - 1 + NEW].tolist() == found
    swapped = generated([pictures[0], pictures[2], pictures[1]])
    assert swapped[:2] == new[:2]
    assert swapped[2] != new[2]


def test_images_that_do_not_fit(model):
    rendered = prompt_of(picture(ONE))
    tokens, pictures = [rendered.tokens], seen([rendered.tokens], rendered.images)

    def generate(model, images):
        inference.generate(model, tokens, max_new_tokens=1, images=images)

    text = build(dataclasses.replace(model.config, num_layers=1))
    with pytest.raises(ValueError, match="reads text only: it has no vision encoder"):
        generate(text, pictures)
    with pytest.raises(ValueError, match=r"places of shape \(1, \d+\) do not fit prompts of shape"):
        generate(model, Images(pictures.tiles, pictures.places[:, 1:]))
    with pytest.raises(ValueError, match="place 4 is beyond the 4 features of 1 tiles"):
        generate(model, Images(pictures.tiles, pictures.places + 1))


# --- Command line --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model in Hugging Face's format, with its tokenizer and two images."""
    path = tmp_path_factory.mktemp("multimodal")
    checkpoints.save(model, path / "scout", to="hf")
    tokenizer().save(path / "scout")
    fields = {"max_patches": 4, "size": {"height": 24, "width": 24}}
    (path / "scout" / "preprocessor_config.json").write_text(json.dumps(fields))
    (path / "one.png").write_bytes(encoded(ONE))
    (path / "four.png").write_bytes(encoded(FOUR))
    return path


@pytest.fixture
def run(capsys, folder):
    """Calls `l4jax generate`; an image is called by its name in the folder."""

    def call(*arguments, checkpoint="scout", code=0):
        capsys.readouterr()
        paths = [folder / x if str(x).endswith(".png") else x for x in arguments]
        command = ["generate", folder / checkpoint, *paths, "--max-new-tokens", NEW, "--json"]
        assert cli.main([str(x) for x in command]) == code
        out, err = capsys.readouterr()
        return err if code else json.loads(out)

    return call


def test_the_command_line_generates_from_images(model, run):
    tiled = images.process([FOUR, ONE], SETTINGS)
    ids = images.prompt("A cat", tiled, tokenizer(), 4)
    how = {"max_new_tokens": NEW, "stop_ids": tokenizer().stop_ids}
    expected = inference.generate(model, [ids], images=seen([ids], tiled), **how)
    found = run("--image", "four.png", "--image", "one.png", "--prompt", "A cat")
    assert found["prompt_tokens"] == len(ids)
    assert found["tokens"] == expected.tokens[0]


@pytest.fixture
def asked(monkeypatch):
    """What the command line asks of the library, which answers with one token."""
    calls = {}

    def stream(model, tokens, **options):
        calls.update(model=model, tokens=tokens, images=options["images"])
        return iter([7])

    monkeypatch.setattr(inference, "stream", stream)
    return calls


def test_the_command_line_puts_images_where_the_prompt_says(run, asked):
    for prompt, order in (("A <|image|> or\n<|image|>", (ONE, FOUR)), ("A cat", (FOUR, ONE))):
        tiled = images.process(order, SETTINGS)
        files = [x for y in order for x in ("--image", "one.png" if y is ONE else "four.png")]
        run(*files, "--prompt", prompt)
        ids = images.prompt(prompt, tiled, tokenizer(), 4)
        assert asked["tokens"] == ids
        for found, expected in zip(asked["images"], seen([ids], tiled), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_command_line_chats_about_images(run, asked):
    system = {"role": "system", "content": "Look."}
    for prompt, parts in (
        ("A <|image|> cat", [said("A "), picture(FOUR), said(" cat")]),
        ("A cat", [picture(FOUR), said("A cat")]),
    ):
        run("--chat", "--system", "Look.", "--image", "four.png", "--prompt", prompt)
        expected = render(system, user(*parts), add_generation_prompt=True)
        assert asked["tokens"] == expected.tokens
        np.testing.assert_array_equal(asked["images"].tiles, expected.images[0].tiles)


def test_the_command_line_leaves_the_encoder_alone_without_images(run, asked):
    run("--prompt", "A cat")
    assert asked["tokens"] == tokenizer().encode("A cat", bos=True)
    assert asked["images"] is None
    assert not isinstance(asked["model"], Multimodal)
    run("--chat", "--prompt", "A cat")
    assert asked["tokens"] == prompt_of(said("A cat")).tokens


def test_the_command_line_refuses(model, run, folder):
    problem = run("--prompt", "a <|image|>", code=1)
    assert problem.count("\n") == 1
    assert "the text has 1 <|image|> for 0 images" in problem
    assert "nowhere.png: no such file" in run("--image", "nowhere.png", "--prompt", "a", code=1)
    text = build(dataclasses.replace(model.config, num_layers=1))
    checkpoints.save(text, folder / "text", to="hf")
    tokenizer().save(folder / "text")
    problem = run("--image", "one.png", "--prompt", "a", checkpoint="text", code=1)
    assert "reads text only: it has no encoder for --image" in problem


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "four.png", "detail": "high"}},
        {"type": "image_url", "image_url": "four.png"},
        {"type": "image", "image": "four.png"},
        {
            "type": "image_url",
            "image_url": {
                "url": f"data:image/png;base64,{base64.b64encode(encoded(FOUR)).decode()}"
            },
        },
    ],
)
def test_the_command_line_finds_images_beside_the_conversation(
    run, asked, folder, part, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": [said("A "), part, said(" cat")]}]
    (folder / "a.json").write_text(json.dumps({"messages": messages}))
    run("--messages", folder / "a.json")
    expected = render(user(said("A "), picture(FOUR), said(" cat")), add_generation_prompt=True)
    assert asked["tokens"] == expected.tokens
    np.testing.assert_array_equal(asked["images"].tiles, expected.images[0].tiles)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/a.png", "nothing is downloaded from https:// addresses"),
        ("nowhere.png", "nowhere.png): no such file"),
        ("a.json", "a.json) is no image of a kind that is read; use one of JPEG"),
        ("data:image/png;base64,!", "(a data: URL) is not valid base64"),
        (None, "message 0, part 0 (an image given as NoneType) is no image"),
    ],
)
def test_the_command_line_says_which_image_of_a_conversation_is_none(run, folder, url, words):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    (folder / "a.json").write_text(json.dumps(messages))
    problem = run("--messages", folder / "a.json", code=1)
    assert problem.count("\n") == 1
    assert words in problem
    assert "message 0, part 0" in problem
