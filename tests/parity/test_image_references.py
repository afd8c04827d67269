"""Tiles and tokens of images against transformers' processor and Meta's code."""

import importlib
import io
import pathlib
import random
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from l4jax.data import chat, images, templates, tokenizer_json
from l4jax.data import tokenizer as tk

torch = pytest.importorskip("torch", reason="pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")

from experiments.benchmarks import image_peers  # noqa: E402 - it imports torch

pytestmark = pytest.mark.parity

SIZES = [(336, 336), (100, 100), (337, 336), (480, 640), (1080, 1920), (2000, 300), (3000, 4000)]
SIZES += [(1344, 1344), (1, 1), (1, 3000), (20_000, 50), (335, 337), (672, 672), (5377, 336)]


def random_sizes(count, largest, seed=0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(0, np.log(largest), (count, 2))).astype(int).tolist()


def photo_files():
    """Two photos that Meta's package has, and the two of scikit-learn if it is there."""
    folders = [pathlib.Path(str(resources.files("llama_models") / "resources"))]
    if importlib.util.find_spec("sklearn"):
        folders.append(pathlib.Path(str(resources.files("sklearn.datasets") / "images")))
    return sorted(file for folder in folders for file in folder.glob("*.jp*g"))


@pytest.fixture(scope="module")
def photos():
    return [Image.open(file).convert("RGB") for file in photo_files()]


@pytest.fixture(scope="module")
def theirs():
    """transformers' image processor."""
    return image_peers.transformers_processor()


@pytest.fixture(scope="module")
def meta():
    """Meta's image transforms."""
    return image_peers.meta_preprocess()


@pytest.fixture(scope="module")
def formats(meta):
    """Meta's chat format, for a side of tiles in pixels."""
    args = importlib.import_module("llama_models.llama4.args")
    module = importlib.import_module("llama_models.llama4.chat_format")
    coder = importlib.import_module("llama_models.llama4.tokenizer").Tokenizer

    def of(side):
        vision = args.VisionArgs(
            image_size=args.Size(height=side, width=side),
            patch_size=args.Size(height=14, width=14),
            dim=1408,
            n_layers=34,
            n_heads=16,
            mlp_ratio=4,
            output_dim=4096,
            pixel_shuffle_ratio=0.5,
        )
        return module.ChatFormat(coder.get_instance(), vision)

    return of


@pytest.fixture(scope="module")
def tok():
    return tk.load(str(resources.files("llama_models.llama4") / "tokenizer.model"))


@pytest.fixture(scope="module")
def processor(tok, theirs, tmp_path_factory):
    """transformers' whole processor, on Meta's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ranks = pathlib.Path(str(resources.files("llama_models.llama4") / "tokenizer.model"))
    for name, content in tokenizer_json.from_rank_file(ranks, max_length=1024).items():
        (folder / name).write_bytes(content)
    coder = transformers.AutoTokenizer.from_pretrained(folder)
    module = importlib.import_module("transformers.models.llama4.processing_llama4")
    return module.Llama4Processor(theirs, coder)


# --- Pixels --------------------------------------------------------------------------------------
@pytest.mark.parametrize("largest", [False, True])
def test_every_size_goes_where_the_references_put_it(theirs, meta, largest):
    module = importlib.import_module(type(theirs).__module__)
    settings = images.Settings(resize_to_max_canvas=largest)
    transform = meta.VariableSizeImageTransform(336)
    places = torch.tensor(transform.find_supported_resolutions(max_num_chunks=16, patch_size=336))
    for height, width in SIZES + random_sizes(200, 20_000):
        rows, columns = images.fit(height, width, settings).grid
        target = module.get_best_fit((height, width), places, resize_to_max_canvas=largest)
        assert target.tolist() == [336 * rows, 336 * columns]
        target = transform.get_best_fit((width, height), places, resize_to_max_canvas=largest)
        assert target == (336 * columns, 336 * rows)


@pytest.mark.parametrize("largest", [False, True])
def test_tiles_are_bit_for_bit_meta_s(photos, meta, largest):
    settings = images.Settings(resize_to_max_canvas=largest)
    cut, whole = meta.VariableSizeImageTransform(336), meta.ResizeNormalizeImageTransform(336, 336)
    for n, (height, width) in enumerate([*SIZES[:8], (7, 3000), *random_sizes(8, 2500, seed=1)]):
        photo = photos[n % len(photos)].resize((width, height))
        expected, grid = cut(photo, 16, resize_to_max_canvas=largest)
        if len(expected) > 1:
            expected = torch.cat([expected, whole(photo)[None]])
        found = images.tile(photo, settings)
        assert found.grid == grid
        np.testing.assert_array_equal(found.tiles, expected.numpy())


def test_tiles_are_transformers_within_a_step(photos, theirs):
    """transformers resizes with coefficients of fewer bits, and normalises in bfloat16.

    Its values are ours so rounded, or those of the level beside.
    """
    levels = torch.arange(256).to(torch.bfloat16) * (1 / 255)
    levels = (levels - 0.5) / 0.5
    shares = []
    for n, (height, width) in enumerate([*SIZES[:8], *random_sizes(8, 2500, seed=2)]):
        photo = photos[n % len(photos)].resize((width, height))
        expected = theirs(photo, return_tensors="pt")
        found = images.tile(photo)
        assert found.grid == tuple(expected.aspect_ratios[0].tolist())
        tiles, level = expected.pixel_values, torch.tensor(found.tiles)
        assert tiles.shape == level.shape
        level = ((level + 1) * 127.5).round().long()
        near = [levels[(level + step).clamp(0, 255)] for step in (-1, 0, 1)]
        assert torch.stack([tiles == x for x in near]).any(dim=0).all()
        shares.append((tiles != near[1]).float().mean().item())
    # The more an image is enlarged, the more values fall between two levels.
    assert np.median(shares) < 0.005
    assert max(shares) < 0.1


# --- Tokens --------------------------------------------------------------------------------------
def test_layouts_are_the_references(tok, formats, processor):
    module = importlib.import_module("llama_models.llama4.chat_format")
    chats = formats(336)
    for height, width in SIZES + random_sizes(200, 20_000):
        grid = images.fit(height, width).grid
        found = images.layout(grid, tok)
        count = grid[0] * grid[1] + (grid != (1, 1))
        tiles = torch.zeros(1).expand(count, 3, 336, 336)
        assert found == chats._encode_image(module.TransformedImage(tiles, grid))
        text = processor._prompt_split_image(grid, 144)
        assert tok.decode(found) == text
    assert found == processor.tokenizer(text, add_special_tokens=False).input_ids


def conversation(rng, datatypes):
    """A random message in our form and in Meta's."""
    ours, theirs = [], []
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.5:
            size = rng.randint(1, 300), rng.randint(1, 300)
            buffer = io.BytesIO()
            colour = tuple(rng.randrange(256) for _ in "rgba")
            Image.new(rng.choice(["RGB", "RGBA"]), size, colour[:4]).save(buffer, "PNG")
            ours.append({"type": "image", "image": buffer.getvalue()})
            theirs.append(datatypes.RawMediaItem(data=buffer.getvalue()))
        else:
            text = rng.choice(["What is this?", "\n", "<|image|>", " a cat \n\n", "naïve 🎉"])
            ours.append({"type": "text", "text": text})
            theirs.append(datatypes.RawTextItem(text=text))
    return ours, theirs


