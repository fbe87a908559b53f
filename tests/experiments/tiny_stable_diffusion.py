"""A tiny, random Stable Diffusion of Diffusers', and both sides' samples of it: for `conftest.py`.

It is read from its path and asked for by the fixture `sd`, since it imports torch.
"""

import dataclasses
import warnings

import jax
import numpy as np

from diffusion.process import keys as ks
from experiments import sample
from experiments.host import cli

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
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
UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": (CD, "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
# The same networks as flags of a config.
FLAGS = (
    "--config.data.image_size=16",
    *(f"--config.model.denoiser.{k}" for k in ("multipliers=(1,2)", "attention=(True,False)")),
    *(f"--config.model.denoiser.{k}" for k in ("channels=16", "blocks=1", "groups=8", "heads=4")),
    *(f"--config.model.autoencoder.{k}" for k in ("channels=8", "multipliers=(1,2)", "groups=4")),
    *(f"--config.model.text_encoder.{k}" for k in ("vocab_size=514", "max_length=16")),
    *(f"--config.model.text_encoder.{k}" for k in ("width=24", "layers=2", "heads=3")),
)


def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


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
    ups = {"up_block_types": ("UpBlock2D", CU), "sample_size": 8, "in_channels": in_channels}
    return randomise(UNet2DConditionModel(**UNET, **ups), seed)


def first_stage(scaling_factor, **more):
    given = {"latent_channels": 4, **more}
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **given,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling_factor,
    )


def pipeline(directory):
    """Diffusers' pipeline, as it is saved to `directory`."""
    quiet()
    torch.manual_seed(0)
    vae = first_stage(0.18215)
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
        pipe.save_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipeline, num, seed):
    """What a pipeline starts from, channels first."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(num))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    drawn = ks.normal(keys, (num, *pipeline.task.sample_shape))
    return torch.from_numpy(np.moveaxis(np.asarray(drawn), -1, 1).copy())


def ours(pipeline, given=None, negative=None, steps=20, strength=1.0):
    """Two pictures, float in [0, 1]."""
    made = dataclasses.replace(pipeline.changed(steps=steps, guidance_scale=7.5), batch_size=2)
    with jax.default_matmul_precision("highest"):
        run = made.compiled(strength=strength, rounded=False)
        columns = made.columns(PROMPTS, negative) | (given or {})
        return np.concatenate(list(made.images(columns, 2, [5], run=run)))


def theirs(pipe, model, **options):
    options = {"num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "np"} | options
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(PROMPTS, **options).images


def command(module, *argv):
    return cli.run(module.define, module.main, [str(a) for a in argv])


def sampled(workdir, out, *argv):
    """The command's pictures in [0, 1]: two, of seed 5."""
    argv = ("--num=2", "--seed=5", "--steps=20", "--npz", *argv)
    assert command(sample, f"--workdir={workdir}", f"--out={out}", *argv) == 0
    return np.load(out / "samples.npz")["images"] / 255
