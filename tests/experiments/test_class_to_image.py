"""Class to image through the commands: LDM's embedding of labels, its null class and guidance."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ldm_imagenet256
from experiments import sample
from experiments.convert import __main__ as convert
from experiments.convert import reading
from experiments.run import build, tasks


def drawn(shapes, rng):
    """Random parameters of these shapes, the variance of what passes through about kept."""

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        if len(leaf.shape) == 1:
            return np.asarray(1 + 0.1 * noise, np.float32)
        return np.asarray(noise * np.prod(leaf.shape[:-1]) ** -0.5, np.float32)

    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def classes():
    """LDM's class-conditional model, tiny, its parameters random; five classes and the null one."""
    config = ldm_imagenet256.get_config("f4,smoke")
    config.data.image_size = 32
    config.model.class_embedder.num_classes = 6
    config.model.denoiser.update({"multipliers": (1,), "attention": (True,)})
    config.model.autoencoder.num_codes = 32
    rng, key = np.random.default_rng(0), jax.random.key(0)
    shapes = jax.eval_shape(tasks.task(config).networks_init, key)
    image = np.zeros((1, 32, 32, 3), np.float32)
    first = build.autoencoder(config.model.autoencoder)
    shapes["autoencoder"] = jax.eval_shape(first.init, key, image)["params"]
    params = drawn(shapes, rng)
    params["class_embedder"]["embedding"]["embedding"] *= 5  # so that a class is well seen
    return config, params


def of_classes(sd, classes, folder, change=None):
    """A function from flags to the pictures of a workdir with those parameters, `change`d."""
    config, params = classes
    if change is not None:
        table = np.array(params["class_embedder"]["embedding"]["embedding"])
        params = {**params, "class_embedder": {"embedding": {"embedding": change(table)}}}
    parts = reading.Parts(ConfigDict(config.to_dict()), params)
    convert.write_workdir(folder / "run", parts)

    def run(name, *argv):
        return sd.sampled(folder / "run", folder / name, "--num=3", "--steps=4", *argv)

    return run


def test_class_to_image(sd, classes, tmp_path):
    """A label is the row of the embedding: rows exchanged, the pictures of their classes are."""
    run = of_classes(sd, classes, tmp_path / "a")
    swapped = of_classes(sd, classes, tmp_path / "b", lambda table: table[[0, 2, 1, 3, 4, 5]])
    found = run("x", "--label=1", "--label=2", "--label=3")
    again = swapped("x", "--label=2", "--label=1", "--label=3")
    np.testing.assert_array_equal(found, again)
    other = run("y", "--label=2", "--label=1", "--label=3")
    assert (np.abs(other - found).max(axis=(1, 2, 3)) > 0.02).tolist() == [True, True, False]
    # Without labels each class comes in turn; the null class, the sixth, does not.
    np.testing.assert_array_equal(run("z")[1:], run("w", "--label=0", "--label=1", "--label=2")[1:])


def test_guidance_is_away_from_the_null_class(sd, classes, tmp_path, capsys):
    run = of_classes(sd, classes, tmp_path / "a")
    signs = np.array([1, 1, 1, 1, 1, -1], np.float32)[:, None]
    nulled = of_classes(sd, classes, tmp_path / "b", lambda table: table * signs)
    for scale, same in (("1", True), ("3", False)):
        argv = ("--label=1", f"--guidance_scale={scale}")
        assert np.array_equal(run(scale, *argv), nulled(scale, *argv)) == same
    argv = (f"--workdir={tmp_path}/a/run", f"--out={tmp_path}/out", "--label=6")
    assert sd.command(sample, *argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "--label=6" in line and "0..5" in line
