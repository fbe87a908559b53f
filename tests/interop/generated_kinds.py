"""Random tokenizer files, low-rank updates and folders of images: for `test_generated_files.py`.

Each kind is a function (draw, folder, change) that writes files, one thing of them changed where
`change`, and returns "same" or "refused"; AssertionError for a difference or an untrue refusal.
"""

import json
import warnings

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from diffusion.data import folder as folders
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


# -- folders ---------------------------------------------------------------------------------------


def _saved(draw, path, level):
    """A picture whose upper half is of `level` and lower of 100 more, in one of the ways to write
    it: (size, whether it is refused)."""
    size = (2 * draw.randrange(1, 8),) * 2
    grey = np.full(size[::-1], level, np.uint8)
    grey[size[0] // 2 :] += 100
    image = Image.fromarray(grey)
    way = draw.choice(WAYS[path.suffix])
    if way == "turned":
        image = image.transpose(Image.Transpose.ROTATE_180)
        exif = image.getexif()
        exif[0x0112] = 3
        image.convert("RGB").save(path, exif=exif, **LOSSLESS)
    elif way == "deep":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif way == "moving":
        image.save(path, save_all=True, append_images=[Image.fromarray(255 - grey)])
    elif way == "float":
        Image.fromarray(grey.astype(np.float32)).save(path)
    elif way == "clear":
        Image.fromarray(np.stack([*[grey] * 3, 200 - 0 * grey], -1)).save(path, **LOSSLESS)
    elif way == "opaque":
        Image.fromarray(np.stack([*[grey] * 3, 255 + 0 * grey], -1)).save(path, **LOSSLESS)
    else:
        image.convert(way).save(path, **LOSSLESS)
    return way in ("moving", "float", "clear")


LOSSLESS = {"quality": 100, "lossless": True}
WAYS = {
    ".png": ("RGB", "L", "P", "turned", "deep", "opaque", "RGB", "moving", "clear"),
    ".jpg": ("RGB", "L", "CMYK", "YCbCr", "turned"),
    ".webp": ("RGB", "turned", "opaque", "RGB", "RGB", "moving", "clear"),
    ".bmp": ("RGB", "L", "P"),
    ".tif": ("RGB", "L", "P", "CMYK", "turned", "deep", "RGB", "float", "moving"),
    ".gif": ("RGB", "L", "P", "L", "RGB", "moving"),
}


def images(draw, folder, change):
    """Pictures whose number, pixels, captions and classes are known as they are written."""
    kind = draw.choice(("plain", "classes", "txt", "jsonl", "csv"))
    root = folder / draw.choice((".", "train", "training"))
    wanted, suffix, bad = [], draw.choice(sorted(WAYS)), False
    for i in range(draw.randrange(1, 5)):
        inside = f"{'cab'[i % 3]}/" if kind == "classes" else draw.choice(("", "b/"))
        path = root / inside / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        bad |= _saved(draw, path, 20 * i)
        more = draw.choice(('"ö"', "two\nlines", "", "{}", "a; b, c"))
        wanted.append((path, inside[:1] if kind == "classes" else f"caption {i}, {more}".strip()))
    _captioned(draw, root, kind, wanted)
    if draw.random() < 0.3:
        (root / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (4, 4)).save(root / ".ipynb_checkpoints/a.png")
    if (root / "b").is_dir() and draw.random() < 0.3:  # a folder that lies elsewhere
        (root / "b").rename(folder.parent / f"{folder.name}_b")
        (root / "b").symlink_to(folder.parent / f"{folder.name}_b")
    spoilt = _spoilt_images(draw, root, kind, wanted) if change else None
    said = f"{kind}{suffix} of {len(wanted)} in {root.name}, bad: {bad}, changed: {spoilt}"
    try:
        source = folders.open_folder(folder, "train", 8)
    except ValueError as error:
        assert change or bad, f"{said}: {error}"
        return refused(error, folder, said)
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    assert not bad and spoilt in ("a strange file", None), f"{said}: taken"
    assert len(source) == len(wanted), said
    by = {row["path"]: i for i, row in enumerate(source.rows)}
    classes = sorted({label for _, label in wanted})
    for i, (path, text) in enumerate(wanted):
        row, pixels = source.rows[by[path]], source.batch(np.array([by[path]]))["image"][0]
        edges = [int(edge.mean()) - 20 * i for edge in (pixels[0], pixels[-1])]
        assert np.abs(np.subtract(edges, (0, 100))).max() < 12, f"{said}: {path.name} {edges}"
        found = row.get("label", row.get("caption"))
        if kind != "plain":
            assert found == (classes.index(text) if kind == "classes" else text), said
    return "same"


def _captioned(draw, root, kind, wanted):
    """Captions beside the pictures or in a table, maybe after a byte-order mark."""
    mark, end = draw.choice(("", "\ufeff")), draw.choice(("\n", "\r\n"))
    if kind == "txt":
        for path, text in wanted:
            path.with_suffix(".txt").write_text(f"{mark}{text}{draw.choice(('', end))}", "utf-8")
    names = [{"file_name": p.relative_to(root).as_posix(), "text": t} for p, t in wanted]
    if kind == "jsonl":
        lines = "".join(json.dumps(row) + end for row in names)
        (root / "metadata.jsonl").write_text(mark + lines, "utf-8", newline="")
    elif kind == "csv":
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in names]
        lines = [f"{row['file_name']},{text}" for row, text in zip(names, quoted)]
        text = mark + end.join(["file_name,text", *lines])
        (root / "metadata.csv").write_text(text, "utf-8", newline="")


def _spoilt_images(draw, root, kind, wanted):
    path, _ = wanted[0]
    if kind == "txt" and draw.random() < 0.5:
        if len(wanted) > 1 and draw.random() < 0.5:
            path.with_suffix(".txt").unlink()
            return "a caption missing"
        path.with_suffix(".txt").write_bytes(b"\xff\xff\xff")
        return "a caption that is no text"
    if kind in ("jsonl", "csv") and draw.random() < 0.5:
        lines = ('{"file_name": "none.png", "text": "a"}\n', "{\n", "[1]\n")
        lines = lines if kind == "jsonl" else (f"\n{path.name},a, b", "\nnone.png,a", '\n"')
        with (root / f"metadata.{kind}").open("a") as file:
            file.write(draw.choice(lines))
        return "a line that is wrong"
    way = draw.choice(("truncated", "loop", "strange", "broken link", "no picture"))
    if way == "loop":
        (root / "back").symlink_to(root.resolve())
        return "a link that leads back"
    if way == "broken link":
        path.unlink()
        path.symlink_to(root / "nowhere")
        return "a broken link"
    if way == "no picture":
        path.write_bytes(b"<html>")
        return "an error page"
    if way == "truncated":
        path.write_bytes(path.read_bytes()[:20])
        return "a truncated image"
    (root / "notes.md").write_text("x")
    return "a strange file"


KINDS = {"words": tokenizer, "lora": updates, "folder": images}
