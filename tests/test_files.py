"""Files: whole or not there, at whatever moment the writer dies; hashes; the same or not."""

import ast
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from diffusion import files

ROOT = pathlib.Path(__file__).parents[1]


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def writers(path):
    """Every way to write a file."""
    return {
        "text": lambda: files.write(path, "new"),
        "bytes": lambda: files.write(path, b"new"),
        "json": lambda: files.write_json(path, {"a": [1, None]}),
        "tensors": lambda: files.write_tensors(path, {"a": np.ones(3)}, format="pt"),
        "arrays": lambda: files.write_arrays(path, a=np.ones(3)),
        "sealed": lambda: files.seal(path, {"a": 1}),
    }


WAYS = sorted(writers(None))


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_written_and_folders_are_made(way, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    writers(path)[way]()
    assert names(tmp_path) == ["a", "a/b", "a/b/file"] and path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    first = path.read_bytes()
    writers(path)[way]()
    assert path.read_bytes() == first


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_what_is_written_is_read(tmp_path):
    files.write(tmp_path / "t", "é\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa9\n"
    files.write_arrays(tmp_path / "a.npz", x=np.arange(3), path=np.ones(1))
    with np.load(tmp_path / "a.npz") as found:
        assert found["x"].tolist() == [0, 1, 2] and found["path"].tolist() == [1]
    files.write_json(tmp_path / "j", {"b": 1, "a": None})
    assert files.read_json(tmp_path / "j", "") == {"b": 1, "a": None}


# -- dying ---------------------------------------------------------------------------------------

# Before the n-th call that changes the folder the process is killed.
KILLED = """
import os, pathlib, signal, sys
from diffusion import files
n, what, path = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
seen = 0
def hook(event, arguments):
    global seen
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY
    changed = opened or event in ("os.rename", "os.mkdir", "os.remove", "os.chmod")
    if changed and str(path.parent) in str(arguments):
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
if what == "file":
    files.write(path, "new")
else:
    with files.whole_folder(path, ("a", "b")) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
print(seen)
"""


def killed(n, what, path):
    argv = [sys.executable, "-c", KILLED, str(n), what, str(path)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_whenever_the_writer_is_killed_there_is_the_old_or_the_new(what, tmp_path):
    before, after = (["old"], ["new"]) if what == "file" else ([], ["new", "new"])
    seen, status, n = set(), None, 0
    while status != 0:
        n += 1
        folder = tmp_path / str(n)
        folder.mkdir()
        path = folder / "out"
        if what == "file":
            path.write_text("old")
        done = killed(n, what, path)
        status = done.returncode  # 0: it was done before its n-th operation
        assert status in (0, -signal.SIGKILL), done.stderr
        left = [p for p in folder.iterdir() if p != path]
        assert all(p.match(files.PARTIAL) for p in left)
        files.clear(folder)
        found = [p.read_text() for p in folder.rglob("*") if p.is_file()]
        assert found in (before, after)
        seen.add((len(left), found == after))
    assert seen == {(0, False), (1, False), (0, True)} and found == after


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("way", WAYS)
def test_no_space_leaves_the_old_file_and_no_litter(call, way, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, call, full)
    wanted = f"{path} could not be written .No space left on device.: free space, or mend"
    with pytest.raises(files.WriteError, match=wanted):
        writers(path)[way]()
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


LIMITED = """
import pathlib, resource, signal, sys
import numpy as np
from diffusion import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
path = pathlib.Path(sys.argv[1])
array = np.zeros(100_000)
for write in (
    lambda: files.write(path, array.tobytes()),
    lambda: files.write_tensors(path, {"a": array}),
    lambda: files.write_arrays(path, a=array),
):
    try:
        write()
        print("written")
    except files.WriteError as error:
        print(error)
"""


def test_a_disk_that_ends_amid_a_file_is_one_sentence_for_every_library(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    argv = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"{path} could not be written") and "File too large" in line
        assert line.endswith("free space, or mend the folder")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_written_to(number, tmp_path, monkeypatch):
    def none(descriptor):
        raise OSError(number, "no fsync here")

    monkeypatch.setattr(os, "fsync", none)
    files.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_file_and_folder_are_on_the_disk_in_order(tmp_path, monkeypatch):
    """The bytes before the name; the name before it returns."""
    seen, fsync, replace = [], os.fsync, os.replace

    def note(descriptor):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", renamed)
    files.write(tmp_path / "file", "new")
    assert seen[0].startswith(".file.") and seen[1:] == ["rename", tmp_path.name]
    seen.clear()
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
    partial = seen[2]
    assert seen[:2] in (["sub", "a"], ["a", "sub"]) and partial.startswith(".out.")
    assert seen[3:] == [tmp_path.name]


def test_an_error_of_the_block_is_passed_on_and_leaves_nothing(tmp_path):
    files.write(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError):
        with files.whole(tmp_path / "file") as partial:
            partial.write_text("half")
            1 / 0  # noqa: B018
    with pytest.raises(KeyError):
        with files.whole_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("half")
            raise KeyError
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
    with pytest.raises(files.WriteError, match="cannot write it"):
        with files.whole(tmp_path / "file", RuntimeError):
            raise RuntimeError("cannot write it")


def test_a_folder_replaces_its_own_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with files.whole_folder(out, ("a", "b")) as folder:
            (folder / "a").write_text(text)
        assert (out / "a").read_text() == text and names(tmp_path) == ["out", "out/a"]
    (out / ".a.12345678.partial").write_text("of a killed writer")
    with files.whole_folder(out, ("a",)) as folder:
        (folder / "a").write_text("three")
    assert names(out) == ["a"]
    (out / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\), which would be lost"):
        with files.whole_folder(out, ("a",)) as folder:
            pytest.fail("before any work")
    with pytest.raises(ValueError, match=r"a is a file: name a folder"):
        files.check_folder(out / "a")
    assert (out / "a").read_text() == "three"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", pathlib.Path.rename
    with files.whole_folder(out) as folder:
        (folder / "a").write_text("old")

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", failing)
    with pytest.raises(files.WriteError, match=r"out could not be written .Input"):
        with files.whole_folder(out, ("a",)) as folder:
            (folder / "a").write_text("new")
    assert names(tmp_path) == ["out", "out/a"] and (out / "a").read_text() == "old"


def test_a_link_is_followed_and_stays(tmp_path):
    for name in ("disk", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "disk" / "folder").mkdir()
    for name in ("file", "folder", "new"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    files.write(tmp_path / "run" / "file", "new")
    for name in ("folder", "folder", "new"):
        with files.whole_folder(tmp_path / "run" / name, ("a",)) as folder:
            (folder / "a").write_text("new")
    assert all(p.is_symlink() for p in (tmp_path / "run").iterdir())
    assert names(tmp_path / "disk") == ["file", "folder", "folder/a", "new", "new/a"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name} is there and no regular file: name another"):
            files.write(tmp_path / name, "new")
    assert names(tmp_path) == ["folder", "pipe"] and (tmp_path / "pipe").is_fifo()


# -- hashes --------------------------------------------------------------------------------------


def tree(folder):
    for name, text in {"a": "one", "sub/b": "two", "sub/.c": "three", ".x.1.partial": "-"}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return files.hash_tree(folder, exclude=(files.PARTIAL,))


def test_hashes_of_a_tree_change_with_names_contents_and_places(tmp_path):
    first = tree(tmp_path / "t")
    assert list(first) == ["a", "sub/.c", "sub/b"]
    one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256sum
    assert first["a"] == {"bytes": 3, "sha256": one} and files.hash_file(tmp_path / "t/a") == one
    assert tree(tmp_path / "again") == first
    assert "sub/.c" not in files.hash_tree(tmp_path / "t", exclude=(".*",))
    digests = {files.digest(first)}
    for change in (
        lambda t: (t / "a").write_text("onE"),
        lambda t: (t / "a").rename(t / "z"),
        lambda t: (t / "a").rename(t / "sub" / "a"),
        lambda t: (t / "new").touch(),
        lambda t: (t / "a").unlink(),
    ):
        folder = tmp_path / str(len(digests))
        tree(folder)
        change(folder)
        digests.add(files.digest(files.hash_tree(folder, exclude=(files.PARTIAL,))))
    assert len(digests) == 6


def test_digest_knows_no_order_of_keys_and_every_value():
    assert files.digest({"a": 1, "b": [1, 2]}) == files.digest({"b": [1, 2], "a": 1})
    values = ({"a": 1}, {"a": "1"}, {"a": None}, {}, {"a": [1]}, {"a": {"a": 1}}, [1], None)
    assert len({files.digest(value) for value in values}) == len(values)
    # `printf '{"a": 1}' | sha256sum`: what stands in files on disk.
    assert files.digest({"a": 1}).startswith("f9d86028c6e0d64e")


@pytest.mark.parametrize(
    ("change", "contents", "said"),
    [
        (lambda t: (t / "a").unlink(), False, "a is missing"),
        (lambda t: (t / "a").write_text("longer"), False, "a has 6 bytes where 3 were written"),
        (
            lambda t: (t / "sub/b").write_text("TWO"),
            True,
            "sub/b does not hash to what was written",
        ),
        (lambda t: (t / "sub/b").write_text("TWO"), False, None),
        (lambda t: (t / "more").touch(), True, None),
    ],
)
def test_damage_is_said(change, contents, said, tmp_path):
    listed = tree(tmp_path)
    files.check_tree(tmp_path, listed, contents=True)
    change(tmp_path)
    if said is None:
        return files.check_tree(tmp_path, listed, contents)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{said}"):
        files.check_tree(tmp_path, listed, contents)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/../../x", "a/.."])
def test_a_name_may_not_lead_out_of_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="is outside its folder"):
        files.inside(tmp_path, name)
    entry = {"bytes": 0, "sha256": ""}
    with pytest.raises(ValueError, match="is outside its folder"):
        files.check_tree(tmp_path, {name: entry})


def test_a_sealed_file_that_was_altered_is_refused(tmp_path):
    path = tmp_path / "sealed"
    made = files.seal(path, {"a": 1, "b": {"c": None}})
    assert files.unseal(path, "") == made and made["a"] == 1
    text = path.read_text()
    for wrong, said in (
        (text.replace('"a": 1', '"a": 2'), "was altered"),
        (json.dumps({"a": 1}), "was altered"),
        (text[:-4], "is not valid JSON"),
        ("[" * 10**6, "is not valid JSON"),
        ("[]", "holds a list, no JSON object"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=rf"sealed {said}.*: make it again$"):
            files.unseal(path, "make it again")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="sealed is not valid JSON"):
        files.unseal(path, "make it again")
    path.unlink()
    with pytest.raises(ValueError, match=r"sealed is missing: make it again"):
        files.unseal(path, "make it again")


# -- the same or not -----------------------------------------------------------------------------

MADE = {"steps": 10, "model": {"width": 4, "cond": None}, "list": [1, 2]}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({**MADE, "steps": 11}, "steps=10, but steps=11 is asked for"),
        ({**MADE, "model": {"width": 4}}, "model.cond=None, but no model.cond is asked for"),
        (
            {**MADE, "model": {**MADE["model"], "x": None}},
            "no model.x, but model.x=None is asked for",
        ),
        (
            {**MADE, "model": {"width": 5, "cond": 1}},
            "model.width=4, but model.width=5 is asked for .1 more differ.",
        ),
        (
            {**MADE, "model": None},
            r"model=\{'width': 4, 'cond': None\}, but model=None is asked for",
        ),
        ({**MADE, "list": [1]}, r"list=\[1, 2\], but list=\[1\] is asked for"),
        (
            {k: v for k, v in MADE.items() if k != "list"},
            r"list=\[1, 2\], but no list is asked for",
        ),
        ({}, "steps=10, but no steps is asked for .2 more differ."),
    ],
)
def test_the_first_difference_is_named_with_both_values_and_the_remedy(wanted, said):
    with pytest.raises(ValueError, match=f"^IT was made with {said}: do THAT$"):
        files.check_same(MADE, wanted, "IT", "do THAT")


def test_the_same_is_the_same():
    files.check_same(MADE, MADE, "IT", "")
    files.check_same({"a": [1, [2]]}, {"a": (1, (2,))}, "IT", "")  # as JSON has them
    files.check_same({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1}}, "IT", "", free=True)
    with pytest.raises(ValueError, match=r"a\.b=1"):
        files.check_same({"a": {"b": 1, "c": 2}}, {"a": {"b": 2}}, "IT", "", free=True)
    with pytest.raises(ValueError, match="no e, but e=None"):
        files.check_same({"d": 3}, {"e": None}, "IT", "", free=True)


