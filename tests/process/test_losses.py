"""Objectives against their papers' formulas; the draws of t and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.process import gaussian, likelihood, losses, schedules
from diffusion.process import keys as ks

DDPM, EDM, FLOW = schedules.ddpm_linear(), schedules.edm(), schedules.flow()
DATA = np.random.default_rng(0).normal(size=(2, 4, 5, 3, 2))
STEPS = jnp.array([1, 200, 600, 999])


def clean():
    return jnp.asarray(DATA[0])  # made in the test, in its precision


def unit():
    return jnp.asarray(DATA[1])


def network(x, t):
    return jnp.tanh(x) + 0.1


def per_example(x):
    return jnp.mean(x.reshape(x.shape[0], -1), axis=1)


def noised(schedule, t):
    return gaussian.q_sample(schedule, clean(), t, unit())


def estimate(schedule, prediction, t):
    """The x0 of ``network`` read as this prediction."""
    return gaussian.make_denoise(network, schedule, prediction)(noised(schedule, t), t)


def test_simple_loss_is_ddpm_equation_14(x64):
    loss, aux = losses.objective(DDPM)(network, clean(), STEPS, unit())
    bar = DDPM.alpha_bar[STEPS].reshape(4, 1, 1, 1)
    x_t = np.sqrt(bar) * clean() + np.sqrt(1 - bar) * unit()
    expected = np.mean((unit() - np.tanh(x_t) - 0.1) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(aux["mse"], expected, rtol=1e-12)
    l1, _ = losses.objective(DDPM, norm="l1")(network, clean(), STEPS, unit())
    expected = np.mean(np.abs(unit() - np.tanh(x_t) - 0.1), axis=(1, 2, 3))
    np.testing.assert_allclose(l1, expected, rtol=1e-12)


@pytest.mark.parametrize("prediction", gaussian.PREDICTIONS)
def test_min_snr_weighs_x0_by_the_capped_snr(prediction, x64):
    """min(SNR, gamma) on the error of x0, whatever is predicted (Min-SNR §3.4)."""
    objective = losses.objective(DDPM, prediction, weighting="min_snr", gamma=3)
    loss, _ = objective(network, clean(), STEPS, unit())
    snr = np.exp(DDPM.logsnr(np.asarray(STEPS)))
    expected = np.minimum(snr, 3) * per_example((estimate(DDPM, prediction, STEPS) - clean()) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)


def test_min_snr_factors_are_the_published_ones(x64):
    snr = np.array([0.01, 1.0, 4.9, 100.0])
    a, s = jnp.asarray(np.sqrt(snr / (1 + snr))), jnp.asarray(np.sqrt(1 / (1 + snr)))

    def factor(prediction):
        return losses.weight("min_snr", prediction, a, s, 5.0)

    np.testing.assert_allclose(factor("eps"), np.minimum(snr, 5) / snr)
    np.testing.assert_allclose(factor("v"), np.minimum(snr, 5) / (snr + 1))
    np.testing.assert_allclose(factor("x0"), np.minimum(snr, 5))


@pytest.mark.parametrize("prediction", ["eps", "x0", "edm"])
def test_edm_weighting_is_edm_equation_8(prediction, x64):
    t = jnp.array([0.01, 0.5, 3.0, 40.0])
    loss, _ = losses.objective(EDM, prediction, weighting="edm")(network, clean(), t, unit())
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    expected = weight * per_example((estimate(EDM, prediction, t) - clean()) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)


def test_edm_weighting_of_f_is_one(x64):
    t = jnp.array([0.01, 0.5, 3.0, 40.0])
    weighed, aux = losses.objective(EDM, "edm", weighting="edm")(network, clean(), t, unit())
    np.testing.assert_allclose(weighed, aux["mse"], rtol=1e-12)
    simple, _ = losses.objective(EDM, "edm")(network, clean(), t, unit())
    np.testing.assert_allclose(simple, aux["mse"])


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_the_velocitys_weighting_is_the_velocitys_error(prediction, x64):
    """JiT: (x0's error / max(t, 0.05))^2 on the linear path, whatever is predicted."""
    t = jnp.array([0.02, 0.05, 0.4, 1.0])
    found, _ = losses.objective(FLOW, prediction, weighting="velocity")(network, clean(), t, unit())
    error = per_example((estimate(FLOW, prediction, t) - clean()) ** 2)
    np.testing.assert_allclose(found, error / np.maximum(t, 0.05) ** 2, rtol=1e-9)


def test_the_angle_is_added_over_channels(x64):
    """LightningDiT: orthogonal channels cost 1, opposite ones 2, parallel ones nothing."""
    x0, t = jnp.zeros((3, 2, 2, 2)), jnp.full(3, 0.5)
    noise = jnp.broadcast_to(jnp.array([1.0, 0.0]), x0.shape)  # the velocity as well
    said = jnp.array([[0.0, 3.0], [-2.0, 0.0], [0.5, 0.0]])[:, None, None]

    def added(network):
        with_it, without = (
            losses.objective(FLOW, "velocity", cosine=c)(network, x0, t, noise)[0] for c in (0.5, 0)
        )
        return with_it - without

    np.testing.assert_allclose(added(lambda x, c: said + 0 * x), [0.5, 1.0, 0.0], atol=1e-12)
    # A network starts at zero, where the angle has no gradient, and no NaN.
    grad = jax.grad(lambda a: added(lambda x, c: a[None, None, None] + 0 * x).sum())(jnp.zeros(2))
    assert np.isfinite(grad).all()


def test_flow_matching_is_the_squared_error_of_the_velocity(x64):
    t = jnp.array([0.0, 0.3, 0.7, 1.0])
    seen = {}

    def spy(x, c):
        seen.update(x=x, c=c)
        return network(x, c)

    loss, _ = losses.objective(FLOW, "velocity")(spy, clean(), t, unit())
    wide = t.reshape(4, 1, 1, 1)
    x_t = (1 - wide) * clean() + wide * unit()
    np.testing.assert_allclose(seen["x"], x_t)
    np.testing.assert_allclose(seen["c"], 1000 * t)
    expected = per_example((unit() - clean() - network(x_t, t)) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_vlb_is_t_times_the_bound_s_term(variance, x64):
    """DDPM eq. 8 and 13 written out from the betas, in bits/dim times T.

    KL = log(s / q) + (q^2 + (mean difference)^2) / (2 s^2) - 1/2, q the posterior's deviation, s
    the model's; the means differ by the coefficient of x0 in eq. 7 times the error of x0.
    """
    t = np.array([0, 200, 600, 999])
    objective = losses.objective(DDPM, "eps", weighting="vlb", variance=variance)
    loss, _ = objective(network, clean(), jnp.asarray(t), unit())
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    a, s = np.sqrt(bar)[t, None, None, None], np.sqrt(1 - bar)[t, None, None, None]
    x_t = a * DATA[0] + s * DATA[1]
    x0 = (x_t - s * (np.tanh(x_t) + 0.1)) / a
    posterior = np.append(np.nan, (1 - bar[:-1]) / (1 - bar[1:]) * beta[1:])
    posterior[0] = posterior[1]  # of the first step, as the authors have it
    model = posterior if variance == "fixed_small" else np.append(posterior[1], beta[1:])
    expected = np.empty(4)
    for i, step in enumerate(t):
        q, v = posterior[step], model[step]
        if step:
            shift = np.sqrt(bar[step - 1]) * beta[step] / (1 - bar[step]) * (x0[i] - DATA[0, i])
            nats = 0.5 * (np.log(v / q) + (q + shift**2) / v - 1)
        else:  # the posterior's mean is x0 itself
            edges = (DATA[0, i] - x0[i] + np.array([[[[1]]], [[[-1]]]]) / 255) / np.sqrt(v)
            upper, lower = (
                (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2 for z in edges
            )
            inside = np.where(DATA[0, i] > 0.999, 1 - lower, upper - lower)
            mass = np.where(DATA[0, i] < -0.999, upper, inside)
            nats = -np.log(np.maximum(mass, 1e-12))
        expected[i] = 1000 * nats.mean() / np.log(2)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)


def double(scale):
    return lambda x, t: jnp.concatenate([jnp.tanh(scale * x) + 0.1, jnp.sin(scale * x)], axis=-1)


def test_hybrid_is_simple_plus_a_thousandth_of_the_bound(x64):
    """Improved DDPM eq. 16; the bound trains the variance only."""
    hybrid = losses.objective(DDPM, variance="learned")
    loss, aux = hybrid(double(1.0), clean(), STEPS, unit())
    simple, _ = losses.objective(DDPM)(network, clean(), STEPS, unit())
    np.testing.assert_allclose(loss, simple + 0.001 * aux["vlb"], rtol=1e-12)
    x_t, x0 = noised(DDPM, STEPS), estimate(DDPM, "eps", STEPS)
    v = jnp.sin(x_t)
    term = likelihood.bound_term(DDPM, clean(), x_t, STEPS, x0, "learned", v)
    np.testing.assert_allclose(aux["vlb"], 1000 * term, rtol=1e-12)

    def total(weights, objective):
        def output(x, t):
            return jnp.concatenate(
                [weights[0] * jnp.tanh(x) + 0.1, weights[1] * jnp.sin(x)], axis=-1
            )

        return objective(output, clean(), STEPS, unit())[0].sum()

    def plain(w):
        return losses.objective(DDPM)(lambda x, t: w * jnp.tanh(x) + 0.1, clean(), STEPS, unit())[
            0
        ].sum()

    grads = jax.grad(total)(jnp.ones(2), hybrid)
    np.testing.assert_allclose(grads[0], jax.grad(plain)(1.0), rtol=1e-10)
    assert abs(grads[1]) > 0
    vlb = losses.objective(DDPM, weighting="vlb", variance="learned")
    both = jax.grad(total)(jnp.ones(2), vlb)
    np.testing.assert_allclose(both[1], 1000 * grads[1], rtol=1e-9)
    assert abs(both[0]) > 0


def test_learned_variance_spans_the_posterior_s_and_beta(x64):
    """v = -1 is fixed_small, v = +1 is beta (Improved DDPM eq. 15)."""
    x_t, x0 = noised(DDPM, STEPS), estimate(DDPM, "eps", STEPS)

    def term(*args):
        return likelihood.bound_term(DDPM, clean(), x_t, STEPS, x0, *args)

    ones = jnp.ones_like(clean())
    np.testing.assert_allclose(term("learned", -ones), term("fixed_small"), rtol=1e-10)
    np.testing.assert_allclose(term("learned", ones), term("fixed_large"), rtol=1e-10)


# Draws -------------------------------------------------------------------------------------------

KEYS = jax.random.split(jax.random.key(0), 4096)


def small_draw(schedule, **options):
    return np.asarray(losses.draw(KEYS, schedule, jnp.zeros((4096, 1)), **options)[0])


def test_times_have_their_distributions():
    t = small_draw(DDPM)
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() <= 999
    assert np.bincount(t // 100, minlength=10).min() > 300  # 410 expected, deviation 19
    assert np.unique(t).size > 900
    sigma = small_draw(EDM)
    np.testing.assert_allclose(np.log(sigma).mean(), -1.2, atol=5 * 1.2 / 64)
    np.testing.assert_allclose(np.log(sigma).std(), 1.2, rtol=0.06)
    u = small_draw(FLOW)
    np.testing.assert_allclose([u.mean(), u.std()], [0.5, np.sqrt(1 / 12)], atol=0.02)
    shifted = schedules.flow(p_mean=0.5, p_std=0.8)
    for drawn in (
        small_draw(FLOW, times="logit_normal", mean=0.5, std=0.8),
        small_draw(shifted, times="logit_normal"),
    ):
        z = np.log(drawn / (1 - drawn))
        np.testing.assert_allclose([z.mean(), z.std()], [0.5, 0.8], atol=0.05)


def test_noise_is_unit_and_apart_from_t():
    t, noise = losses.draw(KEYS, FLOW, jnp.zeros((4096, 2)))
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.04)
    assert abs(np.corrcoef(t, noise[:, 0])[0, 1]) < 0.07
    # nor is it the noise of the bare keys, with which a sampler starts
    assert not np.allclose(noise, ks.normal(KEYS, noise.shape))


# Resampling --------------------------------------------------------------------------------------


def test_second_moment_resampler():
    schedule = schedules.ddpm_linear(4)
    history = losses.second_moment_history(schedule, length=2)
    np.testing.assert_allclose(losses.second_moment_probabilities(history), 0.25)
    t = jnp.array([0, 1, 2, 3, 0, 1, 2, 0])
    values = jnp.array([9.0, 1, 2, 3, 4, 1, 2, 4])
    history = losses.second_moment_update(history, t, values)
    np.testing.assert_array_equal(history[0], [4, 4])  # 9 dropped out
    np.testing.assert_allclose(losses.second_moment_probabilities(history), 0.25)  # 3 seen once
    history = losses.second_moment_update(history, jnp.array([3]), jnp.array([3.0]))
    p = losses.second_moment_probabilities(history, uniform=0.01)
    np.testing.assert_allclose(p, 0.99 * np.array([4, 1, 2, 3]) / 10 + 0.0025, rtol=1e-6)
    drawn, weights = losses.resampled_times(KEYS, p)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4096, p, atol=0.03)
    np.testing.assert_allclose(weights, 1 / (4 * p[drawn]), rtol=1e-6)
    np.testing.assert_allclose(weights.mean(), 1, atol=0.05)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: losses.objective(DDPM, "epsilon"), r"^prediction='epsilon'.*eps, x0"),
        (lambda: losses.objective(DDPM, norm="l3"), r"^norm='l3'.*l2, l1"),
        (lambda: losses.objective(DDPM, weighting="snr"), r"^weighting='snr'.*min_snr"),
        (lambda: losses.objective(DDPM, variance="free"), r"^variance='free'"),
        (lambda: losses.objective(DDPM, norm="l1", weighting="vlb"), "'l1' with.*'vlb'"),
        (lambda: losses.objective(FLOW, "v", weighting="vlb"), "Flow has no posterior"),
        (lambda: losses.objective(FLOW, "eps"), "'eps' cannot give x0"),
        (
            lambda: losses.objective(schedules.zero_terminal_snr(DDPM), "eps"),
            "'eps' cannot give x0.*predict 'v'",
        ),
        (lambda: small_draw(DDPM, times="lognormal"), "'lognormal'.*not for Discrete"),
        (lambda: small_draw(EDM, times="logit_normal"), "'logit_normal'.*EDM"),
        (lambda: small_draw(DDPM, times="logit_normal"), "'logit_normal'.*Discrete"),
        (lambda: small_draw(DDPM, times="often"), r"^times='often' is unknown"),
        (
            lambda: losses.objective(DDPM)(double(1.0), clean(), STEPS, unit()),
            "4 output channels for 2.*fixed variance needs 2",
        ),
        (
            lambda: losses.objective(DDPM, variance="learned")(network, clean(), STEPS, unit()),
            "2 output channels for 2.*learned variance needs 4",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_a_mean_is_read_as_the_x0_that_it_is_of(variance, x64):
    """mu-prediction (DDPM section 3.2): the error of the posterior's mean, and the same bound."""
    channels = 2 if variance == "learned" else 1

    def means(x, t):
        return jnp.concatenate([network(x, t)] * channels, axis=-1)

    def told(x, t):
        """The same as a prediction of x0."""
        tables = gaussian.posterior_tables(DDPM)
        of_x, of_x0 = (tables[name][np.asarray(t)].reshape(-1, 1, 1, 1) for name in ("x", "x0"))
        x0 = (network(x, t) - of_x * x) / of_x0
        return jnp.concatenate([x0, *[network(x, t)] * (channels - 1)], axis=-1)

    steps, x_t = jnp.array([0, 200, 600, 999]), noised(DDPM, jnp.array([0, 200, 600, 999]))
    how = {"variance": variance, "weighting": "vlb"}
    for prediction, net in (("mu", means), ("x0", told)):
        bound, aux = losses.objective(DDPM, prediction, **how)(net, clean(), steps, unit())
        if prediction == "mu":
            mean, _ = gaussian.posterior(DDPM, clean(), x_t, steps)
            np.testing.assert_allclose(aux["mse"], per_example((mean - network(x_t, steps)) ** 2))
            first = bound
    np.testing.assert_allclose(first, bound, rtol=1e-9)
    learned = {"learned_variance": variance == "learned"}
    found, wanted = (
        gaussian.make_denoise(net, DDPM, prediction, **learned)(x_t, steps)
        for prediction, net in (("mu", means), ("x0", told))
    )
    jax.tree.map(np.testing.assert_allclose, found, wanted)
    with pytest.raises(ValueError, match="has no posterior per step"):
        gaussian.make_denoise(means, EDM, "mu")
    with pytest.raises(ValueError, match="weighting='min_snr' is of other predictions"):
        losses.objective(DDPM, "mu", weighting="min_snr")


@pytest.mark.parametrize("given", [{"weighting": "vlb"}, {"prediction": "mu"}])
def test_an_angle_that_would_not_count_is_refused(given):
    with pytest.raises(ValueError, match=r"cosine=1\.0 has no angle"):
        losses.objective(schedules.ddpm_linear(10), **{"prediction": "eps", "cosine": 1.0, **given})
