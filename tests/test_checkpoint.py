"""Checkpoints: round trips to the bit over topologies, commits, damage, retention, errors."""

import hashlib
import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusion import manifest
from diffusion.checkpoint import Checkpoints, restore_params
from diffusion.manifest import MANIFEST, CorruptError, latest_step, verify

TRANSFORM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


class State(flax.struct.PyTreeNode):
    step: Any
    rng: Any
    params: Any
    opt_state: Any
    ema: Any
    extra: Any


def build(seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    dense = {
        "kernel": jax.random.normal(keys[0], (16, 8)),
        "bias": jax.random.normal(keys[1], (8,)),
    }
    half = jax.random.normal(keys[2], (8, 4)).astype(jnp.bfloat16)
    params = {"denoiser": {"dense": dense, "out": {"kernel": half}}}
    grads = jax.tree.map(lambda x: x * 0.1, params["denoiser"])
    _, opt = TRANSFORM.update(grads, TRANSFORM.init(params["denoiser"]), params["denoiser"])
    return State(
        step=jnp.int32(seed),
        rng=jax.random.key_data(jax.random.key(seed)),
        params=params,
        opt_state={"denoiser": opt},
        ema={"denoiser": jax.tree.map(lambda x: x / 3, params["denoiser"])},
        extra={"scale": jnp.float32(0.18215), "skipped": jnp.int32(2)},
    )


def shardings(state: State, devices: int) -> State:
    """FSDP: the first axis of every matrix over the mesh, the rest replicated."""
    mesh = jax.make_mesh(
        (devices,), ("fsdp",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )
    spec = lambda x: PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec()  # noqa: E731
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), state)


def target_of(state: State, layout: State) -> State:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def write(directory, steps=(1, 2, 3), **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, build(step), {"position": step}, {"loss": 1 / (1 + step)})
    return build(steps[-1])


@pytest.mark.parametrize("devices", [8, 4, 2, 1])
def test_round_trip_is_bit_exact_on_other_device_counts(tmp_path, devices):
    state = build(7)
    sharded = jax.device_put(state, shardings(state, 8))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, sharded, {"index": 2**60 + 1, "epoch": 3}, {"config": {"a": [1, 2.5]}})
        layout = shardings(state, devices)
        step, restored, data_state, metadata = checkpoints.restore(target_of(state, layout))
    assert (step, data_state) == (7, {"index": 2**60 + 1, "epoch": 3})
    assert metadata == {"config": {"a": [1, 2.5]}}
    assert_same_bits(restored, state)
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(layout)):
        assert leaf.sharding == sharding


def test_types_of_the_target_are_rebuilt(tmp_path):
    state = write(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: state)).state
    assert type(restored) is State
    clip, adamw = restored.opt_state["denoiser"]
    assert isinstance(clip, optax.EmptyState)
    assert isinstance(adamw[0], optax.ScaleByAdamState)
    assert_same_bits(restored, state)
    updates = [
        TRANSFORM.update(s.params["denoiser"], s.opt_state["denoiser"], s.params["denoiser"])
        for s in (state, restored)
    ]
    assert_same_bits(*updates)


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    advance = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    state = {"w": jnp.zeros((512, 1024)), "n": jnp.int32(0)}
    with Checkpoints(tmp_path, keep_last=10) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state, {}, {})
            for _ in range(4):
                state = advance(state)
        for step in range(5):
            saved = checkpoints.restore(jax.eval_shape(lambda: state), step).state
            assert (np.asarray(saved["w"]) == 4 * step).all()
            assert saved["n"] == 4 * step


def test_data_state_is_taken_when_save_is_called(tmp_path):
    data_state = {"position": 1, "count": np.int64(5)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, build(), data_state, {})
        data_state["position"] = 2
        assert checkpoints.restore(build()).data_state == {"position": 1, "count": 5}


