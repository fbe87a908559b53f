"""What the transformers on ImageNet's latents share: DiT's sizes and its recipe."""

from ml_collections import ConfigDict

from configs import common_ldm

# Depth, width and heads (DiT, https://arxiv.org/abs/2212.09748, table 1).
SIZES = {
    "s": {"depth": 12, "width": 384, "heads": 6},
    "b": {"depth": 12, "width": 768, "heads": 12},
    "l": {"depth": 24, "width": 1024, "heads": 16},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
}
CHOICES = ("xl2", "s2", "b2", "b4", "l2")  # a size and its patch


def transformer_on_imagenet(which: str) -> ConfigDict:
    """DiT `which` on latents of 32 x 32 x 4, with the settings of its authors' train.py: AdamW at
    1e-4 without decay or warm-up, 256 a batch, an average of 0.9999, a tenth of the labels dropped.
    """
    config = common_ldm.latent_diffusion("kl_f8", "imagenet2012")
    config.latents.update({"scale": 0.18215, "epochs": 2})  # as it is, and mirrored
    config.data.update(flip=True, resize="box")
    config.model.denoiser = {
        "kind": "transformer",
        "out_channels": 4,
        "size": 32,
        "patch": int(which[-1]),
        "num_classes": 1001,  # the last is the null one
        **SIZES[which[:-1]],
    }
    config.conditioning.drop = 0.1
    config.train.update(steps=400_000, batch_size=256, save_every_steps=50_000)
    config.optim.update(learning_rate=1e-4, weight_decay=0.0)
    config.ema.ramp = False
    config.sample.guidance_scale = 1.5
    config.sample.options = {}
    return config
