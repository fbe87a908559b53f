"""A wrong input ends with one sentence naming key, value and remedy, status 2, nothing changed."""

import gc
import hashlib
import shutil
import sys

import pytest
import safetensors.numpy

from configs import digits_pixel
from experiments import encode_latents, prepare_data, sample, train
from experiments.evaluate import __main__ as evaluate
from experiments.host import cli
from experiments.plan import __main__ as plan
from experiments.run import build

COMMANDS = {
    "train": train,
    "sample": sample,
    "encode": encode_latents,
    "evaluate": evaluate,
    "plan": plan,
    "prepare": prepare_data,
}


def run(name, *argv) -> int:
    return cli.run(COMMANDS[name].define, COMMANDS[name].main, argv)


def refused(capsys, *words) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def contents(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


PIXEL = "--config=configs/digits_pixel.py:smoke"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--config.train.stepz=3",), ("stepz",)),
        (("--config.train.steps=many",), ("steps", "many")),
        (("--config.train.batch_size=0",), ("train.batch_size=0",)),
        (("--config.train.batch_size=9", "--config.train.accumulate=2"), ("9", "2")),
        (("--config.data.image_size=33",), ("33",)),
        (("--config.data.dir=/nowhere",), ("/nowhere", "prepare_data")),
        (("--config.parallel.fsdp=3",), ("parallel.fsdp=3",)),
        (("--config.parallel.mode=threads",), ("parallel.mode='threads'", "pmap")),
        (("--config.process.schedule.name=square",), ("square", "ddpm_linear")),
        (("--config.process.schedule.num_steps=0",), ("num_steps", "T >= 1")),
        (("--config.process.prediction=noise",), ("noise", "velocity")),
        (("--config.process.variance=learned",), ("out_channels=3", "'learned'", "6")),
        (("--config.process.times=lognormal",), ("lognormal", "uniform")),
        (("--config.process.schedule.name=flow",), ("num_steps",)),
        (("--config.sample.steps=1001",), ("1001", "1000")),
        (("--config.sample.sampler=magic",), ("magic", "ddim")),
        (("--config.data.fit=stretch",), ("data.fit='stretch'", "pad")),
        (("--config.optim.name=lion",), ("lion", "adamw")),
        (("--config.ema.decay=1.5",), ("ema.decay=1.5",)),
        (("--config.task=dance",), ("dance", "denoiser")),
        (("--config.train.keep_checkpoints=0",), ("train.keep_checkpoints=0", "1")),
        (("--config.train.keep_best=eval_loss",), ("keep_best", "evaluation.every_steps")),
        (
            ("--config.train.keep_best=eval_sharpness", "--config.evaluation.every_steps=1"),
            ("keep_best='eval_sharpness'", "eval_loss"),
        ),
        (("--unknown=1",), ("unknown",)),
        (("stray",), ("stray",)),
    ],
)
def test_training_refuses(argv, words, job, tmp_path, capsys):
    workdir = tmp_path / "run"
    data = [] if any("data.dir" in a for a in argv) else [f"--config.data.dir={job}/data"]
    assert run("train", PIXEL, f"--workdir={workdir}", *data, *argv) == 2
    refused(capsys, *words)
    assert not workdir.exists()


def test_a_best_that_is_not_measured_is_named_at_the_first_evaluation(job, tmp_path, capsys):
    argv = ("--config.train.keep_best=eval_los", "--config.evaluation.every_steps=1")
    argv += (f"--workdir={tmp_path}/run", f"--config.data.dir={job}/data")
    assert run("train", PIXEL, *argv) == 2
    refused(capsys, "keep_best='eval_los'", "eval_loss")


def test_a_missing_flag_is_named(capsys):
    assert run("train", PIXEL) == 2
    refused(capsys, "--workdir")
    assert run("plan") == 2
    refused(capsys, "--config")


def test_an_unknown_config_argument_is_refused(capsys):
    assert run("plan", "--config=configs/digits_pixel.py:f9") == 2
    refused(capsys, "f9", "smoke")


def test_a_workdir_of_another_run_is_refused_and_untouched(job, capsys):
    before = contents(job / "autoencoder")
    argv = (f"--workdir={job}/autoencoder", f"--config.data.dir={job}/data")
    config = "--config=configs/digits_autoencoder.py:smoke"
    assert run("train", config, *argv, "--config.optim.learning_rate=0.5") == 2
    refused(capsys, "optim.learning_rate", "0.5", "0.002")
    assert contents(job / "autoencoder") == before


