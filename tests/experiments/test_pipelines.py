"""What `sample` makes pictures from, beside Diffusers' pipelines from the same noise."""

import copy
import warnings

import numpy as np
import pytest
from PIL import Image

from experiments import sample
from experiments.convert import __main__ as convert
from experiments.run import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import (
        ControlNetModel,
        DDIMScheduler,
        LDMSuperResolutionPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        UNet2DModel,
        VQModel,
    )
    from safetensors.numpy import save_file


def refused(capsys, *words) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


# Pictures of the command are rounded to 1/255.
ROUNDED = 0.5 / 255 + 1e-3


def test_a_whole_pipeline_equals_diffusers(sd, reference, converted):
    model = generate.load(converted).pipeline
    found = sd.ours(model, negative=sd.NEGATIVE)
    given = sd.noise(model, 2, 5)
    wanted = sd.theirs(reference[0], model, latents=given, negative_prompt=sd.NEGATIVE)
    assert found.shape == wanted.shape == (2, 16, 16, 3)
    assert wanted.std() > 0.05
    assert np.abs(found - wanted).max() < 1e-3
    plain = sd.theirs(reference[0], model, latents=given)
    assert np.abs(plain - wanted).max() > 1e-2  # the negative prompt counts


def test_image_to_image_equals_diffusers(sd, reference, converted, tmp_path):
    image = np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    model = generate.load(converted).pipeline
    given = model.slots.read(image=str(tmp_path / "in.png"))
    found = sd.ours(model, given=given, strength=0.6)
    pipe = StableDiffusionImg2ImgPipeline(**reference[0].components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    drawn = sd.noise(model, 2, 5)
    # Diffusers draws both noises itself: the posterior's is none, the process's is ours.
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: drawn)
        patch.setattr(f"{module}.retrieve_latents", lambda out, **_: out.latent_dist.mode())
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        wanted = sd.theirs(pipe, model, image=pixels.repeat(2, 1, 1, 1), strength=0.6)
    assert np.abs(found - wanted).max() < 1e-3
    less = sd.ours(model, given=given, strength=0.2)
    changed = [np.abs(x - image / 255).mean() for x in (found, less)]
    assert changed[1] < changed[0]


