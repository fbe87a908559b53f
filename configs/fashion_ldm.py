"""Class-conditional latent diffusion on Fashion-MNIST: `unet` (default) or `sit`.

    python -m experiments.encode_latents --config=configs/fashion_ldm.py
    python -m experiments.train --config=configs/fashion_ldm.py --workdir=DIR

In the latents of configs/fashion_autoencoder.py, 8x8x4, for two CPU cores. `unet`: the default
job's network, schedule and loss, labels for captions. `sit`: the transformer of
`digits_ldm.py:transformer` under SiT's linear path and velocity (https://arxiv.org/abs/2401.08740,
section 2), t drawn uniformly, 50 evaluations of Euler's method. A tenth of the labels is dropped,
for guidance. Time and Frechet distances on a classifier's features:
experiments/results/fashion_ldm/README.md.
"""

from configs import common, common_digits


def get_config(arg=None):
    which, smoke = common.parse(arg, ("unet", "sit"))
    steps = {"unet": 12_000, "sit": 12_000}[which]
    config = common_digits.digits_restored("fashion_mnist", steps)
    common_digits.fashion_latents(config)
    config.conditioning.drop = 0.1
    if which == "sit":
        config.model.denoiser = common_digits.digits_transformer()
        config.model.denoiser.update({"cross": False, "pool_context": False})
        common_digits.sit(config)
    config.model.denoiser.num_classes = 11  # the last is the null one
    config.sample.steps = 50
    config.sample.guidance_scale = 1.5
    return common_digits.smoke_stored(config) if smoke else config
