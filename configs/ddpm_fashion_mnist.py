"""DDPM on Fashion-MNIST, 28x28 padded to 32x32: the CIFAR-10 recipe (`:gpu`), or `:cpu`.

    python -m experiments.prepare_data --config=configs/ddpm_fashion_mnist.py --source_dir=DIR
    python -m experiments.train --config=configs/ddpm_fashion_mnist.py:cpu --workdir=DIR

`:gpu` has the paper's U-Net (arXiv:2006.11239) on one channel; `:cpu` 24 channels for 128, one
block a level and three levels, in small batches with a decaying learning rate, for about an hour of
one core. Not mirrored: every shoe of the data points left. Numbers: experiments/results/.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    kind, smoke = common.parse(arg, ("gpu", "cpu"))
    config = common_ddpm.ddpm("fashion_mnist", flip=False)
    config.data.update(channels=1, fit="pad")
    config.model.denoiser = common_ddpm.ddpm_unet() | {"out_channels": 1}
    config.train.update(steps=20_000, batch_size=128)
    config.optim.update(learning_rate=2e-4, warmup_steps=1000)
    config.ema.decay = 0.999
    config.evaluation.update(every_steps=2000, examples=1000)
    if kind == "cpu":
        config.model.denoiser = common_ddpm.ddpm_unet_small()
        config.train.update(steps=14_000, batch_size=16, log_every_steps=100, save_every_steps=2000)
        config.optim.update(learning_rate=1e-3, warmup_steps=500)
        config.optim.update(decay="cosine", decay_steps=14_000)
    return common_ddpm.smoke_ddpm(config) if smoke else config
