"""One to four steps on the captioned digits, distilled from the default job's run.

    python -m experiments.train --config=configs/distil_digits.py --workdir=DIR
    python -m experiments.evaluate --workdir=DIR --metrics=adherence --steps=1

`jumps` (default): consistency distillation of whole trajectories (Kim et al. 2023,
arXiv:2310.02279, its loss without GAN): the network is told where a jump ends, so one network
serves any number of steps. `consistency`: jumps to clean data alone (Song et al. 2023,
arXiv:2303.01469). Guidance is the teacher's, in each of its steps of 1 / 25, and is in the student
for good. Numbers and pictures: experiments/results/few_steps/.
"""

from configs import common, common_digits, digits_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("jumps", "consistency"))
    config = digits_ldm.get_config("smoke" if smoke else None)
    config.process.update(method="consistency", prediction="velocity")
    config.process.objective = {"teacher": "eps", "guidance_scale": 5.0, "skip": 0.04, "power": 0.5}
    config.model.denoiser.second_time = which == "jumps"
    config.process.objective.clean = 0.5 if which == "jumps" else 1.0
    common_digits.digits_teacher(config)
    config.conditioning.drop = 0.0
    config.sample.sampler = "meanflow" if which == "jumps" else "consistency"
    config.sample.update(steps=1, guidance_scale=1.0)
    return config
