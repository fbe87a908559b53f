"""Several processes as one run: how they find each other, agree, and end together.

A command joins the others where Slurm, Open MPI or a TPU pod started several, or where it is told:

    --coordinator=HOST:PORT --num_processes=N --process_id=I

Process 0 is the coordinator: the others come to its address and are counted before JAX's own
service starts, so that whoever is missing in time is named in a sentence; JAX would abort. What
ends one process ends all: the runtime of the others finds it gone, and within --heartbeat_secs and
a few seconds they end by SIGABRT (status 134), or with status 77 where a collective failed first.
The same command started again resumes. With one process nothing here does anything.
"""

import functools
import os
import re
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.host import cli

LOST_PEER = 77  # exit status: another process is gone or failed; the same command goes on
T = TypeVar("T")


class Place(NamedTuple):
    """This process among `count`; `devices` are the local ones it may use (None: all it sees)."""

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


# -- joining -------------------------------------------------------------------------------------


def define(add: cli.Flags) -> None:
    add.add("string", "coordinator", None, "HOST:PORT of process 0, of a run of several processes.")
    add.add("integer", "num_processes", None, "How many there are; with --coordinator.")
    add.add("integer", "process_id", None, "Which this one is, from 0; with --coordinator.")
    add.add("integer", "connect_secs", 300, "How long processes wait for each other at the start.")
    add.add("integer", "heartbeat_secs", 30, "A process that is silent for longer is lost.")


def from_flags(values: flags.FlagValues) -> Place | None:
    """The place that the command line names; None where it names none."""
    names = ("coordinator", "num_processes", "process_id")
    given = [name for name in names if values[name].value is not None]
    if not given:
        return None
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"--{given[0]} was given without --{missing[0]}: give both")
    if not re.fullmatch(r"\S+:\d{1,5}", values.coordinator):
        raise ValueError(f"--coordinator={values.coordinator} is not HOST:PORT")
    count, index = values.num_processes, values.process_id
    if not 0 <= index < count:
        raise ValueError(
            f"--process_id={index} is outside 0..{count - 1}: number --num_processes={count} from 0"
        )
    return Place(values.coordinator, count, index)


def from_slurm(environment: Mapping[str, str]) -> Place | None:
    """The place of a task of an `srun` step of several tasks; None elsewhere.

    One task a node uses all devices of it; several share them, one each, unless Slurm has bound
    them already. JAX_COORDINATOR_ADDRESS or _PORT replaces the first node or a port of the job's.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in environment:
        return None
    port = environment.get("JAX_COORDINATOR_PORT", 61440 + int(environment["SLURM_JOB_ID"]) % 4096)
    address = f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
    a_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    several = "," in environment.get("CUDA_VISIBLE_DEVICES", "")
    shared = several and not re.fullmatch(r"1(\(x\d+\))?", a_node)
    return Place(
        environment.get("JAX_COORDINATOR_ADDRESS", address),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_PROCID"]),
        [int(environment["SLURM_LOCALID"])] if shared else None,
    )


def first_host(nodes: str) -> str:
    """`node[003-007,9],other` to `node003`."""
    found = re.match(r"([^[,]*)(?:\[([^],-]*)[^]]*\]([^,]*))?", nodes)
    return "".join(found.groups("")) if found else nodes


def _detected_by_jax(environment: Mapping[str, str]) -> bool:
    """Several tasks under Open MPI, or several workers of a TPU pod."""
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    pod |= "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return pod or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def join(values: flags.FlagValues) -> None:
    """Joins the other processes, if there are any. Must come before any use of a device.

    Raises ValueError, with the address, when they do not come within --connect_secs.
    """
    limits = {
        "initialization_timeout": values.connect_secs,
        "heartbeat_timeout_seconds": values.heartbeat_secs,
    }
    # Signals are the loop's: JAX's own handler would swallow the first.
    jax.config.update("jax_enable_preemption_service", False)
    place = None
    if values.coordinator != "auto":
        place = from_flags(values) or from_slurm(os.environ)
        if place is None and not _detected_by_jax(os.environ):
            return
    if place is None:
        jax.distributed.initialize(**limits)
    elif place.count > 1:
        meet(place, values.connect_secs)
        jax.distributed.initialize(
            *place,
            cluster_detection_method="deactivate",
            coordinator_bind_address="{}:{}".format(*_bind(place.coordinator)),
            **limits,
        )


def _bind(coordinator: str) -> tuple[str, int]:
    """Where process 0 listens: on the loopback address alone if that is what it was named."""
    host, port = coordinator.rsplit(":", 1)
    return ("127.0.0.1" if host in ("localhost", "127.0.0.1") else "0.0.0.0"), int(port)


def meet(place: Place, limit_secs: float) -> None:
    """Returns once all processes have come to the coordinator's address, which is free again.
    Raises ValueError that names the address, and on process 0 who is missing."""
    (_report if place.index else _await_reports)(place, time.monotonic() + limit_secs, limit_secs)


def _await_reports(place: Place, deadline: float, limit_secs: float) -> None:
    missing, come = set(range(1, place.count)), []
    try:
        server = socket.create_server(_bind(place.coordinator), backlog=place.count)
    except OSError as error:
        raise ValueError(
            f"--coordinator={place.coordinator}: process 0 cannot listen there ({error.strerror}): "
            "name an address of its host and a port that is free"
        ) from error
    with server:
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
                peer.settimeout(1)
                missing.discard(struct.unpack("!I", peer.recv(4))[0])
                come.append(peer)
            except (TimeoutError, struct.error, ConnectionError) as error:
                if time.monotonic() >= deadline:
                    raise ValueError(
                        f"processes {sorted(missing)} of {place.count} did not come to "
                        f"--coordinator={place.coordinator} within {limit_secs:g} s "
                        "(--connect_secs): start them, or see what ended them"
                    ) from error
    for peer in come:
        with peer:
            peer.sendall(b"go")


def _report(place: Place, deadline: float, limit_secs: float) -> None:
    host, port = place.coordinator.rsplit(":", 1)
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=5) as peer:
                peer.sendall(struct.pack("!I", place.index))
                peer.settimeout(max(deadline - time.monotonic(), 0.01))
                if peer.recv(2) == b"go":
                    return
                reason = "it closed the connection"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.1)
    raise ValueError(
        f"--coordinator={place.coordinator} did not answer within {limit_secs:g} s "
        f"(--connect_secs): {reason or 'no connection'}; is process 0 running there?"
    )


def joined(main: Callable[[Any], int | None]) -> Callable[[Any], int | None]:
    """A command's `main`, run by every process of a cluster; an error ends this one at once."""

    @functools.wraps(main)
    def run(values):
        join(values)
        try:
            return main(values)
        except BaseException as error:
            if jax.process_count() == 1:
                raise
            _leave(error)

    return run


