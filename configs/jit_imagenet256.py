"""JiT on ImageNet's pixels at 256: `b16` (default) or `l16` (https://arxiv.org/abs/2511.13720).

    python -m experiments.train --config=configs/jit_imagenet256.py:b16 --workdir=DIR

No first stage: patches of 16 x 16 pixels, 768 values each, of which the network predicts the clean
ones, since those lie on a manifold that it can hold and the noise does not; the loss is the
velocity's. Settings: the authors' PyTorch code (LTH14/JiT: main_jit.py, model_jit.py, README.md):
a bottleneck of 128 channels before the width, RMS norms, SwiGLU, rotary and added positions, 32
tokens of the label from block 4 (b16) or 8 (l16); AdamW at 2e-4 (5e-5 a 256 images) with b2 0.95,
five epochs of warm-up; 600 epochs of 1,024; an average of 0.9999; their t is 1 - t, logit-normal
of mean -0.8 and deviation 0.8; Heun's method, 50 steps, guidance 2.9 (l16's 2.4 is not verified)
where their t is above 0.1. They round 1 - t up to 0.05 when sampling as well; here the last steps
end at the prediction. Parameters in the paper: 131 M, 459 M. Not trained here: time not measured.
"""

from configs import common, common_ddpm, common_dit

LABEL_TOKENS_FROM = {"b": 4, "l": 8}
GUIDANCE = {"b": 2.9, "l": 2.4}


def get_config(arg=None):
    which, smoke = common.parse(arg, ("b16", "l16"))
    size = which[0]
    config = common.denoiser()
    config.data.update(name="imagenet2012", dir="runs/data", image_size=256, flip=True)
    config.data.eval_split = "validation"
    config.model.dtype = "bfloat16"
    config.model.denoiser = {
        "kind": "transformer",
        "out_channels": 3,
        "size": 256,
        "patch": 16,
        "num_classes": 1001,  # the last is the null one
        **common_dit.SIZES[size],
        "norm": "rms",
        "qk_norm": True,
        "positions": "both",
        "activation": "swiglu",
        "mult": 8 / 3,
        "bottleneck": 128,
        "label_tokens": 32,
        "label_tokens_from": LABEL_TOKENS_FROM[size],
    }
    config.conditioning.drop = 0.1
    config.process.schedule = {"name": "flow", "time_scale": 1.0, "p_mean": 0.8, "p_std": 0.8}
    config.process.prediction = "x0"
    config.process.times = "logit_normal"
    config.process.objective.weighting = "velocity"
    config.train.update(steps=750_000, batch_size=1024, save_every_steps=12_500)
    config.optim.update(name="adamw", learning_rate=2e-4, warmup_steps=6250, b2=0.95)
    config.ema.decay = 0.9999
    config.sample.update(sampler="heun", steps=50, guidance_scale=GUIDANCE[size])
    config.sample.guidance_interval = (0.0, 0.9)
    if smoke:
        config.data.image_size = config.model.denoiser.size = 32
        config.model.denoiser.update({"bottleneck": 8, "label_tokens_from": 1})
        common_ddpm.smoke_ddpm(config)
    return config
