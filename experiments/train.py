"""THE loop: trains any task, and resumes it.

    python -m experiments.train --config=configs/X.py --workdir=DIR [--config.a.b=v]

The same command run again resumes. SIGTERM, SIGINT or SIGUSR1 saves and ends with status 75: run it
again; what else ends it, and with which status, says `host/guards.py`. Several processes run
it together: `host/cluster.py`.

A task has `init(key, ...)`, `train_step(state, batch, frozen, axis_name)` and
`eval_step(state, batch, frozen)`; nothing here knows which one it runs.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from diffusion import files
from diffusion.checkpoint import Checkpoints
from diffusion.data.loader import Loader
from diffusion.manifest import SOUND
from diffusion.metrics.directions import higher_is_better
from diffusion.training.parallel import Parallel
from diffusion.writers import Writer, make_writer
from experiments.evaluate import in_loop
from experiments.host import cli, cluster
from experiments.host.guards import INTERRUPTED, SkippedSteps, StopOnSignal, Watchdog
from experiments.host.profile import Profile
from experiments.run import assemble, data, workdir

# Steps handed to the device before the host waits: enough to keep it busy, and so few that a signal
# is answered, or a hang seen, within a few steps.
RUN_AHEAD_STEPS = 2


def train(config: ConfigDict, directory: str | pathlib.Path) -> dict[str, float] | None:
    """Runs or resumes `config` in `directory`.

    Returns the last logged metrics, or None when a signal stopped it. Whatever is wrong with the
    input raises ValueError before anything in the directory is changed.
    """
    with StopOnSignal() as stop:
        return _train(config, pathlib.Path(directory), stop)


def _train(config, directory: pathlib.Path, stop: StopOnSignal) -> dict[str, float] | None:
    # ---------------------------------------------------------------- check, build, place
    def check_and_build() -> assemble.Run:
        workdir.check(directory, config)
        in_loop.check(config)
        return assemble.build_run(config, directory)

    run = cluster.together(check_and_build)
    key = jax.random.key(config.seed)
    abstract = run.parallel.abstract(run.init, key)
    _say_where(run.parallel, abstract)

    # ---------------------------------------------------------------- claim, restore or init
    def claim() -> None:
        if cluster.is_first():
            workdir.claim(directory, config, data.model_card(config))
            files.write_json(directory / "devices.json", _devices(run.parallel))
            run.write_files(directory)

    cluster.together(claim)
    keep, limits = config.train, config.watchdog
    with contextlib.ExitStack() as held:
        checkpoints = held.enter_context(
            Checkpoints(
                directory / "checkpoints",
                keep_last=keep.keep_checkpoints,
                keep_every_steps=keep.keep_every_steps or None,
                keep_best=keep.keep_best or None,
                highest=higher_is_better(keep.keep_best),
            )
        )
        watchdog = held.enter_context(Watchdog(limits.start_secs, limits.step_secs))
        batches = held.enter_context(contextlib.closing(run.train_batches()))
        start, state = _begin(run, checkpoints, batches, key, abstract)
        writer = make_writer(
            directory,
            wandb_mode=config.wandb.mode,
            wandb_project=config.wandb.project,
            total_steps=config.train.steps,
            config_dict=config.to_dict(),
            resume_step=start,
            is_main=cluster.is_first(),
            tensorboard=config.train.tensorboard,
        )
        held.enter_context(contextlib.closing(writer))
        profile = held.enter_context(Profile(config.train.profile_steps, directory / "profile"))
        if start and cluster.is_first():
            finished = start >= config.train.steps
            print(f"{'finished at' if finished else 'goes on from'} step {start:,}", flush=True)
        loop = Loop(run, directory, start, state, batches, checkpoints, writer, watchdog, profile)
        return loop.steps(stop)


def _begin(
    run: assemble.Run, checkpoints: Checkpoints, batches: Loader, key: jax.Array, abstract: Any
) -> tuple[int, Any]:
    """The steps that are done and the state after them; `batches` goes on from there."""
    restored = checkpoints.restore(abstract)
    if restored is None:
        return 0, run.parallel.init(run.init, key, run.start)
    step, state, data_state, _ = restored
    batches.set_state(data_state)
    return step, run.parallel.spread(state)


def _say_where(parallel: Parallel, abstract: Any) -> None:
    """The devices, and what of the state they cannot share."""
    left = parallel.check_split(abstract)
    if not cluster.is_first():
        return
    print(
        f"compiling for {jax.process_count()} processes, {parallel.devices} devices "
        f"({jax.devices()[0].device_kind}), {parallel.mode}, mesh {dict(parallel.mesh.shape)}",
        flush=True,
    )
    if left:
        named = ", ".join(left)
        print(f"whole on each device (parallel.fsdp divides none of their sizes): {named}")


def _devices(parallel: Parallel) -> dict[str, Any]:
    """What the run trains on, for its report."""
    kind = jax.devices()[0].device_kind
    return {"processes": jax.process_count(), "devices": parallel.devices, "device": kind}


@dataclasses.dataclass
class Loop:
    """A run in progress, as this process has it: `start` steps of it are done."""

    run: assemble.Run
    directory: pathlib.Path
    start: int
    state: Any  # in the form that the step takes: `Parallel.spread`
    batches: Loader
    checkpoints: Checkpoints
    writer: Writer
    watchdog: Watchdog
    profile: Profile

    def __post_init__(self):
        run, keys = self.run, self.run.config.train
        self.frozen = run.parallel.replicate(run.frozen)
        self.evaluators = in_loop.evaluators(run, self.directory, self.frozen)
        self.train_step = run.parallel.step(run.task.train_step)
        self.log = _Log(self.writer, run.config, run.parallel, self.start)
        self.peers = cluster.Peers(run.config.parallel.agree_every_steps)
        self.skipped = SkippedSteps(
            keys.max_skipped_in_a_row,
            RUN_AHEAD_STEPS,
            lambda count: int(run.parallel.scalars({"": count})[""]),
            self.writer.message,
        )

    def steps(self, stop: StopOnSignal) -> dict[str, float] | None:
        """Those that are left. Returns the last metrics, None when a signal ended it before."""
        keys = self.run.config.train
        if stop.requested and self.peers.count == 1:
            return None  # a checkpoint would say nothing new
        for done in range(self.start + 1, keys.steps + 1):
            # 1. data  2. step  3. log (one step late)  4. evaluate  5. agree  6. save  7. stop
            last = done == keys.steps
            self.advance(done, last)
            measured = self.evaluate(done, last)
            stopping = self.agree(done, stop)
            if stopping or last or done % keys.save_every_steps == 0:
                self.save(done, measured)
            if stopping:
                self.checkpoints.wait()
                self.writer.message(f"saved at step {done:,}; the same command goes on from there")
                return None
        self.watchdog.doing("the last save")
        self.checkpoints.wait()
        return self.log.latest

    def advance(self, done: int, last: bool) -> None:
        """1. data  2. step  3. log."""
        with self.profile.step(done, lambda: self.state):
            waited = time.perf_counter()
            read = next(self.batches)
            batch = self.run.parallel.batch(read)
            self.log.waited_secs += time.perf_counter() - waited
            self.state, metrics = self.train_step(self.state, batch, self.frozen)
        self.skipped.step(done, metrics["skipped_in_a_row"], read["index"])
        self.log.step(done, metrics, last)
        self.watchdog.doing(f"step {done + 1} or its data")

    def evaluate(self, done: int, last: bool) -> dict[str, float]:
        """4. What is measured of the state, where it is time."""
        every = self.run.config.evaluation.every_steps
        if not every or not (done % every == 0 or last):
            return {}
        self.watchdog.doing(f"the evaluation at step {done}")
        whole = self.run.parallel.whole(self.state)
        measured = in_loop.measure(self.evaluators, done, whole)
        _check_best(self.run.config.train.keep_best, measured)
        self.log.evaluation(done, measured)
        in_loop.show(self.evaluators, done, whole, self.writer, self.directory / "previews")
        return measured

    def agree(self, done: int, stop: StopOnSignal) -> bool:
        """5. Whether the processes stop here."""
        own_secs = self.log.waited_secs_per_step(done)
        report = self.peers.exchange(done, stop.requested, own_secs)
        self.log.report(report)
        return report is not None and report.stop

    def save(self, done: int, measured: dict[str, float]) -> None:
        """6. The state, and what a resumed run reads next: the data after this step's batch."""
        self.watchdog.doing(f"the save at step {done}")
        self.log.flush()  # a step that is saved is never logged again
        self.skipped.settle()
        known = {**measured, SOUND: self.skipped.in_a_row == 0}
        state = self.run.parallel.gather(self.state)
        self.checkpoints.save(done, state, self.batches.get_state(), known)
        self.watchdog.doing(f"step {done + 1} or its data")


