"""Layout to image: pictures of labelled boxes; LDM's on OpenImages, or two digits.

    python -m experiments.encode_latents --config=configs/ldm_layout.py \
        --config.latents.data_dir=IMAGES --config.data.boxes=BOXES.jsonl
    python -m experiments.train --config=configs/ldm_layout.py --workdir=DIR \
        --config.latents.data_dir=IMAGES --config.data.boxes=BOXES.jsonl
    python -m experiments.sample --workdir=DIR --box=3,0.1,0.1,0.4,0.4 --box=7,0.5,0.5,0.4,0.4
    python -m experiments.evaluate --workdir=DIR --metrics=placement --classifier=DIR

`openimages` (default): https://arxiv.org/abs/2112.10752, section 4.3.1, in VQ-f4's 64x64x3 latents;
up to 30 boxes are tokens (`diffusion/data/layouts.py`) of a transformer trained with the U-Net.
Settings: CompVis/latent-diffusion, models/ldm/layout2img-openimages256/config.yaml (base_lr 2e-6
times a batch of 24); 4.4M steps, the paper's table 15. 600 labels are OpenImages' boxable classes;
not verified. Deviation: the centre square of a picture, where the authors crop at random and tell
the crop. BOXES: a line a picture, `{"file_name": ..., "boxes": [[label,
left, top, width, height], ...]}` in fractions of its sides. Not trained here.

`digits`: two digits of MNIST, in the default job's 8x8x4 latents, for minutes of a CPU. Numbers:
experiments/results/layouts.
"""

from configs import common, common_digits, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("openimages", "digits"))
    config = digits() if which == "digits" else openimages()
    if not smoke:
        return config
    config.model.text_encoder.update({"vocab_size": 256, "max_length": 8, "layers": 2})
    config.model.text_encoder.update({"width": 32, "heads": 2, "head_dim": 16})
    config.conditioning.layout = min(config.conditioning.layout, 200)
    return (common_digits.smoke_stored if which == "digits" else common_ldm.latent_smoke)(config)


def openimages():
    config = common_ldm.latent_diffusion("vq_f4", "folder")
    config.latents.data_dir = ""
    config.conditioning.layout = 600
    config.process.schedule.beta_end = 0.0205
    config.process.objective.norm = "l1"
    config.model.denoiser.update(
        {
            "channels": 128,
            "multipliers": (1, 2, 3, 4),
            "attention": (False, True, True, True),
            "head_dim": 32,
            "transformer_depth": 3,
        }
    )
    config.model.text_encoder = common_ldm.bert(width=512, layers=16)
    config.model.text_encoder.update({"vocab_size": 8192, "max_length": 92})
    config.train.update(steps=4_400_000, batch_size=24)
    config.optim.learning_rate = 4.8e-5
    return config


def digits():
    config = common_digits.digits_networks(common_digits.digits_stored("two_digits", 10_000))
    config.latents.epochs = 8
    config.conditioning.update(layout=10, mask_padding=False)
    config.model.denoiser.update({"attention": (True, True), "pool_context": False})
    config.model.text_encoder = common_ldm.bert(width=96, layers=2)
    config.model.text_encoder.update({"vocab_size": 1024, "max_length": 8})
    config.model.text_encoder.update({"heads": 3, "head_dim": 32, "logits_head": False})
    config.model.text_encoder.embedding_std = 1.0  # at LDM's 0.02 labels are not bound to boxes
    config.sample.guidance_scale = 3.0
    return config
