"""The floors of the house: an import only ever goes down."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = ("process", "models", "metrics")
MAY_IMPORT = {
    # a part of the project: the parts of the project it may import, itself aside
    "diffusion.process": (),
    "diffusion.models": (),
    "diffusion.metrics": (),
    "diffusion.data": (),
    "diffusion.interop": ("diffusion.models",),
    "diffusion.training": ("diffusion.process", "diffusion.models", "diffusion.metrics"),
    "diffusion": ("diffusion.data",),  # checkpoint.py, writers.py, weights.py
    "configs": (),
    "launch": ("configs",),
    "experiments": ("diffusion", "configs"),
}
FORBIDDEN = {
    "configs": {"jax", "flax", "numpy", "diffusion", "experiments", "tensorflow"},
    "launch": {"jax", "flax", "diffusion", "experiments", "tensorflow"},
}


def part_of(path: pathlib.Path) -> str:
    pieces = path.relative_to(ROOT).parts
    return ".".join(pieces[:2]) if pieces[0] == "diffusion" and len(pieces) > 2 else pieces[0]


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def violations(path: pathlib.Path) -> list[str]:
    part = part_of(path)
    allowed = (part, *MAY_IMPORT[part])
    wrong = []
    for name in imports(path):
        top = name.split(".")[0]
        if top in FORBIDDEN.get(part, ()):
            wrong.append(name)
        if top in ("diffusion", "configs", "experiments", "launch") and name != "diffusion":
            if not any(name == a or name.startswith(a + ".") for a in allowed):
                wrong.append(name)
    # From the library's top, only its own modules and what is allowed: no task, no network.
    return sorted(set(wrong))


SOURCES = [
    path
    for folder in ("diffusion", "configs", "experiments", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert violations(path) == []


def test_the_rule_sees_a_violation(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "diffusion" / "process" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from diffusion.models import unet\nimport diffusion.training.state\n")
    assert violations(bad) == [
        "diffusion.models",
        "diffusion.models.unet",
        "diffusion.training.state",
    ]


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
