"""The vocabulary that every config shares, with units and meaning beside each key.

A config is `get_config(arg)` in a file that imports nothing but ml_collections and this module, so
that it loads on a laptop or a login node without jax. Every default stands in a config: the code
reads keys and never supplies one. Arguments combine: `configs/X.py:f8,smoke`.
"""

from ml_collections import ConfigDict


def base(task: str) -> ConfigDict:
    """Keys of every task: "denoiser", "autoencoder" or "classifier"."""
    config = ConfigDict()
    config.task = task
    config.seed = 0  # of initialisation, data order and every draw

    config.train = ConfigDict()
    config.train.steps = 1000  # optimiser steps in all; may be extended on resume
    config.train.batch_size = 128  # examples a step, over all devices and processes
    config.train.accumulate = 1  # parts that a batch is computed in
    config.train.log_every_steps = 50
    config.train.save_every_steps = 1000
    config.train.keep_checkpoints = 3  # the newest N; older ones are deleted
    config.train.keep_every_steps = 0  # and every step that this divides; 0: none
    config.train.keep_best = ""  # and the one with the lowest of this, "eval_loss" say; "": none
    config.train.max_skipped_in_a_row = 20  # non-finite steps before the run ends
    config.train.max_loss_deviations = 0.0  # skip a loss so many deviations above the mean; 0: off
    config.train.tensorboard = True  # needs TensorFlow; without it the log says that it is off

    config.data = ConfigDict()
    config.data.name = ""  # a builder of diffusion/data, or "latents"
    config.data.dir = ""  # where prepare_data or encode_latents wrote it
    config.data.eval_split = "test"
    config.data.image_size = 32  # pixels a side; a tuple has one size a spatial axis
    config.data.channels = 3
    config.data.fit = "crop"  # to image_size: "crop" (centre square, bicubic) or "pad" (with black)
    config.data.flip = False  # mirror half of the training images

    config.model = ConfigDict()

    config.optim = ConfigDict()
    config.optim.name = "adam"  # "adam", "adamw" or "sgd"
    config.optim.learning_rate = 2e-4  # the one used: never scaled by batch or devices
    config.optim.warmup_steps = 0  # linear, from 0
    config.optim.decay = "constant"  # "constant", "cosine", "linear" or "inverse_sqrt"
    config.optim.decay_steps = 0  # where the decay ends, from step 0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 0.0  # bound of the gradient's global norm; 0: off

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # 0: no average is kept
    config.ema.ramp = False  # LDM's min(decay, (1 + n) / (10 + n))
    config.ema.networks = ()  # which networks are averaged, by name; (): all that are trained

    config.parallel = ConfigDict()
    config.parallel.mode = "jit"  # "jit" (mesh of data x fsdp) or "pmap" (replicated)
    config.parallel.data = -1  # devices on the data axis; -1: those that are left
    config.parallel.fsdp = 1  # devices that share one copy of the state
    config.parallel.remat = "none"  # recompute activations: "none", "full" or a policy

    config.parallel.agree_every_steps = 10  # processes tell each other of signals; a delay of 2 N

    config.watchdog = ConfigDict()  # what takes longer ends the run with status 76; 0: no limit
    config.watchdog.start_secs = 3600.0  # restoring, compiling and the first step
    config.watchdog.step_secs = 1800.0  # a step with its data, an evaluation or a save

    config.evaluation = ConfigDict()
    config.evaluation.every_steps = 0  # loss on held-out data; 0: never
    config.evaluation.examples = 0  # the first N of the split; 0: all
    config.evaluation.batch_size = 250
    config.evaluation.preview = 16  # pictures logged with it; 0: none
    config.evaluation.samples = 0  # of a denoiser, judged with it by the classifier; 0: none
    config.evaluation.classifier = ""  # a classifier's run: judges samples or reconstructions

    config.wandb = ConfigDict()
    config.wandb.mode = (
        "auto"  # online with a key, else offline; or "online", "offline", "disabled"
    )
    config.wandb.project = "diffusion"
    return config


