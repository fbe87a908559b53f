"""One and two steps on Fashion-MNIST by class: `scratch` (default), `tuned` or `distilled`.

    python -m experiments.train --config=configs/meanflow_fashion.py:scratch --workdir=DIR
    python -m experiments.evaluate --workdir=DIR --metrics=frechet_distance --sweep_steps=1,2 \\
        --classifier=CLASSIFIER

On the latents of configs/fashion_ldm.py. `scratch`: MeanFlow (arXiv:2505.13447) from the latents
alone, the teacher's guidance folded in. `tuned`: consistency tuning (ECT, arXiv:2406.14548) of its
U-Net at `init_from`, on its schedule, along its guided velocity in place of the data's, which knows
no guidance; its output is read as a velocity, for x_0 of eps is 15 times its error where there is
but noise. `distilled`: jumps of its guided trajectories, as configs/distil_digits.py's
(arXiv:2310.02279, its loss without GAN). For two CPU cores; distances beside the teacher's:
experiments/results/few_steps/README.md.
"""

from configs import common, fashion_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("scratch", "tuned", "distilled"))
    config = fashion_ldm.get_config("smoke" if smoke else None)
    config.sample.update(steps=1, guidance_scale=1.0)
    if not smoke:
        config.train.steps = config.optim.decay_steps = 10_000
    if which == "scratch":
        config.process.update(method="meanflow", prediction="velocity", times="uniform")
        config.process.schedule = {"name": "flow", "time_scale": 10.0}  # a smooth function of t
        config.process.objective = {"equal": 0.5, "improved": True, "guidance_scale": 1.5}
        config.model.denoiser.second_time = True
        config.sample.sampler = "meanflow"
        return config
    config.init_from = "runs/fashion_ldm"
    config.model.teacher = config.model.denoiser.to_dict()
    config.process.update(method="consistency", prediction="velocity")
    config.process.objective = {"power": 0.5, "teacher": "eps", "guidance_scale": 1.5}
    config.conditioning.drop = 0.0
    if which == "distilled":
        config.process.objective.update(skip=0.04, clean=0.5)
        config.model.denoiser.second_time = True
        config.sample.sampler = "meanflow"
    else:
        config.process.objective.update(q=2.0, double_steps=config.train.steps // 5)
        config.sample.sampler = "consistency"
    return config
