"""LDM's text-to-image models: 1.45 billion parameters (`laion`), or on Conceptual Captions (`cc`).

    python -m experiments.prepare_data --config=configs/ldm_text.py --source_dir=IMAGES
    python -m experiments.encode_latents --config=configs/ldm_text.py
    python -m experiments.train --config=configs/ldm_text.py --workdir=DIR

The captions are read by a transformer of 32 layers, trained from scratch with the U-Net, over
BERT's word pieces: `latents.tokenizer` is a folder that holds bert-base-uncased's vocab.txt. IMAGES
is a folder of images with a metadata.jsonl of `file_name` and `text`.

`laion` (default), in KL-f8's 32x32x4 latents: https://arxiv.org/abs/2112.10752, table 15; settings:
CompVis/latent-diffusion, configs/latent-diffusion/txt2img-1p4B-eval.yaml (5e-5 there; the paper
trained with 1e-4, batch 680, 390k steps on LAION-400M). A tenth of the captions is dropped, which
is ours: the published code drops none. Expected: FID 12.63, IS 30.29 on MS-COCO with guidance 1.5,
250 steps, as the paper has it.

`cc`, in VQ-f4's 64x64x3: models/ldm/text2img256/config.yaml there (base_lr 2e-6 times a batch of
28); no caption is dropped, there is no guidance. Expected: FID 16.79 (that repository's README);
steps are not published, those here are the paper's other model's. Neither trained here: time not
measured.
"""

from configs import common, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("laion", "cc"))
    config = conceptual_captions() if which == "cc" else laion()
    config.latents.tokenizer = "runs/bert-base-uncased"
    if smoke:
        config.model.text_encoder.update({"vocab_size": 512, "width": 32, "layers": 2})
        config.model.text_encoder.update({"heads": 2, "head_dim": 16, "max_length": 16})
        common_ldm.latent_smoke(config)
    return config


def laion():
    config = common_ldm.latent_diffusion("kl_f8", "captioned_images")
    config.latents.scale = 0.18215
    config.model.denoiser.update(
        {
            "channels": 320,
            "multipliers": (1, 2, 4, 4),
            "attention": (True, True, True, False),
            "heads": 8,
            "transformer_depth": 1,
        }
    )
    config.model.text_encoder = common_ldm.bert(width=1280, layers=32)
    config.conditioning.drop = 0.1
    config.process.schedule.update({"beta_start": 0.00085, "beta_end": 0.012})
    config.train.update(steps=390_000, batch_size=680)
    config.optim.learning_rate = 1e-4
    config.sample.update(steps=250, guidance_scale=1.5)
    return config


def conceptual_captions():
    config = common_ldm.latent_diffusion("vq_f4", "captioned_images")
    config.model.denoiser.update(
        {
            "channels": 192,
            "multipliers": (1, 2, 3, 5),
            "attention": (False, True, True, True),
            "head_dim": 32,
            "transformer_depth": 1,
        }
    )
    config.model.text_encoder = common_ldm.bert(width=640, layers=32)
    config.train.update(steps=390_000, batch_size=28)
    config.optim.learning_rate = 5.6e-5
    return config
