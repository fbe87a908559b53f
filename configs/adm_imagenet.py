"""ADM on ImageNet, class-conditional (Dhariwal and Nichol 2021, arXiv:2105.05233): `:64`, `:128`,
`:256`, `:512`, and the upsamplers `:64_256` and `:128_512`.

    python -m experiments.prepare_data --config=configs/adm_imagenet.py:256
    python -m experiments.train --config=configs/adm_imagenet.py:256 --workdir=DIR

Networks, noise and dropout are the flags of openai/guided-diffusion's README, whose files `convert
--from=openai` reads; batches, steps and rates are the paper's table 11, read in a summary of it;
the upsamplers' batch and rate are from memory. FID without guidance (the paper's table 5): 2.07
(64, with dropout as here; 2.61 without it), 5.91 (128), 10.94 (256), 23.24 (512), with a classifier
(`adm_classifier.py`) 2.97, 4.59, 7.72 from 128 on, in 250 steps; not re-checked here. Deviations:
the authors' centre crop halves by means before its bicubic; an upsampler's pictures are mirrored
there, not here, and its small ones are not rounded to 8 bits.
"""

from configs import common, common_ddpm

F, T = False, True
# Pixels, channels, multipliers, blocks, attention (at 32, 16 and 8), heads or None: 64 wide.
SIZES = {
    "64": (64, 192, (1, 2, 3, 4), 3, (F, T, T, T), None),
    "128": (128, 256, (1, 1, 2, 3, 4), 2, (F, F, T, T, T), 4),
    "256": (256, 256, (1, 1, 2, 2, 4, 4), 2, (F, F, F, T, T, T), None),
    "512": (512, 256, (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0), 2, (F, F, F, F, T, T, T), None),
    "64_256": (256, 192, (1, 1, 2, 2, 4, 4), 2, (F, F, F, T, T, T), 4),
    "128_512": (512, 192, (1, 1, 2, 2, 4, 4), 2, (F, F, F, F, T, T), None),
}
STEPS = {"64": 540, "128": 4360, "256": 1980, "512": 1940, "64_256": 500, "128_512": 1050}


def get_config(arg=None):
    which, smoke = common.parse(arg, tuple(SIZES))
    pixels, channels, multipliers, blocks, attention, heads = SIZES[which]
    config = common_ddpm.ddpm("imagenet2012", flip="_" not in which)
    config.data.update(image_size=pixels, eval_split="validation")
    config.model.denoiser = common_ddpm.adm_unet() | {
        "out_channels": 6,
        "channels": channels,
        "multipliers": multipliers,
        "blocks": blocks,
        "attention": attention,
        "heads": heads,
        "head_dim": None if heads else 64,
        "num_classes": 1000,
        "dropout": 0.1 if which == "64" else 0.0,
    }
    config.conditioning.null_label = False
    if "_" in which:
        config.conditioning.update(concat="low_resolution", downscale=4)
        config.conditioning.update(degradation="area", enlarge="linear")
    name = "cosine" if which == "64" else "ddpm_linear"
    config.process.schedule = {"name": name, "num_steps": 1000}
    config.process.variance = "learned"
    config.process.objective.vlb_weight = 0.001
    config.train.update(steps=STEPS[which] * 1000, batch_size=2048 if which == "64" else 256)
    config.optim.update(learning_rate=3e-4 if which == "64" else 1e-4)
    config.optim.update(warmup_steps=0, clip_norm=0.0)
    config.sample.update(steps=250, batch_size=16)
    config.sample.options = {"spacing": "linspace"}
    return common_ddpm.smoke_ddpm(config) if smoke else config
