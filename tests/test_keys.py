"""Every config key that a string of the code names exists in some config."""

import ast
import importlib
import pathlib
import re

import pytest

from experiments.host import cli

ROOT = pathlib.Path(__file__).parents[1]
# What looks like a key and is a name in somebody's weights, or a module of ours.
OTHERS = {
    "model.diffusion_model",  # CompVis
    "model.ln_final.weight",  # OpenCLIP
}
FILES = ("py", "json", "pkl", "mdb", "ckpt", "npz", "safetensors", "png", "csv")
VALUE = "\0"  # what an f-string fills in


def configs():
    """All config files, with each of the arguments that their refusal of nonsense names."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem == "__init__" or path.stem.startswith("common"):
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        with pytest.raises(ValueError, match="nonsense") as refused:
            module.get_config("nonsense")
        choices, _, switches = str(refused.value).partition("with it may go ")
        for arg in ("", *re.findall(r"'(\w+)'", choices), *re.findall(r"\w+", switches)):
            if arg != "nonsense":
                yield module.get_config(arg)


def known_keys() -> set[str]:
    found = set()
    for config in configs():
        for leaf in cli.flat(config):
            parts = leaf.split(".")
            found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return found


def texts(tree: ast.AST):
    """All strings of a file; an f-string as one, with VALUE for what it fills in."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(p.value if isinstance(p, ast.Constant) else VALUE for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in inside:
                yield node.value


def unknown_keys(text: str, known: set[str]) -> list[str]:
    """Of the keys that a text names, those that no config has."""
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    found = []
    for match in re.finditer(rf"(?<![\w./-])(--config\.)?(({sections})(\.[a-z]\w*)+)", text):
        key = match[2]
        if key in OTHERS or key.rpartition(".")[2] in FILES or text[match.end() :][:1] == "(":
            continue
        # "loss.adversarial_" and a name; "train.keep_" for all that begin so
        begun = text[match.end() :][:1] == VALUE or key.endswith("_")
        if key not in known and not (begun and any(k.startswith(key) for k in known)):
            found.append(key)
    return found


@pytest.fixture(scope="module")
def known():
    return known_keys()


SOURCES = sorted(
    path
    for folder in ("diffusion", "experiments", "launch")
    for path in (ROOT / folder).rglob("*.py")
)


def test_every_key_that_is_named_exists(known):
    wrong = []
    for path in SOURCES:
        for text in texts(ast.parse(path.read_text())):
            wrong += [f"{path.relative_to(ROOT)}: {key}" for key in unknown_keys(text, known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("sample.eta=2 must lie in [0, 1]", ["sample.eta"]),
        ("give --config.sample.options.eta=1", []),
        ("set process.num_steps or process.schedule.num_steps", ["process.num_steps"]),
        (f"loss.adversarial_{VALUE} must be 0 or more", []),
        (f"loss.antagonistic_{VALUE} must be 0 or more", ["loss.antagonistic_"]),
        ("see experiments/train.py and data.pkl", []),
    ],
)
def test_a_key_that_is_none_is_seen(text, unknown, known):
    assert unknown_keys(text, known) == unknown


def test_the_code_supplies_no_default_of_a_config():
    """A key is read as it stands; `run.config` of a report is a plain dict."""
    supplied = re.compile(r"(?<![.\w])config(\.\w+)*\.get\(")
    found = [
        path.relative_to(ROOT)
        for folder in ("experiments", "configs", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if supplied.search(path.read_text())
    ]
    assert not found