def test_nothing_saved_restores_none(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(build()) is None
        assert checkpoints.latest_step() is None
    assert latest_step(tmp_path / "absent") is None
    with pytest.raises(ValueError, match="no finished checkpoint"):
        restore_params(tmp_path / "absent")


def test_saving_a_step_again_changes_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, build(1), {}, {})
        before = restore_params(tmp_path) if checkpoints.wait() is None else None
        assert not checkpoints.save(1, build(2), {}, {})
        assert restore_params(tmp_path).hash == before.hash


def test_explicit_step(tmp_path):
    write(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        step, state, *_ = checkpoints.restore(build(), step=2)
        assert step == 2
        assert_same_bits(state, build(2))
        with pytest.raises(ValueError, match=r"step 9; it has \[3, 2, 1\]"):
            checkpoints.restore(build(), step=9)


def test_part_of_a_state_as_numpy(tmp_path):
    state = write(tmp_path)
    found = restore_params(tmp_path, ("params", "ema", "absent"))
    assert found.step == 3
    assert found.metadata == {"loss": 0.25}
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found.items))
    assert_same_bits(found.items, {"params": state.params, "ema": state.ema, "absent": {}})
    assert len(found.hash) == 16
    assert found.hash == restore_params(tmp_path, ("extra",)).hash
    assert found.hash != restore_params(tmp_path, step=2).hash


# ------------------------------------------------------------------------------- damage


def flip(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    write(directory, (1, 2))
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_damaged_in_every_way_is_detected_and_fallen_back_from(
    two_steps, tmp_path, damage, caplog
):
    names = [p.relative_to(two_steps / "2") for p in (two_steps / "2").rglob("*") if p.is_file()]
    assert len(names) >= 6
    tried = 0
    for number, name in enumerate(names):
        if not (two_steps / "2" / name).stat().st_size and damage != "delete":
            continue
        copy = tmp_path / str(number)
        shutil.copytree(two_steps, copy)
        DAMAGE[damage](copy / "2" / name)
        caplog.clear()
        checkpoints = Checkpoints(copy)
        step, state, data_state, _ = checkpoints.restore(build())
        assert (step, data_state) == (1, {"position": 1}), name
        assert_same_bits(state, build(1))
        assert checkpoints.latest_step() == 1
        if (name.name, damage) != (MANIFEST, "delete"):  # that is an unfinished step, removed
            assert str(name) in caplog.text
            assert (copy / "2.corrupt").is_dir()
        assert checkpoints.save(2, build(2), {}, {})
        checkpoints.close()
        assert restore_params(copy).step == 2
        tried += 1
    assert tried >= 6


def test_all_damaged_is_none_and_nothing_is_deleted(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "copy")
    for step in "12":
        flip(next((tmp_path / "copy" / step).rglob("d/*")))
    with Checkpoints(tmp_path / "copy") as checkpoints:
        assert checkpoints.restore(build()) is None
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["1.corrupt", "2.corrupt"]


def test_reading_passes_over_damage_and_renames_nothing(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path / "copy")
    flip(next((tmp_path / "copy" / "2").rglob("d/*")))
    assert restore_params(tmp_path / "copy").step == 1
    assert "step 2 is damaged" in caplog.text
    with pytest.raises(CorruptError, match="does not hash"):
        restore_params(tmp_path / "copy", step=2)
    assert (tmp_path / "copy" / "2").is_dir()


def test_a_manifest_may_not_leave_its_folder_nor_be_newer(two_steps, tmp_path):
    folder = tmp_path / "2"
    shutil.copytree(two_steps / "2", folder)

    def rewrite(change):
        body = json.loads((two_steps / "2" / MANIFEST).read_text())
        del body["sha256"]
        change(body)
        body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(body))

    rewrite(lambda body: body["files"].update({"../x": {"bytes": 0, "sha256": ""}}))
    (tmp_path / "x").touch()
    with pytest.raises(CorruptError, match="outside its folder"):
        verify(folder)
    rewrite(lambda body: body.update(format=99))
    with pytest.raises(ValueError, match="format 99") as caught:
        verify(folder)
    assert not isinstance(caught.value, CorruptError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.replace(extra={}),
            r"extra\.scale=.*, but no extra\.scale is asked for.*: use the config",
        ),
        (lambda s: s.replace(ema={"vae": s.rng}), r"no ema\.vae, but ema\.vae=.* is asked for"),
        (
            lambda s: s.replace(rng=jnp.zeros(4, jnp.uint32)),
            r"rng='uint32\(2,\)', but rng='uint32\(4,\)'",
        ),
        (lambda s: s.replace(step=jnp.float32(0)), r"step='int32\(\)', but step='float32\(\)'"),
    ],
)
def test_another_networks_state_is_refused_and_not_called_damaged(two_steps, change, message):
    with Checkpoints(two_steps) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(change(build()))
        assert checkpoints.latest_step() == 2