# -- nobody else writes --------------------------------------------------------------------------

OURS = "diffusion/files.py"
# What else may change a file by itself, and why.
ALLOWED = {
    ("diffusion/manifest.py", "rename"): "sets a damaged checkpoint aside: nothing is written",
    ("experiments/host/cli.py", "NamedTemporaryFile"): "a traceback, written when all else failed",
    ("experiments/quickstart/look.py", "rename"): "thousands of pictures, none synced alone",
    ("experiments/quickstart/look.py", "write_bytes"): "one of them; a torn one is refused",
    ("experiments/quickstart/look.py", "write_text"): "their captions, in the same folder",
    ("launch/trials.py", "write_text"): "imports nothing of the library",
    ("launch/trials.py", "replace"): "imports nothing of the library",
    ("launch/sweep.py", "write_text"): "imports nothing of the library",
}
FORBIDDEN = {
    *("fsync", "rename", "renames", "mkstemp", "mkdtemp", "NamedTemporaryFile"),
    *("write_text", "write_bytes", "savez", "savez_compressed", "save_file", "savefig"),
    *("copytree", "copyfile", "copy2", "move"),
}


def changes(source: str) -> set[str]:
    """Names of the calls in `source` that change files on disk, those within a block of ours aside.

    `with files.whole(path) as partial:` and its body are ours.
    """
    found = set()

    def walk(node, within):
        if isinstance(node, ast.With):
            calls = [
                i.context_expr.func for i in node.items if isinstance(i.context_expr, ast.Call)
            ]
            named = {getattr(call, "attr", getattr(call, "id", "")) for call in calls}
            within = within or bool(named & {"whole", "whole_folder"})
        if isinstance(node, ast.Call) and not within:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            writes = any(isinstance(m, str) and m[:1] in ("w", "x") and len(m) < 4 for m in modes)
            # str.replace takes two arguments, pathlib's one, that of dataclasses some by name.
            moves = owner == "os" or (len(node.args) == 1 and not node.keywords)
            renames = name == "replace" and moves
            if name in FORBIDDEN or renames or (name == "open" and writes):
                found.add(name)
        for child in ast.iter_child_nodes(node):
            walk(child, within)

    walk(ast.parse(source), False)
    return found


def test_nothing_else_writes_files():
    seen = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("diffusion", "experiments", "launch", "configs")
        for path in (ROOT / folder).rglob("*.py")
        for name in changes(path.read_text())
    }
    assert {one for one in seen if one[0] != OURS} == set(ALLOWED)


@pytest.mark.parametrize(
    "code",
    [
        "os.replace(a, b)",
        "import os\ndef f():\n    with x:\n        os.fsync(3)",
        "path.replace(other)",
        "temporary.rename(path)",
        "path.write_text('x')",
        "path.open('wb')",
        "open(path, 'w')",
        "np.savez(path, a=1)",
        "tempfile.NamedTemporaryFile()",
        "with path.open('w') as file:\n    pass",
    ],
)
def test_the_rule_sees_another_writer(code):
    assert changes(code)


def test_the_rule_leaves_the_others_alone():
    fine = "with files.whole(p) as partial, partial.open('wb') as f:\n    np.savez(f)\n"
    assert changes(fine) == set()
    assert changes("s.replace('a', 'b'); path.open('rb'); open(path)") == set()
