"""Mutants drawn at random over `diffusion/` and `experiments/`, each against the tests of its line.

`mutations.py --random=N` calls `run`. Which tests touch which lines is measured by coverage, a
folder of tests at a time, and kept with the seconds of each test in `.cache/mutations/`; so are the
verdicts, and a run that was interrupted goes on. A mutant meets the tests that passed unbroken and
touched its line, those of the file's namesake first and then the quickest, within SECS of them as
measured, and the first failure ends it. Verdicts:

    noticed          a test failed, or none could be collected
    timed out        two minutes of processor time went by: counts as noticed
    survived         all of them passed, or none touches the line
    changes nothing  survived, and named with its reason in HARMLESS: counted in neither
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import mutants

ROOT = pathlib.Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "mutations"
FOLDERS = ("diffusion", "experiments")
# What measures coverage, a folder or file of tests at a time.
SUITES = (
    *("process", "metrics", "models", "training", "interop", "data", "launch"),
    *("test_checkpoint.py", "test_writers.py", "test_plan_mesh.py", "test_configs.py"),
    *("faults", "experiments"),
)
SECS, AT_MOST = 20, 40
CPU_SECS, WALL_SECS = 120, 1200  # processor time, so that other work beside it changes no verdict
# (file, line's text, kind): why it changes nothing that anybody could see. At most ten.
HARMLESS: dict[tuple[str, str, str], str] = {}


# -- which tests touch which lines ----------------------------------------------------------------


class Recorder:
    """A pytest plugin: coverage by test, and each test's seconds and outcome."""

    def __init__(self, data_file: str):
        import coverage

        self.coverage = coverage.Coverage(data_file, source=list(FOLDERS), config_file=False)
        self.secs: dict[str, float] = {}
        self.failed: set[str] = set()
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid):
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report):
        self.secs[report.nodeid] = self.secs.get(report.nodeid, 0) + report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def result(self) -> dict:
        self.coverage.stop()
        self.coverage.save()
        data = self.coverage.get_data()
        tests = sorted(set(self.secs) - self.failed)
        number = {test: i for i, test in enumerate(tests)}
        lines = {}
        for path in data.measured_files():
            name = str(pathlib.Path(path).relative_to(pathlib.Path.cwd()))
            found = data.contexts_by_lineno(path)
            lines[name] = {
                line: sorted(number[c] for c in contexts if c in number)
                for line, contexts in found.items()
            }
        return {"tests": [[test, round(self.secs[test], 2)] for test in tests], "lines": lines}


def measure(suite: str, out: str) -> None:
    """In a process of its own: the tests of one folder, and what they touch, written to `out`."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(f"{folder}/coverage")
        argv = ["-q", "-m", "not slow", "-p", "no:cacheprovider", f"tests/{suite}"]
        pytest.main(argv, plugins=[recorder])
        found = recorder.result()
    files = {name: digest(ROOT / name) for name in found["lines"]}
    pathlib.Path(out).write_text(json.dumps({"files": files, **found}))


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Map:
    """The measurements of several suites together; those of a file that changed since are void."""

    def __init__(self, suites):
        self.secs: dict[str, float] = {}
        self.touching: dict[tuple[str, int], set[str]] = {}
        for suite in suites:
            path = CACHE / f"{suite.replace('/', '_')}.json"
            if not path.is_file():
                print(f"coverage of tests/{suite} is measured", flush=True)
                part = path.with_suffix(".part")
                code = f"import drawn; drawn.measure({suite!r}, {str(part)!r})"
                search = os.pathsep.join((str(ROOT / "tests/faults"), str(ROOT)))
                subprocess.run(
                    [sys.executable, "-c", code],
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": search},
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                part.rename(path)
            self.add(json.loads(path.read_text()))

    def add(self, found: dict) -> None:
        names = [name for name, _ in found["tests"]]
        self.secs.update(dict(found["tests"]))
        for file, lines in found["lines"].items():
            if digest(ROOT / file) == found["files"][file]:
                for line, tests in lines.items():
                    here = self.touching.setdefault((file, int(line)), set())
                    here.update(names[i] for i in tests)

    def tests(self, file: str, mutant: mutants.Mutant) -> list[str]:
        """At most AT_MOST of about SECS together: the namesake's first, then the quickest."""
        touching = self.touching.get((file, mutant.line), set())
        namesake = f"test_{pathlib.Path(file).stem}"
        order = sorted(touching, key=lambda t: (namesake not in t, self.secs[t], t))
        chosen, total = [], 0.0
        for test in order[:AT_MOST]:
            total += self.secs[test]
            if chosen and total > SECS:
                break
            chosen.append(test)
        return sorted(chosen, key=lambda t: self.secs[t])


