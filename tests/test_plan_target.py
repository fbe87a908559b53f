"""A step by the compiler of TPUs that are not there, and how its module is read."""

import importlib
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits_pixel
from experiments.host import cli
from experiments.plan import __main__ as plan
from experiments.plan import hlo, target, topology

MODULE = """HloModule step
%light (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p)
}
%heavy (p: f32[8]) -> f32[8] {
  %e = f32[8]{0} exponential(%p)
  ROOT %t = f32[8]{0} tanh(%e)
}
%product (a: bf16[16,32], b: bf16[32,64]) -> f32[16,64] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  ROOT %d = f32[16,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %m = f32[4]{0} multiply(%x, %x)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %x = f32[4]{0} constant({1, 2, 3, 4})
  %f = f32[16,64]{1,0} fusion(%a, %b), kind=kOutput, calls=%product, metadata={op_name="net/dense"}
  %c = f32[8]{0} copy(%p)
  %s = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%p)
  %e = f32[8]{0} copy-done(%s)
  %w = (s32[]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %q = f32[8]{0} conditional(%k, %p, %p), branch_computations={%light, %heavy}
  %v = f32[2,6,6,8]{3,2,1,0} convolution(%i, %k3), window={size=3x3}, dim_labels=b01f_01io->b01f
  %i = f32[2,6,6,4]{3,2,1,0} parameter(3)
  %k3 = f32[3,3,4,8]{3,2,1,0} parameter(4)
  %z = f8e4m3fn[8]{0} convert(%p)
}
"""


def test_a_module_is_read_by_the_rule():
    kernels = hlo.Module(MODULE).kernels()
    assert [(k.kind, k.times) for k in kernels] == [
        *(("fusion", 1), ("copy", 1), ("copy", 1), ("multiply", 5)),
        *(("exponential", 1), ("tanh", 1), ("convolution", 1), ("convert", 1)),
    ]
    fusion, copy, _, product, *_, convolution, convert = kernels
    assert fusion.place == "net/dense" and fusion.flops == 2 * 16 * 64 * 32
    assert fusion.bytes == 4 * 16 * 64 + 2 * 16 * 32  # the operand on the chip is not read again
    assert copy.bytes == 2 * 4 * 8 and product.bytes == 3 * 4 * 4
    assert convolution.flops == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 4)
    assert convert.bytes == 4 * 8 + 8
    found = hlo.summary(MODULE, peak=1e3, bandwidth=1e12)
    flops = fusion.flops + convolution.flops
    assert found["flops"] == flops and found["copies"] == 2 and found["kernels"] == 12
    np.testing.assert_allclose(found["bound_secs"], flops / 1e3, rtol=1e-6)
    assert found["peak_share"] == pytest.approx(1) and found["dearest"][0]["kind"] == "fusion"


LIBRARY = """ENTRY %main (x: bf16[8,16,16,32]) -> bf16[8,16,16,64] {
  %x = bf16[8,16,16,32]{3,2,1,0} parameter(0)
  %w = bf16[64,3,3,32]{3,2,1,0} parameter(1)
  %dy = bf16[8,16,16,64]{3,2,1,0} parameter(2)
  %a = bf16[128,64]{1,0} parameter(3)
  %b = bf16[64,256]{1,0} parameter(4)
  %q = bf16[8,256,2,40]{3,2,1,0} parameter(5)
  %f = (bf16[8,16,16,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %g = (bf16[64,3,3,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %h = (bf16[8,16,16,32]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %w), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %m = (bf16[128,256]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %s = (bf16[8,2,256,40]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["8","2","256","256"]}}}
  %r = f32[8]{0} fusion(%a), kind=kInput, calls=%sums
}
"""  # noqa: E501


def test_calls_of_cudnn_and_cublas_count_by_their_shapes():
    kernels = {k.name: k for k in hlo.Module(LIBRARY).kernels()}
    convolution = 2 * (8 * 16 * 16) * 64 * (9 * 32)
    assert [kernels[name].flops for name in "fghmsr"] == [
        *(convolution,) * 3,
        2 * 128 * 256 * 64,
        2 * 2 * (8 * 2 * 256 * 256) * 40,
        0,
    ]
    found = hlo.summary(LIBRARY, 1e12, 1e15, launch_secs=1.0)
    assert found["launched_secs"] == 6 and found["bound_secs"] < 1
    assert found["kinds"]["fusion Input"]["count"] == 1


