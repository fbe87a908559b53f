"""The floors of the house: an import only ever goes down; what is read at once is short."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = "diffusion."
GROUND = ("process", "models", "metrics", "files", "redact", "wording")
# A room is a folder or a top module; it may import the rooms named here, itself aside.
MAY_IMPORT = {
    **{LIBRARY + room: () for room in GROUND},
    "diffusion.data": ("diffusion.files", "diffusion.wording"),
    "diffusion.manifest": ("diffusion.files",),
    **dict.fromkeys(("diffusion.pictures", "diffusion.weights"), ("diffusion.files",)),
    "diffusion.commands": (),
    "diffusion.checkpoint": ("diffusion.files", "diffusion.manifest"),
    "diffusion.jsonl": ("diffusion.files",),
    "diffusion.weights_and_biases": ("diffusion.files", "diffusion.jsonl", "diffusion.redact"),
    "diffusion.writers": tuple(
        f"diffusion.{room}" for room in ("jsonl", "redact", "weights_and_biases", "wording")
    ),
    "diffusion.interop": ("diffusion.files", "diffusion.models"),
    "diffusion.training": ("diffusion.process", "diffusion.models", "diffusion.metrics"),
    "diffusion.sampling": tuple(
        f"diffusion.{room}" for room in ("process", "models", "data", "interop", "training")
    ),
    "configs": (),
    "launch": ("configs",),
}
# Floors of experiments, from the ground; each may import what is under it, the library and configs.
FLOORS = (
    ("host",),
    ("run",),
    ("evaluate", "sample", "play", "convert", "plan", "report", "prepare_data", "encode_latents"),
    ("train",),
    ("quickstart", "benchmark", "gan"),
)
FORBIDDEN = {
    "configs": {"jax", "flax", "numpy", "tensorflow"},
    "launch": {"jax", "flax", "tensorflow"},
}
MOST_ARROWS = 35  # between the rooms of experiments
PROJECT = ("diffusion", "experiments", "configs", "launch")


def module_of(path: pathlib.Path) -> str:
    pieces = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def room_of(module: str) -> str:
    pieces = module.split(".")
    return ".".join(pieces[:2]) if pieces[0] in ("diffusion", "experiments") else pieces[0]


def imports(path: pathlib.Path) -> set[str]:
    """Names that a file imports, in full: also relative ones, and those inside functions."""
    found = set()
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def allowed(room: str) -> set[str]:
    """The rooms that a room may import."""
    name = room.removeprefix("experiments.")
    if name == room:
        return {room, *MAY_IMPORT[room]}
    level = next(i for i, floor in enumerate(FLOORS) if name in floor)
    below = {f"experiments.{other}" for floor in FLOORS[:level] for other in floor}
    return {room, "configs", *below, *(r for r in MAY_IMPORT if r.startswith(LIBRARY))}


def violations(path: pathlib.Path) -> list[str]:
    room = room_of(module_of(path))
    if room in ("diffusion", "experiments"):  # their __init__.py is empty
        return sorted(imports(path))
    wrong = []
    for name in imports(path):
        top = name.split(".")[0]
        if top in FORBIDDEN.get(room, ()):
            wrong.append(name)
        if top in PROJECT and room_of(name) not in allowed(room):
            wrong.append(name)
    return sorted(wrong)


SOURCES = [path for folder in PROJECT for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    ("file", "code", "wrong"),
    [
        (
            "diffusion/process/bad.py",
            "from diffusion.models import unet\nimport diffusion.training.state\n",
            ["diffusion.models.unet", "diffusion.training.state"],
        ),
        ("diffusion/process/bad.py", "from ..models import unet\n", ["diffusion.models.unet"]),
        ("diffusion/process/bad.py", "from .. import models\n", ["diffusion.models"]),
        ("diffusion/process/ok.py", "from . import schedules\nfrom .losses import draw\n", []),
        ("diffusion/checkpoint.py", "from diffusion import models\n", ["diffusion.models"]),
        ("diffusion/checkpoint.py", "from diffusion import manifest\n", []),
        ("diffusion/__init__.py", "from diffusion import models\n", ["diffusion.models"]),
        (
            "experiments/run/bad.py",
            "def f():\n    from experiments import train\n",
            ["experiments.train"],
        ),
        ("experiments/host/bad.py", "from ..run import build\n", ["experiments.run.build"]),
        ("experiments/report/bad.py", "import experiments.plan\n", ["experiments.plan"]),
        ("launch/bad.py", "import jax.numpy\n", ["jax.numpy"]),
        ("configs/bad.py", "from launch import sweep\n", ["launch.sweep"]),
    ],
)
def test_the_rule_sees_a_violation(tmp_path, monkeypatch, file, code, wrong):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(path) == wrong


def arrows(of=lambda module: module) -> dict[str, set[str]]:
    """{a: {b, ...}}: what imports what, by file, or by what `of` makes of a file's module."""
    modules = {module_of(path): path for path in SOURCES}
    found: dict[str, set[str]] = {of(name): set() for name in modules}
    for name, path in modules.items():
        for target in imports(path):
            target = target if target in modules else target.rpartition(".")[0]
            if target in modules and of(target) != of(name):
                found[of(name)].add(of(target))
    return found


@pytest.mark.parametrize("of", [lambda module: module, room_of], ids=["files", "rooms"])
def test_no_circle(of):
    sorter = graphlib.TopologicalSorter(arrows(of))
    sorter.prepare()  # raises CycleError, which names the circle


def test_a_circle_is_seen():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


def test_few_arrows_between_the_rooms_of_experiments():
    between = arrows(room_of)
    inside = [
        (a, b)
        for a, targets in between.items()
        for b in targets
        if a.startswith("experiments.") and b.startswith("experiments.")
    ]
    assert 20 < len(inside) <= MOST_ARROWS, sorted(inside)


def test_the_library_imports_no_heavy_framework():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.parts[len(ROOT.parts)] == "diffusion"
    ]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print([m for m in ("tensorflow", "torch", "wandb") if m in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.strip() == "[]", out.stdout


def test_configs_load_without_jax():
    code = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path("configs").glob("*.py")):
    if path.stem != "__init__" and not path.stem.startswith("common"):
        importlib.import_module(f"configs.{path.stem}").get_config()
assert "jax" not in sys.modules, "jax was imported"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


HOUSE = [
    path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("diffusion", "experiments")
]


def too_large(path: pathlib.Path) -> list[str]:
    """Files over 300 lines, functions over 60, signatures over eight parameters."""
    text = path.read_text()
    found = [str(path.name)] if len(text.splitlines()) > 300 else []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        asked = [argument for argument in given if argument.arg not in ("self", "cls")]
        long = node.end_lineno is not None and node.end_lineno - node.lineno >= 60
        if (len(asked) > 8 and node.name != "__call__") or long:  # a network's call says its inputs
            found.append(node.name)
    return found


@pytest.mark.parametrize("path", HOUSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_read_at_once_is_short(path):
    assert too_large(path) == []


def test_the_rule_sees_what_is_too_large(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("x = 1\n" * 301)
    assert too_large(path) == ["long.py"]
    body = "    x = 1\n" * 60
    path.write_text(f"def f():\n{body}\ndef g(a, b, c, d, e, *, f, g, h, i):\n    pass\n")
    assert too_large(path) == ["f", "g"]
