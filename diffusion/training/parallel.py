"""Where arrays live, and the two ways to run one train step.

`jit`: a mesh with axes `data` and `fsdp`. Batches are global arrays split over both axes;
parameters, averages and optimiser state are split alike over `fsdp` (their largest divisible
dimension, ZeRO-3, arXiv:1910.02054) and replicated over `data`. The compiler adds the collectives.

`pmap`: replicated data parallelism as `jax.pmap` has it: every array of the state gains a leading
device axis, and the step takes its mean with `lax.pmean`.

Either way the step is the same pure function of a task, and gives the same numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion.models import target

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
MIN_SHARDED_SIZE = 2**12  # elements; below it a split costs more than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A (data, fsdp) mesh over `devices` (default: all); -1 takes what is left.

    Raises ValueError when the product is not the device count.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        raise ValueError(
            f"parallel.fsdp={fsdp} does not divide the {count} devices: use a divisor of {count}"
        )
    data = count // fsdp if data == -1 else data
    if data * fsdp != count:
        raise ValueError(
            f"parallel.data={data} times parallel.fsdp={fsdp} is {data * fsdp}, but there are "
            f"{count} devices: set parallel.data=-1 to use them all"
        )
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def partition(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The largest dimension that `fsdp` divides is split; small or indivisible leaves are not."""
    if fsdp > 1 and np.prod(shape, dtype=np.int64) >= MIN_SHARDED_SIZE:
        for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
            if shape[axis] % fsdp == 0:
                return PartitionSpec(*[None] * axis, "fsdp")
    return PartitionSpec()


def state_shardings(mesh: Mesh, abstract: Any) -> Any:
    """The sharding of every leaf of a state, given its shapes."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition(leaf.shape, fsdp)), abstract)


def unsharded(mesh: Mesh, abstract: Any) -> list[str]:
    """Paths of the leaves of at least MIN_SHARDED_SIZE elements that `fsdp` could not split."""
    fsdp = mesh.shape["fsdp"]
    return [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
        if fsdp > 1
        and np.prod(leaf.shape, dtype=np.int64) >= MIN_SHARDED_SIZE
        and partition(leaf.shape, fsdp) == PartitionSpec()
    ]


def check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Raises ValueError when a batch cannot be split into equal parts over the devices."""
    if batch_size <= 0 or batch_size % (accumulate * devices):
        raise ValueError(
            f"train.batch_size={batch_size} is not a multiple of train.accumulate={accumulate} "
            f"times {devices} devices: use a multiple of {accumulate * devices}"
        )


