"""Tensors out of PyTorch's `.pth`, `.pt`, `.bin` and `.ckpt` files, without running what they hold.

`torch.save` writes a pickle of the object, in which every storage (a flat array that tensors are
views of) stands as a persistent id, and the storages' bytes beside it
(pytorch/pytorch: `torch/serialization.py`):

    zip (PyTorch >= 1.6)    NAME/data.pkl, NAME/data/KEY for each storage, NAME/byteorder
    legacy                  pickles of a magic number, the version, the system and the object, one
                            of the list of keys, then for each key its length (int64) and its bytes

A pickle is a program: it names functions and has them called, and so `pickle.load` of a stranger's
file runs the stranger's code. Here a name is never imported. The few that tensors are made of stand
for functions of this module that only note what is asked for; those that Lightning and NumPy leave
beside the weights stand for an object that does nothing; any other name refuses the file. A tensor
is then cut from its storage by

    (1)  t[i, j, ...] = storage[offset + i stride_0 + j stride_1 + ...]

once all of those places are known to lie within the storage.
"""

import collections
import contextlib
import dataclasses
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.interop.pickled_names import DTYPES, INERT, INERT_PACKAGES, STRANGE

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

Storages = Callable[["Storage"], bytes]  # a storage's bytes


class _Refused(Exception): ...  # a pickle names what it has no business with


@dataclass(frozen=True)
class Storage:
    """A persistent id: a flat array of `numel` elements, to be found under `key`."""

    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, equation 1; cut when it is asked for."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass

    def __setitem__(self, _, __):
        pass

    def append(self, _):
        pass

    def extend(self, _):
        pass


class _Parameters(dict):
    """A ParameterDict: its parameters, by name."""

    def __setstate__(self, state):
        self.update(state["_parameters"])


def _rebuild_tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    return Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, *_):
    """Of a storage without a type: float8, unsigned integers."""
    plain = _rebuild_tensor(storage, offset, size, stride)
    if not isinstance(dtype, np.dtype):
        raise TypeError("a tensor of a dtype that is not known here")
    typed = Storage(dtype, storage.key, storage.numel // dtype.itemsize)
    return dataclasses.replace(plain, storage=typed)


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": tuple,
    "torch.nn.modules.container.ParameterDict": _Parameters,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    # A tensor with Python attributes, or torch's Buffer: the tensor.
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _type, arguments, *_: rebuild(
        *arguments
    ),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
}


class Unpickler(pickle.Unpickler):
    """Imports nothing: a name is looked up in `KNOWN`, is inert, or refuses the file.

    `storages`: all that the pickle speaks of, by key.
    """

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.known = KNOWN

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.known:
            return self.known[full]
        if full in INERT or module.split(".")[0] in INERT_PACKAGES:
            return _Inert
        raise _Refused(full)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or (view and view[0] is not None):
            raise TypeError(f"a persistent id of another kind ({kind!r:.40})")
        return self.storages.setdefault(str(key), Storage(dtype, str(key), int(numel)))


