"""EDM's augmentation against PyTorch's own sampling of the same places; its draws and its label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs import edm_cifar10
from diffusion.training import augment
from experiments.run import tasks

SIDE = 12
# scale, turn, stretch, its direction, the two moves; flips
CASES = {
    "nothing": ((0, 0, 0, 0, 0, 0), (0, 0)),
    "flipped": ((0, 0, 0, 0, 0, 0), (1, 1)),
    "turned": ((0, 1.3, 0, 0, 0, 0), (0, 0)),
    "all": ((-0.7, -2.1, 1.2, 0.4, 0.3, -1.1), (1, 0)),
}


def transcription(x, numbers, flips):
    """The steps of the paper's pipeline with PyTorch's padding, convolutions and grid."""
    scale, turn, stretch, along, *move = (torch.tensor(float(n)) for n in numbers)
    x = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    x = x.flip([axis for axis, flipped in zip((3, 2), flips) if flipped])

    def rotation(angle):
        return torch.tensor(
            [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]]
        )

    def moved(by_x, by_y):
        return torch.tensor([[1, 0, by_x], [0, 1, by_y], [0, 0, 1.0]])

    larger, longer = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    m = torch.diag(torch.stack([1 / larger, 1 / larger, torch.tensor(1.0)])) @ rotation(turn)
    m = m @ rotation(-along) @ torch.diag(torch.stack([1 / longer, longer, torch.tensor(1.0)]))
    m = m @ rotation(along) @ moved(*(-SIDE / 8 * n for n in move))
    taps = torch.from_numpy(augment.SYM6).float()
    n, c, size, spare = *x.shape[:3], augment.SPARE
    x = F.pad(x, [size - 1] * 4, mode="reflect")
    for axis in (2, 3):  # a zero after each place, then the filter backwards
        x = torch.stack([x, torch.zeros_like(x)], axis + 1).flatten(axis, axis + 1)
        x = x.narrow(axis, 0, x.shape[axis] - 1)
        kernel = taps.flip(0).reshape([1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1])
        x = F.conv2d(
            x.reshape(n * c, 1, *x.shape[2:]), kernel, padding=[6, 0] if axis == 2 else [0, 6]
        )
        x = x.reshape(n, c, *x.shape[2:])
    m = moved(-0.5, -0.5) @ torch.diag(torch.tensor([2.0, 2, 1])) @ m
    m = m @ torch.diag(torch.tensor([0.5, 0.5, 1])) @ moved(0.5, 0.5)
    out = 2 * (size + 2 * spare)
    m = torch.diag(torch.tensor([2 / x.shape[3], 2 / x.shape[2], 1])) @ m
    m = m @ torch.diag(torch.tensor([out / 2, out / 2, 1]))
    grid = F.affine_grid(m[None, :2].expand(n, -1, -1), [n, c, out, out], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    for axis in (2, 3):
        kernel = taps.reshape([1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1])
        how = (
            {"stride": [2, 1], "padding": [5, 0]}
            if axis == 2
            else {"stride": [1, 2], "padding": [0, 5]}
        )
        x = F.conv2d(x.reshape(n * c, 1, *x.shape[2:]), kernel, **how)
        x = x.reshape(n, c, *x.shape[2:]).narrow(axis, spare, size)
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize("case", CASES)
def test_what_is_done_is_the_transcriptions(case):
    numbers, flips = CASES[case]
    x = np.random.default_rng(0).uniform(-1, 1, (1, SIDE, SIDE, 3)).astype(np.float32)
    scale, turn, stretch, along, *move = (jnp.float32(n) for n in numbers)
    m = augment.matrix((SIDE, SIDE), scale, turn, stretch, along, jnp.stack(move))
    found = augment.apply(jnp.asarray(x), jnp.float32([flips]), m[None])
    assert np.abs(found - transcription(x, numbers, flips)).max() < 1e-5
    if not any(numbers):  # the filters undo each other
        kept = x[:, :: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        np.testing.assert_allclose(found, kept, atol=1e-5)


def test_each_is_drawn_as_often_as_it_should_and_told():
    keys = jax.random.split(jax.random.key(0), 8192)
    draw = jax.jit(jax.vmap(lambda key: augment.draw(0.12, (32, 32), key)))
    flips, inverse, told = draw(keys)
    done = (np.asarray(told) != 0).mean(0)
    # A coin; a coin and p; p, of which a direction that is an axis has no second number.
    wanted = [0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12]
    np.testing.assert_allclose(done, wanted, atol=0.015)
    np.testing.assert_array_equal(flips, told[:, :2])
    still = np.all(np.asarray(told)[:, 2:] == 0, axis=1)
    assert 0.55 < still.mean() < 0.65  # 0.88^4
    wanted = np.broadcast_to(np.eye(2, 3), (still.sum(), 2, 3))
    np.testing.assert_allclose(inverse[still], wanted, atol=1e-6)
    sizes = np.asarray(told)[:, 2][np.asarray(told)[:, 2] != 0]
    np.testing.assert_allclose([sizes.mean(), sizes.std()], [0, 1], atol=0.1)


def test_an_example_is_augmented_by_its_own_key():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8))
    keys = jax.random.split(jax.random.key(1), 4)
    whole = augment.Augment(1.0)({"image": x}, keys)
    for i in range(4):
        one = augment.Augment(1.0)({"image": x[i : i + 1]}, keys[i : i + 1])
        for name in ("image", "augment"):
            np.testing.assert_allclose(one[name][0], whole[name][i], atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data.augment": 1.5}, r"data.augment=1.5 must lie in"),
        ({"data.flip": True}, r"data.augment=0.12 is of pictures"),
        ({"model.denoiser.augment_dim": 0}, r"model.denoiser.augment_dim=9"),
        ({"model.denoiser.resblock_updown": True}, "resblock_updown is nothing that DDPM"),
    ],
)
def test_what_cannot_be_augmented_is_refused(changed, words):
    config = edm_cifar10.get_config("smoke")
    config.update_from_flattened_dict(changed)
    with pytest.raises(ValueError, match=words):
        tasks.task(config)
