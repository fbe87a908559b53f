"""What joins x_t's channels, through the commands: trained from images and from stored latents."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import digits_ldm, ldm_inpainting, ldm_super_resolution
from experiments import encode_latents, sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.host import cli
from experiments.run import generate


def command(module, *argv):
    return cli.run(module.define, module.main, [str(a) for a in argv])


def pixels(path, array):
    Image.fromarray(array).save(path)
    return path


def seen(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def finite(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses and np.isfinite(losses).all()


@pytest.fixture(scope="module")
def inpainter(job, tmp_path_factory):
    directory = tmp_path_factory.mktemp("inpainting")
    config = ldm_inpainting.get_config("pixels,smoke")
    config.data.dir = str(job / "data")
    config.model.denoiser.update({"multipliers": (1,), "attention": (False,)})
    train.train(config.lock(), directory)
    return directory


def test_inpainting_of_pixels_trains_samples_and_is_measured(inpainter, tmp_path):
    assert finite(inpainter)
    image = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    flags = (f"--image={pixels(tmp_path / 'i.png', image)}",)
    flags += (f"--mask={pixels(tmp_path / 'm.png', mask)}",)
    argv = (f"--workdir={inpainter}", "--num=2", f"--out={tmp_path}/made")
    assert command(sample, *argv, *flags) == 0
    made = [seen(tmp_path / "made" / f"0000{i}.png") for i in (0, 1)]
    for picture in made:  # the picture's own pixels are put back
        np.testing.assert_array_equal(picture[:, :16], image[:, :16])
    assert np.abs(made[0].astype(int) - made[1])[:, 16:].max() > 5
    argv = (f"--workdir={inpainter}", "--metrics=restoration", "--num=5", "--weights=ema")
    assert command(evaluate, *argv) == 0
    found = json.loads((inpainter / "evaluation.json").read_text())["restoration"]
    assert found["count"] == 5 and set(found) >= {"samples", "hidden", "originals"}
    assert found["hidden"]["psnr"] > 5 and np.isfinite(found["samples"]["psnr"])


def test_a_small_picture_joins_pixels_and_stored_latents(job, tmp_path):
    """Also captioned: the other channels stand beside a caption, and are never dropped."""
    config = ldm_super_resolution.get_config("fashion,smoke")
    config.data.update({"name": "digits", "dir": str(job / "data")})
    config.model.denoiser.update({"multipliers": (1,), "attention": (False,)})
    train.train(config.lock(), tmp_path / "pixels")
    assert finite(tmp_path / "pixels")
    small = pixels(tmp_path / "s.png", np.full((8, 8), 200, np.uint8))
    argv = (f"--image={small}", "--num=2", f"--out={tmp_path}/made")
    assert command(sample, f"--workdir={tmp_path}/pixels", *argv) == 0
    assert seen(tmp_path / "made" / "00000.png").shape == (32, 32)


@pytest.mark.parametrize(
    ("kind", "channels", "columns"),
    [
        ("inpaint", 9, {"masked", "mask"}),  # Stable Diffusion's, with captions
        ("inpaint_ldm", 9, {"masked", "mask"}),
        ("low_resolution", 7, {"small"}),
    ],
)
def test_stored_latents_hold_what_joins_them(kind, channels, columns, job, tmp_path):
    config = digits_ldm.get_config("smoke")
    config.data.dir, config.latents.data_dir = str(tmp_path / "latents"), str(job / "data")
    config.latents.first_stage = str(job / "autoencoder")
    config.latents.shard_size = 5000
    config.conditioning.update({"concat": kind, "downscale": 4 if kind[0] == "l" else 0})
    made = encode_latents.encode(config.lock())
    assert columns <= {*made["fields"]}
    train.train(config, tmp_path / "run")
    assert finite(tmp_path / "run")
    model = generate.load(tmp_path / "run").pipeline
    assert model.params["denoiser"]["conv_in"]["kernel"].shape[-2] == channels
    side = 8 if kind == "low_resolution" else 32
    image = pixels(tmp_path / "i.png", np.full((side, side, 3), 90, np.uint8))
    mask = pixels(tmp_path / "m.png", np.eye(32, dtype=np.uint8) * 255)
    flags = (f"--image={image}", *([f"--mask={mask}"] if side == 32 else []))
    argv = (f"--workdir={tmp_path}/run", "--num=1", f"--out={tmp_path}/made")
    assert command(sample, *argv, "--prompt=a large red seven", *flags) == 0
    wanted = {"inpaint": "inpaint_ldm", "inpaint_ldm": "inpaint", "low_resolution": "inpaint"}
    config = config.copy_and_resolve_references().unlock()
    config.conditioning.concat = wanted[kind]
    with pytest.raises(ValueError, match=r"made_from\.conditioning\.concat"):
        train.train(config.lock(), tmp_path / "other")


def test_bad_input_is_one_sentence(inpainter, tmp_path, capsys):
    picture = pixels(tmp_path / "i.png", np.zeros((32, 32), np.uint8))
    small = pixels(tmp_path / "m.png", np.zeros((16, 32), np.uint8))
    argv = (f"--workdir={inpainter}", f"--out={tmp_path}/made")
    for flags, words in (
        ((f"--image={picture}",), "trained with conditioning.concat='inpaint_ldm': give --mask"),
        ((f"--image={picture}", f"--mask={small}"), "m.png has 16x32 pixels, but 32x32 are needed"),
        ((f"--image={picture}", f"--segments={small}", f"--mask={picture}"), "reads no map of la"),
    ):
        assert command(sample, *argv, *flags) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert words in line
    assert not (tmp_path / "made").exists()
    argv = (f"--workdir={inpainter}", "--metrics=restoration", "--num=5000")
    assert command(evaluate, *argv) == 2
    assert "--num=5000, but the split 'test' has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditioning.concat": "sharpen"}, "conditioning.concat='sharpen' is unknown"),
        ({"conditioning.masks": "all"}, "conditioning.masks='all' is unknown"),
        ({"data.flip": True}, "data.flip=True would not mirror"),
        ({"conditioning.concat": "semantic"}, "model.rescaler belong together"),
        (
            {"conditioning.concat": "low_resolution", "conditioning.downscale": 5},
            "conditioning.downscale=5 of data.image_size=32",
        ),
        (
            {"conditioning.concat": "low_resolution", "conditioning.degradation": "jpeg"},
            "conditioning.degradation='jpeg' is unknown",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, words, job, tmp_path):
    config = ldm_inpainting.get_config("pixels,smoke")
    config.data.dir = str(job / "data")
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=words):
        train.train(config.lock(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
