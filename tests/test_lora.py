"""Adapters: nothing at first, gradients that follow from the dense ones, the same on every mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build, forward
from flax import nnx
from jax.extend.core import jaxprs_in_params

from l4jax import checkpoints, lora, paths, presets, quantization, sharding, weights
from l4jax.config import Execution
from l4jax.models.llama4 import Llama

ROWS, LENGTH = 8, 37
BOUND = 4e-6
"""Of a difference, relative to the largest entry: see test_meshes."""
MESHES = (
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"fsdp": 4, "expert": 2},
)
FAMILIES = ("llama4-scout", "llama3.2-1b")
SCHEMES = ("int8", "int4", "fp8")


def label(value):
    return "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@functools.cache
def config_of(name):
    """Two stacked layers of one kind; Scout's are chunked and routed, Llama 3.2's head is tied."""
    config = presets.get(f"tiny-{name}").make()
    return dataclasses.replace(config, num_layers=2, pattern=config.pattern[:1])


@functools.cache
def plain(name):
    return build(config_of(name))


@functools.cache
def adapted(name, rank=3, scheme=None):
    """Every matrix with an adapter that really changes it."""
    model = plain(name)
    if scheme is not None:
        model = quantization.quantize(model, weights.EVERY, scheme, group=8)
    return started(lora.apply(model, weights.EVERY, rank=rank, alpha=rank, key=jax.random.key(0)))


def started(model, size=0.3):
    """The adapters of a model, no part of them 0."""
    rng = np.random.default_rng(5)
    new = {
        name: x + np.float32(size) * rng.standard_normal(x.shape, np.float32) / x.shape[-1]
        for name, x in lora.state(model).items()
    }
    return lora.restore(model, new)


def tokens_of(config, rows=ROWS, length=LENGTH):
    return jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (rows, length)))


def loss_of(model, tokens):
    """Mean cross-entropy of the next token, from the logits."""
    logits = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()


def parts(model, chosen=lora.trainable):
    """Structure, names, and the arrays: those chosen, by name, and all others."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    names = paths.names(nnx.to_pure_dict(state))
    own = {n: x for n, x in zip(names, leaves, strict=True) if chosen(n)}
    rest = {n: x for n, x in zip(names, leaves, strict=True) if not chosen(n)}

    def join(own, rest):
        return nnx.merge(graph, jax.tree.unflatten(tree, [(own | rest)[n] for n in names]))

    return own, rest, join


def gradients_of(model, tokens, chosen=lora.trainable):
    own, rest, join = parts(model, chosen)

    @jax.jit
    def run(own, rest, tokens):
        return jax.value_and_grad(lambda own: loss_of(join(own, rest), tokens))(own)

    return jax.device_get(run(own, rest, tokens))


def step(model, tokens):
    """The loss, its gradients, and the loss after a step along them."""
    own, rest, join = parts(model)

    @jax.jit
    def run(own, rest, tokens):
        def loss(own):
            return loss_of(join(own, rest), tokens)

        before, gradients = jax.value_and_grad(loss)(own)
        own = jax.tree.map(lambda x, g: x - 0.1 * g, own, gradients)
        return before, gradients, loss(own)

    return jax.device_get(run(own, rest, tokens))


def placed(model, **execution):
    graph, state = nnx.split(model)
    state = jax.device_put(state, sharding.shardings(state))
    model = nnx.merge(graph, state)
    model.execution = Execution(**execution)
    return model


