"""Flash attention for TPUs: Pallas' kernel (`jax.experimental.pallas.ops.tpu.flash_attention`).

Its tiles want lengths that are multiples of its blocks. Heads narrower than 128 lanes are padded
with zeros, which change neither scores nor the part of the result that is kept. A program that the
compiler partitions would gather its operands for a kernel that is not its own: each device is given
its part of the batch.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from diffusion.models import target

BLOCK = 512  # tokens of a tile: lengths are multiples of it
LANES = 128
MIN_TOKENS = 1024  # below, the scores are small, and XLA's own fusion as fast


def tpu_applies(q: Array, k: Array) -> bool:
    """Whether there is enough to do, and in whole tiles."""
    lengths = (q.shape[1], k.shape[1])
    return min(lengths) >= MIN_TOKENS and not any(n % BLOCK for n in lengths)


def tpu_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, without the scores in memory."""
    mesh = target.current().mesh
    if mesh is None or mesh.size == 1:
        return _flash(q, k, v)
    split = PartitionSpec(mesh.axis_names)
    return jax.shard_map(_flash, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(
        q, k, v
    )


def _flash(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    width = q.shape[-1]
    pad = [(0, 0)] * 3 + [(0, -width % LANES)]
    q, k, v = (jnp.pad(x, pad).swapaxes(1, 2) for x in (q, k, v))
    sizes = flash.BlockSizes(
        **{name: BLOCK for name in ("block_q", "block_k_major", "block_k")},
        block_b=1,
        **{f"block_{name}_dkv": BLOCK for name in ("q_major", "k_major", "k", "q")},
        **{f"block_{name}_dq": BLOCK for name in ("k_major", "k", "q")},
    )
    run = functools.partial(flash.flash_attention, sm_scale=width**-0.5, block_sizes=sizes)
    return run(q, k, v).swapaxes(1, 2)[..., :width]
