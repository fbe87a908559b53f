"""Every config loads, locks, builds under `eval_shape`, and has the parameters it should."""

import importlib
import pathlib

import pytest
from ml_collections import config_flags  # noqa: F401  (the flag type that commands read)

from experiments.plan import cost as plan
from experiments.run import build

NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem != "__init__" and not path.stem.startswith("common")
)
# The parameters of the first, its default, argument and of the others.
ARGUMENTS = {
    "ddpm_fashion_mnist": ("cpu",),
    "ddpm_lsun256": ("bedroom", "cat"),
    "iddpm_cifar10": ("simple", "vlb"),
}
VQ_F4, KL_F8, CLIP_L = 55_322_782, 83_653_863, 123_060_480
# The published counts, where there are any; a config's argument stands after a colon.
PARAMETERS = {
    "ddpm_cifar10": {"unet": 35_746_307},
    "ddpm_celebahq256": {"unet": 113_673_219},
    "ddpm_lsun256": {"unet": 113_673_219},
    "ddpm_lsun256:cat": {"unet": 113_673_219},
    "flow_cifar10": {"unet": 35_746_307},
    "autoencoder_kl:f4": {"autoencoder": 55_312_063},
    "autoencoder_kl": {"autoencoder": 83_653_863},
    "autoencoder_kl:f8": {"autoencoder": 83_653_863, "discriminator": 2_765_633},
    "autoencoder_kl:f16": {"autoencoder": 69_610_963},
    "autoencoder_kl:f32": {"autoencoder": 103_880_131},
    "autoencoder_vq:f4": {"autoencoder": 55_322_782},
    "autoencoder_vq:f4_noattn": {"autoencoder": 53_219_486},
    "autoencoder_vq:f8": {"autoencoder": 67_717_295, "discriminator": 663_361},
    "autoencoder_vq:f8_n256": {"autoencoder": 67_717_295 - (16_384 - 256) * 4},
    "autoencoder_vq:f16": {"autoencoder": 69_593_371},
    "digits_autoencoder": {"autoencoder": 926_356},
    "digits_classifier": {"classifier": 131_114},
    "digits_pixel": {"unet": 1_525_411},
    "ldm_celebahq256": {"unet": 274_056_163, "autoencoder": VQ_F4},
    "ldm_ffhq256": {"unet": 274_056_163, "autoencoder": VQ_F4},
    "ldm_lsun256": {"unet": 274_056_163, "autoencoder": VQ_F4},
    "ldm_lsun256:churches": {"unet": 294_966_916, "autoencoder": KL_F8},
    "ldm_imagenet256": {"unet": 400_920_579, "class_embedder": 1001 * 512},
    "ldm_imagenet256:f8": {"unet": 394_984_196, "autoencoder": 67_717_295},
    "ldm_text": {"unet": 872_300_484, "text_encoder": 581_994_042, "autoencoder": KL_F8},
    "stable_diffusion": {"unet": 859_520_964, "autoencoder": KL_F8, "text_encoder": CLIP_L},
    "stable_diffusion:v2": {"unet": 865_910_724, "autoencoder": KL_F8},
    "stable_diffusion:lora": {"unet": 859_520_964, "lora": 797_184},
    "stable_diffusion:v1,controlnet": {"controlnet": 361_279_120},
}


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


CONFIGS = sorted(
    {*NAMES, *PARAMETERS, *(f"{name}:{arg}" for name, args in ARGUMENTS.items() for arg in args)}
)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_and_counts(name):
    _, state, frozen = plan.shapes(load(*name.split(":")))
    networks = plan.networks(state, frozen)
    counts = {key: network["parameters"] for key, network in networks.items()}
    for key, wanted in PARAMETERS.get(name, {}).items():
        assert counts[key] == wanted
    assert all(count > 0 for count in counts.values())


def train_flops(config):
    return plan.plan(config)["flops_per_example"]["train"]


def test_flops_are_of_the_papers_network_and_of_nothing_that_is_not_run():
    """Forward and backward of an image: 37.32 GFLOP by torch's FlopCounterMode of Diffusers'."""
    assert abs(train_flops(load("ddpm_cifar10")) / 37.32e9 - 1) < 0.02
    # The adaptive weight's way back to the last layer costs that layer alone.
    config = load("fashion_autoencoder").copy_and_resolve_references().unlock()
    whole = train_flops(config)
    config.loss.adversarial_weight = 0.0
    assert train_flops(config) == whole
    config.loss.adversarial = ""
    assert 1 < whole / train_flops(config) < 1.4


@pytest.mark.slow  # a minute of tracing
def test_what_is_frozen_and_not_stored_costs_its_forward_pass():
    """SD v1 at 512 pixels: 2,407 GFLOP the U-Net's step, 1,117 the first stage's encoder."""
    stored, online = (train_flops(load("stable_diffusion", a)) for a in ("v1", "v1,online"))
    assert abs(stored / 2407e9 - 1) < 0.02
    assert abs((online - stored) / 1117e9 - 1) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_smoke_run_and_says_how_to_run(name):
    smoke = load(name, "smoke")
    planned = plan.plan(smoke)  # its steps are traced
    assert sum(network["parameters"] for network in planned["networks"].values()) < 4e6
    assert smoke.train.steps <= 10
    assert smoke.wandb.mode == "disabled"
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in text
    cost = planned["flops_per_example"]
    assert 0 < cost["forward"] < cost["train"]


@pytest.mark.parametrize("name", NAMES)
def test_a_typo_in_a_key_is_an_error(name):
    config = load(name)
    with pytest.raises((AttributeError, KeyError)):
        config.train.stepz = 3
    with pytest.raises(ValueError, match="nonsense"):
        load(name, "nonsense")


def test_words_of_an_argument_combine_and_contradictions_are_refused():
    config = load("stable_diffusion", "v2,lora,smoke")
    assert config.model.unet.linear_projection and "lora" in config.model
    assert "controlnet" in load("stable_diffusion", "controlnet,smoke").model
    assert load("stable_diffusion", "v1,lora").latents.contexts
    assert "latents" not in load("stable_diffusion", "online,controlnet")
    for wrong in ("lora,controlnet", "v1,v2", "lora,v3"):
        with pytest.raises(ValueError, match=wrong.split(",")[1]):
            load("stable_diffusion", wrong)


def test_two_adapters_or_none_to_start_from_are_refused():
    config = load("stable_diffusion", "lora,smoke").copy_and_resolve_references().unlock()
    config.init_from = ""
    with pytest.raises(ValueError, match="init_from"):
        plan.plan(config)
    config.init_from = "somewhere"
    config.model.controlnet = {"hint_widths": (8, 8, 8, 8)}
    with pytest.raises(ValueError, match="one at a time"):
        plan.plan(config)


def test_the_text_encoder_is_trained_where_the_config_says_so():
    assert build.trained(load("ldm_text")) == ("unet", "text_encoder")
    assert build.trained(load("stable_diffusion")) == ("unet",)
    assert build.trained(load("ldm_imagenet256")) == ("unet", "class_embedder")
    assert build.null_label(load("ldm_imagenet256")) == 1000