def unrolled(model):
    """The same model, none of whose layers is stacked."""
    config = model.config
    there = dict(nnx.to_flat_state(nnx.state(model)))
    empty = nnx.eval_shape(lambda: Llama(config, execution=Execution(scan=False), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(empty)
    flat = []
    for path, param in nnx.to_flat_state(state):
        if path[0] == "tail":
            value = there["layers", 0, *path[2:]].get_raw_value()
            value = jax.tree.map(lambda x, i=path[1]: x[i], value)
        else:
            value = there[path].get_raw_value()
        flat.append((path, param.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def close(found, wanted, bound=BOUND):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert np.isfinite(x).all(), name
        assert np.abs(found[name] - x).max() <= bound * max(np.abs(x).max(), 1e-6), name


# --- What an adapted model computes --------------------------------------------------------------
@pytest.mark.parametrize(("name", "rank"), [("llama4-scout", 5), ("llama3.2-1b", 1)])
def test_new_adapters_change_nothing_and_trained_ones_merge(name, rank):
    model = plain(name)
    tokens = tokens_of(model.config, 2)
    before = forward(model, tokens)
    new = lora.apply(model, weights.EVERY, rank=rank, alpha=2 * rank, key=jax.random.key(1))
    np.testing.assert_array_equal(forward(new, tokens), before)
    trained = adapted(name, rank)
    after = forward(trained, tokens)
    assert np.abs(after - before).max() > before.std() / 4
    merged = lora.merge(trained)
    assert not weights.standing(merged, lora.LowRank)
    np.testing.assert_allclose(forward(merged, tokens), after, atol=2e-5 * after.std())
    off = lora.base(trained)
    np.testing.assert_array_equal(forward(off, tokens), before)
    assert off.layers[0].attention.q[...] is model.layers[0].attention.q[...]


def test_an_adapter_is_the_sum_that_the_paper_writes():
    model = adapted("llama4-scout")
    merged = lora.merge(model)
    for path, letters in (
        ("attention.q", "ldxyr,lxnhr->ldnh"),
        ("attention.o", "lnhxr,lxydr->lnhd"),
        ("ffn.gate", "ledxr,lexfr->ledf"),
        ("ffn.shared.down", "lfxr,lxdr->lfd"),
    ):
        first, last = path.rsplit(".", 1)
        value = functools.reduce(getattr, first.split("."), model.layers[0])
        value = getattr(value, last)[...]
        wanted = np.asarray(value.base) + value.scale * np.einsum(letters, value.a, value.b)
        module = functools.reduce(getattr, first.split("."), merged.layers[0])
        np.testing.assert_allclose(getattr(module, last)[...], wanted, rtol=0, atol=1e-6)


def test_a_start_is_normal_and_depends_on_key_and_name_only():
    model = plain("llama4-scout")
    make = functools.partial(lora.apply, model, rank=5, alpha=1)
    few = lora.state(make(("*.0.ffn.gate", "*.q"), key=jax.random.key(3)))
    every = lora.state(make(weights.EVERY, key=jax.random.key(3)))
    assert set(few) < set(every)
    assert all((few[name] == every[name]).all() for name in few)
    assert (few["layers.0.attention.q.a"] != every["layers.0.attention.k.a"]).any()
    other = lora.state(make(("*.q",), key=jax.random.key(4)))
    assert (other["layers.0.attention.q.a"] != few["layers.0.attention.q.a"]).all()
    a = few["layers.0.ffn.gate.a"]
    assert float(a.std()) == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert all((x == 0).all() for name, x in every.items() if name.endswith(".b"))
    assert lora.count(make(("*.q",), key=jax.random.key(0))) == 2 * 5 * (64 + 64)


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    model = plain("llama3.2-1b")
    make = functools.partial(lora.apply, model, ("*.q",), rank=4, alpha=6, key=jax.random.key(0))
    scales = [make(rank_stabilized=x).layers[0].attention.q[...].scale for x in (False, True)]
    assert scales == [1.5, 3.0]


# --- Gradients -----------------------------------------------------------------------------------
@functools.cache
def alone(name, scheme=None):
    model = adapted(name, scheme=scheme)
    return step(model, tokens_of(model.config))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_dense_weights_seen_through_the_factors(name):
    model = adapted(name)
    tokens = tokens_of(model.config)
    loss, found, _ = alone(name)
    assert set(found) == set(lora.state(model))
    names = [x.name for x in weights.standing(model, lora.LowRank)]
    merged_loss, dense = gradients_of(lora.merge(model), tokens, lambda name: name in names)
    assert loss == pytest.approx(merged_loss, rel=1e-6)
    wanted = {}
    for x in weights.standing(model, lora.LowRank):
        value, d_w = x.value, dense[x.name][..., None] * np.float32(x.value.scale)
        outs = tuple(range(x.stack + x.experts + len(x.inputs), value.ndim))
        ins = tuple(range(x.stack + x.experts, outs[0]))
        wanted[f"{x.name}.a"] = (d_w * np.asarray(value.b)).sum(outs, keepdims=True)
        wanted[f"{x.name}.b"] = (d_w * np.asarray(value.a)).sum(ins, keepdims=True)
    close(found, wanted, 1e-5)


def test_experts_without_tokens_get_no_gradient():
    model = adapted("llama4-scout")
    tokens = tokens_of(model.config, 1, 3)
    load = np.asarray(jax.jit(lambda m, t: m.outputs(t).routing.load)(model, tokens))
    _, found = gradients_of(model, tokens)
    assert (load == 0).any()
    for weight in ("gate", "up", "down"):
        for part in "ab":
            x = found[f"layers.0.ffn.{weight}.{part}"]
            largest = np.abs(x).reshape(*x.shape[:2], -1).max(-1)
            np.testing.assert_array_equal(largest == 0, load == 0)


QUICK = list(zip(FAMILIES, MESHES, strict=False))
CASES = [
    pytest.param(name, axes, marks=() if (name, axes) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for axes in MESHES
]


@pytest.mark.parametrize(("name", "axes"), CASES, ids=label)
def test_a_mesh_takes_the_step_of_one_device(name, axes):
    loss, gradients, after = alone(name)
    assert after < loss
    with sharding.use(sharding.make_mesh(**axes)):
        model = placed(adapted(name), remat="full")
        found = step(model, tokens_of(model.config))
    assert found[0] == pytest.approx(loss, rel=2e-6)
    assert found[2] == pytest.approx(after, rel=2e-6)
    close(found[1], gradients, 8e-6)


@pytest.mark.parametrize(
    ("name", "axes", "scheme"),
    [
        pytest.param("llama4-scout", MESHES[2], "int4", marks=pytest.mark.slow),
        ("llama3.2-1b", MESHES[0], None),
    ],
    ids=label,
)
def test_a_few_tokens_go_to_adapters_as_to_their_weights(name, axes, scheme):
    tokens = tokens_of(config_of(name), length=2)
    loss, gradients, after = step(adapted(name, scheme=scheme), tokens)
    with sharding.use(sharding.make_mesh(**axes)):
        found = step(placed(adapted(name, scheme=scheme)), tokens)
    assert found[0] == pytest.approx(loss, rel=2e-6)
    assert found[2] == pytest.approx(after, rel=2e-6)
    close(found[1], gradients, 8e-6)


@pytest.mark.parametrize("axes", [None, pytest.param(MESHES[0], marks=pytest.mark.slow)], ids=label)
def test_unrolled_layers_take_the_step_of_stacked_ones(axes):
    loss, gradients, after = alone("llama4-scout")
    model = unrolled(adapted("llama4-scout"))
    with sharding.use(sharding.make_mesh(**axes)) if axes else contextlib.nullcontext():
        model = placed(model, scan=False)
        found = step(model, tokens_of(model.config))
    assert found[0] == pytest.approx(loss, rel=2e-6)
    assert found[2] == pytest.approx(after, rel=2e-6)
    stacked = {
        name: np.stack([found[1][name.replace("layers.0", f"tail.{i}")] for i in (0, 1)])
        for name in gradients
    }
    close(stacked, gradients, 8e-6)


@pytest.mark.parametrize(
    "scheme", ["int4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "fp8"))]
)
def test_adapters_beside_a_quantized_base(scheme):
    model = adapted("llama4-scout", scheme=scheme)
    loss, gradients, after = alone("llama4-scout", scheme)
    assert after < loss != alone("llama4-scout")[0]
    merged = lora.merge(model)
    assert merged.layers[0].ffn.gate.dtype == jnp.float32
    tokens = tokens_of(model.config)
    dense_loss, dense = gradients_of(merged, tokens, lambda name: name.endswith("attention.q"))
    assert loss == pytest.approx(dense_loss, rel=1e-6)
    value = model.layers[0].attention.q[...]
    d_w = dense["layers.0.attention.q"][..., None] * np.float32(value.scale)
    wanted = {"": (d_w * np.asarray(value.b)).sum((2, 3), keepdims=True)}
    close({"": gradients["layers.0.attention.q.a"]}, wanted, 1e-5)


@pytest.mark.parametrize("scheme", ["int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_mesh_takes_the_step_beside_a_quantized_base(scheme):
    loss, gradients, after = alone("llama4-scout", scheme)
    with sharding.use(sharding.make_mesh(**MESHES[0])):
        model = placed(adapted("llama4-scout", scheme=scheme), remat="full")
        found = step(model, tokens_of(model.config))
    assert found[0] == pytest.approx(loss, rel=2e-6)
    assert found[2] == pytest.approx(after, rel=2e-6)
    close(found[1], gradients, 8e-6)


def test_a_mesh_makes_adapters_where_their_weights_lie():
    with sharding.use(sharding.make_mesh(**MESHES[0])):
        base = placed(plain("llama4-scout"))
        model = lora.apply(base, weights.EVERY, rank=3, alpha=3, key=jax.random.key(0))
        spread = {name: x.sharding.spec for name, x in lora.state(model).items()}
        merged = lora.merge(model)
        for x in weights.matrices(merged, weights.EVERY):
            assert x.value.sharding.is_equivalent_to(
                dict(nnx.to_flat_state(nnx.state(base)))[
                    tuple(int(k) if k.isdigit() else k for k in x.name.split("."))
                ]
                .get_raw_value()
                .sharding,
                x.value.ndim,
            )
    one = lora.apply(plain("llama4-scout"), weights.EVERY, rank=3, alpha=3, key=jax.random.key(0))
    close(jax.device_get(lora.state(model)), jax.device_get(lora.state(one)))

    def axes(name):
        return [axis for axis in spread[name] if axis is not None]

    assert axes("layers.0.attention.q.a") == []
    assert axes("layers.0.attention.q.b") == ["tensor"]
    assert axes("layers.0.attention.o.a") == ["tensor"]
    assert axes("layers.0.ffn.gate.a") == ["expert"]
    assert axes("layers.0.ffn.gate.b") == ["expert", "tensor"]


def arrays_in(jaxpr):
    """Shapes and types of all that a program makes, in its loops too."""
    for equation in jaxpr.eqns:
        for x in equation.outvars:
            yield x.aval.shape, x.aval.dtype
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_in(inner)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_step_never_holds_a_gradient_of_the_stacked_base(scheme):
    model = adapted("llama4-scout", scheme=scheme)
    model = placed(model, remat="full")
    stacked = {x.value.shape for x in weights.standing(model, lora.LowRank)}
    tokens = tokens_of(model.config)

    def made(model, chosen):
        own, rest, join = parts(model, chosen)
        gradient = jax.grad(lambda own, rest: loss_of(join(own, rest), tokens))
        found = set(arrays_in(jax.make_jaxpr(gradient)(own, rest).jaxpr))
        return {shape for shape, dtype in found if jnp.issubdtype(dtype, jnp.floating)}

    assert not made(model, lora.trainable) & stacked
    full = placed(plain("llama4-scout"), remat="full")
    assert made(full, lambda name: True) >= stacked


def test_layers_that_only_multiply_form_no_gradient_of_their_base():
    model = adapted("llama3.2-1b")
    own, rest, join = parts(model)
    gradient = jax.grad(lambda own, rest: loss_of(join(own, rest), tokens_of(model.config)))
    d, f = model.config.embed_dim, model.config.mlp_dim
    found = [
        x.aval.shape for x in equations(jax.make_jaxpr(gradient)(own, rest).jaxpr, "dot_general")
    ]
    assert len(found) > 20
    assert not {(d, f), (f, d)} & set(found)


def equations(jaxpr, name):
    """What the operations of this name make, in loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, name)


# --- Adapters alone ------------------------------------------------------------------------------
def test_adapters_travel_without_their_base():
    model = adapted("llama4-scout")
    kept = jax.device_get(lora.state(model))
    new = lora.apply(plain("llama4-scout"), weights.EVERY, rank=3, alpha=3, key=jax.random.key(9))
    tokens = tokens_of(model.config, 2)
    again = lora.restore(new, kept)
    np.testing.assert_array_equal(forward(again, tokens), forward(model, tokens))
    del kept["layers.0.attention.q.a"]
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.q\.a has shape None"):
        lora.restore(new, kept)
    with pytest.raises(ValueError, match=r"\(2, 64, 1, 1, 3\); the model's has \(2, 64, 1, 1, 5\)"):
        lora.restore(adapted("llama4-scout", 5), lora.state(model))


def test_bfloat16_bases_with_adapters_merge_in_float32():
    model = adapted("llama4-scout")
    graph, state = nnx.split(model)
    halved = [
        (path, param.replace(dataclasses.replace(x, base=x.base.astype(jnp.bfloat16))))
        if isinstance(x := param.get_raw_value(), lora.LowRank)
        else (path, param)
        for path, param in nnx.to_flat_state(state)
    ]
    half = nnx.merge(graph, nnx.from_flat_state(halved))
    half.execution = Execution(dtype="bfloat16")
    merged = lora.merge(half)
    assert merged.layers[0].attention.q.dtype == jnp.bfloat16
    value = half.layers[0].ffn.gate[...]
    wanted = lora.merge(model).layers[0].ffn.gate[...]
    found = np.asarray(merged.layers[0].ffn.gate[...], np.float32)
    assert np.abs(found - wanted).max() < 2**-7 * np.abs(wanted).max()
    assert value.dtype == jnp.bfloat16
    tokens = tokens_of(model.config, 2)
    assert np.isfinite(forward(half, tokens)).all()


@pytest.mark.parametrize(
    ("patterns", "options", "words"),
    [
        (("*.ffn.*",), {}, r"layers\.0\.ffn\.router is not a matrix of attention"),
        (("*norm.scale",), {}, r"norm\.scale is not a matrix"),
        (("embed",), {}, "embed is not a matrix"),
        (("head",), {}, "head is not a matrix"),
        (("*.nothing",), {}, r"pattern '\*\.nothing' fits no parameter"),
        (("*.q",), {"rank": 0}, "rank 0 must be from 1 to 64"),
        (("*.q",), {"rank": 65}, r"rank 65 .* smaller side of layers\.0\.attention\.q"),
        (("*.q",), {"alpha": -1.0}, r"alpha -1\.0 must be greater than 0"),
    ],
)
def test_what_cannot_be_adapted_is_named(patterns, options, words):
    settings = {"rank": 2, "alpha": 2.0, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=words):
        lora.apply(plain("llama4-scout"), patterns, **settings)


def test_no_matrix_is_adapted_twice():
    with pytest.raises(ValueError, match="q has LowRank in its place already"):
        lora.apply(adapted("llama4-scout"), ("*.q",), rank=2, alpha=2, key=jax.random.key(0))


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_checkpoints_hold_merged_models_only(to, tmp_path):
    with pytest.raises(ValueError, match=r"k is no array but LowRank: lora\.merge gives one"):
        checkpoints.save(adapted("llama4-scout"), tmp_path / "model", to=to)
    assert not (tmp_path / "model").exists()
