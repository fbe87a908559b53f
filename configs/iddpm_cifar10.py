"""Improved DDPM on CIFAR-10 (arXiv:2102.09672): `:simple`, `:hybrid` or `:vlb`.

    python -m experiments.train --config=configs/iddpm_cifar10.py:hybrid --workdir=DIR

Settings of openai/improved-diffusion's README: cosine schedule, T = 4000, of which the network is
told 1000 t / T (rescale_timesteps), no mirroring, 128 channels, three blocks a level, attention at
16x16 and 8x8 with four heads, scale-shift norms, dropout 0.3, Adam at 1e-4, batches of 128, 500,000
steps, EMA 0.9999. The paper's numbers (not re-checked here): simple, FID 2.90; hybrid, 3.17
bits/dim and FID 3.19; vlb, 2.94 bits/dim.

simple has a fixed variance; hybrid adds 0.001 of the bound, for the learned variance; vlb trains
the bound, its t drawn by the second moments of the losses seen.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    kind, smoke = common.parse(arg, ("hybrid", "simple", "vlb"))
    config = common_ddpm.ddpm("cifar10", flip=False)
    config.model.denoiser = common_ddpm.adm_unet() | {
        "resblock_updown": False,
        "out_channels": 3 if kind == "simple" else 6,
        "blocks": 3,
        "attention": (False, True, True, False),
        "heads": 4,
        "dropout": 0.3,
    }
    config.process.schedule = {"name": "cosine", "num_steps": 4000, "time_scale": 0.25}
    if kind != "simple":
        config.process.variance = "learned"
        config.process.objective.vlb_weight = 0.001
    if kind == "vlb":
        config.process.objective.weighting = "vlb"
        config.process.times = "second_moment"
    config.train.update(steps=500_000, batch_size=128)
    config.optim.update(learning_rate=1e-4, warmup_steps=0, clip_norm=0.0)
    config.sample.steps = 4000
    return common_ddpm.smoke_ddpm(config) if smoke else config
