"""What the configs of latent diffusion share: its first stages, and denoisers on their latents."""

from ml_collections import ConfigDict

from configs.common import denoiser, first_stage, smoke

# LDM's first stages (https://arxiv.org/abs/2112.10752, table 8), as their own configs have them.
FIRST_STAGES = {
    "kl_f4": {"name": "kl", "multipliers": (1, 2, 4), "z_channels": 3},
    "kl_f8": {"name": "kl", "multipliers": (1, 2, 4, 4), "z_channels": 4},
    # Stable Diffusion 3's (https://arxiv.org/abs/2403.03206, table 3)
    "kl_f8_16": {
        "name": "kl",
        "multipliers": (1, 2, 4, 4),
        "z_channels": 16,
        "use_quant_conv": False,
    },
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
    config.data.update(name="latents", dir=f"runs/latents/{data_name}_{stage}", image_size=256)
    config.latents = {
        "first_stage": f"runs/{stage}",  # the workdir of its run, or of a converted one
        "data_name": data_name,
        "data_dir": "runs/data",
        "epochs": 1,  # variants stored of each image
        "tokenizer": "",  # "word", "bpe": trained on the captions; or a folder of its files
        "contexts": False,  # of a frozen text encoder, its output for each caption as well
        "scaling": "fixed",
        "scale": 1.0,
        "scaling_examples": 0,
        "shard_size": 10_000,
        "batch_size": 32,
    }
    config.model.dtype = "float32"
    config.model.autoencoder = {"channels": 128, "blocks": 2, **FIRST_STAGES[stage]}
    config.model.denoiser = {
        "kind": "unet",
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
    config.optim.update(name="adamw", weight_decay=1e-2)
    config.ema.update(decay=0.9999, ramp=True, networks=("denoiser",))
    config.train.update(save_every_steps=5000, log_every_steps=100)
    config.sample.update(sampler="ddim", steps=200)
    config.sample.options = {"eta": 0.0, "spacing": "stride", "steps_offset": 1, "final": "first"}
    config.sample.batch_size = 16
    config.evaluation.examples = 2000
    return config


def stored_folder(stage: str, scale: float) -> ConfigDict:
    """As `latent_diffusion`, on a folder of captioned images (`latents.data_dir`), what the frozen
    text encoder of `init_from` makes of the captions stored beside the latents."""
    config = latent_diffusion(stage, "folder")
    config.latents.update({"data_dir": "", "scale": scale, "contexts": True})
    config.data.eval_split = "train"
    config.conditioning.drop = 0.1
    return config


def online_latents(stage: str, scale: float) -> ConfigDict:
    """As `stored_folder`, but the images are encoded while training, and so are the captions:
    nothing is stored. Text encoder and tokenizer come from `init_from`, if it has any."""
    config = stored_folder(stage, scale)
    del config.latents
    config.data.update(name="folder", dir="")
    config.online = {
        "scale": scale,  # of the latents, where `init_from` does not say
        "tokenizer": "bpe",  # trained on the captions ("word", "bpe"), or a folder of its files
    }
    return config


def lora(config: ConfigDict, rank: int) -> ConfigDict:
    """Train low-rank updates of the frozen U-Net's attention (https://arxiv.org/abs/2106.09685)."""
    config.model.lora = {
        "rank": rank,
        "alpha": float(rank),  # the update is alpha / rank times the product
        "targets": ("to_q", "to_k", "to_v", "to_out"),  # dense layers of attention
        "initialisation": "uniform",  # of the first factor: PEFT's, or "gaussian"
    }
    config.optim.learning_rate = 1e-4
    config.ema.update({"decay": 0.0, "networks": ()})
    return config


def textual_inversion(config: ConfigDict) -> ConfigDict:
    """Learn a word for a folder of pictures (https://arxiv.org/abs/2208.01618); all else is frozen.

    Its prompts are some of the paper's (CLIP's ImageNet templates); Diffusers' rate for a batch
    of 4.
    """
    config.model.words = {
        "word": "<new>",  # as prompts have it
        "start": "object",  # a word of one token that it begins from: what it is a kind of
        "vectors": 1,  # rows of the word
    }
    nouns = ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}")
    nouns += ("the photo of a {}", "a close-up photo of a {}", "a bright photo of the {}")
    config.data.prompts = (*nouns, "a good photo of the {}", "a photo of one {}", "a nice {}")
    config.conditioning.drop = 0.0
    config.optim.update(learning_rate=2e-3, warmup_steps=0)
    config.train.update(steps=3000, batch_size=4, save_every_steps=500)
    config.ema.update({"decay": 0.0, "networks": ()})
    return config


def dreambooth(config: ConfigDict) -> ConfigDict:
    """Teach a subject by a rare word (https://arxiv.org/abs/2208.12242), its class kept beside it;
    rate and steps of Diffusers' example."""
    config.data.prompts = ("a photo of sks dog",)
    config.data.update(prior_dir="runs/class", prior_prompts=("a photo of dog",), prior_weight=1.0)
    config.conditioning.drop = 0.0
    config.optim.update(learning_rate=5e-6, warmup_steps=0)
    config.train.update(steps=800, batch_size=2, save_every_steps=200)
    config.ema.update({"decay": 0.0, "networks": ()})
    return config


def controlnet(config: ConfigDict, hint_widths: tuple[int, ...]) -> ConfigDict:
    """Train a ControlNet (https://arxiv.org/abs/2302.05543) beside the frozen U-Net."""
    config.model.controlnet = {
        "hint_widths": hint_widths  # of the convolutions on the condition; all but one halve it
    }
    config.conditioning.control = "edges"
    config.ema.update({"decay": 0.0, "networks": ()})
    return config


def bert(width: int, layers: int) -> dict:
    """LDM's transformer over BERT's word pieces (CompVis: BERTEmbedder), trained from scratch."""
    return {
        "vocab_size": 30522,
        "max_length": 77,
        "width": width,
        "layers": layers,
        "heads": 8,
        "head_dim": 64,
        "activation": "gelu",
        "causal": False,
        "qkv_bias": False,
        "logits_head": True,  # held, as published, and never used
    }


def degraded(config: ConfigDict, concat: str, start: float, end: float, norm: str) -> ConfigDict:
    """A task of LDM's whose condition joins x_t's channels: its schedule and loss, no guidance."""
    config.conditioning.concat = concat
    config.process.schedule.update({"beta_start": start, "beta_end": end})
    config.process.objective.norm = norm
    config.sample.options.eta = 1.0
    return config


def latent_smoke(config: ConfigDict) -> ConfigDict:
    """`smoke` of a latent diffusion: the same shape of network, some hundred times narrower."""
    config.data.image_size = 128
    if "latents" in config:
        config.latents.update({"shard_size": 500, "batch_size": 8})
    config.model.autoencoder.update({"channels": 8, "groups": 4, "blocks": 1})
    if config.model.denoiser.kind in ("transformer", "mmdit"):
        side = 16 * config.model.denoiser.size // 32
        config.model.denoiser.update({"width": 32, "depth": 2, "heads": 2, "size": side})
    else:
        config.model.denoiser.update({"channels": 16, "groups": 8, "blocks": 1})
        if config.model.denoiser.head_dim is not None:
            config.model.denoiser.head_dim = 8
    config.sample.update({"steps": 2, "batch_size": 8})
    return smoke(config)


def ldm_first_stage(stage: str) -> ConfigDict:
    """One of `FIRST_STAGES` as LDM trains it, at 256 pixels, on any folder of images."""
    config = first_stage(FIRST_STAGES[stage]["name"])
    config.data.update(name="images", dir="runs/data", eval_split="validation", image_size=256)
    config.data.update(resize="opencv", crop="random", shorter_side=384)
    config.model.dtype = "float32"
    config.model.autoencoder = {"channels": 128, "blocks": 2, **FIRST_STAGES[stage]}
    config.model.discriminator.norm = "batch"
    config.loss.update(perceptual_weight=1.0, perceptual_dropout=True)
    config.initialisation = "torch"
    config.loss.adversarial = "hinge"
    config.optim.update(b1=0.5, b2=0.9)
    config.train.update(log_every_steps=100, save_every_steps=5000)
    config.evaluation.update(every_steps=10_000, examples=1000, batch_size=10, preview=8)
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
