"""Class-conditional LDM on ImageNet 256: LDM-4 (VQ-f4, 64x64x3) and LDM-8 (VQ-f8, 32x32x4).

    python -m experiments.prepare_data --config=configs/ldm_imagenet256.py:f4
    python -m experiments.encode_latents --config=configs/ldm_imagenet256.py:f4
    python -m experiments.train --config=configs/ldm_imagenet256.py:f4 --workdir=DIR

`f4` (default) or `f8`. https://arxiv.org/abs/2112.10752, tables 3 and 12; settings:
CompVis/latent-diffusion, configs/latent-diffusion/cin256-v2.yaml and cin-ldm-vq-f8.yaml. A label is
a context of one token of 512, from an embedding trained with the U-Net. f4 has 1001 classes, of
which 1000 is the null class that a tenth of the labels becomes (that code was not published; the
rate is the usual one); f8 has 1000, drops none, and is sampled with eta 1, as published
(models/ldm/cin256/config.yaml; that repository's README). Rates: 1e-4 as cin256-v2 states it;
base_lr 1e-6 times a batch of 64. Expected, from 50,000 samples, in that README: f4 with guidance
1.5 and 250 steps FID 3.60, IS 247.67, precision 0.87, recall 0.48; f8 unguided FID 15.82, IS 78.8.
178k steps of batch 1200 and 4.8M of 64 as the paper has it. The shorter side is made 256 by
OpenCV's bilinear and 256 pixels are cropped at random (ldm/data/imagenet.py). Deviation: four crops
of each picture are stored, where theirs are drawn each time. Not trained here: time not measured.
"""

from configs import common, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("f4", "f8"))
    config = common_ldm.latent_diffusion(f"vq_{which}", "imagenet2012")
    config.model.denoiser.transformer_depth = 1
    config.data.update(resize="opencv", crop="random")
    config.latents.epochs = 4
    if which == "f4":
        config.model.denoiser.update(
            {
                "channels": 192,
                "multipliers": (1, 2, 3, 5),
                "attention": (False, True, True, True),
                "heads": 1,
            }
        )
        config.model.class_embedder = {"num_classes": 1001, "width": 512}
        config.conditioning.drop = 0.1
        config.train.update(steps=178_000, batch_size=1200)
        config.optim.learning_rate = 1e-4
        config.sample.update(steps=250, guidance_scale=1.5)
    else:
        config.model.denoiser.update(
            {
                "channels": 256,
                "multipliers": (1, 2, 4),
                "attention": (True, True, True),
                "head_dim": 32,
            }
        )
        config.model.class_embedder = {"num_classes": 1000, "width": 512}
        config.conditioning.null_label = False
        config.sample.options.eta = 1.0
        config.train.update(steps=4_800_000, batch_size=64)
        config.optim.learning_rate = 6.4e-5
    if smoke:
        config.model.class_embedder.width = 16
        common_ldm.latent_smoke(config)
    return config
