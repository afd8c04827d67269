"""Federated Llamas: averaging rules against NumPy, parts, load, DiLoCo; the recipe end to end."""

import dataclasses
import functools
import json
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build
from flax import nnx

from experiments import console, federated_text
from experiments import federated_llama as recipe
from l4jax import checkpoints, lora, paths, presets
from l4jax.federated import adapters, algorithms, clients, generated, language, mapping, metrics
from l4jax.federated.algorithms import Options
from l4jax.federated.compression import Compression
from l4jax.federated.local import Local
from l4jax.lora import LowRank
from l4jax.training import objectives, tracking

RNG = np.random.default_rng(5)
CONFIG = dataclasses.replace(federated_text.twin(37), embed_dim=32)
PARTS = [np.arange(0, 5), np.arange(5, 8), np.arange(8, 15)]
SIZES = [5, 3, 7]


# --- Averaging rules -----------------------------------------------------------------------------
def toy():
    """Two adapted weights [3 5] and [2 3 1 5] with a bias beside them, and a loss of them."""
    rng = np.random.default_rng(2)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "first": LowRank(array(3, 5), array(3, 1, 2), 0 * array(1, 5, 2), 1.5, False),
        "second": LowRank(
            array(2, 5, 4), array(2, 5, 1, 2), 0 * array(2, 1, 4, 2), 0.5, experts=True
        ),
        "bias": array(4),
    }

    def loss(params, batch, key):
        x = jnp.tanh(batch["x"] @ params["first"].merged(jnp.float32))
        y = jnp.einsum("bi,eio->bo", x, params["second"].merged(jnp.float32)) + params["bias"]
        return jnp.sum(jnp.square(y - batch["y"]).mean(-1) * batch["mask"]) / batch["mask"].sum()

    pool = {"x": array(15, 3), "y": array(15, 4)}
    return params, loss, pool


@functools.cache
def made(rule, block):
    """A rule's algorithm, and its round, compiled once for one client and once for three."""
    local = Local(loss=toy()[1], rate=0.3, epochs=4, shuffle=False)
    algorithm = adapters.fedavg(local, rule, clients=3, options=Options(block=block))
    return algorithm, jax.jit(algorithm.round)


def after(rule, parts, *, params=None, block=None):
    """Parameters after a round of clients with these rows."""
    start, _, pool = toy()
    algorithm, step = made(rule, block)
    state, data = algorithm.init(params or start, len(parts)), clients.gather(pool, parts, width=7)
    cohort = clients.everybody(len(parts))
    return step(state, data, cohort, key=jax.random.key(0), number=0)[0].params


def merged(params):
    """The effective weights, by plain loops over the rank."""
    found = {}
    for name in ("first", "second"):
        x = params[name]
        base, a, b = (np.asarray(value, np.float64) for value in (x.base, x.a, x.b))
        found[name] = base + x.scale * sum(a[..., r] * b[..., r] for r in range(a.shape[-1]))
    return found


def mean(values):
    return {
        name: np.average([value[name] for value in values], axis=0, weights=SIZES)
        for name in values[0]
    }


def off(a, b):
    return max(float(np.abs(a[name] - b[name]).max()) for name in b)


@pytest.mark.parametrize(
    ("rule", "right"), [("exact", True), ("freeze_a", True), ("factors", False)]
)
def test_only_the_exact_rules_average_models(rule, right):
    """Against NumPy's mean of the models that clients make alone; the second round is harder."""
    start, total = toy()[0], after(rule, PARTS)
    alone = [merged(after(rule, [part])) for part in PARTS]
    error, moved = off(merged(total), mean(alone)), off(merged(total), merged(start))
    assert moved > 0.05
    assert error < 1e-6 if right else error > 1e-3
    again = after(rule, PARTS, params=total)
    alone = [merged(after(rule, [part], params=total)) for part in PARTS]
    error = off(merged(again), mean(alone))
    assert error < 2e-6 if right else error > 1e-3


def test_factors_are_the_means_and_other_parameters_stay():
    start, total = toy()[0], after("factors", PARTS)
    alone = [after("factors", [part]) for part in PARTS]
    for name in ("first", "second"):
        for part in "ab":
            each = [np.asarray(getattr(x[name], part)) for x in alone]
            np.testing.assert_allclose(
                getattr(total[name], part), np.average(each, axis=0, weights=SIZES), atol=1e-6
            )
        np.testing.assert_array_equal(total[name].base, start[name].base)
        frozen = after("freeze_a", PARTS)[name]
        np.testing.assert_array_equal(frozen.a, start[name].a)
        assert np.abs(frozen.b).max() > 0.01
    np.testing.assert_array_equal(total["bias"], start["bias"])


