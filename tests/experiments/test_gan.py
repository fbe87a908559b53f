"""The GAN beside the diffusion model: its losses, and the command on the smoke job."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.gan import __main__ as gan
from experiments.gan import measure, model, train
from experiments.host import cli

SMALL = model.Gan(width=4, gamma=3.0, learning_rate=1e-3)


def test_the_critics_loss_is_equation_1():
    state = SMALL.init(jax.random.key(0))
    real, fake = jax.random.normal(jax.random.key(1), (2, 3, 8, 8, 4))
    critic = state["params"]["critic"]

    def score(x):
        return model.Critic(4).apply(critic, x[None])[0]

    def slope(x):
        return float(jnp.square(jax.jacrev(score)(x)).sum())

    scores = [[float(score(x)) for x in batch] for batch in (real, fake)]
    lost = np.mean([np.log1p(np.exp(f - r)) for r, f in zip(*scores, strict=True)])
    steep = sum(np.mean([slope(x) for x in batch]) for batch in (real, fake))
    found = SMALL.critic_loss(critic, fake, real)
    assert found == pytest.approx(lost + 1.5 * steep, rel=1e-5)
    assert steep > 0.01  # the penalty counts


def test_a_step_moves_each_network_down_its_own_loss():
    state = SMALL.init(jax.random.key(0))
    real = jax.random.normal(jax.random.key(1), (8, 8, 8, 4)) + 2
    key = jax.random.key(2)
    z = jax.random.normal(key, (2, 8, model.NOISE))
    after = jax.jit(SMALL.step)(state, real, key)
    fake = model.Generator(4).apply(state["params"]["generator"], z[0])
    critics = [s["params"]["critic"] for s in (state, after)]
    before, then = (SMALL.critic_loss(critic, fake, real) for critic in critics)
    assert then < before
    generators = [s["params"]["generator"] for s in (state, after)]
    losses = [SMALL.generator_loss(g, critics[1], z[1], real) for g in generators]
    assert losses[1] < losses[0]
    moved = jax.tree.map(
        lambda old, new, average: np.allclose(average, old + 1e-3 * (new - old), atol=1e-6),
        generators[0],
        generators[1],
        after["ema"],
    )
    assert all(jax.tree.leaves(moved))


def test_time_is_the_processors():
    def advance(state, step):
        assert state == step
        sum(range(100_000))
        return state + 1

    state, steps, secs = train.timed(advance, 0, 0.05)
    assert state == steps > 1 and 0.05 <= secs < 1


def test_what_occurs_is_counted():
    found = {name: np.zeros(4, np.int32) for name in ("background", "size", "place")}
    # (0, red) twice, once elsewhere; (1, blue), which is held out; a picture without a digit
    found |= {"digit": np.array([0, 0, 1, 2]), "colour": np.array([0, 0, 2, -1])}
    found["place"] = np.array([0, 3, 0, 0])
    counted = measure.occurring(found)
    assert (counted["pairs"], counted["combinations"]) == (1, 2)
    assert counted["rarest_digit"] == 0


def test_both_are_trained_measured_and_kept(job, tmp_path, capsys):
    argv = [
        "--config=configs/digits_gan.py:smoke",
        f"--config.data.dir={job}/latents",
        f"--config.latents.first_stage={job}/autoencoder",
        f"--config.latents.data_dir={job}/data",
        "--config.latents.epochs=1",
        f"--classifier={job}/classifier",
        "--seeds=1",
        "--minutes=0.002",
        "--num=8",
        "--width=4",
        f"--out={tmp_path}",
    ]
    assert cli.run(gan.define, gan.main, argv) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for name in gan.MODELS:
        assert results[name]["0"]["steps"] > 0
        assert np.isfinite(results[name]["0"]["frechet_distance"])
    assert (
        results["data"]["0"].keys() < results["gan"]["0"].keys() == results["diffusion"]["0"].keys()
    )
    assert "| gan | " in capsys.readouterr().out
    kept = (tmp_path / "gan_0.png").stat().st_mtime_ns
    assert cli.run(gan.define, gan.main, argv) == 0  # nothing is made again
    assert (tmp_path / "gan_0.png").stat().st_mtime_ns == kept
    for wrong, words in (
        ("--num=100000", "--num=100000 takes 200000 pictures, but there are 4500"),
        (f"--config.latents.first_stage={tmp_path}/no", f"latents.first_stage={tmp_path}/no holds"),
        ("--minutes=0.003", "holds results of {'minutes': 0.002, 'num': 8, 'width': 4"),
        (f"--classifier={job}/ldm", f"--classifier={job}/ldm holds a run with task='denoiser'"),
    ):
        assert cli.run(gan.define, gan.main, [*argv, wrong]) == 2
        assert words in capsys.readouterr().err
