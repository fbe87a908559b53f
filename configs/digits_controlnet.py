"""A ControlNet on the default job: digits drawn along given outlines.

    python -m experiments.train --config=configs/digits_controlnet.py --workdir=DIR
    python -m experiments.evaluate --metrics=outline --workdir=DIR \
        --classifier=runs/quickstart/classifier

Needs the default job's run at `init_from` (`./launch/quickstart.sh`), which stays frozen. The
condition is the edges of the training picture, white on black, at its 32x32 pixels
(arXiv:2302.05543). Numbers and pictures: experiments/results/digits_controlnet/.
"""

from configs import common, common_digits, common_ldm


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_digits.digits_adapter()
    common_ldm.controlnet(config, (16, 32, 64))
    config.conditioning.drop = 0.2
    config.train.steps = 800
    config.optim.decay_steps = 800
    return common.smoke(config) if smoke else config
