"""Data sets that a user has: arrays in an .npz file, or the files that they are published as.

    NAME.npz           arrays x_train, y_train, x_test, y_test
    MNIST              train-images-idx3-ubyte, … as they are or .gz
    CIFAR-10           the binary version: data_batch_1.bin …, test_batch.bin
    Speech Commands    a folder of .wav files for each word

Nothing is ever unpickled, so CIFAR-10's "python version" is refused.
"""

from __future__ import annotations

import gzip
import pathlib
import wave
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import scipy.fft

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten keywords of Speech Commands, in the order of their labels."""
HERTZ, FRAME, HOP, BANDS, COEFFICIENTS = 16_000, 480, 320, 40, 10
"""Of keywords: 10 cepstral coefficients over 30 ms, every 20 ms; 50 frames a second."""
FRAMES = HERTZ // HOP


class Arrays(NamedTuple):
    """x: Float32[n h w c]. y: Int32[n]."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def read(path: str, name: str) -> Arrays:
    """A data set.

    Args:
        path: of an .npz file, or the folder of the published files.
        name: "mnist", "cifar10" or "speech_commands"; of no account for an .npz file.

    Raises:
        ValueError: there is nothing to read, or it is not what it should be.
    """
    place = pathlib.Path(path)
    if place.suffix == ".npz" and place.is_file():
        return _npz(place)
    if not place.is_dir():
        raise ValueError(f"{path}: give a folder with the files of {name}, or an .npz file")
    readers = {"mnist": _mnist, "cifar10": _cifar, "speech_commands": _speech}
    return readers[name](place)


def _npz(file: pathlib.Path) -> Arrays:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = Arrays(*(arrays[name] for name in Arrays._fields))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file}: needs plain arrays {', '.join(Arrays._fields)}: {error}"
        ) from None
    for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(
                f"{file}: labels of {y.dtype} {y.shape} for {len(x)} images; they must be whole "
                "numbers, one for each"
            )
    images = [x if x.ndim == 4 else x[..., None] for x in (found.x_train, found.x_test)]
    if any(x.ndim != 4 for x in images):
        raise ValueError(f"{file}: x_train {found.x_train.shape} must be [n h w] or [n h w c]")
    scale = 255 if images[0].dtype == np.uint8 else 1
    train, test = ((x / scale).astype(np.float32) for x in images)
    # Labels may be any numbers; classes are counted from 0.
    both = np.concatenate([found.y_train, found.y_test])
    labels = np.unique(both, return_inverse=True)[1].astype(np.int32)
    return Arrays(train, labels[: len(train)], test, labels[len(train) :])


def _mnist(folder: pathlib.Path) -> Arrays:
    def images(name: str) -> np.ndarray:
        return (_idx(folder, f"{name}-images-idx3-ubyte") / 255).astype(np.float32)[..., None]

    def labels(name: str) -> np.ndarray:
        return _idx(folder, f"{name}-labels-idx1-ubyte").astype(np.int32)

    return Arrays(images("train"), labels("train"), images("t10k"), labels("t10k"))


def _idx(folder: pathlib.Path, name: str) -> np.ndarray:
    """An array of bytes: two zeros, its type (8), its rank, its sizes, its entries."""
    for file, opened in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if not file.exists():
            continue
        try:
            with opened(file, "rb") as stream:
                content = stream.read()
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{file}: is damaged ({error})") from None
        rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
        header = content[4 : 4 + 4 * rank]
        shape = np.frombuffer(header[: len(header) // 4 * 4], ">i4")
        if not rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
            raise ValueError(f"{file}: is no IDX file of bytes, or not whole")
        return np.frombuffer(content[4 + 4 * rank :], np.uint8).reshape(shape)
    raise ValueError(f"{folder}: has no {name}, and no {name}.gz")


def _cifar(folder: pathlib.Path) -> Arrays:
    """Records of a label and 32 × 32 bytes each of red, green and blue."""
    if not (folder / "test_batch.bin").exists() and (folder / "test_batch").exists():
        raise ValueError(
            f"{folder}: has the pickled version of CIFAR-10, which is not read; take the binary one"
        )

    def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
        file = folder / name
        if not file.exists():
            raise ValueError(f"{folder}: has no {name}")
        records = np.frombuffer(file.read_bytes(), np.uint8)
        if len(records) % 3073 or not len(records):
            raise ValueError(f"{file}: is not made of records of 3,073 bytes")
        records = records.reshape(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return (images / 255).astype(np.float32), records[:, 0].astype(np.int32)

    train = [batch(f"data_batch_{n}.bin") for n in range(1, 6)]
    x, y = (np.concatenate(side) for side in zip(*train, strict=True))
    return Arrays(x, y, *batch("test_batch.bin"))


def _speech(folder: pathlib.Path) -> Arrays:
    """Files that testing_list.txt names are for testing; validation_list.txt's are left out."""
    listed = {}
    for kind in ("testing", "validation"):
        file = folder / f"{kind}_list.txt"
        if not file.exists():
            raise ValueError(f"{folder}: has no {file.name}")
        listed[kind] = set(file.read_text().split())
    x: dict[bool, list[np.ndarray]] = {True: [], False: []}
    y: dict[bool, list[int]] = {True: [], False: []}
    for label, word in enumerate(WORDS):
        for file in sorted((folder / word).glob("*.wav")):
            name = f"{word}/{file.name}"
            if name not in listed["validation"]:
                x[name in listed["testing"]].append(cepstrum(_sound(file)))
                y[name in listed["testing"]].append(label)
    if not x[True] or not x[False]:
        raise ValueError(f"{folder}: has no .wav files of {', '.join(WORDS)} to train and test on")
    sides = [(np.stack(x[test])[..., None], np.array(y[test], np.int32)) for test in (False, True)]
    mean, deviation = sides[0][0].mean((0, 1)), sides[0][0].std((0, 1)) + 1e-6
    (train, train_y), (test, test_y) = (
        (((x - mean) / deviation).astype(np.float32), y) for x, y in sides
    )
    return Arrays(train, train_y, test, test_y)


def _sound(file: pathlib.Path) -> np.ndarray:
    """A second of sound, from -1 to 1."""
    try:
        with wave.open(str(file), "rb") as sound:
            form = (sound.getframerate(), sound.getsampwidth(), sound.getnchannels())
            content = sound.readframes(HERTZ)
    except (EOFError, wave.Error) as error:
        raise ValueError(f"{file}: is no WAV file: {error}") from None
    if form != (HERTZ, 2, 1):
        raise ValueError(f"{file}: must have 16,000 samples a second of 16 bits, one channel")
    samples = np.frombuffer(content, "<i2") / 2**15
    return np.pad(samples, (0, HERTZ - len(samples)))


def cepstrum(samples: np.ndarray) -> np.ndarray:
    """Mel-frequency cepstral coefficients (Davis & Mermelstein 1980), Float[50 10].

    Args:
        samples: a second of sound, Float[16000].
    """
    padded = np.pad(samples, (0, FRAME))
    frames = np.stack([padded[HOP * i : HOP * i + FRAME] for i in range(FRAMES)])
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME), 512)) ** 2
    return scipy.fft.dct(np.log(power @ _bands() + 1e-6), axis=1, norm="ortho")[:, :COEFFICIENTS]


def _bands() -> np.ndarray:
    """Triangles of equal width on the mel scale from 20 to 4,000 Hz, [frequencies bands]."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (20, 4000))
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    hertz = np.linspace(0, HERTZ / 2, 257)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))
