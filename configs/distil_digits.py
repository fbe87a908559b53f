"""One to four steps on the captioned digits, distilled from the default job's run.

    python -m experiments.train --config=configs/distil_digits.py --workdir=DIR
    python -m experiments.evaluate --workdir=DIR --metrics=adherence --steps=1

`jumps` (default): consistency distillation of whole trajectories (Kim et al. 2023,
arXiv:2310.02279, its loss without GAN): the network is told where a jump ends, so one network
serves any number of steps. `consistency`: jumps to clean data alone (Song et al. 2023,
arXiv:2303.01469). Guidance is the teacher's, in each of its steps of 1 / 25, and is in the student
for good. `progressive`: 8 steps of DDIM from 16 of the teacher's (Salimans and Ho 2022,
arXiv:2202.00512); a run on top of it halves them again with --config.init_from=DIR and, of
--config.process.objective, .teacher=v .guidance_scale=1 .steps=4 (and --config.sample.steps=4).
Numbers: experiments/results/few_steps/.
"""

from configs import common, common_digits, digits_ldm


def get_config(arg=None):
    which, smoke = common.parse(arg, ("jumps", "consistency", "progressive"))
    config = digits_ldm.get_config("smoke" if smoke else None)
    common_digits.digits_teacher(config)
    config.conditioning.drop, config.process.times = 0.0, ""
    config.process.objective = {"teacher": "eps", "guidance_scale": 5.0}
    config.sample.guidance_scale = 1.0
    if which == "progressive":
        config.process.update(method="progressive", prediction="v")
        config.process.objective.steps = 8
        config.sample.update(sampler="ddim", steps=8, options={"spacing": "uniform"})
        return config
    config.process.update(method="consistency", prediction="velocity")
    jumps = which == "jumps"
    config.process.objective.update(skip=0.04, power=0.5, clean=0.5 if jumps else 1.0)
    config.model.denoiser.second_time = jumps
    config.sample.update(sampler="meanflow" if jumps else "consistency", steps=1)
    return config