def test_flops_of_a_module_are_those_of_its_products():
    """Of the CPU's compiler, which this machine has: a product and a strided convolution."""

    def f(x, w, k):
        y = jax.lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (x.reshape(2, -1) @ w).sum() + y.sum()

    shapes = ((2, 8, 8, 4), (256, 32), (3, 3, 4, 16))
    arrays = [jnp.ones(s) for s in shapes]
    text = jax.jit(f).lower(*arrays).compile().as_text()
    module = hlo.Module(text)
    found = sum(k.flops for k in module.kernels() if k.kind in ("convolution", "dot", "fusion"))
    assert found in (2 * 2 * 256 * 32 + 2 * (2 * 4 * 4 * 16) * 36, 2 * (2 * 4 * 4 * 16) * 36)


@pytest.fixture(scope="module")
def planned():
    """A pixel and a latent config, the latter with its weights split over all; and sampling."""
    found = {}
    for name, fsdp, sample in (
        ("digits_pixel", 1, False),
        ("digits_ldm", 4, False),
        ("digits_ldm", 4, True),
    ):
        config = importlib.import_module(f"configs.{name}").get_config("smoke")
        config.model.dtype = "bfloat16"
        config.parallel.fsdp = fsdp
        key = "sample" if sample else name
        found[key] = target.planned(config.lock(), "v5e:2x2", sample=sample)
    return found


def test_a_tpu_step_fits_and_exchanges_gradients_alone(planned):
    found = planned["digits_pixel"]
    assert found["fits"] and found["state_bytes"] < found["peak_bytes"] < 2**28
    assert found["memory_bytes"] == 16 * 2**30
    moved = found["collectives"]
    assert 1 <= moved["gradients"]["count"] <= 8
    assert moved["activations"]["count"] == moved["weights"]["count"] == 0
    assert found["kernels"] > found["copies"] > 0
    assert 0 < found["peak_share"] < 1
    assert found["bound_secs"] >= max(found["flops"] / 197e12, found["bytes_moved"] / 819e9 * 0.99)
    # A chip has a fourth of the examples, and so about of the products that were traced.
    assert 0.5 < found["flops"] / (found["step_flops"] / 4) < 2
    assert "bound by kernel" in target.show(found)


def test_split_weights_are_gathered_once_forward_and_once_backward(planned):
    found = planned["digits_ldm"]
    moved = found["collectives"]
    assert moved["weights"]["count"] > 0 and moved["gradients"]["count"] > 0
    assert found["state_bytes"] > 0 and 1 <= found["gathers_a_weight"] <= 2


def test_a_tpu_makes_pictures_by_the_program_of_sample(planned):
    """Two steps, guided, of pictures that are split over the chips: nothing is exchanged."""
    found, step = planned["sample"], planned["digits_ldm"]
    assert found["fits"] and found["state_bytes"] < found["peak_bytes"] < 2**28
    assert (found["steps"], found["evaluations"]) == (2, 4) and found["batch_size"] % 4 == 0
    assert all(entry["count"] == 0 for entry in found["collectives"].values())
    assert 0.5 < found["flops"] / (found["step_flops"] / 4) < 2
    assert set(step) < set(found)
    text = target.show(found)
    assert "for 4 evaluations of the network" in text and "images/s" in text


def test_what_does_not_fit_is_said_by_the_compiler():
    config = digits_pixel.get_config("smoke")
    config.train.batch_size = 2**22
    found = target.planned(config.lock(), "v5e:1x1")
    assert not found["fits"] and found["peak_bytes"] > 2**40 > found["memory_bytes"]
    assert "does not fit" in target.show(found)


