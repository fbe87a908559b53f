"""Hardware that is not here: TPUs by libtpu, NVIDIA's GPUs by XLA's own compiler of them.

`v5e:2x4` is a kind of chip and how many lie along each axis; `h100:8` a kind of GPU and how many
one machine has. Either compiler runs without its hardware, in a process whose environment says so
before JAX is imported. A GPU is described by the numbers that XLA's compiler asks for; nothing is
tuned by trial, and cuDNN's workspaces are not in its figures.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from typing import Any

AXES_OF = {"v5e": 2, "v6e": 2, "v5p": 3}  # of a topology
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of v5e and v6e
TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # ask no server which machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock file would stop a second process
    "XLA_FLAGS": "",  # this machine's own compiler's, of which libtpu may refuse one
}
# A GPU as XLA's compiler reads it (`stream_executor/device_description.proto`).
COMMON = """
    threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
    block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
    registers_per_core_limit: 65536  registers_per_block_limit: 65536
    shared_memory_per_block: 49152"""
# NVIDIA's white papers and data sheets of A100 (80 GB), H100 and H200 SXM: multiprocessors, their
# lanes and shared memory, level-2 cache, clock, and what the driver says of the memory.
HOPPER = """
    core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
    shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448"""
AMPERE = """
    core_count: 108  fpus_per_core: 64  clock_rate_ghz: 1.41  l2_cache_size: 41943040
    shared_memory_per_core: 167936  shared_memory_per_block_optin: 166912"""
GPUS = {  # name, capability, multiprocessors, bytes a second, bytes
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), AMPERE, 2_039_000_000_000, 84_974_239_744),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), HOPPER, 3_352_320_000_000, 84_942_979_072),
    "h200": ("NVIDIA H200", (9, 0), HOPPER, 4_800_000_000_000, 150_000_000_000),
}
CUDNN = (9, 10, 0)  # that the described machine has


@dataclasses.dataclass(frozen=True)
class Topology:
    """`sizes` chips along each axis; of TPUs, `host` of them are one machine's."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def text(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

    @property
    def chips(self) -> int:
        return math.prod(self.sizes)

    @property
    def host(self) -> tuple[int, ...]:
        """2 x 4 or as many as there are, of the flat kinds; 2 x 2 of the others."""
        most = (2, 4) if len(self.sizes) == 2 else (2, 2, 1)
        return (*(min(n, m) for n, m in zip(self.sizes, most)), 1)[:3]

    @property
    def exists(self) -> bool:
        if self.gpu:
            return 1 <= self.chips <= 8
        if len(self.sizes) == 2:
            return "x".join(map(str, self.sizes)) in FLAT
        sides = all(n in (1, 2) or (n and n % 4 == 0) for n in self.sizes)
        return sides and self.sizes[0] > 1 and self.sizes[1] > 1 and self.chips <= 8960

    def devices(self) -> list[Any]:
        """Of the topology; needs its compiler, and its `environment`."""
        from jax.experimental import topologies

        if self.gpu:
            _told(GPUS[self.kind][1])
            found = topologies.get_topology_desc(
                platform="cuda", target_config=described(self.kind), topology=f"1x1x{self.chips}"
            )
        else:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=self.text, chips_per_host_bounds=self.host
            )
        return list(found.devices)

    def environment(self) -> dict[str, str]:
        """Of the process that compiles. ValueError where the compiler is not installed."""
        package, name = ("jax_plugins", "gpu") if self.gpu else ("libtpu", "tpu")
        folders = [path for root in _paths("nvidia") for path in sorted(root.iterdir())]
        tools = [path for path in folders if (path / "nvvm").is_dir()]
        if importlib.util.find_spec(package) is None or (self.gpu and not tools):
            what = "XLA's compiler of GPUs" if self.gpu else "libtpu, TPUs' compiler"
            raise ValueError(
                f"--target={self.text} needs {what}: pip install -r requirements-{name}-target.txt"
            )
        if not self.gpu:
            return TPU
        libraries = [*(f"{path}/lib" for path in folders), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "JAX_PLATFORMS": "cpu",
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={tools[0]}",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }


def _paths(package: str) -> list[pathlib.Path]:
    spec = importlib.util.find_spec(package)
    return [pathlib.Path(path) for path in (spec and spec.submodule_search_locations) or ()]


def described(kind: str) -> str:
    """A GPU and what is installed beside it, as a text proto."""
    name, (major, minor), numbers, bandwidth, memory = GPUS[kind]
    version = "major: {} minor: {} patch: {}".format(*CUDNN)
    return (
        f"gpu_device_info {{ {COMMON} {numbers} memory_bandwidth: {bandwidth} device_memory_size: "
        f"{memory} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ {version} }} device_description_str: "{name}"'
    )


def _told(capability: tuple[int, int]) -> None:
    """JAX asks the GPU that is here, for cuDNN's attention; in this process there is none."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def parsed(text):
        return tuple(int(n) for n in text.split("."))

    cudnn.check_cudnn_version = lambda: CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2]
    cudnn.check_compute_capability = lambda least: capability >= parsed(least)
    cudnn.is_cuda_compute_capability_equal = lambda one: capability == parsed(one)


def parse(text: str) -> Topology:
    """`v5e:2x4` or `h100:8`. ValueError for another kind, or one that cannot be laid out so."""
    kind, _, sizes = text.partition(":")
    if kind in GPUS:
        found = Topology(kind, (int(sizes),) if re.fullmatch(r"\d{1,3}", sizes) else (0,))
        if not found.exists:
            raise ValueError(f"--target={text} does not exist: {kind}:1 to {kind}:8 are a machine")
        return found
    if kind not in AXES_OF:
        kinds = ", ".join([*GPUS, *AXES_OF])
        raise ValueError(
            f"--target={text} is unknown: use {kinds} and a topology, such as h100:8 or v5e:2x4"
        )
    axes = AXES_OF[kind]
    if not re.fullmatch(r"\d{1,3}(x\d{1,3})" + f"{{{axes - 1}}}", sizes):
        shape, such = ("AxB", "2x4") if axes == 2 else ("AxBxC", "2x2x1")
        raise ValueError(f"--target={text}: a topology of {kind} is {shape}, such as {kind}:{such}")
    found = Topology(kind, tuple(int(n) for n in sizes.split("x")))
    if not found.exists:
        raise ValueError(
            f"--target={text} does not exist: {kind} comes as {', '.join(FLAT)}"
            if axes == 2
            else f"--target={text} does not exist: sides are 1, 2 or multiples of 4, 8,960 chips "
            "at most"
        )
    return found
