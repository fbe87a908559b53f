"""The default job: text-conditional latent diffusion on captioned digits.

    python -m experiments.encode_latents --config=configs/digits_ldm.py
    python -m experiments.train --config=configs/digits_ldm.py --workdir=DIR

`unet` (default) or `transformer`, DiT's with the caption by cross-attention, for as many minutes.
Needs a first stage (configs/digits_autoencoder.py) at `latents.first_stage`;
`./launch/quickstart.sh` runs all of it. Time and adherence: experiments/results/digits/README.md.
"""

from configs import common, common_digits


def get_config(arg=None):
    which, smoke = common.parse(arg, ("unet", "transformer"))
    config = common.denoiser()
    config.data.update(name="latents", dir="runs/quickstart/latents")
    config.latents = {
        "first_stage": "runs/quickstart/autoencoder",  # the workdir of its run
        "data_name": "captioned_digits",
        "data_dir": "runs/data",
        "epochs": 16,  # compositions stored of each digit
        "tokenizer": "word",  # trained on the captions: "word" or "bpe"
        "scaling": "channel",  # "channel", "std" or "fixed"; see diffusion/data/latents.py
        "scale": 1.0,  # of "fixed"
        "scaling_examples": 0,  # of "std"; 0: all
        "contexts": False,  # the text encoder is trained: there is nothing to store
        "shard_size": 4500,
        "batch_size": 250,
    }
    common_digits.digits_networks(config)
    if which == "transformer":
        config.model.denoiser = common_digits.digits_transformer()
    steps = {"unet": 12000, "transformer": 7000}[which]  # about the same minutes
    config.train.update(steps=steps, batch_size=16, log_every_steps=250, save_every_steps=3000)
    config.optim.update(name="adamw", learning_rate=1e-3, warmup_steps=100, decay="cosine")
    config.optim.update(decay_steps=steps, b2=0.99, weight_decay=1e-3, clip_norm=1.0)
    config.ema.update(decay=0.999, ramp=True)
    config.sample.update(sampler="dpmpp_2m", steps=25, guidance_scale=5.0, batch_size=250)
    config.evaluation.examples = 2000  # stored latents in a held-out loss; these are training ones
    if smoke:
        config.latents.update({"epochs": 1, "shard_size": 1500})
        config.sample.update({"steps": 2, "batch_size": 8})
        common.smoke(config)
    return config
