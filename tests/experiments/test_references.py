"""Reference files of every kind, on a feature network that is a random projection."""

import json

import numpy as np
import pytest

from diffusion.metrics import frechet
from experiments.evaluate import references
from experiments.evaluate.features import FeatureNetwork

PROJECTION = np.random.default_rng(9).normal(size=(8 * 8 * 3, 10)) / 100


def run(images):
    found = images.reshape(len(images), -1).astype(np.float64) @ PROJECTION
    return {"pool": found[:, :6].astype(np.float32), "spatial": found[:, 6:].astype(np.float32)}


NETWORK = FeatureNetwork("inception", "hash", "as it is", 6, ("pool", "spatial"), run)


def pictures(count=40, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def close(found, mean, covariance):
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10)


def test_guided_diffusions_batch_keeps_its_own_statistics(tmp_path):
    """mu and sigma are of the whole data set, arr_0 a part of it."""
    path, rng = tmp_path / "VIRTUAL.npz", np.random.default_rng(1)
    mu, mu_s = rng.normal(size=6), rng.normal(size=4)
    sigma, sigma_s = np.cov(rng.normal(size=(6, 50))), np.cov(rng.normal(size=(4, 50)))
    images = pictures()
    np.savez(path, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = references.read(path, NETWORK, {}, (8, 8, 3), seen=True)
    close(found.of("pool"), mu, sigma)
    close(found.of("spatial"), mu_s, sigma_s)
    np.testing.assert_array_equal(found.points(), run(images)["pool"])
    assert found.identity["unchecked"] == ["data", "preprocessing", "features"]


def test_images_alone_are_seen(tmp_path):
    images = pictures()
    np.savez(tmp_path / "images.npz", images)
    found = references.read(tmp_path / "images.npz", NETWORK, {}, (8, 8, 3))
    for key in ("pool", "spatial"):
        x = run(images)[key].astype(np.float64)
        close(found.of(key), x.mean(0), np.cov(x, rowvar=False))
    with pytest.raises(ValueError, match=r"is of images of \(8, 8\) pixels, the samples are"):
        references.read(tmp_path / "images.npz", NETWORK, {}, (32, 32, 3))


def test_what_is_written_comes_back(tmp_path):
    rows = run(pictures())
    made_from = {"data": "cifar10", "split": "train"}
    made_from["preprocessing"] = {"image_size": 8, "channels": 3, "fit": "crop"}
    statistics = {key: frechet.feature_statistics(value) for key, value in rows.items()}
    identity = {**made_from, "features": NETWORK.identity()}
    reference = references.Reference(statistics, rows["pool"], 40, identity)
    path = tmp_path / "new" / "reference.npz"
    references.write(path, reference)
    found = references.read(path, NETWORK, made_from, (8, 8, 3))
    for key, value in statistics.items():
        close(found.of(key), value.mean, value.covariance)
    assert found.count == 40 and found.identity["file"] == "reference.npz"
    np.testing.assert_array_equal(found.points(), rows["pool"])
    with np.load(path) as file:  # as pytorch-fid would read it
        assert file["mu"].shape == (6,) and file["sigma"].shape == (6, 6)
        assert json.loads(str(file["identity"]))["data"] == "cifar10"
    other = {**made_from, "split": "test"}
    with pytest.raises(ValueError, match="split='train', but split='test'"):
        references.read(path, NETWORK, other, None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "of 5 features, the network inception has 6"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"sigma is \[5, 5\] for 6 means"),
        ({"identity": "{"}, "does not say what it is of .*make it again"),
        ({"identity": "[]", "count": 1}, "does not say what it is of .*make it again"),
        ({"mean": np.zeros(6)}, "has the arrays mean: a reference has mu and sigma"),
        ({"arr_0": np.zeros((3, 8, 8, 3))}, "arr_0 is float64"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        references.read(tmp_path / "wrong.npz", NETWORK, {})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wrong.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.npz is truncated"):
        references.read(tmp_path / "cut.npz", NETWORK, {})


def test_what_a_reference_lacks_is_said_when_it_is_wanted(tmp_path):
    np.savez(tmp_path / "public.npz", mu=np.zeros(6), sigma=np.eye(6))
    found = references.read(tmp_path / "public.npz", NETWORK, {})
    with pytest.raises(ValueError, match=r"public\.npz has no mu_s and sigma_s"):
        found.of("spatial")
    with pytest.raises(ValueError, match="mu and sigma alone"):
        found.points()
