"""WebDataset's shards: plain tars of pictures with captions or classes, read where they lie.

The members of one example stand beside each other and share what stands before the first dot of
their names (https://github.com/webdataset/webdataset); what stands after it says what each is:

    000.jpg, .png, ...   the picture, one an example
    000.txt, .caption    its caption; or of 000.json what "text", "caption" or "prompt" says
    000.cls              its class, a whole number from 0
"""

import dataclasses
import json
import pathlib
import re
import tarfile
import types
from collections.abc import Callable, Iterator
from typing import Any

from diffusion.data import images

NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")  # an example's key, and the kind


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside a tar, with what is read here of a `pathlib.Path`."""

    tar: pathlib.Path
    inside: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.inside}"

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(self.inside).name

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.inside).suffix

    @property
    def parent(self) -> pathlib.PurePath:
        return (self.tar / self.inside).parent

    def relative_to(self, root: pathlib.Path) -> pathlib.PurePath:
        return pathlib.PurePosixPath(self.tar.relative_to(root).as_posix()) / self.inside

    def stat(self) -> Any:
        return types.SimpleNamespace(st_size=self.size)

    def read_bytes(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read(
    tar: pathlib.Path, caption: Callable[[Any], str], columns: tuple[str, ...]
) -> tuple[list[dict[str, Any]], list[Member]]:
    """Rows ("path", and "caption" or "label") of a tar's examples, and members that are none.

    `caption` checks a text; `columns` of a JSON object hold it. ValueError naming tar and member.
    """
    rows, rest = [], []
    for key, members in _examples(tar):
        pictures = [m for kind, m in members.items() if f".{kind.lower()}" in images.SUFFIXES]
        if len(pictures) != 1:
            raise ValueError(
                f"{tar}: {key} has {len(pictures)} pictures ({', '.join(members)}), but an example "
                "has one: mend the tar"
            )
        row: dict[str, Any] = {"path": pictures[0]}
        used = {pictures[0]}
        for kind in ("cls", "json", "caption", "txt"):  # the last that says it
            if kind not in members:
                continue
            member = members[kind]
            try:
                said = _said(kind, member, caption, columns)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{member} is not what a .{kind} holds: {error}") from error
            if said:
                used.add(member)
                row |= said
        rows.append({k: v for k, v in row.items() if k != "label" or "caption" not in row})
        rest += [member for member in members.values() if member not in used]
    if not rows:
        raise ValueError(f"{tar} holds no example: give WebDataset's tars of pictures")
    return rows, rest


def _said(
    kind: str, member: Member, caption: Callable[[Any], str], columns: tuple[str, ...]
) -> dict[str, Any]:
    """ "caption" or "label", where the member says one."""
    if kind in ("txt", "caption"):
        return {"caption": caption(member.read_bytes().decode("utf-8-sig").strip())}
    if kind == "cls":
        text = member.read_bytes().decode().strip()
        if not text.isascii() or not text.isdigit() or len(text) > 5:
            raise ValueError(f"{text!r:.40} is no whole number from 0")
        return {"label": int(text)}
    if kind == "json":
        found = json.loads(member.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"{found!r:.40} is no object")
        column = next((name for name in columns if name in found), None)
        return {} if column is None else {"caption": caption(found[column])}
    return {}


def _examples(tar: pathlib.Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, member by kind) of each, in order."""
    key, members, done = "", {}, set()
    for member in _members(tar):
        match = NAME.match(member.inside)
        if match is None:
            raise ValueError(f"{member} has no name that WebDataset knows, such as 000.jpg")
        if match[1] != key:
            if members:
                yield key, members
            done.add(key)
            key, members = match[1], {}
            if key in done:
                raise ValueError(f"{tar}: the members of {key} do not stand beside each other")
        if match[2] in members:
            raise ValueError(f"{member} is there twice: mend the tar")
        members[match[2]] = member
    if members:
        yield key, members


def _members(tar: pathlib.Path) -> Iterator[Member]:
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                parts = pathlib.PurePosixPath(info.name).parts
                hidden = any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)
                if info.isdir() or hidden:
                    continue
                if not info.isreg() or info.issparse():
                    raise ValueError(f"{tar}: {info.name} is no plain file: mend the tar")
                if info.offset_data + info.size > tar.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                yield Member(tar, info.name, info.offset_data, info.size)
            with tar.open("rb") as file:
                file.seek(archive.offset)
                rest = file.read()
            if len(rest) < tarfile.BLOCKSIZE or any(rest):  # iteration ends there without a word
                raise tarfile.ReadError(f"no end of it at byte {archive.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{tar} is no whole, uncompressed tar ({error}): fetch it again, or unpack it"
        ) from error
