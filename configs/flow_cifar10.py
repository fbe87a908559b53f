"""Flow matching on CIFAR-10: OT-CFM (`ot`, default), or the first rectified flow (`rf`).

    python -m experiments.train --config=configs/flow_cifar10.py --workdir=DIR

The network predicts the velocity of the straight line from data to noise, t uniform on (0, 1).

`ot`: noise and pictures of a batch paired by optimal transport (arXiv:2302.00482), the default of
atong01/conditional-flow-matching's CIFAR-10 example, whose README has FID 3.5: 400,000 steps of
128, Adam at 2e-4 after 5,000 steps of warm-up, clipping at 1, EMA 0.9999, 100 Euler steps.
Deviations: each picture of a batch is taken once, where theirs draws pairs from the plan with
replacement; DDPM's network of 35.7 million parameters for ADM's of theirs.

`rf`: independent pairs, Liu et al.'s 1-rectified flow (arXiv:2209.03003), whose FID is 2.58 with
RK45 at tolerance 1e-5: 1,300,000 steps, dropout 0.15, EMA 0.999999, DDPM++ of four blocks a level
(gnobitab/RectifiedFlow: configs/rectified_flow/cifar10_rf_gaussian_ddpmpp.py).
"""

from configs import common, common_ddpm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("ot", "rf"))
    config = common_ddpm.ddpm("cifar10", flip=True)
    config.model.denoiser = common_ddpm.ddpm_unet()
    config.process.prediction = "velocity"
    config.process.schedule = {"name": "flow"}
    config.train.update(steps=400_000, batch_size=128)
    config.optim.learning_rate = 2e-4
    config.sample.update(sampler="euler", steps=100, clip=False)
    if which == "ot":
        config.process.coupling = "optimal"
    else:
        config.model.denoiser.update({"kind": "song_unet", "blocks": 4, "dropout": 0.15})
        config.train.steps = 1_300_000
        config.ema.decay = 0.999999
        config.sample.update(sampler="dopri5", steps=200)  # the most that it may try
        config.sample.options = {"rtol": 1e-5, "atol": 1e-5}
    return common_ddpm.smoke_ddpm(config) if smoke else config
