"""Whether the tests can fail: the code is broken in a copy, and its tests are run.

    python tests/faults/mutations.py [OUT.json]                    each guard of the fault tests
    python tests/faults/mutations.py --random=200 --seed=0 --out=OUT.json [--jobs=2] [--minutes=60]
                                     [--suites=process,models]     drawn over the whole project

A mutation that is not noticed is printed as SURVIVED and makes the status 1. The second measures
first which tests touch which lines, a whole run of the suite under coverage (`drawn.py` says more;
`--suites` takes some folders of tests only, and the mutants of the rooms of their names). Run
again, it goes on where it stopped.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
# What is broken, the file, the line, what it becomes, and the test that must notice.
MUTATIONS = (
    (
        "no hash of a file is compared",
        "diffusion/files.py",
        'if found != entry["sha256"]:',
        "if False:",
        "faults/test_damage.py::test_every_file_of_a_run_damaged_is_found_out_and_fallen_back_from",
    ),
    (
        "leftovers of killed saves stay",
        "diffusion/manifest.py",
        "elif unfinished or TEMPORARY in path.name:",
        "elif False:",
        "test_checkpoint.py::test_leftovers_of_killed_saves_are_removed",
    ),
    (
        "the newest sound checkpoint may be deleted",
        "diffusion/manifest.py",
        "keep |= set([step for step, known in metadata.items() if known.get(SOUND, True)][:1])",
        "pass",
        "faults/test_damage.py::test_retention_keeps_what_was_just_written_and_the_newest_sound_one",
    ),
    (
        "the data begins anew on resume",
        "experiments/train.py",
        "batches.set_state(data_state)",
        "pass",
        "faults/test_signals.py::test_a_signal_saves_and_the_command_goes_on",
    ),
    (
        "a signal is heard but not obeyed",
        "experiments/host/guards.py",
        "self.requested, self._since = True, now",
        "self._since = now",
        "faults/test_signals.py::test_a_signal_saves_and_the_command_goes_on",
    ),
    (
        "a second signal changes nothing",
        "experiments/host/guards.py",
        "os.kill(os.getpid(), signum)",
        "pass",
        "faults/test_signals.py::test_a_second_signal_ends_at_once_and_the_last_checkpoint_stays",
    ),
    (
        "a loss that is not finite is applied",
        "diffusion/training/state.py",
        "ok = jnp.isfinite(norm) & jnp.isfinite(loss)",
        "ok = jnp.isfinite(norm) | True",
        "faults/test_bad_steps.py::test_a_bad_example_changes_no_bit",
    ),
    (
        "the average follows a skipped step",
        "diffusion/training/state.py",
        "lax.cond(ok, update, lambda old: old, old)",
        "lax.cond(ok, update, lambda old: (*old[:2], update(old)[2]), old)",
        "faults/test_bad_steps.py::test_a_bad_gradient_anywhere_changes_no_bit",
    ),
    (
        "skipped steps in a row do not end the run",
        "experiments/host/guards.py",
        "if self.in_a_row >= self._limit:",
        "if False:",
        "faults/test_bad_steps.py::test_too_many_in_a_row_end_the_run_and_name_the_examples",
    ),
    (
        "the watchdog prints no stacks",
        "experiments/host/guards.py",
        "faulthandler.dump_traceback(file=sys.stderr, all_threads=True)",
        "pass",
        "faults/test_hangs.py::test_a_hang_ends_within_the_limit_and_goes_on",
    ),
    (
        "the watchdog sleeps",
        "experiments/host/guards.py",
        "if limit and time.monotonic() - since > limit:",
        "if limit and time.monotonic() - since > limit + 40:",
        "faults/test_hangs.py::test_a_hang_ends_within_the_limit_and_goes_on",
    ),
    (
        "a torn line of metrics stays",
        "diffusion/writers.py",
        "if not torn and not later:",
        "if True:",
        "faults/test_disk.py::test_a_torn_line_is_mended_when_the_run_goes_on",
    ),
    (
        "a line that did not fit stays torn",
        "diffusion/writers.py",
        "os.ftruncate(self._file, size)  # the disk filled up within the line",
        "pass",
        "faults/test_disk.py::test_metrics_on_a_full_disk_keep_whole_lines",
    ),
    (
        "a folder that vanished is written anew",
        "diffusion/manifest.py",
        "if not directory.is_dir() or directory.stat().st_ino != inode:",
        "if False:",
        "faults/test_disk.py::test_a_workdir_that_vanishes",
    ),
    (
        "secrets go into config.json",
        "experiments/run/workdir.py",
        "json.dumps(redact(config.to_dict()),",
        "json.dumps(config.to_dict(),",
        "faults/test_secrets.py::test_no_file_of_a_run_holds_a_secret",
    ),
    (
        "an image's size has no bound",
        "diffusion/data/sources.py",
        "if image.width * image.height > MAX_PIXELS:",
        "if False:",
        "faults/test_hostile.py::test_an_image_of_absurd_size_is_refused_by_its_header",
    ),
)


def noticed(copy: pathlib.Path, file: str, old: str, new: str, test: str) -> bool:
    """Whether the test fails with the line changed; ValueError where it fails anyway."""
    path = copy / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times {old!r}: bring the mutation up to it")
    if fails(copy, test):
        raise ValueError(f"{test} fails with nothing broken")
    path.write_text(text.replace(old, new))
    try:
        return fails(copy, test)
    finally:
        path.write_text(text)


def fails(copy: pathlib.Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", f"tests/{test}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode not in (0, 1) or "error" in done.stdout.splitlines()[-1]:
        raise ValueError(f"{test} did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main(out: str | None = None) -> int:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "runs", "results")
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        (copy / ".cache").symlink_to(ROOT / ".cache")  # what was compiled before
        for name, *mutation in MUTATIONS:
            seen = noticed(copy, *mutation)
            print(f"{'noticed' if seen else 'SURVIVED'}: {name}", flush=True)
            found.append({"broken": name, "test": mutation[-1], "noticed": seen})
    if out:
        pathlib.Path(out).write_text(json.dumps(found, indent=2) + "\n")
    return int(not all(entry["noticed"] for entry in found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("guards", nargs="?", metavar="OUT.json")
    for name in ("random", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--suites", default="")
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if not given.random:
        sys.exit(main(given.guards))
    import drawn

    suites = [name for name in given.suites.split(",") if name]
    sys.exit(drawn.run(given.random, given.seed, given.jobs, suites, given.minutes, given.out))
