"""DDPM on LSUN 256x256 (Ho et al. 2020, arXiv:2006.11239): `:church`, `:bedroom`, `:cat`, and
`:bedroom_large`.

    python -m experiments.prepare_data --config=configs/ddpm_lsun256.py:church
    python -m experiments.train --config=configs/ddpm_lsun256.py:church --workdir=DIR

Settings of the authors' `scripts/run_lsun.py` (hojonathanho/diffusion): 113,673,219 parameters,
batches of 64. The paper's FID: church 7.89, bedroom 6.36, cat 19.75 (the last two not re-checked
here). Its large bedroom model has FID 4.90 after 1.15 million steps (appendix B): "approximately
256 million parameters by increasing filter count", which 192 filters give, 255,677,955. Cats are
not mirrored in training. The released church weights are of step 4,432,000, the paper says 1.2
million (pesser/pytorch_diffusion#2). Pictures are resized as by StyleGAN2's tool (Lanczos).
Deviation: the authors clip the gradient before the mean over devices, here after.
"""

from configs import common, common_ddpm

SCENES = {  # name in tensorflow-datasets, steps, channels
    "church": ("church_outdoor", 1_200_000, 128),
    "bedroom": ("bedroom", 2_400_000, 128),
    "cat": ("cat", 1_800_000, 128),
    "bedroom_large": ("bedroom", 1_150_000, 192),
}


def get_config(arg=None):
    scene, smoke = common.parse(arg, tuple(SCENES))
    name, steps, channels = SCENES[scene]
    config = common_ddpm.ddpm(f"lsun/{name}", flip=scene != "cat")
    config.data.update(image_size=256, eval_split="train[:1%]" if scene == "cat" else "validation")
    config.data.resize = "lanczos"
    config.model.denoiser = common_ddpm.ddpm_unet_256() | {"channels": channels}
    config.train.update(steps=steps, batch_size=64)
    config.optim.learning_rate = 2e-5
    config.process.variance = "fixed_small"
    return common_ddpm.smoke_ddpm(config) if smoke else config
