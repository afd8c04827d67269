"""The multipliers are the table's, cover every parameter, and keep activations' changes flat."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES, build
from flax import nnx

from experiments import metap as recipe
from l4jax import paths, presets, sharding
from l4jax.config import Layer
from l4jax.models.llama4 import Llama
from l4jax.training import metap, objectives, optimizers, schedules, trainer

SCOUT = presets.tiny(presets.llama4_scout())


def config_of(width, *, layers=4, tied=False, hidden=3):
    return dataclasses.replace(
        SCOUT,
        num_layers=layers,
        embed_dim=width,
        vocab_size=64,
        mlp_dim=hidden * width,
        tie_embeddings=tied,
        pattern=(Layer("chunked", "moe"), Layer("causal", "dense")),
        attention=dataclasses.replace(
            SCOUT.attention, num_heads=width // 8, num_kv_heads=width // 32, head_dim=16
        ),
        moe=dataclasses.replace(
            SCOUT.moe, num_experts=4, mlp_dim=hidden * width // 2, shared_mlp_dim=width
        ),
    )


BASE = config_of(32)


def flat(tree):
    return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


def table_of(config, base):
    """The multipliers of every parameter there is."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    table = metap.multipliers(config, base)
    return {x: metap.of(table, x) for x in paths.names(nnx.to_pure_dict(nnx.state(model)))}


# --- Multipliers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unstacked"])
def test_every_parameter_of_every_family_has_a_rule_and_the_base_stays_as_it_is(family, scan):
    config = presets.get(f"tiny-{family}").make()
    model = build(config, scan=scan)
    table = metap.multipliers(config, config)
    params = flat(nnx.to_pure_dict(nnx.state(model)))
    assert {metap.of(table, name) for name in params} == {metap.Multiplier()}
    for name, x in flat(nnx.to_pure_dict(nnx.state(metap.init(model, config)))).items():
        np.testing.assert_array_equal(x, params[name])
    used = [pattern for pattern in table if any(paths.fits(name, pattern) for name in params)]
    assert set(table) - set(used) <= {x for x in table if x.startswith(("layers", "tail"))}


def test_published_sizes_have_rules():
    config, base = presets.llama4_maverick(), presets.llama4_maverick()
    base = dataclasses.replace(base, embed_dim=512, num_layers=8)
    assert table_of(config, base)["layers.0.attention.v"].rate == pytest.approx(0.1)


def test_four_times_the_width_and_twice_the_depth():
    """By hand, from the table in the module's docstring; hidden widths grow eightfold."""
    base, config = config_of(32), config_of(128, layers=8, hidden=6)
    inner = {"attention.q": 4, "attention.k": 4, "attention.v": 4}
    expected = {f"{i}.{x}": (1, 1 / 4, 1 / (out * 2)) for i in (0, 1) for x, out in inner.items()}
    for i in (0, 1):
        expected[f"{i}.attention.o"] = (1 / 2, 1 / (4 * 2), 1 / 4)
        for norm in ("attention_norm.scale", "ffn_norm.scale"):
            expected[f"{i}.{norm}"] = (1, 1, 1 / (4 * 2))
    for place, hidden in (("0.ffn", 8), ("0.ffn.shared", 4), ("1.ffn", 8)):
        for name in ("gate", "up"):
            expected[f"{place}.{name}"] = (1, 1 / 4, 1 / (hidden * 2))
        expected[f"{place}.down"] = (1 / 2, 1 / (hidden * 2), 1 / 4)
    expected["0.ffn.router"] = (1 / 2, 1 / 4, 1 / 2)
    expected = {f"layers.{name}": x for name, x in expected.items()}
    expected |= {"embed": (1, 1, 1 / 4), "head": (1 / 2, 1 / 4, 1), "norm.scale": (1, 1, 1 / 4)}
    found = table_of(config, base)
    assert found.keys() == expected.keys()
    for name, (init, rate, eps) in expected.items():
        decay = 1.0 if name.endswith("scale") else 1 / rate
        assert found[name] == pytest.approx((init, rate, decay, eps)), name


