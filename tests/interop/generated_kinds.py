"""Random tokenizer files and low-rank updates, for `test_generated_files.py`.

Each kind is a function (draw, folder, change) that writes files, one thing of them changed where
`change`, and returns "same" or "refused"; AssertionError for a difference or an untrue refusal.
"""

import json
import warnings

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from diffusion.data import tokenizer_files
from diffusion.interop import files, load_lora, unet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ("a", "fox", "Foxes!", "naïve", "<cat>", "<dog>", "x<cat>", "!", "!!", "12", "...", "的")


def refused(error, where, said):
    """A refusal names the folder that it is of."""
    assert str(where) in str(error), f"{said}: {error}"
    return "refused"


# -- tokenizers ------------------------------------------------------------------------------------


def _tokenizer_files(draw):
    merges = [("f", "o"), ("fo", "x</w>"), ("t", "h")][: draw.randrange(4)]
    pieces = [*ALPHABET, *(f"{a}</w>" for a in ALPHABET), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    found = {"vocab.json": vocab, "merges.txt": "#version: 0.2\n"}
    found["merges.txt"] += "".join(f"{a} {b}\n" for a, b in merges)
    config = {"model_max_length": 12, "tokenizer_class": "CLIPTokenizer"}
    new = [f"<{word}>" for word in draw.sample(("cat", "dog", "cat>_1"), draw.randrange(3))]
    new = [word.replace(">_1>", ">_1") for word in new]
    ids = {word: len(vocab) + i for i, word in enumerate(new)}
    if draw.random() < 0.5:
        tokens = {"<|endoftext|>": len(vocab) - 1, "<|startoftext|>": len(vocab) - 2, **ids}
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        config["added_tokens_decoder"] = {
            str(i): {"content": word, "special": i < len(vocab), **flags}
            for word, i in tokens.items()
        }
    elif ids:
        found["added_tokens.json"] = ids
    pad = draw.choice(("!", "<|endoftext|>", None))
    place = draw.choice(("tokenizer_config.json", "special_tokens_map.json"))
    found["tokenizer_config.json"] = config
    if pad and place == "special_tokens_map.json":
        found[place] = {"pad_token": pad}
    elif pad:
        config["pad_token"] = pad
    return found


def _spoilt_tokenizer(found, draw):
    name = draw.choice(sorted(found))
    kind = draw.choice(("missing", "empty", "token", "list", "line"))
    if kind == "missing":
        del found[name]
    elif kind == "empty":
        found[name] = ""
    elif kind == "token":
        found["special_tokens_map.json"] = {"pad_token": draw.choice((3, None, "<none>", {"a": 1}))}
    elif kind == "list":
        found[name] = "[1, 2]"
    else:
        found["merges.txt"] += draw.choice(("a b c\n", "no\n", "zz yy\n"))
    return f"{kind} of {name}"


def tokenizer(draw, folder, change):
    found = _tokenizer_files(draw)
    said = f"{found}, changed: {_spoilt_tokenizer(found, draw) if change else None}"
    for name, content in found.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    texts = [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(8))) for _ in range(30)]
    try:
        ours = tokenizer_files.load(folder).encode(texts, 12)
    except ValueError as error:
        assert change, f"{said}: {error}"
        return refused(error, folder, said)
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = CLIPTokenizer.from_pretrained(folder)
            options = {"padding": "max_length", "max_length": 12, "truncation": True}
            spelled = TextualInversionLoaderMixin().maybe_convert_prompt(texts, theirs)
            wanted = theirs(spelled, **options).input_ids
    except Exception as error:
        raise AssertionError(f"{said}: taken, but the reference says {error}") from error
    wrong = next((t for t, a, b in zip(texts, ours.tolist(), wanted) if a != b), None)
    assert wrong is None, f"{said}: {wrong!r}"
    return "same"


# -- low-rank updates ------------------------------------------------------------------------------


