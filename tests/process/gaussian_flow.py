"""The flow of Gaussian data N(MEAN, STD^2), in closed form, and networks that know it."""

import jax.numpy as jnp
import numpy as np

from diffusion.process import gaussian, schedules

MEAN, STD = 0.3, 0.6
SCHEDULES = {
    "flow": schedules.Flow(),
    "edm": schedules.EDM(),
    "trigflow": schedules.TrigFlow(),
    "discrete": schedules.scaled_linear(100),
}
PAIRS = {
    "flow": [(0.9, 0.1), (0.7, 0.5), (0.4, 0.4), (1.0, 0.0)],
    "edm": [(20.0, 0.1), (2.0, 0.5), (0.4, 0.4), (0.3, 0.01)],
    "trigflow": [(1.5, 0.1), (1.2, 0.5), (0.8, 0.8), (0.3, 0.01)],
    "discrete": [(99.0, 1.5), (60.0, 30.25), (44.4, 44.4), (30.0, 0.0)],
}


def levels(schedule, t, like):
    return [gaussian.expand(jnp.asarray(f(t)), like) for f in (schedule.alpha, schedule.sigma)]


def transported(schedule, x, t, s, mean=MEAN, std=STD):
    """x_s on the path of x_t: its place in N(alpha mean, alpha^2 std^2 + sigma^2) stays."""
    (a, b), (c, d) = (levels(schedule, time, x) for time in (t, s))
    return c * mean + jnp.sqrt((c**2 * std**2 + d**2) / (a**2 * std**2 + b**2)) * (x - a * mean)


def velocity(schedule, x, t, mean=MEAN, std=STD):
    """E[eps - x_0 | x_t]."""
    a, b = levels(schedule, t, x)
    x0 = mean + a * std**2 / (a**2 * std**2 + b**2) * (x - a * mean)
    return (x - a * x0) / b - x0


def average(schedule, x, t, s, mean=MEAN, std=STD):
    """(y_t - y_s) / (tau_t - tau_s), the velocity at s = t."""
    (a, b), (c, d) = (levels(schedule, time, x) for time in (t, s))
    tau, end = b / (a + b), d / (c + d)
    moved = x / (a + b) - transported(schedule, x, t, s, mean, std) / (c + d)
    gap = jnp.where(tau == end, 1.0, tau - end)
    return jnp.where(tau == end, velocity(schedule, x, t, mean, std), moved / gap)


def exact(schedule, prediction, wrong=0.0, clean=False):
    """The network of this prediction with the closed form, `wrong` times a feature beside it.

    `clean`: the consistency function, whose x_0 is where the flow ends. Not told its condition, it
    knows N(-mean, std^2). EDM's conditioning is undone here.
    """

    def network(x, t, s=None, told=True, teacher=False):
        if type(schedule) is schedules.EDM:
            t, s = jnp.exp(4 * t), None if s is None else jnp.exp(4 * s)
        else:
            scale = getattr(schedule, "time_scale", 1)
            t, s = t / scale, None if s is None else s / scale
        a, b = levels(schedule, t, x)
        if prediction == "edm":
            x = x * jnp.sqrt(b**2 + a**2 * schedule.sigma_data**2)
        mean = MEAN if told else -MEAN
        u = velocity(schedule, x, t, mean) if s is None else average(schedule, x, t, s, mean)
        if clean:
            end = mean + STD / jnp.sqrt(a**2 * STD**2 + b**2) * (x - a * mean)
            u = (x - (a + b) * end) / b
        u = u if teacher else u + wrong * (x / (a + b) - 0.2)
        return gaussian.convert(u, "velocity", prediction, x, a, b, schedule.sigma_data)

    return network


def drawn(kind, count, seed=0):
    """x0 and noise (count, 4), and times (count, 2)."""
    rng = np.random.default_rng(seed)
    x0, noise = (jnp.asarray(rng.normal(size=(count, 4))) for _ in range(2))
    pairs = np.array(PAIRS[kind])
    return MEAN + STD * x0, jnp.asarray(np.resize(pairs, (count, 2))), noise
