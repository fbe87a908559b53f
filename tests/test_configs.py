"""Every config loads, locks, builds under `eval_shape`, and has the parameters it should."""

import ast
import importlib
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from ml_collections import config_flags  # noqa: F401  (the flag type that commands read)

from experiments.plan import cost as plan
from experiments.run import build, given

NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem != "__init__" and not path.stem.startswith("common")
)
VQ_F4, VQ_F8, KL_F8, CLIP_L, CLIP_H = 55_322_782, 67_717_295, 83_653_863, 123_060_480, 340_387_840
LDM_256, SD_V1, SD_V2 = 274_056_163, 859_520_964, 865_910_724
KL_GAN = {"discriminator": 2_765_633}
VQ_GAN = {"discriminator": 663_361}  # of two layers
DIGITS = {"denoiser": 1_502_244, "text_encoder": 119_712, "autoencoder": 926_356}
V1 = {"denoiser": SD_V1, "text_encoder": CLIP_L, "autoencoder": KL_F8}
XL = {"denoiser": 2_567_463_684, "text_encoder": CLIP_L + 694_659_840, "autoencoder": KL_F8}
V2 = {"denoiser": SD_V2, "text_encoder": CLIP_H, "autoencoder": KL_F8}
DIT = {"xl2": 674_834_720, "s2": 32_865_056, "b2": 130_315_808, "l2": 457_840_672}  # published
DIT["b4"] = 130_426_496
SIT_WIDTHS = {"xl": 1152, "l": 1024, "b": 768, "s": 384}
DIGITS_TRANSFORMER = 2_307_596
DDPMPP = 55_733_891  # EDM's, without labels: of NVlabs/edm's own class
FORECAST = 49_345
FOLDER = {"text_encoder": 23_149_056, "autoencoder": KL_F8}
# CLIP's and OpenCLIP's with their projections, T5's encoder; a first stage of 16 channels
SD3 = {"text_encoder": 5_580_620_800, "autoencoder": 83_819_683}
DIGITS_TOLD = 1_522_980  # a second time
# Every network of every config and argument (after a colon; the first argument is the default).
# Those of DDPM, LDM, Stable Diffusion, its adapters and text encoders, and of PatchGAN are the
# published counts; the others are this project's own networks, written down so as not to drift.
PARAMETERS = {
    "autoencoder_kl:f8": {"autoencoder": KL_F8, **KL_GAN},
    "autoencoder_kl:f4": {"autoencoder": 55_312_063, **KL_GAN},
    "autoencoder_kl:f16": {"autoencoder": 69_610_963, **KL_GAN},
    "autoencoder_kl:f32": {"autoencoder": 103_880_131, **KL_GAN},
    "autoencoder_vq:f4": {"autoencoder": VQ_F4, **KL_GAN},
    "autoencoder_vq:f4_noattn": {"autoencoder": 53_219_486, **KL_GAN},
    "autoencoder_vq:f8": {"autoencoder": VQ_F8, **VQ_GAN},
    "autoencoder_vq:f8_n256": {"autoencoder": VQ_F8 - (16_384 - 256) * 4, **KL_GAN},
    "autoencoder_vq:f16": {"autoencoder": 69_593_371, **VQ_GAN},
    "ddpm_celebahq256": {"denoiser": 113_673_219},
    "ddpm_cifar10:eps": {"denoiser": 35_746_307},
    "ddpm_cifar10:mu": {"denoiser": 35_746_307},
    # of one channel for three: the first and the last convolution are narrower
    "ddpm_fashion_mnist:gpu": {"denoiser": 35_746_307 - 2 * 9 * 128 - 2 * (9 * 128 + 1)},
    "ddpm_fashion_mnist:cpu": {"denoiser": 627_433},
    "ddpm_lsun256:church": {"denoiser": 113_673_219},
    "ddpm_lsun256:bedroom": {"denoiser": 113_673_219},
    "ddpm_lsun256:cat": {"denoiser": 113_673_219},
    "ddpm_lsun256:bedroom_large": {"denoiser": 255_677_955},
    **{
        f"adm_imagenet:{size}": {"denoiser": count}
        for size, count in {  # of guided-diffusion's own classes
            "64": 295_904_454,
            "128": 421_529_606,
            "256": 553_838_086,
            "512": 558_997_638,
            "64_256": 311_795_910,
            "128_512": 308_835_270,
        }.items()
    },
    "adm_classifier:64": {"classifier": 65_438_568},
    "adm_classifier:128": {"classifier": 42_568_040},
    "adm_classifier:256": {"classifier": 54_096_360},
    "adm_classifier:512": {"classifier": 54_448_360},
    "adm_classifier:digits": {"classifier": 563_082},
    "adm_classifier:fashion_latents": {"classifier": 379_050},
    "digits_autoencoder": {"autoencoder": 926_356},
    "digits_classifier": {"classifier": 131_114},
    "digits_controlnet": {**DIGITS, "controlnet": 872_080},
    "digits_lora": {**DIGITS, "lora": 31_488},
    "digits_pixel": {"denoiser": 1_525_411},
    **{
        f"dit_imagenet256:{size}": {"denoiser": count, "autoencoder": KL_F8}
        for size, count in DIT.items()
    },
    **{  # the last layer puts out 4 values a place, not 8
        f"sit_imagenet256:{size}": {
            "denoiser": count - 4 * (SIT_WIDTHS[size[:-1]] + 1) * int(size[-1]) ** 2,
            "autoencoder": KL_F8,
        }
        for size, count in DIT.items()
    },
    "digits_gan": {"denoiser": 1_322_500, "autoencoder": DIGITS["autoencoder"]},
    "digits_ldm:unet": DIGITS,
    "digits_ldm:transformer": {**DIGITS, "denoiser": DIGITS_TRANSFORMER},
    "distil_digits:jumps": {**DIGITS, "denoiser": DIGITS_TOLD, "teacher": DIGITS["denoiser"]},
    "distil_digits:progressive": {**DIGITS, "teacher": DIGITS["denoiser"]},
    "distil_digits:consistency": {**DIGITS, "teacher": DIGITS["denoiser"]},
    **{f"ect_cifar10:{method}": {"denoiser": DDPMPP} for method in ("ect", "ict", "scm")},
    "edm_cifar10:uncond": {"denoiser": DDPMPP},
    "edm_cifar10:cond": {"denoiser": DDPMPP + 11 * 128},
    # 128 frequencies that are not trained, which PyTorch does not count
    "edm_cifar10:uncond,ncsnpp": {"denoiser": 56_397_827 + 128},
    "fashion_autoencoder": {"autoencoder": 396_404, "discriminator": 42_545},
    "fashion_classifier": {"classifier": 174_122},
    "fashion_ldm:unet": {"denoiser": 1_323_908, "autoencoder": 396_404},
    "fashion_ldm:sit": {"denoiser": 1_871_372, "autoencoder": 396_404},
    "flow_cifar10:ot": {"denoiser": 35_746_307},
    "flow_cifar10:rf": {"denoiser": 61_804_419},
    "folder_ldm:unet": {"denoiser": 138_259_716, **FOLDER},
    "folder_ldm:pixart": {"denoiser": 118_764_304, **FOLDER},
    "forecast": {"denoiser": FORECAST},
    "iddpm_cifar10:hybrid": {"denoiser": 52_542_979 + 3 * (9 * 128 + 1)},  # a variance beside eps
    "iddpm_cifar10:simple": {"denoiser": 52_542_979},
    "iddpm_cifar10:vlb": {"denoiser": 52_542_979 + 3 * (9 * 128 + 1)},
    "jit_imagenet256:b16": {"denoiser": 131_123_712},  # 131 M and 459 M in the paper
    "jit_imagenet256:l16": {"denoiser": 458_877_664},
    "iddpm_imagenet64:hybrid": {"denoiser": 121_063_942},
    "iddpm_imagenet64:vlb": {"denoiser": 121_063_942},
    "iddpm_imagenet64:cond": {"denoiser": 273_049_350},
    "iddpm_imagenet64:upsampler": {"denoiser": 279_792_390},  # of the authors' own class
    "ldm_celebahq256": {"denoiser": LDM_256, "autoencoder": VQ_F4},
    "ldm_ffhq256": {"denoiser": LDM_256, "autoencoder": VQ_F4},
    "ldm_imagenet256:f4": {
        "denoiser": 400_920_579,
        "class_embedder": 1001 * 512,
        "autoencoder": VQ_F4,
    },
    "ldm_imagenet256:f8": {
        "denoiser": 394_984_196,
        "class_embedder": 1000 * 512,
        "autoencoder": VQ_F8,
    },
    "ldm_inpainting:places": {"denoiser": 387_245_827, "autoencoder": 53_219_486},
    "ldm_inpainting:digits": {"denoiser": 1_323_940, "autoencoder": DIGITS["autoencoder"]},
    "ldm_inpainting:pixels": {"denoiser": 627_433 + 2 * 9 * 24},  # two channels beside x_t's
    "ldm_super_resolution:openimages": {"denoiser": 113_622_563, "autoencoder": VQ_F4},
    "ldm_super_resolution:digits": {"denoiser": 1_323_364, "autoencoder": DIGITS["autoencoder"]},
    "ldm_super_resolution:fashion_latents": {"denoiser": 1_322_788, "autoencoder": 396_404},
    "ldm_super_resolution:fashion": {"denoiser": 627_433 + 9 * 24},
    "ldm_lsun256:beds": {"denoiser": LDM_256, "autoencoder": VQ_F4},
    "ldm_lsun256:churches": {"denoiser": 294_966_916, "autoencoder": KL_F8},
    # without the augmentation's label, with a second time
    "meanflow_cifar10": {"denoiser": DDPMPP - 9 * 128 + 128 * 512 + 512 + 512 * 512 + 512},
    "meanflow_fashion:scratch": {"denoiser": 1_344_644, "autoencoder": 396_404},
    "meanflow_fashion:tuned": {
        **dict.fromkeys(("denoiser", "teacher"), 1_323_908),
        "autoencoder": 396_404,
    },
    "meanflow_fashion:distilled": {
        "denoiser": 1_344_644,
        "teacher": 1_323_908,
        "autoencoder": 396_404,
    },
    # SiT's (`sit_imagenet256`, above) and a second time
    **{
        f"meanflow_imagenet256:{size}": {"denoiser": count, "autoencoder": KL_F8}
        for size, count in {
            "xl2": 674_816_272 + (256 + 1152 + 2) * 1152,
            "b4": 130_377_280 + (256 + 768 + 2) * 768,
        }.items()
    },
    "meanflow_digits:tuned": {**DIGITS, "denoiser": DIGITS_TOLD, "teacher": DIGITS["denoiser"]},
    "meanflow_digits:scratch": {**DIGITS, "denoiser": DIGITS_TOLD},
    "ldm_layout:openimages": {
        "denoiser": 246_277_379,
        "text_encoder": 58_858_496,
        "autoencoder": VQ_F4,
    },
    "ldm_layout:digits": {
        "denoiser": 2_186_020,
        "text_encoder": 322_368,
        "autoencoder": DIGITS["autoencoder"],
    },
    "ldm_semantic:landscapes": {
        "denoiser": 215_229_315,
        "rescaler": 182 * 3,
        "autoencoder": VQ_F4,
    },
    "ldm_semantic:digits": {
        "denoiser": 1_324_804,
        "rescaler": 11 * 8,
        "autoencoder": DIGITS["autoencoder"],
    },
    "ldm_text:laion": {"denoiser": 872_300_484, "text_encoder": 581_994_042, "autoencoder": KL_F8},
    "ldm_text:cc": {
        "denoiser": 403_623_939,
        "text_encoder": 186_154_682,
        "autoencoder": VQ_F4,
    },
    # SiT's, a projection, and DINOv2's less its mask token (published: 86,580,480)
    "repa:imagenet256": {
        "denoiser": 674_816_272,
        "projector": 8_131_328,
        "features": 86_580_480 - 768,
        "autoencoder": KL_F8,
    },
    "repa:digits": {
        **DIGITS,
        "denoiser": DIGITS_TRANSFORMER,
        "projector": 123_488,
        "features": 75_104,
    },
    "signal_ddpm": {"denoiser": 726_305},
    "stable_diffusion:v1": V1,
    "stable_diffusion:v2": V2,
    "stable_diffusion:xl": XL,  # both text encoders; published: diffusers' and transformers'
    # Diffusers' SD3Transformer2DModel counts as much
    "stable_diffusion_3:medium": {"denoiser": 2_028_328_000, **SD3},
    "stable_diffusion_3:medium_35": {"denoiser": 2_243_171_520, **SD3},
    "stable_diffusion_3:large_35": {"denoiser": 8_056_627_520, **SD3},
    "stable_diffusion:online": V1,
    "stable_diffusion:textual_inversion": {**V1, "words": 768},
    "stable_diffusion:dreambooth": V1,
    "stable_diffusion:lora": {**V1, "lora": 797_184},
    "stable_diffusion:v2,lora": {**V2, "lora": 829_952},
    "stable_diffusion:v1,lcm": {**V1, "denoiser": SD_V1 + 256 * 320, "teacher": SD_V1},
    "stable_diffusion:v1,lcm,lora": {**V1, "lora": 23_937_024},
    "stable_diffusion:v1,controlnet": {**V1, "controlnet": 361_279_120},
    "stable_diffusion:v2,controlnet": {**V2, "controlnet": 364_228_240},
    "video_autoencoder": {"autoencoder": 1_371_304},
    "video_digits:unet": {"denoiser": 732_337},
    "video_digits:latent": {"denoiser": 2_359_448, "autoencoder": 1_371_304},
    "video_digits:transformer": {"denoiser": 2_366_384},
}


