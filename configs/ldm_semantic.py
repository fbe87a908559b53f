"""Semantic synthesis: pictures of maps of labels; LDM's on landscapes, or digits.

    python -m experiments.encode_latents --config=configs/ldm_semantic.py \
        --config.latents.data_dir=IMAGES --config.data.segments=MAPS
    python -m experiments.train --config=configs/ldm_semantic.py --workdir=DIR \
        --config.latents.data_dir=IMAGES --config.data.segments=MAPS
    python -m experiments.sample --workdir=DIR --segments=MAP.png
    python -m experiments.evaluate --workdir=DIR --metrics=placement --classifier=DIR

`landscapes` (default): https://arxiv.org/abs/2112.10752, section 4.3.2, in VQ-f4's 64x64x3 latents;
beside x_t stands what a rescaler, trained with the U-Net, makes of 182 labels. Settings:
CompVis/latent-diffusion, models/ldm/semantic_synthesis256/config.yaml; batch 48, rate 4.8e-5 and
360k steps, the paper's table 15. MAPS: a folder of grey or palette PNGs, named as IMAGES' pictures.
The paper samples at 512 x 1024 what was trained at 256: `--size=512,1024` and a map of that size.
Not trained here.

`digits`: captioned digits' own coverage, in the default job's 8x8x4 latents, for minutes of a CPU.
Numbers: experiments/results/layouts.
"""

from configs import common, common_digits, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("landscapes", "digits"))
    config = digits() if which == "digits" else landscapes()
    if not smoke:
        return config
    config.model.rescaler.classes = min(config.model.rescaler.classes, 16)
    return (common_digits.smoke_stored if which == "digits" else common_ldm.latent_smoke)(config)


def landscapes():
    config = common_ldm.latent_diffusion("vq_f4", "folder")
    common_ldm.degraded(config, "semantic", 0.0015, 0.0205, "l1")
    config.latents.data_dir = ""
    config.model.rescaler = {"classes": 182, "channels": 3, "halvings": 2}
    config.model.denoiser.update(
        {
            "channels": 128,
            "multipliers": (1, 4, 8),
            "attention": (False, False, False),  # in the middle alone: 16 x 16 places
            "heads": 8,
        }
    )
    config.train.update(steps=360_000, batch_size=48)
    config.optim.learning_rate = 4.8e-5
    return config


def digits():
    config = common_digits.digits_restored("segmented_digits", 10_000, concat="semantic")
    config.latents.epochs = 8
    config.model.rescaler = {"classes": 11, "channels": 8, "halvings": 2}
    return config
