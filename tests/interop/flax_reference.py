"""Flax's trees of PyTorch's tensors, as Diffusers 0.39 and Transformers 4 saved them."""

import re

import numpy as np


def flax_tree(tensors):
    """What Diffusers 0.39 and Transformers 4 saved of Flax: their naming and layout, written out.

    Kernels (in, out) and (height, width, in, out); a norm's weight is its scale; lists are
    name_0, name_1, save CLIP's layers, which are a level of their own; an attention of the first
    stage has query, key, value, proj_attn.
    """
    tree = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        value = tensor.float().numpy()
        if "layers" not in path:
            path = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", ".".join(path)).split(".")
        if path[-2:-1] == ["attentions_0"] and path[0] in ("encoder", "decoder"):
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
            path[-1] = old.get(path[-1], path[-1])
        if leaf == "weight":
            if "embedding" in path[-1]:
                leaf = "embedding"
            elif value.ndim == 1:
                leaf = "scale"
            else:
                leaf = "kernel"
                value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = np.ascontiguousarray(value)
    return tree