def _check_best(name: str, measured: dict[str, float]) -> None:
    if name and name not in measured:
        raise ValueError(
            f"train.keep_best={name!r} is none of what evaluations measure: use one of "
            f"{', '.join(sorted(measured))}"
        )


@dataclasses.dataclass
class _Log:
    """Hands metrics to the writer one step late, so that the device never waits for the host."""

    writer: Writer
    config: ConfigDict
    parallel: Parallel
    logged_step: int
    waited_secs: float = 0.0
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    pending: tuple[int, dict] | None = None
    since: float = dataclasses.field(default_factory=time.perf_counter)
    processes: dict[str, float] = dataclasses.field(default_factory=dict)

    def waited_secs_per_step(self, done: int) -> float:
        """This process's wait for data, a step, since the last log."""
        return self.waited_secs / max(done - self.logged_step, 1)

    def report(self, report: cluster.Report | None) -> None:
        """What the processes say of themselves; it goes out with the next line."""
        if report is not None:
            self.processes = report.numbers()

    def step(self, done: int, metrics: dict, last: bool) -> None:
        self.flush()
        if done % self.config.train.log_every_steps == 0 or last:
            self.pending = (done, metrics)
        if last:
            self.flush()

    def flush(self) -> None:
        if self.pending is None:
            return
        done, metrics = self.pending
        values = self.parallel.scalars(metrics)  # waits for that step
        now = time.perf_counter()
        steps = done - self.logged_step
        values["examples_per_sec"] = steps * self.config.train.batch_size / (now - self.since)
        values["data_wait_secs"] = self.waited_secs / steps
        values |= self.processes
        self.since, self.logged_step, self.waited_secs, self.pending = now, done, 0.0, None
        self.latest.update(values)
        self.writer.scalars(done, values)

    def evaluation(self, done: int, metrics: dict[str, float]) -> None:
        self.latest.update(metrics)
        self.writer.scalars(done, metrics)


def define(add: cli.Flags) -> None:
    add.config()
    cluster.define(add)
    add.add("string", "workdir", None, "The run's folder.")


@cluster.joined
def main(values: flags.FlagValues) -> int:
    finished = train(cli.require(values, "config"), cli.require(values, "workdir"))
    return INTERRUPTED if finished is None else 0


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