def test_a_folder_of_something_else_is_refused(job, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("train", PIXEL, f"--workdir={tmp_path}", f"--config.data.dir={job}/data") == 2
    refused(capsys, "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_half_written_data_is_refused(job, tmp_path, capsys):
    shutil.copytree(job / "data", tmp_path / "data")
    (found,) = (tmp_path / "data").rglob("provenance.json")
    found.unlink()
    workdir = tmp_path / "run"
    assert run("train", PIXEL, f"--workdir={workdir}", f"--config.data.dir={tmp_path}/data") == 2
    refused(capsys, "half-written", "prepare_data")
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--num=0",), ("--num=0",)),
        (("--prompts_file=nothing.txt",), ("nothing.txt",)),
        (("--sampler=magic",), ("magic", "ddim")),
        (("--steps=0",), ("--steps=0, ",)),
        (("--guidance_rescale=2",), ("--guidance_rescale=2",)),
        (("--guidance_interval=9,1",), ("--guidance_interval=(9.0, 1.0)",)),
        (("--batch_size=0",), ("--batch_size=0",)),
        (("--seed=-1",), ("--seed=-1", "random")),
        (("--seed=x",), ("--seed=x", "random")),
        (("--seeds=1,-2",), ("--seeds=-2",)),
        (("--prompt=a", "--prompts_file=b"), ("--prompt", "--prompts_file")),
    ],
)
def test_sampling_refuses(argv, words, job, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("sample", f"--workdir={job}/ldm", f"--out={out}", *argv) == 2
    refused(capsys, *words)
    assert not out.exists()


def test_an_empty_prompt_list_is_refused(job, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n\n")
    out = tmp_path / "out"
    argv = (f"--prompts_file={tmp_path}/prompts.txt", f"--out={out}")
    assert run("sample", f"--workdir={job}/ldm", *argv) == 2
    refused(capsys, "prompts.txt", "no prompt")
    assert not out.exists()


def test_sampling_from_what_is_no_denoiser_is_refused(job, tmp_path, capsys):
    assert run("sample", f"--workdir={job}/autoencoder", f"--out={tmp_path}/out") == 2
    refused(capsys, "task='autoencoder'")
    assert run("sample", f"--workdir={tmp_path}/none", f"--out={tmp_path}/out") == 2
    refused(capsys, "no run")


def test_evaluation_refuses(job, capsys):
    assert run("evaluate", f"--workdir={job}/ldm", "--metrics=beauty") == 2
    refused(capsys, "beauty", "adherence")
    assert run("evaluate", f"--workdir={job}/ldm", "--metrics=adherence") == 2
    refused(capsys, "--classifier")


def test_latents_of_another_first_stage_are_refused(job, tmp_path, capsys):
    config = "--config=configs/digits_ldm.py:smoke"
    argv = (f"--config.data.dir={job}/latents", f"--workdir={tmp_path}/run")
    assert run("train", config, *argv, "--config.model.autoencoder.channels=48") == 2
    refused(capsys, "channels", "48", "96")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_first_stage_and_the_tokenizer_that_it_was_begun_with(
    job, tmp_path, capsys
):
    workdir = shutil.copytree(job / "ldm", tmp_path / "ldm")
    argv = ("--config=configs/digits_ldm.py:smoke", f"--workdir={workdir}")
    argv += (f"--config.data.dir={job}/latents", f"--config.latents.first_stage={job}/autoencoder")
    argv += (f"--config.latents.data_dir={job}/data",)
    assert run("train", *argv) == 0  # finished
    capsys.readouterr()
    path = workdir / "first_stage" / "weights.safetensors"
    tensors = safetensors.numpy.load_file(path)
    next(iter(tensors.values())).flat[0] += 1
    safetensors.numpy.save_file(tensors, path)
    before = contents(workdir)
    assert run("train", *argv) == 2
    refused(capsys, f"{workdir}/first_stage", "latents has other weights")
    shutil.copy(job / "ldm" / "first_stage" / path.name, path)
    tokenizer = workdir / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"black"', '"night"'))
    assert run("train", *argv) == 2
    refused(capsys, str(tokenizer), "another --workdir")
    assert contents(workdir).keys() == before.keys()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--config.process.schedule.num_steps=0",), "process.schedule.num_steps=0, "),
        (("--config.process.objective.norm=l3",), "process.objective.norm='l3' "),
        (("--config.process.objective.weighting=snr",), "process.objective.weighting='snr' "),
        (("--config.process.prediction=noise",), "process.prediction='noise' "),
        (("--config.process.times=often",), "process.times='often' "),
        (("--config.sample.steps=0",), "sample.steps=0, "),
    ],
)
def test_an_error_of_the_library_is_told_by_the_key_of_the_config(
    argv, words, job, tmp_path, capsys
):
    argv = (f"--workdir={tmp_path}/run", f"--config.data.dir={job}/data", *argv)
    assert run("train", PIXEL, *argv) == 2
    refused(capsys, f"error: {words}")


def test_an_option_of_a_sampler_is_told_by_its_key():
    config = digits_pixel.get_config("smoke")
    config.sample.options = {"eta": 2.0}
    config.sample.sampler = "ddim"
    with pytest.raises(ValueError, match=r"^sample\.options\.eta=2\.0, but it must lie in"):
        build.settings(config)


@pytest.mark.parametrize(("kind", "such"), [(int, "1,2,4"), (float, "1,2.5,4")])
def test_a_list_of_numbers_is_read_or_refused_with_an_example(kind, such, capsys):
    def define(add):
        add.add("list", "sizes", None, "Numbers.")

    found = []

    def main(values):
        found.append(cli.numbers(values, "sizes", kind))

    assert cli.run(define, main, []) == 0 and cli.run(define, main, ["--sizes=3,4"]) == 0
    assert found == [[], [3, 4]] and type(found[1][0]) is kind
    assert cli.run(define, main, ["--sizes=3,many"]) == 2
    refused(capsys, "--sizes=3,many", f"--sizes={such}")


def test_only_a_process_of_its_own_collects_seldom(monkeypatch):
    before, found = gc.get_threshold(), []
    monkeypatch.setattr(sys, "argv", ["command"])
    try:
        gc.set_threshold(700, 10, 10)
        for argv in ([], None):
            assert cli.run(lambda add: None, lambda _: found.append(gc.get_threshold()), argv) == 0
    finally:
        gc.set_threshold(*before)
    assert found == [(700, 10, 10), (50_000, 20, 20)]
