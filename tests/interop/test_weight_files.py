"""Weights of a model's directory in every form that is published, against the networks' own."""

import collections
import datetime
import importlib.util
import json
import pathlib
import shutil
import warnings

import flax.serialization
import jax
import numpy as np
import pytest

from diffusion.interop import load_autoencoder, load_text_encoder, load_unet, weight_files

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

_SPEC = importlib.util.spec_from_file_location(
    "flax_reference", pathlib.Path(__file__).with_name("flax_reference.py")
)
flax_reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(flax_reference)

LOADERS = {"unet": load_unet, "vae": load_autoencoder, "text": load_text_encoder}
STEMS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model") | {"text": "model"}
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TEXT = {"vocab_size": 20, "max_position_embeddings": 7, "num_hidden_layers": 2}
TEXT |= {"hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the three networks as Diffusers and Transformers write them, and their tensors."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE),
        "text": CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder, {name: model.state_dict() for name, model in made.items()}


def bare(folder, name, tmp_path):
    """A folder with the config alone."""
    target = tmp_path / name
    target.mkdir(exist_ok=True)
    shutil.copy(folder / name / "config.json", target)
    return target


def same(found, wanted):
    assert found[0] == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])


@pytest.mark.parametrize("name", LOADERS)
def test_flax_trees_are_read(models, name, tmp_path):
    folder, tensors = models
    target = bare(folder, name, tmp_path)
    config = json.loads((target / "config.json").read_text())
    if "_class_name" in config:
        config["_class_name"] = "Flax" + config["_class_name"]
    (target / "config.json").write_text(json.dumps(config))
    tree = flax_reference.flax_tree(tensors[name])
    stem = weight_files.STEMS[".msgpack"][STEMS[name]]
    file = target / f"{stem}.msgpack"
    file.write_bytes(flax.serialization.msgpack_serialize(tree))
    same(LOADERS[name](target), LOADERS[name](folder / name))
    halves = list(tree.items())
    names = [f"{stem}-0000{i}-of-00002.msgpack" for i in (1, 2)]
    for shard, half in zip(names, (halves[:1], halves[1:])):
        (target / shard).write_bytes(flax.serialization.msgpack_serialize(dict(half)))
    shards = {f"{key}/x": names[min(i, 1)] for i, (key, _) in enumerate(halves)}
    (target / f"{stem}.msgpack.index.json").write_text(json.dumps({"weight_map": shards}))
    whole = file.read_bytes()
    file.unlink()
    if len(halves) > 1:
        same(LOADERS[name](target), LOADERS[name](folder / name))
    file.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"msgpack is truncated or no tree"):
        LOADERS[name](target)


@pytest.mark.parametrize("name", LOADERS)
def test_pickles_of_a_directory_are_read(models, name, tmp_path):
    folder, tensors = models
    target = bare(folder, name, tmp_path)
    stem = weight_files.STEMS[".bin"].get(STEMS[name], STEMS[name])
    torch.save(tensors[name], target / f"{stem}.bin")
    same(LOADERS[name](target), LOADERS[name](folder / name))
    (target / f"{stem}.bin").rename(target / f"{stem}.fp16.bin")
    same(LOADERS[name](target), LOADERS[name](folder / name))


@pytest.mark.parametrize("middle", [False, True])
def test_shards_of_a_variant_are_read(models, middle, tmp_path):
    """Diffusers writes FILE.index.fp16.json; versions before 0.30 FILE.fp16.index.json."""
    folder, tensors = models
    target = bare(folder, "unet", tmp_path)
    half = {k: v.half().contiguous() for k, v in tensors["unet"].items()}
    torch.save(half, tmp_path / "half.pt")
    stem = "diffusion_pytorch_model"
    names = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = {key: names[i % 2] for i, key in enumerate(half)}
    for shard in names:
        save_file({k: v for k, v in half.items() if shards[k] == shard}, target / shard)
    end = "safetensors.fp16.index.json" if middle else "safetensors.index.fp16.json"
    (target / f"{stem}.{end}").write_text(json.dumps({"weight_map": shards}))
    found = weight_files.read_weights(target, stem).tensors
    assert found.keys() == half.keys()
    for key, tensor in half.items():
        np.testing.assert_array_equal(found[key], tensor.numpy())
    assert load_unet(target)[0] == load_unet(folder / "unet")[0]
    (target / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"{names[1]} is missing"):
        load_unet(target)
    save_file(half, target / f"{stem}.bf16.safetensors")
    save_file(half, target / f"{stem}.fp16.safetensors")
    with pytest.raises(ValueError, match=r"bf16\.safetensors, .*fp16\.safetensors: leave the one"):
        load_unet(target)


def test_the_whole_precision_goes_before_variants(models, tmp_path):
    folder, tensors = models
    target = bare(folder, "unet", tmp_path)
    stem = "diffusion_pytorch_model"
    save_file(
        {k: v.half() for k, v in tensors["unet"].items()}, target / f"{stem}.fp16.safetensors"
    )
    torch.save(tensors["unet"], target / f"{stem}.bin")
    same(load_unet(target), load_unet(folder / "unet"))
    for file in target.glob("diffusion*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"missing, and so are"):
        load_unet(target)


HARMLESS = {
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "layout": torch.strided,
    "generator": torch.get_rng_state(),
    "size": torch.Size([2]),
    "complex": 1 + 2j,
    "range": range(3),
    "slice": slice(1),
    "frozen": frozenset([1]),
    "path": pathlib.PurePosixPath("x"),
    "date": datetime.datetime(2024, 1, 1),
    "counter": collections.Counter("ab"),
    "buffer": torch.nn.Buffer(torch.ones(1)),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_types_beside_the_weights_are_passed_over(tmp_path, zipped):
    path = tmp_path / "w.pt"
    wanted = {"w": torch.randn(3, 2), "f8": torch.randn(4).to(torch.float8_e4m3fn)}
    if zipped:  # the old format stores no float8
        wanted["u16"] = torch.arange(5).to(torch.uint16)
    else:
        del wanted["f8"]
    more = {"hyper_parameters": HARMLESS, **HARMLESS}
    torch.save({**wanted, **more}, path, _use_new_zipfile_serialization=zipped)
    found = weight_files.read_tensors(path)
    assert set(wanted) <= set(found) <= {*wanted, "generator", "buffer"}
    for name, tensor in wanted.items():
        assert found[name].tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_tensors_that_are_no_plain_array_are_named(tmp_path, kind):
    odd = {
        "sparse": lambda: torch.eye(2).to_sparse(),
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
    }
    torch.save({"w": torch.ones(1), "x": odd[kind]()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds a tensor that is no plain array"):
        weight_files.read_tensors(tmp_path / "w.pt")


def test_a_kind_that_numpy_cannot_name_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"w\.safetensors holds tensors of F8_E8M0"):
        weight_files.read_safetensors(path)
