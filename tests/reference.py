"""The whole decoder once more, in float64 NumPy, one row and one token at a time.

Written from the formulas in the Llama 3 paper and from what Meta's and Hugging Face's code compute,
sharing no code with the library: slow, obvious, and never to be optimised.
"""

from __future__ import annotations

import math

import numpy as np


def weights_of(model) -> dict:
    """The parameters of a model as float64 arrays, its layers in a plain list."""
    from flax import nnx

    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = []
    for period in range(model.periods):
        blocks += [_slice(state["layers"][i], period) for i in range(len(state["layers"]))]
    blocks += [_slice(state["tail"][i], None) for i in range(len(state.get("tail", ())))]
    head = state["head"] if "head" in state else np.asarray(state["embed"]).T
    return {
        "embed": np.asarray(state["embed"], np.float64),
        "blocks": blocks,
        "norm": np.asarray(state["norm"]["scale"], np.float64),
        "head": np.asarray(head, np.float64),
    }


def _slice(tree, period):
    if isinstance(tree, dict):
        return {name: _slice(value, period) for name, value in tree.items()}
    array = np.asarray(tree, np.float64)
    return array if period is None else array[period]


def forward(weights, config, tokens, positions=None, segments=None) -> np.ndarray:
    """Logits [b t v] of the rows of `tokens`."""
    tokens = np.asarray(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        segments = np.zeros_like(tokens)
    rows = zip(tokens, np.asarray(positions), np.asarray(segments), strict=True)
    return np.stack([_row(weights, config, *row) for row in rows])


def _row(weights, config, tokens, positions, segments) -> np.ndarray:
    x = weights["embed"][tokens]
    for number, block in enumerate(weights["blocks"]):
        kind, ffn = config.pattern[number % len(config.pattern)]
        normed = _norm(x, block["attention_norm"]["scale"], config.norm_eps)
        x = x + _attention(block["attention"], config, kind, normed, positions, segments)
        normed = _norm(x, block["ffn_norm"]["scale"], config.norm_eps)
        feed = _experts if ffn == "moe" else _swiglu
        x = x + (
            feed(block["ffn"], normed, config.moe) if ffn == "moe" else feed(block["ffn"], normed)
        )
    return _norm(x, weights["norm"], config.norm_eps) @ weights["head"]


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _swiglu(w, x):
    z = x @ w["gate"]
    return (z / (1 + np.exp(-z)) * (x @ w["up"])) @ w["down"]


def _experts(w, x, moe):
    y = _swiglu(w["shared"], x) if "shared" in w else np.zeros_like(x)
    for i, token in enumerate(x):
        logits = token @ w["router"]
        for e in np.argsort(-logits, kind="stable")[: moe.experts_per_token]:
            score = 1 / (1 + math.exp(-logits[e]))
            y[i] += _swiglu({k: w[k][e] for k in ("gate", "up", "down")}, score * token)
    return y


def frequencies(rope, size) -> list[float]:
    """Radians per position of each rotated pair."""
    result = []
    for j in range(size // 2):
        f = rope.theta ** (-2 * j / size)
        if rope.scaling is not None:
            s, wavelength = rope.scaling, 2 * math.pi / f
            if wavelength > s.original_context / s.low_freq_factor:
                f /= s.factor
            elif wavelength >= s.original_context / s.high_freq_factor:
                blend = s.original_context / wavelength - s.low_freq_factor
                blend /= s.high_freq_factor - s.low_freq_factor
                f = (1 - blend) * f / s.factor + blend * f
        result.append(f)
    return result


def _turn(x, positions, freqs):
    """Pairs (j, j + h/2) of x [t n h] as complex numbers, times e^(i · position · frequency)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.outer(positions, freqs))[:, None]
    return np.concatenate([z.real, z.imag], -1)


def _attention(w, config, kind, x, positions, segments):
    a = config.attention
    q, k, v = (np.einsum("td,dnh->tnh", x, w[name]) for name in "qkv")
    if kind == "global":
        if a.temperature is not None:
            steps = np.floor(np.maximum(positions + 1, 0) / a.temperature.floor)
            q = q * (1 + a.temperature.scale * np.log(steps + 1))[:, None, None]
    else:
        freqs = frequencies(a.rope, a.head_dim)
        q, k = _turn(q, positions, freqs), _turn(k, positions, freqs)
        if a.qk_norm:
            q, k = _norm(q, 1.0, config.norm_eps), _norm(k, 1.0, config.norm_eps)
    out = np.zeros_like(q)
    for i, at in enumerate(positions):
        seen = (positions <= at) & (segments == segments[i]) & (positions >= 0)
        if kind == "chunked":
            seen &= positions // a.chunk_size == at // a.chunk_size
        if not seen.any():
            continue
        for n in range(a.num_heads):
            kv = n // (a.num_heads // a.num_kv_heads)
            scores = k[seen, kv] @ q[i, n] / math.sqrt(a.head_dim)
            p = np.exp(scores - scores.max())
            out[i, n] = (p / p.sum()) @ v[seen, kv]
    return np.einsum("tnh,nhd->td", out, w["o"])