# --------------------------------------------------------------- leftovers, retention


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    write(tmp_path, [1])
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "data").write_text("half")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "notes"]


def test_the_only_committed_step_without_manifest_is_kept_aside(tmp_path):
    write(tmp_path, [1])
    (tmp_path / "1" / MANIFEST).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(build()) is None
    assert (tmp_path / "1.unfinished" / "state").is_dir()


def kept(directory):
    return sorted(int(p.name) for p in directory.iterdir())


def test_retention(tmp_path):
    write(tmp_path / "last", range(1, 8), keep_last=2)
    assert kept(tmp_path / "last") == [6, 7]
    write(tmp_path / "every", range(1, 8), keep_last=1, keep_every_steps=3)
    assert kept(tmp_path / "every") == [3, 6, 7]
    with Checkpoints(tmp_path / "best", keep_last=1, keep_best="fid") as checkpoints:
        for step, fid in enumerate([5.0, 2.0, float("nan"), 3.0, 4.0]):
            checkpoints.save(step, build(), {}, {"fid": fid})
    assert kept(tmp_path / "best") == [1, 4]
    with Checkpoints(tmp_path / "up", keep_last=1, keep_best="psnr", highest=True) as checkpoints:
        for step, psnr in enumerate([5.0, 2.0, float("nan"), 3.0, 4.0]):
            checkpoints.save(step, build(), {}, {"psnr": psnr})
    assert kept(tmp_path / "up") == [0, 4]
    for options in ({"keep_last": 0}, {"keep_every_steps": 0}):
        with pytest.raises(ValueError, match="keep_"):
            Checkpoints(tmp_path, **options)


# ------------------------------------------------------------------------------ errors


def test_what_is_not_json_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="not JSON"):
            checkpoints.save(1, build(), {"state": b"bytes"}, {})
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize("async_save", [True, False])
def test_a_failed_manifest_is_raised_later_and_leaves_the_old_one(
    tmp_path, monkeypatch, async_save
):
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, async_save=async_save)
    checkpoints.save(1, build(1), {}, {})
    checkpoints.wait()
    monkeypatch.setattr(manifest, "write_manifest", full)
    with pytest.raises(OSError, match=r"checkpoint .*/2 could not be written.*No space.*step 1"):
        checkpoints.save(2, build(2), {}, {})
        checkpoints.wait()
    monkeypatch.undo()
    assert kept(tmp_path) == [1]
    checkpoints.wait()  # an error is raised once
    assert checkpoints.save(2, build(2), {}, {})
    checkpoints.close()
    assert checkpoints.restore(build()).step == 2


