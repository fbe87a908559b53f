"""A KL autoencoder with a discriminator on Fashion-MNIST, 28x28 padded to 32x32: one CPU core.

    python -m experiments.prepare_data --config=configs/fashion_autoencoder.py --source_dir=DIR
    python -m experiments.train --config=configs/fashion_autoencoder.py --workdir=DIR

DIR holds the publisher's train-images-idx3-ubyte.gz and its siblings. 32x32x1 to 8x8x4. Shows what
the discriminator does when it starts half-way, after a short warm-up. Perceptual weight 0: there
are no VGG weights without a download, so nothing but the discriminator asks for sharp images. Time,
PSNR, sharpness and pictures: experiments/results/fashion_autoencoder/.
"""

from configs import common


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.first_stage("kl")
    config.data.name = "fashion_mnist"
    config.data.dir = "runs/data"
    config.data.channels = 1
    config.data.fit = "pad"
    config.model.dtype = "float32"
    config.model.autoencoder = {
        "name": "kl",
        "image_channels": 1,
        "channels": 64,
        "multipliers": (1,),
        "blocks": 0,
        "mid_attention": False,
        "z_channels": 4,
        "patch": 4,  # all blocks run at 8x8, where one core is quickest
        "groups": 16,
    }
    config.model.discriminator.update({"channels": 16, "layers": 2, "groups": 8})
    config.loss.kl_weight = 1e-3
    config.loss.adversarial = "hinge"
    config.loss.adversarial_weight = 0.25
    config.loss.adversarial_start_steps = 1000
    config.loss.adversarial_warmup_steps = 50
    config.train.steps = 2000
    config.train.batch_size = 16
    config.train.log_every_steps = 10
    config.train.save_every_steps = 250
    config.train.keep_checkpoints = 20
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.optim.b1 = 0.5
    config.optim.b2 = 0.9
    config.evaluation.every_steps = 100
    config.evaluation.examples = 500
    config.evaluation.preview = 16
    if smoke:
        config.model.autoencoder.update({"channels": 8, "groups": 4})
        config.model.discriminator.update({"channels": 8, "groups": 4})
        config.loss.update({"adversarial_start_steps": 1, "adversarial_warmup_steps": 1})
        config.evaluation.update({"every_steps": 2, "examples": 16})
        common.smoke(config)
    return config
