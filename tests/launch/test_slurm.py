"""A real Slurm of two nodes on this machine, started and stopped here.

Needs Debian's packages slurm-wlm and munge, and root: `apt-get install slurm-wlm munge`.
"""

import getpass
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion.data import prepare
from launch import sweep, trials

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
MISSING = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.slow,  # minutes of real daemons and compilation
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here ({', '.join(MISSING)}); {__doc__}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=node1,node2 Default=YES State=UP MaxTime=INFINITE
"""


def free_ports(count):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def wait_until(check, secs, what):
    deadline = time.time() + secs
    while not (found := check()):
        assert time.time() < deadline, what() if callable(what) else what
        time.sleep(0.3)
    return found


def say(*argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, **options).stdout.strip()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Two nodes; the environment finds them."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "state").mkdir()
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    ports = free_ports(4)
    conf = root / "slurm.conf"
    names = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    conf.write_text(CONF.format(root=root, ports=ports, **names))
    at = {f"--{k}": root / f"munge.{v}" for k, v in {"key-file": "key", "socket": "socket"}.items()}
    at |= {f"--{k}-file": root / f"munge.{k}" for k in ("log", "pid", "seed")}
    daemons = [["munged", "--foreground", "--force", *(f"{k}={v}" for k, v in at.items())]]
    daemons += [["slurmctld", "-D", "-f", str(conf)]]
    daemons += [["slurmd", "-D", "-f", str(conf), "-N", f"node{i}"] for i in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        # The nodes' names mean nothing to this machine's resolver.
        patch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{ports[3]}")
        started = []
        with (root / "daemons.log").open("w") as log:
            for daemon in daemons:
                started.append(subprocess.Popen(daemon, stdout=log, stderr=log))
                time.sleep(0.5)
        try:
            idle = lambda: say("sinfo", "-h", "-o", "%T %D") == "idle 2"  # noqa: E731
            wait_until(idle, 60, lambda: (root / "daemons.log").read_text())
            yield root
        finally:
            say("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
            deadline = time.time() + 60
            while say("squeue", "-h") and time.time() < deadline:  # else its steps outlive it
                time.sleep(0.5)
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


# A training of 60 steps that saves where a signal finds it, as experiments.train does, without JAX.
STAND_IN = """
import os, pathlib, signal, sys, time
options = dict(word.split("=", 1) for word in sys.argv[1:])
if options.get("--config.optim.name") == "lion": sys.exit(2)
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, lambda *_: stop.append(1))
workdir, rank = pathlib.Path(options["--workdir"]), os.environ["SLURM_PROCID"]
workdir.mkdir(parents=True, exist_ok=True)
saved = workdir / f"saved-{rank}"
start = int(saved.read_text()) if saved.exists() else 0
print(f"task {rank} of {os.environ['SLURM_STEP_NUM_TASKS']} starts at {start}", flush=True)
for step in range(start, int(options.get("--config.train.steps", 60))):
    with (workdir / f"steps-{rank}").open("a") as file: file.write(f"{step}\\n")
    time.sleep(0.25)
    if stop:
        saved.write_text(str(step + 1))
        sys.exit(75)
"""


@pytest.fixture
def copy(tmp_path):
    """The launchers in a folder whose training is the stand-in."""
    folder = tmp_path / "repository"
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "experiments").mkdir()
    (folder / "experiments" / "train.py").write_text(STAND_IN)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    with (folder / "launch" / "environment.sh").open("a") as file:
        file.write("make_environment() { :; }\n")
    return folder


def steps(workdir, rank):
    path = workdir / f"steps-{rank}"
    return list(map(int, path.read_text().split())) if path.exists() else []


def start(copy, workdir, count, *options):
    argv = [copy / "launch" / "slurm.sh", "--nodes=2", "--requeue", *options, "--", "--config=c"]
    argv += [f"--workdir={workdir}", f"--config.train.steps={count}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def finish(number, workdir, count):
    """Waits until the job runs again, if it must, and is over."""

    def over():
        if job(number, "JobState") == "PENDING":  # after a requeue Slurm would wait two minutes
            say("scontrol", "update", f"JobId={number}", "StartTime=now")
        return job(number, "JobState") == "COMPLETED"

    wait_until(over, 240, lambda: output(workdir))
    assert int(job(number, "Restarts")) >= 1
    for rank in (0, 1):
        assert steps(workdir, rank) == list(range(count))  # none twice, none left out


def test_a_job_that_is_requeued_goes_on(slurm, copy, tmp_path):
    number = start(copy, workdir := tmp_path / "run", 60)
    wait_until(lambda: len(steps(workdir, 1)) > 5, 120, lambda: output(workdir))
    say("scontrol", "requeue", number)
    finish(number, workdir, 60)
    assert job(number, "Restarts") == "1"


def test_before_the_time_limit_a_job_saves_and_requeues_itself(slurm, copy, tmp_path):
    """Slurm looks every half a minute, and signals early what ends before it looks again."""
    number = start(copy, workdir := tmp_path / "run", 160, "--time=2", "--signal_secs=100")
    finish(number, workdir, 160)
    assert "status 75: back into the queue" in output(workdir)


STAND_IN_SWEEP = """
from configs import digits_classifier
get_config = digits_classifier.get_config
def sweep(add):
    add(add.product(add.values("train.steps", 1), add.values("seed", 0, 1, 2)))
    add({"optim.name": "lion"})
