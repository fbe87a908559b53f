"""What a compiled module does, read from its text: kernels, bytes, FLOPs, collectives.

The rule: every instruction of the entry and of what it calls is a kernel, but those that only name
or join values (FREE) and the inside of a fusion, which is one. Loops count their trip count, of a
conditional the dearer branch counts. A kernel's bytes are those of its result and its operands by
their types, without what lies on the chip (a TPU's memory space S(1)); its FLOPs those of the
products and convolutions in it, two for a multiply-add, padding and zeros between strides included
where the compiler made them; those of cuDNN's and cuBLAS's calls by their shapes, attention's
backward pass as five products.
"""

import dataclasses
import math
import re
from typing import Any

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "copy-done", "slice-done"),
    *(f"{kind}-done" for kind in COLLECTIVES),
    *("async-done", "async-update", "call", "while", "conditional"),
}
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # others say their bits
TYPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instruction that runs `times` a step. `place`: the module path that it comes from."""

    kind: str  # its opcode, of a custom call the target
    fusion: str  # of a fusion its kind ("Loop", "Input": it reduces, ...)
    name: str
    place: str
    bytes: int
    flops: int
    times: int
    shapes: tuple[tuple[int, ...], ...]  # of its results
    result_bytes: int


def type_bytes(text: str, on_chip: bool = True) -> int:
    """Of an HLO type: `f32[3,3]{1,0}`, or a tuple of such. Not `on_chip`: in main memory alone."""
    total = 0
    for found in TYPE.finditer(text):
        kind, shape = found[1], found[2]
        if not on_chip and re.search(r"S\([1-9]\)", found[0]):
            continue
        bits = re.match(r"[a-z]+(\d+)", kind)
        size = BYTES.get(kind) or (max(int(bits[1]) / 8, 0.5) if bits else 0)
        total += math.ceil(size * math.prod(_sizes(shape)))
    return total


def elements(text: str) -> int:
    """Of one array's HLO type."""
    return math.prod(_sizes(TYPE.search(text)[2]))


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in shape.split(",") if n)


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction as it is written."""

    name: str
    type: str
    kind: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        depth = 0
        for i, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth < 0:
                return re.findall(r"%([\w.\-]+)", self.rest[:i])
        return []

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def place(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\", "") if found else ""

    @property
    def trips(self) -> int:
        """Of a loop; 1 where the compiler knows no number."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else 1

    @property
    def called(self) -> list[str]:
        """Computations that the instruction runs; of a conditional, every branch."""
        one = r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
        several = re.findall(r"branch_computations=\{([^}]*)\}", self.rest)
        return re.findall(one, self.rest) + re.findall(r"[\w.\-]+", " ".join(several))


