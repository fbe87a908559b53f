"""EDM on CIFAR-10 (Karras et al. 2022, arXiv:2206.00364): `:uncond` or `:cond`, with `,ncsnpp`.

    python -m experiments.train --config=configs/edm_cifar10.py --workdir=DIR

Settings of NVlabs/edm's `train.py` and README: DDPM++ (or NCSN++) of 128 channels, dropout 0.13,
augmentation of 12% with its label, 200 million images in batches of 512, Adam at 1e-3 after a
linear ramp over 10 million, EMA with a half-life of 0.5 million images and at most 5% of those
seen, Heun's sampler with 18 steps (35 evaluations). The paper's FID is 1.97 without labels and 1.79
with them (NCSN++: 1.98, 1.79), the least of three sets of samples; not re-checked here.

The authors sum the loss over a picture's values, here it is their mean: `optim.eps` is smaller by
as much. A step with a gradient that is not finite is left out, where theirs goes on with zeros.
"""

from configs import common, common_ddpm

BATCH = 512


def get_config(arg=None):
    kind, on, smoke = common.parse_switches(arg, ("uncond", "cond"), ("ncsnpp",))
    config = common_ddpm.ddpm("cifar10", flip=False)
    config.data.augment = 0.12
    config.model.denoiser = common_ddpm.ddpm_unet() | {
        "kind": "song_unet",
        "multipliers": (2, 2, 2),
        "blocks": 4,
        "attention": (False, True, False),
        "dropout": 0.13,
        "augment_dim": 9,
        "ncsnpp": "ncsnpp" in on,
    }
    if kind == "cond":
        config.model.denoiser.num_classes = 10
        config.conditioning.null_label = False
    config.process.prediction = "edm"
    config.process.schedule = {"name": "edm"}
    config.process.objective = {"norm": "l2", "weighting": "edm"}
    config.train.steps = 200_000_000 // BATCH
    config.train.batch_size = BATCH
    config.optim.learning_rate = 1e-3
    config.optim.eps = 1e-8 / (3 * 32 * 32)
    config.optim.warmup_steps = 10_000_000 // BATCH
    config.optim.clip_norm = 0.0
    config.ema.decay = 0.5 ** (BATCH / 500_000)
    config.ema.ramp_share = 0.05
    config.sample.update(sampler="heun", steps=18, clip=False, state="float64")
    return common_ddpm.smoke_ddpm(config) if smoke else config
