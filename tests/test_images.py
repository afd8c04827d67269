"""Images: what is read as what, where they go, what tiles and tokens they become."""

import base64
import io
import json
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from image_toys import encoded, noise, tokenizer
from PIL import Image, ImageOps

from l4jax import presets
from l4jax.data import companions, images
from l4jax.data.images import Settings

PHOTO = noise(5, 7)
SMALL = Settings(tile_size=12, max_tiles=6, tokens_per_tile=4)


def pixels(source):
    """What is read, [y x c]."""
    image = images.read(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- Sources -------------------------------------------------------------------------------------
def test_every_kind_of_source_is_read(tmp_path):
    content = encoded(PHOTO)
    file = tmp_path / "photo"  # what an image is shows in its first bytes, not in its name
    file.write_bytes(content)
    text = base64.b64encode(content).decode()
    sources = [file, str(file), content, bytearray(content), io.BytesIO(content), PHOTO]
    sources += [f"data:image/png;base64,{text}", f"DATA:;base64,{text[:9]}\n{text[9:]}"]
    sources += [Image.fromarray(PHOTO), Image.open(file)]
    for source in sources:
        np.testing.assert_array_equal(pixels(source), PHOTO)
    with file.open("rb") as opened:
        opened.read(3)
        np.testing.assert_array_equal(pixels(opened), PHOTO)
        assert not opened.closed


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats(kind):
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    np.testing.assert_array_equal(pixels(encoded(PHOTO, kind, **options)), PHOTO)


def test_lossy_formats():
    smooth = np.broadcast_to(np.arange(40, 200, 10, dtype=np.uint8)[:, None, None], (16, 17, 3))
    for kind in ("JPEG", "WEBP", *(["AVIF"] if "AVIF" in Image.OPEN else [])):
        found = pixels(encoded(smooth, kind, quality=95))
        assert found.shape == smooth.shape
        assert np.abs(found.astype(int) - smooth).max() < 12


# --- Modes ---------------------------------------------------------------------------------------
def test_grey_of_every_depth():
    grey = PHOTO[..., 0]
    wide = grey.astype(np.uint16) * 257
    expected = np.repeat(grey[..., None], 3, axis=2)
    for source in (grey, wide, encoded(grey), encoded(grey, "JPEG2000"), encoded(wide)):
        np.testing.assert_array_equal(pixels(source), expected)
    for kind in ("TIFF", "PPM"):
        np.testing.assert_array_equal(pixels(encoded(wide, kind)), expected)
    big_endian = Image.frombytes("I;16B", (7, 5), wide.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(big_endian), expected)
    # Rounded, not cut: 65,407 is nearer to 255 than to 254.
    assert pixels(np.full((1, 1), 65_407, np.uint16)).tolist() == [[[255] * 3]]
    bits = encoded(Image.fromarray(grey).point(lambda x: 255 * (x > 99), mode="1"))
    np.testing.assert_array_equal(pixels(bits), (expected > 99) * np.uint8(255))


def test_colours_of_16_bits():
    wide = PHOTO.astype(np.uint16) * 257
    np.testing.assert_array_equal(pixels(wide), PHOTO)

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    head = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(pixels(png), PHOTO)


def test_palettes_and_cmyk():
    colours = Image.fromarray(PHOTO).quantize(35)
    np.testing.assert_array_equal(pixels(encoded(colours)), np.asarray(colours.convert("RGB")))
    np.testing.assert_array_equal(
        pixels(encoded(colours, "GIF")), np.asarray(colours.convert("RGB"))
    )
    cmyk = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert (pixels(encoded(cmyk, "TIFF")) == (255, 0, 0)).all()
    assert np.abs(pixels(encoded(cmyk, "JPEG")).astype(int) - (255, 0, 0)).max() < 9


def test_transparency_is_laid_on_white():
    clear = np.array([[[9, 90, 200, 0], [9, 90, 200, 51], [9, 90, 200, 255]]], np.uint8)
    # A fifth of the colour and four fifths of white.
    expected = [[[255, 255, 255], [206, 222, 244], [9, 90, 200]]]
    for source in (clear, encoded(clear), encoded(clear, "WEBP", lossless=True, exact=True)):
        assert pixels(source).tolist() == expected
    grey = Image.fromarray(clear[..., [1, 3]])
    assert grey.mode == "LA"
    assert pixels(encoded(grey)).tolist() == [[[255] * 3, [222] * 3, [90] * 3]]
    for mode, value in (("L", 7), ("RGB", (7, 7, 7))):
        keyed = Image.new(mode, (2, 1), value)
        keyed.putpixel((1, 0), 90 if mode == "L" else (90, 7, 7))
        found = pixels(encoded(keyed, transparency=value))
        assert found.tolist() == [[[255] * 3, [90] * 3 if mode == "L" else [90, 7, 7]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for kind, options in (("PNG", {"transparency": 0}), ("PNG", {"transparency": b"\0\xff"})):
        found = pixels(encoded(palette, kind, **options))
        assert found.tolist() == [[[255] * 3, [40, 50, 60]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        content = encoded(PHOTO, kind, exif=exif)
        stored = Image.open(io.BytesIO(content))
        upright = np.asarray(ImageOps.exif_transpose(stored))
        assert upright.shape == (PHOTO.shape if orientation < 5 else (7, 5, 3))
        np.testing.assert_array_equal(pixels(content), upright)
        np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(content))), upright)


def test_broken_exif_is_no_reason_to_refuse():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert images.read(encoded(PHOTO, "JPEG", exif=exif)).size == (7, 5)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue", "white")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (pixels(content) == (255, 0, 0)).all()


def test_extreme_shapes():
    assert images.read(encoded(noise(1, 1))).size == (1, 1)
    long = images.process([encoded(np.full((20_000, 50), 9, np.uint8)), noise(1, 1)])
    assert [(x.grid, x.tiles.shape) for x in long] == [
        ((16, 1), (17, 3, 336, 336)),
        ((1, 1), (1, 3, 336, 336)),
    ]


# --- What is refused -----------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Meta's code, once imported, has Pillow fill up what is missing of a file."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)


@pytest.mark.parametrize("factor", [1, 2])
def test_files_that_would_fill_the_memory(monkeypatch, tmp_path, factor):
    file = tmp_path / "bomb.png"
    file.write_bytes(encoded(PHOTO))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34 // factor)
    problem = rf"bomb.png has more than {34 // factor} pixels; make it smaller"
    for count in (1, 5):
        with pytest.raises(ValueError, match=problem):
            images.process([file] * count, SMALL)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    assert images.read(file).size == (7, 5)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("https://a.b/c.png", "https://a.b/c.png: nothing is downloaded from https:// addresses"),
        ("HTTP://a.b/c.png", "nothing is downloaded from HTTP://"),
        ("s3://bucket/c.png", "give the path of a file, or its content as a data: URL"),
        ("data:image/png;base64,@@", "a data: URL is not valid base64"),
        ("data:image/png,abc", "a data: URL is not in base64: write data:image/png;base64,"),
        (b"", "an image given as bytes is no image of a kind that is read; use one of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a kind that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a kind that is read"),
        (encoded(noise(40, 40), "JPEG")[:-200], "is damaged or incomplete: .*truncated"),
        (encoded(noise(40, 40))[:900], "is damaged or incomplete"),
        (encoded(noise(40, 40))[:20], "is damaged or incomplete: Truncated"),
        (Image.new("F", (2, 2)), "floating-point pixels; save it with 8 or 16 bits a channel"),
        (Image.new("La", (2, 2)), "has pixels of kind La; save it in RGB"),
        (Image.new("I", (2, 2), 65_536), "grey values up to 65536; 65535"),
        (Image.new("I", (2, 2), -1), "grey values"),
        (np.zeros((2, 2, 3)), "has values of float64; use uint8 or uint16"),
        (np.zeros((3, 2, 2), np.uint8), r"has shape \(3, 2, 2\); use \[height, width\]"),
        (np.zeros((0, 2), np.uint8), r"has shape \(0, 2\)"),
        (np.zeros((2, 2, 1), np.uint8), r"has shape \(2, 2, 1\)"),
        (None, "an image given as NoneType is no image: use a path"),
        (3, "an image given as int is no image"),
        (io.StringIO("text"), "opened with 'rb'"),
    ],
)
def test_what_is_no_image(source, problem):
    with pytest.raises(ValueError, match=problem) as error:
        images.read(source)
    assert "\n" not in str(error.value)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file"):
        images.read(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        images.read(tmp_path)
    (tmp_path / "text.jpg").write_text("a text")
    with (tmp_path / "text.jpg").open("rb") as opened:
        for source in (tmp_path / "text.jpg", opened):
            with pytest.raises(ValueError, match=r"text\.jpg is no image of a kind that is read"):
                images.read(source)
    with pytest.raises(ValueError, match="the second one is no image"):
        images.process([PHOTO, b"none"], names=["the first one", "the second one"])


# --- Where they go -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("height", "width", "grid", "tokens"),
    [
        (336, 336, (1, 1), 147),
        (100, 100, (1, 1), 147),
        (337, 336, (2, 1), 437),
        (480, 640, (2, 2), 727),
        (1080, 1920, (3, 5), 2322),
        (2000, 300, (6, 1), 1017),
        (3000, 4000, (3, 4), 1887),
        (1344, 1344, (4, 4), 2467),
    ],
)
def test_published_sizes(height, width, grid, tokens):
    assert images.fit(height, width).grid == grid
    assert len(images.layout(grid, tokenizer())) == tokens


