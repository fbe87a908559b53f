"""Random valid and nearly valid files: each as its reference has it, or refused by name.

A case is a valid config with, every other time, one thing changed: another value, another type, a
key missing or unknown. What Diffusers and Transformers build of it, on a device without memory, has
the names and shapes that ours has; a scheduler file gives their final latents of a closed-form
network. What is refused is refused by a sentence that names the file. A refusal of an unchanged
case is a fault, and so is anything but a ValueError.

Tokenizer files and low-rank updates are `generated_kinds.py`'s, folders of images
`generated_folders.py`'s. Fifty cases by seed here. Of the slow suite's 2,000, 280 run a network:

    python -m pytest -m slow tests/interop/test_generated_files.py

and write their counts into runs/generated_files, a file a kind (so `-k sched` redoes one).
"""

import contextlib
import importlib.util
import json
import pathlib
import random
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion.interop import autoencoder, files, scheduler, text_encoder, unet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import torch
    import transformers

pytestmark = pytest.mark.filterwarnings("ignore")


def beside(name):
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = pathlib.Path("runs/generated_files")  # counts of the slow suite
parity, more = beside("test_scheduler_parity"), beside("generated_kinds").KINDS
more = {**more, "folder": beside("generated_folders").images}


# -- valid files -----------------------------------------------------------------------------------


def unet_config(draw):
    cross = draw.random() < 0.5
    levels = draw.choice((1, 2, 3))
    kinds = [draw.random() < 0.5 for _ in range(levels)]
    names = {True: ("CrossAttn{}Block2D" if cross else "Attn{}Block2D"), False: "{}Block2D"}
    blocks = [names[kind] for kind in kinds]
    if cross:
        blocks[draw.randrange(levels)] = names[True]
    config = {
        "_class_name": "UNet2DConditionModel" if cross else "UNet2DModel",
        "block_out_channels": [8 * draw.choice((1, 2, 3)) for _ in range(levels)],
        "down_block_types": [block.format("Down") for block in blocks],
        "up_block_types": [block.format("Up") for block in reversed(blocks)],
        "layers_per_block": draw.choice((1, 2)),
        "norm_num_groups": draw.choice((2, 4)),
        "in_channels": draw.choice((3, 4, 9)),
        "out_channels": draw.choice((3, 4)),
        "attention_head_dim": draw.choice((1, 2, 4, 8)),
        "sample_size": draw.choice((8, 16, [8, 16])),
        "flip_sin_to_cos": draw.random() < 0.5,
        "freq_shift": draw.choice((0, 1)),
        "act_fn": draw.choice(("silu", "swish")),
    }
    if cross:
        config["cross_attention_dim"] = draw.choice((8, 12))
        config["use_linear_projection"] = draw.random() < 0.5
        config["transformer_layers_per_block"] = draw.choice((1, 2))
    return config


def vae_config(draw):
    levels = draw.choice((1, 2, 3))
    width = 8 * draw.choice((1, 2))
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [width, *(width * draw.choice((1, 2)) for _ in range(levels - 1))],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": draw.choice((1, 2)),
        "latent_channels": draw.choice((3, 4, 16)),
        "norm_num_groups": draw.choice((2, 4)),
        "sample_size": draw.choice((16, [16, 32])),
        "use_quant_conv": (quant := draw.random() < 0.5),
        "use_post_quant_conv": quant,
        "mid_block_add_attention": draw.random() < 0.5,
        "scaling_factor": draw.choice((0.18215, 0.13025)),
    }


