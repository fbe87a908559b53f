"""Text-conditional latent diffusion on your own folder of captioned images, from scratch.

    python -m experiments.train --config=configs/folder_ldm.py --workdir=DIR \
        --config.data.dir=IMAGES --config.init_from=FIRST_STAGE

IMAGES holds a metadata.jsonl of `file_name` and `text` (Hugging Face's ImageFolder), or a .txt
beside each image; files that are no image are counted, named and skipped, up to
`data.max_bad_images`. FIRST_STAGE is the workdir of a KL-f8 autoencoder's run, or of a converted
pipeline, whose text encoder and U-Net are then started from where they fit this config (and
refused where they do not). Without one the captions' byte pairs and a small text encoder are
trained with the U-Net, LDM's at about a sixth of its parameters. Reproduces no published number;
time not measured.

`unet` (default) or `pixart`: PixArt's transformer (https://arxiv.org/abs/2310.00426) in its place,
adaLN-single and captions by cross-attention, of DiT-B/2's width; its learned variance and its T5
are left out, its AdamW (2e-5, decay 0.03, clipped at 0.01) is for its own pre-trained start.
"""

from configs import common, common_dit, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("unet", "pixart"))
    config = common_ldm.online_latents("kl_f8", 0.18215)
    config.init_from = "runs/kl_f8"
    config.model.denoiser.update(
        {
            "channels": 128,
            "multipliers": (1, 2, 3, 4),
            "attention": (False, True, True, True),
            "head_dim": 32,
            "transformer_depth": 1,
        }
    )
    if which == "pixart":
        config.model.denoiser = {
            "kind": "transformer",
            "out_channels": 4,
            "size": 32,
            "modulation": "single",
            "cross": True,
            **common_dit.SIZES["b"],
        }
    config.model.text_encoder = {
        "vocab_size": 8192,
        "max_length": 77,
        "width": 512,
        "layers": 6,
        "heads": 8,
        "activation": "gelu",
        "causal": False,
    }
    config.process.schedule.update({"beta_start": 0.00085, "beta_end": 0.012})
    config.train.update(steps=100_000, batch_size=32)
    config.optim.update(learning_rate=1e-4, warmup_steps=1000)
    config.ema.networks = ()
    config.sample.update(steps=50, guidance_scale=5.0)
    if smoke:
        common_ldm.latent_smoke(config)
        config.model.text_encoder.update({"vocab_size": 512, "width": 32, "layers": 1, "heads": 2})
    return config
