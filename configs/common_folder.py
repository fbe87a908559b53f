"""The configs of a folder of pictures: what `experiments.quickstart --images=…` trains.

It writes a config.py of its choices into its workdir, which calls `get_config` here. ROOT/data
holds the pictures at one size, in the folders `train` and `validation`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(
    arg: str | None,
    *,
    root: str,
    image_size: int,
    seed: int,
    first_stage: dict | None,
    denoiser: dict,
    text: dict | None,
    classes: int,
) -> ConfigDict:
    """`arg`: "autoencoder" or "ldm" of two stages, "pixel" of one; the last is the default.

    root: the workdir. first_stage, denoiser: {"network": …, "steps", "batch_size",
    "learning_rate"}; first_stage None: diffusion of pixels. text: {"tokenizer", "network"} where
    there are captions. classes: 0 where there are none.
    """
    stages = ("ldm", "autoencoder") if first_stage else ("pixel",)
    which, smoke = common.parse(arg, stages)
    if smoke:
        raise ValueError(f"config argument {arg!r}: these configs have no smoke, set their sizes")
    config = common.first_stage("kl") if which == "autoencoder" else common.denoiser()
    config.seed = seed
    config.data.update(name="folder", dir=f"{root}/data")
    config.data.update(eval_split="validation", image_size=image_size)
    config.model.dtype = "float32"
    config.train.tensorboard = False  # both may be switched on as the run goes on
    config.wandb.mode = "disabled"
    if first_stage:
        config.model.autoencoder = first_stage["network"]
    _training(config, first_stage if which == "autoencoder" else denoiser)
    if which == "autoencoder":
        return _autoencoder(config)
    _denoiser(config, denoiser["network"], text, classes)
    if which == "ldm":
        _latents(config, root, text)
    elif text:
        config.online = {"scale": 1.0, "tokenizer": text["tokenizer"]}
    return config


def _training(config: ConfigDict, part: dict) -> None:
    steps = part["steps"]
    config.train.update(steps=steps, batch_size=part["batch_size"])
    config.train.log_every_steps = max(steps // 50, 1)
    config.train.save_every_steps = max(steps // 4, 1)
    config.optim.update(name="adamw", learning_rate=part["learning_rate"])
    config.optim.warmup_steps = min(100, max(steps // 10, 1))
    config.optim.decay = "cosine"
    config.optim.decay_steps = max(steps, 2)
    config.optim.b2 = 0.99


def _autoencoder(config: ConfigDict) -> ConfigDict:
    config.loss.update(reconstruction="l2", kl_weight=3.6e-3)
    config.model.discriminator.update({"channels": 32, "layers": 2})  # of loss.adversarial="hinge"
    config.loss.adversarial_start_steps = config.train.steps // 2
    config.optim.clip_norm = float(3 * config.data.image_size**2)  # of the summed loss: 1 a value
    config.evaluation.update(every_steps=config.train.steps, examples=500, batch_size=50, preview=8)
    return config


def _denoiser(config: ConfigDict, network: dict, text: dict | None, classes: int) -> None:
    config.model.denoiser = network
    if text:
        config.model.text_encoder = text["network"]
        config.conditioning.mask_padding = True
    if text or classes:
        config.conditioning.drop = 0.1
        config.sample.guidance_scale = 3.0
    config.process.schedule = {"name": "scaled_linear", "num_steps": 1000}
    config.process.objective.update(weighting="min_snr", gamma=0.5)
    config.optim.update(weight_decay=1e-3, clip_norm=1.0)
    config.ema.update(decay=0.999, ramp=True)
    config.sample.update(sampler="dpmpp_2m", steps=25, batch_size=125)
    config.sample.clip = "autoencoder" not in config.model


def _latents(config: ConfigDict, root: str, text: dict | None) -> None:
    config.data.update(name="latents", dir=f"{root}/latents")
    config.latents = {
        "first_stage": f"{root}/autoencoder",
        "data_name": "folder",
        "data_dir": f"{root}/data",
        "epochs": 1,
        "tokenizer": text["tokenizer"] if text else "",
        "scaling": "channel",
        "scale": 1.0,
        "scaling_examples": 0,
        "contexts": False,
        "shard_size": 10_000,
        "batch_size": 100,
    }
