"""Patterns mean what they say, and so do differences."""

import json

import jax.numpy as jnp
import pytest

from l4jax import paths

TREE = {
    "embed": jnp.ones(2),
    "layers": {0: {"attention": {"q": jnp.ones(2)}}},
    "norm": {"scale": 1},
}
NAMES = ["embed", "layers.0.attention.q", "norm.scale"]


def test_names_follow_the_tree():
    assert paths.names(TREE) == NAMES


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], NAMES),
        (["*.attention.*"], NAMES[1:2]),
        (["embed", "*scale"], [NAMES[0], NAMES[2]]),
        (["attention"], []),
        ([], []),
    ],
)
def test_a_pattern_fits_the_whole_name(patterns, expected):
    is_chosen = paths.chosen(patterns)
    assert [name for name in NAMES if is_chosen(name)] == expected


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match=r"pattern '\*\.mlp' fits no parameter; there are embed, "):
        paths.chosen(["embed", "*.mlp"], NAMES)


def test_configurations_differ_in_leaves():
    then = {"a": 1, "b": {"c": [1, 2], "out": "x", "d": None}, "mesh": {"fsdp": 8}}
    assert list(paths.differences(then, json.loads(json.dumps(then)))) == []
    now = {"a": 2, "b": {"c": [1, 3], "out": "y"}, "mesh": {"fsdp": 4}, "e": True}
    assert list(paths.differences(then, now, free=frozenset(("out", "mesh")))) == [
        "a: 1 then, 2 now",
        "b.c: [1, 2] then, [1, 3] now",
        "e: None then, True now",
    ]