def test_a_tied_head_has_its_factor_in_the_last_norm():
    found = table_of(config_of(128, tied=True), config_of(32, tied=True))
    assert found["embed"] == pytest.approx((2, 1, 1, 1 / 4))
    assert found["norm.scale"] == pytest.approx((1 / 4, 1 / 4, 1, 1))
    assert "head" not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_embeddings": True}, "tie_embeddings True differs from the base model's False"),
        ({"attention": dataclasses.replace(BASE.attention, head_dim=32)}, "head_dim 32 differs"),
        ({"moe": dataclasses.replace(BASE.moe, num_experts=8)}, "num_experts 8 differs"),
        ({"moe": dataclasses.replace(BASE.moe, shared_mlp_dim=0)}, "shared expert False differs"),
        ({"pattern": BASE.pattern[:1]}, "pattern .* differs"),
    ],
)
def test_what_does_not_carry_over_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        metap.multipliers(dataclasses.replace(BASE, **change), BASE)


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match=r"parameter 'layers.0.attention.q.a': no rule"):
        metap.of(metap.multipliers(BASE, BASE), "layers.0.attention.q.a")


def test_initial_parameters_are_rescaled_in_place_on_a_mesh():
    config = config_of(64)
    plain = build(config)
    expected = {
        name: np.asarray(x) * metap.of(metap.multipliers(config, BASE), name).init
        for name, x in flat(nnx.to_pure_dict(nnx.state(plain))).items()
    }
    with sharding.use(sharding.make_mesh(fsdp=2, tensor=2)):
        place = sharding.shardings(nnx.split(plain)[1])
        found = sharding.create(lambda: metap.init(build(config), BASE))
    for (name, x), at in zip(
        flat(nnx.to_pure_dict(nnx.state(found))).items(), jax.tree.leaves(place), strict=True
    ):
        np.testing.assert_allclose(x, expected[name], rtol=1e-6, err_msg=name)
        assert x.sharding.is_equivalent_to(at, x.ndim)


