"""Runs of a second, for tests: `--config=tests/faults/tiny.py:KIND`.

KIND is "denoiser" or "first_stage" (an autoencoder and its discriminator, both with Adam, a batch
norm's running statistics and an average), on series of 16 samples that are made as they are read;
or "folder", a text-conditional denoiser on a folder of captioned images.
"""

from configs import common

STEPS, SAVE_EVERY = 10, 3


def get_config(kind="denoiser"):
    config = {"denoiser": denoiser, "first_stage": first_stage, "folder": folder}[kind]()
    config.model.dtype = "float32"
    config.train.update({"steps": STEPS, "batch_size": 8, "log_every_steps": 1})
    config.train.update({"save_every_steps": SAVE_EVERY, "tensorboard": False})
    config.wandb.mode = "disabled"
    return config


def _series(config):
    config.data.name = "signals"
    config.data.examples = 28  # not a multiple of the batch: a save falls within an epoch
    del config.data.image_size
    config.data.image_size = (16,)
    config.data.channels = 1
    config.ema.decay = 0.9
    config.ema.profiles = (0.05, 0.2)
    return config


def _unet(channels):
    return {
        "kind": "unet",
        "out_channels": channels,
        "channels": 32,  # its kernels are large enough to be split over devices
        "multipliers": (1,),
        "blocks": 1,
        "attention": (False,),
        "mid_attention": False,
        "groups": 4,
    }


def denoiser():
    config = _series(common.denoiser())
    config.model.denoiser = _unet(1)
    config.process.schedule = {"name": "ddpm_linear", "num_steps": 20}
    config.sample.steps = 2
    config.optim.clip_norm = 1.0
    return config


def first_stage():
    config = _series(common.first_stage("kl"))
    config.model.autoencoder = {
        "name": "kl",
        "image_channels": 1,
        "channels": 8,
        "multipliers": (1, 1),
        "blocks": 1,
        "mid_attention": False,
        "z_channels": 2,
        "groups": 4,
    }
    config.model.discriminator.update({"channels": 8, "layers": 1, "norm": "batch", "groups": 4})
    config.loss.update({"adversarial": "hinge", "adversarial_start_steps": 2})
    return config


def folder():
    config = common.denoiser()
    config.data.name = "folder"
    config.data.eval_split = "train"
    config.data.image_size = 8
    config.online = {"scale": 1.0, "tokenizer": "word"}
    config.model.denoiser = {**_unet(3), "channels": 8, "transformer_depth": 1}
    config.model.denoiser.update({"attention": (True,), "heads": 1})
    config.model.text_encoder = {
        "vocab_size": 4096,
        "max_length": 8,
        "width": 8,
        "layers": 1,
        "heads": 1,
        "activation": "gelu",
        "causal": False,
    }
    config.process.schedule = {"name": "ddpm_linear", "num_steps": 20}
    config.sample.steps = 2
    return config
