"""What the configs of DDPM and its successors in pixel space share."""

from ml_collections import ConfigDict

from configs.common import denoiser, smoke


def ddpm(name: str, flip: bool) -> ConfigDict:
    """What the authors' configs share (hojonathanho/diffusion, `scripts/run_*.py`)."""
    config = denoiser()
    config.data.update(name=name, dir="runs/data", flip=flip)
    config.model.dtype = "float32"
    config.train.update(log_every_steps=100, save_every_steps=10_000)
    config.optim.update(warmup_steps=5000, clip_norm=1.0)
    config.ema.decay = 0.9999
    config.sample.update(sampler="ddpm", steps=1000, clip=True)
    return config


def ddpm_unet() -> dict:
    """The U-Net for 32x32 images: 35,746,307 parameters on three channels."""
    return {
        "kind": "unet",
        "out_channels": 3,
        "channels": 128,
        "multipliers": (1, 2, 2, 2),
        "blocks": 2,
        "attention": (False, True, False, False),
        "heads": 1,
        "groups": 32,
        "dropout": 0.1,
    }


def ddpm_unet_256() -> dict:
    """The U-Net for 256x256 images: 113,673,219 parameters; attention at 16x16."""
    return ddpm_unet() | {
        "multipliers": (1, 1, 2, 2, 4, 4),
        "attention": (False, False, False, False, True, False),
        "dropout": 0.0,
    }


def adm_unet() -> dict:
    """What ADM's networks share; improved DDPM's resample by convolutions."""
    return ddpm_unet() | {
        "scale_shift": True,
        "resblock_updown": True,
        "epsilon": 1e-5,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0.0,
    }


def ddpm_unet_small() -> dict:
    """A U-Net for grey 32x32 images that trains in minutes on a CPU: 627,433 parameters."""
    return ddpm_unet() | {
        "out_channels": 1,
        "channels": 24,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "attention": (False, True, False),
        "groups": 8,
        "dropout": 0.0,
    }


def small(name: str, steps: int) -> ConfigDict:
    """DDPM of that network on grey images padded to 32x32, in small batches, for minutes."""
    config = ddpm(name, flip=False)
    config.data.update(channels=1, fit="pad")
    config.model.denoiser = ddpm_unet_small()
    config.train.update(steps=steps, batch_size=16)
    config.train.save_every_steps = steps // 2
    config.optim.update(learning_rate=1e-3, warmup_steps=100, decay="cosine", decay_steps=steps)
    config.ema.update(decay=0.999, ramp=True)
    config.evaluation.every_steps = steps // 2
    config.evaluation.examples = 1000
    config.sample.update({"sampler": "ddim", "steps": 50, "batch_size": 250})
    config.sample.options = {"eta": 1.0}
    return config


def smoke_ddpm(config: ConfigDict) -> ConfigDict:
    """A pixel-space denoiser's run of seconds: the same kind of network, tiny."""
    if config.model.denoiser.kind == "transformer":
        config.model.denoiser.update({"width": 48, "depth": 2, "heads": 2})
    else:
        levels = min(2, len(config.model.denoiser.multipliers))
        if "head_dim" in config.model.denoiser:
            config.model.denoiser.update({"heads": 1, "head_dim": None})
        config.model.denoiser.update(
            {
                "channels": 8,
                "multipliers": (1, 2)[:levels],
                "blocks": 1,
                "attention": (False, True)[:levels],
                "groups": 4,
            }
        )
    if "num_steps" in config.process.schedule:
        config.process.schedule.num_steps = min(config.process.schedule.num_steps, 100)
    config.sample.update({"steps": 2, "batch_size": 8})
    return smoke(config)
