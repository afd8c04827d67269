"""Generation: one prefill of the prompts, then many decode steps inside one compiled loop.

Prompt lengths and contexts are rounded up, so that few shapes are compiled, and the loop's trip
count is a runtime value: `generate` and `stream` run the same two compiled functions. The cache is
donated to the loop and updated in place. Images are encoded in the prefill.

Letters: see `models.layers`; i stop ids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from l4jax import sharding
from l4jax.inference.sampling import Sampling, sample
from l4jax.models.cache import Cache
from l4jax.models.llama4 import Llama
from l4jax.models.multimodal import Images, Multimodal
from l4jax.models.vision import tile_features

PIECE = 64
"""Most decode steps in one call of the compiled loop."""
STREAM_PIECE = 8
"""The same while streaming, where a reader waits for the first of them."""
_NONE = -1
"""In place of a token in rows that have stopped."""

Prompts = Sequence[Sequence[int]] | np.ndarray | jax.Array


class Generated(NamedTuple):
    """What `generate` returns, one entry for each row.

    tokens: the new ones, up to and including a stop token. reasons: why the row ended.
    """

    tokens: list[list[int]]
    reasons: list[Literal["stop", "length"]]


class _How(NamedTuple):
    """What `generate` and `stream` were asked for; `piece` is the longest run between two reads."""

    new: int
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]
    context: int | None
    piece: int


def generate(  # noqa: PLR0913 - keywords that callers know from other libraries
    model: Llama,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    lengths: Sequence[int] | np.ndarray | jax.Array | None = None,
    context: int | None = None,
    images: Images | None = None,
) -> Generated:
    """Continues every prompt by up to `max_new_tokens` tokens.

    The same arguments give the same tokens. What a row draws depends on the seed and its place in
    the batch, not on the other rows or on padding.

    Args:
        model: any Llama. On CPU a scanned one is unrolled first, which copies its weights: pass
            `inference.decoding.unrolled(model)` to pay that once.
        tokens: lists of ids, one per prompt, of any lengths; or an array [b t] with `lengths`.
        max_new_tokens: at least 1.
        temperature: 0 takes the most likely token; see `sampling.Sampling` for these three.
        top_k: number of candidates; None or 0 for all.
        top_p: probability that the candidates must reach together.
        seed: of all random draws.
        stop_ids: a row ends behind the first of these.
        lengths: how many tokens of each row of an array are real; all by default.
        context: tokens the cache has room for in each row, by default what this call needs.
        images: in the prompts, from `models.multimodal.arrange`; for a `Multimodal` model.

    Raises:
        ValueError: a prompt is empty, or has an id outside the vocabulary, or does not fit into
            the context together with `max_new_tokens`; a sampling value is out of range; or
            images fit neither model nor prompts.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    prompts, counts = _padded(tokens, lengths)
    _check(model, prompts, counts, new=max_new_tokens, context=context, seed=seed)
    seen = _seen(model, images, prompts, counts)
    how = _How(max_new_tokens, sampling, seed, tuple(stop_ids), context, PIECE)
    rows: list[list[int]] = [[] for _ in counts]
    for piece in _pieces(model, prompts, counts, seen, how):
        for row, new in zip(rows, piece, strict=True):
            row += new[new != _NONE].tolist()
    stops = set(stop_ids)
    return Generated(rows, ["stop" if row[-1] in stops else "length" for row in rows])


