"""The README's map is the tree, and its commands, flags and configs exist."""

import functools
import importlib
import pathlib
import re
import shlex

import pytest

from experiments.host import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = ("diffusion", "experiments", "configs", "launch", "tests")
DESCRIPTIONS = 30  # the column at which the map's descriptions begin, and go on


def drawn(text):
    """{path: its description} of a map: names, then two spaces or more and what they are."""
    found, folders = {}, []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent >= DESCRIPTIONS - 4:
            continue
        names, _, meaning = line.strip().partition("  ")
        del folders[indent // 2 :]
        for name in names.split():
            found["".join(folders) + name] = meaning.strip()
        if names.endswith("/"):
            folders.append(names)
    return found


MAP = drawn(re.search(r"## A map of the house\n.*?```\n(.*?)```", README, re.S)[1])


def tree(*folders):
    """Every Python file, and every folder that holds some, of the folders given."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = [path for path in files if path.name not in ("__init__.py", "__main__.py")]
    parents = {str(path.parent.relative_to(ROOT)) + "/" for path in files}
    return {str(path.relative_to(ROOT)) for path in named} | parents


def test_the_map_is_read():
    text = (
        "a/                     what a is\n"
        "  b.py c.py              both\n"
        "                              and more\n"
        "  d/\n    e.py  e\n"
        "f.md\n"
    )
    assert drawn(text) == {
        "a/": "what a is",
        "a/b.py": "both",
        "a/c.py": "both",
        "a/d/": "",
        "a/d/e.py": "e",
        "f.md": "",
    }


def test_what_the_map_names_exists():
    missing = [
        path
        for path in MAP
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert not missing


def test_the_map_names_every_file():
    assert not tree("diffusion", "experiments", "launch") - MAP.keys()


def test_the_map_says_what_each_is():
    assert not [path for path, meaning in MAP.items() if not meaning]


# -- commands ------------------------------------------------------------------------------------


def commands(text):
    """[(module, [words])] of every `python -m` in it: in code, and in tables' code spans."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, re.M)
    spans = re.findall(r"`(python -m [^`]+)`", text)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    found = []
    for line in [*lines, *spans]:
        if match := re.match(r"\s*python -m (\S+)(.*)", line):
            words = match[2].replace("\\|", "|").replace("[", " ").replace("]", " ")
            found.append((match[1], shlex.split(words, comments=True)))
    return found


COMMANDS = commands(README)


@functools.cache
def flags_of(module):
    """Names of the flags that a command defines."""
    if module == "launch.sweep":
        text = (ROOT / "launch" / "sweep.py").read_text()
        return set(re.findall(r'add_argument\("--(\w+)"', text))
    package = ROOT / module.replace(".", "/")
    declared = cli.Flags()
    name = f"{module}.__main__" if package.is_dir() else module
    importlib.import_module(name).define(declared)
    return set(declared.values)


def config_of(name):
    """The config that configs/NAME.py:argument gives; C stands for any."""
    path, _, argument = name.partition(":")
    module = "configs.common" if path == "C" else path.removesuffix(".py").replace("/", ".")
    loaded = importlib.import_module(module)
    if path == "C":
        return loaded.denoiser()
    return loaded.get_config(argument) if argument else loaded.get_config()


def test_the_commands_are_found():
    assert len(COMMANDS) > 15 and {"experiments.train", "launch.sweep"} <= dict(COMMANDS).keys()


@pytest.mark.parametrize("module", sorted(dict(COMMANDS)))
def test_the_flags_of_a_command_exist(module):
    used = {
        word[2:].partition("=")[0].partition(".")[0]
        for name, words in COMMANDS
        if name == module
        for word in words
        if word.startswith("--")
    }
    assert used and not used - flags_of(module)


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=" ".join)
def test_config_keys_of_a_command_exist(words):
    given = dict(word[2:].split("=", 1) for word in words if re.match(r"--config[.=]", word))
    if name := given.pop("config", None):
        keys = cli.flat(config_of(name))
        assert not {key.removeprefix("config.") for key in given} - {*keys, "a.b"}
    else:
        assert not given


def test_files_that_are_named_exist():
    named = set(re.findall(r"(\w+\.py)\b", README))
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert len(named) > 50 and not named - {*there, "NAME.py", "X.py"}


def test_flags_that_are_named_elsewhere_exist():
    """In sentences: `--image --strength`, `--config.parallel.fsdp=8`."""
    spans = " ".join(re.findall(r"`([^`]+)`", README))
    known = set().union(*(flags_of(module) for module in dict(COMMANDS)))
    named = {name for name in re.findall(r"(?<![\w-])--(\w+)(?=[=\s`]|$)", spans)}
    assert not named - known
    keys = {"a.b"}.union(*(cli.flat(config_of(name)) for name in ("C", "configs/digits_ldm.py")))
    overrides = set(re.findall(r"--config\.([\w.]+)", spans))
    assert not overrides - keys


def test_paths_that_are_linked_or_named_exist():
    linked = [path for path in re.findall(r"\]\((?!http)([^)#]+)", README)]
    named = re.findall(r"`((?:tests|configs|experiments|launch|diffusion)/[\w./]*)[`:]", README)
    assert linked and named
    assert not [path for path in [*linked, *named] if not (ROOT / path).exists()]
