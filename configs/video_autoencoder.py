"""First stage of videos: a KL autoencoder over (frame, row, column), on moving digits.

    python -m experiments.train --config=configs/video_autoencoder.py --workdir=DIR

8x16x16x1 to 2x4x4x8: a place of the latent is 4 frames of 4x4 pixels, as first stages of videos
halve time with space. The default job's network (configs/digits_autoencoder.py) on three axes. Time
and PSNR: experiments/results/axes/.
"""

from configs import common, common_digits


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.first_stage("kl")
    config.data.update(name="moving_digits", dir="runs/data", channels=1)
    del config.data.image_size  # a number, of images
    config.data.image_size = (8, 16, 16)
    config.model.dtype = "float32"
    config.model.autoencoder = common_digits.video_first_stage()
    config.loss.update(reconstruction="l2", kl_weight=3.6e-3)
    config.train.update(steps=3000, batch_size=16, log_every_steps=100, save_every_steps=1000)
    config.optim.update(name="adamw", learning_rate=2e-3, warmup_steps=50)
    config.optim.update(decay="cosine", decay_steps=3000, b2=0.99)
    config.optim.clip_norm = 2000.0  # of the summed loss: about 1 a pixel
    config.evaluation.update(every_steps=1000, preview=4)
    return common.smoke(config) if smoke else config
