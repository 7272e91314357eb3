"""What every script has around its ``main``: options, a console, one line for a user's error, an end by signal."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import threading
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser, Trainer, TrainerCallback
from transformers.hf_argparser import string_to_bool

from fused_kd.training.field_help import field_comments

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
TRACEBACK = "FUSED_KD_TRACEBACK"
_HELPER = "worker"  # that stage.helpers sets
_OURS = tuple(str(folder) for folder in (Path(__file__).parents[1], Path(sys.argv[0]).resolve().parent))


def parse(
    classes: Any,
    argv: Sequence[str] | None = None,
    *,
    configs: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    hints: Mapping[str, str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Dataclasses from ``[--preset NAME] [--rehearse] [FILE.yaml ...] [--config FILE.yaml ...] [--key value ...]``,
    later ones overriding earlier ones.

    What ``HfArgumentParser`` does with dataclasses, ``TrainingArguments`` among them, and: YAML files that give any of
    the keys; fields of type ``dict``, given as JSON or YAML text and merged key by key into what is there; a list
    also as one text, ``"[0, 1]"``; ``null`` for fields that may be None; a choice that may be "true" as a flag without
    a value. ``--help`` shows the comment behind a field that has no help of its own.

    Args:
        classes: one dataclass, or several without a field in common.
        argv: default ``sys.argv[1:]``.
        configs: where ``--preset NAME`` finds ``NAME.yaml``, and ``--rehearse`` the ``rehearse.yaml`` that makes
            everything small, unless a class has a field ``rehearse``; None (default): the script has neither.
        defaults: values of some of the fields, before those of any file.
        aliases: further names of fields, in files and flags; ``field.key`` is a key of a field of type ``dict``.
        hints: names that other programs have for fields, for the message about an unknown name.
        description: for ``--help``.

    Returns:
        One object a class.

    Raises:
        ValueError: a file that cannot be read, an unknown or missing key (with the nearest known ones), one that is
            twice in a file, an option under both of its names in one file or in the flags, a value of the wrong type,
            whatever a dataclass itself refuses; one line that names key and value.
    """
    classes = classes if isinstance(classes, (list, tuple)) else (classes,)
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    front.add_argument("--preset")
    front.add_argument("--config", action="append", default=[])
    own_rehearsal = any(field.name == "rehearse" for cls in classes for field in dataclasses.fields(cls))
    if rehearsable := configs is not None and not own_rehearsal:
        front.add_argument("--rehearse", action="store_true")
    chosen, rest = front.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    files = [Path(text) for text in takewhile(lambda text: not text.startswith("-"), rest)]
    rest = rest[len(files) :]
    files += map(Path, chosen.config)
    presets = sorted({path.stem for path in Path(configs).glob("*.yaml")} - {"rehearse"}) if configs else []
    if rehearsable and chosen.rehearse:
        files.insert(0, _rehearsal(Path(str(configs))))
    if chosen.preset is not None:
        if chosen.preset not in presets:
            raise ValueError(f"--preset must be one of {', '.join(presets) or 'none'}, got {chosen.preset!r}")
        files.insert(0, Path(str(configs)) / f"{chosen.preset}.yaml")

    usage = f"%(prog)s {_front(presets, rehearsable)}[FILE.yaml ...] [--config FILE.yaml ...] [--KEY VALUE ...]"
    parser = _Parser(classes, allow_abbrev=False, usage=usage, description=description, formatter_class=_Help)
    comments = {name: text for cls in classes for name, text in field_comments(cls).items()}
    types_of = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    for action in parser._actions:
        _prepare(action, types_of.get(action.dest))
        action.help = argparse.SUPPRESS if action.dest == _HELPER else action.help or _escaped(comments, action.dest)
    values: dict[str, Any] = copy.deepcopy(dict(defaults or {}))
    aliases, hints = aliases or {}, hints or {}
    origin: dict[str, Path] = {}
    fields = {action.dest for action in parser._actions} - {"help"}
    for file in files:
        found = _with_own_names(_read_file(file), aliases, str(file))
        if unknown := sorted(map(str, found.keys() - fields)):
            raise ValueError(
                f"{file}: unknown keys {', '.join(unknown)}{_nearest(unknown, {*fields, *aliases}, hints)}"
            )
        values = merged(values, found)
        origin |= dict.fromkeys(found, file)
    given = [text for key, value in values.items() for text in _as_flags(key, value)]
    flags = _spread(_flags_with_own_names(rest, aliases), parser._option_string_actions)
    named = [text.partition("=")[0] for text in flags if text.startswith("--")]
    # before what is missing is told, which may be what was meant
    if strange := [text for text in named if text not in parser._option_string_actions]:
        names = [text[2:].replace("-", "_") for text in strange]
        raise ValueError(f"no option {' '.join(strange)}{_nearest(names, {*fields, *aliases}, hints, '--')}")
    try:
        *made, left = parser.parse_args_into_dataclasses(
            [*given, *flags], look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        name = re.match(r"argument --(\w+)", str(error))
        if name is None or name[1] not in origin or name[1] in {text[2:].replace("-", "_") for text in named}:
            raise
        raise ValueError(f"{origin[name[1]]}: {error}") from error
    if left:
        raise ValueError(f"no option takes {' '.join(left)}: each is --NAME VALUE, with one value where it is no list")
    return tuple(made)


def build(cls: type[T], where: str, values: Any) -> T:
    """A dataclass from an option's mapping.

    Args:
        cls: the dataclass.
        where: the option's name, for messages, such as ``"arms.ours"``.
        values: the mapping, of names of fields to their values.

    Raises:
        ValueError: no mapping, an unknown or missing field, or what the dataclass itself refuses.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    if not isinstance(values, Mapping) or not values.keys() <= set(known):
        raise ValueError(f"{where} must be a mapping of {', '.join(known)}, got {values!r}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {str(error).replace(f'{cls.__name__}.__init__() ', '')}") from error


def internal(default: Any) -> Any:
    """A dataclass's field that a script sets for its own helper processes: ``--help`` does not show it."""
    return dataclasses.field(default=default, metadata={"help": argparse.SUPPRESS})


def _front(presets: Sequence[str], rehearsable: bool) -> str:
    """The usage of the options that are read before all others."""
    choice = f"[--preset {{{','.join(presets)}}}] " if presets else ""
    return choice + ("[--rehearse] " if rehearsable else "")


def _rehearsal(folder: Path) -> Path:
    if not (file := folder / "rehearse.yaml").is_file():
        raise ValueError(f"--rehearse: there is no rehearse.yaml in {folder}")
    return file


def _escaped(comments: Mapping[str, str], name: str) -> str | None:
    """A field's comment as argparse wants it, where % is special."""
    return comments[name].replace("%", "%%") if name in comments else None


def _nearest(names: Sequence[str], known: Iterable[str], hints: Mapping[str, str], prefix: str = "") -> str:
    """A question after what each name is a hint at, or its nearest known one, else where all are listed."""
    known = sorted(known)
    guessed = [[hints[name]] if name in hints else difflib.get_close_matches(name, known, 1) for name in names]
    near = dict.fromkeys(found for each in guessed for found in each)
    return f": did you mean {', '.join(f'{prefix}{name}' for name in near)}?" if near else ": --help lists all of them"


def _with_own_names(given: Mapping[str, Any], aliases: Mapping[str, str], where: str) -> dict[str, Any]:
    """A file's values without aliases; a key of a dict joins what else the file gives for it."""
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    for name, value in given.items():
        own = aliases.get(name, name)
        _check_once(named, own, name, where)
        field, _, key = own.partition(".")
        values = merged(values, {field: {key: value} if key else value})
    return values


def _check_once(named: dict[str, str], own: str, name: str, where: str) -> None:
    if (other := named.setdefault(own, name)) != name:
        raise ValueError(f"{where}: {other} and {name} are one option: give one of them")


def _flags_with_own_names(flags: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Flags without aliases: ``--lora_r 8`` is ``--lora {r: 8}``."""
    made: list[str] = []
    named: dict[str, str] = {}
    todo = list(flags)
    while todo:
        text = todo.pop(0)
        if not text.startswith("--"):
            made.append(text)
            continue
        written, equals, value = text.partition("=")
        name = written[2:].replace("-", "_")
        field, _, key = (own := aliases.get(name, name)).partition(".")
        _check_once(named, own, name, "flags")
        if name not in aliases:
            made.append(text)
        elif not key:
            made.append(f"--{field}{equals}{value}")
        else:
            count = 0 if equals else len(list(takewhile(lambda text: not text.startswith("--"), todo)))
            found = [value] if equals else [todo.pop(0) for _ in range(count)]
            values = [yaml.load(each, _Loader) for each in found]
            made.append(f"--{field}={_as_text({key: values[0] if len(values) == 1 else values})}")
    return made


def _spread(flags: Sequence[str], actions: Mapping[str, argparse.Action]) -> list[str]:
    """Flags with the values of a list apart: ``--seeds "[0, 1]"`` is ``--seeds 0 1``."""
    made: list[str] = []
    todo = list(flags)
    while todo:
        written, equals, value = todo[0].partition("=")
        action = actions.get(written)
        made.append(todo.pop(0))
        if action is None or action.nargs != "*":
            continue
        words = getattr(action.type, "__name__", "") == "str"
        values = [value] if equals else list(takewhile(lambda text: not text.startswith("--"), todo))
        if not values or not values[0].startswith("["):
            continue
        if len(values) == 1 and (values[0].endswith("]") or not words):
            todo = todo[0 if equals else 1 :]
            made[-1:] = [written, *map(_as_text, _list(written, values[0]))]
        elif not words:
            name = written.lstrip("-")
            raise ValueError(f'{written} {" ".join(values)}: give {name} as {written} A B, or quoted as "[A, B]"')
    return made


def _list(option: str, text: str) -> list[Any]:
    try:
        found = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"argument {option}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, list):
        raise ValueError(f"argument {option}: expected a list, got {text[:80]!r}")
    return found


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, key by key; ``new`` overrides."""
    both = copy.deepcopy(dict(old))
    for key, value in new.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, through :func:`run_script`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Parser(Parser, HfArgumentParser):
    pass


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Merge(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        old = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if values is None else merged(old or {}, values))


def _prepare(action: argparse.Action, hint: Any) -> None:
    """Let an option take what argparse does not know: dicts, None, empty lists."""
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else ()
    if action.type is string_to_bool:
        action.type = _bool
    if (typing.get_origin(action.type) or action.type) is dict:
        action.type = _mapping
        if action.nargs is None:
            action.__class__ = _Merge
    if action.nargs == "+":
        action.nargs = "*"
    if action.nargs is None and "true" in (action.choices or ()):
        action.nargs, action.const = "?", "true"
    convert: Any = action.type
    if type(None) in arms and convert is not None:

        def optional(text: str) -> Any:
            return None if text == "null" else convert(text)

        optional.__name__ = getattr(convert, "__name__", "value")
        action.type = optional


def _bool(text: str) -> bool:
    try:
        return bool(string_to_bool(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}") from error


def _as_flags(key: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *map(_as_text, value)]
    return [f"--{key}={_as_text(value)}"]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without keys that occur twice or are no text; 2e-5 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for part, _ in node.value:
            line = part.start_mark.line + 1
            kind = part.tag.rpartition(":")[2]
            if kind != "str":
                raise ValueError(
                    f"the key {str(part.value)[:80]!r} is read as {kind}, not text: quote it (line {line})"
                )
            if part.value in seen:
                raise ValueError(f"the key {part.value[:80]!r} is there twice (line {line})")
            seen.add(part.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"aliases are not taken (line {self.peek_event().start_mark.line + 1})")
        return super().compose_node(parent, index)


# YAML 1.1 takes 2e-5 for a text
_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping of keys to values, got {text[:80]!r}")
    return value


def as_mapping(name: str, text: str) -> dict[str, Any]:
    """The mapping that an option's JSON or YAML text is; raises ``ValueError`` where it is none."""
    try:
        return _mapping(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        return _mapping(text) if text.strip() else {}
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def make_console(**options: Any) -> Console:
    """A console that shows every text as it is, such as a path with brackets; options are those of ``rich``'s."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def run_script(main: Callable[[], object]) -> None:
    """Call a script's ``main``.

    Exits with 2 and one line where the user's input is wrong, with 130 and 143 after Ctrl-C and SIGTERM, and with a
    traceback for everything else; ``FUSED_KD_TRACEBACK=1`` shows it for all errors. A ``UserWarning`` is one line too,
    without its place in the code.
    """

    def terminate(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # so that helpers are ended and files closed

    def warn(message: Any, category: type[Warning], *where: Any) -> str:
        return f"{Path(sys.argv[0]).name}: {message}\n" if category is UserWarning else shown(message, category, *where)

    before, shown = signal.signal(signal.SIGTERM, terminate), warnings.formatwarning
    warnings.formatwarning = warn  # type: ignore[assignment]
    try:
        main()
    except KeyboardInterrupt:
        _stop("interrupted: the same command goes on", 130)
    except SystemExit as error:
        if isinstance(error.code, str):
            _stop(f"error: {error.code}", 2)
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        deliberate = (last.line or "").startswith("raise ") and last.filename.startswith(_OURS)
        if os.environ.get(TRACEBACK) or (isinstance(error, TypeError) and not deliberate):
            raise
        _stop(f"error: {' '.join(str(error).split())}", 2)
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.formatwarning = shown


def _stop(message: str, code: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """Around a training in one process: the first Ctrl-C or SIGTERM ends its step, writes a checkpoint and then acts.

    Several processes would stop at different steps: there, as at the second signal, it acts at once.
    """
    received: list[int] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if received:
                control.should_save = control.should_training_stop = True

    if trainer.args.world_size > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()
        print("stopping after this step and its checkpoint; once more to stop at once", file=sys.stderr)

    trainer.add_callback(Stop())
    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])
