"""One smoke run of the whole default job, shared by every test of the commands.

The commands see one device here: eight fake ones would compile everything eight ways, and the modes
are compared in tests/training.
"""

import importlib.util
import pathlib
import shutil
import subprocess

import jax
import pytest

from experiments.convert import __main__ as convert
from experiments.host import cli
from experiments.quickstart import digits


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> pathlib.Path:
    """A folder in which the default job ran for a few steps: autoencoder, classifier, ldm."""
    root = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        see_one_device(patch)
        digits.quickstart(root, smoke=True)
    return root


@pytest.fixture(scope="session")
def sd():
    """The module beside this file that makes a tiny Stable Diffusion; it imports torch."""
    path = pathlib.Path(__file__).with_name("tiny_stable_diffusion.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference(sd, tmp_path_factory):
    """Diffusers' pipeline, tiny and random, and the directory that it was saved to."""
    directory = tmp_path_factory.mktemp("diffusers") / "pipeline"
    return sd.pipeline(directory), directory


@pytest.fixture(scope="session")
def converted(reference, tmp_path_factory):
    """Its workdir."""
    target = tmp_path_factory.mktemp("converted") / "run"
    argv = ("--from=diffusers", f"--source={reference[1]}", f"--workdir={target}")
    assert cli.run(convert.define, convert.main, argv) == 0
    return target


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture
def browser(tmp_path):
    """browser(*flags, address): what Chromium writes of a page; skips where there is none."""

    def look(*flags: str) -> str:
        names = ("chromium", "chromium-browser", "chrome", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip("no Chromium on the PATH: the page was not looked at in a browser")
        argv = [found, *FLAGS, f"--user-data-dir={tmp_path}/profile"]
        argv += ["--virtual-time-budget=60000", *flags]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return look


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    see_one_device(monkeypatch)


def see_one_device(patch) -> None:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
