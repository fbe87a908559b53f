"""`--help` of every command fits a screen; `--helpfull` holds the rest."""

import importlib
import re

import pytest

from experiments.host import cli

COMMANDS = (
    *("benchmark.__main__", "convert.__main__", "encode_latents", "evaluate.__main__"),
    *("plan.__main__", "play.__main__", "prepare_data", "quickstart.__main__", "report.__main__"),
    *("sample", "train"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_helpfull_explains_the_rest(name, capsys):
    command = importlib.import_module(f"experiments.{name}")

    def told(flag):
        assert cli.run(command.define, command.main, [flag]) == 0
        return capsys.readouterr().out

    short, whole = told("--help"), told("--helpfull")
    lines = short.splitlines()
    assert lines[0] == command.__doc__.strip().splitlines()[0]
    assert f"python -m experiments.{name.removesuffix('.__main__')} " in short
    assert len(lines) <= cli.LINES and max(map(len, lines)) <= cli.COLUMNS
    declared = cli.Flags()
    command.define(declared)
    named = 0
    for flag in declared.values:
        assert re.search(rf"--{flag}\b", short), flag
        named += bool(re.search(rf"^  --{flag}  +\S", short, re.M))  # with what it is
        assert re.search(rf"--(\[no\])?{flag}:", whole), flag
    assert named


def test_paragraphs_that_do_not_fit_are_left_out():
    declared = cli.Flags()
    declared.add("integer", "num", 3, "How many. More of it.")
    declared.add("bool", "other", False, "Not named.")
    doc = "What it is.\n\n    --num=3\n\nA table:\n\n" + "row\n" * cli.LINES
    text = cli.short_help(doc, declared.values)
    assert text.startswith("What it is.\n\n    --num=3\n\n  --num  How many (3)\n")
    assert "row" not in text and "A table" not in text
    assert text.endswith("--helpfull explains:\n  --other")
