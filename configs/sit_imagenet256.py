"""SiT on ImageNet 256: `xl2` (default), `l2`, `b2`, `b4` or `s2` (https://arxiv.org/abs/2401.08740).

    python -m experiments.encode_latents --config=configs/sit_imagenet256.py
    python -m experiments.train --config=configs/sit_imagenet256.py:xl2 --workdir=DIR

Settings: willisma/SiT, train.py and its default transport: DiT's network and recipe, the linear
path, the velocity, t uniform. Here t = 1 is noise and the velocity points to it, where the authors
count the other way; and their network puts out twice the channels, of which half are used. Heun's
method of 125 steps, 250 evaluations less one; their ODE sampler is `sample.sampler=dopri5`, their
SDE `euler_maruyama` of 250 steps. The paper's FID-50K of XL/2 without guidance after 400,000 steps:
17.2. Not trained here: time not measured.
"""

from configs import common, common_dit, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, common_dit.CHOICES)
    config = common_dit.transformer_on_imagenet(which)
    config.process.schedule = {"name": "flow", "time_scale": 1.0}
    config.process.prediction = "velocity"
    config.sample.update(sampler="heun", steps=125)
    return common_ldm.latent_smoke(config) if smoke else config
