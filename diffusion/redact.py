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
        return [_redacted(item) for item in value if not _secret("", item)]
    return value


def _secret(name: str, value: Any) -> bool:
    if not isinstance(value, str | bytes) or not value:
        return False
    text = value if isinstance(value, str) else value.decode(errors="replace")
    key = os.environ.get("WANDB_API_KEY")
    looks = bool(_SECRET_VALUE.search(text)) or (bool(key) and key in text)
    return looks or bool(_SECRET_NAME.search(name))
