"""Each optimizer does what Optax or a formula says, to the parameters it should, on any mesh."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build
from flax import nnx

from l4jax import paths, presets, sharding
from l4jax.config import Layer
from l4jax.models.llama4 import Llama
from l4jax.training import optimizers, trainer

SCOUT = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(
    SCOUT,
    num_layers=4,
    embed_dim=32,
    vocab_size=48,
    mlp_dim=40,
    pattern=(Layer("chunked", "moe"), Layer("causal", "dense")),
    moe=dataclasses.replace(SCOUT.moe, num_experts=4, mlp_dim=24, shared_mlp_dim=16),
)
"""Two periods of two layers: every kind of parameter, stacked."""
SMALL = dataclasses.replace(CONFIG, num_layers=2, pattern=CONFIG.pattern[:1])
NAMES = ("adamw", "muon", "adafactor", "lion")


def flat(tree):
    return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


@pytest.fixture(scope="module")
def params():
    return nnx.to_pure_dict(nnx.state(build(CONFIG)))


@pytest.fixture(scope="module")
def gradients(params):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)


def run(optimizer, params, gradients, steps=3):
    """Parameters and state after some steps with the same gradients, growing."""

    @jax.jit
    def all_steps(params):
        state = optimizer.init(params)
        for step in range(steps):
            scaled = jax.tree.map(lambda g, s=step: g * (1 + s), gradients)
            updates, state = optimizer.update(scaled, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return all_steps(params)


def assert_close(found, expected, rtol=1e-5, atol=1e-7):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def scale_mask(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


# --- Against Optax -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adamw", lambda lr: optax.adamw(lr, b2=0.95, weight_decay=0.2, mask=scale_mask)),
        ("lion", lambda lr: optax.lion(lr, weight_decay=0.2, mask=scale_mask)),
    ],
)
def test_it_is_optax_with_clipping(params, gradients, name, theirs):
    ours = optimizers.make(name, lambda _: 0.03, weight_decay=0.2, clip_norm=2.0)
    expected = optax.chain(optax.clip_by_global_norm(2.0), theirs(0.03))
    assert_close(run(ours, params, gradients)[0], run(expected, params, gradients)[0])


def test_adafactor_is_optax_with_decay_times_the_learning_rate(params, gradients):
    ours = optimizers.adafactor(lambda _: 0.03, weight_decay=0.2, clip_norm=1e9, min_size=16)
    theirs = optax.adafactor(
        0.03,
        min_dim_size_to_factor=16,
        multiply_by_parameter_scale=False,
        weight_decay_rate=0.03 * 0.2,
        weight_decay_mask=scale_mask,
    )
    found, state = run(ours, params, gradients)
    assert_close(found, run(theirs, params, gradients)[0])
    rows = flat(optax.tree.get(state, "v_row"))["layers.0.ffn.gate"]
    assert rows.shape == (2, 4, 24), "each layer and expert has rows of its own"


# --- Which decay ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exempt", [optimizers.NORMS, optimizers.NORMS + optimizers.EMBEDDINGS])
def test_weights_decay_and_what_is_exempt_does_not(params, name, exempt):
    """Without a gradient, decay is all that an optimizer does."""
    optimizer = optimizers.make(name, lambda _: 0.5, weight_decay=0.2, exempt=exempt)
    nothing = jax.tree.map(jnp.zeros_like, params)
    after = flat(run(optimizer, params, nothing, steps=1)[0])
    spared = {x for x in after if x.endswith("scale")}
    assert len(spared) == 1 + 2 * 2
    if exempt != optimizers.NORMS:
        spared |= {"embed", "head"}
    for key, before in flat(params).items():
        expected = before if key in spared else 0.9 * before
        np.testing.assert_allclose(after[key], expected, rtol=1e-5, atol=1e-7, err_msg=key)


def test_vectors_do_not_decay():
    params = {"a": jnp.ones(3), "b": jnp.ones((3, 2))}
    assert optimizers.decaying(())(params) == {"a": False, "b": True}


@pytest.mark.parametrize(("length", "kept"), [(100.0, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_by_their_global_norm(length, kept):
    """The first moment after one step is a tenth of the clipped gradient."""
    params = {"a": jnp.ones(3), "b": {"scale": jnp.ones(1)}}
    gradient = jax.tree.map(lambda x: x * length / 2, params)
    optimizer = optimizers.adamw(lambda _: 0.1)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    assert float(optax.tree.norm(optax.tree.get(state, "mu"))) == pytest.approx(0.1 * kept)


# --- Muon ----------------------------------------------------------------------------------------
def matrices(name, x, *, per_head):
    """The matrices [count rows columns] in a weight, by hand."""
    kind = name.rpartition(".")[2]
    if kind in ("q", "k", "v"):  # d n h
        x = x.reshape(-1, *x.shape[-3:])
        if per_head:
            return np.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])
        return x.reshape(len(x), x.shape[1], -1)
    if kind == "o":  # n h d
        return x.reshape(-1, *((x.shape[-2:]) if per_head else (x.shape[-3] * x.shape[-2], 32)))
    return x.reshape(-1, *x.shape[-2:])


def newton_schulz(x):
    """Jordan et al. 2024: five steps of X ← aX + (bA + cA²)X with A = XXᵀ, from X / ‖X‖."""
    x = np.asarray(x, np.float64) / np.linalg.norm(x)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


@pytest.mark.parametrize("per_head", [False, True], ids=["projections", "heads"])
def test_muon_orthogonalizes_every_matrix_by_itself(params, gradients, per_head):
    """Layers and experts of very different size: joined, the large would drown the small."""
    optimizer = optimizers.muon(lambda _: 1.0, weight_decay=0.0, clip_norm=1e9, per_head=per_head)
    rng = np.random.default_rng(0)

    def stretched(path, g):
        if g.ndim < 3 or path[-1].key == "scale":
            return g
        matrix = 3 if path[-1].key in "qkvo" else 2
        shape = (*g.shape[:-matrix], *[1] * matrix)
        return g * jnp.asarray(10.0 ** rng.integers(-2, 3, shape), g.dtype)

    uneven = jax.tree_util.tree_map_with_path(stretched, gradients)
    after, _ = run(optimizer, params, uneven, steps=1)
    before, sizes, well_conditioned = flat(params), flat(uneven), 0
    inner = [x for x in before if x.rpartition(".")[2] in {*"qkvo", "gate", "up", "down"}]
    assert len(inner) == 2 * 4 + 6 + 3
    for name in inner:
        moved, gradient = (
            matrices(name, np.asarray(x), per_head=per_head)
            for x in (before[name] - flat(after)[name], sizes[name])
        )
        assert len(moved) == len(gradient)
        for one, g in zip(moved, gradient, strict=True):
            one = one / (0.2 * np.sqrt(max(one.shape)))
            np.testing.assert_allclose(one, newton_schulz(g), atol=2e-3, err_msg=name)
            if max(one.shape) >= 2 * min(one.shape):
                values = np.linalg.svd(one, compute_uv=False)
                assert values.min() > 0.4, name
                assert values.max() < 1.3, name
                well_conditioned += 1
    assert well_conditioned > 5


def test_muon_leaves_router_embedding_head_and_norms_to_adamw(params, gradients):
    ours, _ = run(optimizers.muon(lambda _: 0.01), params, gradients)
    theirs, _ = run(optimizers.adamw(lambda _: 0.01), params, gradients)
    ours, theirs = flat(ours), flat(theirs)
    same = {name for name in ours if np.allclose(ours[name], theirs[name], rtol=1e-6)}
    rest = {x for x in ours if x in ("embed", "head") or x.endswith(("router", "scale"))}
    assert same == rest
    assert len(rest) == 2 + 1 + 5


# --- Rates ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_rates_multiply_updates_exactly_and_the_first_pattern_counts(params, gradients, name):
    def schedule(_):
        return 0.01

    plain, _ = run(optimizers.make(name, schedule), params, gradients, steps=1)
    rates = {"*.attention.q": 0.5, "*.attention.*": 4.0, "embed": 0.25}
    rated, _ = run(optimizers.make(name, schedule, rates=rates), params, gradients, steps=1)
    before, plain, rated = flat(params), flat(plain), flat(rated)
    for key in before:
        rate = 0.5 if key.endswith("n.q") else 4.0 if ".attention." in key else 1.0
        rate = 0.25 if key == "embed" else rate
        expected = rate * (plain[key] - before[key])
        np.testing.assert_allclose(rated[key] - before[key], expected, atol=3e-7, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_groups_do_not_move_have_no_state_and_do_not_count_in_clipping(
    params, gradients, name
):
    rates = {"*.ffn.*": 0.0, "embed": 0.0}
    huge = jax.tree_util.tree_map_with_path(
        lambda path, g: g * (1e6 if paths.name(path) == "embed" else 1.0), gradients
    )
    optimizer = optimizers.make(name, lambda _: 0.01, rates=rates)
    after, state = run(optimizer, params, huge)
    before, after = flat(params), flat(after)
    frozen = {x for x in before if ".ffn." in x or x == "embed"}
    for key in before:
        assert np.array_equal(before[key], after[key]) == (key in frozen), key
    # Of what remains, alone in its tree, the same.
    part, alone = (
        jax.tree_util.tree_map_with_path(
            lambda path, x: None if paths.name(path) in frozen else x, tree
        )
        for tree in (params, huge)
    )
    expected, small = run(optimizers.make(name, lambda _: 0.01), part, alone)
    for key, value in flat(expected).items():
        np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state, small)]
    assert sizes[0] <= sizes[1]


def test_a_pattern_that_fits_nothing_and_a_negative_rate_are_refused(params):
    with pytest.raises(ValueError, match="pattern 'layer.*' fits no parameter"):
        optimizers.make("adamw", lambda _: 0.1, rates={"layer.*": 0.5}).init(params)
    with pytest.raises(ValueError, match="rate -1.0 of 'embed' must not be negative"):
        optimizers.make("adamw", lambda _: 0.1, rates={"embed": -1.0})


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'adam' must be one of adamw, muon, adafactor, lion"):
        optimizers.make("adam", lambda _: 0.1)


# --- Average -------------------------------------------------------------------------------------
def test_the_average_is_that_of_a_plain_loop(params, gradients):
    optimizer = optimizers.make("adamw", lambda _: 0.05, average=0.8)
    plain = optimizers.make("adamw", lambda _: 0.05)
    _, state = run(optimizer, params, gradients, steps=3)
    expected = flat(params)
    for steps in (1, 2, 3):
        now = flat(run(plain, params, gradients, steps=steps)[0])
        expected = {name: 0.8 * x + 0.2 * now[name] for name, x in expected.items()}
    found = flat(optimizers.average_of(state))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_average_of_bfloat16_parameters_moves_by_less_than_they_can():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    optimizer = optimizers.averaged(optax.sgd(0.25), 0.999)
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.ones((2, 2), jnp.bfloat16)}, state, params)
    average = optimizers.average_of(state)["w"]
    assert average.dtype == jnp.float32
    np.testing.assert_allclose(average, 1 - 0.001 * 0.25, rtol=1e-7)


def test_no_average_and_no_decay_of_one_are_refused():
    with pytest.raises(ValueError, match="keeps no average"):
        optimizers.average_of(optax.sgd(0.1).init({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match="average 1.0 must lie between 0 and 1"):
        optimizers.make("adamw", lambda _: 0.1, average=1.0)


# --- Types ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_moments_may_be_kept_in_fewer_bits(params, gradients, name):
    """They are bfloat16 between steps, the update is float32's within their rounding."""
    moved = {}
    for kind in ("float32", "bfloat16"):
        optimizer = optimizers.make(name, lambda _: 0.01, moments=kind, clip_norm=1e9)
        after, state = run(optimizer, params, gradients, steps=2)
        kinds = {str(x.dtype) for x in jax.tree.leaves(state) if x.size > 16}
        assert kinds == {kind}
        moved[kind] = jax.tree.map(jnp.subtract, after, params)
    # Muon's constants must not be rounded, or matrices come out larger by a percent or two.
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]) for m in moved.values())
    if name != "lion":  # whose update is a sign
        assert not np.array_equal(a, b)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)


