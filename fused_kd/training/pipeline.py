"""Stages of a script, each in a folder named after everything that it was made from.

A finished stage is not done again; with another setting, input file or earlier stage it has another name, so nothing
stale is taken for it, and both stay side by side.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_kd.training.runs import Run, fingerprint_file, read_json, write_json
from fused_kd.training.sharing import share

DONE = "done.json"
SHOWN = 10  # digits of a key in a folder's name


@dataclass(frozen=True)
class Stage:
    """A piece of work whose result lies in ``folder``. ``name`` is that folder's name, ``title`` the name without key.

    ``about`` is what the key is made of.
    """

    title: str
    folder: Path
    about: Mapping[str, Any]
    work: Callable[[Path], None] = field(repr=False)
    needs: tuple[Stage, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def done(self) -> bool:
        return (self.folder / DONE).is_file()


class Pipeline:
    """The stages of a script in one folder.

    Nothing is done when a stage is added, so that a script can say its plan; :meth:`finish` does a stage and, before
    it, those that it needs, and :meth:`work` many of them together with other processes.

    Args:
        folder: where the stages lie.
    """

    def __init__(self, folder: str | Path) -> None:
        self.run = Run(folder, {})
        self.stages: list[Stage] = []

    def add(
        self,
        title: str,
        work: Callable[[Path], None],
        settings: Mapping[str, Any],
        *,
        needs: Sequence[Stage] = (),
        files: Sequence[str | Path] = (),
    ) -> Stage:
        """A stage that ``work(folder)`` does.

        Args:
            title: short, for people; a folder's name begins with it.
            work: writes its results into the folder. After a kill it is called again and finds what it had written.
            settings: everything else that the result depends on; dataclasses and JSON values.
            needs: stages whose results it reads.
            files: files, folders of files, or prefixes of parallel text, that it reads; by content, wherever they
                lie. Where there is none of that name (a preset, a hub name) the name itself counts.

        Raises:
            TypeError: settings that are not JSON. ValueError: a title that cannot begin a folder's name.
        """
        if not title or not all(char.isalnum() or char in "-_." for char in title):
            raise ValueError(f"title={title!r}: expected letters, digits and -_.")
        about = {
            "title": title,
            "settings": json.loads(json.dumps(dict(settings), default=_plain)),
            "needs": [stage.name for stage in needs],
            "files": [_content(file) for file in files],
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:SHOWN]
        stage = Stage(title, self.run.stage(f"{title}-{key}"), about, work, tuple(needs))
        if all(known.name != stage.name for known in self.stages):
            self.stages.append(stage)
        return stage

    def finish(self, stage: Stage, tell: Callable[[Stage], None] = lambda stage: None) -> Path:
        """The folder of a stage that is done by then; ``tell`` hears of each that is about to be done."""
        if stage.done:
            return stage.folder
        for earlier in stage.needs:
            self.finish(earlier, tell)
        with self.run.lock(f".claims/{stage.name}"):
            if not stage.done:
                self._do(stage, tell)
        return stage.folder

    def work(
        self, wanted: Callable[[], Sequence[Stage]] | None = None, tell: Callable[[Stage], None] = lambda stage: None
    ) -> Iterator[Stage]:
        """Finish stages together with other processes of the same folder, yielding those that this one did.

        Args:
            wanted: the stages, asked again after each; what they need is added. Default: all.
            tell: hears of each stage that this process is about to do.
        """
        wanted = wanted or (lambda: self.stages)
        yield from share(
            self.run,
            lambda: with_needs(wanted()),
            done=lambda stage: stage.done,
            needs=lambda stage: stage.needs,
            do=lambda stage: self._do(stage, tell),
        )

    def _do(self, stage: Stage, tell: Callable[[Stage], None]) -> None:
        tell(stage)
        stage.folder.mkdir(parents=True, exist_ok=True)
        write_json(stage.folder / "stage.json", stage.about)
        stage.work(stage.folder)
        write_json(stage.folder / DONE, {"stage": stage.name})

    def plan(self) -> list[tuple[str, str]]:
        """Of each stage so far "done", "begun" or "to do", and its name."""
        states = []
        for stage in self.stages:
            begun = read_json(stage.folder / "stage.json") is not None
            states.append(("done" if stage.done else "begun" if begun else "to do", stage.name))
        return states


def with_needs(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they need, each once and after what it needs."""
    found: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.name not in found:
            for earlier in stage.needs:
                add(earlier)
            found[stage.name] = stage

    for stage in stages:
        add(stage)
    return list(found.values())


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
    parts = [f"{part.relative_to(folder).as_posix()} {fingerprint_file(part)}" for part in found]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()