def denoiser() -> ConfigDict:
    """Keys that a diffusion task adds; pixel-space DDPM unless the config says otherwise."""
    config = base("denoiser")
    config.process = ConfigDict()
    config.process.prediction = "eps"  # what the network puts out
    config.process.schedule = ConfigDict({"name": "ddpm_linear", "num_steps": 1000})
    # of p(x_{t-1} | x_t): "fixed_large" (beta_t), "fixed_small" (the posterior's), "learned"
    config.process.variance = "fixed_large"
    # norm: "l2", "l1"; weighting: "simple", "min_snr", "edm", "vlb" (diffusion/process/losses.py)
    config.process.objective = ConfigDict({"norm": "l2", "weighting": "simple"})
    # how t is drawn: "uniform", "lognormal", "logit_normal", "second_moment"; "": its own
    config.process.times = ""
    config.conditioning = ConfigDict()
    config.conditioning.drop = 0.0  # fraction of conditions replaced by the null one
    config.conditioning.mask_padding = False  # hide padding tokens from cross-attention
    config.conditioning.train_text_encoder = True  # False: frozen, as `init_from` holds it
    config.conditioning.control = ""  # what a ControlNet reads: "edges" of the image; "": nothing
    # What joins x_t's channels: "inpaint" (mask and masked image), "low_resolution"; "": nothing
    config.conditioning.concat = ""
    config.init_networks = ()  # which of its networks to take; (): all that it has
    config.init_from = ""  # workdir whose networks the run starts from or keeps frozen; "": none
    config.sample = ConfigDict()
    config.sample.sampler = "ddim"
    config.sample.steps = 50  # network evaluations
    config.sample.guidance_scale = 1.0  # LDM's s = 1 + w; 1: none
    config.sample.clip = False  # predicted x0 to [-1, 1] (pixel space)
    config.sample.batch_size = 64
    return config


# LDM's first stages (https://arxiv.org/abs/2112.10752, table 8), as their own configs have them.
FIRST_STAGES = {
    "kl_f4": {"name": "kl", "multipliers": (1, 2, 4), "z_channels": 3},
    "kl_f8": {"name": "kl", "multipliers": (1, 2, 4, 4), "z_channels": 4},
    "kl_f16": {
        "name": "kl",
        "multipliers": (1, 1, 2, 2, 4),
        "attention": (False, False, False, False, True),
        "z_channels": 16,
    },
    "kl_f32": {
        "name": "kl",
        "multipliers": (1, 1, 2, 2, 4, 4),
        "attention": (False, False, False, False, True, True),
        "z_channels": 64,
    },
    "vq_f4": {"name": "vq", "multipliers": (1, 2, 4), "z_channels": 3, "num_codes": 8192},
    "vq_f4_noattn": {
        "name": "vq",
        "multipliers": (1, 2, 4),
        "mid_attention": False,
        "z_channels": 3,
        "num_codes": 8192,
    },
    "vq_f8": {
        "name": "vq",
        "multipliers": (1, 2, 2, 4),
        "attention": (False, False, False, True),
        "z_channels": 4,
        "num_codes": 16384,
    },
    "vq_f8_n256": {
        "name": "vq",
        "multipliers": (1, 2, 2, 4),
        "attention": (False, False, False, True),
        "z_channels": 4,
        "num_codes": 256,
    },
    "vq_f16": {
        "name": "vq",
        "multipliers": (1, 1, 2, 2, 4),
        "attention": (False, False, False, False, True),
        "z_channels": 8,
        "num_codes": 16384,
    },
}


