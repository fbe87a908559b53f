"""What the collectives of a compiled step carry, by where it comes from and where it goes.

Each value of a module is followed from the program's parameters, which are named, through fusions,
loops and branches to each collective, and from there to the products that read it:

    weights      depends on parameters of the networks and on no example
    gradients    depends on the examples, and flows on into no product: into the update alone
    activations  depends on the examples, and is an operand of a product after that
    other        scalars and metrics: at most SCALARS numbers

A collective may stand in a fusion (a TPU's reduce-scatter), in several (asynchronous ones), or in a
computation of its own.
"""

import dataclasses
import math
import re
from typing import Any

import jax

from experiments.plan.hlo import COLLECTIVES, TYPE, Line, Module, elements, type_bytes

SCALARS = 32  # more than a step's metrics
KERNELS = ("tpu_custom_call",)  # Pallas's: they have products of their own
CLASSES = ("gradients", "weights", "activations", "other")
EXAMPLES = 1  # the bit of what depends on a batch


@dataclasses.dataclass
class Travel:
    """One collective. size: elements of its largest result. leaves: of weights, which."""

    kind: str
    place: str
    size: int
    result_bytes: int
    times: int = 0
    carries: str = "other"
    leaves: tuple[str, ...] = ()


class Flow:
    """`travels` of a compiled module. A value is a set of bits, of a tuple one for each part:
    EXAMPLES, one for each parameter of a network, and one for each collective."""

    def __init__(self, text: str):
        self.module, self.trained = Module(text), "jvp(" in text
        self.leaves: dict[str, int] = {}  # the bits of parameters, by path
        self.passed: dict[str, int] = {}  # those of collectives, by name
        self.found: dict[str, Travel] = {}
        self.first: dict[str, str] = {}  # the instruction that begins it
        self.given: dict[str, int] = {}  # to a collective
        self.read = 0  # by products
        self._run(self.module.entry, None, 1)

    def travels(self) -> list[Travel]:
        for name, travel in self.found.items():
            given = self.given[name]
            leaves = tuple(path for path, bit in self.leaves.items() if given & bit)
            if travel.size > SCALARS and given & EXAMPLES:
                read = self.read & self.passed[name]
                travel.carries = "activations" if read else "gradients"
            elif travel.size > SCALARS and leaves:
                travel.carries, travel.leaves = "weights", leaves
        return list(self.found.values())

    def _bit(self, table: dict[str, int], name: str) -> int:
        return table.setdefault(name, 2 << (len(self.leaves) + len(self.passed)))

    def _run(self, computation: str, given: list[Any] | None, times: int) -> Any:
        """The value of a computation's root, given its parameters' (None: the program's own)."""
        values: dict[str, Any] = {}
        for line in self.module.lines.get(computation, ()):
            operands = [values.get(name, 0) for name in line.operands]
            if line.kind == "parameter" and given is not None:
                i = int(re.match(r"\d+", line.rest)[0])
                values[line.name] = given[i] if i < len(given) else _flat(given)
            else:
                values[line.name] = self._value(line, operands, times)
        return values.get(self.module.roots.get(computation, ""), 0)

    def _value(self, line: Line, operands: list[Any], times: int) -> Any:
        kind = line.kind.removesuffix("-start")
        if kind == "parameter":
            if line.place.startswith(("batch", "seeds", "indices")):
                return EXAMPLES
            weights = line.place.startswith(("state.params", "frozen"))
            return self._bit(self.leaves, _path(line.place)) if weights else 0
        if kind == "tuple":
            return tuple(operands)
        if kind == "get-tuple-element":
            whole, i = operands[0], int(re.search(r"index=(\d+)", line.rest)[1])
            return whole[i] if isinstance(whole, tuple) else whole
        if kind in COLLECTIVES:
            return self._collective(line, kind, operands, times)
        if operands and (kind.endswith("-done") or kind in ("async-update", "opt-barrier")):
            return operands[0]
        if kind in ("fusion", "call", "async") and line.called:
            return self._run(line.called[0], operands, times)
        if kind == "while":
            return self._loop(line, operands[0], times)
        if kind == "conditional":
            branches = zip(line.called, operands[1:])
            return _join([self._run(name, [operand], times) for name, operand in branches])
        value = _flat(operands)
        update = self.trained and line.place and "jvp(" not in line.place  # Muon's products
        if (self.module.flops(line) or line.target in KERNELS) and not update:
            self.read |= value
        return value

    def _loop(self, line: Line, value: Any, times: int) -> Any:
        """Until what goes round carries nothing new."""
        while True:
            following = _join([value, self._run(line.called[0], [value], 0)])
            if following == value:
                self._run(line.called[0], [value], times * line.trips)
                return value
            value = following

    def _collective(self, line: Line, kind: str, operands: list[Any], times: int) -> Any:
        types = [found[0] for found in TYPE.finditer(line.type)]
        if line.kind == "all-gather-start":  # operands, then results
            types = types[len(types) // 2 :]
        elif line.kind == "collective-permute-start":
            types = types[1:2]
        # A TPU's compiler writes one into each kernel that runs meanwhile: its channel is the same.
        channel = re.search(r"channel_id=(\d+)", line.rest)
        name = channel[0] if channel else line.name
        bit, sizes = self._bit(self.passed, name), [elements(text) for text in types]
        new = Travel(kind, line.place, max(sizes, default=0), sum(map(type_bytes, types)))
        first, travel = self.first.setdefault(name, line.name), self.found.setdefault(name, new)
        if first == line.name:
            travel.times += times
            self.given[name] = self.given.get(name, 0) | _flat(operands)
        if len(operands) > 1 and kind != "collective-permute":
            return tuple(_flat([operand]) | bit for operand in operands)
        return _flat(operands) | bit


def _flat(values: Any) -> int:
    found = 0
    for value in values:
        found |= _flat(value) if isinstance(value, tuple) else value
    return found


def _join(values: list[Any]) -> Any:
    """Part by part, where all are tuples of as many."""
    if all(isinstance(v, tuple) and len(v) == len(values[0]) for v in values):
        return tuple(_join(list(parts)) for parts in zip(*values))
    return _flat(values)


def totals(travels: list[Travel]) -> dict[str, dict[str, int]]:
    """{class: {"count", "bytes"}} of one step on one device."""
    found = {name: {"count": 0, "bytes": 0} for name in CLASSES}
    for travel in travels:
        found[travel.carries]["count"] += travel.times
        found[travel.carries]["bytes"] += travel.times * travel.result_bytes
    return found


def gathers(travels: list[Travel], networks: Any) -> float:
    """How often that parameter of the networks travels whole that does so most."""
    moved: dict[str, int] = {}
    for travel in travels:
        for path in travel.leaves:
            moved[path] = moved.get(path, 0) + travel.times * travel.size
    sizes = {
        _path(jax.tree_util.keystr(path)): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(networks)
    }
    return max((count / sizes[path] for path, count in moved.items()), default=0.0)


def _path(text: str) -> str:
    return "/".join(re.findall(r"'([^']*)'", text))
