"""Improved DDPM on ImageNet (arXiv:2102.09672): `:hybrid`, `:vlb`, `:cond`; `:upsampler` to 256.

    python -m experiments.prepare_data --config=configs/iddpm_imagenet64.py:cond
    python -m experiments.train --config=configs/iddpm_imagenet64.py:cond --workdir=DIR

Settings of openai/improved-diffusion's README, whose files `convert --from=openai` reads: 64 pixels
without labels by the hybrid objective or the bound, or 1,000 classes; and 64 to 256 pixels. Steps
are those of its files' names. The paper's numbers (table 2 and figure 6, not re-checked here): FID
19.2 and 3.57 bits/dim (hybrid), 40.1 and 3.53 (vlb), FID 2.92 (cond). Deviation: the upsampler's
small pictures are rounded to 8 bits here.
"""

from configs import common, common_ddpm

F, T = False, True
STEPS = {"hybrid": 1_500_000, "vlb": 1_500_000, "cond": 250_000, "upsampler": 500_000}


def get_config(arg=None):
    kind, smoke = common.parse(arg, tuple(STEPS))
    large, labelled = kind == "upsampler", kind in ("cond", "upsampler")
    config = common_ddpm.ddpm("imagenet2012", flip=False)
    config.data.update(image_size=256 if large else 64, eval_split="validation")
    config.model.denoiser = common_ddpm.adm_unet() | {
        "resblock_updown": False,
        "out_channels": 6,
        "channels": 192 if labelled else 128,
        "multipliers": (1, 1, 2, 2, 4, 4) if large else (1, 2, 3, 4),
        "blocks": 2 if large else 3,
        "attention": (F, F, F, F, T, T) if large else (F, F, T, T),
        "heads": 4,
        "dropout": 0.0,
    }
    config.process.schedule = {"name": "cosine", "num_steps": 4000, "time_scale": 0.25}
    config.process.variance = "learned"
    config.process.objective.vlb_weight = 0.001
    if labelled:  # rescale_timesteps and rescale_learned_sigmas are off there
        config.model.denoiser.num_classes = 1000
        config.conditioning.null_label = False
        config.process.schedule.time_scale = 1.0
        config.process.objective.vlb_weight = 1 / 4000
    if large:
        betas = {"beta_start": 0.1 / 4000, "beta_end": 20 / 4000}
        config.process.schedule = {"name": "ddpm_linear", "num_steps": 4000} | betas
        config.conditioning.update(concat="low_resolution", downscale=4)
        config.conditioning.update(degradation="area", enlarge="linear")
    if kind == "vlb":
        config.process.objective.weighting = "vlb"
        config.process.times = "second_moment"
    batch = {"cond": 2048, "upsampler": 256}.get(kind, 128)
    config.train.update(steps=STEPS[kind], batch_size=batch)
    config.optim.update(learning_rate=3e-4 if labelled else 1e-4, warmup_steps=0, clip_norm=0.0)
    config.sample.update(steps=250 if large else 4000, batch_size=16)
    config.sample.options = {"spacing": "linspace"}
    return common_ddpm.smoke_ddpm(config) if smoke else config
