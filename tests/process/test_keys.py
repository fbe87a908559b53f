"""One key an example, step and purpose."""

import jax
import numpy as np

from diffusion.process import keys as ks


def test_no_two_examples_steps_or_purposes_share_a_key():
    rng = jax.random.key_data(jax.random.key(0))
    position = jax.numpy.arange(5)
    purposes = (ks.DATA, ks.TIMES, ks.DROPOUT, ks.CAPTION, ks.POSTERIOR)
    found = [
        jax.random.key_data(ks.stream(ks.example_keys(rng, jax.numpy.int32(step), position), p))
        for step in range(3)
        for p in purposes
    ]
    rows = np.concatenate(found)
    assert len(np.unique(rows, axis=0)) == len(rows) == 5 * 3 * len(purposes)


def test_an_examples_key_depends_on_its_position_alone():
    rng = jax.random.key_data(jax.random.key(0))
    whole = ks.example_keys(rng, jax.numpy.int32(1), jax.numpy.arange(6))
    part = ks.example_keys(rng, jax.numpy.int32(1), jax.numpy.array([4, 1]))
    np.testing.assert_array_equal(
        jax.random.key_data(part), jax.random.key_data(whole)[np.array([4, 1])]
    )
    noise = ks.normal(whole, (6, 3))
    np.testing.assert_array_equal(ks.normal(part, (2, 3)), noise[np.array([4, 1])])