def exact_fit(height, width, side, most, largest=False):
    """The rules in exact arithmetic, one grid after the other."""
    scales = {
        (rows, columns): min(Fraction(side * rows, height), Fraction(side * columns, width))
        for rows in range(1, most + 1)
        for columns in range(1, most + 1)
        if rows * columns <= most
    }
    grows = [scale for scale in scales.values() if scale >= 1]
    wanted = min(grows) if grows and not largest else max(scales.values())
    rows, columns = min((g for g, s in scales.items() if s == wanted), key=lambda g: g[0] * g[1])
    box = [rows * side, columns * side]
    if not largest:
        box = [min(max(n, side), limit) for n, limit in zip((height, width), box, strict=True)]
    scale = min(Fraction(box[0], height), Fraction(box[1], width))
    return (rows, columns), max(1, int(height * scale)), max(1, int(width * scale))


@pytest.mark.parametrize("largest", [False, True])
def test_canvas_and_size_by_exact_arithmetic(largest):
    rng = np.random.default_rng(5)
    sizes = [(1, 1), (1, 900), (20_000, 50), (336, 1), (5376, 336), (5377, 336), (1344, 1345)]
    sizes += np.exp(rng.uniform(0, 8, (150, 2))).astype(int).tolist()
    for height, width in sizes:
        for side, most in ((336, 16), (40, 5)):
            settings = Settings(tile_size=side, max_tiles=most, resize_to_max_canvas=largest)
            expected = exact_fit(height, width, side, most, largest)
            found = images.fit(height, width, settings)
            assert found.grid == expected[0]
            # The size is computed in floating point, as the references do, and rounded down.
            for ours, exact in zip(found[1:], expected[1:], strict=True):
                assert exact - 1 <= ours <= exact