def _leave(error: BaseException) -> None:
    """Ends this process without waiting for the others, as a normal exit would."""
    refused = isinstance(error, cli.REFUSED) and "Gloo" not in str(error)
    status = cli.refuse(error) if refused else LOST_PEER
    if not refused:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)  # the others lose their coordinator with it: let them say their sentence
    os._exit(status)


# -- agreeing ------------------------------------------------------------------------------------


def is_first() -> bool:
    return jax.process_index() == 0


def together(work: Callable[[], T]) -> T:
    """`work()`; where it is refused on one process, all of them raise. A barrier as well."""
    if jax.process_count() == 1:
        return work()
    result = error = None
    try:
        result = work()
    except cli.REFUSED as problem:
        error = problem
    failed = multihost_utils.process_allgather(np.int32(error is not None))
    if not failed.any():
        return result  # pyright: ignore[reportReturnType]
    first = int(np.argmax(failed))
    if error is not None and first == jax.process_index():
        raise error
    raise ValueError(f"process {first} could not go on: its message says why")


class Report(NamedTuple):
    """What all processes know of step `step`: whether one was told to stop, and each one's own
    seconds a step (data and host work, without waiting for the devices)."""

    step: int
    stop: bool
    own_secs: list[float]

    def numbers(self) -> dict[str, float]:
        """For the log; nothing where there is one process."""
        own = self.own_secs
        if len(own) < 2:
            return {}
        numbers = {"slowest_process": int(np.argmax(own)), "slowest_process_secs": float(max(own))}
        return numbers | {"median_process_secs": float(np.median(own))}


class Peers:
    """Every `every_steps`, one all-gather of two numbers a process, read when the next is sent.

    So nobody waits for it, and all see the same at the same step. A signal to any process stops
    all of them at one step, at most 2 `every_steps` later. One process: at once, at no cost.
    """

    def __init__(self, every_steps: int):
        self.every_steps = every_steps
        self.count = jax.process_count()
        self._sent: tuple[int, jax.Array] | None = None
        if self.count > 1:
            firsts = {d.process_index: d for d in reversed(jax.devices())}
            mesh = Mesh(np.array([firsts[i] for i in range(self.count)]), ("process",))
            self._split = NamedSharding(mesh, PartitionSpec("process"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._gather = jax.jit(lambda x: x, out_shardings=whole)

    def exchange(self, step: int, stop: bool, own_secs: float) -> Report | None:
        """What was known one exchange ago; None between exchanges."""
        if self.count == 1:
            return Report(step, stop, [own_secs])
        if step % self.every_steps:
            return None
        report = None
        if self._sent is not None:
            sent, array = self._sent
            rows = jax.device_get(array)
            report = Report(sent, bool(rows[:, 0].any()), rows[:, 1].tolist())
        row = np.array([[float(stop), own_secs]], np.float32)
        self._sent = step, self._gather(jax.make_array_from_process_local_data(self._split, row))
        return report
