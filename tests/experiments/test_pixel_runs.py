"""Pixel-space runs through the commands: a learned variance, a series, a video."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusion.metrics import motion
from experiments import sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.evaluate import progressive, scores
from experiments.host import cli
from experiments.run import generate
from experiments.run.data import open_images


def config_of(file, arg, root, **data):
    """Its smoke run on one level, with attention in its middle."""
    config = importlib.import_module(f"configs.{file}").get_config(arg)
    config.model.denoiser.update({"multipliers": (1,), "attention": (False,)})
    config.data.update({"dir": str(root / "data"), **data})
    return config.lock()


def measured(directory, metric, *flags):
    argv = [f"--workdir={directory}", f"--metrics={metric}", "--weights=ema", *flags]
    assert cli.run(evaluate.define, evaluate.main, argv) == 0
    return json.loads((directory / "evaluation.json").read_text())


def sampled(directory, *flags):
    argv = [f"--workdir={directory}", "--num=8", f"--out={directory}/made", *flags]
    return cli.run(sample.define, sample.main, argv)


def picture_size(directory):
    with Image.open(directory / "made" / "00000.png") as picture:
        return picture.size


def picture(directory):
    with Image.open(directory / "made" / "00000.png") as made:
        return np.asarray(made)


@pytest.fixture(scope="module")
def learned(job, tmp_path_factory):
    """The bound with a learned variance and resampled times, on captioned digits."""
    directory = tmp_path_factory.mktemp("vlb")
    data = {"name": "captioned_digits", "compose_held_out": False}
    train.train(config_of("iddpm_cifar10", "vlb,smoke", job, **data), directory)
    return directory


def test_a_learned_variance_samples_and_has_a_bound(learned):
    rows = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert sampled(learned) == 0
    found = measured(learned, "bits_per_dim", "--num=3")["bits_per_dim"]
    assert found["count"] == 3 and len(found["terms"]) == 100
    np.testing.assert_allclose(sum(found["terms"]) + found["prior"], found["mean"], rtol=1e-3)
    assert (learned / "evaluation_bits_per_dim.png").is_file()
    curve = found["rate_distortion"]
    assert len(curve["rate"]) == len(curve["distortion"]) == 100
    np.testing.assert_allclose(curve["rate"][-1], found["prior"], rtol=1e-3)
    np.testing.assert_allclose(curve["rate"][0], found["mean"] - found["terms"][0], rtol=1e-3)
    assert np.all(np.diff(curve["rate"]) <= 0) and curve["distortion"][-1] > 20
    # An untrained network codes no better than the prior's noise.
    assert found["mean"] > 1


def test_figures_of_the_way_and_what_lies_between_two_pictures(learned, capsys):
    out, image = learned / "way.png", learned / "made" / "00000.png"
    sampled(learned)

    def drawn(*flags):
        argv = [f"--workdir={learned}", f"--out={out}", "--columns=3", "--steps=4", *flags]
        return cli.run(progressive.define, progressive.main, argv)

    assert drawn("--num=2") == 0
    with Image.open(out) as picture:
        assert picture.size == (2 * (3 * 34 + 2), 2 * (2 * 34 + 2))
    two = [f"--image={image}"] * 2
    assert drawn(*two, "--strengths=0.5") == 0
    with Image.open(out) as picture:
        assert picture.size == (2 * (3 * 34 + 2), 2 * 36)
    pipeline = generate.load(learned).pipeline.changed(steps=100)
    rows = progressive.generation(pipeline, 2, 3, seed=0)
    made = np.concatenate(list(pipeline.images({}, 2, [0])))
    np.testing.assert_array_equal(rows[2::3], made)
    dark, light = (np.full((1, *made.shape[1:]), value, np.uint8) for value in (40, 200))
    row = progressive.between(pipeline, [dark, light], 3, [0.02], seed=0).astype(float)
    means = row.mean((1, 2, 3))
    np.testing.assert_allclose(means, [40, 120, 200], atol=15)
    back = progressive.between(pipeline, [light, dark], 3, [0.02], seed=0).astype(float)
    np.testing.assert_allclose(back.mean((1, 2, 3)), means[::-1], atol=6)
    for flags, words in (
        (two[:1], "give --image twice"),
        ((*two, "--strengths=2"), "strength=2.0 must lie in (0, 1]"),
        (("--columns=1",), "--columns=1 must be at least 2"),
    ):
        assert drawn(*flags) == 2
        assert words in capsys.readouterr().err


def test_a_learned_variance_serves_samplers_that_need_none(learned):
    assert sampled(learned, "--sampler=ddim", "--steps=2") == 0


def test_a_classifier_of_noised_digits_guides(learned, job, tmp_path, capsys):
    """It trains on the denoiser's own noise; one of other noise, or of none, is refused."""
    config = importlib.import_module("configs.adm_classifier").get_config("digits,smoke")
    config.data.dir = str(job / "data")
    directory = tmp_path / "judge"
    config.process.schedule = {"name": "cosine", "num_steps": 100, "time_scale": 0.25}
    train.train(config.copy_and_resolve_references().lock(), directory)
    assert sampled(learned, "--num=2", "--steps=2") == 0
    plain = picture(learned)
    guided = f"--guidance_classifier={directory}"
    flags = ("--num=2", "--steps=2", "--label=3")
    assert sampled(learned, *flags, guided, "--classifier_scale=0") == 0
    np.testing.assert_array_equal(picture(learned), plain)
    assert sampled(learned, *flags, guided, "--classifier_scale=1000") == 0
    assert np.any(picture(learned) != plain)
    assert sampled(learned, *flags) == 2
    assert "the model knows no classes" in capsys.readouterr().err
    judged = (f"--classifier={job}/classifier", "--num=2", "--steps=2")
    found = measured(learned, "accuracy", *judged, guided, "--sweep_classifier=0")
    assert 0 <= found["accuracy"] <= 1 and found["sample"]["classifier_scale"] == 1
    assert [point["classifier_scale"] for point in found["sweep"]] == [0]
    argv = [f"--workdir={learned}", "--metrics=accuracy", *judged]
    assert cli.run(evaluate.define, evaluate.main, argv) == 2
    assert "is told none" in capsys.readouterr().err
    assert sampled(learned, "--label=10", guided) == 2
    assert "label=10 must lie in 0..9" in capsys.readouterr().err
    assert sampled(learned, f"--guidance_classifier={job}/classifier") == 2
    assert "reads pictures without noise" in capsys.readouterr().err
    config.process.schedule.time_scale = 1.0
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    assert sampled(learned, guided) == 2
    assert "has process.schedule={" in capsys.readouterr().err


