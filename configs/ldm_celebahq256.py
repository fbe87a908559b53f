"""LDM-4 on CelebA-HQ 256 (https://arxiv.org/abs/2112.10752, table 12), in VQ-f4's 64x64x3 latents.

    python -m experiments.prepare_data --config=configs/ldm_celebahq256.py
    python -m experiments.encode_latents --config=configs/ldm_celebahq256.py
    python -m experiments.train --config=configs/ldm_celebahq256.py --workdir=DIR

Needs a first stage VQ-f4 at `latents.first_stage`. The authors train on 25,000 of the 30,000 images
(`prepare_data --source_dir=IMAGES --names=celebahqtrain.txt`, of CompVis/taming-transformers),
resized from IMAGES' 1024 pixels by OpenCV's bilinear, as here; the catalogue's are of 256.
Settings: CompVis/latent-diffusion, configs/latent-diffusion/celebahq-ldm-vq-4.yaml; its base_lr
2e-6 times the batch on one GPU is the rate here. Expected: FID 5.11, precision 0.72, recall 0.49
from 50,000 samples, 200 steps, eta 0 (that repository's README); 410k steps as the paper has it.
Not trained here: time not measured.
"""

from configs import common, common_ldm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_ldm.latent_diffusion("vq_f4", "celeb_a_hq/256")
    config.model.denoiser.update(
        {
            "channels": 224,
            "multipliers": (1, 2, 3, 4),
            "attention": (False, True, True, True),
            "head_dim": 32,
        }
    )
    config.data.resize = "opencv"
    config.train.update(steps=410_000, batch_size=48)
    config.optim.learning_rate = 9.6e-5
    return common_ldm.latent_smoke(config) if smoke else config