@pytest.fixture(autouse=True, scope="module")
def each_network_is_traced_once():
    """Configs share networks, and a state's are traced again for what is frozen beside it."""
    trace, known = nn.Module.init, {}

    def init(module, *arguments, **options):
        given = (jax.tree.map(jax.typeof, a) for a in (arguments, options))
        key = repr((module, *given))
        if key not in known:
            known[key] = jax.eval_shape(lambda: trace(module, *arguments, **options))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "init", init)
        yield


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_stands_in_the_table(name):
    """The words that a config takes are read from its refusal of another."""
    with pytest.raises(ValueError, match="nonsense") as refused:
        load(name, "nonsense")
    said = re.search(r"use one of (\[.*?\])[^;]*(?:; with it may go (.*))?$", str(refused.value))
    switches = (said[2] or "").split(", ") if said[2] else []
    words = {*ast.literal_eval(said[1]), *switches} - {"smoke"}
    here = {key.split(":")[1] for key in PARAMETERS if key.startswith(f"{name}:")}
    assert {word for key in here for word in key.split(",")} == words
    assert (name in PARAMETERS) == (not words)


# The same networks as another's, in another combination; ten seconds of tracing each.
COMBINED = (
    "repa:imagenet256",
    "stable_diffusion:online",
    "stable_diffusion:dreambooth",
    "stable_diffusion:v2,lora",
    "stable_diffusion:v2,controlnet",
    "stable_diffusion_3:medium_35",
    "stable_diffusion_3:large_35",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in COMBINED else []) for n in PARAMETERS],
)
def test_config_builds_and_counts(name):
    _, state, frozen = plan.shapes(load(*name.split(":")))
    networks = plan.networks(state, frozen)
    assert {key: network["parameters"] for key, network in networks.items()} == PARAMETERS[name]


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


