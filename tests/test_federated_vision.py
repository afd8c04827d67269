"""The recipe end to end on a small set; sets that a user has, read from made-up files."""

import gzip
import json
import pickle
import shutil
import sys
import wave

import numpy as np
import pytest

from experiments import console
from experiments import federated_lab as lab
from experiments import federated_vision as recipe
from l4jax.federated import algorithms, clients, files, privacy, simulation
from l4jax.federated.compression import Compression
from l4jax.federated.local import Local
from l4jax.training import tracking

RNG = np.random.default_rng(0)


def arrays(count=20, side=6):
    """Ten classes of images that differ in one pixel, as bytes."""

    def half(seed, each):
        rng = np.random.default_rng(seed)
        y = np.repeat(np.arange(10), each)
        x = rng.integers(0, 60, (len(y), side, side))
        x[np.arange(len(y)), y // side, y % side] = 255
        return x.astype(np.uint8), y

    (x, y), (x_test, y_test) = half(0, count), half(1, 3)
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["federated_vision", *map(str, arguments)])
    monkeypatch.setattr(console.distributed, "initialize", lambda: None)
    return console.main(recipe.Settings, recipe.run, recipe.__doc__, "federated_vision")


# --- The recipe ----------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path, monkeypatch):
    """Arguments of a run of a few seconds."""
    monkeypatch.setattr(recipe, "LEVELS", (1.0, 0.0))
    monkeypatch.setattr(recipe, "BETAS", (0.1, 0.2))
    monkeypatch.setattr(recipe, "WARM_BETAS", (0.1,))
    monkeypatch.setattr(recipe, "ALPHAS", (1.0,))
    monkeypatch.setattr(recipe, "WARM", 3)
    np.savez(tmp_path / "own.npz", **arrays())
    return [
        *("--set", "mnist", "--data", tmp_path / "own.npz", "--out", tmp_path / "run"),
        *("--network", "dense", "--rounds", 4, "--evaluate-every", 2, "--draws", 1),
        *("--checkpoint-every", 2, "--rate", 0.1),
    ]


def test_a_run_leaves_figures_numbers_and_can_be_resumed(tmp_path, monkeypatch, capsys, small):
    out = tmp_path / "run"
    assert call(monkeypatch, *small) == 0
    figures = {file.name for file in out.glob("*.png")}
    drawn = {"accuracy", "divergence", "divergence_by_round", "emd", "beta", "alpha", "clients_iid"}
    assert {f"{name}.png" for name in drawn} <= figures
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in figures)
    report = json.loads((out / "report.json").read_text())
    table = (out / "results.md").read_text()
    assert "python -m experiments.federated_vision --set mnist" in table
    assert "seeds 0" in table
    for name in ("IID", "1 class each"):
        value = report["partitions"]["last"][name][0]
        assert f"| accuracy, {name} | {value:.3f} |" in table
        assert f"| divergence, {name} |" in table
    assert [float(x) for x in report["emd"]["divergence"]] == pytest.approx([0.0, 1.8], abs=0.06)
    assert report["divergence"]["total"]["1 class each"][0] > (
        3 * report["divergence"]["total"]["IID"][0]
    )
    apart = report["partitions"]["divergence"]
    assert list(apart) == ["all", "fc1", "output"]
    line = tracking.read(out / "runs" / "1_class_each-0" / "metrics.jsonl")[2]
    assert apart["fc1"]["1 class each"]["3"] == [line["divergence_fc1"]]
    assert min(x[0] for values in apart["all"].values() for x in values.values()) > 0
    assert float(report["sharing"]["emd"]["0.1"]) == pytest.approx(0.9, abs=0.1)

    # Again: refused as it is; with --resume it makes what is missing, and that alone.
    assert call(monkeypatch, *small) == 1
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert call(monkeypatch, *small, "--resume", "--no-compare") == 1
    assert "holds another run: compare: true then, false now" in capsys.readouterr().err.lower()
    assert call(monkeypatch, *small, "--resume", "--seeds", 1) == 1
    assert "holds another run: seeds" in capsys.readouterr().err
    victim = out / "runs" / "1_class_each-0"
    whole = tracking.read(victim / "metrics.jsonl")
    kept = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/metrics.jsonl")}
    lines = (victim / "metrics.jsonl").read_text().splitlines(keepends=True)
    (victim / "metrics.jsonl").write_text("".join(lines[:3]))
    shutil.rmtree(victim / "checkpoints" / "4")
    assert call(monkeypatch, *small, "--resume") == 0
    touched = [f for f, at in kept.items() if f.stat().st_mtime_ns != at]
    assert touched == [victim / "metrics.jsonl"]
    again = tracking.read(victim / "metrics.jsonl")
    assert [{**x, "seconds": 0} for x in again] == [{**x, "seconds": 0} for x in whole]
    assert json.loads((out / "report.json").read_text()) == report
    (out / "report.json").write_text(json.dumps({"emd": report["emd"]}))
    assert call(monkeypatch, *small, "--resume", "--studies", "partitions") == 0
    kept = {name: report[name] for name in ("emd", "partitions")}
    assert json.loads((out / "report.json").read_text()) == kept