def test_the_bias_is_what_exact_adds():
    start = toy()[0]
    factors, exact = after("factors", PARTS), after("exact", PARTS)
    alone = mean([merged(after("factors", [part])) for part in PARTS])
    wrong = [merged(factors)[name] - alone[name] for name in alone]
    right = [alone[name] - np.asarray(start[name].base) for name in alone]
    norm = [np.sqrt(sum(np.sum(x**2) for x in xs)) for xs in (wrong, right)]
    assert adapters.bias(start, exact) == pytest.approx(norm[0] / norm[1], rel=1e-4)
    assert norm[0] / norm[1] > 0.01


def test_rules_count_their_bytes_and_blocks_change_nothing():
    params, loss, _ = toy()
    a, b = 4 * (3 * 2 + 2 * 5 * 2), 4 * (5 * 2 + 2 * 4 * 2)
    dense = 4 * (3 * 5 + 2 * 5 * 4)
    local = Local(loss=loss, rate=0.1)
    found = {
        (rule, k): adapters.fedavg(local, rule, clients=k).traffic(params)
        for rule in ("factors", "freeze_a", "exact")
        for k in (1, 9)
    }
    assert found["factors", 9] == (a + b, a + b)
    assert found["freeze_a", 9] == (b, b)
    assert found["exact", 9] == (a + b + dense, a + b)
    assert found["exact", 1] == (2 * (a + b), a + b)
    assert off(merged(after("exact", PARTS, block=1)), merged(after("exact", PARTS))) < 1e-6


def test_what_does_not_go_together_is_refused():
    params, loss, pool = toy()
    local = Local(loss=loss, rate=0.1)
    for more in ({"server": optax.sgd(0.5)}, {"options": Options(compression=Compression(bits=8))}):
        with pytest.raises(ValueError, match="needs FedAvg, nothing added"):
            adapters.fedavg(local, "exact", clients=2, **more)
    quantized = dataclasses.replace(params["first"], base=jnp.ones((3, 5), jnp.int8))
    with pytest.raises(ValueError, match="which are quantized: use factors"):
        adapters.fold({"first": quantized}, adapters.products({"first": quantized}))
    with pytest.raises(ValueError, match="none of the parameters"):
        dataclasses.replace(local, trained=lambda name: False).parts(params)
    with pytest.raises(ValueError, match="draws 0 must be at least 1"):
        Local(loss=loss, rate=0.1, batch=2, draws=0)
    with pytest.raises(ValueError, match="draws 3 must"):
        Local(loss=loss, rate=0.1, draws=3)


# --- Steps that are drawn ------------------------------------------------------------------------
def test_clients_of_all_sizes_draw_as_many_steps_from_their_own_rows():
    seen = {"rows": jnp.arange(15.0)}

    def loss(params, batch, key):  # its gradient adds up what was drawn
        return -jnp.sum(params["count"][batch["rows"].astype(int)] * batch["mask"])

    local = Local(loss=loss, rate=1.0, batch=2, draws=11)
    algorithm = algorithms.fedavg(local, options=Options(weights="clients"))
    state = algorithm.init({"count": jnp.zeros(15)}, 3)
    data, cohort = clients.gather(seen, PARTS), clients.everybody(3)
    state, _ = algorithm.round(state, data, cohort, key=jax.random.key(1), number=0)
    drawn = 3 * np.asarray(state.params["count"])
    assert [drawn[part].sum() for part in PARTS] == pytest.approx([22, 22, 22], abs=1e-4)
    assert drawn.max() > drawn.min()


# --- A Llama -------------------------------------------------------------------------------------
def llama():
    """A tiny Scout's parameters, its loss, and nine texts of two languages."""
    params, of = language.functional(build(CONFIG))
    pool = generated.languages(2, 8, length=21, vocabulary=37, seed=3)
    return params, language.loss(of, objectives.next_token()), {"tokens": pool["tokens"]}


