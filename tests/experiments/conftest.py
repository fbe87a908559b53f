"""One smoke run of the whole default job, shared by every test of the commands.

The commands see one device here: eight fake ones would compile everything eight ways, and the modes
are compared in tests/training.
"""

import pathlib

import jax
import pytest

from experiments import quickstart


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> pathlib.Path:
    """A folder in which the default job ran for a few steps: autoencoder, classifier, ldm."""
    root = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        see_one_device(patch)
        quickstart.quickstart(root, smoke=True)
    return root


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    see_one_device(monkeypatch)


def see_one_device(patch) -> None:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
