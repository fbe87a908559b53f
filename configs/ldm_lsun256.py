"""LDM on LSUN 256: bedrooms in VQ-f4's 64x64x3 latents, churches in KL-f8's 32x32x4.

    python -m experiments.prepare_data --config=configs/ldm_lsun256.py:beds --source_dir=LMDB
    python -m experiments.encode_latents --config=configs/ldm_lsun256.py:beds
    python -m experiments.train --config=configs/ldm_lsun256.py:beds --workdir=DIR

`beds` (default) or `churches`. https://arxiv.org/abs/2112.10752, table 12; settings:
CompVis/latent-diffusion, configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml (base_lr 2e-6 times
the batch on one GPU) and lsun_churches-ldm-kl-8.yaml (5e-5 unscaled, 10,000 steps of warm-up, L1,
latents divided by the standard deviation of the first batch). Expected, from 50,000 samples, in
that repository's README: beds FID 2.95, precision 0.66, recall 0.48 (200 steps, eta 1); churches
FID 4.02, 0.64, 0.52 (400 steps, eta 0, which its grid makes 500 evaluations, there and here); 1.9M
and 500k steps as the paper has it. The authors' split is their own, lists of names in
ommer-lab.com/files/lsun.zip: `prepare_data --source_dir=IMAGES --names=bedrooms_train.txt` of the
lmdb's images as a folder (fyu/lsun: `data.py export --flat`); of --source_dir=LMDB it is the
publisher's. Flips are stored: every image twice. Not trained here: time not
measured.
"""

from configs import common, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("beds", "churches"))
    config = _beds() if which == "beds" else _churches()
    config.data.flip = True
    config.latents.epochs = 2  # as it is, and mirrored
    return common_ldm.latent_smoke(config) if smoke else config


def _beds():
    config = common_ldm.latent_diffusion("vq_f4", "lsun/bedroom")
    config.model.denoiser.update(
        {
            "channels": 224,
            "multipliers": (1, 2, 3, 4),
            "attention": (False, True, True, True),
            "head_dim": 32,
        }
    )
    config.train.update(steps=1_900_000, batch_size=48)
    config.optim.learning_rate = 9.6e-5
    config.sample.options.eta = 1.0
    return config


def _churches():
    config = common_ldm.latent_diffusion("kl_f8", "lsun/church_outdoor")
    config.model.denoiser.update(
        {
            "channels": 192,
            "multipliers": (1, 2, 2, 4, 4),
            "attention": (True, True, True, True, False),
            "heads": 8,
            "scale_shift": True,
            "resblock_updown": True,
        }
    )
    config.latents.update({"scaling": "std", "scaling_examples": 96})
    config.process.schedule.beta_end = 0.0155
    config.process.objective.norm = "l1"
    config.train.update(steps=500_000, batch_size=96)
    config.optim.update(learning_rate=5e-5, warmup_steps=10_000)
    config.sample.steps = 400
    return config
