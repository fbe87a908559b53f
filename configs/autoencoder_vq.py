"""LDM's VQ autoencoders (arXiv:2112.10752, table 8): `:f4|f4_noattn|f8|f8_n256|f16`.

    python -m experiments.prepare_data --config=configs/autoencoder_vq.py:f4 --source_dir=IMAGES
    python -m experiments.train --config=configs/autoencoder_vq.py:f4 --workdir=DIR \\
        --config.perceptual.vgg=vgg16-397923af.pth --config.perceptual.heads=vgg.pth

Settings: CompVis/latent-diffusion, models/first_stage_models/vq-*/config.yaml. IMAGES has the
folders `train` and `validation`. Expected, by that repository's README, of its released weights,
which were trained on OpenImages (n: codes):

    f4, n 8192          rFID 0.58, PSNR 27.43 dB,   533,066 steps
    f4_noattn, n 8192   rFID 1.06, PSNR 25.21 dB,   658,131 steps
    f8, n 16384         rFID 1.14, PSNR 23.07 dB,   971,043 steps
    f8_n256, n 256      rFID 1.49, PSNR 22.35 dB, 1,608,649 steps
    f16, n 16384        rFID 5.15, PSNR 20.83 dB, 1,101,166 steps

Batches are those files' own, of 8, 8, 10, 10 and 14 images; layers start as PyTorch's do, and
LPIPS's heads have dropout in training, as there (Lightning calls train() on the loss too). Not
trained here: time not measured. Of a shorter side of 384, 256 pixels
are cropped at random, as those files have it; by OpenCV's bilinear, their loader of OpenImages not
being published. `codebook_usage`
and `codebook_perplexity` are logged; `--config.loss.reseed_every_steps=1000` moves codes that
nothing used for so long (LDM has no such thing).
"""

from configs import common, common_ldm

# steps in all, images a step, the discriminator's first step, its weight and its layers
SETTINGS = {
    "f4": (533_066, 8, 0, 0.75, 3),
    "f4_noattn": (658_131, 8, 11, 0.75, 3),
    "f8": (971_043, 10, 1, 0.6, 2),
    "f8_n256": (1_608_649, 10, 250_001, 0.75, 3),
    "f16": (1_101_166, 14, 250_001, 0.75, 2),
}


def get_config(arg=None):
    stage, smoke = common.parse(arg, tuple(SETTINGS))
    config = common_ldm.ldm_first_stage(f"vq_{stage}")
    steps, batch, start, weight, layers = SETTINGS[stage]
    config.loss.update(adversarial_weight=weight, adversarial_start_steps=start)
    config.model.discriminator.layers = layers
    config.train.update(steps=steps, batch_size=batch)
    # LDM's rule: 4.5e-6 times the images of a step. It is not applied to other batches.
    config.optim.learning_rate = 4.5e-6 * batch
    return common_ldm.smoke_first_stage(config) if smoke else config
