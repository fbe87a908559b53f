"""Inpainting: LDM's `inpainting_big` on 256 pixels, or digits of which half is hidden.

    python -m experiments.prepare_data --config=configs/ldm_inpainting.py --source_dir=IMAGES
    python -m experiments.encode_latents --config=configs/ldm_inpainting.py
    python -m experiments.train --config=configs/ldm_inpainting.py --workdir=DIR
    python -m experiments.sample --workdir=DIR --image=PNG --mask=PNG
    python -m experiments.evaluate --workdir=DIR --metrics=restoration

`places` (default): https://arxiv.org/abs/2112.10752, section 4.5, in VQ-f4's 64x64x3 latents (no
attention in the first stage). Seven channels: x_t, latents of the picture with a black hole, the
mask in {-1, 1}, as scripts/inpaint.py of CompVis/latent-diffusion has them; settings:
models/ldm/inpainting_big/config.yaml. `--config.conditioning.concat=inpaint` has Stable Diffusion's
instead: the mask in {0, 1}, then latents of the picture with a grey hole. Masks are LaMa's
(`diffusion/data/masks.py`), several stored a picture (`latents.epochs`), where the authors draw one
each time. Steps (360k), batch (128) and rate (1e-6): the paper's table 15, of its smaller model;
the published file has no batch, and a cosine from a tenth of base_lr x batch that ends at 50,000
steps. IMAGES: a folder (Places). Not trained here.

`digits`: large digits in the centre, a half hidden, in the default job's 8x8x4 latents, for minutes
of a CPU. Numbers: experiments/results/restoration.

`pixels`: MNIST's digits as they are, a half hidden, without a first stage. Not trained here.
"""

from configs import common, common_ddpm, common_digits, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("places", "digits", "pixels"))
    config = {"places": places, "digits": digits, "pixels": pixels}[which]()
    small = {"places": common_ldm.latent_smoke, "digits": common_digits.smoke_stored}
    return small.get(which, common_ddpm.smoke_ddpm)(config) if smoke else config


def digits():
    told = {"concat": "inpaint_ldm", "masks": "half"}
    return common_digits.digits_restored("centred_digits", 2000, **told)


def places():
    config = common_ldm.latent_diffusion("vq_f4_noattn", "places")
    common_ldm.degraded(config, "inpaint_ldm", 0.0015, 0.0205, "l1")
    config.latents.epochs = 8
    config.model.denoiser.update(
        {
            "channels": 256,
            "multipliers": (1, 2, 3, 4),
            "attention": (False, True, True, True),
            "heads": 8,
            "resblock_updown": True,
        }
    )
    config.train.update(steps=360_000, batch_size=128)
    config.optim.update(learning_rate=1e-6, warmup_steps=1000)
    config.sample.steps = 50
    config.sample.options.eta = 0.0
    return config


def pixels():
    config = common_ddpm.small("digits", steps=2500)
    config.conditioning.update({"concat": "inpaint_ldm", "masks": "half"})
    return config
