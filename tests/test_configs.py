"""Every config loads, locks, builds under `eval_shape`, and has the parameters it should."""

import importlib
import pathlib

import pytest
from ml_collections import config_flags  # noqa: F401  (the flag type that commands read)

from experiments import plan

NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)
# The parameters of the first, its default, argument and of the others.
ARGUMENTS = {
    "ddpm_fashion_mnist": ("cpu",),
    "ddpm_lsun256": ("bedroom", "cat"),
    "iddpm_cifar10": ("simple", "vlb"),
}
PARAMETERS = {
    "ddpm_cifar10": {"unet": 35_746_307},
    "ddpm_celebahq256": {"unet": 113_673_219},
    "ddpm_lsun256": {"unet": 113_673_219},
    "ddpm_lsun256:cat": {"unet": 113_673_219},
    "flow_cifar10": {"unet": 35_746_307},
    "digits_autoencoder": {"autoencoder": 926_356},
    "digits_classifier": {"classifier": 131_114},
    "digits_pixel": {"unet": 1_525_411},
}


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


@pytest.mark.parametrize(
    "name", [*NAMES, *(f"{name}:{arg}" for name, args in ARGUMENTS.items() for arg in args)]
)
def test_config_builds_and_counts(name):
    found = plan.plan(load(*name.split(":")))
    counts = {key: network["parameters"] for key, network in found["networks"].items()}
    for key, wanted in PARAMETERS.get(name, {}).items():
        assert counts[key] == wanted
    assert all(count > 0 for count in counts.values())
    assert found["flops_per_example"]["forward"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_smoke_run_and_says_how_to_run(name):
    smoke = load(name, "smoke")
    assert smoke.train.steps <= 10
    assert smoke.wandb.mode == "disabled"
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in text
    # The smoke run is of the same kind: it builds, too.
    assert plan.plan(smoke)["flops_per_example"]["forward"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_typo_in_a_key_is_an_error(name):
    config = load(name)
    with pytest.raises((AttributeError, KeyError)):
        config.train.stepz = 3
    with pytest.raises(ValueError, match="nonsense"):
        load(name, "nonsense")
