"""A run looked at while it trains: nothing of it changes the run, and every writer hears of it."""

import importlib
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from diffusion.data.builders.captioned_digits import compose
from diffusion.metrics import adherence, frechet
from diffusion.sampling.pipeline import Pipeline
from diffusion.writers import Multi, Writer
from experiments import train
from experiments.evaluate import in_loop, references
from experiments.evaluate.features import Judge, attributes
from experiments.evaluate.samples import Run
from experiments.run import generate

SAMPLES = 4


class Recorder(Writer):
    def __init__(self):
        self.numbers, self.pictures = {}, {}

    def scalars(self, step, values):
        self.numbers.setdefault(step, {}).update(values)

    def images(self, step, images):
        self.pictures[step] = images


def config_of(job, file="digits_ldm", **evaluation):
    config = importlib.import_module(f"configs.{file}").get_config("smoke")
    config.data.dir = str(job / ("latents" if file == "digits_ldm" else "data"))
    if file == "digits_ldm":
        config.latents.data_dir = str(job / "data")
        config.latents.first_stage = str(job / "autoencoder")
    config.evaluation.update(evaluation)
    return config.lock()


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.fixture
def watched(job, tmp_path, monkeypatch):
    """A run of four steps looked at twice: its folder, what a writer heard, samplers compiled."""
    recorder, compiled, make = Recorder(), [], Pipeline.compiled

    def compile_it(*arguments, **options):
        compiled.append(options)
        return make(*arguments, **options)

    def make_writer(*arguments, **options):
        return Multi((own(*arguments, **options), recorder))

    own = train.make_writer
    monkeypatch.setattr(train, "make_writer", make_writer)
    monkeypatch.setattr(Pipeline, "compiled", compile_it)
    wanted = {"every_steps": 2, "preview": 3, "samples": SAMPLES}
    config = config_of(job, classifier=str(job / "classifier"), **wanted)
    train.train(config, tmp_path / "run")
    return tmp_path / "run", recorder, compiled


def test_looking_changes_nothing_and_is_heard_by_every_writer(watched, job, tmp_path):
    directory, recorder, compiled = watched
    train.train(config_of(job, every_steps=0), tmp_path / "plain")
    assert losses(directory) == losses(tmp_path / "plain") != []  # to the bit
    assert len(compiled) == 1  # for both looks, both weights, pictures and numbers

    names = ("frechet_distance", "adherence_all", "adherence_digit", "adherence_held_out_all")
    for step in (2, 4):
        heard = recorder.numbers[step]
        assert {f"eval_{name}_{w}" for name in names for w in ("ema", "raw")} < heard.keys()
        assert "eval_loss" in heard and all(np.isfinite(value) for value in heard.values())
        samples = recorder.pictures[step]["samples"]
        assert samples.shape == (3, 32, 32, 3) and samples.dtype == np.uint8
        with Image.open(directory / "previews" / f"samples-{step:08d}.png") as picture:
            pixels = np.asarray(picture)
        np.testing.assert_array_equal(pixels[2:34, 2:34], samples[0])
    assert (
        recorder.numbers[4]["eval_frechet_distance_ema"]
        != (recorder.numbers[4]["eval_frechet_distance_raw"])
    )

    # The same numbers, from the checkpoint of that step.
    judge = Judge(job / "classifier")
    images = references.unseen(Run(directory).image_config, "train")
    real = frechet.feature_statistics(judge(images)[1])
    prompts, asked = compose.prompts(SAMPLES, 0, held_out=False)
    for which in ("ema", "raw"):
        pipeline = generate.load(directory, which).pipeline
        images = np.concatenate(list(pipeline.images(pipeline.columns(prompts), SAMPLES)))
        made = frechet.feature_statistics(judge(images)[1])
        heard = recorder.numbers[4][f"eval_frechet_distance_{which}"]
        np.testing.assert_allclose(heard, frechet.frechet_distance(made, real), rtol=1e-6)
        found = adherence.adherence(attributes(images, judge), asked)["all"]
        assert recorder.numbers[4][f"eval_adherence_all_{which}"] == found


def test_a_first_stage_shows_images_and_reconstructions(job, tmp_path):
    config = config_of(job, "digits_autoencoder", every_steps=4, preview=4)
    train.train(config, tmp_path / "run")
    found = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert found == ["images-00000004.png", "reconstructions-00000004.png"]
    devices = json.loads((tmp_path / "run" / "devices.json").read_text())
    assert devices == {"processes": 1, "devices": 1, "device": "cpu"}


@pytest.mark.parametrize(
    ("file", "evaluation", "words"),
    [
        ("digits_ldm", {"samples": 8}, ("evaluation.classifier is empty", "samples=8")),
        ("digits_ldm", {"samples": 1}, ("evaluation.samples=1", "at least 2")),
        ("digits_ldm", {"samples": 8, "classifier": "{job}/none"}, ("classifier=", "no run")),
        ("digits_ldm", {"samples": 8, "classifier": "{job}/ldm"}, ("task='denoiser'",)),
        (
            "ddpm_fashion_mnist",
            {"samples": 8, "classifier": "{job}/classifier"},
            ("'captioned_digits'", "'fashion_mnist'"),
        ),
        ("digits_autoencoder", {"samples": 8}, ("evaluation.samples=8", "set it to 0")),
    ],
)
def test_what_cannot_be_judged_is_refused(file, evaluation, words, job, tmp_path):
    given = {key: str(value).format(job=job) for key, value in evaluation.items()}
    given["samples"] = evaluation["samples"]
    config = config_of(pathlib.Path(job), file, **given)
    with pytest.raises(ValueError) as refused:
        train.train(config, tmp_path / "run")
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "run").exists()
    in_loop.check(config_of(job, file))  # refuses nothing
