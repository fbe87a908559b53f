"""Wrappers of denoise: guidance, thresholds, inpainting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import gaussian, guidance, schedules
from diffusion.process.samplers import SAMPLERS, sample

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 2)), jnp.float32)
T = jnp.array([10, 500, 900])


def up(x, t):
    return 2 * x + 1


def down(x, t):
    return x * x


def test_guiding_x0_is_guiding_eps(x64):
    """CFG eq. 6 on eps, converted, equals ours on x0; s = 1 + w."""
    schedule, w = schedules.scaled_linear(), 2.5
    x = X.astype(jnp.float64)
    a, s = schedule.alpha(T), schedule.sigma(T)

    def to_eps(f):
        return gaussian.convert(f(x, T), "x0", "eps", x, a, s)

    eps = (1 + w) * to_eps(up) - w * to_eps(down)
    expected = gaussian.convert(eps, "eps", "x0", x, a, s)
    np.testing.assert_allclose(guidance.classifier_free(up, down, 1 + w)(x, T), expected)


def test_scale_one_is_conditional_and_zero_unconditional():
    np.testing.assert_allclose(guidance.classifier_free(up, down, 1)(X, T), up(X, T), atol=1e-6)
    np.testing.assert_allclose(guidance.classifier_free(up, down, 0)(X, T), down(X, T))


def test_scale_may_differ_by_example():
    scales = jnp.array([0.0, 1.0, 3.0])
    both = guidance.classifier_free(up, down, scales)(X, T)
    for i, s in enumerate(scales):
        alone = guidance.classifier_free(up, down, float(s))(X, T)
        np.testing.assert_allclose(both[i], alone[i], rtol=1e-5, atol=1e-5)


def test_interval_guides_inside_only():
    denoise = guidance.classifier_free(up, down, 4.0, interval=(500, 800))
    out, full = denoise(X, T), guidance.classifier_free(up, down, 4.0)(X, T)
    np.testing.assert_array_equal(out[0], up(X, T)[0])
    np.testing.assert_array_equal(out[1], full[1])
    np.testing.assert_array_equal(out[2], up(X, T)[2])


def test_guided_channels_are_the_first_and_the_others_the_conditional_ones():
    """DiT guides three of its four channels; here one of two."""
    found = guidance.classifier_free(up, down, 4.0, channels=1)(X, T)
    whole = guidance.classifier_free(up, down, 4.0)(X, T)
    np.testing.assert_array_equal(found[..., :1], whole[..., :1])
    np.testing.assert_array_equal(found[..., 1:], up(X, T)[..., 1:])
    assert np.abs(found - whole)[..., 1:].min() > 0


def test_rescale_brings_back_the_conditional_deviation():
    guided = guidance.classifier_free(up, down, 7.0, rescale=1.0)(X, T)
    np.testing.assert_allclose(guided.std(axis=(1, 2, 3)), up(X, T).std(axis=(1, 2, 3)), rtol=1e-5)
    plain = guidance.classifier_free(up, down, 7.0)(X, T)
    half = guidance.classifier_free(up, down, 7.0, rescale=0.7)(X, T)
    np.testing.assert_allclose(half, 0.7 * guided + 0.3 * plain, rtol=1e-4, atol=1e-4)


def test_clip_and_dynamic_threshold():
    clipped = guidance.clip_x0(up)(X, T)
    np.testing.assert_array_equal(clipped, np.clip(up(X, T), -1, 1))
    out = guidance.dynamic_threshold(up, 0.9)(X, T)
    for i in range(3):
        x0 = np.asarray(up(X, T)[i])
        s = max(np.quantile(np.abs(x0), 0.9), 1)
        np.testing.assert_allclose(out[i], np.clip(x0, -s, s) / s, rtol=1e-5, atol=1e-6)
    small = guidance.dynamic_threshold(lambda x, t: 0.01 * x)(X, T)
    np.testing.assert_allclose(small, 0.01 * X, rtol=1e-6)  # s is never below 1


def test_wrappers_pass_the_variance_output_on():
    def pair(x, t):
        return (up(x, t), 5 * x)

    def other(x, t):
        return (down(x, t), 7 * x)

    wrappers = (
        guidance.classifier_free(pair, other, 3.0, interval=(0, 600), rescale=0.5),
        guidance.clip_x0(pair),
        guidance.dynamic_threshold(pair),
        guidance.inpaint(pair, X, jnp.ones((4, 4, 1))),
        guidance.by_classifier(pair, lambda x, t: x.sum((1, 2, 3)), schedules.cosine(1000), 2.0),
    )
    for wrapper in wrappers:
        x0, variance = wrapper(X, T)
        np.testing.assert_array_equal(variance, 5 * X)
        assert x0.shape == X.shape


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "heun"])
def test_inpaint_ends_at_what_is_known(name, exact):
    schedule = schedules.cosine(100)
    known = jnp.clip(X, -1, 1)
    mask = jnp.zeros((4, 4, 1)).at[:2].set(1)
    s = SAMPLERS[name](schedule, 20)
    keys = jax.random.split(jax.random.key(0), 3)
    free = exact.denoiser(schedule)
    out = sample(s, guidance.inpaint(free, known, mask), X, keys)
    np.testing.assert_allclose(out[:, :2], known[:, :2], atol=1e-5)
    np.testing.assert_allclose(out[:, 2:], sample(s, free, X, keys)[:, 2:], atol=1e-5)


MEANS, STD = jnp.array([-1.5, 0.5]), 0.4  # of each class's N(mean, STD^2), both as likely


def of_class(schedule, x, t, means):
    """E[x_0 | x_t, y] and log p(x_t | y), up to what all classes share, of N(mean, STD^2)."""
    a, s = (gaussian.expand(f(t), x) for f in (schedule.alpha, schedule.sigma))
    variance = a**2 * STD**2 + s**2
    x0 = means + a * STD**2 / variance * (x - a * means)
    return x0, -0.5 * jnp.sum((x - a * means) ** 2 / variance, axis=1, keepdims=True)


def of_both(schedule):
    """The denoiser of the mixture, and its classifier."""

    def parts(x, t):
        return [of_class(schedule, x, t, mean) for mean in MEANS]

    def logits(x, t):
        return jnp.concatenate([log for _, log in parts(x, t)], axis=1)

    def denoise(x, t):
        share = jax.nn.softmax(logits(x, t))
        return sum(share[:, i : i + 1] * x0 for i, (x0, _) in enumerate(parts(x, t)))

    return denoise, logits


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_a_classifiers_gradient_makes_the_denoiser_of_its_class(name, x64):
    """Score of the mixture + grad log p(y | x_t) = score of the class, at every t and x_t."""
    schedule = {"cosine": schedules.cosine(1000), "edm": schedules.EDM()}[name]
    t = jnp.array([0.3, 2.0, 20.0]) if name == "edm" else T
    x, label = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2))), jnp.array([0, 1, 1])
    denoise, logits = of_both(schedule)

    def network(x, told):  # which EDM's is told otherwise
        if name != "edm":
            return logits(x, told)
        t = jnp.exp(4 * told)
        return logits(x * jnp.sqrt(t**2 + schedule.sigma_data**2)[:, None], t)

    log_p = guidance.log_probability(network, schedule, label)
    guided = guidance.by_classifier(denoise, log_p, schedule, 1.0)(x, t)
    wanted, _ = of_class(schedule, x, t, MEANS[label][:, None])
    np.testing.assert_allclose(guided, wanted, rtol=1e-9, atol=1e-9)
    # ADM's algorithm 2: eps - s sigma grad log p.
    a, s = (gaussian.expand(f(t), x) for f in (schedule.alpha, schedule.sigma))
    eps = (x - a * denoise(x, t)) / s - 3.0 * s * jax.grad(lambda x: log_p(x, t).sum())(x)
    thrice = guidance.by_classifier(denoise, log_p, schedule, jnp.full(3, 3.0))(x, t)
    np.testing.assert_allclose(thrice, (x - s * eps) / a, rtol=1e-9, atol=1e-9)


def test_guided_samples_are_of_the_class():
    schedule = schedules.cosine(1000)
    denoise, logits = of_both(schedule)
    label = jnp.tile(jnp.array([0, 1]), 1000)
    log_p = guidance.log_probability(logits, schedule, label)
    guided = guidance.by_classifier(denoise, log_p, schedule, 1.0)
    keys, x = (
        jax.random.split(jax.random.key(0), 2000),
        jax.random.normal(jax.random.key(1), (2000, 2)),
    )
    found = sample(SAMPLERS["ddim"](schedule, 50), guided, x, keys)
    for i, mean in enumerate(MEANS):
        mine = np.asarray(found[label == i])
        np.testing.assert_allclose(mine.mean(0), mean, atol=0.05)
        np.testing.assert_allclose(mine.std(0), STD, atol=0.03)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: guidance.classifier_free(up, down, 2, interval=(5, 1)),
            r"^interval=\(5, 1\), but low",
        ),
        (lambda: guidance.classifier_free(up, down, 2, rescale=1.5), r"^rescale=1\.5"),
        (lambda: guidance.classifier_free(up, down, 2, channels=-1), r"^channels=-1"),
        (lambda: guidance.dynamic_threshold(up, 0.0), r"^percentile=0\.0.*\(0, 1\]"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