def test_the_largest_batch_is_searched_both_ways_for_each_remat(monkeypatch):
    """As though so many examples fitted, by what is recomputed."""
    room, asked = {"none": 4, "full": 32, "conv": 16, "dots": 0}, []

    def compiled(config, aim, sample=False):
        of = config.sample if sample else config.train
        asked.append((config.parallel.remat, of.batch_size))
        return {"fits": of.batch_size <= room[config.parallel.remat], "batch_size": of.batch_size}

    monkeypatch.setattr(target, "in_a_process", compiled)
    config = digits_pixel.get_config("smoke")
    config.train.batch_size = 24
    found = target.planned(config, "v5e:1x1", largest_batch=True)
    assert found["largest_batch"] == {"none": 4, "full": 32, "conv": 16, "dots": 0}
    assert asked[:3] == [("none", 24), ("none", 16), ("none", 8)]
    config.sample.batch_size, config.parallel.remat = 8, "conv"
    asked.clear()
    found = target.planned(config, "v5e:2x2", largest_batch=True, sample=True)
    assert found["largest_batch"] == {"conv": 16}
    assert asked == [("conv", 8), ("conv", 16), ("conv", 32)]  # 8 is not compiled again


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--target=v7:2x2",), "--target=v7:2x2 is unknown"),
        (("--target=",), "unknown"),
        (("--target=v5e:",), "a topology of v5e is AxB"),
        (("--target=v5p:2x2",), "AxBxC"),
        (("--target=v5e:3x3",), "does not exist"),
        (("--target=v5p:2x2x3",), "does not exist"),
        (("--target=h100",), "h100:1 to h100:8"),
        (("--target=h100:16",), "does not exist"),
        (("--target=h100:2x4",), "does not exist"),
        (("--target=h100:2", "--config.parallel.data=3"), "2 devices, which parallel.data=3"),
        (("--target=v5e:2x4", "--config.parallel.fsdp=3"), "8 devices, which parallel.data=-1 and"),
        (("--target=v5e:2x4", "--config.train.batch_size=12"), "train.batch_size=12"),
        (("--largest_batch",), "--largest_batch is of --target"),
        (("--sample",), "--sample is of --target"),
        (("--sample", "--target=v5e:1x1", "--mesh=data=1"), "without --mesh"),
        (("--sample", "--target=v5e:1x1", "--config.sample.autoguidance=x"), "autoguidance=x"),
    ],
)
def test_a_target_that_is_none_is_refused(argv, words, capsys):
    argv = ("--config=configs/digits_pixel.py:smoke", *argv)
    assert cli.run(plan.define, plan.main, argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits_autoencoder.py:smoke", "task='autoencoder' samples nothing"),
        ("flow_cifar10.py:rf", "sample.sampler='dopri5' takes as many as its error asks"),
    ],
)
def test_what_has_no_steps_to_sample_by_is_refused(name, words, capsys):
    argv = (f"--config=configs/{name}", "--target=v5e:1x1", "--sample")
    assert cli.run(plan.define, plan.main, argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="needs requirements-gpu-target.txt"
)
def test_a_gpu_step_fits_and_exchanges_gradients_alone():
    config = digits_pixel.get_config("smoke")
    config.model.dtype = "bfloat16"
    found = target.planned(config.lock(), "h100:2")
    assert found["fits"] and found["state_bytes"] < found["peak_bytes"] < 2**28
    moved = found["collectives"]
    assert 1 <= moved["gradients"]["count"] <= 8
    assert moved["activations"]["count"] == moved["weights"]["count"] == 0
    assert 0.5 < found["flops"] / (found["step_flops"] / 2) < 2
    assert any("cudnn$conv" in name for name in found["kinds"])
    least = 2.5e-6 * found["kernels"] * (1 - 1e-9)  # summed kernel by kernel, it is rounded
    assert found["launched_secs"] >= least > found["bound_secs"] > 0


@pytest.mark.parametrize("target_name", ["v5e:1x1", "h100:8"])
def test_without_the_compiler_its_requirements_are_named(target_name, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    name = "gpu" if target_name.startswith("h") else "tpu"
    with pytest.raises(ValueError, match=rf"{target_name} needs .*requirements-{name}-target\.txt"):
        target.planned(digits_pixel.get_config("smoke").lock(), target_name)


def test_json_has_what_a_script_reads(planned, monkeypatch, capsys):
    monkeypatch.setattr(target, "in_a_process", lambda *_: planned["digits_pixel"])
    argv = ("--config=configs/digits_pixel.py:smoke", "--target=v5e:2x2", "--json")
    assert cli.run(plan.define, plan.main, argv) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"target", "fits", "peak_bytes", "memory_bytes", "kernels", "copies", "bytes_moved"}
    assert keys | {"flops", "bound_secs", "peak_share", "collectives"} <= found.keys()


def test_a_product_that_triton_cannot_tile_is_cublas(monkeypatch):
    asked, untiled = [], target.UNTILED

    def run(*_, env, **__):
        asked.append(env["XLA_FLAGS"])
        failed = "enable_triton_gemm=false" not in env["XLA_FLAGS"]
        error = f"jax.errors.JaxRuntimeError: INTERNAL: {untiled} that satisfy\n  a frame"
        return types.SimpleNamespace(
            returncode=int(failed), stderr=error, stdout='note\n{"fits": true}'
        )

    monkeypatch.setattr(topology.Topology, "environment", lambda self: {"XLA_FLAGS": "--a=b"})
    monkeypatch.setattr(target.subprocess, "run", run)
    found = target.in_a_process(ConfigDict(), "h100:1")
    assert found == {"fits": True, "triton": False}
    assert asked == ["--a=b", "--a=b --xla_gpu_enable_triton_gemm=false"]
    with pytest.raises(ValueError, match=r"compile: jax.*: INTERNAL: Could"):
        monkeypatch.setattr(target, "UNTILED", "another")
        target.in_a_process(ConfigDict(), "h100:1")