@pytest.mark.slow
def test_clients_are_drawn_and_their_updates_small_and_private(
    tmp_path, monkeypatch, capsys, small
):
    """On two groups of devices; against the pieces put together by hand."""
    sent = ("--per-round", 4, "--keep", 0.5, "--bits", 8, "--clip", 0.5, "--noise", 0.1)
    chosen = ("--algorithm", "fedyogi", "--server-rate", 0.02, "--studies", "partitions")
    assert call(monkeypatch, *small, *chosen, *sent, "--delta", 0.01, "--mesh", "clients=2") == 0
    assert "10 clients are too few" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    epsilon = privacy.epsilon(noise=0.1, rounds=4, delta=0.01, share=0.4)
    assert report["privacy"]["epsilon"] == pytest.approx(epsilon)
    assert f"| ε of privacy after 4 rounds, δ 0.01 | {epsilon:.3f} |" in (
        (tmp_path / "run" / "results.md").read_text()
    )
    plain = lab.Lab(
        lab.Settings(set="mnist", data=str(tmp_path / "own.npz"), network="dense", rate=0.1)
    )
    compression = Compression(keep=0.5, bits=8)
    algorithm = algorithms.fedyogi(
        Local(loss=plain.loss, rate=lambda n: 0.1 * 0.995**n, batch=10),
        rate=0.02,
        options=algorithms.Options(
            compression=compression, privacy=privacy.Privacy(clip=0.5, noise=0.1)
        ),
    )
    parts = recipe.splits(plain, 0, plain.examples.train)["1 class each"]
    expected = simulation.run(
        algorithm,
        plain.params(0),
        plain.federation(parts),
        settings=simulation.Settings(rounds=4, participation=clients.Participation(per_round=4)),
    ).lines
    found = tracking.read(tmp_path / "run" / "runs" / "1_class_each-0" / "metrics.jsonl")
    for line, other in zip(found, expected, strict=True):
        assert line["bytes_up"] == 4 * compression.bytes(plain.params(0)) == other["bytes_up"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    # What is trained in one place has one client, which sends all.
    central = tracking.read(tmp_path / "run" / "runs" / "sgd-0" / "metrics.jsonl")
    assert [line["clients"] for line in central] == [1] * 4


@pytest.mark.parametrize(
    "name", ["fedprox", *(pytest.param(x, marks=pytest.mark.slow) for x in ("scaffold", "diloco"))]
)
def test_algorithms_are_those_of_the_library(name):
    values = {"mu": 0.5} if name == "fedprox" else {}
    made = lab.Lab(lab.Settings(network="dense", algorithm=name, **values))
    local = Local(loss=made.loss, rate=lambda n: 0.1 * 0.995**n, batch=10)
    expected = getattr(algorithms, name)(local, **values)
    parts = recipe.splits(made, 0, made.examples.train)["2 classes each"]
    losses = [
        simulation.run(
            algorithm,
            made.params(0),
            made.federation([part[:20] for part in parts]),
            settings=simulation.Settings(rounds=3),
        ).lines[-1]["loss"]
        for algorithm in (
            made.algorithm(),
            expected,
            lab.Lab(lab.Settings(network="dense")).algorithm(),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algorithm", "fedprox"), "mu None: it belongs to --algorithm fedprox, which needs it"),
        (("--mu", "0.1"), "mu 0.1: it belongs to --algorithm fedprox"),
        (("--server-rate", "0.5"), "fedavg takes the clients' mean as it is"),
        (("--server-rate", "0"), "server_rate 0 must be above 0"),
        (("--per-round", "11"), "per_round 11 exceeds the 10 clients"),
        (("--noise", "1"), "give --clip too"),
        (("--delta", "0.1"), "give --clip too"),
        (("--clip", "0"), "clip 0.0 must be above 0"),
        (("--bits", "1"), "bits 1 must be from 2 to 16"),
        (("--dropout", "2"), "dropout 2.0 must be from 0 to 1"),
        (("--mesh", "fsdp=2"), "write clients=4 first"),
        (("--mesh", "clients=2,fsdp=2"), "these networks lie on one device each"),
        (("--rounds", "0"), "rounds 0 must be at least 1"),
        (("--set", "mnist"), "--data is for mnist"),
        (("--data", "x"), "--data is for mnist"),
        (("--batch", "0"), "batch 0 must be at least 1"),
        (("--rate", "inf"), "rate inf above 0"),
        (("--decay", "1.5"), "decay 1.5 above 0 and at most 1"),
        (("--seeds", "1", "1"), "seeds (1, 1) must not be negative, and all different"),
        (("--network", "paper"), "network paper: there is none for digits"),
    ],
)
def test_usage_errors(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_digits_are_split_and_generated_sets_are_labelled():
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install l4jax[federated]")
    found = lab.digits()
    assert np.bincount(found.y[found.train]).tolist() == [140] * 10
    assert np.bincount(found.y[found.own]).tolist() == [100] * 10
    rows = np.concatenate([found.own, found.spare, found.test])
    assert sorted(rows) == list(range(1797))
    assert set(found.train) == {*found.own, *found.spare}


@pytest.mark.slow
def test_textures_lose_as_much_as_natural_images_do_and_sharing_wins_much_back(tmp_path):
    """60 rounds, a seed: IID above .78, 1 class each 40 to 60 points less, 5 % shared 22 more."""
    made = lab.Lab(
        lab.Settings(set="textures", out=tmp_path, rounds=60, studies=("partitions",), seeds=(0,))
    )
    splits = recipe.splits(made, 0, made.examples.train)
    late = {}
    for name in ("IID", "1 class each"):
        late[name] = recipe.last(made.curve(name[:1], splits[name], seed=0))
    shared = recipe.sharing.draw(made.examples.y, made.examples.spare, size=100, seed=0)
    after, _ = recipe.sharing.share(
        splits["1 class each"], shared, labels=made.examples.y, alpha=1.0, seed=0
    )
    late["shared"] = recipe.last(made.curve("shared", after, seed=0))
    assert late["IID"] > 0.78
    assert 0.40 < late["IID"] - late["1 class each"] < 0.60
    assert late["shared"] - late["1 class each"] > 0.22


# --- Files ---------------------------------------------------------------------------------------
def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + bytes(array)


def test_mnists_files_are_read_packed_or_not(tmp_path):
    given = arrays()
    for kind, name in (("train", "train"), ("test", "t10k")):
        images, labels = given[f"x_{kind}"], given[f"y_{kind}"].astype(np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    found = files.read(str(tmp_path), "mnist")
    np.testing.assert_allclose(found.x_test[..., 0], given["x_test"] / 255, atol=1e-7)
    assert found.y_train.tolist() == given["y_train"].tolist()
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(given["x_test"])[:-1])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: is no IDX file"):
        files.read(str(tmp_path), "mnist")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(given["x_test"])[:6])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: is no IDX file"):
        files.read(str(tmp_path), "mnist")
    packed = tmp_path / "train-labels-idx1-ubyte.gz"
    kept = packed.read_bytes()
    packed.write_bytes(kept[:-9])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz: is damaged"):
        files.read(str(tmp_path), "mnist")
    packed.write_bytes(kept)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match="has no t10k-images-idx3-ubyte"):
        files.read(str(tmp_path), "mnist")


