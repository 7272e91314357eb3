"""Finished work in folders: written whole, named after what it was made from, shared by processes.

A finished stage is not done again; with another setting, input file or earlier stage it has another name, so nothing
stale is taken for it, and both stay side by side.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DONE = "done.json"
_DIGITS = 10  # of a key in a folder's name
_POLL_SECONDS = 2.0
_FIRST = "FUSED_KD_FIRST_PROCESS"  # its id, for helpers
# what a training or a decoding leaves, which other arguments could not go on with
_WORK = ("training.json", "model", "checkpoints/*checkpoint-*", "batches/[0-9]*")


def is_main() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    return os.environ.get("RANK", "0") == "0"


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


def tell(path: Path, title: str, value: Any) -> None:
    """Add ``{"title", "value"}`` as a line to a file of results, unless it is there; several processes may."""
    if title in (known := told(path)) and known[title] == json.loads(json.dumps(value)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:  # one write, behind a break: a line that a kill has cut spoils no other
        file.write(f"\n{json.dumps({'title': title, 'value': value}, ensure_ascii=False)}".encode())


def told(path: Path) -> dict[str, Any]:
    """What :func:`tell` added, the last value of each title; a line that a kill has cut is passed over."""
    found: dict[str, Any] = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
            found[row["title"]] = row["value"]
        except ValueError:
            continue
    return found


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it, where there is one; of a link the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in the place of what is there."""
    remove_folder(folder)
    os.replace(partial, folder)
    flush(folder.parent)


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


def check_counts(**values: Any) -> None:
    """Raise ``ValueError`` for the first value that is no int of at least 1, or one that 64 bits do not hold."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 60:
            raise ValueError(f"{name} must be an int of at least 1, got {str(value)[:80]}")


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file for this process, or for this distributed run; it dies with the process.

    A second one waits until the first has finished; without ``wait`` it is given False instead of True.

    Raises:
        ValueError: the file cannot be made or opened.
    """
    if not is_main():
        yield True
        return
    from filelock import FileLock, Timeout

    held, mine = FileLock(path), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except Timeout:
            mine = wait
            if wait:
                print(f"{path}: waiting for another process that works on it")
                held.acquire()
    except NotImplementedError as error:  # a file system without locks
        warnings.warn(f"{path} cannot be locked ({error}): only one process may work on it", stacklevel=3)
    except OSError as error:
        raise ValueError(f"{path} is a lock, and must be a file that can be written: {error}") from error
    try:
        yield mine
    finally:
        held.release()


def bind(folder: str | Path, arguments: Mapping[str, Any]) -> Path:
    """Bind a folder to the arguments that its work is begun with, in its ``arguments.json``; the folder.

    While there is no work (:func:`has_work`), as after a mistake in the first command, it is bound anew.

    Raises:
        ValueError: nothing can be written there; its work was begun with other arguments (the message lists what
            differs) or with such as cannot be read any more.
    """
    folder = Path(folder)
    path = folder / "arguments.json"
    given = json.loads(json.dumps(dict(arguments), default=_plain))
    if is_main():
        check_writable(folder)
    if not has_work(folder):
        if is_main():
            write_json(path, given)
        return folder
    if not path.is_file():
        raise ValueError(
            f"output={str(folder)!r} has work of an earlier run, but no {path.name}, which says what it was made "
            "with: put it back as it was, or give another folder"
        )
    known = read_json(path)
    if not isinstance(known, dict):
        raise ValueError(f"{path} says what its folder was made with, and is damaged: give another folder")
    check_same(folder, known, given)
    return folder


def has_work(folder: Path) -> bool:
    """Whether a folder that is bound has anything of a run in it, or a run that is at it now."""
    if any(path for name in _WORK for path in folder.glob(name)):
        return True
    for held in (folder / ".lock", folder / "batches" / ".lock"):
        if held.is_file():
            with lock(held, wait=False) as mine:
                if not mine:
                    return True
    return False


