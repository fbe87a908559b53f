"""ControlNets and LoRA against Diffusers, every parameter random; files both ways."""

import json
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.interop import (
    load_controlnet,
    load_lora,
    load_unet,
    save_controlnet,
    save_lora,
)
from diffusion.models.lora import Lora, merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel
    from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-5
WEIGHTS = "diffusion_pytorch_model.safetensors"
CD, CU = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": (CD, "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
UNET = SMALL | {"up_block_types": ("UpBlock2D", CU)}
HINT = {"conditioning_embedding_out_channels": (4, 6, 8)}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    with jax.default_matmul_precision("highest"):
        yield


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def inputs():
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn((2, 4, 8, 4), generator=generator),
        "timestep": torch.tensor([7, 900]),
        "encoder_hidden_states": torch.randn((2, 5, 24), generator=generator),
    }


def arrays(given):
    x = jnp.asarray(np.moveaxis(given["sample"].numpy(), 1, -1))
    return x, jnp.asarray(given["timestep"].numpy()), jnp.asarray(given["encoder_hidden_states"])


def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    model = randomise(UNet2DConditionModel(**UNET))
    directory = tmp_path_factory.mktemp("unet")
    model.save_pretrained(directory)
    return model, *load_unet(directory)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    model = randomise(ControlNetModel(**SMALL, **HINT), seed=1)
    directory = tmp_path_factory.mktemp("controlnet")
    model.save_pretrained(directory)
    return model, directory, *load_controlnet(directory)


def test_controlnet_and_the_unet_it_steers_match_diffusers(unet, control):
    model, module, params = unet
    net, _, control_module, control_params = control
    given, hint = inputs(), torch.rand((2, 3, 32, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        down, middle = net(**given, controlnet_cond=hint, return_dict=False)
        wanted = model(
            **given, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample.numpy()
    x, t, context = arrays(given)

    @jax.jit
    def run(params, control_params):
        picture = jnp.moveaxis(jnp.asarray(hint.numpy()), 1, -1)
        residuals = control_module.apply({"params": control_params}, x, t, picture, context)
        out = module.apply({"params": params}, x, t, context, residuals=residuals)
        return out, residuals

    found, residuals = run(params, control_params)
    for ours, theirs in zip(residuals, [*down, middle], strict=True):
        assert distance(np.moveaxis(np.asarray(ours), -1, 1), theirs.numpy()) < TOLERANCE
    assert distance(np.moveaxis(np.asarray(found), -1, 1), wanted) < TOLERANCE


def test_controlnet_directories_go_round(control, tmp_path):
    net, directory, module, params = control
    save_controlnet(tmp_path / "ours", module, params)
    theirs = ControlNetModel.from_pretrained(tmp_path / "ours")
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(theirs.state_dict()[name].numpy(), tensor.numpy())
    saved, first = (load_file(path / WEIGHTS) for path in (tmp_path / "ours", directory))
    assert saved.keys() == first.keys()
    for key in ("attention_head_dim", "conditioning_embedding_out_channels", "down_block_types"):
        assert json.loads(json.dumps(theirs.config[key])) == json.loads(json.dumps(net.config[key]))


def test_a_controlnet_of_another_class_or_colour_order_is_refused(control, tmp_path):
    _, directory, _, _ = control
    config = json.loads((directory / "config.json").read_text())
    wrong = {"_class_name": "T2IAdapter", "controlnet_conditioning_channel_order": "bgr"}
    for key, value in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=value) as caught:
            load_controlnet(tmp_path)
        assert "config.json" in str(caught.value)


# -- LoRA ----------------------------------------------------------------------------------------


def random_updates(params, rank=3):
    tree = Lora(rank=rank).init(jax.random.key(0), params)
    draw = np.random.default_rng(5).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(0, 0.3, leaf.shape), jnp.float32), tree)


def patched(model, tensors, alphas=None):
    """Diffusers' model with the file's updates added to its weights, by LoRA's eq. 3."""
    import copy

    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key, down in tensors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                up = torch.from_numpy(tensors[f"{name}.lora_B.weight"])
                modules[name.removeprefix("unet.")].weight += up @ torch.from_numpy(down)
    return model


def test_an_adapted_unet_matches_diffusers(unet, tmp_path):
    model, module, params = unet
    tree = random_updates(params)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(path, tree, scale=0.5)
    tensors = load_file(path)
    assert len(tensors) == 2 * 4 * 2 * 4  # down, up; q, k, v, out; twice in each of 4 blocks
    given = inputs()
    with torch.no_grad():
        before = model(**given).sample.numpy()
        wanted = patched(model, tensors)(**given).sample.numpy()
    x, t, context = arrays(given)
    apply = jax.jit(lambda p: module.apply({"params": p}, x, t, context))
    loaded = load_lora(tmp_path, {"unet": params})
    for merged in (Lora(3, 1.5).merge(params, tree), merge(params, loaded["unet"])):
        found = np.moveaxis(np.asarray(apply(merged)), -1, 1)
        assert distance(found, wanted) < TOLERANCE
    assert distance(before, wanted) > 0.05


@pytest.fixture(scope="module")
def peft(unet, tmp_path_factory):
    """A folder in which Diffusers' own loaders read our file, and wrote theirs; their outputs."""
    packages = pathlib.Path(sys.prefix) / "alone"  # launch/environment.sh: requirements-alone.txt
    assert (packages / "peft").is_dir(), f"{packages}/peft is missing: ./launch/test.sh makes it"
    model, _, params = unet
    root = tmp_path_factory.mktemp("peft")
    model.save_pretrained(root / "unet")
    save_lora(root / "ours" / "pytorch_lora_weights.safetensors", random_updates(params), 0.5)
    np.savez(root / "inputs.npz", **{key: value.numpy() for key, value in inputs().items()})
    script = pathlib.Path(__file__).with_name("peft_reference.py")
    subprocess.run([sys.executable, script, packages, root], check=True)
    return root, np.load(root / "outputs.npz")


