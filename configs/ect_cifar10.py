"""Consistency tuning of EDM's CIFAR-10 run (Geng et al. 2024, arXiv:2406.14548).

    python -m experiments.train --config=configs/ect_cifar10.py --workdir=DIR

Needs a run of configs/edm_cifar10.py at `init_from`. Settings of locuslab/ect's run_ecm.sh: 200,000
steps of 128 at 1e-4, dropout 0.2, not mirrored, ln sigma ~ N(-1.1, 2^2), q = 2 with steps halved
every 250 ticks of 12,800 images. Its README has FID 3.86 of one evaluation and 2.15 of two, with
EDM's weights (`convert --from=edm` of edm-cifar10-32x32-uncond-vp.pkl) and RAdam, in whose place
is Adam with a warm-up. Not trained here: time not measured.
"""

from configs import common, common_ddpm, edm_cifar10

BATCH = 128


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = edm_cifar10.get_config()
    config.init_from = "runs/edm_cifar10"
    config.process.schedule = {"name": "edm", "p_mean": -1.1, "p_std": 2.0}
    config.process.method = "consistency"
    config.process.objective = {"q": 2.0, "double_steps": 250 * 12_800 // BATCH}
    config.data.augment = 0.0
    config.model.denoiser.dropout = 0.2
    config.train.update(steps=200_000, batch_size=BATCH)
    config.optim.update(learning_rate=1e-4, warmup_steps=1000)
    config.ema.update(decay=0.9999, ramp=True, ramp_share=0.0)
    config.sample.update(sampler="consistency", steps=2, state="float32")
    config.sample.options = {"times": (80.0, 0.821)}
    return common_ddpm.smoke_ddpm(config) if smoke else config
