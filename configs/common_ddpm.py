"""What the configs of DDPM and its successors in pixel space share."""

from ml_collections import ConfigDict

from configs.common import denoiser, smoke


def ddpm(name: str, flip: bool) -> ConfigDict:
    """What the authors' configs share (hojonathanho/diffusion, `scripts/run_*.py`)."""
    config = denoiser()
    config.data.name = name
    config.data.dir = "runs/data"
    config.data.flip = flip
    config.model.dtype = "float32"
    config.train.log_every_steps = 100
    config.train.save_every_steps = 10_000
    config.optim.warmup_steps = 5000
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.9999
    config.sample.sampler = "ddpm"
    config.sample.steps = 1000
    config.sample.clip = True
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


def smoke_ddpm(config: ConfigDict) -> ConfigDict:
    """A pixel-space denoiser's run of seconds: the same kind of network, tiny."""
    levels = min(2, len(config.model.denoiser.multipliers))
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
