"""THE loop: trains any task, and resumes it.

    python -m experiments.train --config=configs/X.py --workdir=DIR [--config.a.b=v]

The same command run again resumes. SIGTERM or SIGINT saves and ends with status 75: run it again.
A task has `init(key, ...)`, `train_step(state, batch, frozen, axis_name)` and
`eval_step(state, batch, frozen)`; nothing here knows which one it runs.
"""

import dataclasses
import pathlib
import signal
import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from diffusion.checkpoint import Checkpoints
from diffusion.writers import make_writer
from experiments import cli, preview, runs, workdir

INTERRUPTED = 75  # exit status: saved after a signal; the same command goes on


def train(config: ConfigDict, directory: str | pathlib.Path) -> dict[str, float] | None:
    """Runs or resumes `config` in `directory`.

    Returns the last logged metrics, or None when a signal stopped it. Whatever is wrong with the
    input raises ValueError before anything in the directory is changed.
    """
    directory = pathlib.Path(directory)

    # ---------------------------------------------------------------- check, build, place
    workdir.check(directory, config)
    run = runs.build_run(config)
    parallel = run.parallel
    print(
        f"{jax.process_count()} processes, {parallel.devices} devices "
        f"({jax.devices()[0].device_kind}), {parallel.mode}, mesh {dict(parallel.mesh.shape)}",
        flush=True,
    )
    key = jax.random.key(config.seed)
    abstract = parallel.abstract(run.init, key)

    # ---------------------------------------------------------------- claim, restore or init
    if jax.process_index() == 0:
        workdir.claim(directory, config)
        run.write_files(directory)
    keep = config.train.keep_checkpoints
    with Checkpoints(directory / "checkpoints", keep_last=keep) as checkpoints:
        return _loop(config, directory, run, key, abstract, checkpoints)


def _loop(config, directory, run, key, abstract, checkpoints) -> dict[str, float] | None:
    parallel = run.parallel
    restored = checkpoints.restore(abstract)
    batches = run.train_batches()
    if restored is None:
        start, state = 0, parallel.init(run.init, key)
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
        is_main=jax.process_index() == 0,
        tensorboard=config.train.tensorboard,
    )
    frozen = parallel.replicate(run.frozen)
    train_step = parallel.step(run.task.train_step)

    # ---------------------------------------------------------------- the loop
    log = _Log(writer, config, parallel, start)
    stop = _StopOnSignal()
    try:
        for step in range(start, config.train.steps):
            # 1. data   2. step   3. log (one step late)   4. evaluate   5. save   6. stop
            waited = time.perf_counter()
            batch = parallel.batch(next(batches))
            log.waited_secs += time.perf_counter() - waited
            state, metrics = train_step(state, batch, frozen)
            done, last = step + 1, step + 1 == config.train.steps
            log.step(done, metrics, last)
            every = config.evaluation.every_steps
            if every and (done % every == 0 or last):
                whole = parallel.whole(state)
                log.evaluation(done, run.evaluate(whole, parallel.whole(frozen)))
                if config.evaluation.preview:
                    writer.images(done, preview.pictures(run, whole, directory))
            # The data state is that after this step's batch: what a resumed run reads next.
            if stop.requested or last or done % config.train.save_every_steps == 0:
                log.flush()  # a step that is saved is never logged again
                checkpoints.save(done, parallel.gather(state), batches.get_state(), {})
            if stop.requested:
                checkpoints.wait()
                return None
    finally:
        stop.restore()
        batches.close()
        writer.close()
    return log.latest


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
        self.since, self.logged_step, self.waited_secs, self.pending = now, done, 0.0, None
        self.latest.update(values)
        self.writer.scalars(done, values)
        limit = self.config.train.max_skipped_in_a_row
        if values.get("skipped_in_a_row", 0) >= limit:
            raise ValueError(
                f"{int(values['skipped_in_a_row'])} steps in a row up to step {done} had a loss or "
                f"gradient that is not finite (train.max_skipped_in_a_row={limit}); parameters are "
                "as before them: lower optim.learning_rate or look at the data"
            )

    def evaluation(self, done: int, metrics: dict[str, float]) -> None:
        self.latest.update(metrics)
        self.writer.scalars(done, metrics)


class _StopOnSignal:
    """SIGTERM and SIGINT ask the loop to save and end; a second one ends at once."""

    def __init__(self):
        self.requested = False
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, signum, frame):
        del signum, frame
        self.requested = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def define(add: cli.Flags) -> None:
    add.config()
    add.add("string", "workdir", None, "The run's folder.")


def main(values: flags.FlagValues) -> int:
    finished = train(cli.require(values, "config"), cli.require(values, "workdir"))
    return INTERRUPTED if finished is None else 0


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
