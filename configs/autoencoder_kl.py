"""LDM's KL autoencoders (https://arxiv.org/abs/2112.10752, table 8): `:f4`, `:f8`, `:f16`, `:f32`.

    python -m experiments.prepare_data --config=configs/autoencoder_kl.py:f8 --source_dir=IMAGES
    python -m experiments.train --config=configs/autoencoder_kl.py:f8 --workdir=DIR \\
        --config.perceptual.vgg=vgg16-397923af.pth --config.perceptual.heads=vgg.pth

f8 is Stable Diffusion's. Settings: CompVis/latent-diffusion, models/first_stage_models/kl-*/
config.yaml, of batches of 10, 4, 6 and 6 images (f4, f8, f16, f32), whose steps and numbers are the
published ones; configs/autoencoder/ there has 12 images, accumulated twice. IMAGES has the folders
`train` and `validation`. Expected, by that repository's README, of its released weights, which were
trained on OpenImages:

    f4   rFID 0.27, PSNR 27.53 dB, 176,991 steps     f16  rFID 0.87, PSNR 24.08 dB, 442,998 steps
    f8   rFID 0.90, PSNR 24.19 dB, 246,803 steps     f32  rFID 2.04, PSNR 22.27 dB, 406,763 steps

Layers start as PyTorch's do, and LPIPS's heads have dropout in training, as there (Lightning calls
train() on the loss too). Not trained here: time not measured. Of a shorter side of 384, 256 pixels
are cropped at random, as those files have it; by OpenCV's bilinear, their loader of OpenImages not
being published. Losses and their healthy ranges:
diffusion/training/{autoencoder,adversarial}.py.
"""

from configs import common, common_ldm

# steps in all, images a step
SETTINGS = {"f4": (176_991, 10), "f8": (246_803, 4), "f16": (442_998, 6), "f32": (406_763, 6)}


def get_config(arg=None):
    stage, smoke = common.parse(arg, ("f8", "f4", "f16", "f32"))
    config = common_ldm.ldm_first_stage(f"kl_{stage}")
    config.loss.update(adversarial_weight=0.5, adversarial_start_steps=50_001)
    config.train.steps, config.train.batch_size = SETTINGS[stage]
    # LDM's rule: 4.5e-6 times the images of a step. It is not applied to other batches.
    config.optim.learning_rate = 4.5e-6 * config.train.batch_size
    return common_ldm.smoke_first_stage(config) if smoke else config