def stream(  # noqa: PLR0913 - as for generate
    model: Llama,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    context: int | None = None,
    images: Images | None = None,
) -> Iterator[int]:
    """The tokens that `generate` would return for this one prompt, as they come.

    Arguments and errors as for `generate`; errors are raised by the call, not by the iteration.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    prompts, counts = _padded([tokens], None)
    _check(model, prompts, counts, new=max_new_tokens, context=context, seed=seed)
    seen = _seen(model, images, prompts, counts)
    how = _How(max_new_tokens, sampling, seed, tuple(stop_ids), context, STREAM_PIECE)
    pieces = _pieces(model, prompts, counts, seen, how)
    return (int(token) for piece in pieces for token in piece[0] if token != _NONE)


def _padded(
    tokens: Prompts, lengths: Sequence[int] | np.ndarray | jax.Array | None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as an array [b t], rounded up to a few widths with zeros on the right; lengths [b].

    Raises:
        ValueError: there is no list of prompts, one is empty, or lengths do not fit the array.
    """
    if isinstance(tokens, np.ndarray | jax.Array):
        rows = list(np.asarray(tokens))
        if lengths is not None:
            given = [int(n) for n in lengths]
            if len(given) != len(rows) or any(not 0 <= n <= tokens.shape[1] for n in given):
                raise ValueError(f"lengths {given} do not fit tokens of shape {tokens.shape}")
            rows = [row[:n] for row, n in zip(rows, given, strict=True)]
    elif lengths is not None:
        raise ValueError("lengths come with an array of tokens; lists have their own")
    else:
        rows = [np.asarray(row) if len(row) else np.zeros(0, np.int64) for row in tokens]
    if not all(np.issubdtype(row.dtype, np.integer) for row in rows):
        raise ValueError("token ids must be whole numbers")
    if not rows or any(row.ndim != 1 for row in rows):
        raise ValueError("tokens must hold one list of ids for each prompt, and at least one")
    counts = np.asarray([len(row) for row in rows], np.int32)
    if not counts.all():
        raise ValueError(f"the prompt of row {counts.argmin()} is empty")
    padded = np.zeros((len(rows), _rounded(int(counts.max()))), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, counts


def _rounded(n: int) -> int:
    """The next multiple of 16, or, for large n, of a quarter of the next power of two."""
    step = max(16, 2 ** (int(n) - 1).bit_length() // 4)
    return -(-int(n) // step) * step


def _check(
    model: Llama,
    prompts: np.ndarray,
    counts: np.ndarray,
    *,
    new: int,
    context: int | None,
    seed: int,
) -> None:
    """Raises the ValueErrors of `generate` that concern ids, lengths and the seed."""
    vocabulary = model.config.vocab_size
    outside = np.argwhere((prompts < 0) | (prompts >= vocabulary))
    if len(outside):
        row, column = outside[0]
        raise ValueError(
            f"token id {prompts[row, column]} at position {column} of row {row} is outside the "
            f"vocabulary of {vocabulary}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be from 0 to {2**32 - 1}")
    if new < 1:
        raise ValueError(f"max_new_tokens {new} must be at least 1")
    longest, room = int(counts.max()), model.config.max_context
    if context is not None and context > room:
        raise ValueError(f"context {context} exceeds the model's context of {room}")
    room = room if context is None else context
    if longest + new > room:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {new} make {longest + new}, more "
            f"than the context of {room}"
        )


def _seen(
    model: Llama, images: Images | None, prompts: np.ndarray, counts: np.ndarray
) -> Images | None:
    """Images for prompts that were padded: places are too, and tiles to one of few numbers.

    Raises:
        ValueError: the model has no encoder, or places do not fit the prompts or the tiles.
    """
    if images is None:
        return None
    if not isinstance(model, Multimodal):
        raise ValueError("this model reads text only: it has no vision encoder for images")
    tiles, given = np.asarray(images.tiles), np.asarray(images.places)
    (b, longest), shape = (len(counts), int(counts.max())), given.shape
    if len(shape) != 2 or shape[0] != b or shape[1] < longest:
        raise ValueError(
            f"places of shape {shape} do not fit prompts of shape {(b, longest)}: there must be "
            f"one for each token"
        )
    features = len(tiles) * tile_features(model.vision.config)
    if given.max() >= features:
        raise ValueError(
            f"place {given.max()} is beyond the {features} features of {len(tiles)} tiles"
        )
    if not len(tiles):
        return None
    places = np.full(prompts.shape, _NONE, np.int32)
    places[:, :longest] = given[:, :longest]
    few = max(1, 2 ** (len(tiles) - 1).bit_length() // 4)
    black = np.full((-len(tiles) % few, *tiles.shape[1:]), -1, tiles.dtype)
    return Images(np.concatenate([tiles, black]), places)


def _pieces(
    model: Llama, prompts: np.ndarray, counts: np.ndarray, images: Images | None, how: _How
) -> Iterator[np.ndarray]:
    """New tokens [b n], n at most `how.piece`, until all rows ended; `_NONE` behind a row's end."""
    if model.periods and jax.default_backend() == "cpu":
        model = _unrolled(model)
    size = _rounded(int(counts.max()) + how.new) if how.context is None else how.context
    key = jax.random.key(how.seed)
    stops = jnp.asarray(how.stop_ids or [_NONE], jnp.int32)
    tokens = jnp.asarray(prompts, jnp.int32)
    run = compiled()
    state = run.prefill(model, tokens, jnp.asarray(counts), key, stops, how.sampling, size, images)
    yield np.asarray(state.token)[:, None]
    done = 1
    while done < how.new and np.any(state.live):
        count = min(how.piece, how.new - done)
        steps = jnp.int32(done), jnp.int32(count)
        out, state = run.advance(model, state, key, stops, *steps, how.sampling)
        yield np.asarray(out)[:, :count]
        done += count


class State(NamedTuple):
    """Between decode steps: the last token of each row is not in the cache yet."""

    token: Int[Array, " b"]
    live: Bool[Array, " b"]
    cache: Cache


def unrolled(model: Llama) -> Llama:
    """The same model with every layer in `tail`; its scanned parameters are sliced, so copied.

    For decoding on CPU: there a scan copies each layer's weights at every step.
    """
    if not model.periods:
        return model
    blocks = [
        jax.tree.map(lambda x, i=i: x[i], block)
        for i in range(model.periods)
        for block in model.layers
    ]
    new: Llama = jax.tree.map(lambda x: x, model)
    new.periods = 0
    new.execution = dataclasses.replace(model.execution, scan=False)
    new.layers = nnx.List([])
    new.tail = nnx.List([*blocks, *new.tail])
    return new


_unrolled = jax.jit(unrolled)


TPU_OPTIONS = {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0}
"""Parameters in bfloat16 come in tiles of 8 rows; TPU7x would copy them all into tiles of 16, and
hold them twice (found by compiling; the other generations keep to 8)."""


class Programs(NamedTuple):
    """`prefill` and `advance`, jitted."""

    prefill: Callable[..., State]
    advance: Callable[..., tuple[Array, State]]


def compiled() -> Programs:
    """Both for what the code will run on."""
    return _compiled(sharding.platform())


@functools.cache
def _compiled(platform: str) -> Programs:
    jit = functools.partial(jax.jit, compiler_options=TPU_OPTIONS if platform == "tpu" else None)
    return Programs(
        jit(prefill, static_argnames=("sampling", "context")),
        jit(advance, static_argnames=("sampling",), donate_argnames=("state",)),
    )


def prefill(
    model: Llama,
    prompts: Int[Array, "b t"],
    counts: Int[Array, " b"],
    key: PRNGKeyArray,
    stops: Int[Array, " i"],
    sampling: Sampling,
    context: int,
    images: Images | None = None,
) -> State:
    """Fills a cache with the prompts and draws the first token of each row."""
    tokens = prompts if images is None else cast(Multimodal, model).fuse(prompts, images)
    hidden, cache = model.prefill(tokens, counts, context=context)
    last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0]
    token = _draw(model, last, key, jnp.int32(0), sampling)
    return State(token, ~jnp.isin(token, stops), cache)


def advance(
    model: Llama,
    state: State,
    key: PRNGKeyArray,
    stops: Int[Array, " i"],
    done: Int[Array, ""],
    count: Int[Array, ""],
    sampling: Sampling,
) -> tuple[Int[Array, "b p"], State]:
    """Up to `count` (at most `PIECE`) tokens more for each row that is alive.

    Args:
        model: decoder.
        state: donated.
        key: of the whole generation.
        stops: ids that end a row.
        done: new tokens that each row has had; with the row, what a draw depends on.
        count: of steps; a runtime value, so that pieces of any length share one program.
        sampling: how to choose.
    """

    def more(carry: tuple[Array, Array, State]) -> Array:
        i, _, state = carry
        return (i < count) & state.live.any()

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        i, out, state = carry
        new = _step(model, state, key, stops, done + i, sampling)
        out = out.at[:, i].set(jnp.where(state.live, new.token, _NONE))
        return i + 1, out, new

    empty = jnp.full((state.token.shape[0], PIECE), _NONE, jnp.int32)
    _, out, state = jax.lax.while_loop(more, step, (jnp.int32(0), empty, state))
    return out, state


def _step(
    model: Llama,
    state: State,
    key: PRNGKeyArray,
    stops: Int[Array, " i"],
    number: Int[Array, ""],
    sampling: Sampling,
) -> State:
    """New token number `number` of each row that is alive."""
    counts = state.live.astype(jnp.int32)
    hidden, cache = model.extend(state.token[:, None], state.cache, counts)
    token = _draw(model, hidden[:, 0], key, number, sampling)
    return State(token, state.live & ~jnp.isin(token, stops), cache)


def _draw(
    model: Llama, hidden: Array, key: PRNGKeyArray, number: Array, sampling: Sampling
) -> Int[Array, " b"]:
    """Each row's new token number `number` from its final hidden state [b d]."""
    return sample(
        model.logits(hidden),
        jax.random.fold_in(key, number),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
