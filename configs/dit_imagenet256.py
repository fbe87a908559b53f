"""DiT on ImageNet 256: `xl2` (default), `l2`, `b2`, `b4` or `s2` (https://arxiv.org/abs/2212.09748).

    python -m experiments.prepare_data --config=configs/dit_imagenet256.py
    python -m experiments.encode_latents --config=configs/dit_imagenet256.py
    python -m experiments.train --config=configs/dit_imagenet256.py:xl2 --workdir=DIR

Settings: facebookresearch/DiT, train.py, diffusion/__init__.py and sample_ddp.py: DDPM's linear
schedule, the variance learned by the bound beside a mean square error, 250 respaced DDPM steps,
guidance of the first three of four channels, as published. The first stage is a converted
stabilityai/sd-vae-ft-ema at `latents.first_stage`; latents are stored as float16 moments, the image
as it is and mirrored, where the authors encode while training. 400,000 steps is the length of the
paper's ablation: FID-50K there without guidance 68.4 (S/2, B/4), 43.5 (B/2), 23.3 (L/2), 19.5
(XL/2); after 7M steps, guided by 1.5, XL/2 has 2.27. Not trained here: time not measured.
"""

from configs import common, common_dit, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, common_dit.CHOICES)
    config = common_dit.transformer_on_imagenet(which)
    config.model.denoiser.out_channels = 8  # a variance beside eps
    config.process.schedule = {"name": "ddpm_linear", "num_steps": 1000}
    config.process.variance = "learned"
    config.process.objective.vlb_weight = 0.001  # times the 1000 levels: 1 a level
    config.sample.update(sampler="ddpm", steps=250, guidance_channels=3)
    return common_ldm.latent_smoke(config) if smoke else config
