"""Diffusers' pipelines in and out, sampled on both sides; what is broken leaves nothing."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.process import gaussian
from experiments import cli, convert, generate, pipelines, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from safetensors.numpy import load_file, save_file
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = ["A fox at dawn, 4k", "the sea; naïve painting"]
NEGATIVE = ["blurred, a dog", "noise"]
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
CD, CU = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def command(*argv) -> int:
    return cli.run(convert.define, convert.main, [str(a) for a in argv])


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{a}</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def unet(in_channels=4, seed=0):
    config = {
        "sample_size": 8,
        "in_channels": in_channels,
        "block_out_channels": (16, 32),
        "down_block_types": (CD, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CU),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    }
    return randomise(UNet2DConditionModel(**config), seed)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Diffusers' pipeline, tiny and random, as it was loaded from the directory beside it."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18215,
    )
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        bos_token_id=512,
        eos_token_id=513,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline(
            vae=randomise(vae, 1),
            text_encoder=randomise(CLIPTextModel(text), 2),
            tokenizer=tokenizer(),
            unet=unet(),
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        directory = tmp_path_factory.mktemp("diffusers") / "pipeline"
        pipe.save_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe, directory


@pytest.fixture(scope="session")
def converted(reference, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "run"
    assert command("--from=diffusers", f"--source={reference[1]}", f"--workdir={target}") == 0
    return target


def noise(model, num, seed):
    """What `generate` starts from, channels first."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(num))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    drawn = gaussian.normal(keys, (num, *model.task.sample_shape))
    return torch.from_numpy(np.moveaxis(np.asarray(drawn), -1, 1).copy())


def ours(model, num=2, **options):
    options = {"steps": 20, "guidance_scale": 7.5, "rounded": False, "batch_size": num} | options
    with jax.default_matmul_precision("highest"):
        return np.concatenate(list(generate.images(model, num, PROMPTS, 5, **options)))


