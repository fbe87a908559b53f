"""DDPM on one axis: series like electrocardiograms, 256 samples of one channel, made as read.

    python -m experiments.train --config=configs/signal_ddpm.py --workdir=DIR

The same U-Net, loss and trainer as for images (arXiv:2006.11239); the data is described in
`diffusion/data/synthetic.py`. Minutes on a CPU; pictures and numbers: experiments/results/axes/.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.denoiser()
    config.data.name = "signals"
    del config.data.image_size  # a number, of images
    config.data.update(image_size=(256,), channels=1)
    config.model.dtype = "float32"
    config.model.denoiser = {
        "kind": "unet",
        "out_channels": 1,
        "channels": 32,
        "multipliers": (1, 2, 2, 2),
        "blocks": 1,
        "attention": (False, False, True, True),
        "groups": 8,
    }
    config.process.schedule = {"name": "cosine", "num_steps": 1000}
    config.train.update(steps=1500, batch_size=32)
    config.optim.update(learning_rate=1e-3, warmup_steps=100, clip_norm=1.0)
    config.ema.decay = 0.995
    config.ema.ramp = True  # in so few steps, the weights of the first would stay in it
    config.process.variance = "fixed_small"
    config.sample.update(sampler="ddpm", steps=250, clip=True)
    config.evaluation.preview = 4
    return common_ddpm.smoke_ddpm(config) if smoke else config
