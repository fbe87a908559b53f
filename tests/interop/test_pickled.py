"""Files of `torch.save`, read without running them: equal to torch; hostile ones are refused."""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from diffusion.interop import pickled

FORMATS = {"zip": True, "legacy": False}


def save(path, value, kind="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape), name
        bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert found[name].tobytes() == bits.tobytes(), name


def tensors():
    base = torch.randn(4, 6)
    return {
        "float32": base,
        "float16": torch.randn(3).half(),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "float64": torch.randn(2, 2, 2).double(),
        "int64": torch.arange(7),
        "int32": torch.arange(3, dtype=torch.int32),
        "uint8": torch.arange(4, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "row": base[2],
        "column": base[1:, 3],
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_every_dtype_and_view_is_bit_equal(tmp_path, kind):
    wanted = tensors()
    found = pickled.read(save(tmp_path / "w.pth", wanted, kind))
    same(found, wanted)
    assert found["bfloat16"].dtype.name == "bfloat16"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_state_dict_inside_a_checkpoint_is_taken(tmp_path, kind):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    whole = {
        "epoch": 3,
        "global_step": 17,
        "state_dict": network.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": collections.defaultdict(dict, {"best": np.float64(0.5)}),
    }
    same(pickled.read(save(tmp_path / "w.ckpt", whole, kind)), network.state_dict())


def test_parameters_and_plain_dicts_are_read_and_the_rest_left_out(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    found = pickled.read(save(tmp_path / "w.pt", {"weight": weight, "step": 3, "more": {"a": 1}}))
    same(found, {"weight": weight.detach()})


class Lightning:
    """Pickled as an object of a class that is not installed here."""


def test_what_lightning_leaves_beside_the_weights_is_passed_over(tmp_path):
    Lightning.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    module = type(os)("pytorch_lightning.callbacks.model_checkpoint")
    module.Lightning = Lightning
    names = [module.__name__.rsplit(".", n)[0] for n in (2, 1)]
    kept = Lightning()
    kept.best = 0.5
    value = {"state_dict": {"w": torch.ones(2)}, "callbacks": {Lightning: {"a": kept}}}
    with pytest.MonkeyPatch.context() as patch:
        for name in (*names, module.__name__):
            patch.setitem(__import__("sys").modules, name, module)
        save(tmp_path / "w.ckpt", value)
    same(pickled.read(tmp_path / "w.ckpt"), {"w": torch.ones(2)})


class Hostile:
    """A pickle that makes a file when it is loaded as pickles are."""

    def __init__(self, function, *arguments):
        self.made = (function, arguments)

    def __reduce__(self):
        return self.made


def hostile(canary):
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Hostile(os.system, f"touch {canary}"),
        "exec": Hostile(exec, code),
        "eval": Hostile(eval, code),
        "getattr": Hostile(getattr, os, "system"),
        "torch": Hostile(torch.hub.load, "somebody/something", "model"),
        "numpy": Hostile(np.load, str(canary)),
        "module": torch.nn.Linear(1, 1),
    }


@pytest.mark.parametrize("kind", [*FORMATS, "bare"])
@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, kind, name):
    canary, path = tmp_path / "canary", tmp_path / "w.pth"
    value = hostile(canary)[name]
    if name == "getattr":
        value = Hostile(getattr, "text", "upper")  # a module itself cannot be pickled
    if kind == "bare":
        path.write_bytes(pickle.dumps({"state_dict": value}))
    else:
        save(path, {"state_dict": {"w": torch.ones(2), "x": value}}, kind)
    with pytest.raises(ValueError, match=r"w\.pth asks for .*safetensors"):
        pickled.read(path)
    assert not canary.exists()


def test_the_canary_of_these_tests_sings(tmp_path):
    """The same pickle, loaded as pickles are, does make the file."""
    pickle.loads(pickle.dumps(hostile(tmp_path / "canary")["exec"]))
    assert (tmp_path / "canary").exists()


def test_networks_stored_by_their_source_are_named_and_not_run(tmp_path):
    """As EDM's .pkl: `_reconstruct_persistent_obj(meta)`, meta with the module's source."""
    canary = tmp_path / "canary"
    meta = {"type": "class", "module_src": f"open({str(canary)!r}, 'w')", "state": {}}
    code = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    body = pickle.dumps(meta, protocol=0)[:-1]
    (tmp_path / "edm.pkl").write_bytes(code + b"(" + body + b"tR.")
    with pytest.raises(ValueError, match=r"edm\.pkl holds networks by their source code"):
        pickled.read(tmp_path / "edm.pkl")
    assert not canary.exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_refused(tmp_path, kind):
    path = save(tmp_path / "w.pth", {"w": torch.randn(64, 64), "v": torch.randn(9)}, kind)
    data = path.read_bytes()
    for length in (0, 1, 2, 20, 100, 300, 1000, len(data) // 2, len(data) - 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"w\.pth is truncated, corrupt"):
            pickled.read(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path / "w.pth", {"w": torch.zeros(64, 64)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"w\.pth .*CRC"):
        pickled.read(path)


@pytest.mark.parametrize(
    "data",
    [b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02K\x01.", b"."],
)
def test_what_is_no_file_of_torch_is_refused(tmp_path, data):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"w\.pth is truncated, corrupt or no weights"):
        pickled.read(tmp_path / "w.pth")


def test_missing_files_other_archives_and_empty_dicts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth is missing"):
        pickled.read(tmp_path / "none.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match=r"data\.pkl"):
        pickled.read(tmp_path / "w.pth")
    save(tmp_path / "w.pth", {"step": 3})
    with pytest.raises(ValueError, match="no dict of tensors"):
        pickled.read(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (2, (3,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (9,), (0,))],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, offset, size, stride):
    """Four elements stored: no view may read the memory beside them."""
    save(tmp_path / "w.pth", {"w": torch.ones(4)})
    with pytest.MonkeyPatch.context() as patch:
        cut = pickled._rebuild_tensor

        def other(storage, *_):
            return cut(storage, offset, size, stride)

        patch.setitem(pickled.KNOWN, "torch._utils._rebuild_tensor_v2", other)
        with pytest.raises(ValueError, match="storage"):
            pickled.read(tmp_path / "w.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    """A few bytes could otherwise unfold to fill the memory."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(10_000)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        pickled.read(tmp_path / "w.pth")
