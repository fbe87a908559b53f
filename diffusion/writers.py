"""What a run reports: console, JSONL, TensorBoard and Weights & Biases behind one interface.

`make_writer` joins them; processes other than the first get the silent `Writer` itself. TensorFlow,
TensorBoard and wandb are imported only when they are used, and a run does without them.
"""

import contextlib
import functools
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.jsonl import Jsonl, Writer
from diffusion.jsonl import read as read
from diffusion.redact import flatten, redact
from diffusion.weights_and_biases import WandB, make_wandb, resolve_wandb_mode
from diffusion.wording import Progress, number

log = logging.getLogger(__name__)


class Console(Writer):
    """Progress and messages: one line in place on a terminal, a line a logged step elsewhere."""

    def __init__(self, total_steps: int, stream: Any = None):
        self._progress = Progress("step", total_steps, every_secs=0, stream=stream)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if "loss" not in values:
            shown = ", ".join(f"{name} {number(value)}" for name, value in values.items())
            return self.message(f"step {step:,}: {shown}")
        said = [f"loss {number(values['loss'])}"]
        if "examples_per_sec" in values:
            said.append(f"{number(values['examples_per_sec'])} examples/s")
        self._progress.at(step, *said)

    def message(self, text: str) -> None:
        self._progress.message(text)

    def close(self) -> None:
        self._progress.close()


class TensorBoard(Writer):
    """TensorBoard event files through `clu.metric_writers`. ImportError without TensorFlow."""

    def __init__(self, directory: str | os.PathLike):
        for name, value in {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
            os.environ.setdefault(name, value)  # its start-up notices, and nothing computed in it
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")  # it would take their memory from JAX
        self._writer = metric_writers.SummaryWriter(str(directory))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._writer.write_scalars(step, {name: float(v) for name, v in values.items()})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._writer.write_images(step, images)

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._writer.write_hparams(flatten(redact(values)))

    def close(self) -> None:
        self._writer.close()


def make_tensorboard(directory: str | os.PathLike) -> Writer:
    """`TensorBoard`, or where what it needs is not installed a silent writer, said once."""
    try:
        return TensorBoard(directory)
    except ImportError as error:
        log.warning("TensorBoard is off: %s. Install tensorflow-cpu, tensorboard, clu", error.msg)
        return Writer()


class Multi(Writer):
    """Hands everything to each of `writers`, in order."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)
        for name in ("scalars", "images", "hparams", "message"):
            setattr(self, name, functools.partial(self._each, name))

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in self.writers:
            getattr(writer, method)(*arguments)

    def close(self) -> None:
        """Closes all of them, whatever one of them raises."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self.writers):
                stack.callback(writer.close)


def make_writer(
    workdir: str | os.PathLike,
    wandb_mode: str,
    wandb_project: str,
    total_steps: int,
    config_dict: Mapping[str, Any],
    resume_step: int | None = None,
    is_main: bool = True,
    tensorboard: bool = True,
) -> Writer:
    """Every writer of a run: `workdir/metrics.jsonl`, console, `workdir/tensorboard`, wandb.

    `resume_step`: the step a run starts from (0: afresh). Without `tensorboard` it starts seconds
    sooner. Raises ValueError for an unknown `wandb_mode` before anything is touched.
    """
    resolve_wandb_mode(wandb_mode)
    if not is_main:
        return Writer()
    workdir = pathlib.Path(workdir)
    remote = make_wandb(workdir, wandb_mode, wandb_project)
    local = (Jsonl(workdir / "metrics.jsonl", resume_step), Console(total_steps))
    board = make_tensorboard(workdir / "tensorboard") if tensorboard else Writer()
    (writer := Multi((*local, board, remote))).hparams(config_dict)
    if isinstance(remote, WandB) and resume_step:
        remote.catch_up(workdir)
    return writer
