"""pytorch-fid's side of `--suite=features`; imports nothing of ours but the workload.

    python -m experiments.benchmark.features_peer gate|measure DIR < work.json

pytorch-fid lies in `.venv/alone` (requirements-alone.txt), which `./launch/test.sh` makes.
"""

import json
import pathlib
import sys
import warnings
from typing import Any

import numpy as np
import torch

from experiments.benchmark.workload import INPUTS, resident_bytes, timed

PACKAGES = pathlib.Path(sys.prefix) / "alone"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of torchvision's compiled part, which does not load beside a CPU torch, only the names are wanted.
OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward"),
    *("roi_pool", "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)


def import_alone(packages: pathlib.Path | str = PACKAGES) -> torch.library.Library:
    """Makes what `packages` holds importable; keep what it returns. OSError where there is none."""
    if not pathlib.Path(packages).is_dir():
        raise OSError(f"{packages} is missing: ./launch/test.sh makes it (requirements-alone.txt)")
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    sys.path.insert(0, str(packages))
    warnings.simplefilter("ignore")
    return library


def redraw(network: torch.nn.Module) -> None:
    """Every weight and moment at random, none of them at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("bn.weight", "running_var")):
            drawn = 1 + 0.2 * drawn.clamp(-2, 2)
        elif tensor.ndim > 1:
            drawn = drawn * (2 / tensor[0].numel()) ** 0.5
        else:
            drawn = 0.1 * drawn
        tensor.copy_(drawn)


def write_weights(path: pathlib.Path) -> None:
    """Random weights as pytorch-fid's file has them."""
    library = import_alone()
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *_, **__: {}
    kept = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda *_, **__: None
    try:
        network = inception.fid_inception_v3()
    finally:
        torch.nn.Module.load_state_dict = kept
    with torch.no_grad():
        redraw(network)
    torch.save(network.state_dict(), path)
    del library


def load(directory: pathlib.Path) -> torch.nn.Module:
    from pytorch_fid import inception

    weights = torch.load(directory / "random.pth", weights_only=True)
    inception.load_state_dict_from_url = lambda *_, **__: weights
    return inception.InceptionV3().eval().to(DEVICE)


def features(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(images.permute(0, 3, 1, 2).float() / 255)[0].flatten(1)


def gate(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    given, network = np.load(directory / INPUTS), load(directory)
    wanted = features(network, torch.from_numpy(given["x"][:2]).to(DEVICE)).cpu().numpy()
    error = np.linalg.norm(given["out"] - wanted) / np.linalg.norm(wanted)
    return {"output": float(error)}


def measure(work: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    before = resident_bytes()
    network = load(directory)
    images = torch.from_numpy(np.load(directory / INPUTS)["x"]).to(DEVICE)
    cuda = DEVICE == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    found = timed(lambda: features(network, images), wait, work)
    return found | {
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident_bytes() - before,
        "resident_bytes": resident_bytes(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__},
    }


if __name__ == "__main__":
    keep = import_alone()
    do = {"gate": gate, "measure": measure}[sys.argv[1]]
    print(json.dumps(do(json.load(sys.stdin), pathlib.Path(sys.argv[2]))))
