"""Grouped matrix products on TPU: every row by its own expert's matrix, rows sorted by expert.

Three products, each by what serves it best on every generation (compiled for v5p, v6e and tpu7x
with libtpu 0.0.42 and 0.0.50):

- forward: `jax.lax.ragged_dot`, which XLA:TPU turns into a kernel with tiles of its own, chosen for
  the generation: whole contractions, so that a weight tile is read once per expert;
- the rows' gradient: megablox' `gmm`, which reads the weights transposed. `ragged_dot` would first
  copy all of them transposed (1.3 GB for 16 experts of 5120 by 8192);
- the weights' gradient: megablox' `tgmm`, accumulating in float32. `ragged_dot` forms it densely,
  rows times experts, before libtpu 0.0.45.

Rows past the last group cost nothing beyond the tile they begin in; whatever they hold, their
output is 0 and no gradient sees them.

Letters: see `models.layers`; m rows.
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# The package's attribute of this name is a function.
_megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

LANES = 128
"""Tiles are multiples of this, or a whole dimension."""
VMEM = {5: 16 * 2**20, 6: 32 * 2**20}
"""Bytes a kernel may use by default, by TPU generation; later ones as the last."""


def grouped_matmul(
    x: Float[Array, "m d"],
    w: Float[Array, "e d f"],
    group_sizes: Int[Array, " e"],
    *,
    interpret: bool = False,
) -> Float[Array, "m f"]:
    """x times each row's own w: `group_sizes[0]` rows by w[0], the next by w[1], and so on.

    The sizes may add up to less than m; the rows after them give 0.
    """
    return _matmul(x, w, group_sizes, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: Array, group_sizes: Array, interpret: bool) -> Array:
    return _matmul_forward(x, w, group_sizes, interpret)[0]


def _matmul_forward(
    x: Array, w: Array, group_sizes: Array, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    y = _clear(_product(x, w, group_sizes), group_sizes)
    return y, (x, w, group_sizes)


def _matmul_backward(
    interpret: bool, saved: tuple[Array, ...], d_y: Array
) -> tuple[Array | None, ...]:
    x, w, group_sizes = saved
    d_x = _transposed(d_y, w, group_sizes, interpret=interpret)
    d_w = _outer(x, d_y, group_sizes, w.dtype, interpret=interpret)
    return _clear(d_x, group_sizes), d_w, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_swiglu_tpu(
    x: Float[Array, "m d"],
    gate: Float[Array, "e d f"],
    up: Float[Array, "e d f"],
    down: Float[Array, "e f d"],
    group_sizes: Int[Array, " e"],
    *,
    interpret: bool = False,
) -> Float[Array, "m d"]:
    """down(silu(gate(x)) · up(x)) with each row's own expert; rows as for `grouped_matmul`.

    Besides its arguments, the two hidden products are kept for the backward pass.
    """
    return _swiglu(x, gate, up, down, group_sizes, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _swiglu(
    x: Array, gate: Array, up: Array, down: Array, group_sizes: Array, interpret: bool
) -> Array:
    return _swiglu_forward(x, gate, up, down, group_sizes, interpret)[0]


def _swiglu_forward(
    x: Array, gate: Array, up: Array, down: Array, group_sizes: Array, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    gated, lifted = _product(x, gate, group_sizes), _product(x, up, group_sizes)
    y = _product(jax.nn.silu(gated) * lifted, down, group_sizes)
    return _clear(y, group_sizes), (x, gate, up, down, group_sizes, gated, lifted)


def _swiglu_backward(
    interpret: bool, saved: tuple[Array, ...], d_y: Array
) -> tuple[Array | None, ...]:
    x, gate, up, down, group_sizes, gated, lifted = saved
    transposed = functools.partial(_transposed, group_sizes=group_sizes, interpret=interpret)
    outer = functools.partial(
        _outer, group_sizes=group_sizes, dtype=gate.dtype, interpret=interpret
    )
    activated, silu_vjp = jax.vjp(jax.nn.silu, gated)
    d_hidden = transposed(d_y, down)
    (d_gated,) = silu_vjp(d_hidden * lifted)
    d_lifted = d_hidden * activated
    d_x = transposed(d_gated, gate) + transposed(d_lifted, up)
    d_weights = outer(x, d_gated), outer(x, d_lifted), outer(activated * lifted, d_y)
    return _clear(d_x, group_sizes), *d_weights, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _clear(y: Array, group_sizes: Array) -> Array:
    """`y` with 0 in the rows of no group, which the kernels leave as they find them."""
    rows = jnp.arange(y.shape[0])
    return jnp.where((rows < group_sizes.sum())[:, None], y, 0)


def _product(x: Array, w: Array, group_sizes: Array) -> Array:
    """x [m d] · w [e d f]; rows of no group are undefined."""
    return jax.lax.ragged_dot(x, w, group_sizes)


def _transposed(y: Array, w: Array, group_sizes: Array, *, interpret: bool) -> Array:
    """y [m f] · wᵀ, of w [e d f]; rows of no group are undefined."""
    m, f = y.shape
    d, size = w.shape[1], y.dtype.itemsize
    vmem = _vmem(interpret=interpret)
    rows = _row_tile(m, w.shape[0], 256 if vmem > VMEM[5] else LANES)
    # A whole contraction keeps a weight tile in VMEM for all rows of its expert, however short the
    # row tiles; only if not even one of 128 columns fits is it split.
    for inner in (f, *(_tile(f, most) for most in (8192, 4096, 2048, 1024))):
        # Two buffers of each operand and of the output, the sum in float32 and room to form it.
        free = 0.95 * vmem - 2 * rows * inner * size
        columns = int(free / (2 * inner * size + rows * (2 * size + 12))) // LANES * LANES
        if columns:
            break
    tiles = rows, inner, _tile(d, columns)
    out = _megablox.gmm(
        _pad(y, rows), w, group_sizes, y.dtype, tiles, transpose_rhs=True, interpret=interpret
    )
    return out[:m]


def _outer(x: Array, y: Array, group_sizes: Array, dtype: jnp.dtype, *, interpret: bool) -> Array:
    """Σ over each group's rows of x ⊗ y: [e d f], summed in float32."""
    # Tiles of D by F columns do D·F/(D+F) operations per byte; v5p needs 166, v6e 560.
    wide = 2048 if _vmem(interpret=interpret) > VMEM[5] else 1024
    rows = _row_tile(x.shape[0], group_sizes.shape[0], 512)
    shrink = x.dtype.itemsize // 2
    tiles = rows, _tile(x.shape[1], 1024 // shrink), _tile(y.shape[1], wide // shrink)
    x, y = _pad(x, rows), _pad(y, rows)
    return _megablox.tgmm(x.T, y, group_sizes, dtype, tiles, interpret=interpret)


def _vmem(*, interpret: bool) -> int:
    """What a kernel may use on the TPU compiled for."""
    generation = min(VMEM) if interpret else pltpu.get_tpu_info().generation
    return VMEM[min(max(generation, min(VMEM)), max(VMEM))]


def _row_tile(m: int, e: int, most: int) -> int:
    """Rows of a tile: at most an eighth of an even share, as each group wastes one on average."""
    share = max(m // e // 8, LANES)
    return min(most, 2 ** (share.bit_length() - 1))


def _tile(size: int, most: int) -> int:
    """The width up to `most` whose multiple exceeds `size` least; the larger of equals."""
    if size <= most:
        return size
    widths = range(most, most // 2 - 1, -LANES)
    return min(widths, key=lambda width: -(-size // width) * width)


def _pad(x: Array, rows: int) -> Array:
    """`x` with rows of 0 up to a multiple of `rows`."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))
