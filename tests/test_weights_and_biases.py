"""Weights & Biases by its own client: what an offline run holds; a service that is not there."""

import http.server
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from PIL import Image

from diffusion.weights_and_biases import stored_steps

ROOT = pathlib.Path(__file__).parents[1]
LIFE = textwrap.dedent(
    """
    import os, signal, sys, time
    import numpy as np
    from diffusion.writers import make_writer

    workdir, start, stop, killed = sys.argv[1], *map(int, sys.argv[2:])
    config = {"seed": 3, "optim": {"learning_rate": 1e-3}, "api_key": "0123456789"}
    writer = make_writer(workdir, "offline", "ours", 12, config, start, tensorboard=False)
    for step in range(start + 1, stop + 1):
        writer.scalars(step, {"loss": 1 / step})
        if step % 6 == 0:
            writer.scalars(step, {"eval_loss": 2 / step})
            writer.images(step, {"samples": np.full((2, 8, 8, 3), step, np.uint8)})
    if killed:
        time.sleep(killed - 1)
        os.kill(os.getpid(), signal.SIGKILL)
    writer.close()
    """
)


def life(workdir, start, stop, killed=False, **environment):
    """A process that logs the steps after `start`, and ends or is killed."""
    argv = [sys.executable, "-c", LIFE, workdir, str(start), str(stop), str(int(killed))]
    env = {**os.environ, "WANDB_MODE": "offline", "HOME": str(workdir), **environment}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-9 if killed else 0), done.stderr
    return done


def records(workdir):
    """What the client stored of each start of the run, as its own messages.

    A .wandb file is a log in LevelDB's format: a header of 7 bytes, then blocks of 2^15 bytes that
    hold pieces, each with checksum (4), length (2) and kind (1 whole; 2, 3, 4 first to last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        data, at, pieces = path.read_bytes(), 7, []
        assert data.startswith(b":W&B")
        while at + 7 <= len(data):
            if 0 < (left := -at % 2**15) < 7:  # the end of a block
                at += left
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            pieces.append(data[at + 7 : at + 7 + length])
            at += 7 + length
            if kind in (1, 4):
                yield Record.FromString(b"".join(pieces))
                pieces = []


def items(some):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in some}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run that was killed twice, the second time earlier than the first, and then ended."""
    workdir = tmp_path_factory.mktemp("run")
    of_trial = {"WANDB_RUN_GROUP": "lr", "WANDB_JOB_TYPE": "trial", "WANDB_TAGS": "sweep"}
    life(workdir, 0, 8, killed=18, **of_trial)  # seconds: the client stores all of it
    life(workdir, 5, 7, killed=True, **of_trial)  # and nothing of this
    life(workdir, 6, 7, killed=True, **of_trial)
    life(workdir, 7, 12, **of_trial)
    return workdir, list(records(workdir))


def test_no_step_twice_and_none_lost_after_two_kills(stored):
    workdir, found = stored
    rows = [items(r.history.item) for r in found if r.HasField("history")]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 13)]
    assert [row["step"] for row in rows if "eval_loss" in row] == [6, 12]
    assert [row["step"] for row in rows if "samples._type" in row] == [6, 12]
    assert len({r.run.run_id for r in found if r.HasField("run")}) == 1
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 7), 6, *range(7, 13), 12]


def test_pictures_config_summary_and_whose_trial_it_is(stored):
    workdir, found = stored
    pictures = [*workdir.glob("wandb/offline-run-*/files/media/images/samples_*.png")]
    colours = set()
    for path in pictures:  # a file a different picture
        with Image.open(path) as picture:
            assert picture.size == (8, 8)
            colours.add(picture.getpixel((0, 0)))
    assert colours == {(6, 6, 6), (12, 12, 12)}
    runs = [r.run for r in found if r.HasField("run")]
    for run in runs:
        assert (run.run_group, run.job_type, [*run.tags]) == ("lr", "trial", ["sweep"])
        assert (run.project, run.display_name) == ("ours", workdir.name)
    config = {}
    for record in found:
        if record.HasField("config"):
            config |= items(record.config.update)
    assert config["seed"] == 3 and config["optim"] == {"learning_rate": 1e-3}
    assert "0123456789" not in json.dumps(config)
    summary = {}
    for record in found:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    assert summary["loss"] == pytest.approx(1 / 12) and summary["step"] == 12


@pytest.mark.parametrize("long", [0, 7, 2**15 - 14, 2**15, 100_000])
def test_stored_steps_are_read_across_blocks(long, tmp_path):
    """Messages that fill blocks to the last byte, and longer ones than a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, pieces = bytearray(b":W&B\0\0\0"), []
    for step in range(200):
        record = Record()
        text = json.dumps("x" * ((long + 13 * step) % (long + 400)))
        for name, value in (("step", json.dumps(step)), ("text", text)):
            record.history.item.add(key=name, value_json=value)
        pieces.append(record.SerializeToString())
    for message in pieces:  # as LevelDB's writer does
        first = True
        while message or first:
            left = 2**15 - len(data) % 2**15
            if left < 7:
                data += bytes(left)
                left = 2**15
            part, message = message[: left - 7], message[left - 7 :]
            kind = (1 if first else 4) if not message else (2 if first else 3)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    path = tmp_path / "run.wandb"
    path.write_bytes(data)
    assert list(stored_steps(path)) == [(step, {"step", "text"}) for step in range(200)]
    path.write_bytes(data[:-3])  # cut off amid a message
    assert [step for step, _ in stored_steps(path)] == [*range(199)]


class Silent(http.server.BaseHTTPRequestHandler):
    """A service that takes requests and does not answer them in time."""

    def do_POST(self):
        time.sleep(600)

    do_GET = do_POST


ONLINE = textwrap.dedent(
    """
    import sys, time
    from diffusion import weights_and_biases as ours
    ours.WandB.START_SECS = ours.WandB.END_SECS = 5
    writer = ours.make_wandb(sys.argv[1], "online", "ours")
    longest = 0.0
    for step in range(1, 200):
        began = time.monotonic()
        writer.scalars(step, {"loss": 1 / step})
        longest = max(longest, time.monotonic() - began)
    began = time.monotonic()
    writer.close()
    print(longest, time.monotonic() - began)
    """
)


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_service_that_is_not_there_or_silent_stops_no_step(kind, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if kind == "silent":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Silent)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_API_KEY": "k" * 40}
    env |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_MODE": "online"}
    argv = [sys.executable, "-c", ONLINE, tmp_path]
    began = time.monotonic()
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    longest, ending = map(float, done.stdout.split()[-2:])
    assert longest < 2 and ending < 30 and time.monotonic() - began < 90
    steps = {items(r.history.item).get("step") for r in records(tmp_path) if r.HasField("history")}
    assert steps == set(range(1, 200)), done.stderr