def test_only_moments_are_stored_in_fewer_bits(params):
    state = optimizers.muon(lambda _: 0.1, moments="bfloat16").init(params)
    constants = optax.tree.get(state, "ns_coeffs")
    np.testing.assert_array_equal(constants, np.float32([3.4445, -4.7750, 2.0315]))


# --- In a training -------------------------------------------------------------------------------
def pull(model, batch):
    """An objective that compiles at once and moves every parameter."""
    params = jax.tree.leaves(nnx.state(model))
    loss = sum(jnp.mean(jnp.square(x - batch["target"])) for x in params)
    return loss, {"loss": loss, "count": jnp.int32(1)}


MIXED = {
    "adamw": {"average": 0.9},
    "muon": {"moments": "bfloat16", "average": 0.9, "rates": {"*.attention.k": 0.0}},
    "adafactor": {"rates": {"embed": 0.5, "head": 0.0}},
    "lion": {"rates": {"*scale": 0.0}, "average": 0.5},
}


@pytest.mark.parametrize(
    "name",
    ["muon", "adafactor", *(pytest.param(x, marks=pytest.mark.slow) for x in ("adamw", "lion"))],
)
def test_states_lie_beside_their_parameters_on_a_mesh(name):
    """What is planned without arrays is where the arrays are, before and after steps."""
    optimizer = optimizers.make(name, lambda _: 0.01, **MIXED[name])
    with sharding.use(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        model = sharding.create(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))
        abstract = nnx.eval_shape(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))
        planned = trainer.Update(abstract, pull, optimizer).abstract()
        training = trainer.Training(model, pull, optimizer)
        before = [x.sharding for x in jax.tree.leaves(training.state)]
        batches = ({"target": np.float32(i)} for i in itertools.count())
        losses = [m["loss"] for m in training.run(batches, 3)]
    assert np.isfinite(losses).all()
    state = training.state
    assert jax.tree.structure(planned) == jax.tree.structure(state)
    leaves = zip(jax.tree.leaves(planned), before, jax.tree.leaves(state), strict=True)
    for plan, first, last in leaves:
        assert plan.shape == last.shape
        for place in (first, last.sharding):
            assert plan.sharding.is_equivalent_to(place, last.ndim)
    parameters, beside = flat(state.params), set()
    for path, x in flat(state.optimizer).items():
        for key, param in parameters.items():
            if path.endswith(f".{key}") and x.shape == param.shape:
                assert x.sharding.is_equivalent_to(param.sharding, x.ndim), path
                beside.add(key)
    frozen = paths.chosen([x for x, rate in MIXED[name].get("rates", {}).items() if not rate])
    average = "average" in MIXED[name]
    assert beside == {x for x in parameters if average or not frozen(x)}


@pytest.mark.parametrize("name", NAMES)
def test_only_some_parameters_may_be_trained(name):
    """The trainer gives the optimizer None for the others."""
    chosen = paths.chosen(["*.attention.*", "*.router", "norm.scale"])
    optimizer = optimizers.make(name, lambda _: 0.01, average=0.9, rates={"*.attention.v": 0.5})
    update = trainer.Update(build(SMALL), pull, optimizer, trainable=chosen)
    before = nnx.to_pure_dict(nnx.state(build(SMALL)))
    state, _ = jax.jit(update)(update.first(before), {"target": np.float32(9)})
    after = flat(state.params)
    for key, value in flat(before).items():
        assert np.array_equal(value, after[key]) == (not chosen(key)), key
    assert set(flat(optimizers.average_of(state.optimizer))) == {x for x in after if chosen(x)}
