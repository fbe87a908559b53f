"""THE loop: trains any task, and resumes it.

    python -m experiments.train --config=configs/X.py --workdir=DIR [--config.a.b=v]

The same command run again resumes. SIGTERM, SIGINT or SIGUSR1 saves and ends with status 75: run it
again; what else ends it, and with which status, says `host/guards.py`. Several processes run
it together: `host/cluster.py`.

A task has `init(key, ...)`, `train_step(state, batch, frozen, axis_name)` and
`eval_step(state, batch, frozen)`; nothing here knows which one it runs.
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from diffusion.checkpoint import Checkpoints
from diffusion.manifest import SOUND
from diffusion.writers import make_writer
from experiments.evaluate import in_loop, watched
from experiments.host import cli, cluster
from experiments.host.guards import INTERRUPTED, SkippedSteps, StopOnSignal, Watchdog
from experiments.run import data, training, workdir

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
    def check_and_build() -> training.Run:
        workdir.check(directory, config)
        in_loop.check(config)
        watched.judge(config)
        return training.build_run(config)

    run = cluster.together(check_and_build)
    parallel = run.parallel
    if cluster.is_first():
        print(
            f"{jax.process_count()} processes, {parallel.devices} devices "
            f"({jax.devices()[0].device_kind}), {parallel.mode}, mesh {dict(parallel.mesh.shape)}",
            flush=True,
        )
    key = jax.random.key(config.seed)
    abstract = parallel.abstract(run.init, key)
    left = parallel.check_split(abstract)
    if left and cluster.is_first():
        print(
            f"whole on each device (parallel.fsdp divides none of their sizes): {', '.join(left)}"
        )

    # ---------------------------------------------------------------- claim, restore or init
    def claim() -> None:
        if cluster.is_first():
            workdir.claim(directory, config, data.model_card(config))
            workdir.write_whole(directory / "devices.json", json.dumps(_devices(parallel)) + "\n")
            run.write_files(directory)

    cluster.together(claim)
    keep, limits = config.train, config.watchdog
    with (
        Checkpoints(
            directory / "checkpoints",
            keep_last=keep.keep_checkpoints,
            keep_every_steps=keep.keep_every_steps or None,
            keep_best=keep.keep_best or None,
        ) as checkpoints,
        Watchdog(limits.start_secs, limits.step_secs) as watchdog,
    ):
        return _loop(config, directory, run, key, abstract, checkpoints, stop, watchdog)


def _devices(parallel: Any) -> dict[str, Any]:
    """What the run trains on, for its report."""
    kind = jax.devices()[0].device_kind
    return {"processes": jax.process_count(), "devices": parallel.devices, "device": kind}


def _loop(
    config, directory, run, key, abstract, checkpoints, stop, watchdog
) -> dict[str, float] | None:
    parallel = run.parallel
    restored = checkpoints.restore(abstract)
    batches = run.train_batches()
    if restored is None:
        start, state = 0, parallel.init(run.init, key, run.start)
    else:
        start, state, data_state, _ = restored
        state = parallel.spread(state)
        batches.set_state(data_state)
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
    if start and cluster.is_first():
        done = start >= config.train.steps
        print(f"finished at step {start:,}" if done else f"goes on from step {start:,}", flush=True)
    glimpse = in_loop.Preview(run, directory)
    frozen = parallel.replicate(run.frozen)
    train_step = parallel.step(run.task.train_step)
    log = _Log(writer, config, parallel, start)
    peers = cluster.Peers(config.parallel.agree_every_steps)
    skipped = SkippedSteps(
        config.train.max_skipped_in_a_row,
        RUN_AHEAD_STEPS,
        lambda count: int(parallel.scalars({"": count})[""]),
        writer.message,
    )

    # ---------------------------------------------------------------- the loop
    try:
        if stop.requested and peers.count == 1:
            return None  # a checkpoint would say nothing new
        for step in range(start, config.train.steps):
            # 1. data  2. step  3. log (one step late)  4. evaluate  5. agree  6. save  7. stop
            waited = time.perf_counter()
            read = next(batches)
            batch = parallel.batch(read)
            log.waited_secs += time.perf_counter() - waited
            state, metrics = train_step(state, batch, frozen)
            skipped.step(step + 1, metrics["skipped_in_a_row"], read["index"])
            done, last = step + 1, step + 1 == config.train.steps
            log.step(done, metrics, last)
            watchdog.doing(f"step {done + 1} or its data")
            every, measured = config.evaluation.every_steps, {}
            if every and (done % every == 0 or last):
                watchdog.doing(f"the evaluation at step {done}")
                whole = parallel.whole(state)
                measured = run.evaluate(whole, parallel.whole(frozen))
                measured |= watched.measure(run, whole) | glimpse.numbers(whole)
                _check_best(config.train.keep_best, measured)
                log.evaluation(done, measured)
                glimpse.show(done, whole, writer)
            report = peers.exchange(done, stop.requested, log.waited_secs_per_step(done))
            stopping = report is not None and report.stop
            log.report(report)
            # The data state is that after this step's batch: what a resumed run reads next.
            if stopping or last or done % config.train.save_every_steps == 0:
                watchdog.doing(f"the save at step {done}")
                log.flush()  # a step that is saved is never logged again
                skipped.settle()
                known = {**measured, SOUND: skipped.in_a_row == 0}
                checkpoints.save(done, parallel.gather(state), batches.get_state(), known)
                watchdog.doing(f"step {done + 1} or its data")
            if stopping:
                checkpoints.wait()
                writer.message(f"saved at step {done:,}; the same command goes on from there")
                return None
        watchdog.doing("the last save")
        checkpoints.wait()
    finally:
        batches.close()
        writer.close()
    return log.latest


def _check_best(name: str, measured: dict[str, float]) -> None:
    if name and name not in measured:
        raise ValueError(
            f"train.keep_best={name!r} is none of what evaluations measure: use one of "
            f"{', '.join(sorted(measured))}"
        )


@dataclasses.dataclass
class _Log:
    """Hands metrics to the writer one step late, so that the device never waits for the host."""

    writer: Any
    config: ConfigDict
    parallel: Any
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