def test_a_classifier_of_other_latents_is_known():
    params = {"autoencoder": {"kernel": np.ones(3)}, "denoiser": {}}
    extra = {"latent_shift": np.zeros(2), "latent_scale": np.ones(2)}
    same = generate._same_latents
    assert same(params, params, extra, dict(extra)) and same({}, {"classifier": {}}, {}, {})
    assert not same(params, params, extra, {**extra, "latent_scale": np.full(2, 2.0)})
    assert not same(params, params, extra, {})
    assert not same(params, {"autoencoder": {"kernel": np.zeros(3)}}, extra, extra)


def test_fixed_variance_with_the_channels_of_a_learned_one_is_refused(job, tmp_path):
    data = {"name": "captioned_digits", "compose_held_out": False}
    config = config_of("iddpm_cifar10", "hybrid,smoke", job, **data).copy_and_resolve_references()
    config.process.variance = "fixed_large"
    with pytest.raises(ValueError, match=r"model\.denoiser\.out_channels=6"):
        train.train(config.lock(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_series_trains_samples_and_is_measured(job, tmp_path):
    config = config_of("signal_ddpm", "smoke", job, examples=64)
    train.train(config, tmp_path)
    assert sampled(tmp_path, "--npz") == 0
    made = np.load(tmp_path / "made" / "samples.npz")["images"]
    assert made.shape == (8, 256, 1) and made.dtype == np.float32
    assert len(np.unique(made.round(3), axis=0)) == 8  # each of noise of its own
    assert sampled(tmp_path) == 0
    assert picture_size(tmp_path) == (256, 96)
    found = measured(tmp_path, "spectrum", "--num=8", "--sweep_steps=2,3")
    # The same samples, measured here against the same data.
    source, _ = open_images(config, "test")
    real = source.batch(np.arange(8))["image"]
    power, wanted = (np.square(np.abs(np.fft.rfft(x[..., 0]))).mean(0) for x in (made, real))
    expected = np.linalg.norm(power - wanted) / np.linalg.norm(wanted)
    np.testing.assert_allclose(found["spectrum"]["relative_error"], expected, rtol=1e-4)
    two, three = found["sweep"]  # written, with nothing to plot
    assert (two["steps"], three["steps"]) == (2, 3)
    assert two["spectrum"] == found["spectrum"] != three["spectrum"]  # the config's steps are two
    argv = [f"--workdir={tmp_path}", "--metrics=bits_per_dim", "--num=2"]
    assert cli.run(evaluate.define, evaluate.main, argv) == 2


def test_a_video_trains_samples_and_is_measured(job, tmp_path):
    train.train(config_of("video_digits", "smoke", job), tmp_path)
    assert sampled(tmp_path) == 0
    assert picture_size(tmp_path) == (8 * 16, 16)
    assert sampled(tmp_path, "--npz") == 0
    made = np.load(tmp_path / "made" / "samples.npz")["images"]
    assert made.shape == (8, 8, 16, 16, 1) and made.dtype == np.uint8
    found = measured(tmp_path, "motion", "--num=8")["motion"]
    assert found["data"]["straightness"] > 0.99 > 0.5 > found["data_shuffled"]["straightness"]
    # The same samples, measured here: brightness above the ground's 32, its centre by frame.
    path = motion.centres(np.maximum(made.astype(np.int16) - 32, 0))
    expected = np.nanmedian(motion.straightness(path)), np.nanmedian(motion.speed(path))
    measured_here = (found["samples"]["straightness"], found["samples"]["speed"])
    np.testing.assert_allclose(measured_here, expected, rtol=1e-3)
    # What has been trained for four steps moves as noise does, and not as the data.
    assert found["samples"]["straightness"] < 0.9


def test_a_videos_first_stage_previews_its_frames_side_by_side(job, tmp_path):
    config = importlib.import_module("configs.video_autoencoder").get_config("smoke")
    config.model.autoencoder.update({"channels": 8, "groups": 4})
    config.data.dir = str(job / "data")
    config.train.steps = config.evaluation.every_steps = 2
    config.evaluation.examples = 8
    train.train(config.lock(), tmp_path)
    for name in ("images", "reconstructions"):
        with Image.open(tmp_path / "previews" / f"{name}-00000002.png") as picture:
            assert picture.size == (2 * (8 * 16 + 2) + 2, 2 * (16 + 2) + 2), name  # four videos


def test_frames_are_read_as_the_class_that_was_asked_for(monkeypatch):
    """Two videos of three frames: of the classes 1 and 2 five are read right, of 1 and 1 three."""
    videos, seen = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 4, 1)).astype(np.uint8), []

    def judge(frames):
        seen.append(frames.shape)
        return np.array([1, 1, 1, 2, 2, 0]), None

    asked = {"samples": np.array([1, 2]), "data": np.array([1, 1])}
    monkeypatch.setattr(scores, "_both", lambda subject: (videos, videos))
    monkeypatch.setattr(scores, "_classes", lambda subject: asked)
    told = {"samples": SimpleNamespace(seed=0), "tools": SimpleNamespace(classifier="here")}
    found = scores.motion(SimpleNamespace(**told, judge=judge))["motion"]
    assert (found["samples"]["legible"], found["data"]["legible"]) == (5 / 6, 3 / 6)
    assert seen == [(6, 4, 4, 3)] * 2 and "legible" not in found["data_shuffled"]


def test_each_sample_is_of_the_class_that_it_was_asked_for(monkeypatch):
    class Source:
        def __len__(self):
            return 4

        def batch(self, index):
            return {"label": 7 - index}

    monkeypatch.setattr(scores.data, "open_images", lambda config, split: (Source(), []))
    columns = {"label": np.array([0, 1, 2])}
    model = SimpleNamespace(pipeline=SimpleNamespace(columns=lambda: columns))
    run = SimpleNamespace(image_config=None, model=model)
    subject = SimpleNamespace(samples=SimpleNamespace(num=5), run=run)
    subject.rows = {"class": {"seen": np.array([0, 2, 2, 0, 0])}}
    assert scores.accuracy(subject)["accuracy"] == 3 / 5
    found = scores._classes(subject)
    assert found["samples"].tolist() == [0, 1, 2, 0, 1]
    assert found["data"].tolist() == [7, 6, 5, 4]


def test_metrics_of_another_rank_are_refused(learned, capsys):
    argv = [f"--workdir={learned}", "--metrics=motion", "--num=2"]
    assert cli.run(evaluate.define, evaluate.main, argv) == 2
    assert "is of videos" in capsys.readouterr().err