def merged_output(unet, tree):
    _, module, params = unet
    x, t, context = arrays(inputs())
    apply = jax.jit(lambda p: module.apply({"params": p}, x, t, context))
    return np.moveaxis(np.asarray(apply(merge(params, tree))), -1, 1)


@pytest.mark.parametrize("loader", ["pipeline", "unet"])
def test_diffusers_own_loaders_read_what_is_saved(unet, peft, loader):
    """`load_lora_weights` of the pipeline, `load_lora_adapter` of the U-Net."""
    root, outputs = peft
    tree = load_lora(root / "ours", {"unet": unet[2]})["unet"]
    assert distance(merged_output(unet, tree), outputs[loader]) < TOLERANCE
    assert distance(outputs["plain"], outputs[loader]) > 0.05


@pytest.mark.parametrize("folder", ["theirs", "alone"])
def test_what_diffusers_saves_is_read_with_its_alpha(unet, peft, folder):
    """`save_lora_weights` of the pipeline, `save_lora_adapter` of the U-Net: alpha is a header."""
    root, outputs = peft
    tree = load_lora(root / folder, {"unet": unet[2]})["unet"]
    assert distance(merged_output(unet, tree), outputs["theirs"]) < TOLERANCE


def test_what_diffusers_saves_and_we_save_again_is_equal(unet, peft, tmp_path):
    """Tensor for tensor, but for alpha over rank, which then stands in B."""
    root, _ = peft
    name = "pytorch_lora_weights.safetensors"
    save_lora(tmp_path / name, load_lora(root / "alone", {"unet": unet[2]})["unet"])
    theirs, ours = load_file(root / "alone" / name), load_file(tmp_path / name)
    theirs = {f"unet.{key}": tensor for key, tensor in theirs.items()}
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        scale = (1.5 if ".to_k." in key else 6) / 3 if "lora_B" in key else 1
        np.testing.assert_array_equal(ours[key], tensor * np.float32(scale), err_msg=key)


def test_files_go_round_tensor_for_tensor(unet, tmp_path):
    _, _, params = unet
    save_lora(tmp_path / "a.safetensors", random_updates(params))
    loaded = load_lora(tmp_path / "a.safetensors", {"unet": params})
    save_lora(tmp_path / "b.safetensors", loaded["unet"])
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("kind", ["lora.down", "processor", "kohya"])
def test_older_names_are_read(unet, tmp_path, kind):
    _, _, params = unet
    tree = random_updates(params)
    save_lora(tmp_path / "new.safetensors", tree)
    old = {}
    for name, tensor in load_file(tmp_path / "new.safetensors").items():
        layer, which = name.removesuffix(".weight").rsplit(".", 1)
        way = {"lora_A": "down", "lora_B": "up"}[which]
        if kind == "lora.down":
            old[f"{layer}.lora.{way}.weight"] = tensor
        elif kind == "processor":
            head, tail = layer.removesuffix(".0").rsplit(".", 1)
            old[f"{head}.processor.{tail}_lora.{way}.weight"] = tensor
        else:
            flat = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
            old[f"{flat}.lora_{way}.weight"] = tensor
            old[f"{flat}.alpha"] = np.array(1.5, np.float32)  # half of the rank
    save_file(old, tmp_path / "old.safetensors")
    found = load_lora(tmp_path / "old.safetensors", {"unet": params})["unet"]
    factor = 0.5 if kind == "kohya" else 1.0
    wanted = merge(params, tree, factor)
    for a, b in zip(jax.tree.leaves(merge(params, found)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_updates_of_another_network_are_refused(unet, tmp_path):
    _, _, params = unet
    path = tmp_path / "x.safetensors"
    save_lora(path, random_updates(params))
    tensors = load_file(path)
    name = min(tensors)
    for changed, words in (
        ({**tensors, "unet.conv_in.lora_A.weight": tensors[name]}, "conv_in"),
        ({**tensors, name: tensors[name][:, 1:].copy()}, "inputs"),
        ({k: v for k, v in tensors.items() if k != name.replace("lora_A", "lora_B")}, "lora_B"),
        ({}, "no update"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=words) as caught:
            load_lora(path, {"unet": params})
        assert "x.safetensors" in str(caught.value)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ValueError, match="truncated"):
        load_lora(path, {"unet": params})


def test_a_new_update_changes_nothing_and_a_wrong_target_is_refused(unet):
    _, _, params = unet
    lora = Lora(rank=2)
    merged = lora.merge(params, lora.init(jax.random.key(1), params))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="to_z"):
        Lora(targets=("to_z",)).init(jax.random.key(1), params)
    gaussian = jax.tree.leaves(Lora(8, initialisation="gaussian").init(jax.random.key(1), params))
    drawn = np.concatenate([np.ravel(leaf) for leaf in gaussian if np.any(leaf)])
    np.testing.assert_allclose(drawn.std(), 1 / 8, rtol=0.1)  # PEFT's, whatever the width
    with pytest.raises(ValueError, match=r"model\.lora\.initialisation='zeros' is unknown"):
        Lora(initialisation="zeros")
    with pytest.raises(ValueError, match="rank=0"):
        Lora(rank=0)
