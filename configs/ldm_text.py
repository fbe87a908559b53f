"""LDM's text-to-image model of 1.45 billion parameters, in KL-f8's 32x32x4 latents.

    python -m experiments.prepare_data --config=configs/ldm_text.py --source_dir=IMAGES
    python -m experiments.encode_latents --config=configs/ldm_text.py
    python -m experiments.train --config=configs/ldm_text.py --workdir=DIR

The captions are read by a transformer of 32 layers, trained from scratch with the U-Net, over
BERT's word pieces: `latents.tokenizer` is a folder that holds bert-base-uncased's vocab.txt. IMAGES
is a folder of images with a metadata.jsonl of `file_name` and `text`.
https://arxiv.org/abs/2112.10752, table 15; settings: CompVis/latent-diffusion,
configs/latent-diffusion/txt2img-1p4B-eval.yaml (5e-5 there; the paper trained with 1e-4, batch 680,
390k steps on LAION-400M). A tenth of the captions is dropped. Expected: FID 12.63, IS 30.29 on
MS-COCO with guidance 1.5, 250 steps, as the paper has it. Not trained here: time not measured.
"""

from configs import common, common_ldm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_ldm.latent_diffusion("kl_f8", "captioned_images")
    config.latents.update({"tokenizer": "runs/bert-base-uncased", "scale": 0.18215})
    config.model.denoiser.update(
        {
            "channels": 320,
            "multipliers": (1, 2, 4, 4),
            "attention": (True, True, True, False),
            "heads": 8,
            "transformer_depth": 1,
        }
    )
    config.model.text_encoder = {
        "vocab_size": 30522,
        "max_length": 77,
        "width": 1280,
        "layers": 32,
        "heads": 8,
        "head_dim": 64,
        "activation": "gelu",
        "causal": False,
        "qkv_bias": False,
        "logits_head": True,  # held, as published, and never used
    }
    config.conditioning.drop = 0.1
    config.process.schedule.update({"beta_start": 0.00085, "beta_end": 0.012})
    config.train.update(steps=390_000, batch_size=680)
    config.optim.learning_rate = 1e-4
    config.sample.update(steps=250, guidance_scale=1.5)
    if smoke:
        config.model.text_encoder.update({"vocab_size": 512, "width": 32, "layers": 2})
        config.model.text_encoder.update({"heads": 2, "head_dim": 16, "max_length": 16})
        common_ldm.latent_smoke(config)
    return config
