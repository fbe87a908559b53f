"""Small faults in Python source, found by its syntax: what `mutations.py --random` draws from.

A mutant replaces one stretch of text and keeps every line where it was. Kinds: a comparison or an
arithmetic operator exchanged, `and` for `or`, a number or a truth value changed (as a default or an
index too), a condition negated or never true, a returned value dropped. Left alone are strings,
annotations, whatever a `raise` says, and what runs only as a script.
"""

import ast
import dataclasses
from collections.abc import Iterator

COMPARE = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "+"),
    ast.Pow: ("**", "*"),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Bytes `start` to `end` of a source become `new`."""

    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()


class Finder:
    def __init__(self, source: str):
        self.data = source.encode()
        lengths = [len(line) for line in self.data.splitlines(keepends=True)]
        self.offsets = [0]
        for length in lengths:
            self.offsets.append(self.offsets[-1] + length)
        self.tree = ast.parse(source)

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.offsets[node.lineno - 1] + node.col_offset,
            self.offsets[node.end_lineno - 1] + node.end_col_offset,
        )

    def replaced(self, kind: str, node: ast.AST, new: str) -> Mutant:
        start, end = self.span(node)
        return Mutant(kind, node.lineno, start, end, self.data[start:end].decode(), new)

    def between(
        self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str
    ) -> Iterator[Mutant]:
        """The operator between two operands, where nothing but it and blanks stands there."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.data[start:end].decode()
        if gap.replace("(", " ").replace(")", " ").split() == old.split():
            at = start + gap.encode().index(old.encode())
            yield Mutant(kind, left.end_lineno, at, at + len(old), old, new)

    def walk(self, node: ast.AST, parent: ast.AST | None = None) -> Iterator[Mutant]:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)) or _of_scripts(node):
            return
        yield from self.of(node, parent)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.walk(child, node)

    def of(self, node: ast.AST, parent: ast.AST | None) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, operator, right in zip(operands, node.ops, operands[1:]):
                yield from self.between("comparison", left, right, *COMPARE[type(operator)])
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            if not any(
                isinstance(side, (ast.JoinedStr, ast.Tuple, ast.List)) or _text(side)
                for side in (node.left, node.right)
            ):
                yield from self.between(
                    "arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)]
                )
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:]):
                yield from self.between("and/or", left, right, *words)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start, end = self.span(node.operand)
            yield self.replaced("negation", node, f"({self.data[start:end].decode()})")
        elif isinstance(node, ast.Constant):
            yield from self.of_constant(node, parent)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            start, end = self.span(node.test)
            text = self.data[start:end].decode()
            yield self.replaced("condition negated", node.test, f"(not ({text}))")
            if isinstance(node, ast.If):
                yield self.replaced(
                    "branch removed", node.test, "(" + "\n" * text.count("\n") + "False)"
                )
        elif isinstance(node, ast.Return) and node.value is not None:
            if not (isinstance(node.value, ast.Constant) and node.value.value is None):
                start, end = self.span(node.value)
                lines = self.data[start:end].count(b"\n")
                yield self.replaced("return dropped", node.value, "(" + "\n" * lines + "None)")

    def of_constant(self, node: ast.Constant, parent: ast.AST | None) -> Iterator[Mutant]:
        value = node.value
        kind = {ast.arguments: "default", ast.Subscript: "index", ast.UnaryOp: "constant"}.get(
            type(parent), "constant"
        )
        if isinstance(value, bool):
            yield self.replaced(kind, node, str(not value))
        elif isinstance(value, int):
            yield self.replaced(
                kind,
                node,
                "1"
                if value == 0
                else "0"
                if value == 1 and not isinstance(parent, ast.UnaryOp)
                else str(value + 1),
            )
        elif isinstance(value, float):
            yield self.replaced(kind, node, repr(value * 1.01) if value else "1.0")


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def _of_scripts(node: ast.AST) -> bool:
    """`if __name__ == "__main__":` and `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and any(
        isinstance(name, ast.Name) and name.id in ("__name__", "TYPE_CHECKING")
        for name in ast.walk(node.test)
    )


def find(source: str) -> list[Mutant]:
    """Every mutant of a module, each of which still parses."""
    found = []
    finder = Finder(source)
    for mutant in finder.walk(finder.tree):
        changed = mutant.apply(source)
        try:
            ast.parse(changed)
        except SyntaxError:
            continue
        assert changed.count("\n") == source.count("\n")
        found.append(mutant)
    return sorted(found, key=lambda m: (m.start, m.end, m.kind))
