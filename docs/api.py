"""Writes docs/api.md from the code: signatures and docstrings of the public names. ``make docs`` runs it."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 100
PROPERTIES = (property, cached_property)
# What a training script of one's own takes; the recipes' folders have pages of their own.
TRAINING = {
    "fused_kd.training.trainer": ("KDTrainer", "BetaSchedule"),
    "fused_kd.training.specs": ("ObjectiveSpec", "parse_objective"),
    "fused_kd.training.advice": ("advised_objective", "still_hard"),
    "fused_kd.training.fit": ("fit", "training_arguments", "ModuleTrainer"),
    "fused_kd.training.stage": ("Stages", "helpers"),
    "fused_kd.training.script": ("parse", "run_script"),
    "fused_kd.training.data": ("Pair", "Instruction", "load_pairs", "load_directions", "load_instructions"),
    "fused_kd.training.rows": ("load_rows", "StreamedRows"),
    "fused_kd.training.packs": ("pack_rows", "PackedRows"),
    "fused_kd.training.prompts": ("PromptTemplate", "Rows", "tokenize_pairs", "tokenize_instructions", "render_sample"),
    "fused_kd.training.collate": ("Collator", "PackingCollator"),
    "fused_kd.training.models": ("LoRA", "load_model", "load_tokenizer"),
    "fused_kd.training.shrinking": ("shrink",),
    "fused_kd.training.exporting": ("export",),
    "fused_kd.training.contexts": ("with_context", "ContextRows"),
    "fused_kd.training.teacher_cache": ("TeacherCache",),
    "fused_kd.training.cached_rows": ("CachedRows",),
    "fused_kd.training.cache": ("write_cache", "write_lists", "convert_vllm"),
    "fused_kd.training.generate": ("Decoding", "Generation", "Generations", "generate", "generate_to"),
    "fused_kd.training.score": ("Scores", "Similarity", "score", "similarity", "Comparison", "paired_bootstrap"),
}
SERVING = {
    "fused_kd.serving.client": ("ServedTeacher",),
    "fused_kd.serving.engines": ("EngineTeacher", "SGLangTeacher", "VLLMTeacher"),
    "fused_kd.serving.server": ("TeacherServer",),
}
PARALLEL = {"fused_kd.parallel": ("Shards", "Traffic", "count_traffic", "predicted_traffic", "shard_rows")}
SPANS = {"fused_kd.spans": ("aligned_spans", "Spans")}
PLANNING = {"fused_kd.forecast": ("Choice", "plan_for"), "fused_kd.reference": ("reference_kd_loss",)}
HEAD = """\
# API

Made from the code by `docs/api.py`; do not edit it, run `make docs`.

N tokens, hidden size H, vocabulary V, k entries of a list; `_s` student, `_t` teacher. q is the student's distribution,
p the teacher's, y the label, `yt = (1 - lam) * onehot(y) + lam * p`. Losses are in nats. Equations are those of Song et
al., COLING 2025.
"""


def sections() -> list[tuple[str, list[tuple[str, Any]]]]:
    """(title, [(dotted name, object)]) of the page, in order."""
    core = importlib.import_module("fused_kd")
    names = [name for name in core.__all__ if not name.startswith("__")]
    objectives = [cls.__name__ for cls in core.OBJECTIVES.values()]
    kinds = [*objectives, "Sum", "parse"]
    loss = ["KDLoss", "kd_loss", "KDOutput", "LMHead", "TopK", "Mixture"]
    loss += ["Lists", "top_k_of", "log_probs_at", "sample_of"]
    maps = ["vocab_map", "VocabMap"]
    others = [name for name in names if name not in {*objectives, *loss, *maps}]
    found = [
        ("The loss", _of(core, loss)),
        ("Objectives", [*_of(importlib.import_module("fused_kd.objectives"), kinds), *_of(core, others[:1])]),
        ("Vocabularies", [*_of(core, maps), *_listed(SPANS)]),
        ("Memory, plans, the float64 reference", [*_of(core, others[1:]), *_listed(PLANNING)]),
        ("A vocabulary over ranks", _listed(PARALLEL)),
    ]
    found += [(f"{module.__name__}", list(_public(module))) for module in integrations()]
    return [*found, ("Training", _listed(TRAINING)), ("Served teachers", _listed(SERVING))]


def integrations() -> list[ModuleType]:
    """The modules of ``fused_kd.integrations``."""
    package = importlib.import_module("fused_kd.integrations")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def page() -> str:
    """The whole page."""
    found = sections()
    anchors = {name.rsplit(".", 1)[-1]: _anchor(name) for _, entries in found for name, _ in entries}
    parts = [HEAD, "\n".join(f"- [{title}](#{_anchor(title)})" for title, _ in found)]
    for title, entries in found:
        parts.append(f"## {title}")
        module = sys.modules.get(title)
        if module is not None:
            parts.append(markdown(module.__doc__, anchors))
        parts += [part for name, obj in entries for part in _entry(name, obj, anchors)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines and documents itself."""
    for name, value in vars(cls).items():
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if not name.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, PROPERTIES)) and plain.__doc__:
            yield name, plain


