"""Checkpoints: Orbax, a manifest of hashes, and falling back to the newest one that is whole.

A checkpoint of step `s` is the folder `DIR/<s>`, made in this order:

1. Orbax writes the arrays to a temporary folder beside it, in the background, each device its own
   shards, and renames that folder to `DIR/<s>`: the commit.
2. Process 0 hashes every file of it and writes `manifest.json` there, last, by a rename too
   (`diffusion/manifest.py`), with the step, where the data stood and the caller's metadata.

So a step without a manifest is unfinished, whenever the process was killed, and one whose files do
not hash to it is damaged, of which Orbax notices nothing: it is renamed `<s>.corrupt`, not deleted.

The state may be any pytree of arrays. It is stored as nested dicts of the names on each leaf's path
and restored into a target's structure, so the types (Flax dataclasses, Optax named tuples, empty
states) are the caller's own and the arrays may be laid out over other devices than they were saved
from. Nothing is converted: what comes back is what was saved, to the bit.

With several processes every one calls `save`, `wait`, `restore` and `close`, at the same steps, on
a directory that all of them see; process 0 judges, cleans and writes the manifest.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from jax.tree_util import keystr
from orbax.checkpoint import v1 as ocp

from diffusion import files, manifest
from diffusion.manifest import finished, read_manifest

Leaves = dict[tuple[str, ...], Any]
TODAY = {"unet": "denoiser"}  # a network by what checkpoints made before called it
_NONE = -1  # "no step", where processes exchange step numbers
log = logging.getLogger(__name__)


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax reports every file at level INFO on absl's one logger, and with a traceback what it
    raises as well; only its warnings are news."""
    news = record.levelno >= logging.WARNING and not record.exc_info
    return news or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_is_news)


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: the state in the target's types, and what went with it."""

    step: int
    state: Any
    data_state: Any
    metadata: Any


class Items(NamedTuple):
    """Part of a checkpoint as NumPy: `items[name]` is a nested dict; `hash` names it."""

    step: int
    items: dict[str, Any]
    metadata: Any
    hash: str


def _flatten(tree: Any) -> Leaves:
    """Leaves by the names on their path: `("opt_state", "denoiser", "0", "mu", "kernel")`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {tuple(keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two leaves of the state have one name (dict keys 1 and '1'): rename one")
    return flat


def _saved_leaves(folder: pathlib.Path) -> Leaves:
    """Shape and dtype of every stored leaf, from Orbax's metadata; no arrays are read."""
    return _flatten(ocp.metadata(str(folder)).metadata)


def _today(path: tuple[str, ...]) -> tuple[str, ...]:
    """A saved leaf's path by today's names of the networks."""
    return path[:1] + tuple(TODAY.get(name, name) for name in path[1:2]) + path[2:]


def _described(leaves: Leaves) -> dict[str, str]:
    return {".".join(p): f"{np.dtype(x.dtype)}{tuple(x.shape)}" for p, x in leaves.items()}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError("with several processes every leaf of the target needs a sharding")
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore_params(
    directory: str | os.PathLike, items: Sequence[str] = ("params", "ema"), step: int | None = None
) -> Items:
    """Reads only the top-level `items` of a saved state, as NumPy, without a target; read-only.

    Takes `step`, or the newest checkpoint that verifies. An item that had no leaves when it was
    saved (an `ema` of no networks) is an empty dict. Raises ValueError when there is no checkpoint.
    """
    root = pathlib.Path(directory).absolute()
    chosen = manifest.newest_good(root, step, set_aside=False)
    if chosen is None:
        raise ValueError(f"{root} holds no finished checkpoint: train first")
    folder = root / str(chosen)
    made, saved = read_manifest(folder), _saved_leaves(folder)
    wanted = {p: np.empty(x.shape, x.dtype) for p, x in saved.items() if p[0] in items}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = _flatten(ocp.load(str(folder), unflatten_dict(wanted))) if wanted else {}
    tree = unflatten_dict({_today(path): leaf for path, leaf in found.items()})
    taken = {name: tree.get(name, {}) for name in items}
    return Items(chosen, taken, made["metadata"], made["sha256"][:16])


