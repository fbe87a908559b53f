"""One to four steps on the captioned digits: MeanFlow (Geng et al. 2025, arXiv:2505.13447).

    python -m experiments.train --config=configs/meanflow_digits.py --workdir=DIR
    python -m experiments.evaluate --workdir=DIR --metrics=adherence --steps=1

`tuned` (default) starts from the default job's run at `init_from`, which is also the teacher: its
guided velocity is what the average velocity is of, so that one evaluation stands for the 50 of 25
guided steps. `scratch` learns from the latents alone, guidance folded into its target. Numbers and
pictures: experiments/results/few_steps/.
"""

from configs import common, common_digits, digits_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("tuned", "scratch"))
    config = digits_ldm.get_config("smoke" if smoke else None)
    config.process.update(method="meanflow", prediction="velocity", times="uniform")
    config.model.denoiser.second_time = True
    config.conditioning.drop = 0.0
    if which == "tuned":
        common_digits.digits_teacher(config)
        config.process.objective = {"equal": 0.25, "teacher": "eps", "guidance_scale": 5.0}
    else:
        config.process.schedule = {"name": "flow", "time_scale": 10.0}  # a smooth function of t
        config.conditioning.drop = 0.1
        config.process.objective = {"equal": 0.5, "guidance_scale": 5.0, "guidance_mix": 0.8}
    config.optim.b2 = 0.95
    config.sample.update(sampler="meanflow", steps=1, guidance_scale=1.0)
    return config
