"""Rectified flow on CIFAR-10 (Liu et al. 2022, arXiv:2209.03003; arXiv:2210.02747).

    python -m experiments.train --config=configs/flow_cifar10.py --workdir=DIR

The network predicts the velocity of the straight line from data to noise, t uniform on (0, 1), with
DDPM's network and the training settings of atong01/conditional-flow-matching's CIFAR-10 example:
400,000 steps of 128, Adam at 2e-4 after 5,000 steps of warm-up, clipping at 1, EMA 0.9999. That
project's FID of 3.5 is of OT-CFM, its default, which pairs noise and images of a batch by optimal
transport; pairs are independent here, as in Liu et al.'s first rectified flow, whose FID of 2.58
(RK45) is of another network (gnobitab/RectifiedFlow). This config samples with 100 Euler steps.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_ddpm.ddpm("cifar10", flip=True)
    config.model.denoiser = common_ddpm.ddpm_unet()
    config.process.prediction = "velocity"
    config.process.schedule = {"name": "flow"}
    config.train.update(steps=400_000, batch_size=128)
    config.optim.learning_rate = 2e-4
    config.sample.update(sampler="euler", steps=100, clip=False)
    return common_ddpm.smoke_ddpm(config) if smoke else config