def read(
    path: str | os.PathLike,
    entries: Sequence[str] = ("state_dict",),
    texts: dict[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Every tensor of the file by its name; no code of the file is run.

    Where the file holds a dict with one of the `entries`, the first of them is taken. Entries that
    are no tensors (step counters, nested dicts) are left out; names are as they stand. Arrays have
    the dtype that is stored, bfloat16 included, and may share memory and be read-only. `texts` gets
    the strings of the whole file's dict, where it is given.

    Raises:
      ValueError: naming the file: it is missing, truncated or corrupt, is no file of PyTorch, holds
      no tensors, or names anything that tensors are not made of.
    """
    with reading(path) as file:
        archive = zipfile.is_zipfile(file)
        file.seek(0)
        tree, storages = (_read_zip if archive else read_legacy)(file)
        return _tensors(tree, storages, entries, texts)


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[BufferedIOBase]:
    """The open file; whatever is wrong with it, as the ValueErrors of `read`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the file of weights, or fetch it again")
    try:
        with path.open("rb") as file:
            yield file
    except _Refused as error:
        if str(error).startswith("torch_utils.persistence."):
            raise ValueError(
                f"{path} holds networks by their source code, which is not run: EDM's are read by "
                "`experiments.convert --from=edm`; give others' weights in another form"
            ) from error
        if STRANGE.fullmatch(str(error)):
            raise ValueError(
                f"{path} holds a tensor that is no plain array ({error}), as networks here have "
                "them: save it dense and real, as float32 or half precision"
            ) from error
        raise ValueError(
            f"{path} asks for {error}, which no tensor is made of, and is not read, since that "
            "could run code: fetch the weights again from their publisher, or as safetensors"
        ) from error
    except Exception as error:  # whatever a broken pickle or archive makes Python raise
        why = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is truncated, corrupt or no weights of PyTorch ({why:.120}): fetch it again"
        ) from error


def _read_zip(file: BufferedIOBase) -> tuple[Any, Storages]:
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError("it holds no data.pkl, as TorchScript and other archives do not")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its byte order is not little-endian")
    with archive.open(pickles[0]) as pickled:
        tree = Unpickler(pickled).load()

    def storage(wanted: Storage) -> bytes:
        info = archive.getinfo(f"{root}data/{wanted.key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a storage is compressed, which PyTorch never does")
        return archive.read(info)  # checks the CRC

    return tree, storage


def read_legacy(file: BufferedIOBase) -> tuple[Any, Storages]:
    if Unpickler(file).load() != LEGACY_MAGIC:
        raise ValueError("it is neither a zip archive nor a legacy file of torch.save")
    _version, system = (Unpickler(file).load() for _ in range(2))
    if not system.get("little_endian", True):
        raise ValueError("its byte order is not little-endian")
    unpickler = Unpickler(file)
    tree, keys, stored = unpickler.load(), Unpickler(file).load(), {}
    for key in keys:
        (length,) = struct.unpack("<q", file.read(8))
        stored[key] = file.read(length * unpickler.storages[key].dtype.itemsize)
    return tree, lambda wanted: stored[wanted.key]


def _tensors(
    tree: Any, storages: Storages, entries: Sequence[str], texts: dict[str, str] | None
) -> dict[str, np.ndarray]:
    if isinstance(tree, Mapping):
        if texts is not None:
            texts |= {key: text for key, text in tree.items() if isinstance(text, str)}
        tree = next((tree[key] for key in entries if isinstance(tree.get(key), Mapping)), tree)
    found = tree.items() if isinstance(tree, Mapping) else ()
    wanted = {name: t for name, t in found if isinstance(name, str) and isinstance(t, Tensor)}
    if not wanted:
        raise ValueError("it holds no dict of tensors")
    flat: dict[Storage, np.ndarray] = {}
    return {name: array(tensor, storages, flat) for name, tensor in wanted.items()}


def array(tensor: Tensor, storages: Storages, flat: dict[Storage, np.ndarray]) -> np.ndarray:
    """A tensor's values; `flat` keeps the storages that were read."""
    if tensor.storage not in flat:
        flat[tensor.storage] = _flat(tensor.storage, storages)
    return _cut(flat[tensor.storage], tensor)


def _flat(storage: Storage, storages: Storages) -> np.ndarray:
    data = storages(storage)
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} has {len(data)} bytes, not what it says")
    return np.frombuffer(data, storage.dtype)


def _cut(flat: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Equation 1."""
    size, stride = tensor.size, tensor.stride
    count = math.prod(size)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min((tensor.offset, *size, *stride)) < 0 or count > flat.size:
        raise ValueError("a tensor is larger than its storage")
    if count == 0:
        return np.zeros(size, flat.dtype)
    if last >= flat.size:
        raise ValueError("a tensor reaches beyond its storage")
    items = flat[tensor.offset :].view(f"V{flat.itemsize}")  # float8 has no name that NumPy reads
    strides = [s * flat.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided(items, size, strides, writeable=False)
    return np.ascontiguousarray(view).view(flat.dtype).reshape(size)
