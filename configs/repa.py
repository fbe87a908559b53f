"""REPA: a transformer that is aligned to a frozen network's features while it learns
(https://arxiv.org/abs/2410.06940), `imagenet256` (default) or `digits`.

    python -m experiments.train --config=configs/repa.py:imagenet256 --workdir=DIR \
        --config.init_from=KL_F8 --config.align.features=DINOV2

`imagenet256`: SiT-XL/2 (configs/sit_imagenet256.py), its eighth block aligned by weight 0.5 to the
patches of DINOv2-B, the authors' setting for XL. KL_F8 is a converted first stage's workdir, DINOV2
a directory of Transformers' Dinov2Model (facebook/dinov2-base). Pictures are encoded as it trains,
since both networks read them; they are resized with smoothing, where the authors' code does not
smooth. The paper's FID-50K without guidance after 400,000 steps: 7.9, where SiT-XL/2 has 17.2.

`digits`: the default job's transformer, its second block aligned to the feature map of the
classifier that `./launch/quickstart.sh` trains, 4 x 4 places like the tokens:

    python -m experiments.train --config=configs/repa.py:digits --workdir=DIR

Not trained here: time not measured.
"""

from configs import common, common_digits, common_dit, common_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("imagenet256", "digits"))
    config = _digits() if which == "digits" else _imagenet()
    if smoke:
        config.model.denoiser.update({"width": 32, "depth": 2, "heads": 2})
        config.align.update(block=1, width=32)
        if which == "imagenet256":
            common_ldm.latent_smoke(config)
            small = {"width": 32, "depth": 2, "heads": 2, "image_size": 56}
            config.model.features.update(small)
        config.sample.update({"steps": 2, "batch_size": 8})
        common.smoke(config)
    return config


def _imagenet():
    config = common_dit.transformer_on_imagenet("xl2")
    config.data.update(name=config.latents.data_name, dir="runs/data")
    del config.latents
    config.online = {"scale": 0.18215, "tokenizer": "bpe"}
    config.init_from = "runs/kl_f8"
    config.init_networks = ("autoencoder",)
    config.process.schedule = {"name": "flow", "time_scale": 1.0}
    config.process.prediction = "velocity"
    config.sample.update(sampler="heun", steps=125)
    config.model.features = {  # ViT-B/14
        "kind": "dinov2",
        "image_size": 518,
        "patch": 14,
        "width": 768,
        "depth": 12,
        "heads": 12,
    }
    config.align.weight = 0.5
    return config


def _digits():
    config = common_digits.digits_adapter()
    config.init_networks = ("autoencoder",)
    config.conditioning.train_text_encoder = True
    config.model.denoiser = common_digits.digits_transformer()
    config.model.features = {"kind": "digits", "widths": (32, 64, 96), "feature_dim": 64}
    config.align.update(weight=0.5, block=2, width=256, features="runs/quickstart/classifier")
    config.train.update(steps=7000, log_every_steps=250, save_every_steps=3000)
    config.optim.update(warmup_steps=100, decay_steps=7000, weight_decay=1e-3)
    config.ema.update(decay=0.999, ramp=True)
    return config