def _from_first(value: int) -> int:
    """Process 0's value, on every process; a barrier as well."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, in `directory`; a context manager.

    Keeps the newest `keep_last`, every step that `keep_every_steps` divides, with
    `keep_best="name"` the one whose `metadata["name"]` is lowest (with `highest`, highest), and the
    newest whose `metadata["sound"]` is not False. Opening it removes what killed saves left, so
    only the run that writes a directory opens it: to read, use `restore_params`.

    Raises ValueError for impossible retention, OSError when the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep_last: int = 3,
        keep_every_steps: int | None = None,
        async_save: bool = True,
        keep_best: str | None = None,
        highest: bool = False,
    ):
        for name, value in {"keep_last": keep_last, "keep_every_steps": keep_every_steps}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        self.directory = pathlib.Path(directory).absolute()
        self._retention = (keep_last, keep_every_steps, keep_best, highest)
        self._async = async_save
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._first = jax.process_index() == 0
        if self._first:
            self._inode = manifest.clean(self.directory)
        _from_first(0)

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
            return
        self._join()  # no collectives: the other processes may be gone
        if self._error is not None:
            log.error("the last checkpoint was not written either: %s", self._error)

    def latest_step(self) -> int | None:
        """The newest finished step, or None."""
        return manifest.latest_step(self.directory)

    def save(self, step: int, state: Any, data_state: Any, metadata: Any) -> bool:
        """Saves `state` (a pytree of arrays), with `data_state` and `metadata` (JSON-able).

        Returns once the arrays are copied off the devices, so they may be donated; the rest runs in
        the background, and an error in it is raised by the next `save`, `wait` or `close`. An
        earlier save is waited for. `data_state` is process 0's: it must not depend on the process.
        False, with nothing written, if this step is already saved.

        Raises OSError (full or read-only disk, the earlier checkpoints untouched), ValueError
        (not JSON).
        """
        self.wait()
        step, folder = int(step), self.directory / str(step)
        body = {"step": step, "data_state": data_state, "metadata": metadata}
        try:  # now, not later in the thread: the caller's objects go on changing
            body = json.loads(json.dumps(body, default=_plain))
        except TypeError as error:
            raise ValueError(f"checkpoint {folder}: data_state and metadata: {error}") from error
        if _from_first(step in finished(self.directory)):
            log.info("step %d is already saved", step)
            return False
        context = ocp.Context()  # made in the background, a folder that fails is waited for 300 s
        context.asynchronous.create_directories_asynchronously = False
        try:
            if self._first:
                manifest.check_there(self.directory, self._inode)
            with context:
                tree = unflatten_dict(_flatten(state))
                response = ocp.save_async(str(folder), tree, overwrite=True)
        except Exception as error:
            raise self._failed(folder, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(folder, response, body), name="checkpoint", daemon=True
        )
        self._thread.start()
        return self._async or self.wait() is None

    def _finish(self, folder: pathlib.Path, response: Any, body: dict[str, Any]) -> None:
        try:
            response.result()
            if self._first:
                manifest.check_there(self.directory, self._inode)
                manifest.write_manifest(folder, body)
                manifest.prune(self.directory, *self._retention, written=body["step"])
        except Exception as error:
            self._error = self._failed(folder, error)
            self._error.__cause__ = error

    def _failed(self, folder: pathlib.Path, error: Exception) -> OSError:
        if self._first and not (folder / manifest.MANIFEST).is_file():
            for path in self.directory.glob(f"{folder.name}*"):
                if path == folder or path.name.startswith(folder.name + manifest.TEMPORARY):
                    shutil.rmtree(path, ignore_errors=True)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return OSError(
            f"checkpoint {folder} could not be written: {reason}. The last finished one is step "
            f"{self.latest_step()}; free space or mend the directory, then run the command again."
        )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Returns when the last save is whole on disk; raises OSError if it failed anywhere."""
        self._join()
        error, self._error = self._error, None
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.int32(error is not None))
            if error is None and failed.any():
                error = OSError(f"checkpoint not written: failed on process {np.argmax(failed)}")
        if error is not None:
            raise error

    close = wait

    def restore(self, target: Any, step: int | None = None) -> Restored | None:
        """The newest checkpoint that verifies, or `step`, as a `target`-like state; None: none.

        `target` is the state's pytree with `jax.ShapeDtypeStruct` leaves (or arrays) that carry the
        shardings wanted, over any devices. Damaged checkpoints are logged by file, renamed to
        `<step>.corrupt`, and the next older one is tried.

        Raises ValueError: target unlike the saved state; `step` given and absent or damaged.
        """
        self.wait()
        chosen, error = None, None
        if self._first:
            try:
                chosen = manifest.newest_good(self.directory, step, set_aside=True)
            except ValueError as problem:
                error = problem
        agreed = _from_first(_NONE - 1 if error else _NONE if chosen is None else chosen)
        if agreed < _NONE:
            raise error or ValueError(f"{self.directory}: step {step} is absent or damaged")
        if agreed == _NONE:
            return None
        folder = self.directory / str(agreed)
        made, saved, wanted = read_manifest(folder), _saved_leaves(folder), _flatten(target)
        stored = {_today(path): path for path in saved}
        known = _described({_today(path): leaf for path, leaf in saved.items()})
        remedy = "use the config it was saved with, or another workdir"
        files.check_same(known, _described(wanted), f"checkpoint {folder}", remedy)
        named = unflatten_dict({stored[path]: _abstract(leaf) for path, leaf in wanted.items()})
        tree = _flatten(ocp.load(str(folder), named))
        leaves = [tree[stored[path]] for path in wanted]
        state = jax.tree.unflatten(jax.tree.structure(target), leaves)
        return Restored(agreed, state, made["data_state"], made["metadata"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        return np.asarray(value).item()
    raise TypeError(f"{value!r:.80} ({type(value).__name__}) is not JSON; convert it first")
