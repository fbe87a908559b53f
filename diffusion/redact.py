"""Configs without their secrets, before they reach a log, a file or another machine."""

import os
import re
from collections.abc import Mapping
from typing import Any

# Names whose strings are not written, and strings that are secrets whatever they are called.
_SECRET_NAME = re.compile(
    r"(^|[_\-])((api|access|private|secret)[_\-]?keys?|secrets?|passw(or)?d|passphrase|tokens?|"
    r"credentials?|auth|authorization)($|[_\-])",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16})\b|://[^/\s:@]*:[^/\s@]+@"
)


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested config without its secrets: by name (`api_key`), or by how they look."""
    return {
        name: _redacted(value) for name, value in values.items() if not _secret(str(name), value)
    }


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        kept = [_redacted(item) for item in value if not _secret("", item)]
        return tuple(kept) if isinstance(value, tuple) else kept
    return value


def _secret(name: str, value: Any) -> bool:
    if not isinstance(value, str | bytes) or not value:
        return False
    text = value if isinstance(value, str) else value.decode(errors="replace")
    key = os.environ.get("WANDB_API_KEY")
    looks = bool(_SECRET_VALUE.search(text)) or (bool(key) and key in text)
    return looks or bool(_SECRET_NAME.search(name))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted names, what is neither number nor string as its text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            simple = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{name}"] = value if simple else str(value)
    return flat
