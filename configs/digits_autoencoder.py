"""First stage of the default job: a KL autoencoder, 32x32x3 to 8x8x4, on captioned digits.

    python -m experiments.train --config=configs/digits_autoencoder.py --workdir=DIR

A squared error, since a pure L1 draws the background and no thin stroke in so short a run; small
batches, since the number of steps is what counts. `--config.loss.adversarial=hinge` adds a
discriminator from half-way. Time and PSNR: experiments/results/digits/.
"""

from configs import common, common_digits


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common_digits.digits_data(common.first_stage("kl"))
    config.model.dtype = "float32"
    config.model.autoencoder = common_digits.digits_first_stage()
    config.model.discriminator.update({"channels": 32, "layers": 2})
    config.loss.update(reconstruction="l2", kl_weight=3.6e-3)
    config.loss.adversarial_start_steps = 1200  # of --config.loss.adversarial=hinge
    config.train.update(steps=2400, batch_size=16, log_every_steps=100, save_every_steps=1200)
    config.optim.update(name="adamw", learning_rate=2e-3, warmup_steps=50)
    config.optim.update(decay="cosine", decay_steps=2400, b2=0.99)
    config.optim.clip_norm = 3000.0  # of the summed loss: about 1 a pixel and channel
    config.evaluation.every_steps = 1200
    return common.smoke(config) if smoke else config
