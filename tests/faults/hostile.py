"""Thousands of hostile inputs through the commands, in one process.

    python tests/faults/hostile.py KIND COUNT FOLDER

Each must end with status 0, or with status 2 and one sentence: no traceback, no hang, and where it
is refused nothing written. Training itself is left out (its loop is replaced by reading two
batches); everything before it is as the command does it. Memory is limited to MEMORY_BYTES.
Prints, as JSON, how many inputs there were and how many were accepted.
"""

import contextlib
import io
import json
import pathlib
import random
import resource
import runpy
import shutil
import signal
import struct
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion import interop
from diffusion.training.parallel import Parallel
from experiments import train
from experiments.convert import __main__ as convert
from experiments.host import cli
from experiments.run import build, tasks

MEMORY_BYTES = 12 * 2**30  # address space, of which JAX takes some at its start
LIMIT_SECS = 30  # for one input
TINY = str(pathlib.Path(__file__).with_name("tiny.py"))


WHOLE = "what nothing is wrong with"


class Hung(BaseException):
    pass


class Loop:
    """In place of training: the first two batches."""

    def __init__(self, run, *_):
        self.run = run

    def steps(self, stop):
        batches = self.run.train_batches().batches
        for step in range(min(self.run.config.train.steps, 2)):
            batches[step]
        READ.extend(getattr(batches.source, "rows", ()))
        return {}


def alarm(*_):
    raise Hung


READ: list[dict] = []  # rows of folders that were accepted


def outcome(command, argv, target: pathlib.Path, note) -> int:
    """The status; asserts what must hold of every input. `note` says which it was."""
    error = io.StringIO()
    signal.alarm(LIMIT_SECS)
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            status = cli.run(command.define, command.main, argv)
    except Hung:
        raise AssertionError(f"hung: {note!r:.2000}") from None
    except BaseException as problem:
        raise AssertionError(f"{type(problem).__name__}: {problem} of {note!r:.2000}") from problem
    finally:
        signal.alarm(0)
    lines = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
    assert status in (0, 2), note
    assert len(lines) == (status == 2), (note, error.getvalue()[:2000])
    if status == 2:
        assert not target.exists(), note
        assert not list(target.parent.glob(f".{target.name}*")), note
    shutil.rmtree(target, ignore_errors=True)
    if status == 2 and note == WHOLE:
        raise AssertionError(lines[0])
    return status


# -- overrides of the config -----------------------------------------------------------------------

VALUES = (
    *("0", "1", "-1", "2", "3", "7", "64", "1000000007", "9" * 30, "0.5", "-0.0", "1e-30", "1e300"),
    *("nan", "inf", "-inf", "True", "None", "", " ", "x", "'", '"', "()", "(1,)", "(1, 2)", "(0,)"),
    *("(1, 'a')", "((1,),)", "[1]", "{}", "{'a': 1}", "(1000000007,)", "(True, False)", "(-1, 4)"),
    *("../../x", "/", "\u2603", "%s%n", "__import__('os').abort()", "x" * 100_000, "\x00", "1,2"),
    *("ddim", "edm", "flow", "cosine", "v", "x0", "adamw", "vq", "kl", "full", "conv", "learned"),
    *("bfloat16", "batch", "second_moment", "inpaint", "edges", "cosine", "lognormal", "min_snr"),
)


