"""Consistency models on CIFAR-10, from data: `ect` (default), `ict` or `scm`; one or two steps.

    python -m experiments.train --config=configs/ect_cifar10.py:ect --workdir=DIR

`ect` (Geng et al. 2024, arXiv:2406.14548) tunes a run of configs/edm_cifar10.py at `init_from`, or
EDM's weights (`convert --from=edm` of edm-cifar10-32x32-uncond-vp.pkl). Settings of locuslab/ect's
run_ecm.sh: 200,000 steps of 128 by RAdam at 1e-4, dropout 0.2, not mirrored, ln sigma ~ N(-1.1,
2^2), q = 2 with steps halved every 250 ticks of 12,800 images. Its README has FID 3.86 of one
evaluation and 2.15 of two. `ict` (Song and Dhariwal 2023, arXiv:2310.14189) starts from nothing:
400,000 steps of 1024, dropout 0.3, 10 levels doubled to 1280, c = 0.03; the paper's best, of a
deeper network, are 2.51 and 2.24. `scm` (Lu and Song 2024, arXiv:2410.11081): TrigFlow in
continuous time, 400,000 steps of 512, ln sigma ~ N(-1, 1.4^2); the paper has 2.06 of two, of a
trained start and a learned weight, which are not here. None was trained here: time not measured.
"""

import math

from configs import common, common_ddpm, edm_cifar10

BATCH = {"ect": 128, "ict": 1024, "scm": 512}


def get_config(arg=None):
    which, smoke = common.parse(arg, ("ect", "ict", "scm"))
    batch = BATCH[which]
    config = edm_cifar10.get_config()
    config.process.schedule = {"name": "edm", "p_mean": -1.1, "p_std": 2.0}
    config.process.method = "consistency"
    config.data.augment = 0.0
    config.model.denoiser.dropout = 0.2
    config.train.update(steps=400_000, batch_size=batch)
    config.optim.update(name="radam", learning_rate=1e-4, warmup_steps=0)
    config.ema.update(decay=0.9999, ramp=True, ramp_share=0.0)
    config.sample.update(sampler="consistency", steps=2, state="float32")
    config.sample.options = {"times": (80.0, 0.821)}
    if which == "ect":
        config.init_from = "runs/edm_cifar10"
        config.process.objective = {"q": 2.0, "double_steps": 250 * 12_800 // batch}
        config.train.steps = 200_000
    elif which == "ict":
        config.process.objective = {"levels": (10, 1280), "double_steps": 50_000, "huber": 0.03}
        config.model.denoiser.dropout = 0.3
        config.ema.decay = 0.99993
    else:
        config.process.schedule = {"name": "trigflow", "p_mean": -1.0, "p_std": 1.4}
        config.process.method = "scm"
        config.process.objective = {"warmup_steps": 10_000}
        config.optim.b2 = 0.99
        config.sample.options = {"times": (math.atan(160.0), 1.1)}
    return common_ddpm.smoke_ddpm(config) if smoke else config