def updates(draw, folder, change):
    """Products added to a U-Net of random shape, by hand."""
    levels = draw.choice((1, 2))
    blocks = ["CrossAttn{}Block2D"] * levels
    config = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [8 * draw.choice((1, 2)) for _ in blocks],
        "down_block_types": [block.format("Down") for block in blocks],
        "up_block_types": [block.format("Up") for block in blocks],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
    }
    (folder / "config.json").write_text(json.dumps(config))
    flat = flatten_dict(unet.described(folder)[1])
    kernels = {
        files.torch_name(p, unet.RULES): (p, k) for p, k in flat.items() if p[-1] == "kernel"
    }
    rng = np.random.default_rng(draw.randrange(2**31))
    chosen = draw.sample(sorted(kernels), draw.randrange(1, 6))
    style, tensors, made = draw.choice(("kohya", "peft", "old")), {}, {}
    stored = draw.choice(("f4", "f2"))
    for weight in chosen:
        path, leaf = kernels[weight]
        *window, width, out = leaf.shape
        rank, name = draw.randrange(1, 4), weight.removesuffix(".weight")
        down = rng.normal(size=(rank, width, *window)).astype(stored)
        up = rng.normal(size=(out, rank, *(1 for _ in window))).astype(stored)
        key = "lora_unet_" + name.replace(".", "_") if style == "kohya" else f"unet.{name}"
        ends = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}
        ends["old"] = ("lora.down", "lora.up")
        tensors[f"{key}.{ends[style][0]}.weight"] = down
        tensors[f"{key}.{ends[style][1]}.weight"] = up
        if style == "kohya" and (alpha := draw.choice((None, 0.5, 2.0))):
            tensors[f"{key}.alpha"] = np.array(alpha, "f4")
        down, up = down.astype("f4"), up.astype("f4").reshape(out, rank)
        delta = np.moveaxis(np.einsum("or,ri...->oi...", up, down), (0, 1), (-1, -2))
        made[path[:-1]] = delta / rank, f"{key}.alpha", rank
    said = f"{style} of {chosen}, changed: {_spoilt_updates(tensors, draw) if change else None}"
    path = folder / "x.safetensors"
    save_file(tensors, path)
    if change and draw.random() < 0.1:
        path.write_bytes(path.read_bytes()[: draw.randrange(60)])
    try:
        found = load_lora(path, {"unet": unflatten_dict(flat)})
    except ValueError as error:
        assert change, f"{said}: {error}"
        return refused(error, path, said)
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    pairs = {}
    for at, leaf in flatten_dict(found["unet"]).items():
        pairs.setdefault(at[:-1], {})[at[-1]] = np.asarray(leaf)
    assert pairs.keys() == made.keys(), said
    for at, (delta, alpha, rank) in made.items():  # without an alpha it is the rank
        wanted = delta * np.float32(tensors.get(alpha, rank)).item()
        product = pairs[at]["down"] @ pairs[at]["up"]
        assert np.allclose(product, wanted, atol=1e-5), f"{said}: {at}"
    return "same"


def _spoilt_updates(tensors, draw):
    name = draw.choice(sorted(tensors))
    kind = draw.choice(("missing", "renamed", "wide", "flat", "other"))
    if kind == "missing":
        del tensors[name]
    elif kind == "renamed":
        ends = (
            "hada_w1_a",
            "diff",
            "of_tomorrow",
            "oft_blocks",
            "on_input",
            "lokr_w1_a",
            "a1.weight",
        )
        end = draw.choice(ends)
        tensors[f"{name.split('.')[0]}.{end}"] = tensors.pop(name)
    elif kind == "wide":
        tensors[name] = np.repeat(np.atleast_1d(tensors[name]), 3, axis=-1)
    elif kind == "flat":
        tensors[name] = tensors[name].reshape(-1)
    else:
        odd = (
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "bundle_emb.x.string",
        )
        odd += (
            "base_model.model.conv_in.lora_A.weight",
            "transformer.x.lora_A.weight",
            "emb_params",
        )
        tensors[draw.choice(odd)] = np.zeros((1, 2), "f4")
    return f"{kind} of {name}"


KINDS = {"words": tokenizer, "lora": updates}
