"""EDM's SongUNet and DhariwalUNet in these tests' own words: PyTorch, on tensors by their names.

After the paper's table 7 and NVlabs/edm:training/networks.py; nothing of it is copied. `persist`
makes a file as their torch_utils/persistence.py does.
"""

import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F


def filtered(x, taps, way, pad=None):
    """Depthwise [1, 1] or [1, 3, 3, 1], twice as large or half."""
    k = torch.tensor(taps, dtype=torch.float32)
    k = (torch.outer(k, k) / k.sum() ** 2).expand(x.shape[1], 1, -1, -1)
    pad = (len(taps) - 1) // 2 if pad is None else pad
    if way == "up":
        return F.conv_transpose2d(x, 4 * k, stride=2, padding=pad, groups=x.shape[1])
    return F.conv2d(x, k, stride=2, padding=pad, groups=x.shape[1])


class Reference:
    """`song`: DDPM++ or NCSN++ (by whether its features are Fourier's); else ADM."""

    def __init__(self, tensors, song, heads_width=64):
        self.t = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        self.song, self.heads_width = song, heads_width
        self.ncsnpp = "map_noise.freqs" in self.t
        self.taps = (1, 3, 3, 1) if self.ncsnpp else (1, 1)

    def conv(self, name, x, **how):
        weight = self.t[f"{name}.weight"]
        how = {"padding": weight.shape[-1] // 2} | how
        return F.conv2d(x, weight, self.t[f"{name}.bias"], **how)

    def dense(self, name, x):
        return F.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def norm(self, name, x):
        eps = 1e-6 if self.song else 1e-5
        groups = min(32, x.shape[1] // 4)
        return F.group_norm(x, groups, self.t[f"{name}.weight"], self.t[f"{name}.bias"], eps)

    def block(self, name, x, emb):
        way = "up" if name.endswith("_up") else "down" if name.endswith("_down") else None
        half = math.sqrt(0.5) if self.song else 1.0
        h = F.silu(self.norm(f"{name}.norm0", x))
        shortcut = x
        if way:
            h, shortcut = filtered(h, self.taps, way), filtered(x, self.taps, way)
        if f"{name}.skip.weight" in self.t:
            shortcut = self.conv(f"{name}.skip", shortcut)
        h, told = self.conv(f"{name}.conv0", h), self.dense(f"{name}.affine", emb)[..., None, None]
        if self.song:
            h = self.norm(f"{name}.norm1", h + told)
        else:
            scale, shift = told.chunk(2, 1)
            h = self.norm(f"{name}.norm1", h) * (1 + scale) + shift
        x = half * (shortcut + self.conv(f"{name}.conv1", F.silu(h)))
        if f"{name}.qkv.weight" not in self.t:
            return x
        n, c, *space = x.shape
        heads = 1 if self.song else c // self.heads_width
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x))
        q, k, v = qkv.reshape(n, heads, c // heads, 3, -1).unbind(3)
        weights = (q.transpose(2, 3) @ k / math.sqrt(c // heads)).softmax(-1)
        h = (v @ weights.transpose(2, 3)).reshape(n, c, *space)
        return half * (x + self.conv(f"{name}.proj", h))

    def embedding(self, noise, labels, augment):
        if self.ncsnpp:
            angle = noise[:, None] * 2 * math.pi * self.t["map_noise.freqs"]
        else:
            half = self.t["map_layer0.weight"].shape[1] // 2
            angle = noise[:, None] * 1e-4 ** (torch.arange(half) / (half - self.song))
        parts = (angle.sin(), angle.cos()) if self.song else (angle.cos(), angle.sin())
        emb = torch.cat(parts, 1)
        if self.song and labels is not None:
            emb = emb + self.dense("map_label", labels * math.sqrt(labels.shape[1]))
        if augment is not None:
            emb = emb + self.dense("map_augment", augment)
        emb = self.dense("map_layer1", F.silu(self.dense("map_layer0", emb)))
        if not self.song and labels is not None:
            emb = emb + self.dense("map_label", labels)
        return F.silu(emb)

    def __call__(self, x, noise, labels=None, augment=None, levels=2, blocks=1):
        emb, side, picture = self.embedding(noise, labels, augment), x.shape[-1], x
        at = [f"{side >> i}x{side >> i}" for i in range(levels)]
        h = self.conv(f"enc.{at[0]}_conv", x)
        skips = [h]
        for i in range(levels):
            if i:
                h = self.block(f"enc.{at[i]}_down", h, emb)
                if self.ncsnpp:
                    wide = self.conv(f"enc.{at[i]}_aux_residual", picture, padding=2)
                    h = picture = (h + filtered(wide, self.taps, "down", pad=0)) / math.sqrt(2)
                skips.append(h)
            for j in range(blocks):
                h = self.block(f"enc.{at[i]}_block{j}", h, emb)
                skips.append(h)
        for j in range(2):
            h = self.block(f"dec.{at[-1]}_in{j}", h, emb)
        for i in reversed(range(levels)):
            if i < levels - 1:
                h = self.block(f"dec.{at[i]}_up", h, emb)
            for j in range(blocks + 1):
                h = self.block(f"dec.{at[i]}_block{j}", torch.cat([h, skips.pop()], 1), emb)
        norm, conv = "out_norm", "out_conv"
        if self.song:
            norm, conv = f"dec.{at[0]}_aux_norm", f"dec.{at[0]}_aux_conv"
        return self.conv(conv, F.silu(self.norm(norm, h)))


# -- files ----------------------------------------------------------------------------------------


class Persistent:
    """Pickled as their decorated classes are."""

    source = "raise SystemExit('the source was run')"

    def __init__(self, name, **state):
        self.name, self.state = name, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source}
        return _reconstruct_persistent_obj, (meta | {"class_name": self.name, "state": self.state},)


def _reconstruct_persistent_obj(meta):
    exec(meta["module_src"], {})


def module(name, tensors, settings=None, **more):
    """A module and those within it, of tensors by dotted names."""
    own = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items() if "." not in k}
    inside: dict = {}
    for name_in, tensor in tensors.items():
        if "." in name_in:
            first, rest = name_in.split(".", 1)
            inside.setdefault(first, {})[rest] = tensor
    buffers = {k: own.pop(k) for k in ("freqs", "resample_filter") if k in own}
    found = {k: torch.nn.Parameter(v) for k, v in own.items()}
    modules = {}
    for part, inner in inside.items():
        modules[part] = module("Layer", inner)
        if part in ("enc", "dec"):
            modules[part], made = torch.nn.ModuleDict(), modules[part]
            modules[part].__dict__["_modules"] = made.state["_modules"]
    state = {"training": False, "_parameters": found, "_buffers": buffers}
    state |= {"_modules": modules | more}
    state |= {"_backward_hooks": {}, "_non_persistent_buffers_set": set(), "_init_args": ()}
    return Persistent(name, **state, _init_kwargs=settings or {})


def persist(path, root):
    """`pickle.dump(root)` with `torch_utils.persistence` there, as on the authors' machines."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    made = {name: types.ModuleType(name) for name in names}
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    made["dnnlib.util"].EasyDict = EasyDict
    before = _reconstruct_persistent_obj.__module__, EasyDict.__module__
    sys.modules.update(made)
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = names[1], names[3]
    try:
        path.write_bytes(pickle.dumps(root))
    finally:
        _reconstruct_persistent_obj.__module__, EasyDict.__module__ = before
        for name in names:
            del sys.modules[name]
    return path


class EasyDict(dict):
    """As dnnlib's."""