def nearby(draw: random.Random, value: object) -> object:
    """A value that might do in place of this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw.choice([value * 2, value + 1, value, value // 2, abs(value)])
    return value


def overrides(draw: random.Random, leaves: dict[str, object]) -> list[str]:
    found = []
    for _ in range(draw.randint(1, 3)):
        key, value = draw.choice([*leaves]), draw.choice(VALUES)
        if draw.random() < 0.5:
            value = nearby(draw, leaves[key])
        if draw.random() < 0.1:
            key = draw.choice(
                [key + "x", key.rsplit(".", 1)[0], "", ".", key + ".a", "..", key[1:]]
            )
        if draw.random() < 0.1:
            value = "".join(chr(draw.randrange(1, 0x2FF)) for _ in range(draw.randint(1, 12)))
        found.append(f"--config.{key}={value}" if draw.random() < 0.97 else f"--{key} {value}")
    return found


def overrides_of_the_config(count, root) -> list[int]:
    draw, statuses, tiny = random.Random(count), [], TINY
    configs = {k: runpy.run_path(tiny)["get_config"](k) for k in ("denoiser", "first_stage")}
    leaves = {kind: cli.flat(config) for kind, config in configs.items()}
    for _ in range(count):
        kind = draw.choice([*configs])
        changed = overrides(draw, leaves[kind])
        argv = [f"--config={tiny}:{kind}", f"--workdir={root}/run", *changed]
        statuses.append(outcome(train, argv, root / "run", changed))
    return statuses


# -- a folder of captioned images ------------------------------------------------------------------


def build_once() -> None:
    """The network, which is always the same here."""
    task = tasks.task(runpy.run_path(TINY)["get_config"]("folder"))
    tasks.task = lambda *_, **__: task
    Parallel.abstract = lambda *_: {}


def png(size=(9, 7), mode="RGB", form="PNG", draw=None) -> bytes:
    pixels = np.random.default_rng(draw.randrange(2**32) if draw else 0)
    image = Image.fromarray(pixels.integers(0, 255, (size[1], size[0], 3), np.uint8), "RGB")
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form)
    return buffer.getvalue()


def train_on(folder: pathlib.Path, note, *more) -> int:
    target = folder.parent / "run"
    argv = [f"--config={TINY}:folder", f"--workdir={target}"]
    READ.clear()
    status = outcome(train, [*argv, f"--config.data.dir={folder}", *more], target, note)
    inside = folder.resolve()
    assert all(row["path"].resolve().is_relative_to(inside) for row in READ), note
    assert all(len(row["caption"]) <= 2**14 for row in READ), note
    return status


def text(draw: random.Random):
    kinds = (
        lambda: "a red fox",
        lambda: "",
        lambda: "x" * draw.choice([100, 2**14, 2**20]),
        lambda: "".join(chr(draw.randrange(0x10FFFF + 1)) for _ in range(draw.randint(1, 40))),
        lambda: "\ud800",
        lambda: "[START] [PAD] [UNK]",
        lambda: "\x00\x1b[2J\r\n",
        lambda: draw.choice([None, 1, 1.5, True, [], {}, ["a"], {"a": {"b": []}}]),
    )
    return draw.choices(kinds, (8, 1, 1, 2, 1, 1, 1, 1))[0]()


def name(draw: random.Random):
    escapes = ("../outside.png", "a/../../outside.png", "..\\outside.png", "./../outside.png")
    strange = (
        "",
        ".",
        "/",
        "/dev/zero",
        "x" * 5000,
        "\x00",
        "0.png\x00",
        "\ud800.png",
        5,
        None,
        [],
    )
    kinds = (("0.png", "1.png", "./0.png", "sub/2.png"), escapes, strange)
    return draw.choice(draw.choices(kinds, (12, 2, 1))[0])


def metadata_line(draw: random.Random) -> bytes:
    row = {"file_name": name(draw), "text": text(draw)}
    line = json.dumps(row).encode()
    roll = draw.random()
    if roll < 0.04:
        line = b"[" * draw.choice([10, 100_000])
    elif roll < 0.08:
        line = line[: draw.randrange(len(line) + 1)]
    elif roll < 0.14:
        data = bytearray(line)
        data[draw.randrange(len(data))] = draw.randrange(256)
        line = bytes(data)
    elif roll < 0.18:
        line = draw.choice([b"", b"NaN", b"1e999", b"\xef\xbb\xbf" + line, line + line, b"null"])
    return line


def captioned(draw: random.Random, folder: pathlib.Path) -> object:
    """Images with a metadata.jsonl, or with a text file each; what was written."""
    (folder / "sub").mkdir(parents=True)
    for n in ("0", "1", "sub/2"):
        (folder / f"{n}.png").write_bytes(png())
    if draw.random() < 0.7:
        lines = [metadata_line(draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))]
        (folder / "metadata.jsonl").write_bytes(draw.choice([b"\n", b"\r\n", b"\n"]).join(lines))
        return lines
    for n in ("0", "1", "sub/2"):
        caption = text(draw)
        data = str(caption).encode("utf-8", "surrogatepass")
        if draw.random() < 0.15:
            data = bytes(draw.randrange(256) for _ in range(draw.randint(0, 30)))
        if draw.random() > 0.05:
            (folder / f"{n}.txt").write_bytes(data)
    return sorted((p.name, p.read_bytes()[:100]) for p in folder.rglob("*.txt"))


def caption_files(count, root) -> list[int]:
    build_once()
    draw, statuses = random.Random(count), []
    (root / "outside.png").write_bytes(png())
    for n in range(count):
        folder = root / f"images-{n}"
        note = captioned(draw, folder)
        statuses.append(train_on(folder, note))
        shutil.rmtree(folder)
    return statuses


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says another size, its checksum right: a decompression bomb."""
    header = struct.pack(">II", width, height) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def hostile_image(draw: random.Random) -> tuple[str, bytes]:
    form, suffix, modes = draw.choice(
        [
            ("PNG", ".png", ("RGB", "L", "P", "RGBA", "1", "LA", "I;16")),
            ("JPEG", ".jpg", ("RGB", "L", "CMYK")),
            ("WEBP", ".webp", ("RGB", "RGBA")),
            ("BMP", ".bmp", ("RGB", "L", "1")),
            ("GIF", ".png", ("P",)),
            ("TIFF", ".png", ("RGB", "L")),
        ]
    )
    mode = draw.choice(modes)
    size = draw.choice([(9, 7), (1, 1), (1, 300), (64, 64)])
    data = png(size, "L" if mode == "I;16" else mode, form, draw)
    suffix = draw.choice([suffix] * 9 + [".jpeg", ".PNG"])
    roll = draw.random()
    if roll < 0.2:
        return suffix, data
    if roll < 0.3 and form == "PNG":
        side = draw.choice([0, 1, 2**31 - 1, 60_000, 8_193, 2**16])
        return suffix, with_size(data, side, draw.choice([1, side]))
    if roll < 0.5:
        return suffix, data[: draw.randrange(len(data))]
    if roll < 0.55:
        return suffix, bytes(draw.randrange(256) for _ in range(draw.randint(0, 200)))
    if roll < 0.6:
        return suffix, draw.choice(
            [b"", b"GIF89a", b"II*\x00", b"BM", b"\x89PNG\r\n\x1a\n", b"%!PS"]
        )
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        spot = draw.randrange(min(len(changed), draw.choice([40, len(changed)])))
        changed[spot] = draw.choice([0, 255, changed[spot] ^ 1 << draw.randrange(8)])
    return suffix, bytes(changed)


