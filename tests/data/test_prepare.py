"""Preparation: formats and folders read right, damage named, nothing half-written taken."""

import gzip
import hashlib
import io
import json
import pathlib
import pickle
import shutil
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion.data import images, prepare, provenance, sources
from diffusion.data.builders.local_files import readers

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def image_bytes(size=(24, 16), kind="PNG", seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def everything(name, data_dir, split="train", **options):
    source = sources.open_source(name, data_dir, split, **options)
    return source.batch(np.arange(len(source)))


# -- the publishers' own files


@pytest.fixture
def idx(tmp_path):
    """Four idx files of 30 and 10 examples."""
    folder, made = tmp_path / "idx", {}
    folder.mkdir()
    for stem, count in (("train", 30), ("t10k", 10)):
        made[stem] = RNG.integers(0, 256, (count, 28, 28)).astype(np.uint8), np.arange(count) % 10
        images = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) + made[stem][0].tobytes()
        labels = struct.pack(">HBBI", 0, 8, 1, count) + made[stem][1].astype(np.uint8).tobytes()
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    return folder, made


def as_set(batch):
    return {(i.tobytes(), int(label)) for i, label in zip(batch["image"], batch["label"])}


def test_preparing_is_quiet_and_says_how_far_it_is(idx, tmp_path, monkeypatch, capfd):
    from diffusion.data.builders.local_files import local_files

    class EveryTime(local_files.Progress):
        def __init__(self, name, total):
            super().__init__(name, total, every_secs=0)

    monkeypatch.setattr(local_files, "Progress", EveryTime)
    read_idx = readers.read_idx
    monkeypatch.setattr(readers, "read_idx", lambda source: read_idx(source, (30, 10)))
    prepare.prepare("mnist", tmp_path / "data", idx[0])
    out, err = capfd.readouterr()
    assert out == "" and "train examples 30\n" in err and "test examples 10\n" in err
    assert "Generating" not in err and "Dataset" not in err


def test_idx_files_through_to_a_source(idx, tmp_path, monkeypatch):
    folder, made = idx
    read_idx = readers.read_idx
    monkeypatch.setattr(readers, "read_idx", lambda source: read_idx(source, (30, 10)))
    directory = prepare.prepare("fashion_mnist", tmp_path / "data", folder)
    assert directory == tmp_path / "data" / "fashion_mnist" / "1.0.0"
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = made[stem]
        batch = everything("fashion_mnist", tmp_path / "data", split)
        assert as_set(batch) == as_set({"image": images[..., None], "label": labels})
    known = json.loads((directory / provenance.FILE).read_text())
    assert known["splits"] == {"train": 30, "test": 10} and known["name"] == "fashion_mnist"


