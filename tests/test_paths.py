"""Patterns mean what they say."""

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
