"""Super-resolution by a factor of 4: LDM's `bsr_sr`, 64 to 256 pixels; or a small one, 8 to 32.

    python -m experiments.prepare_data --config=configs/ldm_super_resolution.py --source_dir=IMAGES
    python -m experiments.encode_latents --config=configs/ldm_super_resolution.py
    python -m experiments.train --config=configs/ldm_super_resolution.py --workdir=DIR
    python -m experiments.sample --workdir=DIR --image=SMALL.png
    python -m experiments.evaluate --workdir=DIR --metrics=restoration

`openimages` (default): https://arxiv.org/abs/2112.10752, section 4.4, in VQ-f4's 64x64x3 latents,
beside which the small picture stands as it is. Settings: CompVis/latent-diffusion,
models/ldm/bsr_sr/config.yaml (base_lr 1e-6 times a batch of 64), the degradation of
`diffusion/data/degrade.py`. Steps (860k): the paper's table 15.
Deviation: pictures are centre squares, several degradations stored of each (`latents.epochs`),
where the authors crop a random half to the whole. IMAGES: a folder. Not trained here.

`digits`: captioned digits, 8 to 32 pixels, in the default job's 8x8x4 latents, for minutes of a
CPU. Numbers: experiments/results/restoration.

`fashion_latents`: Fashion-MNIST, 8 to 32 pixels, in configs/fashion_autoencoder.py's 8x8x4 latents,
for minutes of a CPU. Numbers: experiments/results/restoration.

`fashion`: pixels, as SR3 (https://arxiv.org/abs/2104.07636) has it: Fashion-MNIST at 32 pixels, and
beside x_t the picture of 8 pixels, enlarged by bicubic. Not trained here.
"""

from configs import common, common_ddpm, common_digits, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, tuple(WHICH))
    config = WHICH[which]()
    config.conditioning.downscale = 4
    small = {"openimages": common_ldm.latent_smoke, "fashion": common_ddpm.smoke_ddpm}
    return small.get(which, common_digits.smoke_stored)(config) if smoke else config


def digits():
    return common_digits.digits_restored("captioned_digits", 10_000, concat="low_resolution")


def openimages():
    config = common_ldm.latent_diffusion("vq_f4", "openimages")
    common_ldm.degraded(config, "low_resolution", 0.0015, 0.0155, "l2")
    config.conditioning.degradation = "bsr_light"
    config.latents.epochs = 4
    config.model.denoiser.update(
        {
            "channels": 160,
            "multipliers": (1, 2, 2, 4),
            "attention": (False, False, False, True),
            "head_dim": 32,
        }
    )
    config.train.update(steps=860_000, batch_size=64)
    config.optim.learning_rate = 6.4e-5
    config.sample.steps = 100
    return config


def fashion_latents():
    config = common_digits.digits_restored("fashion_mnist", 6000, concat="low_resolution")
    config.data.update(channels=1, fit="pad")
    config.latents.update({"first_stage": "runs/fashion_autoencoder", "epochs": 1})
    config.model.autoencoder = common_digits.fashion_first_stage()
    return config


def fashion():
    config = common_ddpm.small("fashion_mnist", steps=2500)
    config.conditioning.concat = "low_resolution"
    return config


WHICH = {
    "openimages": openimages,
    "digits": digits,
    "fashion_latents": fashion_latents,
    "fashion": fashion,
}
