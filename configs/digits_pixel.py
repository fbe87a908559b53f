"""Unconditional pixel-space DDPM (arXiv:2006.11239) on captioned digits, 32x32x3.

    python -m experiments.train --config=configs/digits_pixel.py --workdir=DIR

The paper's U-Net at a quarter of its width; linear schedule, T = 1000, epsilon prediction.
"""

from configs import common, common_digits


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_digits.digits_data(common.denoiser())
    config.model.dtype = "float32"
    config.model.denoiser = {
        "kind": "unet",
        "out_channels": 3,
        "channels": 32,
        "multipliers": (1, 2, 2, 2),
        "blocks": 1,
        "attention": (False, True, False, False),
        "groups": 8,
        "dropout": 0.1,
    }
    config.train.update(steps=3000, batch_size=32, log_every_steps=100)
    config.optim.update(learning_rate=5e-4, warmup_steps=200, clip_norm=1.0)
    config.ema.decay = 0.999
    config.sample.clip = True
    if smoke:
        config.model.denoiser.update(
            {"channels": 8, "groups": 4, "multipliers": (1, 2), "attention": (False, True)}
        )
        config.sample.update({"steps": 2, "batch_size": 8})
        common.smoke(config)
    return config


def sweep(add):
    # Is the learning rate right for a quarter of the width, by more than seeds differ?
    rates = add.values("optim.learning_rate", 2e-4, 5e-4, 1e-3)
    add(add.product(rates, add.values("seed", 0, 1)))
