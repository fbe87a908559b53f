"""InstructPix2Pix, guided by the text and by the image, beside Diffusers' pipeline."""

import warnings

import numpy as np
import pytest
from PIL import Image

from diffusion.sampling.pipeline import Pipeline
from experiments import sample
from experiments.convert import __main__ as convert
from experiments.run import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline


@pytest.fixture(scope="module")
def editor(sd, reference, tmp_path_factory):
    """(Diffusers' pipeline, our workdir, an image)."""
    root = tmp_path_factory.mktemp("edit")
    components = {**reference[0].components, "unet": sd.unet(in_channels=8, seed=3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)
        pipe.save_pretrained(root / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    argv = ("--from=diffusers", f"--source={root}/pipeline", f"--workdir={root}/run")
    assert sd.command(convert, *argv) == 0
    pixels = np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(root / "in.png")
    return pipe, root / "run", root / "in.png"


def theirs(sd, pipe, model, path, **options):
    given = {"latents": sd.noise(model, 2, 5), "num_inference_steps": 4, "output_type": "latent"}
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
    return np.moveaxis(
        sd.theirs(pipe, model, **given, image=image.repeat(2, 1, 1, 1), **options).numpy(), 1, -1
    )


def test_two_guidances_are_diffusers(sd, editor, monkeypatch):
    pipe, run, path = editor
    monkeypatch.setattr(Pipeline, "decode", lambda self, params, x, *rest: x)
    model = generate.load(run).pipeline
    assert model.edits and model.how.image_guidance_scale == 1.5
    given = model.slots.read(image=str(path))
    found = {}
    for image, negative in ((1.5, None), (2.5, sd.NEGATIVE)):
        made = model.changed(image_guidance_scale=image)
        found[image] = sd.ours(made, given=given, negative=negative, steps=4)
        options = {"image_guidance_scale": image, "negative_prompt": negative}
        wanted = theirs(sd, pipe, model, path, **options)
        assert np.linalg.norm(found[image] - wanted) / np.linalg.norm(wanted) < 1e-5
    other = theirs(sd, pipe, model, path, image_guidance_scale=1.0)
    assert np.linalg.norm(found[1.5] - other) / np.linalg.norm(other) > 1e-2  # it counts


def test_the_command_edits_and_says_what_it_cannot(sd, editor, converted, tmp_path, capsys):
    pipe, run, path = editor
    argv = [f"--prompt={prompt}" for prompt in sd.PROMPTS] + [f"--image={path}"]
    more = ("--image_guidance_scale=2.0", "--guidance_scale=1", "--steps=1")
    assert sd.sampled(run, tmp_path / "out", *argv, *more).shape == (2, 16, 16, 3)
    for workdir, wrong, words in (
        (run, argv[:1], ("--image",)),
        (run, [*argv, f"--mask={path}"], ("mask",)),
        (run, [*argv, "--strength=0.5"], ("--strength=0.5",)),
        (run, [*argv, "--guidance_rescale=0.7"], ("--guidance_rescale=0.7",)),
        (converted, ["--image_guidance_scale=1.5"], ("--image_guidance_scale=1.5",)),
    ):
        assert sd.command(sample, f"--workdir={workdir}", f"--out={tmp_path}/no", *wrong) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "no").exists()
    argv = ("--to=diffusers", f"--workdir={run}", f"--out={tmp_path}/back")
    assert sd.command(convert, *argv) == 0
    back = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "back")
    ours, wanted = (p.unet.state_dict() for p in (back, pipe))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
