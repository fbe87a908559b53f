"""EDM's process on CIFAR-10, unconditional (Karras et al. 2022, arXiv:2206.00364).

    python -m experiments.train --config=configs/edm_cifar10.py --workdir=DIR

Preconditioning, loss, noise levels, Heun's sampler with 18 steps (35 evaluations), and the training
settings of NVlabs/edm's `train.py`: 200 million images in batches of 512, Adam at 1e-3 after a
linear ramp over 10 million, EMA with a half-life of 0.5 million images, dropout 0.13. The paper's
FID is 1.97, the least of three sets of samples, with what is not here: the DDPM++ network (this is
the same width and depth in ADM's blocks) and the augmentation pipeline (12%). Mirroring stays.
"""

from configs import common, common_ddpm

BATCH = 512


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_ddpm.ddpm("cifar10", flip=True)
    config.model.denoiser = common_ddpm.ddpm_unet() | {
        "multipliers": (2, 2, 2),
        "blocks": 4,
        "attention": (False, True, False),
        "dropout": 0.13,
        "epsilon": 1e-5,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0.0,
    }
    config.process.prediction = "edm"
    config.process.schedule = {"name": "edm"}
    config.process.objective = {"norm": "l2", "weighting": "edm"}
    config.train.steps = 200_000_000 // BATCH
    config.train.batch_size = BATCH
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 10_000_000 // BATCH
    config.optim.clip_norm = 0.0
    config.ema.decay = 0.5 ** (BATCH / 500_000)
    config.ema.ramp = True  # EDM's own ramp is 5% of the images seen
    config.sample.update(sampler="heun", steps=18, clip=False)
    return common_ddpm.smoke_ddpm(config) if smoke else config
