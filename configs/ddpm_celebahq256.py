"""DDPM on CelebA-HQ 256x256 (Ho et al. 2020, arXiv:2006.11239).

    python -m experiments.prepare_data --config=configs/ddpm_celebahq256.py
    python -m experiments.train --config=configs/ddpm_celebahq256.py --workdir=DIR

Settings of the authors' `scripts/run_celebahq.py` (hojonathanho/diffusion): 113,673,219 parameters,
500,000 steps of 64 (2.2 steps/s on a TPU v3-8, by the paper). The paper prints no FID for it. The
30,000 images are in one split, "train". Deviation: the gradient is clipped after the mean over
devices, not before.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_ddpm.ddpm("celeb_a_hq/256", flip=True)
    config.data.image_size = 256
    config.data.eval_split = "train[:1%]"  # there is no other split
    config.model.denoiser = common_ddpm.ddpm_unet_256()
    config.train.update(steps=500_000, batch_size=64)
    config.optim.learning_rate = 2e-5
    config.process.variance = "fixed_small"
    return common_ddpm.smoke_ddpm(config) if smoke else config
