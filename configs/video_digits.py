"""DDPM on three axes: eight frames of a handwritten digit that moves along a line; `unet`
(default), `transformer`, or `latent`.

    python -m experiments.prepare_data --config=configs/video_digits.py
    python -m experiments.train --config=configs/video_digits.py --workdir=DIR

`unet`: the same U-Net, loss and trainer as for images (arXiv:2006.11239), its convolutions and
attention over (frame, row, column). `transformer`: SiT (arXiv:2401.08740) on patches of 2 frames by
4 x 4 pixels, all of which look at each other, told which digit. `latent`: the same on latents of
configs/video_autoencoder.py, patches of one place, 4 frames by 4 x 4 pixels; `encode_latents` comes
before it. The data is described in `diffusion/data/synthetic.py`. Minutes on a CPU; pictures, the
straightness of the motion and how many frames a classifier reads: experiments/results/axes/.
"""

from configs import common, common_ddpm, common_digits


def get_config(arg=None):
    which, smoke = common.parse(arg, ("unet", "transformer", "latent"))
    if which == "latent":
        config = _latent()
        return common_digits.smoke_stored(config) if smoke else config
    config = common.denoiser()
    config.data.update(name="moving_digits", dir="runs/data")
    del config.data.image_size  # a number, of images
    config.data.update(image_size=(8, 16, 16), channels=1)
    config.model.dtype = "float32"
    config.train.batch_size = 16
    config.optim.update(learning_rate=1e-3, warmup_steps=100, clip_norm=1.0)
    config.ema.ramp = True  # in so few steps, the weights of the first would stay in it
    config.sample.steps = 100
    config.evaluation.preview = 4
    {"unet": _unet, "transformer": _transformer}[which](config)
    return common_ddpm.smoke_ddpm(config) if smoke else config


def _unet(config):
    config.model.denoiser = {
        "kind": "unet",
        "out_channels": 1,
        "channels": 16,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "attention": (False, False, True),
        "groups": 8,
    }
    config.process.schedule = {"name": "cosine", "num_steps": 1000}
    config.process.variance = "fixed_small"
    config.train.steps = 600
    config.ema.decay = 0.995
    config.sample.update(sampler="ddpm", clip=True)


def _transformer(config):
    config.model.denoiser = {
        "kind": "transformer",
        "out_channels": 1,
        "size": (8, 16, 16),
        "patch": (2, 4, 4),
        "width": 144,
        "depth": 6,
        "heads": 6,  # 24 channels each, pairs of which rotary positions deal to three axes
        "num_classes": 11,  # the last is the null one
        "qk_norm": True,
        "norm": "rms",
        "positions": "both",
        "activation": "swiglu",
        "mult": 8 / 3,
    }
    config.conditioning.drop = 0.1
    config.process.schedule = {"name": "flow"}
    config.process.prediction = "velocity"
    config.train.update(steps=4000, log_every_steps=250, save_every_steps=2000)
    config.optim.update(name="adamw", decay="cosine", decay_steps=4000, b2=0.99)
    config.ema.decay = 0.999
    config.sample.update(sampler="euler", guidance_scale=2.0)


def _latent():
    steps = 5000
    config = common_digits.digits_stored("moving_digits", steps)
    config.latents.update({"first_stage": "runs/video_autoencoder", "epochs": 8})
    config.data.channels = 1
    del config.data.image_size  # a number, of images
    config.data.image_size = (8, 16, 16)
    config.model.dtype = "float32"
    config.model.autoencoder = common_digits.video_first_stage()
    config.model.denoiser = {
        **common_digits.digits_transformer(),
        "out_channels": 8,
        "size": (2, 4, 4),
        "patch": 1,
        "width": 144,
        "heads": 6,  # 24 channels each, as above
        "cross": False,
        "pool_context": False,
        "num_classes": 11,
        "condition_std": None,
    }
    config.conditioning.drop = 0.1
    common_digits.sit(config)
    config.optim.learning_rate = 2e-3
    config.sample.guidance_scale = 2.0
    return config
