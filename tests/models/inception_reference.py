"""Run in a process of its own: torch-fidelity's and pytorch-fid's features of the same images.

    python inception_reference.py PACKAGES OUT

PACKAGES holds torchvision and both, apart from the environment (see lpips_reference.py). All
weights are random, drawn so that activations keep their size; they are saved as pytorch-fid's file
has them, and both packages read that. Then every metric of torch-fidelity on random features.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.benchmark.features_peer import import_alone, redraw

SIZES = (32, 64, 256, 299)


def images(size):
    """Noise on a slope, so that the way of resizing counts; odd sizes are not square."""
    rng = np.random.default_rng(size)
    slope = np.linspace(0, 160, size)[:, None] + np.linspace(0, 60, size)
    x = slope[None, ..., None] + rng.uniform(0, 35, (2, size, size, 3))
    return x.astype(np.uint8)


def features(out, found):
    from pytorch_fid import inception as pytorch_fid
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    path = out / "random.pth"
    wanted = ["2048", "logits_unbiased"]

    def no_download(*_, **__):
        return torch.load(path, weights_only=True)

    with torch.no_grad():
        bare = fidelity.FeatureExtractorInceptionV3.__new__(fidelity.FeatureExtractorInceptionV3)
        fidelity.load_state_dict_from_url = lambda *_, **__: {}
        fidelity.FeatureExtractorInceptionV3.load_state_dict = lambda *_: None
        bare.__init__("inception", wanted)
        redraw(bare)
        torch.save(bare.state_dict(), path)
        del fidelity.FeatureExtractorInceptionV3.load_state_dict
        first = fidelity.FeatureExtractorInceptionV3(
            "inception", wanted, feature_extractor_weights_path=path
        )
        spatial = []
        first.Mixed_6d.branch1x1.register_forward_hook(lambda *a: spatial.append(a[-1]))
        pytorch_fid.load_state_dict_from_url = no_download
        second = pytorch_fid.InceptionV3().eval()
        for size in SIZES:
            x = torch.from_numpy(images(size)).permute(0, 3, 1, 2)
            pool, logits = first(x)
            found |= {f"images{size}": images(size), f"torch-fidelity{size}": pool.numpy()}
            found[f"logits{size}"] = logits.numpy()
            rows_first = spatial.pop()[:, :7].permute(0, 2, 3, 1)
            found[f"spatial{size}"] = rows_first.reshape(len(x), -1).numpy()
            found[f"pytorch-fid{size}"] = second(x.float() / 255)[0].flatten(1).numpy()


def metrics(found):
    """torch-fidelity's four metrics of two sets of 64-dimensional features."""
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    rng = np.random.default_rng(7)
    mix = rng.normal(size=(64, 64)) / 8
    a = (rng.normal(size=(700, 64)) @ mix + 0.1).astype(np.float32)
    b = (rng.normal(size=(600, 64)) @ (mix + 0.02 * rng.normal(size=(64, 64)))).astype(np.float32)
    one, two = torch.from_numpy(a), torch.from_numpy(b)
    statistics = [metric_fid.fid_features_to_statistics(t.double()) for t in (one, two)]
    found |= {"a": a, "b": b}
    found["fid"] = metric_fid.fid_statistics_to_metric(*statistics, False)[
        "frechet_inception_distance"
    ]
    size = {"kid_subsets": 1, "kid_subset_size": 600, "verbose": False}
    # One subset of everything: whichever rows a generator picks, it is the same number.
    kid = metric_kid.kid_features_to_metric(one[:600].double(), two.double(), **size)
    found["kid"] = kid["kernel_inception_distance_mean"]
    found["isc"] = metric_isc.isc_features_to_metric(3 * one, 1, False)["inception_score_mean"]
    prc = metric_prc.prc_features_to_metric(one.double(), two.double(), verbose=False)
    found |= {key: prc[key] for key in ("precision", "recall")}


def main(packages, out):
    library = import_alone(packages)
    found = {}
    metrics(found)
    features(out, found)
    np.savez(out / "reference.npz", **found)
    del library


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