def theirs(pipe, model, **options):
    options = {"num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "np"} | options
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(PROMPTS, **options).images


def test_a_whole_pipeline_equals_diffusers(reference, converted):
    model = generate.load(converted)
    found = ours(model, negative=NEGATIVE)
    given = noise(model, 2, 5)
    wanted = theirs(reference[0], model, latents=given, negative_prompt=NEGATIVE)
    assert found.shape == wanted.shape == (2, 16, 16, 3)
    assert wanted.std() > 0.05
    assert np.abs(found - wanted).max() < 1e-3
    plain = theirs(reference[0], model, latents=given)
    assert np.abs(plain - wanted).max() > 1e-2  # the negative prompt counts


def test_image_to_image_equals_diffusers(reference, converted, tmp_path):
    image = np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    model = generate.load(converted)
    given = pipelines.columns(model, image=str(tmp_path / "in.png"))
    found = ours(model, given=given, strength=0.6)
    pipe = StableDiffusionImg2ImgPipeline(**reference[0].components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    drawn = noise(model, 2, 5)
    # Diffusers draws both noises itself: the posterior's is none, the process's is ours.
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: drawn)
        patch.setattr(f"{module}.retrieve_latents", lambda out, **_: out.latent_dist.mode())
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        wanted = theirs(pipe, model, image=pixels.repeat(2, 1, 1, 1), strength=0.6)
    assert np.abs(found - wanted).max() < 1e-3
    less = ours(model, given=given, strength=0.2)
    changed = [np.abs(x - image / 255).mean() for x in (found, less)]
    assert changed[1] < changed[0]


def test_inpainting_keeps_what_the_mask_does_not_cover(converted, tmp_path):
    image = np.random.default_rng(4).integers(0, 255, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    model = generate.load(converted)
    given = pipelines.columns(model, str(tmp_path / "in.png"), str(tmp_path / "mask.png"))
    (found,) = generate.images(model, 1, PROMPTS[:1], 0, given=given, steps=4)
    np.testing.assert_array_equal(found[0][mask == 0], image[mask == 0])
    assert np.abs(found[0].astype(int) - image)[mask > 0].max() > 5


def test_directories_go_round(reference, converted, tmp_path):
    out = tmp_path / "out"
    argv = ("--to=diffusers", f"--workdir={converted}", f"--out={out}")
    assert command(*argv) == 0
    source = reference[1]
    for name in ("unet", "vae", "text_encoder"):
        (first,) = (source / name).glob("*.safetensors")
        (second,) = (out / name).glob("*.safetensors")
        wanted, found = load_file(first), load_file(second)
        found = {key.removeprefix("text_model."): value for key, value in found.items()}
        wanted = {key.removeprefix("text_model."): value for key, value in wanted.items()}
        assert found.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(found[key], wanted[key], err_msg=f"{name}/{key}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = StableDiffusionPipeline.from_pretrained(out)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, DDIMScheduler)
    assert {key: again.scheduler.config[key] for key in SCHEDULER} == SCHEDULER
    model = generate.load(converted)
    given = noise(model, 2, 5)
    few = {"latents": given, "num_inference_steps": 2}
    found, wanted = (theirs(pipe, model, **few) for pipe in (again, reference[0]))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_nine_channels_inpaint_as_diffusers_does(reference, tmp_path):
    components = {**reference[0].components, "unet": unet(in_channels=9, seed=3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
        pipe.save_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    run = tmp_path / "run"
    source = tmp_path / "pipeline"
    assert command("--from=diffusers", f"--source={source}", f"--workdir={run}") == 0
    image = np.random.default_rng(6).integers(0, 255, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[2:10, 4:] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    model = generate.load(run)
    assert model.config.conditioning.concat == "inpaint"
    given = pipelines.columns(model, str(tmp_path / "in.png"), str(tmp_path / "mask.png"))
    found = ours(model, given=given)
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
        patch.setattr(f"{module}.retrieve_latents", lambda out, **_: out.latent_dist.mode())
        wanted = theirs(
            pipe,
            model,
            latents=noise(model, 2, 5),
            image=Image.fromarray(image),
            mask_image=Image.fromarray(mask),
            height=16,
            width=16,
        )
    # Diffusers leaves the pixels that are kept as its decoder draws them.
    inside = mask > 0
    assert np.abs(found - wanted)[:, inside].max() < 1e-3


# -- what is broken ------------------------------------------------------------------------------


def refused(capsys, *words) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def reshape(path):
    tensors = load_file(path)
    name = "conv_in.bias"
    save_file({**tensors, name: tensors[name][:-1].copy()}, path, metadata={"format": "pt"})


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: (p / "model_index.json").unlink(), ("model_index.json", "missing")),
        (lambda p: (p / "model_index.json").write_text("{"), ("model_index.json", "JSON")),
        (lambda p: edit(p / "model_index.json", _class_name="FluxPipeline"), ("FluxPipeline",)),
        (lambda p: edit(p / "unet" / "config.json", _class_name="Transformer"), ("config.json",)),
        (lambda p: shutil.rmtree(p / "vae"), ("vae", "missing")),
        (lambda p: (p / WEIGHTS).unlink(), ("unet", "missing")),
        (lambda p: truncate(p / WEIGHTS), ("diffusion_pytorch_model", "truncated")),
        (lambda p: reshape(p / WEIGHTS), ("conv_in.bias", "shape")),
        (
            lambda p: edit(p / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler"),
            ("scheduler_config.json", "LCMScheduler"),
        ),
        (
            lambda p: edit(p / "scheduler" / "scheduler_config.json", trained_betas=[0.1]),
            ("trained_betas",),
        ),
        (lambda p: shutil.rmtree(p / "tokenizer"), ("tokenizer", "missing")),
    ],
)
def test_a_broken_pipeline_leaves_nothing(reference, tmp_path, capsys, spoil, words):
    shutil.copytree(reference[1], tmp_path / "pipeline")
    spoil(tmp_path / "pipeline")
    target = tmp_path / "run"
    source = tmp_path / "pipeline"
    assert command("--from=diffusers", f"--source={source}", f"--workdir={target}") == 2
    refused(capsys, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipeline"]


def test_commands_refuse_what_does_not_go_together(reference, converted, tmp_path, capsys):
    source = reference[1]
    for argv, words in (
        (("--workdir=x",), ("--from", "--to")),
        (("--from=diffusers", "--workdir=x"), ("--source",)),
        (("--from=diffusers", "--source=nowhere", "--workdir=x"), ("nowhere",)),
        (("--to=diffusers", f"--workdir={converted}"), ("--out",)),
        (("--to=diffusers", f"--workdir={tmp_path}/no", "--out=y"), ("no run",)),
        (
            ("--from=diffusers", f"--source={source}", f"--workdir={converted}"),
            (str(converted), "not an empty folder"),
        ),
        (
            ("--from=compvis", f"--source={source}/model_index.json", "--workdir=x"),
            ("model_index",),
        ),
    ):
        assert command(*argv) == 2
        refused(capsys, *words)


def test_a_hostile_pickle_is_refused(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"state_dict": {"x": Hostile()}}, tmp_path / "model.ckpt")
    argv = (f"--source={tmp_path}/model.ckpt", f"--workdir={tmp_path}/run")
    assert command("--from=compvis", *argv) == 2
    refused(capsys, "model.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt"]


def test_sampling_refuses_pictures_that_do_not_fit(converted, tmp_path, capsys):
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
        assert cli.run(sample.define, sample.main, argv) == 2
        refused(capsys, *words)
        assert not out.exists()


def test_several_seeds_and_prompt_files(converted, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\nthe sea\n")
    argv = (
        f"--workdir={converted}",
        f"--out={tmp_path}/out",
        f"--prompts_file={tmp_path}/prompts.txt",
    )
    argv += ("--num=2", "--seeds=3,4", "--steps=2", "--size=16,32", "--tile=16")
    assert cli.run(sample.define, sample.main, argv) == 0
    found = []
    for i in range(4):
        with Image.open(tmp_path / "out" / f"{i:05d}.png") as picture:
            assert picture.size == (32, 16)
            found.append((picture.info["prompt"], picture.info["seed"]))
    assert found == [("a fox", "3"), ("the sea", "3"), ("a fox", "4"), ("the sea", "4")]
