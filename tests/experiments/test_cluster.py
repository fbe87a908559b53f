"""How processes find each other, on one machine and by the environment; watchdog and signals."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from experiments import train
from experiments.host import cli, cluster, guards
from experiments.host.cluster import Place, first_host, from_flags, from_slurm, meet

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[003-004,9]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}


def values(*argv):
    flags = cli.Flags()
    cluster.define(flags)
    flags.values(["command", *argv])
    return flags.values


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node003", "node003"),
        ("node003,other", "node003"),
        ("node[003-007,9]", "node003"),
        ("node[003,007-9],other", "node003"),
        ("a,node[1-2]", "a"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_the_place_of_a_slurm_task():
    assert from_slurm(SLURM) == Place("node003:62344", 4, 3, None)
    assert from_slurm({}) is None
    assert from_slurm(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch_script = {k: v for k, v in SLURM.items() if "STEP" not in k}
    assert from_slurm(batch_script) is None  # outside srun there are no others


def test_tasks_that_share_a_node_share_its_devices():
    two_a_node = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}
    seen = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert from_slurm(two_a_node | seen).devices == [1]
    assert from_slurm(two_a_node | {"CUDA_VISIBLE_DEVICES": "1"}).devices is None  # bound already
    assert from_slurm(SLURM | seen).devices is None  # alone on its node: all of them


def test_the_place_on_the_command_line():
    argv = ("--coordinator=host:99", "--num_processes=2", "--process_id=1")
    assert from_flags(values(*argv)) == Place("host:99", 2, 1)
    assert from_flags(values()) is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--coordinator=host:99",), ("--coordinator", "--num_processes")),
        (("--num_processes=2", "--process_id=0"), ("--coordinator",)),
        (("--coordinator=h", "--num_processes=2", "--process_id=0"), ("--coordinator=h", "PORT")),
        (("--coordinator=h:1", "--num_processes=2", "--process_id=2"), ("--process_id=2", "0..1")),
    ],
)
def test_half_a_place_is_refused(argv, words, capsys):
    config = ("--config=configs/digits_classifier.py:smoke", "--workdir=/nowhere/run")
    assert cli.run(train.define, train.main, (*config, *argv)) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and all(word in error for word in words)


def test_processes_meet_in_any_order():
    place = Place(f"localhost:{free_port()}", 3, 0)
    done = []

    def come(index, wait_secs):
        time.sleep(wait_secs)
        meet(place._replace(index=index), 10)
        done.append(index)

    threads = [threading.Thread(target=come, args=a) for a in ((2, 0), (0, 0.2), (1, 0.4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(done) == [0, 1, 2]


def test_a_coordinator_that_does_not_answer_is_named():
    address = f"localhost:{free_port()}"
    with pytest.raises(ValueError, match=rf"{address} did not answer within 0.3 s"):
        meet(Place(address, 2, 1), 0.3)


def test_processes_that_do_not_come_are_named():
    address = f"localhost:{free_port()}"
    with pytest.raises(ValueError, match=rf"processes \[1, 2\] of 3 did not come .*{address}"):
        meet(Place(address, 3, 0), 0.3)


def test_an_address_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"{address}.*cannot listen.*free"):
            meet(Place(address, 2, 0), 1)


def test_one_process_agrees_with_itself_at_once():
    peers = cluster.Peers(10)
    assert peers.exchange(1, False, 0.5) == (1, False, [0.5])
    assert peers.exchange(2, True, 0.5).stop
    assert peers.exchange(2, True, 0.5).numbers() == {}


def test_the_slowest_process_is_named():
    report = cluster.Report(20, False, [0.1, 0.1, 0.9, 0.2])
    assert report.numbers()["slowest_process"] == 2
    assert report.numbers()["slowest_process_secs"] == 0.9


def test_signals_ask_once_and_then_end(monkeypatch):
    monkeypatch.setattr(guards, "ONE_REQUEST_SECS", 0.2)
    for number in guards.SIGNALS:
        with guards.StopOnSignal() as stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher that passes the same Ctrl-C on
            assert stop.requested
    code = (
        "import os, signal, time\n"
        "from experiments.host import guards; guards.ONE_REQUEST_SECS = 0.1\n"
        "with guards.StopOnSignal():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM


HANG = """
import time
from experiments.host.guards import Watchdog
with Watchdog(start_secs={start}, step_secs=0.3) as watchdog:
    for step in range(4):
        time.sleep(0.15)  # each within the limit
        watchdog.doing(f"step {{step}}")
    print("ran", flush=True)
    def a_fetch_that_hangs(): time.sleep(60)
    a_fetch_that_hangs()
"""


@pytest.mark.parametrize("start", [0.3, 0])
def test_a_hang_ends_with_every_stack_and_its_status(start):
    began = time.monotonic()
    code = HANG.format(start=start)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == guards.HUNG
    assert "ran" in done.stdout
    assert "error: step 3 has taken more than 0.3 s" in done.stderr
    assert "a_fetch_that_hangs" in done.stderr
    assert time.monotonic() - began < 30


def test_a_hang_before_the_first_step_is_ended_by_its_own_limit():
    code = "import time; from experiments.host.guards import Watchdog\n"
    code += "with Watchdog(start_secs=0.2, step_secs=60): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == guards.HUNG and "starting" in done.stderr