def test_one_local_step_and_an_outer_rate_of_one_is_synchronous_training():
    """DiLoCo of one SGD step, outer rate 1 and no momentum, against the mean gradient."""
    params, loss, pool = llama()
    parts = [np.arange(0, 3), np.arange(8, 11)]
    local = Local(loss=loss, rate=0.5, shuffle=False)
    algorithm = algorithms.diloco(local, rate=1.0, momentum=0.0, options=Options(block=1))
    state, _ = jax.jit(algorithm.round)(
        algorithm.init(params, 2),
        clients.gather(pool, parts),
        clients.everybody(2),
        key=jax.random.key(0),
        number=0,
    )
    batch = {"tokens": pool["tokens"][np.concatenate(parts)], "mask": jnp.ones(6)}
    gradient = jax.jit(jax.grad(loss))(params, batch, jax.random.key(0))
    for name, old, new, g in zip(
        paths.names(params), *map(jax.tree.leaves, (params, state.params, gradient)), strict=True
    ):
        np.testing.assert_allclose(new, old - 0.5 * g, atol=2e-6, err_msg=name)


def test_rows_that_only_fill_a_batch_do_not_count():
    params, loss, pool = llama()
    measure = jax.jit(loss)
    tokens, key = pool["tokens"], jax.random.key(0)
    part = measure(params, {"tokens": tokens[:4], "mask": jnp.array([1.0, 1, 0, 0])}, key)
    other = measure(
        params, {"tokens": tokens[[0, 1, 6, 7]], "mask": jnp.array([1.0, 1, 0, 0])}, key
    )
    assert float(part) == float(other)
    assert float(part) != float(measure(params, {"tokens": tokens[:4], "mask": jnp.ones(4)}, key))


