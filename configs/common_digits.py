"""The default job, and the same on Fashion-MNIST: one description of each network, for the configs
that share it."""

from ml_collections import ConfigDict

from configs.common import denoiser, smoke


def digits_data(config: ConfigDict) -> ConfigDict:
    config.data.update(name="captioned_digits", dir="runs/data")
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


def fashion_first_stage() -> ConfigDict:
    """32x32x1 to 8x8x4, in the same way."""
    return ConfigDict({**digits_first_stage(), "image_channels": 1, "channels": 64, "groups": 16})


def video_first_stage() -> ConfigDict:
    """8x16x16x1 to 2x4x4x8, in the same way on three axes."""
    sizes = {"image_channels": 1, "channels": 64, "groups": 16, "z_channels": 8}
    return ConfigDict({**digits_first_stage(), **sizes})


def digits_stored(data_name: str, steps: int) -> ConfigDict:
    """A denoiser on the default job's latents of pictures of digits, and how it is trained."""
    config = denoiser()
    stored(config, data_name)
    config.train.update(steps=steps, batch_size=16, log_every_steps=250, save_every_steps=3000)
    config.optim.update(name="adamw", learning_rate=1e-3, warmup_steps=100, decay="cosine")
    config.optim.update(decay_steps=steps, b2=0.99, weight_decay=1e-3, clip_norm=1.0)
    config.ema.update(decay=0.999, ramp=True)
    config.sample.update(sampler="dpmpp_2m", steps=25, batch_size=250)
    config.evaluation.examples = 2000  # stored latents in a held-out loss; these are training ones
    return config


def stored(config: ConfigDict, data_name: str) -> None:
    """Where the latents are, and how they are made."""
    config.data.update(name="latents", dir=f"runs/latents/{data_name}")
    config.latents = {
        "first_stage": "runs/quickstart/autoencoder",  # the workdir of its run
        "data_name": data_name,
        "data_dir": "runs/data",
        "epochs": 1,  # compositions stored of each digit
        "tokenizer": "word",  # trained on the captions: "word" or "bpe"
        "scaling": "channel",  # "channel", "std" or "fixed"; see diffusion/data/latents.py
        "scale": 1.0,  # of "fixed"
        "scaling_examples": 0,  # of "std"; 0: all
        "contexts": False,  # the text encoder is trained: there is nothing to store
        "shard_size": 4500,
        "batch_size": 250,
    }


def fashion_latents(config: ConfigDict) -> None:
    """Those of Fashion-MNIST, and their first stage."""
    stored(config, "fashion_mnist")
    config.data.update(channels=1, fit="pad")
    config.latents.first_stage = "runs/fashion_autoencoder"
    config.model.autoencoder = fashion_first_stage()


def smoke_stored(config: ConfigDict) -> ConfigDict:
    """A run of seconds."""
    config.latents.update({"epochs": 1, "shard_size": 1500})
    config.sample.update({"steps": 2, "batch_size": 8})
    return smoke(config)


def digits_restored(data_name: str, steps: int, **told: object) -> ConfigDict:
    """A denoiser of those latents that reads no captions: other channels join x_t's."""
    config = digits_networks(digits_stored(data_name, steps))
    del config.model.text_encoder
    config.model.denoiser.update({"transformer_depth": 0, "pool_context": False})
    config.conditioning.update({"drop": 0.0, **told})
    config.latents.epochs = 2
    return config


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
    config.conditioning.update(drop=0.1, mask_padding=True)
    config.process.schedule = {"name": "scaled_linear", "num_steps": 1000}
    config.process.objective.update(weighting="min_snr", gamma=0.5)
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
        "positions": "both",  # the caption says where, which distances alone do not tell
        "activation": "swiglu",
        "mult": 8 / 3,
    }


def sit(config: ConfigDict) -> None:
    """SiT's linear path and velocity, t drawn uniformly, sampled by 50 steps of Euler's method."""
    config.process.schedule = {"name": "flow"}
    config.process.prediction = "velocity"
    config.process.objective = {"norm": "l2", "weighting": "simple"}
    config.sample.update(sampler="euler", steps=50)


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
    config.train.update(batch_size=16, log_every_steps=50)
    config.optim.update(name="adamw", learning_rate=1e-3, warmup_steps=50)
    config.optim.update(decay="cosine", b2=0.99, clip_norm=1.0)
    config.sample.update(sampler="dpmpp_2m", steps=25, guidance_scale=5.0, batch_size=250)
    return config