# --- Factors folded into weights -----------------------------------------------------------------
def trajectory(factor, *, init, rate, decay, eps, steps=12):
    """Losses of y = x + factor · V tanh(Wx), trained with AdamW; V has the multipliers given."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((16, 6)), jnp.float32) for _ in range(2))
    w, v = (jnp.asarray(rng.standard_normal((6, 6)), jnp.float32) for _ in range(2))

    def loss(params):
        out = x + factor * jnp.tanh(x @ params["w"]) @ params["v"]
        # Small, so that ε counts.
        return 1e-7 * jnp.mean(jnp.square(out - y))

    table = {"w": metap.Multiplier(), "v": metap.Multiplier(init, rate, decay, eps)}
    rule = metap.optimizer(
        lambda _: 0.05, table, adam=metap.Adam(weight_decay=0.5, eps=1e-8), clip_norm=1e9
    )
    params = {"w": w, "v": v * init}

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = rule.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value * 1e7

    return np.asarray(jax.lax.scan(step, (params, rule.init(params)), length=steps)[1])


def test_a_factor_of_activations_is_the_same_in_the_weight_before_it():
    """Initial values and learning rate times a, decay and ε divided by a: what is derived there."""
    a = 0.25
    outside = trajectory(a, init=1.0, rate=1.0, decay=1.0, eps=1.0)
    inside = trajectory(1.0, init=a, rate=a, decay=1 / a, eps=1 / a)
    np.testing.assert_allclose(inside, outside, rtol=1e-4)
    assert abs(outside[-1] / outside[0] - 1) > 0.05
    for wrong in ({"decay": 1.0}, {"eps": 1.0}, {"rate": 1.0}):
        other = trajectory(1.0, **{"init": a, "rate": a, "decay": 1 / a, "eps": 1 / a, **wrong})
        assert abs(other[-1] / outside[-1] - 1) > 1e-3, wrong


# --- The optimizer -------------------------------------------------------------------------------
def test_without_multipliers_it_is_adamw():
    params = nnx.to_pure_dict(nnx.state(build(BASE)))
    gradients = jax.tree.map(jnp.sin, params)
    rules = (
        metap.optimizer(lambda _: 0.01, {}, moments="bfloat16"),
        optimizers.adamw(lambda _: 0.01, moments="bfloat16"),
    )
    one, other = (jax.jit(r.update)(gradients, r.init(params), params)[0] for r in rules)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9)


def test_each_parameter_has_its_own_learning_rate_decay_and_eps():
    """The first update of AdamW by hand: rate · lr · (g / (|g| + ε) + λ · w)."""
    config = config_of(64, layers=8)
    params = nnx.to_pure_dict(nnx.state(build(config)))
    gradients = jax.tree.map(lambda x: 1e-7 * jnp.sin(x), params)
    table = metap.multipliers(config, BASE)
    adam = metap.Adam(rate=0.5, eps=1e-7, weight_decay=0.3)
    rule = metap.optimizer(lambda _: 0.02, table, adam=adam, clip_norm=1e9)
    updates, _ = jax.jit(rule.update)(gradients, rule.init(params), params)
    updates, gradients = flat(updates), flat(gradients)
    for name, w in flat(params).items():
        m, g = metap.of(table, name), np.float64(gradients[name])
        shrink = 0 if name.endswith("scale") else 0.3 * m.decay * np.float64(w)
        expected = -m.rate * 0.01 * (g / (abs(g) + m.eps * 1e-7) + shrink)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-8, err_msg=name)


# --- Batch and tokens ----------------------------------------------------------------------------
def test_the_square_root_rule():
    adam, base = metap.Adam(), metap.Run(1000, 10**6)
    four = metap.transfer(adam, metap.Run(4000, 10**6), base)
    assert four == pytest.approx(metap.Adam(2.0, 0.6, 0.8, 0.5e-8, 0.2))
    longer = metap.transfer(adam, metap.Run(1000, 4 * 10**6), base)
    assert longer == pytest.approx(metap.Adam(0.5, 0.975, 0.9875, 1e-8, 0.05))
    both = metap.transfer(adam, metap.Run(4000, 4 * 10**6), base)
    assert both == pytest.approx(adam._replace(eps=0.5e-8))
    for run in (metap.Run(4000, 10**6), metap.Run(500, 3 * 10**6)):
        new = metap.transfer(adam, run, base)
        steps = run.tokens / run.batch
        assert steps * new.rate * new.weight_decay == pytest.approx(1000 * 0.1)


def test_too_few_steps_and_no_tokens_are_refused():
    base = metap.Run(1000, 10**6)
    with pytest.raises(ValueError, match=r"1/16 of the steps of .*; at most 1/10 of them"):
        metap.transfer(metap.Adam(), metap.Run(16_000, 10**6), base)
    with pytest.raises(ValueError, match="tokens 0 must be positive"):
        metap.transfer(metap.Adam(), metap.Run(1, 0), base)


# --- Coordinate check ----------------------------------------------------------------------------
def test_coordinates_are_the_models_own_activations():
    model = build(config_of(32))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    made = metap.coordinates(model, jnp.asarray(tokens))
    assert list(made) == ["embed", *(f"layer {i}" for i in range(4)), "logits"]
    hidden, _ = model.hidden(jnp.asarray(tokens))
    np.testing.assert_allclose(made["embed"], model.embed[...][tokens], rtol=1e-6)
    np.testing.assert_allclose(made["layer 3"], hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made["logits"], model(jnp.asarray(tokens)), rtol=1e-4, atol=1e-4)


def test_growth_is_the_power_of_the_width():
    check = {w: {"a": 3 * w**0.5, "b": 2.0} for w in (16, 32, 64)}
    assert metap.growth(check) == pytest.approx({"a": 0.5, "b": 0.0})


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activations_change_as_much_at_every_width(tied):
    """And in the standard parameterization the more, the wider."""
    small, large = (
        dataclasses.replace(config_of(w, layers=2, tied=tied), pattern=BASE.pattern[:1])
        for w in (32, 256)
    )
    rng = np.random.default_rng(0)
    successor = rng.permutation(64)
    rows = [rng.integers(0, 64, 8)]
    for _ in range(31):
        rows.append(successor[rows[-1]])
    batches = [{"tokens": np.stack(rows, 1).astype(np.int32)}] * 3

    def training(config, *, carried):
        model = build(config)
        table = metap.multipliers(config, small) if carried else {}
        rule = metap.optimizer(schedules.constant(1e-2, steps=3, warmup=0), table)
        model = metap.init(model, small) if carried else model
        return trainer.Training(model, objectives.next_token(), rule)

    carried = metap.coordinate_check(
        (training(config, carried=True) for config in (small, large)), batches
    )
    standard = metap.coordinate_check([training(large, carried=False)], batches)
    assert list(carried) == [32, 256]
    for name in ("layer 0", "layer 1"):
        assert standard[256][name] > 2 * carried[32][name]
        assert carried[256][name] == pytest.approx(carried[32][name], rel=0.4)
    assert carried[256]["logits"] < 1.1 * carried[32]["logits"]


# --- The recipe ----------------------------------------------------------------------------------
def line(name, width, seed, rate, loss):
    values = {"parameterization": name, "width": width, "seed": seed, "learning_rate": rate}
    return values | {"loss": loss}


def test_the_recipe_finds_how_far_the_best_rate_moved():
    """Parabolas in log2 of the rate: the best moves by two octaves, or stays; means over seeds."""
    rates, seeds = tuple(2.0**-k for k in (8, 7, 6, 5, 4)), (0, 1)
    settings = recipe.Settings(widths=(64, 128), rates=rates, seeds=seeds)
    best = {("standard", 64): -5.3, ("standard", 128): -7.3, ("metap", 128): -5.4}
    lines = [
        line(*key, seed, rate, 3 + (math.log2(rate) - at) ** 2 + (2 * seed - 1) * 0.4)
        for key, at in best.items()
        for seed in seeds
        for rate in rates
    ]
    standard, carried = (recipe.summary(settings, lines, x) for x in ("standard", "metap"))
    assert standard["drift"] == pytest.approx(-2.0)
    assert carried["drift"] == pytest.approx(-0.1)
    assert standard["rate"] == {64: 2**-5, 128: 2**-7}
    assert standard["regret"] == pytest.approx(2.3**2 - 0.3**2)
    assert carried["regret"] == 0
    assert carried["interpolated_rate"][64] == pytest.approx(2**-5.3)


def test_a_run_that_diverged_is_not_the_best():
    settings = recipe.Settings(widths=(64, 128), rates=(0.1, 0.2, 0.4))
    lines = [
        line("standard", width, 0, rate, math.nan if rate > 0.1 else 3.0)
        for width in settings.widths
        for rate in settings.rates
    ]
    assert recipe.summary(settings, lines, "standard")["rate"] == {64: 0.1, 128: 0.1}


def test_the_recipe_makes_the_runs_that_are_missing(tmp_path):
    """The base has one parameterization only; what is there is kept, if its settings are these."""
    settings = recipe.Settings(out=tmp_path, widths=(64, 128), rates=(0.1, 0.2, 0.4), resume=True)
    assert recipe._begin(settings) == []
    done = [line("standard", 64, 0, 0.2, 1.0), line("metap", 128, 0, 0.1, 1.0)]
    assert recipe._todo(settings, done) == {
        ("standard", 64): [(0, 0.1), (0, 0.4)],
        ("standard", 128): [(0, 0.1), (0, 0.2), (0, 0.4)],
        ("metap", 128): [(0, 0.2), (0, 0.4)],
    }
    with pytest.raises(ValueError, match="steps 60 there, 70 asked for"):
        recipe._begin(dataclasses.replace(settings, steps=70))
    with pytest.raises(ValueError, match="add --resume or another --out"):
        recipe._begin(dataclasses.replace(settings, resume=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (64, 100)}, "width 100 must be a multiple of 64"),
        ({"widths": (128, 64)}, r"widths \(128, 64\) must be at least two, and grow"),
        ({"rates": (0.1, 0.2)}, "must be at least three, and grow"),
        ({"steps": 5}, "steps 10"),
    ],
)
def test_settings_that_make_no_sweep_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        recipe.Settings(**change)


@pytest.mark.slow
def test_the_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "VOCABULARY", 300)
    settings = recipe.Settings(
        out=tmp_path / "out", widths=(64, 128), rates=(1e-3, 1e-2, 1e-1), steps=10, batch=2
    )
    report = recipe.run(settings)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text(), object_hook=keyed)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 9
    assert report["best"]["metap"]["loss"][64] == report["best"]["standard"]["loss"][64]
    for name in ("curves.png", "coordinates.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def keyed(values):
    """JSON makes strings of widths."""
    return {int(k) if k.isdigit() else k: v for k, v in values.items()}