# --- Pixels --------------------------------------------------------------------------------------
def test_an_image_that_fits_is_cut_as_it_is():
    photo = noise(17, 30)
    found = images.tile(Image.fromarray(photo), SMALL)
    canvas = np.zeros((24, 36, 3), np.uint8)
    canvas[:17, :30] = photo
    assert (found.grid, found.tiles.shape, found.tiles.dtype) == (
        (2, 3),
        (7, 3, 12, 12),
        np.float32,
    )
    for number in range(6):
        y, x = divmod(number, 3)
        part = canvas[12 * y : 12 * y + 12, 12 * x : 12 * x + 12].astype(np.float32)
        expected = (part.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        np.testing.assert_array_equal(found.tiles[number], expected)
    assert found.tiles[5, :, 11, 11].tolist() == [-1, -1, -1]  # black beyond the image


def resized(photo, height, width):
    """Antialiased bilinear in float64: a triangle as wide as a new pixel, or an old if larger."""
    for axis, size in ((0, height), (1, width)):
        old = photo.shape[axis]
        scale = old / size
        centres = (np.arange(size)[:, None] + 0.5) * scale
        distance = np.abs(np.arange(old) + 0.5 - centres) / max(scale, 1)
        weights = np.maximum(0, 1 - distance)
        weights /= weights.sum(axis=1, keepdims=True)
        photo = np.moveaxis(np.tensordot(weights, photo, (1, axis)), 0, axis)
    return photo


@pytest.mark.parametrize("size", [(5, 9), (40, 90), (100, 11), (3, 60)])
def test_resizing_is_antialiased_bilinear(size):
    photo = noise(*size)
    found = images.tile(Image.fromarray(photo), SMALL)
    place = images.fit(*size, SMALL)
    rows, columns = place.grid
    levels = (found.tiles + 1) * 127.5
    canvas = levels[: rows * columns].reshape(rows, columns, 3, 12, 12)
    canvas = canvas.transpose(0, 3, 1, 4, 2).reshape(rows * 12, columns * 12, 3)
    expected = resized(photo.astype(float), place.height, place.width)
    # Both passes round to whole levels.
    np.testing.assert_allclose(canvas[: place.height, : place.width], expected, atol=1.01)
    if rows * columns > 1:
        whole = resized(photo.astype(float), 12, 12)
        np.testing.assert_allclose(levels[-1].transpose(1, 2, 0), whole, atol=1.01)
    else:
        assert len(found.tiles) == 1


def test_settings_change_the_tiles():
    photo = noise(13, 20)
    usual = images.process([photo], SMALL)[0]
    large = images.process([photo], Settings(tile_size=12, max_tiles=6, resize_to_max_canvas=True))
    assert (usual.grid, large[0].grid) == ((2, 2), (2, 3))
    other = Settings(tile_size=12, max_tiles=6, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    found = images.process([photo], other)[0].tiles
    raw = (usual.tiles + 1) / 2
    expected = (raw - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([1, 2, 4])[:, None, None]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "std", [(0.5, 0.5, 0.5), (0.229, 0.224, 0.225), (0.25, 1.0, 0.4), (2.0, 0.125, 3.0)]
)
def test_values_are_rounded_as_three_operations_round_them(std):
    """All values of all channels, with deviations that are powers of two and others."""
    mean, side = (0.485, 0.5, 0.3), 16
    values = np.arange(256, dtype=np.uint8).reshape(side, side)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    found = images.tile(image, Settings(tile_size=side, mean=mean, std=std)).tiles[0]
    for n, band in enumerate((values, values[::-1], values.T)):
        shares = band / np.float32(255)
        expected = (shares - np.float32(mean[n])) / np.float32(std[n])
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(found[n], expected)


def test_many_images_are_what_each_is_alone():
    photos = [noise(3 + 11 * n, 50 - 5 * n, seed=n) for n in range(9)]
    together = images.process(photos, SMALL)
    for photo, found in zip(photos, together, strict=True):
        (alone,) = images.process([photo], SMALL)
        assert alone.grid == found.grid
        np.testing.assert_array_equal(alone.tiles, found.tiles)
    assert images.process([]) == []


# --- Settings ------------------------------------------------------------------------------------
VISION = presets.get("tiny-llama4-scout").vision


def write(folder, name, values):
    (folder / name).write_text(json.dumps(values))


def test_settings_of_a_checkpoint(tmp_path):
    side = VISION.image_size
    tokens = (side // VISION.patch_size // VISION.pixel_shuffle) ** 2
    plain = Settings(tile_size=side, tokens_per_tile=tokens)
    assert images.of_checkpoint(tmp_path, VISION) == plain
    published = companions.processor_configs(image_size=side, patch_size=VISION.patch_size)
    for name, values in published.items():
        write(tmp_path, name, values)
    assert images.of_checkpoint(tmp_path, VISION) == plain
    fields = {"max_patches": 5, "resize_to_max_canvas": True, "resample": 2, "device": None}
    fields |= {"image_mean": [0.1, 0.2, 0.3], "image_std": None, "size": None}
    write(tmp_path, "preprocessor_config.json", fields)
    expected = Settings(
        tile_size=side,
        tokens_per_tile=tokens,
        max_tiles=5,
        resize_to_max_canvas=True,
        mean=(0.1, 0.2, 0.3),
    )
    assert images.of_checkpoint(tmp_path, VISION) == expected
    # transformers 5 writes one file, and prefers it.
    write(tmp_path, "processor_config.json", {"image_processor": {"max_patches": 7}})
    assert images.of_checkpoint(tmp_path, VISION).max_tiles == 7


def test_defaults_are_the_published_encoder_s(tmp_path):
    assert images.of_checkpoint(tmp_path, presets.llama4_vision()) == Settings()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"size": {"height": 9, "width": 9}}, "size .* must be the encoder's"),
        ({"size": 336}, "size 336 must be"),
        ({"do_normalize": False}, "do_normalize False is not supported"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0 must be 1/255"),
        ({"resample": 1}, "resample 1 is not supported, only 2, bilinear"),
        ({"max_patches": 0}, "max_tiles 0 must be at least 1"),
        ({"max_patches": "16"}, "max_patches '16' must be a whole number"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\] must hold a number for red, green and blue"),
        ({"image_std": [1, 0, 1]}, "std .* must be positive"),
        ({"rescale_factor": "a"}, "preprocessor_config.json: "),
        ([], "holds no JSON object"),
    ],
)
def test_settings_that_are_refused(tmp_path, fields, problem):
    write(tmp_path, "preprocessor_config.json", fields)
    with pytest.raises(ValueError, match=problem) as error:
        images.of_checkpoint(tmp_path, VISION)
    assert str(error.value).startswith(str(tmp_path))


