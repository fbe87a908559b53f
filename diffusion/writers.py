"""What a run reports: console, JSONL, TensorBoard and Weights & Biases behind one interface.

`make_writer` joins them; processes other than the first get the silent `Writer` itself. The file
`metrics.jsonl` is the record of a run: every line is whole, no step stands in it twice after a
resume, and numbers that are not finite are `null`, so that it is JSON to any reader. TensorFlow,
TensorBoard and wandb are imported only when they are used, and a run does without them.
"""

import contextlib
import functools
import json
import logging
import math
import netrc
import os
import pathlib
import re
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion import files
from diffusion.redact import flatten, redact
from diffusion.wording import Progress, number

log = logging.getLogger(__name__)


class Writer:
    """Where a run reports to. This one is silent: what processes above 0 get."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step, by name: `loss`, `examples_per_sec`, `eval/psnr`, ..."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Named uint8 arrays (batch, height, width, 1 or 3)."""

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The resolved config, nested; what looks like a secret is not written."""

    def message(self, text: str) -> None:
        """A line for the person watching."""

    def close(self) -> None:
        """Writes what is left. The writer is not used afterwards."""


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


def _finite(value: Any) -> int | float | None:
    value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Jsonl(Writer):
    """`metrics.jsonl`: one object a call of `scalars`, `step` first.

    A line is appended by one write, so a killed process leaves a torn line at most at the end; the
    next one removes it, and the lines of steps after `resume_step`, which it will log again.

    Raises OSError when the disk is full or read-only; the lines before stay whole.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _repair(self.path, resume_step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": int(step)} | {name: _finite(value) for name, value in values.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        with contextlib.suppress(OSError):
            if os.write(self._file, line) == len(line):
                return
            os.ftruncate(self._file, size)  # the disk filled up within the line
        raise OSError(f"{self.path}: no space for the metrics of step {step}; free some")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """What a run logged, a dict a line of its `metrics.jsonl`."""
    text = pathlib.Path(workdir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _repair(path: pathlib.Path, resume_step: int | None) -> None:
    """Drops torn and foreign lines and those of steps after `resume_step`; a rename, or nothing."""
    kept, torn, later = [], 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            step = None
        if not isinstance(step, int):
            torn += 1
        elif resume_step is not None and step > resume_step:
            later += 1
        else:
            kept.append(line)
    if not torn and not later:
        return
    log.warning("%s: dropped %d torn lines, %d after step %s", path, torn, later, resume_step)
    files.write(path, b"".join(kept))


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


class WandB(Writer):
    """Weights & Biases, in `mode` "online" or "offline", under `workdir/wandb`.

    A resumed run continues the run whose id stands in `workdir/wandb_id`. Steps are logged as an
    axis: wandb drops a step it has seen, which a resumed run repeats. If the server does not
    answer, the run goes on offline (`wandb sync` sends it later). ImportError without wandb.
    """

    def __init__(self, workdir: str | os.PathLike, mode: str, project: str):
        import wandb

        self._wandb: Any = wandb
        self._run = self._start(pathlib.Path(workdir), mode, project)
        self._run.define_metric("*", step_metric="step")

    def _start(self, workdir: pathlib.Path, mode: str, project: str) -> Any:
        settings = self._wandb.Settings(console="off", silent=True, init_timeout=60)
        arguments: dict[str, Any] = {"project": project, "dir": str(workdir), "resume": "allow"}
        arguments |= {"id": _run_id(workdir), "name": workdir.name, "settings": settings}
        try:
            return self._wandb.init(mode=mode, **arguments)
        except self._wandb.Error as error:
            if mode == "offline":
                raise
            log.warning("Weights & Biases cannot be reached, logging offline: %s", error)
            return self._wandb.init(mode="offline", **arguments)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step} | {n: np.asarray(v).item() for n, v in values.items()})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        shown = {k: [self._wandb.Image(np.squeeze(x)) for x in xs] for k, xs in images.items()}
        self._run.log({"step": step} | shown)

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(redact(values), allow_val_change=True)

    def close(self) -> None:
        self._run.finish()


def make_wandb(workdir: str | os.PathLike, mode: str, project: str) -> Writer:
    """`WandB` in the mode that `resolve_wandb_mode` finds, silent when that is "disabled".

    Without the package wandb: silent under "auto", said once; ValueError when asked for by name.
    """
    chosen = resolve_wandb_mode(mode)
    if chosen == "disabled":
        return Writer()
    try:
        return WandB(workdir, chosen, project)
    except ImportError as error:
        if mode != "auto":
            remedy = "`pip install wandb`, or set wandb.mode to 'disabled'"
            raise ValueError(f"wandb.mode={mode!r} needs the package wandb: {remedy}") from error
        log.warning("Weights & Biases is off: the package wandb is not installed")
        return Writer()


def resolve_wandb_mode(mode: str) -> str:
    """ "auto" is the variable WANDB_MODE, else online with a key or a login, else offline."""
    modes = ("auto", "online", "offline", "disabled")
    if mode not in modes:
        raise ValueError(f"wandb.mode is {mode!r}; choose one of {', '.join(modes)}")
    chosen = os.environ.get("WANDB_MODE", "") if mode == "auto" else mode
    if chosen in modes[1:]:
        return chosen
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(workdir: pathlib.Path) -> str:
    path = workdir / "wandb_id"
    if path.is_file() and re.fullmatch(r"\w+", name := path.read_text().strip()):
        return name
    files.write(path, name := uuid.uuid4().hex[:8])
    return name


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
    return writer