def test_cifars_binary_files_are_read_and_pickles_are_not(tmp_path):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="pickled version"):
        files.read(str(tmp_path), "cifar10")
    images = RNG.integers(0, 256, (12, 3, 32, 32)).astype(np.uint8)
    for n in range(6):
        name = f"data_batch_{n + 1}.bin" if n < 5 else "test_batch.bin"
        both = images[2 * n : 2 * n + 2]
        records = [bytes([2 * n + i % 2]) + bytes(x) for i, x in enumerate(both)]
        (tmp_path / name).write_bytes(b"".join(records))
    found = files.read(str(tmp_path), "cifar10")
    assert found.y_train.tolist() == list(range(10))
    assert found.y_test.tolist() == [10, 11]
    assert found.x_train[3, 5, 7, 2] == pytest.approx(images[3, 2, 5, 7] / 255)
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="data_batch_2.bin: is not made of records of 3,073"):
        files.read(str(tmp_path), "cifar10")


def test_arrays_of_ones_own_are_read_but_never_unpickled(tmp_path):
    file = tmp_path / "own.npz"
    given = arrays()
    np.savez(file, **{name: x for name, x in given.items() if name != "y_test"})
    with pytest.raises(ValueError, match="needs plain arrays x_train, y_train, x_test, y_test"):
        files.read(str(file), "mnist")
    np.savez(file, **given | {"y_test": np.array([{}], object)})
    with pytest.raises(ValueError, match="plain arrays"):
        files.read(str(file), "mnist")
    np.savez(file, **given | {"x_test": np.zeros(3)})
    with pytest.raises(ValueError, match="must be"):
        files.read(str(file), "mnist")
    for wrong in (given["y_train"][:-1], given["y_train"] / 2, np.eye(10)[given["y_train"]]):
        np.savez(file, **given | {"y_train": wrong})
        with pytest.raises(ValueError, match="they must be whole numbers, one for each"):
            files.read(str(file), "mnist")
    np.savez(file, **given | {"y_train": given["y_train"] + 7, "y_test": given["y_test"] + 7})
    assert files.read(str(file), "mnist").y_train.tolist() == given["y_train"].tolist()
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="own.npz: needs plain arrays"):
            files.read(str(file), "mnist")
    with pytest.raises(ValueError, match="give a folder with the files of mnist"):
        files.read(str(tmp_path / "nowhere"), "mnist")


