"""DDPM on three axes: eight frames of a handwritten digit that moves along a line.

    python -m experiments.prepare_data --config=configs/video_digits.py
    python -m experiments.train --config=configs/video_digits.py --workdir=DIR

The same U-Net, loss and trainer as for images (arXiv:2006.11239), its convolutions and attention
over (frame, row, column); the data is described in `diffusion/data/synthetic.py`. Minutes on a CPU;
pictures and the straightness of the motion: experiments/results/axes/.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.denoiser()
    config.data.update(name="moving_digits", dir="runs/data")
    del config.data.image_size  # a number, of images
    config.data.update(image_size=(8, 16, 16), channels=1)
    config.model.dtype = "float32"
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
    config.train.update(steps=600, batch_size=16)
    config.optim.update(learning_rate=1e-3, warmup_steps=100, clip_norm=1.0)
    config.ema.decay = 0.995
    config.ema.ramp = True  # in so few steps, the weights of the first would stay in it
    config.process.variance = "fixed_small"
    config.sample.update(sampler="ddpm", steps=100, clip=True)
    config.evaluation.preview = 4
    return common_ddpm.smoke_ddpm(config) if smoke else config
