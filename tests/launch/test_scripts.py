"""What the launchers would do, and what they refuse: one sentence, status 2, nothing started."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = ("--config=configs/digits_pixel.py:smoke", "--workdir=runs/a b", "--config.data.dir=$HOME")


def run(script, *argv, **environment):
    return subprocess.run(
        [f"launch/{script}", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )


def dry(script, *argv):
    done = run(script, *argv, "--dry_run", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_local_starts_what_it_says():
    done = run("local.sh", "--processes=2", "--dry_run", *TRAIN)
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    for line in (first, second):
        assert line[1:6] == ["-m", "experiments.train", *TRAIN]
        assert "--num_processes=2" in line
    assert (first[-1], second[-1]) == ("--process_id=0", "--process_id=1")
    (alone,) = run("local.sh", "--command=sample", "--dry_run", *TRAIN).stdout.splitlines()
    assert shlex.split(alone)[2:] == ["experiments.sample", *TRAIN]


def test_the_slurm_job():
    options = ("--nodes=4", "--gpus_per_node=8", "--time=1-00:00:00", "--partition=h100")
    text = dry("slurm.sh", *options, "--requeue", "--account=me", "--sbatch=--mem=0")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    directives = " ".join(x[8:] for x in text.splitlines() if x.startswith("#SBATCH "))
    found = set(shlex.split(directives))
    wanted = {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=1-00:00:00"}
    wanted |= {"--partition=h100", "--requeue", "--account=me", "--mem=0", "--signal=USR1@120"}
    assert wanted <= found
    (line,) = [x for x in text.splitlines() if x.startswith("set -- ")]
    assert shlex.split(line)[5:] == list(TRAIN)
    assert "scontrol requeue" in text and "srun" in text
    a_gpu = dry("slurm.sh", "--nodes=2", "--gpus_per_node=4", "--task_per=gpu")
    assert "--ntasks-per-node=4" in a_gpu
    assert "--no-requeue" in a_gpu and "scontrol" not in a_gpu


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, 0), (2, 0), (75, 1), (76, 1), (77, 1), (134, 1), (138, 1), (137, 0)],
)
def test_the_slurm_job_goes_back_into_the_queue_when_it_may_go_on(status, requeued, tmp_path):
    text = dry("slurm.sh", "--nodes=2", "--requeue")
    for name, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" >>{tmp_path}/said')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=text, text=True, env=environment)
    assert done.returncode == status
    said = (tmp_path / "said").read_text() if requeued else ""
    assert said == ("requeue 7\n" if requeued else "")


def test_the_slurm_array_reads_its_lines(tmp_path):
    (tmp_path / "commands").write_text("echo no\necho 'a  b' '$HOME'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift 2; exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    options = (f"--array={tmp_path}/commands", "--indices=1", "--max_parallel=3", "--nodes=1")
    text = run("slurm.sh", *options, "--dry_run").stdout
    assert "--array=1%3" in text
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["SLURM_ARRAY_TASK_ID"] = "1"
    done = subprocess.run(["bash"], input=text, text=True, env=environment, capture_output=True)
    assert done.stdout == "a  b $HOME\n"


def test_the_tpu_commands_survive_two_shells():
    archive, copy, install, train = dry("tpu.sh", "--name=pod", "--zone=z1").splitlines()
    assert "git ls-files" in archive and "--worker=all" in copy and "jax[tpu]" in install
    words = shlex.split(train)  # this shell
    (remote,) = [word for word in words if word.startswith("--command=")]
    again = shlex.split(remote.removeprefix("--command="))  # the workers'
    assert again[-4:] == [*TRAIN, "--coordinator=auto"]


GPU = ("--kind=gpu", "--gpus_per_node=8")
TPU = ("--kind=tpu", "--chips_per_node=4", "--accelerator=tpu-v5p-slice", "--topology=2x2x4")
K8S = ("--nodes=4", "--image=registry/me:1", "--claim=runs")


@pytest.mark.parametrize(("kind", "resource"), [(GPU, "nvidia.com/gpu"), (TPU, "google.com/tpu")])
def test_the_manifests_fit_their_schema(kind, resource):
    manifest = yaml.safe_load(dry("k8s.sh", *kind, *K8S))
    # The models keep what they know: whatever is misspelt or of the wrong type is lost or raises.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    (worker,) = manifest["spec"]["replicatedJobs"]
    job = worker["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    (container,) = job["template"]["spec"]["containers"]
    assert str(container["resources"]["limits"][resource]) == kind[1].split("=")[1]
    arguments = container["args"]
    assert arguments[:3] == list(TRAIN)
    if kind is GPU:
        assert "--coordinator=diffusion-worker-0-0.diffusion:8476" in arguments
        assert arguments[-1] == "--process_id=$(PROCESS_ID)"
        assert container["env"][0]["name"] == "PROCESS_ID"
    else:
        assert arguments[3:] == ["--coordinator=auto"]


def test_the_schema_sees_a_misspelt_field():
    manifest = yaml.safe_load(dry("k8s.sh", *GPU, *K8S))
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest


def test_kubernetes_sees_no_variables_of_ours():
    done = run("k8s.sh", *GPU, *K8S, "--dry_run", "--", '--config.data.dir=$(PWD)"\\')
    container = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments = container["template"]["spec"]["containers"][0]["args"]
    assert arguments[0] == '--config.data.dir=$$(PWD)"\\'


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("local.sh", "--processes=0"), ("--processes=0",)),
        (("local.sh", "--command=dance"), ("--command=dance",)),
        (("slurm.sh", "--", *TRAIN), ("--nodes",)),
        (("slurm.sh", "--nodes=two", "--", *TRAIN), ("--nodes=two",)),
        (("slurm.sh", "--nodes=1", "--gpus=2", "--", *TRAIN), ("--gpus=2",)),
        (("slurm.sh", "--nodes=1", "--task_per=gpu", "--", *TRAIN), ("--gpus_per_node",)),
        (("slurm.sh", "--nodes=1", "--", TRAIN[0]), ("--workdir",)),
        (("slurm.sh", "--nodes=1", "--array=nothing", "--indices=0"), ("--array=nothing",)),
        (("tpu.sh", "--name=a", "--", *TRAIN), ("--zone",)),
        (("k8s.sh", *K8S, "--", *TRAIN), ("--kind=",)),
        (("k8s.sh", *GPU, "--nodes=2", "--image=i", "--", *TRAIN), ("--claim",)),
        (("k8s.sh", *TPU[:2], *K8S, "--", *TRAIN), ("--accelerator",)),
        (("k8s.sh", *GPU, *K8S, "--name=A_b", "--", *TRAIN), ("--name=A_b",)),
    ],
)
def test_the_scripts_refuse(argv, words):
    done = run(*argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize(
    ("script", "argv", "tool"),
    [
        ("slurm.sh", ("--nodes=1",), "sbatch"),
        ("tpu.sh", ("--name=a", "--zone=b"), "gcloud"),
        ("k8s.sh", (*GPU, *K8S), "kubectl"),
    ],
)
def test_a_tool_that_is_not_on_the_path_is_named(script, argv, tool, tmp_path):
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(script, *argv, "--", *TRAIN, PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tool} is not on the PATH")


FAKE = """
import sys, time, signal
index = sys.argv[-1][-1]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open("{root}/started-" + index, "w").close()
if index == "1" and "{mode}" == "fail": sys.exit(7)
time.sleep(60)
"""


@pytest.fixture
def copy(tmp_path):
    """The scripts in a folder whose interpreter runs a stand-in for the training."""

    def make(mode):
        shutil.copytree(ROOT / "launch", tmp_path / "launch")
        (tmp_path / "experiments").mkdir()
        (tmp_path / "experiments" / "train.py").write_text(FAKE.format(root=tmp_path, mode=mode))
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
        with (tmp_path / "launch" / "environment.sh").open("a") as file:
            file.write("make_environment() { :; }\n")
        return tmp_path

    return make


def alive(folder) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [x for x in lines.splitlines() if f"--workdir={folder}" in x and "bash" not in x]


def test_local_ends_all_when_one_fails_and_passes_its_status_on(copy):
    folder = copy("fail")
    argv = [folder / "launch" / "local.sh", "--processes=3", f"--workdir={folder}"]
    began = time.monotonic()
    assert subprocess.run(argv, timeout=50).returncode == 7
    assert time.monotonic() - began < 30
    assert alive(folder) == []


def test_local_passes_signals_on(copy):
    folder = copy("wait")
    argv = [folder / "launch" / "local.sh", "--processes=2", f"--workdir={folder}"]
    process = subprocess.Popen(argv)
    deadline = time.time() + 30
    while len(list(folder.glob("started-*"))) < 2:
        assert time.time() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 75
    assert alive(folder) == []


def test_quickstart_finds_folders_from_where_it_was_called(tmp_path):
    """A clone whose environment is there already, and whose Python says what it is given."""
    clone, here = tmp_path / "clone", tmp_path / "a b"
    shutil.copytree(ROOT / "launch", clone / "launch")
    shutil.copy(ROOT / "requirements.txt", clone)
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (clone / ".venv" / ".python").write_text(f"{sys.version_info[0]}.{sys.version_info[1]}\n")
    here.mkdir()
    argv = [clone / "launch" / "quickstart.sh", "--images=my pictures", "--workdir=/abs"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(argv, cwd=here, env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2:] == [f"--images={here}/my pictures", "--workdir=/abs"]
    assert "experiments.quickstart" in lines
