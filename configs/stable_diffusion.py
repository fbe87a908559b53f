"""Fine-tuning Stable Diffusion (https://arxiv.org/abs/2112.10752) on a folder of captioned images.

    python -m experiments.convert --from=diffusers --source=PIPELINE --workdir=runs/sd_v1
    python -m experiments.encode_latents --config=configs/stable_diffusion.py:v1 \
        --config.latents.data_dir=IMAGES
    python -m experiments.train --config=configs/stable_diffusion.py:v1 --workdir=DIR \
        --config.latents.data_dir=IMAGES

`v1` (default): U-Net of 859,520,964, CLIP ViT-L/14's text encoder. `v2`: 865,910,724, OpenCLIP
ViT-H/14's, velocity as `v` (768-v-ema; `--config.process.prediction=eps` for 2-base). `xl`: SDXL's
base (https://arxiv.org/abs/2307.01952), 2,567,463,684, CLIP ViT-L/14's and OpenCLIP ViT-bigG/14's,
1024 pixels, told of each picture's own size and crop; a dropped caption is zeros. `lora`: the
U-Net is frozen, and low-rank updates of its attention are trained. Latents and the text encoder's
outputs are made once, by encode_latents (experiments/results/speed has the gain). `online`: they
are made while training, and nothing is stored:

    python -m experiments.train --config=configs/stable_diffusion.py:v1,online --workdir=DIR \
        --config.data.dir=IMAGES

`controlnet`: the U-Net is frozen, and a ControlNet on edges of the images is trained; it is
`online`, being given images.

`lcm`: latent consistency distillation to 1 to 8 steps (Luo et al. 2023, arXiv:2310.04378), the
U-Net told how strongly to guide; with `lora` (arXiv:2311.05556) it is not, and its updates turn any
fine-tuned U-Net into such a one. Settings: Diffusers' train_lcm_distill_sd_wds.py and
train_lcm_distill_lora_sd.py, whose updates are of the convolutions too, here of the dense layers.

`textual_inversion`: a word is learned for a folder of pictures, and nothing else is trained; then
`convert --to=diffusers` writes learned_embeds.safetensors, which `sample --embedding` reads.
`dreambooth`: the U-Net learns a subject by a rare word, beside pictures of its class that `sample
--prompt="a photo of dog"` drew (CLASS, without its grid.png); with `lora`, updates of it:

    python -m experiments.train --config=configs/stable_diffusion.py:v1,textual_inversion \
        --workdir=DIR --config.data.dir=PICTURES --config.model.words.start=cat
    python -m experiments.train --config=configs/stable_diffusion.py:v1,dreambooth \
        --workdir=DIR --config.data.dir=PICTURES --config.data.prior_dir=CLASS

IMAGES holds a metadata.jsonl of `file_name` and `text`, or a .txt beside each image. The text
encoder and the first stage stay frozen. A tenth of the captions is dropped, as v1-3 and v1-4 were
trained (CompVis/stable-diffusion, Stable_Diffusion_v1_Model_Card.md); 1e-4 with 10,000 steps of
warm-up is that card's rate for a batch of 2048, 1e-5 for a small one the usual one. No number to
reproduce; not trained here: time not measured.
"""

from configs import common, common_ldm

ONE = ("controlnet", "lora", "textual_inversion")  # of which one is trained at a time


