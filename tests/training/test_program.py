"""Every process of a run must trace the same program, and the next start find it in the cache."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = """
import hashlib, jax
from configs import digits_ldm, stable_diffusion
from experiments.plan import cost as plan
for config in (digits_ldm.get_config("smoke"), stable_diffusion.get_config("v1,lora,smoke")):
    task, state, frozen = plan.shapes(config)
    step = jax.jit(task.train_step)
    lowered = step.lower(state, plan.abstract_batch(config, task, 2), frozen)
    print(hashlib.sha256(lowered.as_text().encode()).hexdigest())
"""


def test_the_step_is_one_program_whatever_python_hashes_strings_to():
    """Two networks are trained and averaged in the first, many layers are updated in the second."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAMS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        # A set of the trained networks' names has one order under one, another under the other.
        for seed in ("1", "10")
    ]
    first, second = [process.communicate()[0] for process in processes]
    assert len(first.split()) == 2 and first == second