def test_spoken_words_become_coefficients(tmp_path):
    def write(name, samples, hertz=16_000):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with wave.open(str(tmp_path / name), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(hertz)
            sound.writeframes((samples * 2**14).astype("<i2").tobytes())

    time = np.arange(16_000) / 16_000
    for number, word in enumerate(files.WORDS):
        for take in range(3):
            tone = np.sin(2 * np.pi * (200 + 300 * number + 5 * take) * time)
            write(f"{word}/{take}.wav", tone if take < 2 else tone[:9000])
    (tmp_path / "testing_list.txt").write_text("yes/1.wav\ngo/2.wav\n")
    (tmp_path / "validation_list.txt").write_text("no/0.wav\n")
    found = files.read(str(tmp_path), "speech_commands")
    assert found.x_train.shape == (27, 50, 10, 1)
    assert found.y_test.tolist() == [0, 9]
    np.testing.assert_allclose(found.x_train.mean((0, 1)), 0, atol=1e-4)
    # A test file is like the same word's training files, and unlike others.
    distance = ((found.x_train - found.x_test[0]) ** 2).sum((1, 2, 3))
    assert found.y_train[distance.argmin()] == 0
    # A tone between two bands' centres: the energies behind the coefficients are largest there.
    spectrum = np.abs(np.fft.rfft(np.hanning(480) * np.sin(2 * np.pi * 1000 * time[:480]), 512))
    energies = spectrum**2 @ files._bands()
    centres = 700 * (10 ** (np.linspace(*np.log10(1 + np.array([20, 4000]) / 700), 42)[1:-1]) - 1)
    assert abs(centres[energies.argmax()] - 1000) < 80
    write("yes/0.wav", time, hertz=8000)
    with pytest.raises(ValueError, match="must have 16,000 samples a second"):
        files.read(str(tmp_path), "speech_commands")
    (tmp_path / "testing_list.txt").unlink()
    with pytest.raises(ValueError, match="has no testing_list.txt"):
        files.read(str(tmp_path), "speech_commands")