@pytest.mark.slow
def test_groups_of_chips_train_as_clients_one_after_the_other_do():
    """DiLoCo of two clients on a mesh of two groups of two devices; plain SGD, as Adam's first
    steps are signs of what rounding leaves."""
    params, loss, pool = llama()
    data = clients.gather(pool, [np.arange(0, 8), np.arange(8, 16)])

    def go(mesh):
        local = Local(loss=loss, rate=0.3, batch=4, draws=2)
        algorithm = algorithms.diloco(local, options=Options(block=1, mesh=mesh))
        step = jax.jit(algorithm.round)
        state, cohort = algorithm.init(params, 2), clients.everybody(2)
        return step(state, data, cohort, key=jax.random.key(0), number=0)[0].params

    mesh = mapping.make_mesh(clients=2, data=1, fsdp=2, expert=1, context=1, tensor=1)
    with jax.set_mesh(mesh):
        apart = go(mesh)
    # Between rounds, too, a model lies over its group's devices.
    assert all("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(apart) if x.ndim > 2)
    apart = jax.device_get(apart)
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(go(None)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", ["llama4-scout", "llama4-maverick", "llama3.2-1b"])
def test_every_parameter_is_part_of_one_group(name):
    model = nnx.eval_shape(
        lambda: language.Llama(presets.get(f"tiny-{name}").make(), rngs=nnx.Rngs(0))
    )
    found = language.groups(model)
    names = paths.names(nnx.to_pure_dict(nnx.state(model)))
    assert sorted(found) == sorted(names)
    rules = {  # by names alone, of models whose first layer is routed in these presets
        "embedding": lambda x: x == "embed",
        "head": lambda x: x == "head",
        "attention": lambda x: ".attention." in x,
        "router": lambda x: x.endswith(".router"),
        "norms": lambda x: x.endswith("norm.scale"),
    }
    for group, rule in rules.items():
        assert {x for x, of in found.items() if of == group} == set(filter(rule, names))
    routed = {x.removesuffix(".router") for x in names if x.endswith(".router")}
    for x in names:
        if found[x] in ("experts", "dense"):
            assert (found[x] == "experts") == (x.rpartition(".")[0] in routed)
    assert ("router" in found.values()) == (name != "llama3.2-1b")


def test_load_is_compared_layer_by_layer():
    loads = np.array([[[4, 0], [1, 3]], [[0, 4], [3, 1]]])  # [k l e]
    # First layer: shares (1, 0) and (0, 1) against ½; second: ¼ and ¾ against ½.
    assert language.load_emd(loads).tolist() == [[1.0, 0.5], [1.0, 0.5]]
    even = language.load_emd(loads, population=[[1, 0], [1, 3]])
    assert even.tolist() == [[0.0, 0.0], [2.0, 1.0]]


def test_adapters_are_merged_before_parts_are_measured():
    model = lora.apply(build(CONFIG), ("*.attention.*",), rank=2, alpha=4, key=jax.random.key(0))
    with pytest.raises(ValueError, match="merge adapters"):
        language.groups(model)


def test_languages_are_far_apart_and_the_same_again():
    one, two = (generated.languages(3, 50, length=40, vocabulary=16, seed=s) for s in (0, 1))
    again = generated.languages(3, 50, length=40, vocabulary=16, seed=0)
    np.testing.assert_array_equal(one["tokens"], again["tokens"])
    assert one["tokens"].shape == (150, 40)
    assert np.bincount(one["y"]).tolist() == [50] * 3
    assert 0 <= one["tokens"].min() <= one["tokens"].max() < 16

    def pairs(found, k):
        rows = found["tokens"][found["y"] == k]
        return np.bincount((16 * rows[:, :-1] + rows[:, 1:]).ravel(), minlength=256)

    same = metrics.mean_emd([pairs(one, 0), pairs(two, 0)])
    assert metrics.mean_emd([pairs(one, 0), pairs(one, 1)]) > 4 * same


# --- The recipe ----------------------------------------------------------------------------------
WORDS = ("red green blue is", "one two three and", "up down left right")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three clients' texts, and a model with its tokenizer."""
    from l4jax.data import tokenizer as tokenizers

    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    texts = []
    for name, words in zip("abc", WORDS, strict=True):
        (folder / name).mkdir()
        for number in range(5):
            texts.append(" ".join(rng.choice(words.split(), 150)))
            (folder / name / f"{number}.txt").write_text(texts[-1])
    tokenizers.train(texts, vocab_size=300).save(folder / "model")
    config = dataclasses.replace(CONFIG, vocab_size=300)
    checkpoints.save(build(config), folder / "made", to="orbax")
    for file in (folder / "model").iterdir():
        (folder / "made" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def go(files, monkeypatch):
    """Runs the recipe on the toy files; its exit status."""
    monkeypatch.setattr(console.distributed, "initialize", lambda: None)

    def go(out, *more):
        arguments = [
            *("--out", out, "--data", *(files / x for x in "abc"), "--init", files / "made"),
            *("--rounds", 2, "--steps", 2, "--batch", 2, "--length", 24),
        ]
        monkeypatch.setattr(sys, "argv", ["federated_llama", *map(str, [*arguments, *more])])
        return console.main(recipe.Settings, recipe.run, recipe.__doc__, "federated_llama")

    return go


def lines(out, name):
    """A run's metrics without what differs from run to run."""
    return [
        {key: x for key, x in line.items() if key not in tracking.TIMING}
        for line in tracking.read(out / "runs" / name / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_run_leaves_figures_numbers_and_a_model(go, tmp_path):
    out = tmp_path / "out"
    assert go(out, "--studies", "divergence") == 0
    report = json.loads((out / "report.json").read_text())
    assert (out / "divergence.png").read_bytes()[:4] == b"\x89PNG"
    groups = report["divergence"]["groups"]
    assert set(groups["IID"]) == set(groups["by domain"]) == set(language.GROUPS)
    table = (out / "results.md").read_text()
    assert f"| divergence of the model, IID, router | {groups['IID']['router']:.4f} |" in table
    # A client with a share p of all rows is 2 (1 - p) away from them.
    rows = np.array(list(report["data"]["rows"].values()))
    expected = 2 * (1 - np.sum((rows / rows.sum()) ** 2))
    assert report["data"]["emd_domains"] == pytest.approx(expected, rel=1e-6)
    assert checkpoints.load(out / "model").config == dataclasses.replace(CONFIG, vocab_size=300)
    assert [line["step"] for line in lines(out, "by-domain-0")] == [0, 1]


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_the_round_that_was_cut(
    go, tmp_path, monkeypatch, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert go(whole, "--studies", "rounds") == 0
    assert go(whole, "--studies", "rounds") == 1
    assert "holds a run; add --resume" in capsys.readouterr().err
    log = federated_text.federated_lab._Written.log

    def stops(self, line):
        log(self, line)
        if line["step"] == 1 and "iid" in str(self._lines._here):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(federated_text.federated_lab._Written, "log", stops)
        assert go(cut, "--studies", "rounds") == 143
    assert "federated_llama: told to stop" in capsys.readouterr().err
    before = (cut / "runs" / "by-domain-0" / "checkpoints" / "2" / "run.json").stat().st_mtime_ns
    assert go(cut, "--studies", "rounds", "--resume") == 0
    for name in ("by-domain-0", "iid", "central"):
        assert lines(cut, name) == lines(whole, name)
    after = (cut / "runs" / "by-domain-0" / "checkpoints" / "2" / "run.json").stat().st_mtime_ns
    assert before == after
    reports = [json.loads((x / "report.json").read_text()) for x in (whole, cut)]
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["freeze_a", "exact"])
def test_adapters_can_be_trained_by_a_rule(go, tmp_path, files, rule):
    out = tmp_path / "out"
    options = ("--rank", 2, "--rule", rule, "--replay", 0.1)
    assert go(out, "--studies", "lora", "diloco", *options) == 0
    found = json.loads((out / "report.json").read_text())
    report, rounds = found["lora"], found["diloco"]
    if rule == "freeze_a":  # rounds of two steps
        sent = rounds["averages"]["megabytes"]
        assert rounds["synchronous"]["megabytes"] == pytest.approx(2 * sent)
    assert set(report["last"]) == set(recipe.RULES)
    sent = report["megabytes"]
    assert sent["freeze_a"] < sent["factors"] < sent["exact"]
    assert report["bias_after_a_round"] > 0
    assert (out / "adapter").exists()
    for line in lines(out, "by-domain-0.1"):  # of the weights, whether adapters are merged or not
        apart = {name for name, x in line.items() if name.startswith("divergence") and x}
        assert apart == {"divergence", "divergence_attention"}
    before, now = (checkpoints.load(x) for x in (files / "made", out / "model"))
    np.testing.assert_array_equal(before.embed[...], now.embed[...])
    old, new = (x.layers[0].attention.q[...] for x in (before, now))
    assert not np.array_equal(old, new)


@pytest.mark.slow
def test_replay_and_diloco_are_drawn(go, tmp_path):
    out = tmp_path / "out"
    assert go(out, "--studies", "replay", "diloco") == 0
    report = json.loads((out / "report.json").read_text())
    emds = list(report["replay"]["emd"].values())
    assert emds == sorted(emds, reverse=True)
    found = report["diloco"]
    assert found["synchronous"]["megabytes"] == pytest.approx(2 * found["averages"]["megabytes"])
    assert {x.name for x in out.glob("*.png")} == {"replay.png", "bytes.png"}


@pytest.mark.slow
def test_groups_of_devices_are_clients(go, tmp_path):
    """Two of the three clients' updates of a round, in 8 bits; on a mesh as on one device."""
    found = {}
    for mesh in ("clients=1", "clients=2,fsdp=2"):
        out = tmp_path / mesh
        sent = ("--per-round", 2, "--bits", 8, "--mesh", mesh, "--rounds", 2)
        assert go(out, "--studies", "rounds", "--server", "diloco", *sent) == 0
        found[mesh] = lines(out, "by-domain-0")
        model = checkpoints.load(out / "model")
        assert model.config == dataclasses.replace(CONFIG, vocab_size=300)
    for line, other in zip(*found.values(), strict=True):
        assert line["clients"] == 2
        assert line["bytes_up"] == other["bytes_up"] < line["bytes_down"] / 3
        assert line["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-4)
        for group in language.GROUPS:
            name = f"divergence_{group}"
            assert line[name] == pytest.approx(other[name], rel=0.02)


@pytest.mark.slow
def test_private_clients_are_told_what_it_is_worth(go, tmp_path, capsys):
    out = tmp_path / "out"
    assert go(out, "--studies", "rounds", "--clip", 1, "--noise", 0.1) == 0
    assert "privacy: 3 clients are too few" in " ".join(capsys.readouterr().err.split())
    assert "| ε of privacy after 2 rounds, δ 1e-05 |" in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "rounds 0 must be at least 1"),
        (("--rank", "2", "--server", "diloco"), "rule exact is for averages"),
        (("--data", "a", "b", "a", "--init", "c"), "at least two paths, each once"),
        (("--rank", "2", "--bits", "8"), "rule exact, which study lora has too, is for updates"),
        (("--studies", "lora", "--clip", "1"), "rule exact, which study lora has too"),
        (("--per-round", "0"), "per_round 0 must be at least 1"),
        (("--mesh", "clients=2,heads=2"), "the axes are data, fsdp"),
        (("--replay", "1"), "replay 1.0 must be at least 0 and below 1"),
        (("--rate", "0"), "rate 0.0 must be above 0"),
        (("--data", "one"), "give at least two paths"),
    ],
)
def test_usage_errors(go, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        go(tmp_path / "out", *arguments)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
