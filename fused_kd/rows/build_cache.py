"""Where compiled rows are kept for later processes, on this machine or another.

What lies there becomes code of this process. So nothing is read that another user could have written, and nothing is
used that is not, byte for byte, what was kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "FUSED_KD_CACHE"
LARGEST_ENTRY = 64 << 20
_HAS_OWNERS = hasattr(os, "getuid")


def cache_folder() -> Path | None:
    """A folder that outlives the process, or None: ``$FUSED_KD_CACHE``, else ``~/.cache/fused_kd``.

    It can be written, and neither it nor a folder above it by users who are not trusted, but for folders with the
    sticky bit such as /tmp; else a warning says what is wrong.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not chosen and not os.path.isabs(base):
        return None
    folder = Path(chosen) if chosen else Path(base) / "fused_kd"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        for place in (folder, *folder.parents):
            found = place.stat()
            if not _trusted_owner(found) or (_written_by_others(found) and not found.st_mode & stat.S_ISVTX):
                what = "can be written by other users" if _trusted_owner(found) else f"belongs to user {found.st_uid}"
                warnings.warn(
                    f"compiled rows are not kept in {folder}, as {place} {what}: each process compiles anew; "
                    f"set {CACHE_VARIABLE} to a folder of your own, or chmod go-w",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def keep(path: Path, key: str, data: bytes, about: Mapping[str, str]) -> None:
    """Write an entry, whole or not at all, whoever else writes the same: a line of JSON that says what it is (``about``
    with it), then ``data``. Where the disk does not take it, nothing is kept."""
    head = {"key": _digest(key.encode()), "size": len(data), "sha256": _digest(data), **about}
    new = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="new-", delete=False) as file:
            new = Path(file.name)
            file.write(json.dumps(head).encode() + b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        if new is not None:
            new.unlink(missing_ok=True)


def kept(path: Path, key: str) -> bytes | None:
    """The data of an entry; None where there is none, or it is damaged, cut short, of another ``key``, or of a user who
    is not trusted."""
    try:
        with open(path, "rb", opener=_without_links) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_ENTRY:
                return None
            if not _trusted_owner(found) or _written_by_others(found):
                return None
            head, _, data = file.read().partition(b"\n")
        about = json.loads(head)
        sound = (about["key"], about["size"], about["sha256"]) == (_digest(key.encode()), len(data), _digest(data))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return data if sound else None


def _without_links(path: str, flags: int) -> int:
    # Nonblocking: a pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _trusted_owner(found: os.stat_result) -> bool:
    """We, root, or whoever can change this very file, and so the code that runs anyway."""
    return not _HAS_OWNERS or found.st_uid in (0, os.geteuid(), os.stat(__file__).st_uid)


def _written_by_others(found: os.stat_result) -> bool:
    if not _HAS_OWNERS or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return bool(found.st_mode & stat.S_IWOTH) or not _own_group(found.st_gid)


def _own_group(gid: int) -> bool:
    """The group that many systems make for each user alone."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
