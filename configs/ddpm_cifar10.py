"""DDPM on CIFAR-10 (Ho et al. 2020, arXiv:2006.11239), `:eps`: FID 3.17 and IS 9.46 (the paper's).

    python -m experiments.prepare_data --config=configs/ddpm_cifar10.py
    python -m experiments.train --config=configs/ddpm_cifar10.py --workdir=DIR

Settings of the authors' `scripts/run_cifar.py` (hojonathanho/diffusion): 35,746,307 parameters,
800,000 steps of 128 (10.6 hours on a TPU v3-8, by the paper). The paper's FID is of 50,000 samples
against the training images; official weights, measured by others: 3.21 averaged, 12.1 raw
(pesser/pytorch_diffusion). Its 3.70 bits/dim belong to another model, trained on the bound itself.

`:mu` is its baseline of table 2: the network predicts the posterior's mean and is trained on the
bound with fixed variances, FID 13.22 and IS 8.06 (not re-checked).

One deviation: the gradient is clipped after the mean over devices, not before.
"""

from configs import common, common_ddpm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("eps", "mu"))
    config = common_ddpm.ddpm("cifar10", flip=True)
    config.model.denoiser = common_ddpm.ddpm_unet()
    config.train.update(steps=800_000, batch_size=128)
    config.optim.learning_rate = 2e-4
    config.process.variance = "fixed_large"
    if which == "mu":
        config.process.prediction = "mu"
        config.process.objective.weighting = "vlb"
    return common_ddpm.smoke_ddpm(config) if smoke else config