def check_same(folder: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where the arguments that a folder was made with differ from those given now."""
    differing = sorted(key for key in known.keys() | given.keys() if known.get(key) != given.get(key))
    if differing:
        changes = "; ".join(f"{key}: {str(known.get(key))[:80]} -> {str(given.get(key))[:80]}" for key in differing)
        longer = "; a run is not made longer" if {"max_steps", "num_train_epochs"} & {*differing} else ""
        raise ValueError(
            f"output={str(folder)!r} was made with other arguments ({changes}): give another folder as output, or "
            f"repeat the old arguments to go on with it{longer}"
        )


class Stages:
    """Finished work in one folder, each piece in a sub-folder named TITLE-HASH.

    The hash is one of the title, the settings, the needed stages and the content of the input files.

    Raises:
        ValueError: nothing can be written to ``folder``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._kept: set[str] | None = set()
        if is_main():
            check_writable(self.folder)

    def __call__(
        self,
        title: str,
        work: Callable[[Path], object],
        settings: Mapping[str, Any],
        *,
        needs: Sequence[Path] = (),
        files: Sequence[str | Path] = (),
    ) -> Path:
        """The folder of the finished stage, whose work is done now if it was not.

        Args:
            title: short, for people; the folder's name begins with it.
            work: called with the folder, writes its results there. After a kill it is called again and finds what it
                had written. Of several processes one does it, and the others wait.
            settings: everything else that the result depends on; dataclasses, paths and JSON values.
            needs: folders of earlier stages, whose results it reads.
            files: files, folders of files, or prefixes of parallel text, that it reads; by content, wherever they
                lie. Where there is none of that name (a preset, a hub name) the name itself counts.

        Raises:
            TypeError: settings that are not JSON. ValueError: a title that cannot begin a folder's name.
        """
        folder, about = self._named(title, settings, needs, files)
        if (folder / DONE).is_file():
            if self._kept is not None:
                self._kept.add(folder.name)
            return folder
        with lock(self.folder / ".locks" / folder.name):
            if not (folder / DONE).is_file():
                if is_main():
                    again = " goes on" if (folder / "stage.json").is_file() else ""
                    kept = f"; finished before: {len(self._kept)}" if self._kept else ""
                    print(f"{time.strftime('%H:%M:%S')} {folder.name}{again}{kept}", flush=True)
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(folder / "stage.json", about)
                self._kept = None  # said once
                work(folder)
                if is_main():
                    write_json(folder / DONE, {"stage": folder.name})
        return folder

    def finished(
        self,
        title: str,
        settings: Mapping[str, Any],
        *,
        needs: Sequence[Path] = (),
        files: Sequence[str | Path] = (),
    ) -> Path | None:
        """The folder of a stage, named as in a call, whose work is done; None where it is not. Nothing is done here.

        Raises:
            TypeError, ValueError: as a call.
        """
        folder, _ = self._named(title, settings, needs, files)
        return folder if (folder / DONE).is_file() else None

    def _named(
        self, title: str, settings: Mapping[str, Any], needs: Sequence[Path], files: Sequence[str | Path]
    ) -> tuple[Path, dict[str, Any]]:
        if not title or not all(char.isalnum() or char in "-_.=" for char in title):
            raise ValueError(f"title={title!r}: expected letters, digits and -_.=")
        about = {
            "title": title,
            "settings": json.loads(json.dumps(dict(settings), default=_plain)),
            "needs": [Path(folder).name for folder in needs],
            "files": [_content(file) for file in files],
        }
        folder = self.folder / f"{title}-{fingerprint(about)[:_DIGITS]}"
        return folder, about

    def share(self, pieces: Mapping[str, Callable[[], object]]) -> None:
        """Do pieces of work, each of which calls stages, together with other processes of the same folder.

        This process takes those that nobody holds, and then goes through all of them: what is finished costs nothing,
        and what another process has left unfinished is done here.
        """
        for name, piece in pieces.items():
            with lock(self.folder / ".locks" / f"piece-{fingerprint(name)[:_DIGITS]}", wait=False) as mine:
                if mine:
                    piece()
        for piece in pieces.values():
            piece()


@contextmanager
def helpers(
    script: str, arguments: Sequence[str] | None, jobs: int, folder: str | Path, *, helper: bool = False
) -> Iterator[None]:
    """``jobs - 1`` more processes of a script, each with ``--worker`` and a log in ``folder/worker-N.log``.

    Those still at work at the end are terminated, and a helper ends when its first process is gone.

    Args:
        script: its path. arguments: as of its ``main``; None takes ``sys.argv``'s.
        helper: this process is one of them, and starts none.

    Raises:
        ValueError: jobs below 1.
    """
    check_counts(jobs=jobs)
    if helper:
        # told, not looked up: the first process may be gone by now
        first = int(os.environ.get(_FIRST) or os.getppid())
        threading.Thread(target=_end_with, args=(first,), daemon=True).start()
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, *(sys.argv[1:] if arguments is None else arguments), "--worker"]
    known = os.environ | {_FIRST: str(os.getpid())}
    running: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for log in (Path(folder) / f"worker-{number}.log" for number in range(1, jobs)):
            with open(log, "a") as file:
                running[log] = subprocess.Popen(command, stdout=file, stderr=file, env=known)
        yield
        for log, process in running.items():
            if process.poll() not in (None, 0):
                print(f"a process failed and its work was done here: see {log}", file=sys.stderr)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _end_with(first: int) -> None:
    while os.getppid() == first:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"settings must be JSON values or dataclasses, got {value!r}")


def _content(file: str | Path) -> str:
    path = Path(file).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
    elif path.exists():
        found = [path]
    else:  # a prefix of parallel text, or of nothing here
        found = sorted(p for p in path.parent.glob(f"{glob.escape(path.name)}.*") if p.is_file())
    if not found:
        return f"name:{file}"
    folder = path if path.exists() else path.parent
    return "sha256:" + fingerprint({p.relative_to(folder).as_posix(): fingerprint_file(p) for p in found})
