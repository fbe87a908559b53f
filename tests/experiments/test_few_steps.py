"""A run of few steps from the default job's, through the commands; what contradicts is refused."""

import json

import jax
import numpy as np
import pytest

from configs import distil_digits, meanflow_digits
from experiments import sample, train
from experiments.benchmark import __main__ as benchmark
from experiments.host import cli
from experiments.run import networks, tasks


def test_a_student_starts_as_its_teacher_and_makes_pictures_in_one_step(job, tmp_path):
    argv = ["--config=configs/distil_digits.py:smoke", f"--workdir={tmp_path}/run"]
    argv += [f"--config.init_from={job}/ldm", f"--config.data.dir={job}/latents"]
    argv += ["--config.train.steps=1", "--config.optim.learning_rate=0"]
    argv += ["--config.evaluation.preview=0", "--config.optim.weight_decay=0"]
    assert cli.run(train.define, train.main, argv) == 0
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([row["loss"] for row in rows if "loss" in row]).all()
    teacher = networks.load(job / "ldm").params
    student = networks.load(tmp_path / "run", "raw").params
    for name, tree in teacher["denoiser"].items():
        jax.tree.map(np.testing.assert_array_equal, tree, student["denoiser"][name])
    assert "second_1" in student["denoiser"] and "teacher" not in student
    for steps in (1, 2):
        out = tmp_path / f"out{steps}"
        given = [f"--workdir={tmp_path}/run", f"--out={out}", f"--steps={steps}", "--num=2"]
        assert cli.run(sample.define, sample.main, [*given, "--prompt=a red seven"]) == 0
        assert (out / "00001.png").is_file()
    out = tmp_path / "speed.json"
    argv = ["--suite=pictures", f"--workdir={tmp_path}/run,{job}/ldm", "--steps=1,2", "--batch=2"]
    assert cli.run(benchmark.define, benchmark.main, [*argv, "--rounds=1", f"--out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["run"] for row in rows] == ["run", "run", "ldm"]
    assert [row["evaluations"] for row in rows] == [1, 2, 4]  # the teacher's 2 steps are guided
    assert rows[-1]["times"] == 1 and all(0 < row["images_per_sec"] <= row["best"] for row in rows)


def test_contradictions_are_refused_by_name():
    def refused(match, module=distil_digits, build=tasks.task, **keys):
        config = module.get_config("smoke")
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in keys.items()})
        with pytest.raises(ValueError, match=match):
            build(config.lock())

    refused("^model.denoiser.second_time=False.*True", model__denoiser__second_time=False)
    refused("second_time=True.*not told", process__objective__clean=1.0)
    learned = {"process__variance": "learned", "model__denoiser__out_channels": 8}
    refused("^process.variance='learned'.*fixed_large", **learned)
    refused("^process.method='jump'.*meanflow", process__method="jump")
    refused("train_text_encoder=True with model.teacher", conditioning__train_text_encoder=True)
    refused("^process.objective.skip=2", process__objective__skip=2.0)
    refused("^process.objective.equal=3", meanflow_digits, process__objective__equal=3.0)
    refused(r"adapted\) predicts: give both", process__objective__teacher="")
    refused("^init_from is empty.*frozen", build=networks.begin, init_from="")