def image_files(count, root) -> list[int]:
    build_once()
    draw, statuses = random.Random(count), []
    for n in range(count):
        folder = root / f"images-{n}"
        folder.mkdir()
        suffix, data = hostile_image(draw)
        (folder / f"0{suffix}").write_bytes(data)
        (folder / "0.txt").write_text("a fox")
        more = []
        if draw.random() < 0.5:
            (folder / "1.png").write_bytes(png())
            (folder / "1.txt").write_text("a fox")
            more = ["--config.data.max_bad_images=1"]
        statuses.append(train_on(folder, (suffix, data[:300]), *more))
        shutil.rmtree(folder)
    return statuses


# -- weights ---------------------------------------------------------------------------------------

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}


def pipeline(root: pathlib.Path):
    """Diffusers' DDPMPipeline, tiny: the folder, and its weights' header and data."""
    config = runpy.run_path(f"{TINY}")["get_config"]("folder")
    fields = {
        "kind": "unet",
        "out_channels": 3,
        "channels": 8,
        "multipliers": (1,),
        "blocks": 1,
        "groups": 4,
    }
    config.model.denoiser = {**fields, "attention": (False,), "mid_attention": True, "heads": 1}
    unet = build.denoiser_network(config)
    params = unet.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))["params"]
    root.mkdir()
    interop.save_unet(root / "unet", unet, params, 8)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (root / "model_index.json").write_text(json.dumps(index))
    (path,) = (root / "unet").glob("*.safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return path, json.loads(data[8 : 8 + length]), data[8 + length :]


def hostile_weights(draw: random.Random, header: dict, body: bytes) -> bytes:
    """The file with one thing wrong in its header, its length or its data; or with nothing."""
    header = json.loads(json.dumps(header))
    key = draw.choice([k for k in header if k != "__metadata__"])
    entry, roll = header[key], draw.random()
    if roll < 0.08:
        pass
    elif roll < 0.2:
        entry["dtype"] = draw.choice(
            ["F64", "F16", "BF16", "I8", "F8_E4M3", "X", "", None, 3, "U64"]
        )
    elif roll < 0.35:
        shapes = ([], [0], [-1], [2**63], [1, 2, 3, 4], ["a"], None, 5, [1.5], [2**31, 2**31])
        entry["shape"] = draw.choice([*shapes, [*entry["shape"], 1], entry["shape"][::-1]])
    elif roll < 0.5:
        start, stop = entry["data_offsets"]
        offsets = ([stop, start], [0, 0], [start, 2**62], [-4, 4], [start], None, [start, stop + 4])
        entry["data_offsets"] = draw.choice([*offsets, ["0", "4"], [0, stop - start]])
    elif roll < 0.6:
        header[draw.choice(["x", "", "../x", "a" * 10_000, "\u0000", key + "."])] = header.pop(key)
    elif roll < 0.65:
        del header[key]
    elif roll < 0.7:
        header[key] = draw.choice([None, 1, [], {}, "x", [[[[]]]]])
    elif roll < 0.75:
        header["__metadata__"] = draw.choice(
            [None, {"a": 1}, {"a": {}}, [], {"format": "x" * 10**5}]
        )
    text = json.dumps(header).encode()
    if 0.75 <= roll < 0.8:
        text = draw.choice([b"", b"{", b"[]", b"[" * 100_000, b"null", b"{}", b"\xff" * 50])
    length = len(text)
    if 0.8 <= roll < 0.88:
        length = draw.choice([0, 1, length - 1, length + 1, 2**63, 2**64 - 1, 10**8, 100])
    data = bytearray(struct.pack("<Q", length) + text + body)
    if 0.88 <= roll < 0.94:
        return bytes(data[: draw.randrange(len(data))])
    if roll >= 0.94:
        for _ in range(draw.randint(1, 5)):
            data[draw.randrange(8 + len(text))] = draw.randrange(256)
    return bytes(data)


def safetensors_headers(count, root) -> list[int]:
    source = root / "ddpm"
    path, header, body = pipeline(source)
    draw, statuses, whole = random.Random(count), [], path.read_bytes()
    argv = ["--from=diffusers", f"--source={source}", f"--workdir={root}/out"]
    for _ in range(count):
        data = hostile_weights(draw, header, body)
        path.write_bytes(data)
        statuses.append(outcome(convert, argv, root / "out", data[:1000]))
    path.write_bytes(whole)
    assert outcome(convert, argv, root / "out", WHOLE) == 0
    return statuses


KINDS = {
    "overrides": overrides_of_the_config,
    "captions": caption_files,
    "images": image_files,
    "weights": safetensors_headers,
}


def main(kind: str, count: str, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, alarm)
    # Nothing is drawn, compiled or logged.
    train.Loop, Parallel.init = Loop, lambda *_: None
    train.make_writer = lambda *_, **__: io.StringIO()
    statuses = KINDS[kind](int(count), pathlib.Path(folder))
    print(json.dumps({"inputs": len(statuses), "accepted": statuses.count(0)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
