"""An output folder whose finished stages are kept: a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = "arguments.json"


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    if os.name == "nt":  # no handle for reading can do that there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Raise ``ValueError`` where nothing can be written: no permission, a full disk, a file of that name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        raise ValueError(f"output={str(folder)!r} cannot be written to: {error.strerror}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write atomically: a reader sees the old file or the whole new one, after a power failure too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # process ids repeat on other hosts
    try:
        partial.write_bytes(content)
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """As :func:`write_bytes`; a line break ends each line."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_lines(path: Path) -> list[str]:
    """What :func:`write_lines` wrote."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def read_json(path: Path) -> Any:
    """The file's value, or None where there is no file, or, with a warning, one that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        warnings.warn(f"{path} is damaged and taken as missing: {error}", stacklevel=2)
        return None


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it, where there is one; of a link the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def shown(value: Any) -> str:
    """The beginning of a value that a file holds, for a message."""
    return repr(value)[:80]


def fingerprint_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value; what JSON does not know goes by its text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Run:
    """A folder with one sub-folder a stage, bound to the arguments that it was first made with.

    Raises:
        ValueError: the folder was made with other arguments; the message lists what differs. Or with arguments that
            cannot be read any more. Or nothing can be written there.
    """

    def __init__(self, folder: str | Path, arguments: dict[str, Any]) -> None:
        self.folder = Path(folder)
        if _is_main():
            check_writable(self.folder)
        arguments = json.loads(json.dumps(arguments))
        known = self._known_arguments()
        if known is None and _is_main():
            write_json(self.folder / ARGUMENTS, arguments)
        elif known is not None and known != arguments:
            differing = sorted(key for key in known.keys() | arguments.keys() if known.get(key) != arguments.get(key))
            changes = "; ".join(f"{key}: {known.get(key)!r} -> {arguments.get(key)!r}" for key in differing)
            raise ValueError(
                f"output={str(folder)!r} was made with other arguments ({changes}): "
                "give another folder, or repeat the old arguments to go on"
            )

    def _known_arguments(self) -> Any:
        path = self.folder / ARGUMENTS
        if (known := _read_bound(path, dict)) is None and _has_stages(self.folder):
            known = _read_bound(path, dict)  # another process may have written it, and then begun
            if known is None:
                raise ValueError(
                    f"output={str(self.folder)!r} has stages, but no {ARGUMENTS}, which says what they were made with: "
                    "put it back as it was, or give another folder"
                )
        return known

    def bind(self, **contents: str) -> None:
        """Bind the folder to what lies behind names among its arguments, each by a fingerprint.

        Raises:
            ValueError: the folder was made with another content of one of them, or with one that cannot be read.
        """
        for name, value in contents.items():
            path = self.folder / "content" / f"{name}.json"
            known = _read_bound(path, str)
            if known is None and _is_main():
                write_json(path, value)
            elif known is not None and known != value:
                raise ValueError(
                    f"output={str(self.folder)!r} was made with another {name}: its content is {value[:60]} now, "
                    f"it was {known[:60]}: give another folder, or put back what was there"
                )

    def stage(self, name: str) -> Path:
        """The folder of a stage. Raises ``ValueError`` where the name leads out of the run's."""
        parts = Path(name).parts
        if not parts or ".." in parts or Path(name).is_absolute():
            raise ValueError(f"{name!r} names no folder within output={str(self.folder)!r}")
        return self.folder / name

    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a stage for this process, or for this distributed run.

        A second one waits until the first has finished or died; without ``wait`` it is given False instead of True.

        Raises:
            ValueError: the stage's ``.lock`` is not a file, or cannot be opened.
        """
        self.stage(name).mkdir(parents=True, exist_ok=True)
        if not _is_main():
            yield True
            return
        with _open_lock(self.stage(name) / ".lock") as handle:
            try:
                import fcntl
            except ImportError:  # not on Windows: one process at a time there
                yield True
                return
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                print(f"{name}: waiting for another process that works on it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                warnings.warn(f"{name} cannot be locked ({error}): only one process may work on it", stacklevel=3)
            yield True


def _read_bound(path: Path, kind: type) -> Any:
    """A value that binds a folder, None where there is no such file. Raises ``ValueError`` where it cannot be read."""
    fault: object
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, kind):
            return value
        fault = f"expected a {kind.__name__}, got {shown(value)}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        fault = error
    raise ValueError(
        f"{path} says what its folder was made with, and is damaged ({fault}): put it back as it was, or give another "
        "folder"
    )


def _has_stages(folder: Path) -> bool:
    """Whether a stage was begun there, of this run and not of another one within the folder."""
    locks = (path.relative_to(folder) for path in folder.glob("*/**/.lock"))
    return any(not any((folder / above / ARGUMENTS).is_file() for above in lock.parents[:-1]) for lock in locks)


@contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    # neither through a link to what lies elsewhere, nor waiting for a pipe's other end
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    fault = f"{path} is a lock, and must be a regular file that can be written, no link"
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        raise ValueError(f"{fault} ({error.strerror}): remove it") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{fault}: remove it")
        yield handle
    finally:
        os.close(handle)


def _is_main() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    return os.environ.get("RANK", "0") == "0"