def markdown(doc: str | None, anchors: dict[str, str]) -> str:
    """A docstring of this code as Markdown: sections become lists, roles become links, literals code."""
    lines = inspect.cleandoc(doc or "").splitlines()
    made: list[str] = []
    section = example = False
    for line in lines:
        if example and not line.strip():
            example = False
            made.append("```")
        if line.startswith(">>> ") and not example:
            example = True
            made.append("```text")
        heading = re.fullmatch(r"(Args|Attributes|Returns(?: on call)?|Raises|Note):", line)
        if heading:
            section = True
            made += ["", f"**{heading[1]}**", ""]
        elif example:
            made.append(line)
        elif section and line and not line.startswith(" "):
            section = False
            made += ["", line]
        elif section and re.match(r" {4}\S", line):
            entry = re.match(r" {4}(\*{0,2}[\w\"][^:]{0,60}?): (.*)|(.*)", line)
            assert entry is not None
            made.append(f"- {_names(entry[1])}: {entry[2]}" if entry[1] else f"- {line.strip()}")
        elif section:
            made.append(f"  {line.strip()}" if line else "")
        else:
            made.append(line)
    if example:
        made.append("```")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(made)).strip()
    parts = re.split(r"(```text\n.*?\n```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```text") else _inline(part, anchors) for part in parts)


def _names(names: str) -> str:
    return ", ".join(f"`{name.strip()}`" for name in names.split(","))


def _inline(text: str, anchors: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1].lstrip("~")
        anchor = anchors.get(name.rsplit(".", 1)[-1])
        return f"[`{name}`](#{anchor})" if anchor else f"`{name}`"

    text = re.sub(r":(?:class|func|meth|mod|data|attr):`([^`]+)`", link, text)
    return text.replace("``", "`")


def _entry(name: str, obj: Any, anchors: dict[str, str]) -> Iterator[str]:
    yield f"### {name}"
    if not callable(obj):
        yield "Objectives by their names in configurations and command lines:"
        yield "\n".join(f"- `{key}`: [`{value.__name__}`](#{anchors[value.__name__]})" for key, value in obj.items())
        return
    yield _fence(signature(name.rsplit(".", 1)[-1], obj))
    yield markdown(obj.__doc__, anchors)
    if isinstance(obj, type):
        for member, value in members(obj):
            yield f"#### {obj.__name__}.{member}"
            if not isinstance(value, PROPERTIES):
                yield _fence(signature(member, value))
            yield markdown(value.__doc__, anchors)


def signature(name: str, obj: Any) -> str:
    """``name(...) -> ...``, broken into a line a parameter where it is long."""
    found = inspect.signature(obj)
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    shown = [_parameter(p) for p in parameters]
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = "" if found.return_annotation in (found.empty, "None", None) else _annotation(found.return_annotation)
    arrow = f" -> {result}" if result and not isinstance(obj, type) else ""
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = parameter.annotation is not parameter.empty
    text = f"{stars}{parameter.name}" + (f": {_annotation(parameter.annotation)}" if typed else "")
    if parameter.default is parameter.empty:
        return text
    default = repr(parameter.default)
    if re.search(r" at 0x|<factory>", default):  # addresses differ from run to run
        default = "..."
    return f"{text} = {default}" if typed else f"{text}={default}"


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"ForwardRef\(([^()]*)\)", r"\1", text.replace("'", ""))


def _fence(code: str) -> str:
    return f"```text\n{code}\n```"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _of(module: ModuleType, names: list[str] | tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(f"{module.__name__}.{name}", getattr(module, name)) for name in names]


def _listed(modules: dict[str, tuple[str, ...]]) -> list[tuple[str, Any]]:
    return [entry for name, names in modules.items() for entry in _of(importlib.import_module(name), names)]


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        value = getattr(module, name)
        if (inspect.isfunction(value) or isinstance(value, type)) and value.__module__ == module.__name__:
            yield f"{module.__name__}.{name}", value


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with ``--check`` say by the exit code whether it differs."""
    parser = argparse.ArgumentParser(prog="python docs/api.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args(arguments)
    text = page()
    if args.check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
