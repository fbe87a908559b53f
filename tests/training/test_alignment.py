"""REPA's alignment: its loss in closed form, its task, and a run of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits_classifier, repa
from diffusion.models.image_encoder import DigitClassifier
from diffusion.process import gaussian
from diffusion.process import keys as ks
from diffusion.training import alignment
from diffusion.training.denoiser import Denoiser
from experiments import train
from experiments.run import aligned, build, generate, networks, tasks


def config_of(kind="transformer"):
    """On pixels, without captions."""
    config = repa.get_config("digits,smoke")
    config.data.update(name="folder", image_size=8, flip=True, eval_split="train")
    config.conditioning.drop = 0.0
    config.init_from, config.init_networks = "", ()
    del config.model.autoencoder, config.model.text_encoder, config.online
    more = {"registers": 2, "cross": False, "pool_context": False, "size": 8, "out_channels": 3}
    config.model.denoiser.update(more)
    return config


@pytest.fixture(scope="module")
def task():
    """Tiny; and parameters of every network, those that start at zero too."""
    config = config_of()
    made = tasks.task(config)
    shapes, rng = jax.eval_shape(made.networks_init, jax.random.key(0)), np.random.default_rng(1)
    random = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    return config, made, jax.tree.map(random, shapes)


def test_the_cosine_is_that_of_each_token():
    z = jnp.array([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]]])
    y = jnp.array([[[1.0, 0.0], [0.0, -5.0], [1.0, 0.0], [1.0, 2.0]]])
    np.testing.assert_allclose(alignment.cosine(z, y), [(1 - 1 + 0.5**0.5 + 0) / 4], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda z: alignment.cosine(z, y)[0])(z)).all()


def test_the_loss_is_the_denoisers_less_the_weighted_cosine(task):
    """Tokens, features and cosine by hand, of mirrored pictures too."""
    config, made, params = task
    image = jax.random.randint(jax.random.key(2), (6, 8, 8, 3), 0, 256).astype(jnp.uint8)
    keys, batch = jax.random.split(jax.random.key(3), 6), {"image": image}
    plain = Denoiser(**{f.name: getattr(made, f.name) for f in dataclasses.fields(Denoiser)})

    @jax.jit
    def all_four(params):
        ways = [(m, train) for train in (True, False) for m in (plain, made)]
        return [m.loss(params, {}, batch, keys, train)[0] for m, train in ways]

    *losses, held_out, ours_held_out = all_four(params)
    np.testing.assert_array_equal(held_out, ours_held_out)
    x0 = made.clean(params, {}, batch, keys, True)
    assert 0 < sum(bool((a == b).all()) for a, b in zip(x0, image / 127.5 - 1)) < 6
    t, noise = made.draw(ks.stream(keys, ks.TIMES), x0, 0)
    x_t = gaussian.q_sample(build.schedule(config), x0, t, noise)
    variables = {"params": params["denoiser"]}
    _, seen = made.network.apply(variables, x_t, t, capture_intermediates=True)
    tokens = seen["intermediates"]["blocks_0"]["__call__"][0][:, 2:]  # less the registers
    y = made.features.apply({"params": params["features"]}, x0, (4, 4), method="feature_map")
    z = alignment.Projector(32, 96).apply({"params": params["projector"]}, tokens)
    z, y = (np.asarray(v, np.float64).reshape(6, 16, 96) for v in (z, y))
    cos = (z * y).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(losses[0] - losses[1], 0.5 * cos.mean(1), rtol=1e-4, atol=1e-5)
    config.parallel.remat = "full"
    again = jax.jit(tasks.task(config).loss, static_argnums=4)(params, {}, batch, keys, True)[0]
    np.testing.assert_allclose(again, losses[1], rtol=1e-5)


def test_features_of_a_classifier_lie_where_the_picture_has_them():
    """One place of its map moves with the picture by as many pixels as the strides make."""
    module = DigitClassifier(widths=(4, 6), window=0)
    x = jax.random.normal(jax.random.key(0), (1, 16, 24, 3))
    params = module.init(jax.random.key(1), x, (4, 6), method="feature_map")["params"]
    own = module.apply({"params": params}, x, (4, 6), method="feature_map")
    moved = module.apply({"params": params}, jnp.roll(x, 4, 2), (4, 6), method="feature_map")
    np.testing.assert_allclose(moved[:, 1:-1, 2:-1], own[:, 1:-1, 1:-2], atol=1e-5)
    twice = module.apply({"params": params}, x, (8, 12), method="feature_map")
    assert twice.shape == (1, 8, 12, 6)


def test_mmdits_tokens_are_its_patches():
    network = build.MMDiT(3, 2, 24, 2, 2, size=8, grid=4, pool="mean")
    x, words = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 5, 7))

    def tokens(key):
        watched = alignment.Watched(network, "blocks_0")
        watched.apply(network.init(key, x, jnp.ones(2), words), x, jnp.ones(2), words)
        return watched.tokens

    assert jax.eval_shape(tokens, jax.random.key(0)).shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("align", {"block": 3}, r"align\.block=3 must be one of the 1\.\.2"),
        ("data", {"name": "latents"}, "data.name='latents', which has no pictures"),
        ("align", {"width": 0, "block": 1}, r"projector_width=0|align\.width=0"),
        ("align", {"weight": 0.0, "features": "runs/x"}, "align.weight=0, which aligns nothing"),
        ("align", {"weight": -1.0}, r"align\.weight=-1\.0 with nothing else amiss"),
        ("model", {"denoiser": {"kind": "unet", "out_channels": 3}}, "kind='unet', which has no"),
        ("process", {"method": "meanflow"}, "process.method='meanflow'"),
    ],
)
def test_what_cannot_be_aligned_is_refused(section, change, said):
    config = config_of()
    config[section].update(change)
    with pytest.raises(ValueError, match=said):
        (tasks.task if "block" in change else aligned.denoiser)(config)


def test_a_run_learns_the_projection_and_keeps_the_features_frozen(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    judge = digits_classifier.get_config("smoke")
    judge.train.update(steps=1, save_every_steps=1)
    judge.evaluation.every_steps = 0
    config = config_of()
    for made in (judge, config):
        made.data.update(name="folder", dir=str(tmp_path / "data"), image_size=8)
    config.align.features = str(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"align\.features=.* is no folder"):
        aligned.frozen(config)
    assert train.train(judge.lock(), tmp_path / "judge")
    assert train.train(config.lock(), tmp_path / "run")
    params = networks.load(tmp_path / "run", "raw").params
    assert params.keys() == {"denoiser", "projector"}
    kept = tmp_path / "run" / aligned.KEPT
    kept.write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"features\.json is of the features .* holds others now"):
        train.train(config.lock(), tmp_path / "run")
    assert np.abs(params["projector"]["layer_2"]["bias"]).max() > 0  # it began at zero
    images = list(generate.load(tmp_path / "run").pipeline.images({}, 2))
    assert images[0].shape == (2, 8, 8, 3)
    other = config_of()
    other.align.features, other.model.features.widths = config.align.features, (8, 8)
    with pytest.raises(ValueError, match=r"has widths=.*, but model.features.widths=\(8, 8\)"):
        aligned.frozen(other)
