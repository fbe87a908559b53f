"""The vocabulary that every config shares, with units and meaning beside each key.

A config is `get_config(arg)` in a file that imports nothing but ml_collections and `common*.py`, so
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
    config.train.keep_best = ""  # and the one with the best of this, "eval_loss" say; "": none
    config.train.max_skipped_in_a_row = 20  # non-finite steps before the run ends
    config.train.max_loss_deviations = 0.0  # skip a loss so many deviations above the mean; 0: off
    # Trace steps (first, last), as the log counts them, into WORKDIR/profile; (): none
    config.train.profile_steps = ()
    config.train.tensorboard = True  # needs TensorFlow; without it the log says that it is off

    config.data = ConfigDict()
    config.data.name = ""  # a row of experiments/run/data.py, a set by its name, or "latents"
    config.data.dir = ""  # where prepare_data or encode_latents wrote it
    config.data.eval_split = "test"
    config.data.image_size = 32  # pixels a side; a tuple has one size a spatial axis
    config.data.channels = 3
    config.data.fit = "crop"  # to image_size: "crop" (a square) or "pad" (with black)
    # Of "crop", as the papers' own code: "bicubic", "lanczos", "opencv" (bilinear, not smoothed) or
    # "box" (diffusion/data/fitting.py); a square at the "centre", or drawn at "random" each time a
    # picture is trained on or stored; pixels that the shorter side has before it, 0: image_size
    config.data.resize, config.data.crop, config.data.shorter_side = "bicubic", "centre", 0
    config.data.flip = False  # mirror half of the training images
    config.data.augment = 0.0  # EDM's pipeline at this probability, told to the network; 0: none
    config.data.max_bad_images = 0  # files of "folder" to skip that are no image, before an error
    config.data.examples = 20_000  # of "signals", which are made as they are read
    # Of a measured series: values that a window's future is told of, values of the end that are not
    # trained on, values after those that are left out (to choose settings without them), a year's
    config.data.past, config.data.held_out, config.data.left_out = 0, 0, 0
    config.data.season = 12
    config.data.compose_held_out = False  # of digits: whether held-out (digit, colour) pairs count
    config.data.boxes = ""  # of "folder": a JSONL of "file_name" and "boxes" (data/annotations.py)
    config.data.segments = ""  # of "folder": a folder of maps of labels, named as the images, .png
    # Of "folder", of one subject without captions: captions to draw from, "{}" being the word that
    # is learned; DreamBooth's pictures of its class, their captions, and the weight of their loss
    config.data.prompts, config.data.prior_dir, config.data.prior_prompts = (), "", ()
    config.data.prior_weight = 1.0
    config.data.colour = ""  # of "recoloured_digits": that of every other picture

    config.model = ConfigDict()

    config.optim = ConfigDict()
    config.optim.name = "adam"  # "adam", "radam", "adamw", "sgd", or "muon", AdamW for no matrix
    config.optim.learning_rate = 2e-4  # the one used: never scaled by batch or devices
    config.optim.warmup_steps = 0  # linear, from 0
    config.optim.decay = "constant"  # "constant", "cosine", "linear" or "inverse_sqrt"
    config.optim.decay_steps = 0  # where the decay ends, from step 0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.momentum = 0.95  # of "muon"'s matrices
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 0.0  # bound of the gradient's global norm; 0: off

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # 0: no average is kept
    config.ema.ramp = False  # LDM's min(decay, (1 + n) / (10 + n))
    config.ema.ramp_share = 0.0  # EDM's: half-life at most so much of the run so far; 0: off
    config.ema.networks = ()  # which networks are averaged, by name; (): all that are trained
    # Lengths (fractions of the run) of EDM2's averages to keep as well, (0.05, 0.1) say: `evaluate
    # --ema_length` makes any between of the checkpoints that are kept (train.keep_every_steps)
    config.ema.profiles = ()

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
    config.process.prediction = "eps"  # what the network puts out (diffusion/process/gaussian.py)
    # Its constructor's arguments; "zero_terminal_snr"; "between": of whole t (process/schedules.py)
    config.process.schedule = ConfigDict({"name": "ddpm_linear", "num_steps": 1000})
    # of p(x_{t-1} | x_t): "fixed_large" (beta_t), "fixed_small" (the posterior's), "learned"
    config.process.variance = "fixed_large"
    # how it is learnt: "denoise", or for few steps "meanflow", "consistency", "scm", "progressive",
    # "lcm", each with an objective's arguments of its own (diffusion/process/few_steps.py and,
    # after it, consistency.py and latent_consistency.py)
    config.process.method = "denoise"
    # norm: "l2", "l1"; weighting: "simple", "min_snr", "edm", "velocity", "vlb"; cosine: weight of
    # LightningDiT's angle (diffusion/process/losses.py)
    config.process.objective = ConfigDict({"norm": "l2", "weighting": "simple"})
    # how t is drawn: "uniform", "lognormal", "logit_normal", "second_moment"; "": its own
    config.process.times = ""
    # of noise and examples of a batch: "independent", or "optimal" transport's pairs (OT-CFM)
    config.process.coupling = "independent"
    config.conditioning = ConfigDict()
    config.conditioning.drop = 0.0  # fraction of conditions replaced by the null one
    config.conditioning.null_label = True  # the last class is the null one; False: it is a class
    config.conditioning.mask_padding = False  # hide padding tokens from cross-attention
    config.conditioning.zero_null = False  # of two text encoders: no caption is zeros, not ""
    config.conditioning.size_dim = 256  # of two text encoders: sinusoids of each size they tell of
    config.conditioning.layout = 0  # labels of boxes that the text encoder reads; 0: captions
    config.conditioning.train_text_encoder = True  # False: frozen, as `init_from` holds it
    config.conditioning.control = ""  # what a ControlNet reads: "edges" of the image; "": nothing
    # What joins x_t's channels: "inpaint" (Stable Diffusion's: mask, masked image), "inpaint_ldm"
    # (CompVis's: masked image, mask), "low_resolution", "semantic" (of `model.rescaler`), "past" of
    # a series; "edit" (InstructPix2Pix's: the image; to sample, not to train); "": none
    config.conditioning.concat = ""
    config.conditioning.downscale = 0  # image's side over the small one's; 0: as large as x_t
    config.conditioning.degradation = "bicubic"  # how it is made small, "area" or "bsr_light"
    config.conditioning.enlarge = "cubic"  # how it is made x_t's size again, or "linear"
    config.conditioning.masks = "lama"  # what "inpaint*" hides: "lama", or "half" of the picture
    # REPA (diffusion/training/alignment.py): weight of a transformer's block's alignment to what
    # `model.features`, frozen, sees in the picture, 0: none; the block, from 1; the projection's
    # width; the folder of the frozen weights: a classifier's run, or Transformers' Dinov2Model
    config.align = ConfigDict({"weight": 0.0, "block": 8, "width": 2048, "features": ""})
    config.init_networks = ()  # which of its networks to take; (): all that it has
    config.init_from = ""  # workdir whose networks the run starts from or keeps frozen; "": none
    config.sample = ConfigDict()
    config.sample.sampler = "ddim"
    config.sample.steps = 50  # network evaluations
    config.sample.guidance_scale = 1.0  # LDM's s = 1 + w; 1: none
    config.sample.guidance_interval = ()  # (low, high) of t, where it acts; (): everywhere
    config.sample.guidance_rescale = 0.0  # phi of Lin et al., against saturation, to 1; 0: none
    config.sample.image_guidance_scale = 1.5  # s_I of "edit", whose s_T is guidance_scale
    config.sample.guidance_channels = 0  # how many of the first are guided, DiT's 3 of 4; 0: all
    # A worse run, or one of its checkpoints (DIR/checkpoints/STEP), that `sample` and `evaluate`
    # guide away from (diffusion/sampling/guide.py); "": none. Previews are without
    config.sample.autoguidance = ""
    config.sample.guidance_classifier = ""  # workdir of a classifier of noised pictures; "": none
    config.sample.classifier_scale = 1.0  # s of its gradient
    config.sample.state = "float32"  # of x between the network's calls, or "float64", as EDM's
    config.sample.clip = False  # predicted x0 to [-1, 1] (pixel space)
    config.sample.dynamic_threshold = 0.0  # percentile of Imagen's, to 1, for `clip`; 0: none
    config.sample.batch_size = 64
    return config


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
    config.loss.perceptual_dropout = False  # of a half before its heads in training, as LDM's ran
    config.loss.reseed_every_steps = 0  # codes unused for so long move to latents; 0: never
    config.loss.adversarial = ""  # "hinge" or "vanilla"; "": no discriminator
    config.loss.adversarial_weight = 0.5  # times the adaptive weight
    config.loss.adversarial_start_steps = 0  # steps of the autoencoder before it trains
    config.loss.adversarial_warmup_steps = 0  # steps it trains before the autoencoder sees it
    config.initialisation = "ddpm"  # of the first stage; "torch": PyTorch's, as CompVis's
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
