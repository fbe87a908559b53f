"""What `pip install` gives: of a wheel the library, of a clone the commands as well."""

import pathlib
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
LIBRARY = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "wandb", "clu", "torch"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import diffusion
for module in pkgutil.walk_packages(diffusion.__path__, "diffusion."):
    # the builders themselves, which are tensorflow-datasets'
    if module.name.split(".")[-1] not in ("local_files", "captioned_digits") or module.ispkg:
        importlib.import_module(module.name)
print(diffusion.__path__[0])
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the repository, elsewhere."""
    root = tmp_path_factory.mktemp("clone") / "repository"
    root.mkdir()
    for name in ("diffusion", "experiments", "configs", "launch"):
        skipped = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, root / name, ignore=skipped)
    for pattern in ("*.toml", "setup.py", "requirements*.txt", "README.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, root)
    return root


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", *OFFLINE, "--wheel-dir", out, clone)
    (path,) = out.glob("*.whl")
    return path


def pip(python, command, *arguments):
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    done = subprocess.run([*argv, command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def environment(directory):
    """A fresh one, which sees the packages that are installed here; its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return directory / "bin"


def wanted(*names):
    """The requirements of files, each once."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    bare = (line.split(" #")[0].strip() for line in lines if line[:1] not in ("#", "-", ""))
    return sorted(str(Requirement(line)) for line in bare)


def test_a_wheel_holds_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [n for n in names if n.endswith("dist-info/METADATA")]
        found = Parser().parsestr(archive.read(metadata).decode())
    assert {name.split("/")[0] for name in names} == {"diffusion", metadata.split("/")[0]}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "diffusion").rglob("*.py")}
    assert ours | {"diffusion/py.typed"} <= set(names)
    needed = [Requirement(text) for text in found.get_all("Requires-Dist")]
    plain = [r for r in needed if "extra" not in str(r.marker)]
    assert sorted(map(str, plain)) == wanted("requirements.txt")
    extras = {name: [] for name in found.get_all("Provides-Extra")}
    for requirement in needed:
        for name in extras:
            if requirement.marker and f'extra == "{name}"' in str(requirement.marker):
                extras[name].append(f"{requirement.name}{requirement.specifier}")
    assert extras.keys() == {"test", "tpu", "cuda", "targets"}
    of_tests = wanted("requirements-test.txt", "requirements-tpu-target.txt")
    assert sorted(extras["test"]) == of_tests and len(of_tests) > 10
    assert extras["targets"] == wanted("requirements-tpu-target.txt")
    (jax,) = [text for text in wanted("requirements.txt") if text.startswith("jax<")]
    assert extras["tpu"] == extras["cuda"] == [jax]


def test_the_installed_library_needs_no_logger_and_no_preparer(wheel, tmp_path):
    programs = environment(tmp_path / "venv")
    pip(programs / "python", "install", *OFFLINE, wheel)
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([programs / "python", "-c", LIBRARY], **run)
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()).is_relative_to(tmp_path)
    done = subprocess.run([programs / "diffusion-train"], **run)
    assert done.returncode == 2 and "`pip install -e .` in a clone" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_each_script_is_a_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in scripts:
        module = ROOT / "experiments" / name.removeprefix("diffusion-").replace("-", "_")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), name


@pytest.mark.slow
def test_an_editable_installation_gives_the_commands(clone, tmp_path):
    programs = environment(tmp_path / "venv")
    pip(programs / "python", "install", *OFFLINE, "--editable", clone)
    for name, said in (("sample", "--prompt"), ("prepare-data", "--source_dir")):
        argv = [programs / f"diffusion-{name}", "--help"]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    argv = [programs / "diffusion-train", f"--config={clone}/configs/no.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "is no file" in done.stderr
