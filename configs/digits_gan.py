"""The default job's latents without captions: what `experiments.gan` trains beside a GAN.

    python -m experiments.gan --config=configs/digits_gan.py --out=DIR \
        --classifier=runs/quickstart/classifier

Its own steps are used by `experiments.train` alone. Numbers: experiments/results/gan.
"""

from configs import common, common_digits


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_digits.digits_restored("captioned_digits", 6000)
    config.data.dir, config.latents.epochs = "runs/quickstart/latents", 16
    config.latents.data_dir = "runs/quickstart/data"
    return common_digits.smoke_stored(config) if smoke else config