def test_a_vanished_directory_is_one_sentence(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the directory was")
    with pytest.raises(OSError, match="could not be written"):
        checkpoints.save(1, build(), {}, {})
        checkpoints.close()


def test_orbax_is_quiet_and_its_warnings_are_not(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "absl")
    write(tmp_path, [1])
    assert not [r for r in caplog.records if "orbax" in r.pathname]
    logger = logging.getLogger("absl")
    record = logger.makeRecord("absl", logging.WARNING, "/x/orbax/y.py", 1, "m", (), None)
    assert logger.filter(record)


def start(script: str, *arguments, **environment):
    """A process of its own running `script`; its arguments follow."""
    root = str(pathlib.Path(__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": root} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FULL = """
    import resource, sys, jax
    from diffusion.checkpoint import Checkpoints
    state = {"w": jax.random.normal(jax.random.key(0), (500, 1000))}
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, jax.tree.map(lambda x: 0 * x, state), {}, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        checkpoints.save(2, state, {}, {})
        checkpoints.close()
    except OSError as error:
        print(error)
    assert (checkpoints.restore(state).state["w"] == 0).all()
"""


def test_a_write_that_fails_is_one_sentence_and_the_earlier_step_restores(tmp_path):
    """A limit on file sizes stands for the full disk: both end a write of the array file."""
    out, err = start(FULL, tmp_path / "run").communicate(timeout=100)
    assert "2 could not be written" in out
    assert "The last finished one is step 1; free space" in out
    assert "Traceback" not in err
    assert kept(tmp_path / "run") == [1]


KILLED = """
    import sys, jax, jax.numpy as jnp
    from diffusion.checkpoint import Checkpoints
    state = {"w": jnp.zeros((64, 1000)), "n": jnp.int32(0)}
    checkpoints = Checkpoints(sys.argv[1])
    found = checkpoints.restore(state)
    if found is not None:
        state = found.state
        assert (state["w"] == state["n"]).all() and found.step == state["n"], found.step
    print("start", 0 if found is None else found.step, flush=True)
    for step in range(int(state["n"]) + 1, 10_000):
        state = jax.tree.map(lambda x: x + 1, state)
        checkpoints.save(step, state, {"position": step}, {})
        print("saving", step, flush=True)
"""


def test_kill_9_during_saves_restores_the_last_committed(tmp_path):
    committed = 0
    for delay in (0.0, 0.02, 0.07):
        run = start(KILLED, tmp_path / "run")
        with run:
            assert int(run.stdout.readline().split()[1]) == committed
            for _ in range(3):
                assert run.stdout.readline().startswith("saving")
            time.sleep(delay)
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
        committed = latest_step(tmp_path / "run")
        verify(tmp_path / "run" / str(committed))
    found = restore_params(tmp_path / "run", ("w", "n"))
    assert committed >= 6
    assert (found.items["w"] == committed).all()


TWO_PROCESSES = """
    import sys, jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    directory, address, index = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(index))
    from diffusion import manifest
    from diffusion.checkpoint import Checkpoints
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    spread, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))

    def state(step):
        rows = np.arange(32, dtype=np.float32).reshape(8, 4) + step
        make = lambda value, s: jax.make_array_from_callback(value.shape, s, lambda i: value[i])
        return {"w": make(rows, spread), "n": make(np.int32(step), same)}

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    with Checkpoints(directory, keep_last=2) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, state(step), {"position": step}, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
        assert not checkpoints.save(3, state(3), {}, {})
        if index == "0":
            path = max(checkpoints.directory.glob("3/**/d/*"), key=lambda p: p.stat().st_size)
            path.write_bytes(path.read_bytes()[:-1])
        found = checkpoints.restore(target)
        assert (found.step, found.data_state) == (2, {"position": 2}), found
        for x, y in zip(jax.tree.leaves(found.state), jax.tree.leaves(state(2))):
            assert x.sharding == y.sharding
            for a, b in zip(x.addressable_shards, y.addressable_shards):
                assert np.array_equal(a.data, b.data)
        if index == "0":
            def write(*_):
                raise OSError("disk full")
            manifest.write_manifest = write
        checkpoints.save(4, state(4), {}, {})
        try:
            checkpoints.wait()
        except OSError as error:
            print("told", error)
        assert checkpoints.latest_step() == 2
"""


def test_two_processes_agree_on_steps_damage_and_errors(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    runs = [
        start(TWO_PROCESSES, tmp_path, address, index, JAX_NUM_CPU_DEVICES="2") for index in (0, 1)
    ]
    try:
        outputs = [run.communicate(timeout=100) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (out, err) in zip(runs, outputs):
        assert run.returncode == 0, err[-3000:]
        assert "told checkpoint" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3.corrupt"]
