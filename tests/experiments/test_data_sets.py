"""The table of data sets: what each name opens, and that any run takes a folder of images."""

import importlib
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from diffusion.data import prepare
from experiments import prepare_data, train
from experiments.host import cli
from experiments.run import assemble, build, data, tasks

NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem != "__init__" and not path.stem.startswith("common")
)
PIXEL = "--config=configs/digits_pixel.py:smoke"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three pictures of each of two classes, and one file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 36, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / "dog" / "notes.png").write_text("no image")
    return folder


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


def run(config, workdir, *argv) -> int:
    return cli.run(train.define, train.main, (config, f"--workdir={workdir}", *argv))


def of_folder(folder):
    return (
        "--config.data.name=folder",
        f"--config.data.dir={folder}",
        "--config.data.eval_split=train",
        "--config.evaluation.every_steps=4",
        "--config.evaluation.preview=2",
    )


@pytest.mark.parametrize("task", ["autoencoder", "classifier", "pixel"])
def test_every_task_trains_on_a_folder(task, classes, tmp_path):
    argv = (f"--config=configs/digits_{task}.py:smoke", tmp_path / "run", *of_folder(classes))
    assert run(*argv, "--config.data.max_bad_images=1") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert "eval_loss" in rows[-1] or "eval_psnr" in rows[-1]
    assert "the user's own folder" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize(
    ("config", "argv", "words"),
    [
        ("digits_pixel", (), ("notes.png", "data.max_bad_images=0")),
        (
            "digits_pixel",
            ("--config.data.max_bad_images=1", "--config.data.eval_split=test"),
            ("'test'", "train"),
        ),
        ("ddpm_cifar10", ("--config.data.name=signals",), ("image_size=32", "1 axes", "signals")),
        ("ddpm_cifar10", ("--config.data.name=moving_digits",), ("image_size=32", "3 axes")),
        ("video_digits", (), ("(8, 16, 16)", "2 axes", "folder")),
        ("digits_classifier", ("--config.data.name=signals",), ("'classifier'", "labels")),
        ("folder_ldm", ("--config.data.name=cifar10",), ("text_encoder", "captions", "'cifar10'")),
    ],
)
def test_what_a_data_set_cannot_serve_is_refused_before_a_step(
    config, argv, words, classes, tmp_path, capsys
):
    argv = (*of_folder(classes), *argv)
    assert run(f"--config=configs/{config}.py:smoke", tmp_path / "run", *argv) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_labels_that_are_missing_or_too_many_are_refused(classes, tmp_path):
    (tmp_path / "plain").mkdir()
    for path in classes.glob("cat/*.png"):
        (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    for i in range(11):
        folder = tmp_path / "many" / str(i)
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes((classes / "cat/0.png").read_bytes())
    config = load("digits_classifier", "smoke").copy_and_resolve_references().unlock()
    config.data.update({"name": "folder", "dir": str(tmp_path / "plain")})
    with pytest.raises(ValueError, match=r"10 classes.*no labels"):
        assemble.build_run(config)
    config.data.dir = str(tmp_path / "many")
    with pytest.raises(ValueError, match="11 classes, but the config tells 10 apart"):
        assemble.build_run(config)


def test_an_error_that_nobody_foresaw_is_called_a_bug_and_keeps_its_traceback(
    classes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tasks, "task", lambda config: config.no_such_key)
    argv = (*of_folder(classes), "--config.data.max_bad_images=1")
    assert run(PIXEL, tmp_path / "run", *argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a bug" in line and "no_such_key" in line
    (path,) = [word.rstrip(";") for word in line.split() if "bug-" in word]
    with open(path) as file:
        assert "_image_run" in file.read()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_images_of_latents_are_those_that_the_latents_were_made_of(name):
    config = load(name)
    images = data.images_config(config)
    if "latents" in config:
        assert images.data.name == config.latents.data_name != "latents"
        assert images.data.dir == config.latents.data_dir
    else:
        assert images.data == config.data
    axes = data.known(images.data.name).axes
    assert len(build.image_shape(images)) == axes + 1


@pytest.mark.parametrize(
    ("name", "prepared"),
    [
        ("digits_lora", "captioned_digits"),
        ("video_digits", "captioned_digits"),
        ("digits_ldm", "captioned_digits"),
        ("ddpm_cifar10", "cifar10"),
        ("signal_ddpm", None),
        ("folder_ldm", None),
    ],
)
def test_each_data_set_is_prepared_as_what_it_opens(name, prepared, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(prepare, "prepare", lambda name, *_: asked.append(name))
    argv = (f"--config=configs/{name}.py",)
    assert cli.run(prepare_data.define, prepare_data.main, argv) == 0
    assert asked == ([prepared] if prepared else [])
    assert ("nothing to prepare" in capsys.readouterr().out) == (prepared is None)


def test_a_row_says_where_its_data_come_from():
    assert all(row.origin for row in data.DATA_SETS.values())
    config = load("ddpm_celebahq256")
    assert "look up its licence" in data.model_card(config)
