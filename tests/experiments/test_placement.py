"""Boxes and maps of labels through the commands: trained, sampled, measured."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import ldm_layout, ldm_semantic
from diffusion import pictures
from experiments import encode_latents, sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate import placements
from experiments.host import cli
from experiments.run import build, generate, tasks


def command(module, *argv):
    return cli.run(module.define, module.main, [str(a) for a in argv])


def trained(module, job, directory):
    config = module.get_config("digits,smoke")
    config.data.dir = str(directory) + "_latents"
    config.latents.update({"first_stage": str(job / "autoencoder"), "data_dir": str(job / "data")})
    config.latents.shard_size = 5000
    config.model.denoiser.update({"multipliers": (1,), "attention": (False,)})
    encode_latents.encode(config.lock())
    train.train(config, directory)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def refused(capsys, *argv):
    assert command(sample, *argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def measured(job, run, monkeypatch):
    sheets, draw = [], pictures.sheet

    def drawn(rows, said, columns):
        sheets.append((rows, said))
        return draw(rows, said, columns)

    monkeypatch.setattr(pictures, "sheet", drawn)
    argv = (f"--workdir={run}", "--metrics=placement", "--num=6", "--weights=ema")
    assert command(evaluate, *argv, f"--classifier={job}/classifier") == 0
    assert (run / "evaluation_placement.png").is_file()
    (sheet,) = sheets
    rows, said = sheet
    assert len(rows) == len(said) == 18 and said[6:] == ["sample"] * 6 + ["of the data"] * 6
    return json.loads((run / "evaluation.json").read_text())["placement"]


def test_boxes_train_sample_and_are_measured(job, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    trained(ldm_layout, job, run)
    argv = (f"--workdir={run}", "--num=2", f"--out={tmp_path}/made")
    assert command(sample, *argv, "--box=3,0,0,0.4,0.4", "--box=7,0.5,0.5,0.4,0.4") == 0
    found = measured(job, run, monkeypatch)
    assert found["data"]["outside"] == 0 < found["samples"]["outside"]  # it has learnt nothing
    assert found["data"]["adherence"] < 1  # the job's classifier has learnt as little
    argv = (f"--workdir={run}", f"--out={tmp_path}/other")
    assert "the model reads 1 to 2 boxes, but 0 are given" in refused(capsys, *argv)
    assert "is not inside the picture" in refused(capsys, *argv, "--box=3,0.8,0,0.4,0.4")
    assert "has a label outside 0..9" in refused(capsys, *argv, "--box=10,0,0,0.4,0.4")
    assert "the model reads no captions" in refused(capsys, *argv, "--prompt=a seven")


def test_maps_of_labels_train_sample_and_are_measured(job, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    trained(ldm_semantic, job, run)
    segments = np.zeros((32, 32), np.uint8)
    segments[8:24, 14:18] = 2
    Image.fromarray(segments).save(tmp_path / "map.png")
    argv = (f"--workdir={run}", "--num=2", f"--out={tmp_path}/made")
    assert command(sample, *argv, f"--segments={tmp_path}/map.png") == 0
    found = measured(job, run, monkeypatch)
    assert found["data"]["iou"] > 0.9
    argv = (f"--workdir={run}", f"--out={tmp_path}/other")
    assert "give --segments" in refused(capsys, *argv)
    Image.fromarray(segments + 60).save(tmp_path / "map.png")
    assert "has the label 62, but the model knows 0..10" in refused(
        capsys, *argv, f"--segments={tmp_path}/map.png"
    )
    Image.fromarray(segments[:16]).save(tmp_path / "map.png")
    assert "has 16x32 labels, but 32x32 are needed" in refused(
        capsys, *argv, f"--segments={tmp_path}/map.png"
    )
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "map.png")
    assert "its pixels are RGB" in refused(capsys, *argv, f"--segments={tmp_path}/map.png")


def test_landscapes_are_sampled_larger_than_they_were_trained():
    """LDM 4.3.2: 512 x 1024 of a U-Net trained at 256, here twice as wide; told by places."""
    config = ldm_semantic.get_config("landscapes,smoke")
    config.model.denoiser.update({"multipliers": (1, 1), "attention": (False, False), "heads": 2})
    task, stage = tasks.task(config.lock()), build.autoencoder(config.model.autoencoder)
    params = task.networks_init(jax.random.key(0))
    drawn = jax.random.normal(jax.random.key(1), params["denoiser"]["conv_out"]["kernel"].shape)
    params["denoiser"]["conv_out"]["kernel"] = drawn / 10  # not nought, as it starts
    image = jnp.zeros((1, 128, 128, 3))
    params["autoencoder"] = jax.jit(stage.init)(jax.random.key(2), image)["params"]
    pipe = generate.pipeline(config, task, params, first_stage=stage).resized((128, 256))
    labels = np.zeros((2, 128, 256), np.uint8)
    labels[1, :, 192:] = 7
    made = np.concatenate([*pipe.images({"segments": labels}, 2, [0])])
    assert made.shape == (2, 128, 256, 3) and made.std() > 1
    again = np.concatenate([*pipe.images({"segments": labels[:1]}, 2, [0])])[1]  # of the same noise
    far, near = (
        np.abs(made[1].astype(int) - again)[:, x].mean() for x in (slice(64), slice(208, 256))
    )
    assert near > 1.5 * far  # attention in the middle and norms look everywhere


def test_a_box_is_right_where_its_own_crop_is_its_label():
    """A judge that knows a digit by its brightest value."""
    layout = np.array([[[3, 0, 0, 14 / 32, 14 / 32], [7, 0.5, 0.5, 14 / 32, 14 / 32]]] * 3)
    images = np.zeros((3, 32, 32, 3), np.uint8)
    images[:, 2:9, 2:9], images[:, 20:25, 20:25] = 3, 7
    images[1, 20:25, 20:25] = 4  # another digit
    images[2, 0:16, 14:] = 9  # and light beside both, up to their edges

    def judge(crops):
        return crops.max((1, 2, 3)).astype(int), None

    found = placements.of_boxes(images, {"layout": layout}, judge)
    np.testing.assert_allclose(found["adherence"], 5 / 6)
    np.testing.assert_allclose(found["whole"], 1 / 3)
    assert found["outside"] == pytest.approx(9 * 288 / (9 * 288 + 3 * 49 + 7 * 25) / 3)
