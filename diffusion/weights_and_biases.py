"""Weights & Biases as one of a run's writers. The package is imported only when it is used."""

import json
import logging
import netrc
import os
import pathlib
import re
import struct
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from diffusion import files
from diffusion.jsonl import Writer, read
from diffusion.redact import redact

log = logging.getLogger(__name__)

BLOCK = 2**15  # bytes of a .wandb file


class WandB(Writer):
    """Weights & Biases, in `mode` "online" or "offline", under `workdir/wandb`.

    A resumed run continues the run whose id stands in `workdir/wandb_id`, repeats no step that is
    stored, and is handed again what a kill lost of metrics.jsonl: wandb's own process keeps some
    seconds in memory, and dies with the run. (Pictures of those seconds stay in `previews/`.) Steps
    are an axis, not wandb's counter. Tags, group and job type are those of WANDB_TAGS,
    WANDB_RUN_GROUP and WANDB_JOB_TYPE. If the server does not answer within START_SECS, the run
    goes on offline (`wandb sync` sends it later). What wandb raises afterwards is said once and
    stops nothing; what is not sent END_SECS after the end stays on disk. ImportError without wandb.
    """

    START_SECS, END_SECS = 60, 120

    def __init__(self, workdir: str | os.PathLike, mode: str, project: str):
        import wandb

        self._wandb: Any = wandb
        self._failed = False
        self._stored: dict[int, set[str]] = {}
        self._run = self._start(pathlib.Path(workdir), mode, project)
        self._run.define_metric("*", step_metric="step")

    def _start(self, workdir: pathlib.Path, mode: str, project: str) -> Any:
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            init_timeout=self.START_SECS,
            finish_timeout=self.END_SECS,
            finish_timeout_raises=False,
        )
        arguments: dict[str, Any] = {"project": project, "dir": str(workdir), "resume": "allow"}
        arguments |= {"id": _run_id(workdir), "name": workdir.name, "settings": settings}
        try:
            return self._wandb.init(mode=mode, **arguments)
        except self._wandb.Error as error:
            if mode == "offline":
                raise
            log.warning("Weights & Biases cannot be reached, logging offline: %s", error)
            self._wandb.teardown()  # its process holds the run's id until then
            return self._wandb.init(mode="offline", **arguments)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._log(step, {name: np.asarray(value).item() for name, value in values.items()})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        shown = {k: [self._wandb.Image(np.squeeze(x)) for x in xs] for k, xs in images.items()}
        self._log(step, shown)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        known = self._stored.get(step, ())
        if new := {name: value for name, value in values.items() if name not in known}:
            self._tell(lambda: self._run.log({"step": step} | new))

    def catch_up(self, workdir: str | os.PathLike) -> None:
        """Hands over what metrics.jsonl holds and an earlier start of this run did not store."""
        try:
            for path in pathlib.Path(workdir, "wandb").glob(f"*run-*-{self._run.id}/*.wandb"):
                for step, names in stored_steps(path):
                    self._stored.setdefault(step, set()).update(names)
        except Exception as error:  # of another version's files
            log.warning("Weights & Biases: what is stored is unknown (%s); steps may repeat", error)
        for row in read(workdir):
            self.scalars(row.pop("step"), row)

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._tell(lambda: self._run.config.update(redact(values), allow_val_change=True))

    def close(self) -> None:
        self._tell(self._run.finish)

    def _tell(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # of a client that a run must survive
            if not self._failed:
                log.warning("Weights & Biases failed (%s); metrics.jsonl has everything", error)
            self._failed = True


def stored_steps(path: pathlib.Path) -> Iterator[tuple[int, set[str]]]:
    """(step, names) of each row of history in a .wandb file.

    That is a log in LevelDB's format: a header of 7 bytes, then blocks of 2^15 bytes that hold
    pieces of messages, each with checksum (4), length (2), kind (1: whole; 2, 3, 4: first to last).
    """
    from wandb.proto import wandb_internal_pb2

    message: Any = wandb_internal_pb2
    data, at, pieces = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 0 < (left := -at % BLOCK) < 7:  # the end of a block, too short for a piece
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        pieces.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if at > len(data) or kind not in (1, 4):
            continue
        items = message.Record.FromString(b"".join(pieces)).history.item
        row = {item.key or item.nested_key[0]: item.value_json for item in items}
        pieces = []
        if "step" in row:
            yield int(json.loads(row["step"])), {*row}


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
