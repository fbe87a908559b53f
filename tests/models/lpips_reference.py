"""Run in a process of its own: the `lpips` package's distances, and its weights in files.

    python lpips_reference.py PACKAGES OUT

PACKAGES holds torchvision and lpips, apart from the environment: where Transformers finds a
torchvision it imports it, and its compiled part does not load beside a CPU torch. Only the names of
the operators are wanted of that part.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.benchmark.features_peer import import_alone


def model(packages):
    """LPIPS on VGG-16, all its weights redrawn; the heads' are none of them negative."""
    library = import_alone(packages)
    import lpips

    made = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 10
        drawn = torch.randn(parameter.shape, generator=generator)
        drawn = drawn.abs() if parameter.shape[0] == 1 else drawn
        parameter.data.copy_(drawn * (2 / fan_in) ** 0.5)
    return made, library


def images(channels):
    rng = np.random.default_rng(channels)
    x = rng.uniform(-1, 1, (2, 24, 32, channels)).astype(np.float32)
    return x, np.clip(x + 0.3 * rng.normal(size=x.shape), -1, 1).astype(np.float32)


def main(packages, out):
    made, _library = model(packages)
    tensors, found = made.state_dict(), {}
    # net.slice3.14.weight is torchvision's features.14.weight; a classifier stands beside.
    vgg = {"classifier.0.weight": torch.zeros(3, 2), "classifier.0.bias": torch.zeros(3)}
    for name, tensor in tensors.items():
        if name.startswith("net.slice"):
            vgg[f"features.{name.split('.', 2)[2]}"] = tensor
    heads = {f"lin{i}.model.1.weight": tensors[f"lin{i}.model.1.weight"] for i in range(5)}
    torch.save(vgg, out / "vgg16.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, out / "heads.pth")
    for channels in (1, 3):
        pair = images(channels)
        first, second = (
            torch.from_numpy(np.moveaxis(np.broadcast_to(a, (*a.shape[:3], 3)), -1, 1).copy())
            for a in pair
        )
        with torch.no_grad():
            distances = made(first, second).numpy().ravel()
        found |= {f"x{channels}": pair[0], f"y{channels}": pair[1], f"d{channels}": distances}
    np.savez(out / "reference.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