def test_settings_that_are_no_json(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: not JSON"):
        images.of_checkpoint(tmp_path, VISION)


# --- Tokens --------------------------------------------------------------------------------------
def text_of(ids):
    return tokenizer().decode(ids).replace("<|patch|>", "·")


def test_layout():
    tok = tokenizer()
    assert text_of(images.layout((1, 1), tok, 3)) == "<|image_start|><|image|>···<|image_end|>"
    assert text_of(images.layout((2, 3), tok, 1)) == (
        "<|image_start|>"
        "·<|tile_x_separator|>·<|tile_x_separator|>·<|tile_y_separator|>"
        "·<|tile_x_separator|>·<|tile_x_separator|>·<|tile_y_separator|>"
        "<|image|>·<|image_end|>"
    )
    assert text_of(images.layout((2, 1), tok, 1)) == (
        "<|image_start|>·<|tile_y_separator|>·<|tile_y_separator|><|image|>·<|image_end|>"
    )


def test_a_prompt_has_images_where_it_says_or_in_front():
    tok, (one, two) = tokenizer(), images.process([noise(3, 3), noise(24, 12)], SMALL)
    first, second = (text_of(images.layout(x.grid, tok, 4)) for x in (one, two))

    def of(text, *pictures):
        return text_of(images.prompt(text, pictures, tok, 4))

    begin = "<|begin_of_text|>"
    assert of("A cat.", one, two) == f"{begin}{first}{second}A cat."
    assert of("A <|image|>, <|image|>\n", one, two) == f"{begin}A {first}, {second}\n"
    assert of("<|image|><|image|>", two, one) == f"{begin}{second}{first}"
    assert of("A cat.") == f"{begin}A cat."
    # The name of another token stays text, which is not the token.
    ids = images.prompt("<|patch|><|image|>", [one], tok, 4)
    assert ids.count(tok.special["<|patch|>"]) == 4
    assert text_of(ids) == f"{begin}·{first}"


@pytest.mark.parametrize("text", ["<|image|>", "a <|image|> b <|image|> c <|image|>"])
def test_placeholders_must_match(text):
    pictures = images.process([PHOTO, PHOTO], SMALL)
    found = text.count("<|image|>")
    with pytest.raises(ValueError, match=rf"the text has {found} <\|image\|> for 2 images; write"):
        images.prompt(text, pictures, tokenizer())
    with pytest.raises(ValueError, match=rf"{found} <\|image\|> for 0 images"):
        images.prompt(text, [], tokenizer())


def test_tokenizers_without_images():
    from l4jax.data import tokenizer as tk

    plain = tk.train(["text"], vocab_size=300)
    with pytest.raises(ValueError, match=r"no <\|patch\|>, which images need"):
        images.layout((1, 1), plain)


def test_settings_must_make_sense():
    with pytest.raises(ValueError, match="tile_size 0 must be"):
        Settings(tile_size=0)
    with pytest.raises(ValueError, match="std .* must be positive"):
        Settings(std=(1.0, -1.0, 1.0))
