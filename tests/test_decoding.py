"""Generation gives what full forward passes would, for every row and however it is cut up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l4jax import presets
from l4jax.config import Execution
from l4jax.inference import generate
from l4jax.inference.decoding import stream, unrolled
from l4jax.models.llama4 import Llama

PROMPTS = [[7, 1, 2, 3, 400], [9] * 14 + [8], list(range(100, 121))]
NEW = 24


def config_of(preset, num_layers=4):
    return dataclasses.replace(presets.tiny(presets.get(preset).make()), num_layers=num_layers)


@functools.cache
def model_of(preset, scan=True):
    return Llama(config_of(preset), execution=Execution(scan=scan), rngs=nnx.Rngs(params=0))


@functools.cache
def greedy(preset="llama4-scout"):
    return generate(model_of(preset), PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize("preset", ["llama4-scout", "llama4-maverick", "llama3.2-1b"])
def test_greedy_tokens_are_the_argmax_of_a_full_forward_pass(preset):
    """The rows cross chunks of 16 at different steps: 5 → 29, 15 → 39 and 21 → 45 tokens."""
    found = greedy(preset)
    rows = [p + new for p, new in zip(PROMPTS, found.tokens, strict=True)]
    width = max(map(len, rows))
    padded = jnp.asarray([row + [0] * (width - len(row)) for row in rows])
    best = np.asarray(jax.jit(lambda m, x: m(x).argmax(-1))(model_of(preset), padded))
    for i, (prompt, new) in enumerate(zip(PROMPTS, found.tokens, strict=True)):
        assert best[i, len(prompt) - 1 :][:NEW].tolist() == new
    assert found.reasons == ["length"] * 3


def test_a_row_alone_gives_the_same_tokens():
    alone = generate(model_of("llama4-scout"), PROMPTS[1:2], max_new_tokens=NEW)
    assert alone.tokens == greedy().tokens[1:2]


def test_an_array_with_lengths_is_the_same_as_lists():
    array = np.full((3, 40), 511)
    for row, prompt in zip(array, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = [len(prompt) for prompt in PROMPTS]
    found = generate(model_of("llama4-scout"), array, lengths=lengths, max_new_tokens=NEW)
    assert found == greedy()


def test_a_model_without_scan_gives_the_same_tokens():
    scanned, plain = model_of("llama4-scout"), model_of("llama4-scout", scan=False)
    sliced = unrolled(scanned)
    assert jax.tree.structure(sliced) == jax.tree.structure(plain)
    shapes = [[x.shape for x in jax.tree.leaves(m)] for m in (sliced, plain)]
    assert shapes[0] == shapes[1]
    assert generate(sliced, PROMPTS, max_new_tokens=NEW) == greedy()
    assert len(generate(plain, PROMPTS, max_new_tokens=NEW).tokens[0]) == NEW


def test_unrolling_keeps_the_layers_in_order_and_the_tail_behind_them():
    config = dataclasses.replace(
        config_of("llama4-scout", num_layers=5), pattern=config_of("llama4-scout").pattern[2:]
    )
    model = Llama(config, rngs=nnx.Rngs(params=1))
    sliced = unrolled(model)
    assert (model.periods, len(model.tail), sliced.periods, len(sliced.tail)) == (2, 1, 0, 5)
    for layer, source in ((0, (0, 0)), (1, (1, 0)), (2, (0, 1)), (3, (1, 1))):
        place, period = source
        expected = model.layers[place].ffn.up[...][period]
        np.testing.assert_array_equal(sliced.tail[layer].ffn.up[...], expected)
    np.testing.assert_array_equal(sliced.tail[4].ffn.up[...], model.tail[0].ffn.up[...])


def test_rows_end_behind_a_stop_token_and_the_others_go_on():
    plain = greedy()
    stop = plain.tokens[0][5]
    found = generate(model_of("llama4-scout"), PROMPTS, max_new_tokens=NEW, stop_ids=[stop])
    for whole, cut, reason in zip(plain.tokens, found.tokens, found.reasons, strict=True):
        if stop in whole:
            assert (cut, reason) == (whole[: whole.index(stop) + 1], "stop")
        else:
            assert (cut, reason) == (whole, "length")


def test_draws_depend_on_the_seed_and_not_on_the_other_rows():
    draw = functools.partial(
        generate, model_of("llama4-scout"), max_new_tokens=NEW, temperature=1.0, top_k=50
    )
    first = draw(PROMPTS, seed=3)
    assert draw(PROMPTS, seed=3) == first
    assert draw([PROMPTS[0], PROMPTS[2][::-1], PROMPTS[1]], seed=3).tokens[0] == first.tokens[0]
    assert draw(PROMPTS, seed=4) != first


def test_streaming_gives_the_same_tokens():
    model, stop = model_of("llama4-scout"), greedy().tokens[1][12]
    whole = generate(model, PROMPTS[1:2], max_new_tokens=NEW, stop_ids=[stop])
    assert list(stream(model, PROMPTS[1], max_new_tokens=NEW, stop_ids=[stop])) == whole.tokens[0]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1], []], {}, "the prompt of row 1 is empty"),
        ([], {}, "at least one"),
        ([[1], [5, 512]], {}, "token id 512 at position 1 of row 1 .* vocabulary of 512"),
        ([[1, -3]], {}, "token id -3"),
        ([[1] * 250], {"max_new_tokens": 7}, "prompt of 250 .* 7 make 257, .* context of 256"),
        ([[1] * 9], {"max_new_tokens": 8, "context": 16}, "make 17, more than the context of 16"),
        ([[1]], {"context": 1000}, "context 1000 exceeds the model's context of 256"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([[1]], {"top_p": 2.0}, "top_p 2.0"),
        (np.ones((2, 3), int), {"lengths": [3, 4]}, "lengths"),
        ([[1]], {"lengths": [1]}, "lengths"),
    ],
)
def test_what_cannot_be_generated_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model_of("llama4-scout"), tokens, **{"max_new_tokens": 1, **options})


def test_streaming_refuses_at_the_call():
    with pytest.raises(ValueError, match="empty"):
        stream(model_of("llama4-scout"), [], max_new_tokens=1)
