r"""EDM's augmentation of pictures, with the numbers that tell the network what was done.

Karras et al. (https://arxiv.org/abs/2206.00364, appendix F.2, table 6; NVlabs/edm:
training/augment.py). Each picture is mirrored by a coin; and each of the following happens with
probability p, with z, z' from N(0, 1) and angles uniform:

    upside down by a coin;  larger by 2^(0.2 z);  turned by an angle;  larger by 2^(0.2 z) along a
    direction (an axis for one half, any for the other) and smaller across;  moved by z, z' eighths

A place o of the result, from the centre, shows the place M o of the picture, M the product of the
inverses. The network is told

    (1)  [mirrored, upside down, z, cos a - 1, sin a, z cos b, z sin b, z, z'],   0: not done

Against aliasing the picture U x U^T is looked up bilinearly at twice the density, the result then
D y D^T: U mirrors the picture over its edges and doubles it by the wavelet sym6's low-pass, D is
the same filter and takes every other place, so that D U = 1 where nothing is done. The mirrored
edge is as wide as the picture less one pixel, and beyond it is grey: the authors' largest.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Key

from diffusion.training import codec

NUMBERS = 9
# sym6 (Daubechies, Ten Lectures on Wavelets, table 6.3).
SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
        *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
        *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ]
)
SPARE = 3  # places around the result that the filter reads


@dataclasses.dataclass(frozen=True)
class Augment:
    """A batch with "image", float in [-1, 1], augmented, and "augment", eq. 1. p in (0, 1]."""

    p: float

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise ValueError(f"augment={self.p} must lie in [0, 1], 0 for none: EDM's is 0.12")

    def __call__(self, batch: dict[str, Array], keys: Key[Array, " batch"]) -> dict[str, Array]:
        x = codec.signed(batch["image"])
        size = x.shape[1], x.shape[2]
        flips, inverse, told = jax.vmap(functools.partial(draw, self.p, size))(keys)
        return {**batch, "image": apply(x, flips, inverse), "augment": told}


def draw(p: float, size: tuple[int, int], key: Key[Array, ""]) -> tuple[Array, Array, Array]:
    """Of one picture: the two flips, M (2, 3) in pixels, (x, y), and eq. 1."""
    keys = iter(jax.random.split(key, 13))

    def sometimes(value: Array) -> Array:
        return jnp.where(jax.random.uniform(next(keys)) < p, value, jnp.zeros_like(value))

    coin = functools.partial(jax.random.bernoulli, p=0.5)
    angle = functools.partial(jax.random.uniform, minval=-np.pi, maxval=np.pi)
    mirrored = coin(next(keys)).astype(jnp.float32)
    down = sometimes(coin(next(keys)).astype(jnp.float32))
    scale = sometimes(jax.random.normal(next(keys)))
    turn = sometimes(angle(next(keys)))
    stretch = sometimes(jax.random.normal(next(keys)))
    along = jnp.where(coin(next(keys)), angle(next(keys)), 0.0)
    move = sometimes(jax.random.normal(next(keys), (2,)))
    told = [scale, jnp.cos(turn) - 1, jnp.sin(turn)]
    told += [stretch * jnp.cos(along), stretch * jnp.sin(along), *move]
    inverse = matrix(size, scale, turn, stretch, along, move)
    return jnp.stack([mirrored, down]), inverse, jnp.stack([mirrored, down, *told])


def matrix(size: tuple[int, int], scale: Array, turn: Array, stretch, along, move) -> Array:
    """M (2, 3): scale, turn, stretch and move undone, in this order from the left."""
    longer = 2.0 ** (0.2 * stretch)
    linear = _rotation(-along) @ jnp.diag(jnp.stack([1 / longer, longer])) @ _rotation(along)
    linear = 2.0 ** (-0.2 * scale) * _rotation(turn) @ linear
    moved = move * jnp.array([size[1], size[0]], jnp.float32) / 8
    return jnp.concatenate([linear, -(linear @ moved)[:, None]], axis=1)


def _rotation(angle: Array) -> Array:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def apply(
    x: Float[Array, "batch height width channels"],
    flips: Float[Array, "batch 2"],
    inverse: Float[Array, "batch 2 3"],
) -> Float[Array, "batch height width channels"]:
    """Flips, then what M says, as the module's text has it."""
    for i, axis in ((0, 2), (1, 1)):
        x = jnp.where(flips[:, i, None, None, None] > 0, jnp.flip(x, axis), x)
    (up, down), (left, right) = (_matrices(side) for side in x.shape[1:3])
    wide = jnp.einsum("ih,jw,bhwc->bcij", up, left, x)
    places = [np.arange(2 * (side + 2 * SPARE)) for side in x.shape[1:3]]
    centred = [(p - (p.size - 1) / 2 + 0.5) / 2 for p in places]
    around = jnp.asarray(np.stack(np.meshgrid(*centred, indexing="ij")[::-1]), x.dtype)

    def look(picture: Array, m: Array) -> Array:
        found = 2 * (jnp.einsum("ij,jyx->iyx", m[:, :2], around) + m[:, 2, None, None]) - 0.5
        rows, columns = (found[i] + (n - 1) / 2 for i, n in ((1, up.shape[0]), (0, left.shape[0])))
        return map_coordinates(picture, [rows, columns], order=1, mode="constant")

    looked = jax.vmap(jax.vmap(look, (0, None)))(wide, inverse)
    return jnp.einsum("ih,jw,bchw->bijc", down, right, looked)


@functools.cache
def _matrices(side: int) -> tuple[np.ndarray, np.ndarray]:
    """U (2 (3 side - 2), side) and D (side, 2 (side + 2 SPARE)), float32."""
    edge = side - 1
    padded = np.pad(np.eye(side), ((edge, edge), (0, 0)), mode="reflect")
    taps, many = SYM6.size, len(padded)
    up, down = np.zeros((2 * many, many)), np.zeros((side, 2 * (side + 2 * SPARE)))
    for i in range(many):  # place i to 2 i, through the filter backwards
        for k in range(taps):
            if 0 <= (j := 2 * i - k + taps // 2) < 2 * many:
                up[j, i] = SYM6[taps - 1 - k]
    for i in range(side):
        first = 2 * (i + SPARE) - (taps - 1) // 2
        down[i, first : first + taps] = SYM6
    return (up @ padded).astype(np.float32), down.astype(np.float32)
