"""How every command starts and ends: flags, a config, and errors as one sentence.

A `ValueError` or `OSError` that reaches the top is printed to stderr as "error: ..." with exit
status 2 and no traceback; so is whatever absl or ml_collections refuses on the command line.
"""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

BAD_INPUT = 2  # exit status
REFUSED = (ValueError, OSError)


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses flags, calls `main()`, exits with its status (None: 0)."""
    logging.set_verbosity(logging.WARNING)
    app.run(lambda _: sys.exit(guard(main)), argv=argv, flags_parser=_parse)


def guard(main: Callable[[], int | None]) -> int:
    """`main()`'s status, or 2 after printing the sentence of what it refused."""
    try:
        return main() or 0
    except REFUSED as error:
        return refuse(error)


def refuse(error: BaseException) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return BAD_INPUT


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except Exception as error:
        # absl raises flags.Error; a config file or an override of one raises what it likes.
        sys.exit(refuse(error))
    if len(rest) > 1:
        sys.exit(refuse(ValueError(f"unexpected argument {rest[1]!r}: flags are --name=value")))
    return rest


def require(name: str) -> str:
    """The value of a string flag that must be given."""
    value = flags.FLAGS[name].value
    if value in (None, "", []):
        raise ValueError(f"--{name} is missing: give --{name}=...")
    return value


def flat(config: ConfigDict) -> dict[str, object]:
    """{"optim.learning_rate": 1e-3, ...}: a config's leaves by dotted path."""
    leaves = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves.update({f"{key}.{k}": v for k, v in flat(value).items()})
        else:
            leaves[key] = value
    return leaves