@pytest.mark.parametrize("harm", ["truncated", "crc", "count", "missing"])
def test_damaged_idx_files_are_named(idx, harm):
    folder, _ = idx
    path = folder / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(data[:-200])
    elif harm == "crc":
        path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    elif harm == "missing":
        path.unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        readers.read_idx(folder, (31, 10) if harm == "count" else (30, 10))


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    made, md5 = {}, {}
    for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        pixels = RNG.integers(0, 256, (6, 3072)).astype(np.uint8)
        made[name] = pixels
        data = pickle.dumps({b"data": pixels, b"labels": [i] * 6}, protocol=2)
        (folder / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    return folder.parent, made, md5


def test_cifar10_python_batches(cifar):
    folder, made, md5 = cifar
    files = readers.read_cifar10(folder, md5)
    train = list(files.splits["train"]())
    assert len(train) == 12 and [e["label"] for e in train] == [0] * 6 + [1] * 6
    pixels = np.asarray(Image.open(io.BytesIO(train[7]["image"])))
    for channel in range(3):  # stored as three planes
        plane = made["data_batch_2"][1].reshape(3, 32, 32)[channel]
        np.testing.assert_array_equal(pixels[..., channel], plane)
    assert len(list(files.splits["test"]())) == 6


def test_damaged_cifar10_is_named_by_checksum(cifar):
    folder, _, md5 = cifar
    path = folder / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2 has MD5 .* the publisher's"):
        readers.read_cifar10(folder, md5)
    path.unlink()
    with pytest.raises(ValueError, match="data_batch_2 is missing"):
        readers.read_cifar10(folder, md5)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    data = pickle.dumps({b"data": Hostile()})
    (tmp_path / "test_batch").write_bytes(data)
    md5 = {"test_batch": hashlib.md5(data).hexdigest()}
    with pytest.raises(ValueError, match="no data file needs"):
        readers.read_cifar10(tmp_path, md5)
    assert not (tmp_path / "ran").exists()


def test_lsun_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    for part, count in (("train", 3), ("val", 1)):
        path = tmp_path / "lsun" / f"church_outdoor_{part}_lmdb"
        path.mkdir(parents=True)
        with lmdb.open(str(path)) as database:
            with database.begin(write=True) as transaction:
                for i in range(count):
                    transaction.put(f"{i:040d}".encode(), image_bytes(kind="WEBP", seed=i))
    name = "lsun/church_outdoor"
    directory = prepare.prepare(name, tmp_path / "data", tmp_path / "lsun")
    assert directory.parts[-3:] == ("lsun", "church_outdoor", "1.0.0")
    batch = everything(name, tmp_path / "data", image_size=16)
    assert batch["image"].shape == (3, 16, 16, 3)
    assert len(everything(name, tmp_path / "data", "validation")["image"]) == 1


def test_an_lmdb_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a_train_lmdb").mkdir()
    (tmp_path / "a_train_lmdb" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        readers.read("lsun/church_outdoor", tmp_path)


# -- folders of images


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        kind = "JPEG" if i == 1 else "PNG"
        name = f"{i}.{'jpg' if i == 1 else 'png'}"
        (root / name).write_bytes(image_bytes((20 + i, 16), kind, seed=i))
    return root


def test_folder_with_metadata(folder, tmp_path):
    rows = [{"file_name": f"{i}.{'jpg' if i == 1 else 'png'}", "text": f"é {i}"} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    prepare.prepare("mine", tmp_path / "data", folder)
    batch = everything("mine", tmp_path / "data", image_size=16)
    assert sorted(batch["caption"]) == [f"é {i}" for i in range(4)]
    for image, caption in zip(batch["image"], batch["caption"]):
        path = folder / rows[int(caption[-1])]["file_name"]
        expected = images.decode_image(path.read_bytes(), 3, 16)  # JPEG is stored as it was
        np.testing.assert_array_equal(image, expected)
    with pytest.raises(ValueError, match=r"data\.image_size=None, but .* several sizes"):
        everything("mine", tmp_path / "data")


def test_a_list_of_names_takes_those_alone(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("2.npy\n0.png\n\n")  # CelebA-HQ's list has its authors' own suffix
    prepare.prepare("some", tmp_path / "data", folder, names=names)
    found = everything("some", tmp_path / "data", image_size=16)["image"]
    wanted = [images.decode_image((folder / f"{i}.png").read_bytes(), 3, 16) for i in (0, 2)]
    assert sorted(map(np.ndarray.tobytes, found)) == sorted(map(np.ndarray.tobytes, wanted))
    names.write_text("2.png\n17.png\n")
    with pytest.raises(ValueError, match=r"names 17, one of 1 of 2 that .* does not hold"):
        prepare.prepare("none", tmp_path / "data", folder, names=names)
    with pytest.raises(ValueError, match=r"--names=.*/no does not exist: name a text file"):
        prepare.prepare("none", tmp_path / "data", folder, names=tmp_path / "no")


def test_folder_with_text_files_and_with_classes_and_bare(folder, tmp_path):
    bare = readers.read_folder(folder)
    assert bare.keys == ("image",) and len(list(bare.splits["train"]())) == 4
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"number {path.stem}\n")
    captioned = list(readers.read_folder(folder).splits["train"]())
    assert [e["caption"] for e in captioned] == [f"number {i}" for i in range(4)]
    classes = tmp_path / "classes" / "train"
    for name in ("cat", "dog"):
        (classes / name).mkdir(parents=True)
        (classes / name / "x.png").write_bytes(image_bytes())
    labelled = readers.read_folder(tmp_path / "classes")
    assert labelled.classes == 2
    assert [e["label"] for e in labelled.splits["train"]()] == [0, 1]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"file_name": "0.png"', "line 2"),
        ('{"file_name": "0.png"}', "line 2.*text"),
        ('{"file_name": "0.png", "text": 3}', "line 2.*no string"),
        ('["0.png", "a"]', "line 2"),
        ('{"file_name": "9.png", "text": "a"}', r"line 2.*9\.png does not exist"),
        ('{"file_name": "\xff", "text": "a"}', "line 2"),
    ],
)
def test_broken_metadata_is_named_by_line(folder, line, reason):
    good = b'{"file_name": "0.png", "text": "a"}\n'
    (folder / "metadata.jsonl").write_bytes(good + line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, " + reason):
        readers.read_folder(folder)


def test_images_that_are_none_are_skipped_up_to_a_limit(folder, tmp_path, caplog):
    (folder / "2.png").write_bytes(image_bytes()[:-40])
    (folder / "3.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"3\.png is no image \(it has no format.*max_bad_images=1"
    ):
        prepare.prepare("mine", tmp_path / "data", folder, max_bad_images=1)
    assert sources.find_directory("mine", tmp_path / "data") is None
    prepare.prepare("mine", tmp_path / "data", folder, max_bad_images=2)
    assert len(everything("mine", tmp_path / "data", image_size=16)["image"]) == 2
    assert "2.png is no image" in caplog.text


def test_folders_that_cannot_be_read(folder, tmp_path):
    (folder / "0.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"1\.jpg has no caption file 1\.txt"):
        readers.read_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        readers.read_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--source_dir=.* is not a directory"):
        prepare.prepare("mine", tmp_path / "data", tmp_path / "nowhere")


# -- what stands in the way


def test_preparing_again_leaves_what_is_whole(data_dir):
    directory = data_dir / "captioned_digits" / "1.0.0"
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert prepare.prepare("captioned_digits", data_dir) == directory
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_a_preparation_killed_before_its_provenance_is_finished(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    known = tmp_path / "data" / "captioned_digits" / "1.0.0" / provenance.FILE
    body = known.read_bytes()
    known.unlink()
    prepare.prepare("captioned_digits", tmp_path / "data")
    assert known.read_bytes() == body


@pytest.mark.parametrize("provenance_too", [True, False])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_damaged_set_is_not_taken_for_whole(data_dir, tmp_path, provenance_too, harm):
    shutil.copytree(data_dir, tmp_path / "data")
    directory = tmp_path / "data" / "captioned_digits" / "1.0.0"
    shard = next(directory.glob("*-train.array_record*"))
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    if provenance_too:
        (directory / provenance.FILE).unlink()
    with pytest.raises(ValueError, match="delete"):
        prepare.prepare("captioned_digits", tmp_path / "data")
    with pytest.raises(ValueError, match=r"is missing|has \d+ bytes|half-written"):
        sources.open_source("captioned_digits", tmp_path / "data")


def test_fewer_records_than_promised_are_not_whole(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    directory = tmp_path / "data" / "captioned_digits" / "1.0.0"
    (directory / provenance.FILE).unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"4500"', '"4600"'))
    with pytest.raises(ValueError, match=r"4500 of 4600 'train' examples: delete"):
        prepare.prepare("captioned_digits", tmp_path / "data")


def test_an_interrupted_builder_leaves_nothing_to_read(tmp_path, monkeypatch):
    from diffusion.data.builders.captioned_digits import captioned_digits

    def killed(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(captioned_digits, "png", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("captioned_digits", tmp_path)
    with pytest.raises(ValueError, match="holds no"):
        sources.open_source("captioned_digits", tmp_path)


def test_a_publisher_out_of_reach_names_source_dir(tmp_path, monkeypatch):
    for key in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)

    def unreachable(address, timeout):
        raise OSError(f"no route to {address[0]}")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    # The catalogue asks for importlib_resources, which the standard library has by another name.
    import importlib.resources

    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    with pytest.raises(ValueError, match=r"cifar10.*www\.cs\.toronto\.edu.*--source_dir"):
        prepare.prepare("cifar10", tmp_path)
    assert sources.find_directory("cifar10", tmp_path) is None


def test_a_name_that_nobody_knows(tmp_path):
    with pytest.raises(ValueError, match=r"data\.name='digitz' is not in .*--source_dir"):
        prepare.prepare("digitz", tmp_path)
    with pytest.raises(ValueError, match="must both be set"):
        prepare.prepare("", tmp_path)
    with pytest.raises(ValueError, match="max_bad_images=-1"):
        prepare.prepare("captioned_digits", tmp_path, max_bad_images=-1)


def test_the_command_ends_with_one_sentence(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    data = {{'name': 'mnist', 'dir': {str(tmp_path / 'out')!r}}}\n"
        "    return ConfigDict({'data': data})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "experiments.prepare_data", f"--config={config}", "--source_dir=/x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --source_dir='/x' is not a directory\n"
    assert not (tmp_path / "out").exists()