def to_host(tree: Any) -> Any:
    """Arrays over all devices as NumPy, whole on every process; all of them must call it."""

    def get(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(get, tree)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Places arrays and runs steps in one of the two modes. `mesh` covers all devices."""

    mode: str
    mesh: Mesh

    def __post_init__(self):
        if self.mode not in ("jit", "pmap"):
            raise ValueError(f"parallel.mode={self.mode!r} is unknown: use 'jit' or 'pmap'")
        if self.mode == "pmap" and self.mesh.shape["fsdp"] != 1:
            raise ValueError(
                f"parallel.fsdp={self.mesh.shape['fsdp']} needs parallel.mode='jit': "
                "pmap replicates the state (parallel.fsdp=1)"
            )

    @property
    def devices(self) -> int:
        return self.mesh.size

    # -- placing -------------------------------------------------------------------------------

    def init(self, init_fn: Callable[[jax.Array], Any], key: jax.Array, start: Any = None) -> Any:
        """The state of `init_fn(key)`, born where it will live.

        `start`: parameters by network that replace the fresh ones (and their averages), each tree
        whole or in part.
        """
        abstract = jax.eval_shape(init_fn, key)
        shardings = self.shardings(abstract)
        given = _placed(start or {}, abstract.params, shardings.params)

        def begin(key, given):  # compiled, nothing is drawn that is replaced
            state = init_fn(key)
            averaged = {k: v for k, v in given.items() if k in state.ema}
            return state.replace(
                params=_replaced(state.params, given), ema=_replaced(state.ema, averaged)
            )

        return self.spread(jax.jit(begin, out_shardings=shardings)(key, given))

    def shardings(self, abstract: Any) -> Any:
        """Shardings of a state as checkpoints hold it (without pmap's leading axis)."""
        return state_shardings(self.mesh, abstract)

    def abstract(self, init_fn: Callable, key: jax.Array) -> Any:
        """Shapes and shardings of the state: what a checkpoint is restored into."""
        abstract = jax.eval_shape(init_fn, key)
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            abstract,
            self.shardings(abstract),
        )

    def spread(self, state: Any) -> Any:
        """From the form that checkpoints hold to the form that the step takes."""
        if self.mode == "jit":
            return state
        # As pmap lays out what it returns: of another sharding it would compile the step again.
        devices, count = self.mesh.devices.flatten().tolist(), self.devices
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        stack = jax.jit(lambda x: jnp.broadcast_to(x, (count, *x.shape)), out_shardings=sharding)
        return jax.tree.map(stack, state)

    def gather(self, state: Any) -> Any:
        """The inverse of `spread`."""
        if self.mode == "jit":
            return state
        # Indexing a sharded array would gather it from every device; one shard holds all.
        if jax.process_count() == 1:
            return jax.tree.map(lambda x: x.addressable_shards[0].data[0], state)
        whole = NamedSharding(self.mesh, PartitionSpec())  # for others to see it as one array

        def join(x):
            mine = [shard.data[0] for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], whole, mine)

        return jax.tree.map(join, state)

    def whole(self, state: Any) -> Any:
        """The state as global arrays that any jitted function takes, in either mode."""
        if self.mode == "jit" or jax.process_count() > 1:
            return self.gather(state)
        return jax.device_put(self.gather(state), NamedSharding(self.mesh, PartitionSpec()))

    def batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows to what the step takes: global arrays split over the devices."""
        if self.mode == "pmap":
            count = jax.local_device_count()
            batch = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        return self.rows(batch)

    def rows(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """As `batch`, for a jitted function in either mode."""
        sharding = NamedSharding(self.mesh, BATCH)
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)  # all arrays by one call
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def replicate(self, tree: Any) -> Any:
        """Frozen weights, the same on every device."""
        tree = jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))
        return self.spread(tree)

    def check_split(self, abstract: Any) -> list[str]:
        """Paths of the large leaves that `fsdp` could not split: they lie whole on each device.

        Raises ValueError when it splits none at all.
        """
        fsdp = self.mesh.shape["fsdp"]
        left = unsharded(self.mesh, abstract)
        if fsdp > 1 and all(
            s.is_fully_replicated for s in jax.tree.leaves(self.shardings(abstract))
        ):
            raise ValueError(
                f"parallel.fsdp={fsdp} splits no parameter: none has {MIN_SHARDED_SIZE} elements "
                f"and a dimension that {fsdp} divides; use parallel.fsdp=1 or another divisor"
            )
        return left

    # -- running -------------------------------------------------------------------------------

    def jitted(self, train_step: Callable, shardings: Any) -> Any:
        """A step under `jit`, its state donated and laid out as it came."""
        scalar = NamedSharding(self.mesh, PartitionSpec())
        step = self.aimed(train_step)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, scalar))

    def aimed(self, function: Callable) -> Callable:
        """`function`, traced for the mesh (`models/target.py`)."""
        return target.aimed(function, self.mesh.devices.flatten().tolist(), self.mesh)

    def step(self, train_step: Callable) -> Callable:
        """`train_step(state, batch, frozen, axis_name=...) -> (state, metrics)`, compiled.

        The state's buffers are donated: the one handed in is gone afterwards.
        """
        if self.mode == "jit":
            jitted = None

            def run(state, batch, frozen):
                nonlocal jitted
                if jitted is None:
                    jitted = self.jitted(train_step, jax.tree.map(lambda x: x.sharding, state))
                return jitted(state, batch, frozen)

            return run
        devices = self.mesh.devices.flatten().tolist()
        step = target.aimed(functools.partial(train_step, axis_name="data"), devices)
        return jax.pmap(step, axis_name="data", donate_argnums=0, devices=devices)

    def scalars(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Metrics on the host; waits for the step that made them."""
        return {k: float(v) for k, v in jax.device_get(self.gather(metrics)).items()}


def _placed(start: Any, abstract: Any, shardings: Any) -> Any:
    """The leaves of `start` that `abstract` has, laid out. ValueError for another shape."""
    if isinstance(abstract, dict):
        names = [name for name in start if name in abstract]
        return {n: _placed(start[n], abstract[n], shardings[n]) for n in names}
    if abstract.shape != start.shape:
        raise ValueError(f"init_from: a parameter has shape {start.shape}, not {abstract.shape}")
    return jax.device_put(np.asarray(start, abstract.dtype), shardings)


def _replaced(tree: Any, given: Any) -> Any:
    """`tree` with the leaves of `given` in the places of its own."""
    if not isinstance(tree, dict):
        return given
    return {name: _replaced(v, given[name]) if name in given else v for name, v in tree.items()}