# -- one mutant -----------------------------------------------------------------------------------


def verdict(copy: pathlib.Path, file: str, mutant: mutants.Mutant, tests: list[str]) -> str:
    """What the tests say of the mutant in a copy of the tree."""
    if not tests:
        return "survived"
    path = copy / file
    text = path.read_text()
    path.write_text(mutant.apply(text))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            timeout=WALL_SECS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECS, CPU_SECS)),
        )
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        path.write_text(text)
    if done.returncode < 0:
        return "timed out" if -done.returncode in (signal.SIGXCPU, signal.SIGKILL) else "noticed"
    return "noticed" if done.returncode else "survived"


def draw(count: int, seed: int) -> list[tuple[str, mutants.Mutant]]:
    """`count` of all mutants of all files, the library's first."""
    every = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            every += [(name, mutant) for mutant in mutants.find(path.read_text())]
    drawn = random.Random(seed).sample(every, count)
    return sorted(drawn, key=lambda entry: not entry[0].startswith("diffusion/"))


def run(count: int, seed: int, jobs: int, suites: list[str], minutes: float, out: str) -> int:
    """All of them, or those of `minutes`; writes `out` and prints a table."""
    CACHE.mkdir(parents=True, exist_ok=True)
    known, drawn, began = Map(suites or SUITES), draw(count, seed), time.monotonic()
    done_path = CACHE / f"verdicts-{count}-{seed}.jsonl"
    lines = done_path.read_text().splitlines() if done_path.is_file() else []
    done = {entry["id"]: entry for entry in map(json.loads, lines)}
    copies = [copied() for _ in range(jobs)]

    def one(job: int) -> None:
        for file, mutant in drawn[job::jobs]:
            if minutes and time.monotonic() - began > 60 * minutes:
                return
            line = (ROOT / file).read_text().splitlines()[mutant.line - 1].strip()
            identity = f"{file}|{line}|{mutant.kind}|{mutant.start}|{mutant.new}"
            if identity in done:
                continue
            if suites and pathlib.Path(file).parts[1] not in suites:
                continue  # its own tests are not among those that were measured
            tests = known.tests(file, mutant)
            entry = {
                "id": identity,
                "file": file,
                "line": line,
                "kind": mutant.kind,
                "old": mutant.old[:80],
                "new": mutant.new[:80],
                "tests": len(tests),
                "verdict": verdict(copies[job], file, mutant, tests),
            }
            if entry["verdict"] == "survived" and (file, line, mutant.kind) in HARMLESS:
                entry["verdict"] = "changes nothing"
            done[identity] = entry
            with done_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print(f"{len(done)} of {count}: {entry['verdict']}: {identity}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(jobs)))
    for copy in copies:
        shutil.rmtree(copy)
    return report(list(done.values()), count, seed, out)


def copied() -> pathlib.Path:
    copy = pathlib.Path(tempfile.mkdtemp()) / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "runs", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    (copy / ".cache").symlink_to(ROOT / ".cache")  # what was compiled before
    return copy


def report(entries: list[dict], count: int, seed: int, out: str) -> int:
    verdicts = ("noticed", "timed out", "survived", "changes nothing")
    total = {v: sum(e["verdict"] == v for e in entries) for v in verdicts}
    rooms: dict[str, dict[str, int]] = {}
    for entry in entries:
        room = rooms.setdefault("/".join(entry["file"].split("/")[:2]), dict.fromkeys(verdicts, 0))
        room[entry["verdict"]] += 1
    print(f"\n{'':32}" + "".join(f"{v:>18}" for v in verdicts))
    for room, counts in [*sorted(rooms.items()), ("all", total)]:
        print(f"{room:32}" + "".join(f"{counts[v]:18}" for v in verdicts))
    survivors = [e for e in entries if e["verdict"] == "survived"]
    for entry in survivors:
        print(f"survived: {entry['file']}: {entry['line']}  [{entry['old']} -> {entry['new']}]")
    if out:
        found = {
            "command": f"python tests/faults/mutations.py --random={count} --seed={seed}",
            "seed": seed,
            "drawn": count,
            "done": len(entries),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            **{key.replace(" ", "_"): value for key, value in total.items()},
            "by_room": rooms,
            "survivors": [{k: v for k, v in e.items() if k != "id"} for e in survivors],
        }
        pathlib.Path(out).write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(survivors))