def get_config(arg=None):
    which, switches, smoke = common.parse_switches(
        arg,
        ("v1", "v2", "xl"),
        ("lora", "controlnet", "online", "lcm", "textual_inversion", "dreambooth"),
    )
    clashing = sorted(switches & {*ONE, "dreambooth", "lcm"})
    if len(clashing) > 1 and clashing not in (["dreambooth", "lora"], ["lcm", "lora"]):
        raise ValueError(f"config argument {arg!r}: {' and '.join(clashing)} exclude each other")
    for alone in ("textual_inversion", "lcm"):
        if {which, *switches} >= {"xl", alone}:
            raise ValueError(f"config argument {arg!r}: {alone} is of v1 and v2, not of xl")
    stored = not {"controlnet", "online", "textual_inversion", "dreambooth"} & switches
    make = common_ldm.stored_folder if stored else common_ldm.online_latents
    config = make("kl_f8", 0.13025 if which == "xl" else 0.18215)
    config.init_from = f"runs/sd_{which}"
    if stored:
        config.latents.first_stage = config.init_from
        config.data.dir = f"runs/latents/sd_{which}"
    config.data.image_size = {"v1": 512, "v2": 768, "xl": 1024}[which]
    _networks(config, which)
    config.conditioning.train_text_encoder = False
    config.process.schedule.update({"beta_start": 0.00085, "beta_end": 0.012})
    config.train.update(steps=20_000, batch_size=8)
    config.optim.update(learning_rate=1e-5, warmup_steps=500)
    config.sample.update(steps=50, guidance_scale=5.0 if which == "xl" else 7.5)
    if "textual_inversion" in switches:
        common_ldm.textual_inversion(config)
    if "dreambooth" in switches:
        common_ldm.dreambooth(config)
    if "lora" in switches:
        common_ldm.lora(config, rank=4)
    if "controlnet" in switches:
        common_ldm.controlnet(config, (16, 32, 96, 256))
    if "lcm" in switches:
        latent_consistency(config, "lora" in switches)
    if smoke:
        common_ldm.latent_smoke(config)
        config.model.denoiser.update({"heads": 2, "head_dim": None})
        if "teacher" in config.model:
            config.model.teacher = {**config.model.denoiser.to_dict(), "guidance_width": 0}
        small = {"vocab_size": 1024, "width": 32, "layers": 2, "heads": 2}
        config.model.text_encoder.update(small)
        if which == "xl":
            config.model.text_encoder_2.update({**small, "projection": 16})
            config.model.denoiser.transformer_depth = (1, 1, 2)
            config.conditioning.size_dim = 8
        if "controlnet" in switches:
            config.model.controlnet.hint_widths = (8, 8, 8, 8)
    return config


def _networks(config, which):
    """U-Net and text encoders."""
    config.model.denoiser.update(
        {
            "channels": 320,
            "multipliers": (1, 2, 4, 4),
            "attention": (True, True, True, False),
            "transformer_depth": 1,
        }
    )
    words = {"vocab_size": 49408, "max_length": 77, "causal": True}
    clip_l = {**words, "width": 768, "layers": 12, "heads": 12, "activation": "quick_gelu"}
    config.model.text_encoder = clip_l
    if which == "v1":
        config.model.denoiser.heads = 8
    elif which == "v2":
        config.model.denoiser.update({"head_dim": 64, "linear_projection": True})
        # The 23 layers of 24 whose output is used.
        config.model.text_encoder.update(
            {"width": 1024, "layers": 23, "heads": 16, "activation": "gelu"}
        )
        config.process.prediction = "v"
    else:
        _xl(config, words)


def _xl(config, words):
    config.model.denoiser = {
        **config.model.denoiser.to_dict(),
        "multipliers": (1, 2, 4),
        "attention": (False, True, True),
        "transformer_depth": (1, 2, 10),  # the first level's is of no use
        "head_dim": 64,
        "linear_projection": True,
        "vector": True,
    }
    config.model.text_encoder_2 = {
        **words,
        "width": 1280,
        "layers": 32,
        "heads": 20,
        "activation": "gelu",
        "projection": 1280,
        "end": 49407,
    }
    config.conditioning.zero_null = True
    if "latents" in config:
        config.latents.contexts = False
    config.sample.sampler = "euler"
    config.sample.options = {"spacing": "leading", "steps_offset": 1}


def latent_consistency(config, adapted):
    """Students of `init_from`'s U-Net."""
    config.process.method = "lcm"
    config.process.objective = {"teacher": config.process.prediction, "weights": (5.0, 15.0)}
    config.conditioning.drop = 0.0
    config.train.steps = 1000
    config.sample.update(sampler="lcm", steps=4, guidance_scale=1.0)
    config.sample.options = {}
    if adapted:
        config.model.lora.update(rank=64, alpha=64.0)
        config.model.lora.targets = ("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out")
        return
    config.model.teacher = config.model.denoiser.to_dict()
    config.model.denoiser.guidance_width = 256  # Diffusers: time_cond_proj_dim
    config.optim.update(learning_rate=1e-6, warmup_steps=0)
    config.sample.guidance_scale = 8.0
