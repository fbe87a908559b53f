"""The next year of a measured series, given the years before: samples, and with them quantiles.

    pip install -r requirements-forecast.txt
    python -m experiments.train --config=configs/forecast.py --workdir=DIR
    python -m experiments.evaluate.forecast --workdir=DIR

Monthly sea surface temperature (`diffusion/data/series.py`), a transformer over its twelve months
(`models/transformer.py`), the same months of the year before as a channel beside x_t; the linear
path of rectified flow. Time, CRPS and coverage of the last eleven years, against seasonal-naive
and exponential smoothing: experiments/results/forecast/README.md.
"""

from configs import common


def get_config(arg=None):
    _, smoke = common.parse(arg)
    config = common.denoiser()
    config.data.name = "sea_surface_temperature"
    del config.data.image_size  # a number, of images
    config.data.update(image_size=(12,), channels=1, past=12, held_out=132)
    config.conditioning.concat = "past"
    config.model.dtype = "float32"
    config.model.denoiser = {
        "kind": "transformer",
        "out_channels": 1,
        "size": 12,
        "patch": 1,
        "width": 32,
        "depth": 2,
        "heads": 4,
        "positions": "sincos",
    }
    config.process.schedule = {"name": "flow", "time_scale": 1000.0}
    config.process.prediction = "velocity"
    # A small series: more steps fit its noise
    config.train.update(steps=400, batch_size=64, log_every_steps=50, save_every_steps=200)
    config.optim.update(name="adamw", learning_rate=1e-3, warmup_steps=50)
    config.optim.update(decay="cosine", decay_steps=400, weight_decay=0.1, clip_norm=1.0)
    config.ema.update(decay=0.98, ramp=True)
    config.sample.update(sampler="heun", steps=20)
    config.sample.batch_size = 1210  # 100 futures of about twelve windows
    config.evaluation.preview = 0
    return common.smoke(config) if smoke else config
