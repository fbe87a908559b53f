"""One smoke run of the whole default job, shared by every test of the commands.

The commands see one device here: eight fake ones would compile everything eight ways, and the modes
are compared in tests/training.
"""

import pathlib

import jax
import pytest

from experiments import quickstart


@pytest.fixture(scope="session", autouse=True)
def one_device():
    patch = pytest.MonkeyPatch()
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def job(one_device, tmp_path_factory) -> pathlib.Path:
    """A folder in which the default job ran for a few steps: autoencoder, classifier, ldm."""
    root = tmp_path_factory.mktemp("quickstart")
    quickstart.quickstart(root, smoke=True)
    return root
