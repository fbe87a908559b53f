"""MeanFlow on CIFAR-10, unconditional, one step (Geng et al. 2025, arXiv:2505.13447, appendix A).

    python -m experiments.train --config=configs/meanflow_cifar10.py --workdir=DIR

The paper's settings: 800,000 steps of 1024, Adam at 6e-4 after 10,000 steps of warm-up, EMA
0.99995, dropout 0.2, t and s logit-normal (-2, 2), s = t in a quarter of the draws, weight of power
0.75. Its FID-50K of one evaluation is 2.92, with EDM's augmentation less flips and turns, which is
not here: mirroring alone. Not trained here: time not measured.
"""

from configs import common, common_ddpm, edm_cifar10


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = edm_cifar10.get_config()
    config.process.prediction = "velocity"
    config.process.schedule = {"name": "flow", "time_scale": 1.0}
    config.process.update(method="meanflow", times="logit_normal")
    config.process.objective = {"mean": -2.0, "std": 2.0, "equal": 0.25, "power": 0.75}
    config.data.update(flip=True, augment=0.0)
    config.model.denoiser.update(second_time=True, dropout=0.2, augment_dim=0)
    config.train.update(steps=800_000, batch_size=1024)
    config.optim.update(learning_rate=6e-4, warmup_steps=10_000)
    config.ema.update(decay=0.99995, ramp_share=0.0)
    config.sample.update(sampler="meanflow", steps=1, state="float32")
    return common_ddpm.smoke_ddpm(config) if smoke else config
