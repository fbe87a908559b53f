"""The default job: one description of each network, for the configs that share it."""

from ml_collections import ConfigDict

from configs.common import denoiser


def digits_data(config: ConfigDict) -> ConfigDict:
    config.data.name = "captioned_digits"
    config.data.dir = "runs/data"
    return config


def digits_first_stage() -> ConfigDict:
    """32x32x3 to 8x8x4. All blocks run at 8x8: `patch` folds 4x4 pixels into channels."""
    return ConfigDict(
        {
            "name": "kl",
            "channels": 96,
            "multipliers": (1,),
            "blocks": 0,
            "mid_attention": False,
            "z_channels": 4,
            "patch": 4,
            "groups": 24,
        }
    )


def digits_networks(config: ConfigDict) -> ConfigDict:
    """The default job's text encoder and U-Net, and how they are trained."""
    config.model.dtype = "float32"
    config.model.autoencoder = digits_first_stage()
    config.model.denoiser = {
        "kind": "unet",
        "out_channels": 4,
        "channels": 32,
        "multipliers": (1, 3),
        "blocks": 1,
        "attention": (False, False),  # in the middle alone: 4x4 places
        "heads": None,
        "head_dim": 32,
        "transformer_depth": 1,
        "pool_context": True,
        "groups": 16,
        "epsilon": 1e-5,
        "scale_shift": True,
        "flip_sin_to_cos": True,
        "freq_shift": 0.0,
        "downsample_padding": 1,
    }
    config.model.text_encoder = {
        "vocab_size": 64,
        "max_length": 16,
        "width": 96,
        "layers": 1,
        "heads": 3,
        "activation": "gelu",
        "causal": False,
    }
    config.conditioning.drop = 0.1
    config.conditioning.mask_padding = True
    config.process.schedule = {"name": "scaled_linear", "num_steps": 1000}
    config.process.objective.weighting = "min_snr"
    config.process.objective.gamma = 0.5
    return config


def digits_transformer() -> dict:
    """A transformer on the same latents: 4 x 4 patches, which look at the caption's words.

    Depth and steps were chosen by speed alone: as many minutes as the U-Net's 12,000 steps.
    """
    return {
        "kind": "transformer",
        "out_channels": 4,
        "size": 8,
        "patch": 2,
        "width": 128,
        "depth": 6,
        "heads": 4,
        "cross": True,
        "pool_context": True,
        "qk_norm": True,
        "norm": "rms",
        "positions": "rotary",
        "activation": "swiglu",
        "mult": 8 / 3,
    }


def digits_teacher(config: ConfigDict) -> ConfigDict:
    """Starts from the default job's run, and keeps its U-Net as teacher and its text encoder."""
    config.init_from = "runs/quickstart/ldm"
    config.conditioning.train_text_encoder = False
    config.model.teacher = {**config.model.denoiser.to_dict(), "second_time": False}
    return config


def digits_adapter() -> ConfigDict:
    """What is trained on top of the default job's run, which stays frozen at `init_from`."""
    config = digits_networks(digits_data(denoiser()))
    config.init_from = "runs/quickstart/ldm"
    config.conditioning.train_text_encoder = False
    config.online = {
        "scale": 1.0,
        "tokenizer": "word",
    }  # as `latent_diffusion`'s; the run's own count
    config.train.batch_size = 16
    config.train.log_every_steps = 50
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.optim.decay = "cosine"
    config.optim.b2 = 0.99
    config.optim.clip_norm = 1.0
    config.sample.sampler = "dpmpp_2m"
    config.sample.steps = 25
    config.sample.guidance_scale = 5.0
    config.sample.batch_size = 250
    return config
