"""Fine-tuning Stable Diffusion 3 (https://arxiv.org/abs/2403.03206) on captioned images.

    python -m experiments.convert --from=diffusers --source=PIPELINE --workdir=runs/sd3_medium
    python -m experiments.train --config=configs/stable_diffusion_3.py:medium --workdir=DIR \
        --config.data.dir=IMAGES

`medium` (default): MMDiT of 2,028,328,000 parameters. `medium_35` and `large_35`: 3.5's, of
2,243,171,520 and 8,056,627,520, with norms of q and k, and medium's 13 blocks that attend to the
picture alone as well. The captions are read by CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5 1.1 XXL,
frozen; `--config.model.text_encoder_3.layers=0` goes without T5, zeros in its place, for a pipeline
that was converted without it. The first stage has 16 channels, scaled and shifted as the converted
workdir says. IMAGES holds a metadata.jsonl of `file_name` and `text`, or a .txt beside each image.

The flow's objective, times logit-normal (the paper's rf/lognorm(0.00, 1.00), eq. 19 and table 1)
and shifted by 3 (section 5.3.2) as the released schedulers are: 28 steps of Euler, guidance 7. The
authors dropped each encoder's caption by itself at 46.4%; here all of it, a tenth of the time, for
the empty caption, which guidance leads away from. Rates are the usual ones of fine-tuning. No
number to reproduce; not trained here: time not measured.
"""

from configs import common, common_ldm

# Of Diffusers' configs of the released models.
SIZES = {
    "medium": {"width": 1536, "depth": 24, "heads": 24, "grid": 192},
    "medium_35": {"width": 1536, "depth": 24, "heads": 24, "grid": 384, "dual": 13},
    "large_35": {"width": 2432, "depth": 38, "heads": 38, "grid": 192},
}


def get_config(arg=None):
    which, smoke = common.parse(arg, tuple(SIZES))
    config = common_ldm.online_latents("kl_f8_16", 1.5305)
    config.init_from = f"runs/sd3_{which}"
    config.data.image_size = 1024
    config.model.denoiser = {
        "kind": "mmdit",
        "out_channels": 16,
        "size": 128,
        "qk_norm": which != "medium",
        **SIZES[which],
    }
    _text(config)
    config.process.schedule = {"name": "flow", "time_scale": 1000, "shift": 3.0}
    config.process.update(prediction="velocity", times="logit_normal")
    config.train.update(steps=20_000, batch_size=8)
    config.optim.update(learning_rate=1e-5, warmup_steps=500)
    config.sample.update(sampler="euler", steps=28, guidance_scale=7.0)
    config.sample.options = {"spacing": "even"}
    if smoke:
        common_ldm.latent_smoke(config)
        small = {"vocab_size": 1024, "width": 32, "layers": 2, "heads": 2, "projection": 16}
        config.model.text_encoder.update(small)
        config.model.text_encoder_2.update(small)
        small = {"vocab_size": 1024, "width": 80, "layers": 2, "heads": 2, "inner": 64}
        config.model.text_encoder_3.update({**small, "max_length": 8})
    return config


def _text(config):
    words = {"vocab_size": 49408, "max_length": 77, "causal": True}
    clip_l = {"width": 768, "layers": 12, "heads": 12, "activation": "quick_gelu"}
    clip_g = {"width": 1280, "layers": 32, "heads": 20, "activation": "gelu", "end": 49407}
    config.model.text_encoder = {**words, **clip_l, "projection": 768}
    config.model.text_encoder_2 = {**words, **clip_g, "projection": 1280}
    config.model.text_encoder_3 = {
        "vocab_size": 32128,
        "max_length": 256,  # tokens of a caption, or zeros where there are no layers
        "width": 4096,  # of the context that all three make
        "layers": 24,
        "heads": 64,
        "inner": 10240,
    }
    config.conditioning.train_text_encoder = False
