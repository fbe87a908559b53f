"""`trials`: runs of the training command in processes that are quick to start and to break."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = "tests/faults"

WAYS = {
    # name: tiny.py's kind, flags, devices a process, processes
    "denoiser": ("denoiser", (), 1, 1),
    "denoiser, fsdp": ("denoiser", ("--config.parallel.fsdp=2",), 4, 1),
    "denoiser, two processes": ("denoiser", (), 1, 2),
    "denoiser, three processes": ("denoiser", ("--config.train.batch_size=9",), 1, 3),
    "first stage": ("first_stage", (), 1, 1),
    "first stage, two devices, accumulated": (
        "first_stage",
        ("--config.train.accumulate=2",),
        2,
        1,
    ),
}


class Trials:
    """A process of `driver.py`; `run` hands it a job and waits for the statuses."""

    def __init__(self, folder: pathlib.Path):
        environment = os.environ | {
            # Apart: an entry is not written at once, and these processes are killed at any time.
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-faults"),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",  # of a fork in a process that has imported jax
        }
        self.folder, self.here = folder, str(ROOT / HERE)
        self._unbroken: dict[str, dict] = {}
        self.process = subprocess.Popen(
            [sys.executable, f"{HERE}/driver.py"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_way(self, workdir, way, *more, digest=None, **job) -> list[int]:
        """The statuses of the processes of one of `WAYS` that train in `workdir`, together."""
        kind, flags, devices, processes = WAYS[way]
        argv = [f"--config={HERE}/tiny.py:{kind}", f"--workdir={workdir}", *flags, *more]
        if processes > 1:
            argv.append("--config.parallel.agree_every_steps=1")
        job |= {"argv": argv, "workdir": str(workdir), "log": str(self.log_of(workdir))}
        job |= {"devices": devices, "processes": processes, "digest": digest and str(digest)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.secs, self.secs_apart = answer["secs"], answer["secs_apart"]
        return answer["statuses"]

    def log_of(self, workdir) -> pathlib.Path:
        return workdir.with_name(f"{workdir.name}.log")

    def log(self, workdir) -> str:
        return self.log_of(workdir).read_text()[-5000:]

    def digest(self, workdir, way, *more, **job) -> dict:
        """What a run that is left alone ends with; the run must end with status 0."""
        path = workdir.with_name(f"{workdir.name}.digest")
        statuses = self.run_way(workdir, way, *more, digest=path, **job)
        assert set(statuses) == {0}, self.log(workdir)
        return json.loads(path.read_text())

    def unbroken(self, way) -> dict:
        """What a run of that way ends with that nothing happened to; run once."""
        if way not in self._unbroken:
            workdir = self.folder / f"unbroken-{len(self._unbroken)}"
            self._unbroken[way] = self.digest(workdir, way)
        return self._unbroken[way]

    def report(self, counts: dict) -> None:
        """For the results: a line of JSON in the file that RELIABILITY names."""
        if path := os.environ.get("RELIABILITY"):
            with open(path, "a") as file:
                file.write(json.dumps(counts) + "\n")

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def trials(tmp_path_factory):
    made = Trials(tmp_path_factory.mktemp("trials"))
    yield made
    made.close()
