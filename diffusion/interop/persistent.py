"""Networks that are pickled with their source code, as EDM's and EDM2's `.pkl`: their arrays.

NVlabs' torch_utils/persistence.py reduces an object to a call of `_reconstruct_persistent_obj` with

    {"type": "class", "version": 6, "module_src": SOURCE, "class_name": NAME, "state": attributes}

which would run SOURCE. Here that call makes a note of NAME and of the attributes: a module's
`_parameters`, `_buffers` and `_modules`, and the arguments it was made with. SOURCE is not looked
at, and as in `pickled.py` nothing is imported. A tensor that is pickled without `torch.save` has
its storage as the bytes of a legacy file of one storage.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.interop import pickled


class _State:
    """An object of a class that is not here: its attributes, as its pickle has them."""

    name: str = ""
    attributes: Any = None

    def __setstate__(self, state):
        self.attributes = state


class _Dict(dict):
    def __setstate__(self, state):
        pass


@dataclass
class Network:
    """A module's class by name, the keyword arguments it was made with, and what it holds."""

    name: str
    settings: Mapping[str, Any]
    own: dict[str, np.ndarray] = field(default_factory=dict)
    inner: dict[str, "Network"] = field(default_factory=dict)

    def tensors(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Parameters and buffers, those of inner modules included, by their dotted names."""
        found = {prefix + name: tensor for name, tensor in self.own.items()}
        for name, module in self.inner.items():
            found |= module.tensors(f"{prefix}{name}.")
        return found


class _Unpickler(pickled.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self.bytes: dict[str, bytes] = {}
        self.known = {
            **pickled.KNOWN,
            "torch_utils.persistence._reconstruct_persistent_obj": _reconstructed,
            "torch.storage._load_from_bytes": self._storage,
            "torch.nn.modules.container.ModuleDict": _State,
            "torch.nn.modules.container.ModuleList": _State,
            "dnnlib.util.EasyDict": _Dict,
        }

    def _storage(self, data: bytes) -> pickled.Storage:
        tree, stored = pickled.read_legacy(io.BytesIO(data))
        if not isinstance(tree, pickled.Storage):
            raise TypeError("a tensor whose storage is none")
        own = pickled.Storage(tree.dtype, f"bytes {len(self.bytes)}", tree.numel)
        self.bytes[own.key] = stored(tree)
        return own


def _reconstructed(meta: Mapping[str, Any]) -> _State:
    state = _State()
    state.name, state.attributes = str(meta["class_name"]), meta["state"]
    return state


def read_network(path: Path, entry: str = "ema") -> Network:
    """The network under `entry` of a file's dict; no code of the file is run.

    ValueError naming the file: it is missing, truncated or corrupt, holds no such network, or names
    anything that networks are not made of.
    """
    with pickled.reading(path) as file:
        unpickler = _Unpickler(file)
        root = unpickler.load()
        found = root.get(entry) if isinstance(root, Mapping) else None
        if not isinstance(found, _State):
            raise ValueError(f"it holds no network {entry!r}")
        flat: dict[pickled.Storage, np.ndarray] = {}
        return _network(found, unpickler, flat)


def _network(state: _State, unpickler: _Unpickler, flat: dict) -> Network:
    attributes = state.attributes or {}
    tensors = {**attributes.get("_parameters", {}), **attributes.get("_buffers", {})}
    own = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, pickled.Tensor):
            own[name] = pickled.array(tensor, lambda s: unpickler.bytes[s.key], flat)
    modules = attributes.get("_modules", {})
    inner = {k: _network(m, unpickler, flat) for k, m in modules.items() if isinstance(m, _State)}
    return Network(state.name, attributes.get("_init_kwargs") or {}, own, inner)