def test_conversations_are_meta_s(tok, formats):
    datatypes = importlib.import_module("llama_models.datatypes")
    rng, chats = random.Random(4), formats(56)
    settings = images.Settings(tile_size=56, tokens_per_tile=4)
    total = 0
    for _ in range(40):
        roles = rng.choices(["system", "user", "assistant", "tool"], k=rng.randint(1, 4))
        parts = [conversation(rng, datatypes) for _ in roles]
        ours = [{"role": r, "content": x} for r, (x, _) in zip(roles, parts, strict=True)]
        ids = {"call_id": "1", "tool_name": "f"}
        theirs = [
            datatypes.RawMessage(role=r, content=x, **(ids if r == "tool" else {}))
            for r, (_, x) in zip(roles, parts, strict=True)
        ]
        found = chat.render(ours, tok, add_generation_prompt=True, images=settings)
        expected = chats.encode_dialog_prompt(theirs)
        assert found.tokens == expected.tokens
        for mine, tiles in zip(found.images, expected.images or [], strict=True):
            np.testing.assert_array_equal(mine.tiles, tiles.numpy())
        total += len(found.images)
    assert total > 80


def test_prompts_are_transformers_and_meta_s(tok, processor, photos, formats):
    datatypes = importlib.import_module("llama_models.datatypes")
    pictures = [photos[0].resize((640, 480)), photos[1].resize((99, 30))]
    tiled = images.process(pictures)
    text = "See <|image|>,\n<|image|> and say."
    found = images.prompt(text, tiled, tok)
    expected = processor(images=pictures, text=text)
    assert [found] == [list(x) for x in expected.input_ids]
    raw = []
    for piece in images.parts(text, pictures):
        if isinstance(piece, str):
            raw.append(datatypes.RawTextItem(text=piece))
        else:
            buffer = io.BytesIO()
            piece.save(buffer, "PNG")
            raw.append(datatypes.RawMediaItem(data=buffer.getvalue()))
    assert found == formats(336).encode_content(raw).tokens


def test_chats_are_transformers(tok, processor, photos):
    pictures = [photos[0].resize((640, 480)), photos[1].resize((99, 30))]
    image = [{"type": "image", "image": picture} for picture in pictures]
    text = {"type": "text", "text": "What is this?\n "}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [image[0], text, image[1]]},
        {"role": "assistant", "content": [text]},
        {"role": "user", "content": [text]},
    ]
    found = chat.render(messages, tok, add_generation_prompt=True, images=images.Settings())
    for template in (None, templates.chat_template("llama4")):
        expected = processor.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        assert [found.tokens] == [list(x) for x in expected["input_ids"]]