"""


def test_an_array_of_trials_marks_each(slurm, copy, tmp_path):
    (copy / "configs" / "swept.py").write_text(STAND_IN_SWEEP)
    argv = [sys.executable, "-m", "launch.sweep", "--config=configs/swept.py"]
    argv += [f"--dir={tmp_path}/sweep", "--launcher=slurm", "--max_parallel=2"]

    def launch(*more):
        done = subprocess.run([*argv, *more], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "4 trials, 2 at a time" in launch("--", "--nodes=1")
    assert "nothing to submit" in launch("--", "--nodes=1")  # all of them are in the queue
    wait_until(lambda: not say("squeue", "-h"), 240, lambda: launch("--status"))
    table = launch("--status")
    assert table.count("finished") == 3 and table.count("failed, status 2") == 1
    assert "1 trials" in launch("--", "--nodes=1")  # only what is not finished
    wait_until(lambda: not say("squeue", "-h"), 240, lambda: launch("--status"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare.prepare("captioned_digits", root)
    return root


def environment():
    """This environment's interpreter is the one that the scripts take."""
    return ROOT / ".venv" / "bin" / "python"


def submit(data, workdir, *options):
    argv = ["./launch/slurm.sh", "--nodes=2", "--requeue", *options, "--"]
    argv += ["--config=configs/digits_pixel.py:smoke", f"--workdir={workdir}"]
    argv += [f"--config.data.dir={data}", "--config.model.denoiser.multipliers=(1,)"]
    argv += ["--config.model.denoiser.attention=(False,)", "--config.train.steps=300"]
    argv += ["--config.train.save_every_steps=1000"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def job(number, field):
    words = say("scontrol", "show", "job", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word).get(field, "")


def losses(workdir):
    path = workdir / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["step"]: row["loss"] for row in rows}


def output(workdir):
    return "".join(p.read_text() for p in workdir.parent.glob(f"{workdir.name}.slurm-*.log"))


@pytest.mark.skipif(not environment().exists(), reason="launch/test.sh makes .venv")
def test_a_requeued_job_resumes_and_equals_one_that_ran_through(slurm, data, tmp_path):
    unbroken, requeued = tmp_path / "unbroken", tmp_path / "requeued"
    number = submit(data, unbroken)
    wait_until(lambda: job(number, "JobState") == "COMPLETED", 900, lambda: output(unbroken))

    number = submit(data, requeued)
    wait_until(lambda: len(losses(requeued)) > 100, 900, lambda: output(requeued))
    say("scontrol", "requeue", number)
    wait_until(lambda: job(number, "JobState") == "PENDING", 200, lambda: output(requeued))
    (stopped,) = [int(p.name) for p in (requeued / "checkpoints").iterdir()]
    assert 100 < stopped < 300
    say("scontrol", "update", f"JobId={number}", "StartTime=now")  # Slurm would wait two minutes
    wait_until(lambda: job(number, "JobState") == "COMPLETED", 900, lambda: output(requeued))

    assert job(number, "Restarts") == "1"
    assert output(requeued).count("2 processes, 2 devices") == 2
    assert losses(requeued) == losses(unbroken)  # to the bit, each step once
    assert len(losses(unbroken)) == 300 and np.isfinite(list(losses(unbroken).values())).all()


SWEPT = """
from configs import digits_classifier
def get_config(arg=None):
    config = digits_classifier.get_config("smoke")
    config.model.classifier.widths = (4, 4, 4)
    config.train.steps = 2
    config.evaluation.every_steps = 0
    config.data.dir = "{data}"
    return config
def sweep(add):
    add(add.chain(add.values("seed", 0, 1, 2), add.values("optim.name", "lion")))
"""


@pytest.mark.skipif(not environment().exists(), reason="launch/test.sh makes .venv")
def test_a_sweep_is_an_array_and_one_failure_stops_nobody(slurm, data, tmp_path, capfd):
    config, folder = tmp_path / "swept.py", tmp_path / "sweep"
    config.write_text(SWEPT.format(data=data))
    argv = [f"--config={config}", f"--dir={folder}", "--launcher=slurm", "--max_parallel=2"]
    argv += ["--", "--nodes=1"]
    assert sweep.main(argv) == 0
    assert "4 trials" in capfd.readouterr().out
    assert sweep.main(argv) == 0  # all of them are in the queue
    assert "nothing to submit" in capfd.readouterr().out
    expanded = sweep.expand(str(config), folder, [])
    done = lambda: not say("squeue", "-h")  # noqa: E731
    wait_until(done, 900, lambda: trials.table(expanded))
    words = [expanded.word(trial) for trial in expanded.trials]
    assert words == ["finished"] * 3 + ["failed, status 2"], words
    assert "lion" in (folder / "logs" / "name=lion.log").read_text()
    assert sweep.main(argv) == 0
    assert "1 trials" in capfd.readouterr().out  # only what is unfinished
    wait_until(done, 600, lambda: trials.table(expanded))
