"""Inception against torch-fidelity and pytorch-fid, every weight random; its file, and refusals."""

import hashlib
import http.server
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.interop import inception as files
from diffusion.metrics import frechet, inception_score, kernel, precision_recall
from diffusion.models.inception import PREPROCESSINGS, Inception, preprocess

PACKAGES = pathlib.Path(sys.prefix) / "alone"  # launch/environment.sh: requirements-alone.txt
SIZES = (32, 64, 256, 299)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with random weights as they are published, and features and metrics by them."""
    assert (PACKAGES / "torch_fidelity").is_dir(), f"{PACKAGES}: ./launch/test.sh makes it"
    root = tmp_path_factory.mktemp("inception")
    script = pathlib.Path(__file__).with_name("inception_reference.py")
    subprocess.run([sys.executable, script, PACKAGES, root], check=True)
    return root


@pytest.fixture(scope="module")
def reference(folder):
    return np.load(folder / "reference.npz")


@pytest.fixture(scope="module")
def params(folder):
    return files.load_inception(folder / "random.pth")[0]


@pytest.fixture(scope="module")
def features(reference, params):
    """Of all sizes and both preprocessings in one batch: the network is compiled once."""
    cases = [(name, size) for name in PREPROCESSINGS for size in SIZES]
    x = np.concatenate([preprocess(reference[f"images{size}"], name) for name, size in cases])
    found = jax.jit(lambda p, x: Inception().apply({"params": p}, x))(params, x)
    split = {key: np.split(np.asarray(value), len(cases)) for key, value in found.items()}
    return {case: {k: v[i] for k, v in split.items()} for i, case in enumerate(cases)}


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("size", SIZES)
def test_features_match(reference, features, name, size):
    wanted = reference[f"{name}{size}"]
    assert error(features[name, size]["pool"], wanted) < TOLERANCE
    # Two images are told apart by far more than the tolerance.
    assert error(wanted[0], wanted[1]) > 10 * TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_spatial_features_match_torch_fidelity(reference, features, size):
    found = features["torch-fidelity", size]
    assert found["spatial"].shape == (2, 2023)
    for key in ("logits", "spatial"):
        assert error(found[key], reference[f"{key}{size}"]) < TOLERANCE


def test_the_two_preprocessings_differ(features):
    a, b = (features[name, 32]["pool"] for name in PREPROCESSINGS)
    assert error(a, b) > 10 * TOLERANCE


def test_metrics_of_the_same_features_match_torch_fidelity(reference):
    a, b = reference["a"], reference["b"]
    distance = frechet.frechet_distance(*(frechet.feature_statistics(x) for x in (a, b)))
    kid = kernel.kernel_distance(a[:600], b, subsets=1, subset_size=600)
    score = inception_score.inception_score(3 * a, splits=1, replicates=2)
    near = precision_recall.precision_recall(a, b)
    found = {"fid": distance, "kid": kid.value, "isc": score.value}
    found |= {"precision": near.precision, "recall": near.recall}
    for key, value in found.items():
        assert value == pytest.approx(float(reference[key]), rel=TOLERANCE), key
    assert 0.05 < near.precision < 0.999 and near.precision != pytest.approx(near.recall, abs=0.01)


def test_grey_images_are_seen_as_rgb(reference):
    grey = reference["images32"][..., :1]
    np.testing.assert_array_equal(preprocess(grey), preprocess(np.repeat(grey, 3, axis=-1)))


def test_what_it_cannot_see_is_refused():
    with pytest.raises(ValueError, match="4 channels"):
        preprocess(np.zeros((1, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="'bicubic' is unknown: use torch-fidelity or pytorch-fid"):
        preprocess(np.zeros((1, 8, 8, 3), np.uint8), "bicubic")


# -- the file ------------------------------------------------------------------------------------


def test_safetensors_hold_the_same(folder, params, tmp_path):
    tensors = torch.load(folder / "random.pth", weights_only=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "random.safetensors")
    again, sha256 = files.load_inception(tmp_path / "random.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with (tmp_path / "random.safetensors").open("rb") as file:
        assert sha256 == hashlib.file_digest(file, "sha256").hexdigest() != files.SHA256


def test_the_published_name_promises_the_published_hash(folder, tmp_path):
    shutil.copy(folder / "random.pth", tmp_path / files.NAME)
    with pytest.raises(ValueError, match=r"6726825d\.pth has the SHA-256 .*, not 6726825d"):
        files.load_inception(tmp_path / files.NAME)


def test_another_network_is_refused(folder, tmp_path):
    tensors = torch.load(folder / "random.pth", weights_only=True)
    del tensors["Mixed_7c.branch_pool.conv.weight"]
    torch.save(tensors, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"no tensor Mixed_7c\.branch_pool\.conv\.weight"):
        files.load_inception(tmp_path / "short.pth")
    tensors["other.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"more\.pth holds other\.weight"):
        files.load_inception(tmp_path / "more.pth")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A local server in the publisher's place; the cache is a new folder."""
    site = tmp_path / "site"
    site.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(site))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "URLS", (f"http://127.0.0.1:{server.server_port}/{files.NAME}",))
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_first_use_downloads_and_the_second_does_not(served, monkeypatch):
    (served / files.NAME).write_bytes(b"weights")
    monkeypatch.setattr(files, "SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(files, "NAME", "weights.pth")  # whose name promises no digits
    path = files.cache_directory() / "weights.pth"
    assert files.published() == path and path.read_bytes() == b"weights"
    for published in served.iterdir():
        published.unlink()
    assert files.published() == path
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"weights\.pth has the SHA-256"):
        files.published()


def test_a_download_of_other_bytes_is_refused_and_not_kept(served):
    (served / files.NAME).write_bytes(b"not the weights")
    with pytest.raises(ValueError, match=f"not {files.SHA256}"):
        files.published()
    assert not [p for p in files.cache_directory().rglob("*") if p.is_file()]


def test_without_file_or_network_the_error_names_file_hash_and_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(files, "URLS", ("http://127.0.0.1:9/none.pth",))
    with pytest.raises(ValueError, match=f"{files.NAME}.*{files.SHA256}.*--inception_weights=FILE"):
        files.published()
