"""ADM's classifiers of noised pictures, whose gradient guides (arXiv:2105.05233, section 4): `:64`,
`:128`, `:256`, `:512` of ImageNet, `:digits` and `:fashion_latents`.

    python -m experiments.train --config=configs/adm_classifier.py:128 --workdir=DIR
    python -m experiments.sample --workdir=DENOISER --guidance_classifier=DIR --classifier_scale=0.5

Networks are the defaults of openai/guided-diffusion (script_util.py, classifier_defaults), with its
README's depth of 4 for 64 pixels, and scales 1, 0.5, 1 and 4; its files are read by `convert
--from=openai`. Rate, steps, batch and weight decay are its README's for 128 pixels, and the paper's
table 12 for the others, where only the steps of 256 and 512 were verified. Deviation: random
crops there, the centre here.
`:digits` guides `digits_pixel.py`, whose noise it shares, by the digit; `:fashion_latents` trains
on the latents of `fashion_ldm.py` and guides it, as LDM-8-G's did (arXiv:2112.10752, table 10; that
one's network is not published). Numbers of it: experiments/results/guidance.
"""

from configs import common, common_ddpm, common_digits

# Batch, steps, rate, weight decay.
TRAINING = {
    "64": (1024, 300_000, 6e-4, 0.2),
    "128": (256, 300_000, 3e-4, 0.05),
    "256": (256, 500_000, 3e-4, 0.05),
    "512": (256, 500_000, 3e-4, 0.05),
    "digits": (64, 3000, 1e-3, 0.05),
    "fashion_latents": (64, 1500, 1e-3, 0.05),
}
F, T = False, True
SIZES = {
    "64": ((1, 2, 3, 4), (F, T, T, T)),
    "128": ((1, 1, 2, 3, 4), (F, F, T, T, T)),
    "256": ((1, 1, 2, 2, 4, 4), (F, F, F, T, T, T)),
    "512": ((0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0), (F, F, F, F, T, T, T)),
    "digits": ((1, 2, 2), (F, F, T)),
    "fashion_latents": ((1, 2), (F, T)),
}


def get_config(arg=None):
    which, smoke = common.parse(arg, tuple(SIZES))
    batch, steps, rate, decay = TRAINING[which]
    config, small = common.base("classifier"), not which.isdigit()
    if which == "digits":
        common_digits.digits_data(config)
        config.data.compose_held_out = True
    elif small:
        common_digits.fashion_latents(config)
    else:
        config.data.update(name="imagenet2012", dir="runs/data", eval_split="validation")
        config.data.update(image_size=int(which), flip=True)
    config.process = {"schedule": {"name": "ddpm_linear", "num_steps": 1000}}
    if which in ("64", "fashion_latents"):
        config.process.schedule.name = "cosine" if which == "64" else "scaled_linear"
    config.model.dtype = "float32"
    section = common_ddpm.adm_unet() | dict(zip(("multipliers", "attention"), SIZES[which]))
    section.update(kind="noisy_unet", classes=1000, blocks=4 if which == "64" else 2)
    section.update(heads=None, head_dim=64, dropout=0.0)
    if small:
        section.update(channels=32, head_dim=32, groups=8, blocks=1, classes=10)
    config.model.classifier = section
    config.train.update(steps=steps, batch_size=batch, save_every_steps=min(10_000, steps // 2))
    config.optim.update(name="adamw", learning_rate=rate, weight_decay=decay)
    config.optim.update(decay="linear", decay_steps=steps)
    config.evaluation.every_steps = steps // 3 if small else 0
    config.evaluation.examples = 2000 if small else 0
    if smoke:
        tiny = {"channels": 8, "head_dim": 8, "groups": 4, "blocks": 1}
        config.model.classifier.update(multipliers=(1, 2), attention=(F, T), **tiny)
    return common.smoke(config) if smoke else config
