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
    steps = {"unet": 12000, "transformer": 7000}[which]  # about the same minutes
    config = common_digits.digits_stored("captioned_digits", steps)
    config.data.dir = "runs/quickstart/latents"
    config.latents.epochs = 12
    common_digits.digits_networks(config)
    if which == "unet":  # draws more of the t where shapes are made
        config.process.times = "second_moment"
    if which == "transformer":
        config.model.denoiser = common_digits.digits_transformer()
    config.sample.guidance_scale = 5.0
    return common_digits.smoke_stored(config) if smoke else config
