"""MeanFlow on ImageNet 256, by class, one step: `xl2` (default) or `b4` (arXiv:2505.13447).

    python -m experiments.encode_latents --config=configs/meanflow_imagenet256.py
    python -m experiments.train --config=configs/meanflow_imagenet256.py:xl2 --workdir=DIR

SiT's transformer and latents with a second time, and the settings of the paper's appendix A: 256 a
batch, Adam at 1e-4 with b2 0.95, an average of 0.9999, a tenth of the labels dropped, t and s
logit-normal (-0.4, 1), s = t in three quarters of the draws, weight of power 1. Guidance is folded
in: by 3 for `b4`, 80 epochs, whose FID-50K of one evaluation is 15.53 there; by 2.5 with kappa 0.92
below t = 0.75 for `xl2`, 240 epochs: 3.43. Not trained here: time not measured.
"""

from configs import common, common_dit, common_ldm

IMAGES = 1_281_167


def get_config(arg=None):
    which, smoke = common.parse(arg, ("xl2", "b4"))
    config = common_dit.transformer_on_imagenet(which)
    config.process.schedule = {"name": "flow", "time_scale": 1.0}
    config.process.update(prediction="velocity", method="meanflow", times="logit_normal")
    config.process.objective = {"mean": -0.4, "std": 1.0, "equal": 0.75, "guidance_scale": 3.0}
    if which == "xl2":
        config.process.objective.update(guidance_scale=2.5, guidance_mix=0.92)
        config.process.objective.guidance_times = (0.0, 0.75)
    config.model.denoiser.second_time = True
    config.train.steps = {"xl2": 240, "b4": 80}[which] * IMAGES // 256
    config.optim.b2 = 0.95
    config.sample.update(sampler="meanflow", steps=1, guidance_scale=1.0)
    return common_ldm.latent_smoke(config) if smoke else config