class Module:
    """`compiled.as_text()`, read. lines: of each computation; roots: the names of their results."""

    def __init__(self, text: str):
        self.lines: dict[str, list[Line]] = {}
        self.roots: dict[str, str] = {}
        self.entry, name = "", ""
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(" "):
                name = head[2]
                self.lines[name] = []
                self.entry = name if head[1] else self.entry
            elif name and (found := INSTRUCTION.match(line)):
                self.lines[name].append(Line(*found.groups()))
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = found[1]
        self._types = {line.name: line.type for lines in self.lines.values() for line in lines}

    def kernels(self, name: str = "", times: int = 1) -> list[Kernel]:
        """Of a computation, by default the entry."""
        found = []
        for line in self.lines.get(name or self.entry, ()):
            kind = line.kind.removesuffix("-start")
            if kind == "conditional":
                branches = [self.kernels(branch, times) for branch in line.called]
                found += max(branches, key=lambda ks: sum(k.bytes * k.times for k in ks))
            elif kind in ("while", "call"):
                inner = times * line.trips if kind == "while" else times
                for called in line.called:
                    found += self.kernels(called, inner)
            elif kind not in FREE:
                found.append(self._kernel(line, kind, times))
        return found

    def _kernel(self, line: Line, kind: str, times: int) -> Kernel:
        if kind == "custom-call":
            kind = line.target
        fusion = re.search(r"kind=k(\w+)", line.rest) if kind == "fusion" else None
        types = [line.type, *(self._types.get(name, "") for name in line.operands)]
        if line.kind.endswith("-start"):  # its result names the operand again
            types = types[:1]
        moved = sum(type_bytes(text, on_chip=False) for text in types)
        shapes = tuple(_sizes(found[2]) for found in TYPE.finditer(line.type))
        own = type_bytes(line.type)
        flops, fused = self.flops(line), fusion[1] if fusion else ""
        return Kernel(kind, fused, line.name, line.place, moved, flops, times, shapes, own)

    def flops(self, line: Line) -> int:
        """Of one instruction."""
        if line.kind == "convolution":
            return self._convolution(line)
        if line.kind == "dot":
            return self._dot(line)
        if line.kind == "custom-call":
            return self._library(line)
        if line.kind != "fusion":
            return 0
        inside = [inner for name in line.called for inner in self.lines.get(name, ())]
        return sum(self.flops(inner) for inner in inside)

    def _shape(self, name: str) -> tuple[int, ...]:
        found = TYPE.search(self._types.get(name, ""))
        return _sizes(found[2]) if found else ()

    def _dot(self, line: Line) -> int:
        left = self._shape(line.operands[0])
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest) or re.search(
            r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', line.rest
        )
        inner = math.prod(left[i] for i in _sizes(axes[1].replace('"', ""))) if axes else 1
        return 2 * math.prod(_sizes(TYPE.search(line.type)[2])) * inner

    def _library(self, line: Line) -> int:
        """Of cuDNN's and cuBLAS's calls; of others none is known."""
        target = line.target
        if target.startswith("__cublas$"):
            return self._dot(line)
        if not line.operands:
            return 0
        first, result = self._shape(line.operands[0]), _sizes(TYPE.search(line.type)[2])
        if target.startswith("__cudnn$conv"):
            second = self._shape(line.operands[1])
            kernel, out = second, result
            if target == "__cudnn$convBackwardFilter":
                kernel, out = result, second
            elif target == "__cudnn$convBackwardInput":
                out = first
            features = kernel[re.search(r"dim_labels=\w+_(\w+)->", line.rest)[1].index("o")]
            return 2 * math.prod(out) * math.prod(kernel) // features
        if target.startswith("__cudnn$fmha"):
            shape = re.search(
                r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', line.rest
            )
            scores = _sizes(shape[1].replace('"', "")) if shape else ()
            width = math.prod(first) // math.prod(scores[:3]) if scores else 0
            return 2 * (5 if "Backward" in target else 2) * math.prod(scores) * width
        return 0

    def _convolution(self, line: Line) -> int:
        """Two for each result, input channel and place of the kernel."""
        out = math.prod(_sizes(TYPE.search(line.type)[2]))
        kernel = self._shape(line.operands[1])
        labels = re.search(r"dim_labels=\w+_(\w+)->", line.rest)
        features = kernel[labels[1].index("o")] if labels else 1
        holes = re.search(r"lhs_dilate=([\dx]+)", line.rest)
        zeros = math.prod(int(n) for n in holes[1].split("x")) if holes else 1
        return 2 * out * math.prod(kernel) // (features * zeros)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of one step on one device, from `compiled.as_text()`."""
    totals: dict[str, dict[str, int]] = {}
    for kernel in Module(text).kernels():
        if kernel.kind in COLLECTIVES:
            found = totals.setdefault(kernel.kind, {"count": 0, "bytes": 0})
            found["count"] += kernel.times
            found["bytes"] += kernel.times * kernel.result_bytes
    return totals


def summary(
    text: str, peak: float, bandwidth: float, launch_secs: float = 0, dearest: int = 20
) -> dict[str, Any]:
    """Kernels, copies, bytes moved and FLOPs of a step on one device, and the bound by kernel:

        sum over kernels of max(FLOPs / peak, bytes / bandwidth)                            (1)

    in seconds, with the share of the peak that it leaves, and the dearest kernels by name.
    `launched_secs` is the same where no kernel takes less than `launch_secs`.
    """
    kernels = Module(text).kernels()
    single = [max(k.flops / peak, k.bytes / bandwidth) for k in kernels]
    secs = [k.times * s for k, s in zip(kernels, single)]
    kinds: dict[str, dict[str, int]] = {}
    for k in sorted(kernels, key=lambda k: -k.bytes * k.times):
        entry = kinds.setdefault(f"{k.kind} {k.fusion}".strip(), {"count": 0, "bytes": 0})
        entry["count"] += k.times
        entry["bytes"] += k.times * k.bytes
    bound = sum(secs)
    flops = sum(k.flops * k.times for k in kernels)
    ranked = sorted(zip(secs, kernels), key=lambda pair: -pair[0])[:dearest]
    return {
        "kernels": sum(k.times for k in kernels),
        "copies": sum(k.times for k in kernels if k.kind == "copy"),
        "bytes_moved": sum(k.bytes * k.times for k in kernels),
        "flops": flops,
        "bound_secs": bound,
        "launched_secs": sum(k.times * max(s, launch_secs) for k, s in zip(kernels, single)),
        "peak_share": flops / peak / bound if bound else 0.0,
        "kinds": kinds,
        "dearest": [
            {"secs": s, "kind": k.kind, "place": k.place, "bytes": k.bytes, "flops": k.flops}
            for s, k in ranked
        ],
    }
