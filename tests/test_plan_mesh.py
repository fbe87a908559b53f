"""The plan of a mesh: what is read from a compiled step, and the bounds that follow."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits_pixel
from diffusion.training.parallel import Parallel, make_mesh
from experiments.host import cli
from experiments.plan import __main__ as plan
from experiments.plan import cost, hlo, mesh

MODULE = """HloModule step
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %ag = bf16[8,8]{1,0} all-gather(bf16[4,8]{1,0} %x), replica_groups={{0,1}}, dimensions={0}
}
%fused (p: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} negate(f32[4]{0} %p)
}
ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %ar = (f32[4,8]{1,0}, f32[2]{0}) all-reduce(f32[4,8] %p, f32[2] %q), to_apply=%add
  %one = f32[] all-reduce-start(f32[] %r), to_apply=%add
  %w = (s32[]) while((s32[]) %t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %f = f32[4]{0} fusion(f32[4]{0} %z), kind=kLoop, calls=%fused
}
"""


def test_collectives_are_read_with_the_trip_counts_of_their_loops():
    assert hlo.collectives(MODULE) == {
        "all-reduce": {"count": 2, "bytes": 4 * (32 + 2) + 4},
        "all-gather": {"count": 5, "bytes": 5 * 2 * 64},
    }


def tiny() -> ConfigDict:
    config = digits_pixel.get_config("smoke")
    config.model.denoiser.update({"channels": 128, "multipliers": (1,), "attention": (False,)})
    config.train.batch_size = 16
    return config


def compiled(data, fsdp):
    return mesh.compile_plan(tiny(), data, fsdp)


@pytest.fixture(scope="module")
def plans():
    return {mesh: compiled(*mesh) for mesh in ((2, 1), (8, 1), (1, 8))}


def test_all_reduces_do_not_grow_with_the_devices(plans):
    few, many = (plans[mesh]["collectives_per_step"] for mesh in ((2, 1), (8, 1)))
    assert few == many and few.keys() == {"all-reduce"}
    params = plans[8, 1]["bytes_per_device"]["params"]
    # The gradients once, and scalars: the loss.
    assert params <= many["all-reduce"]["bytes"] < 1.02 * params


def test_a_shard_holds_an_eighth(plans):
    whole, split = (plans[mesh]["bytes_per_device"] for mesh in ((8, 1), (1, 8)))
    for part in ("params", "ema", "optimizer", "state"):
        assert whole[part] / 8 <= split[part] < 1.05 * whole[part] / 8
    assert "all-gather" in plans[1, 8]["collectives_per_step"]
    assert plans[1, 8]["unsharded"] == plans[8, 1]["unsharded"] == []


def test_what_is_planned_is_what_lies_on_a_device(plans):
    """The state itself, on eight devices."""
    parallel, task = Parallel("jit", make_mesh(1, 8)), mesh.tasks.task(tiny())
    state = parallel.init(task.init, jax.random.key(0))
    device = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert held == plans[1, 8]["bytes_per_device"]["state"]


def test_flops_are_those_of_the_whole_batch(plans):
    assert plans[2, 1]["flops_per_step"] == plans[1, 8]["flops_per_step"]
    forward = cost.plan(tiny())["flops_per_example"]["forward"]
    # A step is three forwards, but for what the first layer need not send back.
    assert 2.5 < plans[8, 1]["flops_per_step"] / (16 * forward) < 3.2


def test_the_bounds_of_a_step():
    found = {
        "mesh": {"data": 16, "fsdp": 1},
        "batch_size": 32,
        "bytes_per_device": {"state": 8e9},
        "collectives_per_step": {
            "all-reduce": {"count": 2, "bytes": 8e9},
            "all-gather": {"count": 1, "bytes": 16e9},
        },
        "flops_per_step": 989e12 * 16 * 0.25,
    }
    bound = mesh.roofline(found, "h100")
    np.testing.assert_allclose(bound["secs"]["compute"], 0.25)
    np.testing.assert_allclose(bound["secs"]["memory"], 16e9 / 3.35e12)
    np.testing.assert_allclose(bound["secs"]["network"], 15 / 16 * 32e9 / 50e9)  # two nodes
    assert bound["bound_by"] == "network" and bound["state_of_memory"] == 0.1
    one_node = mesh.roofline(found | {"mesh": {"data": 8, "fsdp": 1}}, "h100")
    np.testing.assert_allclose(one_node["secs"]["network"], 7 / 8 * 32e9 / 450e9)


CLASSIFIER = (
    "--config=configs/digits_classifier.py:smoke",
    "--config.model.classifier.widths=(4,8,8)",
    "--config.train.batch_size=64",
)


def test_the_command_plans_for_more_devices_than_there_are(capfd):
    argv = (*CLASSIFIER, "--devices=32", "--mesh=data=8,fsdp=4", "--hardware=h200")
    assert cli.run(plan.define, plan.main, (*argv, "--json")) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["mesh"] == {"data": 8, "fsdp": 4} and found["batch_size"] == 64
    assert found["roofline"]["hardware"] == "h200" and found["roofline"]["step_secs"] > 0
    text = mesh.show(found)
    assert "32 devices" in text and "activations_estimate" in text and "assumed" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--devices=8", "--mesh=data=4,fsdp=4"), ("16 devices", "--devices=8")),
        (("--devices=8", "--mesh=rows=8"), ("--mesh=rows=8", "fsdp")),
        (("--devices=8", "--mesh=8"), ("--mesh=8", "data=32,fsdp=8")),
        (("--devices=3", "--mesh=data=3"), ("train.batch_size=64", "3")),
        (("--devices=8", "--mesh=data=8", "--hardware=abacus"), ("abacus",)),
        (("--devices=8", "--hardware=h100"), ("--hardware=h100", "--mesh")),
    ],
)
def test_the_plan_refuses(argv, words, capfd):
    assert cli.run(plan.define, plan.main, (*CLASSIFIER, *argv)) == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