def text_config(draw):
    heads = draw.choice((1, 2, 4))
    return {
        "architectures": ["CLIPTextModel"],
        "vocab_size": draw.choice((20, 33)),
        "hidden_size": heads * draw.choice((4, 6)),
        "intermediate_size": draw.choice((16, 37)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "max_position_embeddings": draw.choice((7, 16)),
        "hidden_act": draw.choice(("quick_gelu", "gelu")),
    }


def scheduler_config(draw):
    name = draw.choice(sorted(scheduler.CLASSES))
    config = {
        "_class_name": name,
        "beta_schedule": draw.choice(("linear", "scaled_linear", "squaredcos_cap_v2")),
        "beta_start": draw.choice((0.0001, 0.00085)),
        "beta_end": draw.choice((0.012, 0.02)),
        "prediction_type": draw.choice(("epsilon", "v_prediction")),
        "timestep_spacing": draw.choice(("leading", "trailing")),
        "steps_offset": draw.choice((0, 1)),
    }
    if name == "PNDMScheduler":
        config |= {"skip_prk_steps": draw.random() < 0.5, "prediction_type": "epsilon"}
    return config


VALID = {"unet": unet_config, "vae": vae_config, "text": text_config, "sched": scheduler_config}


def changed(config, draw):
    """(the config with one thing else, the key)."""
    config = dict(config)
    key = draw.choice([key for key in config if key not in ("_class_name", "architectures")])
    kind = draw.choice(("missing", "unknown", "type", "value", "null"))
    if kind == "missing":
        del config[key]
    elif kind == "unknown":
        key = draw.choice(("a_key_of_tomorrow", "attention_type_v3", "use_new_norm"))
        config[key] = draw.choice((True, 1, "x"))
    elif kind == "type":
        config[key] = draw.choice(("8", [8], {"a": 1}, 1.5, [], "DownBlock3D"))
    elif kind == "value":
        config[key] = draw.choice((0, -1, 3, 7, True, False, "gelu", [8, 24]))
    else:
        config[key] = None
    return config, key


# -- ours and theirs -------------------------------------------------------------------------------


def ours(kind, config, folder):
    """Sizes by the reference's names, without reading weights."""
    (folder / "config.json").write_text(json.dumps(config))
    home = {"unet": unet, "vae": autoencoder, "text": text_encoder}[kind]
    _, shapes = home.described(folder)
    flat = flatten_dict(shapes)
    return {files.torch_name(path, home.RULES): leaf.size for path, leaf in flat.items()}


def theirs(kind, config):
    given = {k: v for k, v in config.items() if k not in ("_class_name", "architectures")}
    with torch.device("meta"), contextlib.redirect_stdout(None):
        if kind == "text":
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**given))
        else:
            model = getattr(diffusers, config["_class_name"]).from_config(given)
        found = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    return {k.removeprefix("text_model."): n for k, n in found.items() if "position_ids" not in k}


def latents(config, folder, steps):
    """Final latents of both sides. ValueError where ours refuses.

    Diffusers' tables are made in float64 here: of cosine's last beta, 0.999, float32 keeps 1 - beta
    to 7e-6, and two steps of Heun from its level of 20,000 make 8e-4 of that.
    """
    read = scheduler.read_scheduler(parity.written(folder, config))
    found = parity.ours(read, steps)
    given = {k: v for k, v in config.items() if k != "_class_name"}
    theirs = getattr(diffusers, config["_class_name"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        doubles = types.SimpleNamespace(**{**vars(np), "float32": np.float64})
        patch.setattr(sys.modules[theirs.__module__], "np", doubles)
        made = theirs.from_config(given)
        return found, parity.theirs((torch, diffusers), patch, made, steps)


def judge(kind, seed, folder):
    """'same' or 'refused'; AssertionError for a difference, a traceback, an untrue refusal."""
    draw = random.Random(seed)
    if kind in more:
        folder = folder / str(seed)
        folder.mkdir()
        return more[kind](draw, folder, draw.random() < 0.5)
    valid = VALID[kind](draw)
    config, key = changed(valid, draw) if draw.random() < 0.5 else (valid, None)
    said = f"{kind} {seed}: {config}, changed: {key}"
    try:
        if kind == "sched":
            with jax.enable_x64(True):
                found, wanted = latents(config, folder, draw.choice((4, 10)))
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert error < 1e-5, f"{said}: {error}"
            return "same"
        found = ours(kind, config, folder)
    except ValueError as error:
        assert key is not None or kind == "sched", f"{said}: refused: {error}"
        assert str(folder) in str(error) or (key and key in str(error)), f"{said}: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    try:
        wanted = theirs(kind, config)
    except Exception as error:
        raise AssertionError(f"{said}: taken, but the reference says {error}") from error
    assert found == wanted, f"{said}: {sorted(found.items() ^ wanted.items())[:4]}"
    return "same"


COUNTS = {"unet": 12, "vae": 7, "text": 8, "sched": 7, "words": 6, "lora": 5, "folder": 5}


@pytest.mark.parametrize("kind", COUNTS)
def test_fifty_files(kind, tmp_path):
    outcomes = [judge(kind, seed, tmp_path) for seed in range(COUNTS[kind])]
    assert {"same", "refused"} == set(outcomes)


@pytest.mark.slow  # 2,000 files
@pytest.mark.parametrize("kind", COUNTS)
def test_two_thousand_files(kind, tmp_path):
    """Each kind's counts go into RESULTS, whatever they are."""
    found = {"exact": 0, "refused": 0, "wrong": []}
    for seed in range(1000, 1000 + 40 * COUNTS[kind]):
        try:
            outcome = judge(kind, seed, tmp_path)
            found["exact" if outcome == "same" else "refused"] += 1
        except AssertionError as error:
            found["wrong"].append(str(error)[:2000])
        if seed % 50 == 0:
            jax.clear_caches()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{kind}.json").write_text(json.dumps(found, indent=1))
    assert not found["wrong"], found["wrong"][0]
