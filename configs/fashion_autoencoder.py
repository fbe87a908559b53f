"""A KL autoencoder with a discriminator on Fashion-MNIST, 28x28 padded to 32x32: one CPU core.

    python -m experiments.prepare_data --config=configs/fashion_autoencoder.py --source_dir=DIR
    python -m experiments.train --config=configs/fashion_autoencoder.py --workdir=DIR

DIR holds the publisher's train-images-idx3-ubyte.gz and its siblings. 32x32x1 to 8x8x4. Shows what
the discriminator does when it starts half-way, after a short warm-up. Perceptual weight 0: there
are no VGG weights without a download, so nothing but the discriminator asks for sharp images. Time,
PSNR, sharpness and pictures: experiments/results/fashion_autoencoder/.
"""

from configs import common, common_digits


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.first_stage("kl")
    config.data.update(name="fashion_mnist", dir="runs/data", channels=1, fit="pad")
    config.model.dtype = "float32"
    config.model.autoencoder = common_digits.fashion_first_stage()
    config.model.discriminator.update({"channels": 16, "layers": 2, "groups": 8})
    config.loss.update(kl_weight=1e-3, adversarial="hinge", adversarial_weight=0.25)
    config.loss.update(adversarial_start_steps=1000, adversarial_warmup_steps=50)
    config.train.update(steps=2000, batch_size=16, log_every_steps=10)
    config.train.update(save_every_steps=250, keep_checkpoints=20)
    config.optim.update(learning_rate=1e-3, warmup_steps=50, b1=0.5, b2=0.9)
    config.evaluation.update(every_steps=100, examples=500, preview=16)
    if smoke:
        config.model.autoencoder.update({"channels": 8, "groups": 4})
        config.model.discriminator.update({"channels": 8, "groups": 4})
        config.loss.update({"adversarial_start_steps": 1, "adversarial_warmup_steps": 1})
        config.evaluation.update({"every_steps": 2, "examples": 16})
        common.smoke(config)
    return config