def test_inpainting_keeps_what_the_mask_does_not_cover(sd, converted, tmp_path):
    image = np.random.default_rng(4).integers(0, 255, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    model = generate.load(converted).pipeline
    given = model.slots.read(str(tmp_path / "in.png"), str(tmp_path / "mask.png"))
    (found,) = model.changed(steps=4).images(model.columns(sd.PROMPTS[:1]) | given, 1)
    np.testing.assert_array_equal(found[0][mask == 0], image[mask == 0])
    assert np.abs(found[0].astype(int) - image)[mask > 0].max() > 5


def test_nine_channels_inpaint_as_diffusers_does(sd, reference, tmp_path):
    components = {**reference[0].components, "unet": sd.unet(in_channels=9, seed=3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
        pipe.save_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    run = tmp_path / "run"
    source = tmp_path / "pipeline"
    argv = ("--from=diffusers", f"--source={source}", f"--workdir={run}")
    assert sd.command(convert, *argv) == 0
    image = np.random.default_rng(6).integers(0, 255, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[2:10, 4:] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    model = generate.load(run).pipeline
    assert model.concat.kind == "inpaint"
    given = model.slots.read(str(tmp_path / "in.png"), str(tmp_path / "mask.png"))
    found = sd.ours(model, given=given)
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
        patch.setattr(f"{module}.retrieve_latents", lambda out, **_: out.latent_dist.mode())
        wanted = sd.theirs(
            pipe,
            model,
            latents=sd.noise(model, 2, 5),
            image=Image.fromarray(image),
            mask_image=Image.fromarray(mask),
            height=16,
            width=16,
        )
    # Diffusers leaves the pixels that are kept as its decoder draws them.
    inside = mask > 0
    assert np.abs(found - wanted)[:, inside].max() < 1e-3


def test_super_resolution_by_concatenation_equals_diffusers(sd, tmp_path):
    """The small picture joins the latents: the U-Net has 3 + 3 input channels, and no captions."""
    sd.quiet()
    shared = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    downs, ups = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    net = UNet2DModel(
        **shared, in_channels=6, out_channels=3, down_block_types=downs, up_block_types=ups
    )
    downs, ups = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    shared["block_out_channels"] = (8, 16)
    first = VQModel(
        **shared,
        down_block_types=downs,
        up_block_types=ups,
        latent_channels=3,
        num_vq_embeddings=32,
    )
    parts = (sd.randomise(first, 2), sd.randomise(net, 3), DDIMScheduler(**sd.SCHEDULER))
    pipe = LDMSuperResolutionPipeline(*parts)
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    argv = ("--from=diffusers", f"--source={tmp_path}/pipeline", f"--workdir={tmp_path}/run")
    assert sd.command(convert, *argv) == 0
    small = np.random.default_rng(7).integers(0, 255, (8, 12, 3), np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    argv = ("--size=16,24", f"--image={tmp_path}/small.png")
    found = sd.sampled(tmp_path / "run", tmp_path / "out", *argv)
    model = generate.load(tmp_path / "run").pipeline.resized((16, 24))
    drawn = sd.noise(model, 2, 5)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        module = "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: drawn)
        given = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 127.5 - 1
        wanted = pipe(given.repeat(2, 1, 1, 1), num_inference_steps=20, output_type="np").images
    assert found.shape == wanted.shape == (2, 16, 24, 3) and wanted.std() > 0.05
    assert np.abs(found - wanted).max() < ROUNDED
    other = sd.sampled(tmp_path / "run", tmp_path / "other", "--size=16,24", *flat(tmp_path))
    assert np.abs(other - found).max() > 0.05  # the small picture counts


def flat(folder):
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(folder / "flat.png")
    return (f"--image={folder}/flat.png",)


def test_two_controlnets_at_once_equal_diffusers(sd, reference, converted, tmp_path):
    nets, argv, pictures = [], [], []
    scales = [0.7, 0.4]
    for i in range(2):
        net = ControlNetModel(**sd.UNET, conditioning_embedding_out_channels=(4, 6))
        nets.append(sd.randomise(net, 10 + i))
        nets[i].save_pretrained(tmp_path / f"net{i}")
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        pictures.append(Image.fromarray(pixels))
        pictures[i].save(tmp_path / f"{i}.png")
        argv += [f"--controlnet={tmp_path}/net{i}", f"--control={tmp_path}/{i}.png"]
    argv += [f"--prompt={prompt}" for prompt in sd.PROMPTS]
    found = sd.sampled(converted, tmp_path / "both", *argv, "--control_scale=0.7,0.4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionControlNetPipeline(
            **reference[0].components, controlnet=nets, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    model = generate.load(converted).pipeline
    given = {"latents": sd.noise(model, 2, 5), "height": 16, "width": 16}
    wanted = sd.theirs(pipe, model, **given, image=pictures, controlnet_conditioning_scale=scales)
    assert np.abs(found - wanted).max() < ROUNDED
    one = sd.sampled(converted, tmp_path / "one", *argv, "--control_scale=0.7,0")
    assert np.abs(one - found).max() > 0.02  # the second one counts


def test_low_rank_updates_are_added_when_sampling(sd, reference, converted, tmp_path):
    """`--lora --lora_scale` against Diffusers' pipeline with the products added to its weights."""
    rng, tensors, changed = np.random.default_rng(8), {}, copy.deepcopy(reference[0].unet)
    with torch.no_grad():
        for name, module in changed.named_modules():
            if name.endswith(("to_q", "to_v", "to_out.0")):
                rows, width = module.weight.shape
                shapes = ((3, width), (rows, 3))
                down, up = (rng.normal(0, 0.3, s).astype(np.float32) for s in shapes)
                tensors[f"unet.{name}.lora_A.weight"] = down
                tensors[f"unet.{name}.lora_B.weight"] = up
                module.weight += 0.5 * torch.from_numpy(up @ down)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    argv = [f"--prompt={prompt}" for prompt in sd.PROMPTS]
    argv += [f"--lora={tmp_path}/x.safetensors", "--lora_scale=0.5"]
    found = sd.sampled(converted, tmp_path / "out", *argv)
    pipe = StableDiffusionPipeline(
        **{**reference[0].components, "unet": changed}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    model = generate.load(converted).pipeline
    given = {"latents": sd.noise(model, 2, 5)}
    wanted = sd.theirs(pipe, model, **given)
    assert np.abs(found - wanted).max() < ROUNDED
    assert np.abs(wanted - sd.theirs(reference[0], model, **given)).max() > 0.02


def test_large_pictures_decoded_in_tiles_equal_diffusers(sd, reference, converted, tmp_path):
    """`--size --tile`: 2 x 5 tiles of 16 pixels."""
    argv = [f"--prompt={prompt}" for prompt in sd.PROMPTS]
    found = sd.sampled(converted, tmp_path / "out", *argv, "--size=24,64", "--tile=16")
    pipe, model = reference[0], generate.load(converted).pipeline.resized((24, 64))
    given = {"latents": sd.noise(model, 2, 5), "height": 24, "width": 64}
    pipe.vae.enable_tiling()
    try:
        wanted = sd.theirs(pipe, model, **given)
    finally:
        pipe.vae.disable_tiling()
    assert found.shape == wanted.shape == (2, 24, 64, 3)
    assert np.abs(found - wanted).max() < ROUNDED
    assert np.abs(wanted - sd.theirs(pipe, model, **given)).max() > 0.01  # tiling is seen


def test_sampling_refuses_pictures_that_do_not_fit(sd, converted, tmp_path, capsys):
    small, text, right = (tmp_path / name for name in ("small.png", "text.png", "right.png"))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(small)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(right)
    text.write_text("no image")
    out = tmp_path / "out"
    for argv, words in (
        ((f"--image={right}", f"--mask={small}"), ("small.png", "8x8", "16x16")),
        ((f"--image={text}",), ("text.png", "no image")),
        ((f"--image={right}", "--strength=1.5"), ("--strength=1.5",)),
        ((f"--image={right}", "--strength=-0.1"), ("--strength=-0.1",)),
        (("--strength=0.5",), ("--strength=0.5", "--image")),
        ((f"--mask={right}",), ("--mask", "--image")),
        ((f"--control={right}",), ("--control",)),
        ((f"--controlnet={tmp_path}/none", f"--control={right}"), ("config.json",)),
        ((f"--lora={tmp_path}/none.safetensors",), ("none.safetensors",)),
        (("--size=10,16",), ("--size=10,16",)),
        (("--seeds=1,x",), ("--seeds=1,x",)),
        (("--label=3",), ("--label",)),
    ):
        argv = (f"--workdir={converted}", f"--out={out}", "--num=1", *argv)
        assert sd.command(sample, *argv) == 2
        refused(capsys, *words)
        assert not out.exists()


def test_several_seeds_and_prompt_files(sd, converted, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\nthe sea\n")
    argv = (
        f"--workdir={converted}",
        f"--out={tmp_path}/out",
        f"--prompts_file={tmp_path}/prompts.txt",
    )
    argv += ("--num=2", "--seeds=3,4", "--steps=2", "--size=16,32", "--tile=16")
    assert sd.command(sample, *argv) == 0
    found = []
    for i in range(4):
        with Image.open(tmp_path / "out" / f"{i:05d}.png") as picture:
            assert picture.size == (32, 16)
            found.append((picture.info["prompt"], picture.info["seed"]))
    assert found == [("a fox", "3"), ("the sea", "3"), ("a fox", "4"), ("the sea", "4")]
