"""`sample` writes as it makes, goes on where it stopped, and draws a seed where it is told to."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion.sampling.pipeline import Pipeline
from experiments import sample
from experiments.host import cli

FEW = ("--num=5", "--batch_size=2", "--steps=2", "--prompt=a red seven", "--prompt=a blue one")


def run(job, out, *argv) -> int:
    given = (f"--workdir={job}/ldm", f"--out={out}", *FEW, *argv)
    return cli.run(sample.define, sample.main, given)


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def stopping(monkeypatch):
    """Sampling ends after so many batches; asked[i] is where the i-th call began."""
    images, asked = Pipeline.images, []

    def stop_after(count):
        def some(self, *arguments, start=0, **options):
            asked.append(start)
            for i, batch in enumerate(images(self, *arguments, start=start, **options)):
                if i == count:
                    raise OSError("the power went")
                yield batch

        monkeypatch.setattr(Pipeline, "images", some)
        return asked

    return stop_after


def test_an_interrupted_call_goes_on_and_gives_the_same_files(job, tmp_path, stopping, capsys):
    assert run(job, tmp_path / "whole", "--seeds=1,2") == 0
    asked = stopping(2)
    assert run(job, tmp_path / "cut", "--seeds=1,2") == 2
    assert sorted(contents(tmp_path / "cut")) == [f"0000{i}.png" for i in range(4)]
    stopping(99)
    (tmp_path / "cut" / "00003.png").unlink()  # half a batch
    assert run(job, tmp_path / "cut", "--seeds=1,2") == 0
    assert asked == [0, 2] and "3 of 10 images are there" in capsys.readouterr().out
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.fixture
def quick(monkeypatch):
    """Pictures of seed and number alone, by no network."""

    def compiled(self, **options):
        def run(params, seeds, indices, batch):
            draw = [
                np.random.default_rng([s, i]).integers(0, 256, (32, 32, 3), np.uint8)
                for s, i in zip(np.asarray(seeds), np.asarray(indices))
            ]
            return jnp.stack(draw)

        return run

    monkeypatch.setattr(Pipeline, "compiled", compiled)


def test_only_what_is_missing_is_made(job, tmp_path, stopping, quick):
    assert run(job, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    asked = stopping(99)
    assert run(job, tmp_path / "out") == 0
    assert asked == [] and contents(tmp_path / "out") == before  # nothing
    for name in ("00003.png", "00004.png"):
        (tmp_path / "out" / name).unlink()
    assert run(job, tmp_path / "out") == 0
    assert asked == [2] and contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "other", ["--steps=3", "--seed=1", "--negative_prompt=red", "--weights=raw", "--tile=16"]
)
def test_pictures_of_another_request_are_made_anew(job, tmp_path, stopping, quick, other):
    assert run(job, tmp_path / "out") == 0
    asked = stopping(99)
    assert run(job, tmp_path / "out", other) == 0
    assert asked == [0]


def test_another_image_is_another_request(job, tmp_path, stopping, quick):
    for value in (0, 200):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / "in.png")
        asked = stopping(99)
        argv = (f"--image={tmp_path}/in.png", "--strength=0.5")
        assert run(job, tmp_path / "out", *argv) == 0
    assert asked == [0, 0]


def test_an_npz_goes_on_too(job, tmp_path, stopping, quick, capsys):
    assert run(job, tmp_path / "whole") == 0
    pixels = [np.asarray(Image.open(tmp_path / "whole" / f"0000{i}.png")) for i in range(5)]
    asked = stopping(1)
    assert run(job, tmp_path / "cut", "--npz") == 2
    assert sorted(contents_of_parts(tmp_path)) == ["00000.npy", "samples.json"]
    capsys.readouterr()
    assert run(job, tmp_path / "cut", "--npz", "--steps=1") == 2
    assert "--out=" in (said := capsys.readouterr().err) and "steps" in said
    stopping(99)
    assert run(job, tmp_path / "cut", "--npz") == 0
    assert asked == [0, 2] and [p.name for p in (tmp_path / "cut").iterdir()] == ["samples.npz"]
    with np.load(tmp_path / "cut" / "samples.npz") as found:
        np.testing.assert_array_equal(found["images"], np.stack(pixels))


def contents_of_parts(folder):
    return [p.name for p in (folder / "cut" / ".samples.npz.parts").iterdir()]


def test_a_drawn_seed_is_said_and_gives_the_same_again(job, tmp_path, quick, capsys):
    assert run(job, tmp_path / "drawn", "--seed=random") == 0
    (seed,) = re.findall(r"--seed=(\d+)", capsys.readouterr().out)
    assert run(job, tmp_path / "again", f"--seed={seed}") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "drawn")
    assert run(job, tmp_path / "other", "--seed=random") == 0
    assert contents(tmp_path / "other") != contents(tmp_path / "drawn")
