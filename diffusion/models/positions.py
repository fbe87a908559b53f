"""Patches of one, two or three axes, and where they lie: sines and cosines, or rotations.

Sines and cosines of each axis fill a part of the width of its own, the last axis first, as DiT's
code has it (https://arxiv.org/abs/2212.09748); rotary positions turn pairs of q's and k's channels
(RoFormer, https://arxiv.org/abs/2104.09864, eq. 15), each axis an equal part of the head, the first
axis first, as EVA-02 has it (https://arxiv.org/abs/2303.11331). With the place k of a patch:

    (1)  w_i = 10000^(-i / n),  i = 0 .. n - 1
    (2)  e(k) = [sin(w k), cos(w k)]
    (3)  [a, b]_i -> [a cos(w_i k) - b sin(w_i k), b cos(w_i k) + a sin(w_i k)]
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def per_axis(name: str, value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """One number for all axes, or one an axis, as a tuple of one an axis."""
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"{name}={value} is of {len(values)} axes, but the input has {rank}")
    return values


def patches(
    x: Num[Array, "batch *space channels"], patch: tuple[int, ...]
) -> Num[Array, "batch *grid values"]:
    """`patch` places an axis become channels: row-major place, then channel."""
    batch, *space, channels = x.shape
    split = [n for size, p in zip(space, patch) for n in (size // p, p)]
    rank = len(space)
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    grid = split[::2]
    return x.reshape(batch, *split, channels).transpose(order).reshape(batch, *grid, -1)


def unpatch(
    u: Num[Array, "batch *grid values"], patch: tuple[int, ...]
) -> Num[Array, "batch *space channels"]:
    """The inverse of `patches`."""
    batch, *grid, _ = u.shape
    rank = len(grid)
    u = u.reshape(batch, *grid, *patch, -1)
    order = (0, *(n for i in range(rank) for n in (1 + i, 1 + rank + i)), 2 * rank + 1)
    return u.transpose(order).reshape(batch, *(g * p for g, p in zip(grid, patch)), -1)


def sincos_positions(places: list[np.ndarray], width: int) -> Float[np.ndarray, "tokens {width}"]:
    """Eq. 2 on every axis, the last axis first. ValueError for a width that they cannot share."""
    if width % (2 * len(places)):
        raise ValueError(
            f"width={width} cannot be split into sines and cosines of {len(places)} axes: choose a "
            f"multiple of {2 * len(places)}"
        )
    half = width // len(places) // 2
    angles = [
        np.outer(axis.reshape(-1), _frequencies(half))
        for axis in reversed(np.meshgrid(*places, indexing="ij"))
    ]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def rotary_angles(
    places: list[np.ndarray], head_dim: int, registers: int = 0
) -> Float[Array, "tokens half"]:
    """w k of eq. 3 for a head's pairs of channels, the first axis first; registers are not turned.

    ValueError for a head that cannot be split into pairs of every axis.
    """
    if head_dim % (2 * len(places)):
        raise ValueError(
            f"rotary positions split a head's channels into pairs of {len(places)} axes, but a "
            f"head has {head_dim}: choose a multiple of {2 * len(places)}"
        )
    half = head_dim // len(places) // 2
    axes = np.meshgrid(*places, indexing="ij")
    angles = np.concatenate([np.outer(a.reshape(-1), _frequencies(half)) for a in axes], axis=1)
    return jnp.asarray(np.pad(angles, ((registers, 0), (0, 0))), jnp.float32)


def _frequencies(n: int) -> np.ndarray:
    """Eq. 1."""
    return 10000.0 ** (-np.arange(n) / n)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], angles: Float[Array, "tokens half"]
) -> Float[Array, "batch tokens heads head_dim"]:
    """Eq. 3: each pair of neighbouring channels turned by its token's angle."""
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