def latent_diffusion(stage: str, data_name: str) -> ConfigDict:
    """LDM on stored latents of `data_name` at 256 pixels, through the first stage `stage`.

    CompVis's habits: AdamW with PyTorch's defaults, no clipping, an average of the U-Net alone,
    latents of a VQ stage as they are.
    """
    config = denoiser()
    config.data.name = "latents"
    config.data.dir = f"runs/latents/{data_name}_{stage}"
    config.data.image_size = 256
    config.latents = {
        "first_stage": f"runs/{stage}",  # the workdir of its run, or of a converted one
        "data_name": data_name,
        "data_dir": "runs/data",
        "epochs": 1,  # variants stored of each image
        "tokenizer": "",  # "word", "bpe": trained on the captions; or a folder of its files
        "scaling": "fixed",
        "scale": 1.0,
        "scaling_examples": 0,
        "shard_size": 10_000,
        "batch_size": 32,
    }
    config.model.dtype = "float32"
    config.model.autoencoder = {"channels": 128, "blocks": 2, **FIRST_STAGES[stage]}
    config.model.unet = {
        "out_channels": config.model.autoencoder.z_channels,
        "blocks": 2,
        "heads": None,
        "head_dim": None,
        "transformer_depth": 0,
        "epsilon": 1e-5,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    config.process.schedule = {
        "name": "scaled_linear",
        "num_steps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
    }
    config.optim.name = "adamw"
    config.optim.weight_decay = 1e-2
    config.ema.decay = 0.9999
    config.ema.ramp = True
    config.ema.networks = ("unet",)
    config.train.save_every_steps = 5000
    config.train.log_every_steps = 100
    config.sample.sampler = "ddim"
    config.sample.steps = 200
    config.sample.options = {"eta": 0.0, "spacing": "leading", "steps_offset": 1, "final": "first"}
    config.sample.batch_size = 16
    config.evaluation.examples = 2000
    return config


def online_latents(stage: str, scale: float) -> ConfigDict:
    """As `latent_diffusion`, but on a folder of images that the frozen first stage encodes while
    training: no latents are stored. Text encoder and tokenizer come from `init_from`, if it has
    any."""
    config = latent_diffusion(stage, "folder")
    del config.latents
    config.data.name = "folder"
    config.data.dir = ""
    config.data.eval_split = "train"
    config.data.max_bad_images = 0  # files that are no image to skip before it is an error
    config.online = {
        "scale": scale,  # of the latents, where `init_from` does not say
        "tokenizer": "bpe",  # trained on the captions ("word", "bpe"), or a folder of its files
    }
    config.conditioning.drop = 0.1
    return config


def lora(config: ConfigDict, rank: int) -> ConfigDict:
    """Train low-rank updates of the frozen U-Net's attention (https://arxiv.org/abs/2106.09685)."""
    config.model.lora = {
        "rank": rank,
        "alpha": float(rank),  # the update is alpha / rank times the product
        "targets": ("to_q", "to_k", "to_v", "to_out"),  # dense layers of attention
    }
    config.optim.learning_rate = 1e-4
    config.ema.update({"decay": 0.0, "networks": ()})
    return config


def controlnet(config: ConfigDict, hint_widths: tuple[int, ...]) -> ConfigDict:
    """Train a ControlNet (https://arxiv.org/abs/2302.05543) beside the frozen U-Net."""
    config.model.controlnet = {
        "hint_widths": hint_widths,  # of the convolutions on the condition; all but one halve it
    }
    config.conditioning.control = "edges"
    config.ema.update({"decay": 0.0, "networks": ()})
    return config


def latent_smoke(config: ConfigDict) -> ConfigDict:
    """`smoke` of a latent diffusion: the same shape of network, some hundred times narrower."""
    config.data.image_size = 128
    if "latents" in config:
        config.latents.update({"shard_size": 500, "batch_size": 8})
    config.model.autoencoder.update({"channels": 8, "groups": 4, "blocks": 1})
    config.model.unet.update({"channels": 16, "groups": 8, "blocks": 1})
    if config.model.unet.head_dim is not None:
        config.model.unet.head_dim = 8
    config.sample.update({"steps": 2, "batch_size": 8})
    return smoke(config)


def first_stage(kind: str) -> ConfigDict:
    """Keys that a first stage adds: `kind` "kl" or "vq". No discriminator unless the config says.

    Sums and means are those of diffusion/training/autoencoder.py, equations 1 to 3.
    """
    config = base("autoencoder")
    config.loss = ConfigDict()
    config.loss.reconstruction = "l1"  # "l1" or "l2"
    if kind == "kl":
        config.loss.reduction = "sum"  # over pixels and channels, or their "mean"
        config.loss.kl_weight = 1e-6  # of the KL summed over the latent
    else:
        config.loss.reduction = "mean"
        config.loss.codebook_weight = 1.0  # of commitment and codebook terms together
    # LPIPS on VGG-16, once a value of the image; needs `perceptual`'s files unless 0
    config.loss.perceptual_weight = 0.0
    config.loss.reseed_every_steps = 0  # codes unused for so long move to latents; 0: never
    config.loss.adversarial = ""  # "hinge" or "vanilla"; "": no discriminator
    config.loss.adversarial_weight = 0.5  # times the adaptive weight
    config.loss.adversarial_start_steps = 0  # steps of the autoencoder before it trains
    config.loss.adversarial_warmup_steps = 0  # steps it trains before the autoencoder sees it
    config.perceptual = ConfigDict()
    config.perceptual.vgg = ""  # torchvision's vgg16-397923af.pth, or the same as .safetensors
    config.perceptual.vgg_sha256 = ""  # what it must hash to; "": not checked, only logged
    config.perceptual.heads = ""  # lpips' weights/v0.1/vgg.pth, or the same as .safetensors
    config.perceptual.heads_sha256 = ""
    config.model.discriminator = ConfigDict()
    config.model.discriminator.channels = 64
    config.model.discriminator.layers = 3
    config.model.discriminator.norm = "group"  # or LDM's "batch", whose statistics depend on how
    config.model.discriminator.groups = 32  # the batch is split over devices and parts
    return config


def ldm_first_stage(stage: str) -> ConfigDict:
    """One of `FIRST_STAGES` as LDM trains it, at 256 pixels, on any folder of images."""
    config = first_stage(FIRST_STAGES[stage]["name"])
    config.data.name = "images"
    config.data.dir = "runs/data"
    config.data.eval_split = "validation"
    config.data.image_size = 256
    config.model.dtype = "float32"
    config.model.autoencoder = {"channels": 128, "blocks": 2, **FIRST_STAGES[stage]}
    config.model.discriminator.norm = "batch"
    config.loss.perceptual_weight = 1.0
    config.loss.adversarial = "hinge"
    config.optim.b1 = 0.5
    config.optim.b2 = 0.9
    config.train.log_every_steps = 100
    config.train.save_every_steps = 5000
    config.evaluation.every_steps = 10_000
    config.evaluation.examples = 1000
    config.evaluation.batch_size = 10
    config.evaluation.preview = 8
    return config


def smoke_first_stage(config: ConfigDict) -> ConfigDict:
    """A run of seconds: the same kind of network, tiny, with both networks training; no LPIPS."""
    config.data.image_size = 64
    config.model.autoencoder.update({"channels": 8, "blocks": 1, "groups": 4})
    if config.model.autoencoder.name == "vq":
        config.model.autoencoder.num_codes = 32
    config.model.discriminator.update({"channels": 8, "groups": 4})
    config.loss.update({"perceptual_weight": 0.0, "adversarial_start_steps": 1})
    config.evaluation.update({"every_steps": 0, "examples": 16})
    return smoke(config)


def parse(arg: str | None, choices: tuple[str, ...] = ()) -> tuple[str, bool]:
    """`"f8,smoke"` to ("f8", True). The first of `choices` is the default.

    Raises ValueError for anything that is neither a choice nor "smoke".
    """
    words = [word for word in (arg or "").split(",") if word]
    unknown = [word for word in words if word not in (*choices, "smoke")]
    chosen = [word for word in words if word in choices]
    if unknown or len(chosen) > 1:
        raise ValueError(
            f"config argument {arg!r} is unknown: use one of {[*choices, 'smoke']}, "
            "or two of them joined by a comma"
        )
    return (chosen or list(choices) or [""])[0], "smoke" in words


def parse_switches(
    arg: str | None, choices: tuple[str, ...], switches: tuple[str, ...]
) -> tuple[str, set[str], bool]:
    """As `parse`, with words beside the choice that are on or off: ("v1", {"lora"}, False)."""
    words = [word for word in (arg or "").split(",") if word]
    on = {word for word in words if word in switches}
    rest = ",".join(word for word in words if word not in switches)
    try:
        choice, small = parse(rest, choices)
    except ValueError as error:
        raise ValueError(f"{error}; with it may go {', '.join(switches)}") from error
    if len(on) > 1:
        raise ValueError(f"config argument {arg!r}: give one of {', '.join(sorted(on))}")
    return choice, on, small


def smoke(config: ConfigDict, steps: int = 4) -> ConfigDict:
    """Makes a run of seconds: few steps, a small batch, no wandb."""
    config.train.steps = steps
    config.train.batch_size = 8
    config.train.log_every_steps = 1
    config.train.save_every_steps = 2
    config.evaluation.batch_size = 8
    if config.optim.decay_steps:
        config.optim.decay_steps = max(steps, config.optim.warmup_steps + 1)
    config.optim.warmup_steps = min(config.optim.warmup_steps, 1)
    config.wandb.mode = "disabled"
    config.train.tensorboard = False
    return config


# -- DDPM and what builds on it -------------------------------------------------------------------


def ddpm(name: str, flip: bool) -> ConfigDict:
    """What the authors' configs share (hojonathanho/diffusion, `scripts/run_*.py`)."""
    config = denoiser()
    config.data.name = name
    config.data.dir = "runs/data"
    config.data.flip = flip
    config.model.dtype = "float32"
    config.train.log_every_steps = 100
    config.train.save_every_steps = 10_000
    config.optim.warmup_steps = 5000
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.9999
    config.sample.sampler = "ddpm"
    config.sample.steps = 1000
    config.sample.clip = True
    return config


def ddpm_unet() -> dict:
    """The U-Net for 32x32 images: 35,746,307 parameters on three channels."""
    return {
        "out_channels": 3,
        "channels": 128,
        "multipliers": (1, 2, 2, 2),
        "blocks": 2,
        "attention": (False, True, False, False),
        "heads": 1,
        "groups": 32,
        "dropout": 0.1,
    }


def ddpm_unet_256() -> dict:
    """The U-Net for 256x256 images: 113,673,219 parameters; attention at 16x16."""
    return ddpm_unet() | {
        "multipliers": (1, 1, 2, 2, 4, 4),
        "attention": (False, False, False, False, True, False),
        "dropout": 0.0,
    }


def smoke_ddpm(config: ConfigDict) -> ConfigDict:
    """A pixel-space denoiser's run of seconds: the same kind of network, tiny."""
    levels = min(2, len(config.model.unet.multipliers))
    config.model.unet.update(
        {
            "channels": 8,
            "multipliers": (1, 2)[:levels],
            "blocks": 1,
            "attention": (False, True)[:levels],
            "groups": 4,
        }
    )
    if config.process.schedule.get("num_steps"):
        config.process.schedule.num_steps = min(config.process.schedule.num_steps, 100)
    config.sample.update({"steps": 2, "batch_size": 8})
    return smoke(config)


# -- the default job: one description of each network, for the configs that share it -------------


def digits_data(config: ConfigDict) -> ConfigDict:
    config.data.name = "captioned_digits"
    config.data.dir = "runs/data"
    config.data.compose_held_out = False  # whether held-out (digit, colour) pairs are drawn
    return config


def digits_first_stage() -> ConfigDict:
    """32x32x3 to 8x8x4. All blocks run at 8x8: `patch` folds 4x4 pixels into channels."""
    return ConfigDict(
        {
            "name": "kl",
            "channels": 96,
            "multipliers": (1,),
            "blocks": 0,
            "mid_attention": False,
            "z_channels": 4,
            "patch": 4,
            "groups": 24,
        }
    )


def digits_networks(config: ConfigDict) -> ConfigDict:
    """The default job's text encoder and U-Net, and how they are trained."""
    config.model.dtype = "float32"
    config.model.autoencoder = digits_first_stage()
    config.model.unet = {
        "out_channels": 4,
        "channels": 32,
        "multipliers": (1, 3),
        "blocks": 1,
        "attention": (False, False),  # in the middle alone: 4x4 places
        "heads": None,
        "head_dim": 32,
        "transformer_depth": 1,
        "pool_context": True,
        "groups": 16,
        "epsilon": 1e-5,
        "scale_shift": True,
        "flip_sin_to_cos": True,
        "freq_shift": 0.0,
        "downsample_padding": 1,
    }
    config.model.text_encoder = {
        "vocab_size": 64,
        "max_length": 16,
        "width": 96,
        "layers": 1,
        "heads": 3,
        "activation": "gelu",
        "causal": False,
    }
    config.conditioning.drop = 0.1
    config.conditioning.mask_padding = True
    config.process.schedule = {"name": "scaled_linear", "num_steps": 1000}
    config.process.objective.weighting = "min_snr"
    config.process.objective.gamma = 0.5
    return config


def digits_adapter() -> ConfigDict:
    """What is trained on top of the default job's run, which stays frozen at `init_from`."""
    config = digits_networks(digits_data(denoiser()))
    config.init_from = "runs/quickstart/ldm"
    config.conditioning.train_text_encoder = False
    config.online = {
        "scale": 1.0,
        "tokenizer": "word",
    }  # as `latent_diffusion`'s; the run's own count
    config.train.batch_size = 16
    config.train.log_every_steps = 50
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.optim.decay = "cosine"
    config.optim.b2 = 0.99
    config.optim.clip_norm = 1.0
    config.sample.sampler = "dpmpp_2m"
    config.sample.steps = 25
    config.sample.guidance_scale = 5.0
    config.sample.batch_size = 250
    return config
