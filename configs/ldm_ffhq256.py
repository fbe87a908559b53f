"""LDM-4 on FFHQ 256 (https://arxiv.org/abs/2112.10752, table 12), in VQ-f4's 64x64x3 latents.

    python -m experiments.prepare_data --config=configs/ldm_ffhq256.py --source_dir=IMAGES
    python -m experiments.encode_latents --config=configs/ldm_ffhq256.py
    python -m experiments.train --config=configs/ldm_ffhq256.py --workdir=DIR

Needs a first stage VQ-f4 at `latents.first_stage`, and FFHQ's images in a folder, of which the
authors train on 60,000 of 70,000: `--names=ffhqtrain.txt` of CompVis/taming-transformers; they
resize from 1024 pixels by OpenCV's bilinear, as here. Settings:
CompVis/latent-diffusion, configs/latent-diffusion/ffhq-ldm-vq-4.yaml; its base_lr 2e-6 times the
batch on one GPU is the rate here. Expected: FID 4.98, IS 4.50, precision 0.73, recall 0.50 from
50,000 samples, 200 steps, eta 1 (that repository's README); 635k steps as the paper has it. Not
trained here: time not measured.
"""

from configs import common, common_ldm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_ldm.latent_diffusion("vq_f4", "ffhq")
    config.data.resize = "opencv"
    config.model.denoiser.update(
        {
            "channels": 224,
            "multipliers": (1, 2, 3, 4),
            "attention": (False, True, True, True),
            "head_dim": 32,
        }
    )
    config.train.update(steps=635_000, batch_size=42)
    config.optim.learning_rate = 8.4e-5
    config.sample.options.eta = 1.0
    return common_ldm.latent_smoke(config) if smoke else config
