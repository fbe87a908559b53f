"""How every command starts and ends: its own flags, a config, and errors as one sentence.

A command is `define(flags)`, which declares flags, and `main(values) -> status`. Nothing is global,
so a command can be called from another, or many times in one process.

A `ValueError` or `OSError` that reaches the top is printed to stderr as "error: ..." with exit
status 2 and no traceback; so is whatever absl or ml_collections refuses on the command line.
"""

import contextlib
import gc
import pathlib
import re
import sys
import tempfile
import textwrap
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

BAD_INPUT = 2  # exit status
LINES, COLUMNS = 45, 100  # of --help: a screen
REFUSED = (ValueError, OSError)


class Flags:
    """Declares a command's flags; `define` functions are given one."""

    def __init__(self):
        self.values = flags.FlagValues()

    def config(self, meaning: str = "A file of configs/, with its argument after a colon.") -> None:
        config_flags.DEFINE_config_file(
            "config", None, meaning, flag_values=self.values, lock_config=True
        )

    def add(self, kind: str, name: str, default: Any, meaning: str, *choices: Any) -> None:
        """kind: "string", "integer", "float", "bool", "list", "multi_string",
        "multi_integer" or "enum"."""
        define = getattr(flags, f"DEFINE_{kind}")
        define(name, default, *choices, meaning, flag_values=self.values)


def run(
    define: Callable[[Flags], None],
    main: Callable[..., int | None],
    argv: Sequence[str] | None = None,
    takes_words: bool = False,
) -> int:
    """The command's exit status, given its arguments (None: the process's).

    One that `takes_words` is called as `main(values, words)`, with the arguments that are no flags.
    """
    logging.set_verbosity(logging.WARNING)
    if argv is None:  # this process is the command's own
        collect_seldom()
    arguments = list(sys.argv if argv is None else ["command", *argv])
    declared = Flags()
    define(declared)
    declared.values.set_gnu_getopt(takes_words)  # flags may follow words
    if {"-h", "--help", "--helpfull"} & set(arguments[1:]):
        doc = sys.modules[main.__module__].__doc__ or ""
        whole = "--helpfull" in arguments
        text = declared.values.get_help() if whole else ""
        print(f"{doc}\n{text}" if whole else short_help(doc, declared.values))
        return 0
    try:
        _check_file(arguments)
        # ml_collections looks for overrides of a config in sys.argv, whatever it is handed.
        with unittest.mock.patch.object(sys, "argv", arguments):
            rest = declared.values(arguments)
        if len(rest) > 1 and not takes_words:
            raise ValueError(f"unexpected argument {rest[1]!r}: flags are --name=value")
    except (KeyError, AttributeError) as error:
        # How ml_collections refuses an override; its text suggests the nearest key.
        text = str(error.args[0]).strip("\"'").replace("\\n", " ").replace("\\'", "'")
        return refuse(ValueError(f"--config.KEY=... names a key the config lacks: {text}"))
    except flags.Error as error:
        # absl puts a config file's whole traceback into the sentence; the last line says it all.
        lines = str(error).strip().splitlines()
        return refuse(ValueError(lines[-1] if "Traceback" in str(error) else str(error)))
    except Exception as error:
        # A config file raises what it likes.
        return refuse(error)
    try:
        return main(declared.values, *([rest[1:]] if takes_words else [])) or 0
    except REFUSED as error:
        return refuse(error)


def collect_seldom() -> None:
    """Looks for reference cycles seldom, and never among what was imported.

    Tracing a program makes objects by the million: looking after every 700 of them, as Python does,
    is a quarter of the time that a network takes to be traced.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def short_help(doc: str, values: flags.FlagValues) -> str:
    """What fits a screen: the first paragraphs of a docstring, a line for each flag that they name,
    and the names of the others."""
    of = {name: values[name] for name in sorted(values)}
    named = [name for name in of if re.search(rf"--{name}\b", doc)]
    width = max(map(len, named), default=0)
    lines = []
    for name in named:
        said, default = re.split(r"\. |\.?;?\n", of[name].help)[0].rstrip("."), of[name].default
        said += f" ({default})" if default not in (None, False, "") else ""
        line = f"  --{name:{width}}  {said}"
        lines.append(line if len(line) <= COLUMNS else f"{line[: COLUMNS - 2]} …")
    rest = " ".join(f"--{name}" for name in of if name not in named)
    if rest:
        lines += ["", "And these, which --helpfull explains:"]
        lines += textwrap.wrap(rest, COLUMNS, initial_indent="  ", subsequent_indent="  ")
    paragraphs: list[str] = []
    for paragraph in doc.strip().split("\n\n"):
        if sum(text.count("\n") + 2 for text in (*paragraphs, paragraph)) + len(lines) > LINES:
            break
        paragraphs.append(paragraph)
    while paragraphs[-1].endswith(":"):  # of what no longer fits
        paragraphs.pop()
    return "\n\n".join([*paragraphs, "\n".join(lines)])


def _check_file(arguments: Sequence[str]) -> None:
    for word in arguments:
        name, given, value = word.partition("=")
        path = pathlib.Path(value.partition(":")[0])
        if name == "--config" and given and not path.is_file():
            raise ValueError(f"--config={value}: {path} is no file; name one of configs/")


def refuse(error: BaseException) -> int:
    """Prints the sentence; returns the status."""
    text = str(error) or type(error).__name__
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return BAD_INPUT


def bug(what: str, error: Exception) -> ValueError:
    """The sentence for an error that no check foresaw; its traceback goes into a file."""
    with tempfile.NamedTemporaryFile("w", prefix="bug-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    reason = f"{type(error).__name__}: {str(error)[:300]}"
    return ValueError(
        f"{what} ({reason}), and no check of ours says why: that is a bug, please report it with "
        f"the traceback in {file.name}; undoing what was set last may help until then"
    )


def require(values: flags.FlagValues, name: str) -> Any:
    """The value of a flag that must be given."""
    value = values[name].value
    if value in (None, "", []):
        raise ValueError(f"--{name} is missing: give --{name}=...")
    return value


def numbers(values: flags.FlagValues, name: str, kind: type[int] | type[float]) -> list:
    """The numbers of a "list" flag; none where it is not given."""
    given = values[name].value or ()
    try:
        return [kind(text) for text in given]
    except ValueError as error:
        what, such = ("whole numbers", "1,2,4") if kind is int else ("numbers", "1,2.5,4")
        raise ValueError(
            f"--{name}={','.join(given)} must be {what} with commas between: give --{name}={such}"
        ) from error


@contextlib.contextmanager
def flagged(values: flags.FlagValues) -> Iterator[None]:
    """The library's errors begin with its argument, "size=3,4 ..."; here with the flag of that
    name, "--size=3,4 ..."."""
    try:
        yield
    except ValueError as error:
        named = re.match(r"(\w+)=", str(error))
        if named is None or named[1] not in values:
            raise
        raise ValueError(f"--{error}") from error


def flat(config: ConfigDict) -> dict[str, object]:
    """{"optim.learning_rate": 1e-3, ...}: a config's leaves by dotted path."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves.update({f"{key}.{k}": v for k, v in flat(value).items()})
        else:
            leaves[key] = value
    return leaves