@pytest.mark.parametrize(("size", "macs"), [("s2", 6.06e9), ("b2", 23.01e9)])
def test_flops_of_a_transformer_are_the_papers(size, macs):
    """DiT's table 1 counts multiply-adds."""
    forward = plan.plan(load("dit_imagenet256", size))["flops_per_example"]["forward"]
    assert abs(forward / (2 * macs) - 1) < 0.001


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
    sizes = {name: network["parameters"] for name, network in planned["networks"].items()}
    sizes.pop("teacher", None)  # the denoiser once more
    assert sum(sizes.values()) < 4e6
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
    assert config.model.denoiser.linear_projection and "lora" in config.model
    assert "controlnet" in load("stable_diffusion", "controlnet,smoke").model
    assert load("stable_diffusion", "v1,lora").latents.contexts
    assert load("stable_diffusion", "v2,lcm,lora").process.objective.teacher == "v"
    assert "latents" not in load("stable_diffusion", "online,controlnet")
    assert "lora" in load("stable_diffusion", "dreambooth,lora").model
    assert load("stable_diffusion", "xl,online,smoke").conditioning.zero_null
    more = ("xl,textual_inversion", "dreambooth,controlnet")
    for wrong in ("lora,controlnet", "lcm,controlnet", "v1,v2", "lora,v3", *more):
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
    assert build.trained(load("ldm_text")) == ("text_encoder", "denoiser")
    assert build.trained(load("stable_diffusion")) == ("denoiser",)
    assert build.trained(load("ldm_imagenet256")) == ("class_embedder", "denoiser")
    assert [build.null_label(load("ldm_imagenet256", stage)) for stage in ("f4", "f8")] == [
        1000
    ] * 2
    labels = [given.told(load("ldm_imagenet256", stage))["label"] for stage in ("f4", "f8")]
    assert [label.has_null for label in labels] == [True, False]
