"""What the pages say is so: Python blocks run, commands are understood, links lead somewhere, the API page is current.

A Python block is run in its page's namespace, in order, in a temporary folder. Pages whose blocks are fragments get the
names that these lack from :data:`FIXTURES`. ```` ```python no-run ```` leaves a block out; the text around it says why.
The commands of a block of ```` ```sh run ```` are run among them, with ``$MODEL`` for the folder "model".
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import pytest
import torch

import fused_kd as fk

ROOT = Path(__file__).resolve().parents[1]
API_PAGE = "docs/api.md"
PAGES = ["README.md", "examples/README.md", "bench/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
LINKED = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
OPTIONAL = ("trl", "torchao")  # blocks that import it are left out where it is missing
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = "sh run"
SHELL = ("", "sh", RUN, "bash", "shell", "console")
PROGRAMS = ("python", ".venv/bin/python", "make", "accelerate", "pip")


class Block(NamedTuple):
    line: int
    language: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = read(page)
    return [Block(text[: m.start()].count("\n") + 1, m[1].strip(), m[2]) for m in FENCE.finditer(text)]


# Names that the fragments of a page take for granted.


def using_the_loss() -> dict[str, Any]:
    """Tensors of one problem. V is above the ``vocab_size`` that the page cuts to, so everything else is tiny."""
    N, H, V, K = 5, 4, 152_064, 3
    h_s, W_s = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    h_t, W_t = torch.randn(N, H + 2), torch.randn(V, H + 2)
    log_probs, indices = torch.randn(N, V).log_softmax(-1).topk(K)
    return {
        "torch": torch,
        **{"h_s": h_s, "W_s": W_s, "h_t": h_t, "W_t": W_t, "lam": 0.5},
        **{"student": fk.LMHead(h_s, W_s), "teacher": fk.LMHead(h_t, W_t)},
        **{"labels": torch.randint(151_936, (N,)), "log_probs": log_probs, "indices": indices},
        **{"weights": torch.ones(N), "tokens_of_the_global_batch": 8},
    }


def distributed() -> dict[str, Any]:
    """A real trainer of tiny models; ``...`` stands for the arguments that the page leaves out."""
    pytest.importorskip("transformers")
    from transformers import TrainingArguments

    from fused_kd.training.trainer import KDTrainer

    from .training.tiny import rows, tiny

    def trainer(student: Any, teacher: Any, _: Any, **options: Any) -> Any:
        arguments = TrainingArguments("run", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        made = KDTrainer(student, teacher, args=arguments, train_dataset=rows(4), **options)
        made.train()
        return made

    return {"KDTrainer": trainer, "student": tiny(8, 0), "teacher": tiny(12, 1)}


def chat_models() -> dict[str, Any]:
    """A tokenizer with a chat template, and two models."""
    pytest.importorskip("transformers")
    from .training.chat_families import FAMILIES
    from .training.tiny import tiny

    tokenizer = FAMILIES["chatml"].tokenizer()
    vocab = len(tokenizer)
    return {"tokenizer": tokenizer, "student": tiny(8, 0, vocab=vocab), "teacher": tiny(12, 1, vocab=vocab)}


FIXTURES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/guides/from_axolotl.md": chat_models,
    "docs/using_the_loss.md": using_the_loss,
    "docs/distributed.md": distributed,
}


def python_pages() -> list[str]:
    return [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def imports(package: str, text: str) -> bool:
    return re.search(rf"^(from|import) {package}\b", text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", python_pages())
def test_python_blocks_run(page, monkeypatch, tmp_path, capsys):
    for package in ("transformers", "peft"):
        if imports(package, read(page)):
            pytest.importorskip(package)
    absent = [package for package in OPTIONAL if importlib.util.find_spec(package) is None]
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__", **FIXTURES.get(page, dict)()}
    for block in blocks(page):
        if block.language == RUN:
            run_commands(block.text)
        elif block.language == "python" and not any(imports(package, block.text) for package in absent):
            # Blank lines before it, so that a traceback names the page's own.
            exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), namespace)


def run_commands(text: str) -> None:
    """Run the Python commands of a block, here and in this process, one after the other."""
    for line in re.split(r"(?<!\\)\n", text):
        words = shlex.split(line.replace("\\\n", " ").replace("$MODEL", "model"), comments=True)
        if words:
            assert words[0] == "python", f"only Python commands are run, got {line}"
            module = importlib.import_module(words[2]) if words[1] == "-m" else script(words[1])
            module.main(words[3:] if words[1] == "-m" else words[2:])


OURS = "# examples/train.py\n"


def configs() -> list[tuple[str, int]]:
    """(page, line) of each config of the training script."""
    return [(page, b.line) for page in PAGES for b in blocks(page) if b.language == "yaml" and b.text.startswith(OURS)]


@pytest.mark.parametrize(("page", "line"), configs())
def test_configs_train(page, line, monkeypatch, tmp_path):
    """Each as it is but for the models, the data and the hardware: two steps of tiny models."""
    for package in ("accelerate", "peft", "rich"):
        pytest.importorskip(package)
    import json

    made = chat_models()
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        made[name].save_pretrained(name)
        made["tokenizer"].save_pretrained(name)
    turns = [
        {"role": role, "content": text} for role, text in (("user", "What is a cat?"), ("assistant", "An animal."))
    ]
    text = "".join(json.dumps({"messages": [{**turns[0], "content": f"{n}?"}, turns[1]]}) + "\n" for n in range(60))
    Path("chats.jsonl").write_text(text, encoding="utf-8")
    Path("config.yaml").write_text(next(b.text for b in blocks(page) if b.line == line), encoding="utf-8")
    here = ["--student", "student", "--teacher", "teacher", "--data", "chats.jsonl", "--output", "out"]
    small = ["--bf16", "false", "--use_cpu", "true", "--max_steps", "2", "--report_to", "none"]
    record = script("examples/train.py").main(["config.yaml", *here, *small])
    assert record["steps"] == 2 and (tmp_path / "out" / "model").is_dir()


def test_every_language_is_known():
    known = {*SHELL, "python", "python no-run", "text", "yaml", "json", "math"}
    found = {(page, b.line, b.language) for page in PAGES for b in blocks(page) if b.language not in known}
    assert not found


def commands(page: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of each command; a line that goes on is one, comments are none."""
    for block in blocks(page):
        first = re.match(r"(?:#.*\n|[A-Z_]+=\S* |\s)*(\S*)", block.text)
        if block.language not in SHELL or (not block.language and first is not None and first[1] not in PROGRAMS):
            continue  # a diagram, a file
        line = block.line
        for text in re.split(r"(?<!\\)\n", block.text):
            line += 1
            # What is left to the reader: $VARIABLES, and <names of things>.
            text, joined = re.sub(r"<[^>\n]+>", "PATH", re.sub(r"\$\w+", "0", text.replace("\\\n", " "))), text
            words = shlex.split(text, comments=True)
            line += joined.count("\n")
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield line, words


@cache
def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses ask for it
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / path).parent))  # as of a script that Python runs
        spec.loader.exec_module(module)
    return module


def check_python(words: list[str]) -> None:
    """Raise where ``python WORDS...`` would stop at its arguments."""
    if words[:1] != ["-m"]:
        assert (ROOT / words[0]).is_file(), f"no such script: {words[0]}"
        module = script(words[0])
        if hasattr(module, "parse_arguments"):
            module.parse_arguments(words[1:])
            return
        if not hasattr(module, "parse"):
            assert not words[1:], f"{words[0]} takes no arguments"
            return
        parse = module.parse

        def only(*args: Any, **options: Any) -> None:
            parse(*args, **options)
            raise SystemExit(0)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(module, "parse", only)
            module.main(words[1:])
    elif words[1] == "fused_kd.info":
        from fused_kd import info

        assert info.main(words[2:]) == 0
    elif words[1] in ("fused_kd.serve", "fused_kd.shrink", "fused_kd.export"):
        importlib.import_module(words[1]).parse_arguments(words[2:])
    elif words[1] == "bench":
        from bench import __main__ as bench

        bench.main(words[2:])
    else:
        assert importlib.util.find_spec(words[1]) is not None, f"no such module: {words[1]}"


def check_command(words: list[str]) -> None:
    """Raise for a program that is not one of ours, or for arguments that it does not take."""
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
        variables = set(re.findall(r"^(\w+) \?=", read("Makefile"), re.MULTILINE))
        named = {word.partition("=")[0] if "=" in word else word for word in rest}
        assert named <= targets | variables, f"no such target or variable: {rest}"
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        found = launch_command_parser().parse_args(rest[1:])
        assert found.config_file is None or (ROOT / found.config_file).is_file(), found.config_file
        if found.training_script != "SCRIPT":
            check_python([found.training_script, *found.training_script_args])
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", read("pyproject.toml"), re.MULTILINE)
        assert rest[0] == "install"
        wanted = [name for word in rest for found in re.findall(r"\[([\w,]+)\]", word) for name in found.split(",")]
        assert set(wanted) <= set(extras), f"no such extra: {wanted}"
    else:
        assert "python" in program and program in PROGRAMS, f"teach tests/test_docs.py what {program!r} is"
        check_python(rest)


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_commands_are_understood(page, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("rich")
    monkeypatch.chdir(ROOT)
    patched = ("caches.run", "cpu.run", "gpu.run", "gpu.report", "kernels.main", "end_to_end.main", "machine.main")
    for name in (*patched, "sums.main", "teachers.main", "lists.main", "low_precision.main"):
        monkeypatch.setattr(f"bench.{name}", lambda *args: 0)
    for variable in ("OMP_WAIT_POLICY", "TQDM_MININTERVAL"):  # what the scripts set is taken back
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    for line, words in commands(page):
        try:
            check_command(words)
        except (SystemExit, AssertionError, ValueError) as error:
            pytest.fail(f"{page}:{line}: {shlex.join(words)}: {error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "command, message",
    [
        ("make dem", "no such target"),
        ("curl example.org", "teach"),
        ("python examples/nothing.py", "no such script"),
        ("python examples/quickstart.py --size 3", "takes no arguments"),
        ("pip install '.[trane]'", "no such extra"),
        ("python -m fused_kd.info --shap 1 2 3 4", "2"),  # argparse's exit code
        ("python examples/train.py --outptu x", None),
        ("python examples/train.py examples/configs/nothing.yaml --output x", "nothing.yaml cannot be read"),
    ],
)
def test_a_wrong_command_is_found(command, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, SystemExit), match=message):
        check_command(shlex.split(command))


def prose(page: str) -> str:
    """The page without code, whose brackets are no links."""
    return re.sub(r"`[^`\n]*`", lambda m: "x" * len(m[0]), FENCE.sub("", read(page)))


def anchors(page: str) -> set[str]:
    """GitHub's anchors of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", FENCE.sub("", read(page)), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = next(i for i in range(1000) if (f"{slug}-{i}" if i else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^()\s]+)\)", prose(page)):
        if "://" in target or target.startswith("mailto:"):
            parts = urlparse(target)
            if parts.scheme != "mailto" and not (parts.scheme in ("https", "http") and "." in parts.netloc):
                wrong.append(target)
            continue
        path, _, fragment = unquote(target).partition("#")
        file = ((ROOT / page).parent / path if path else ROOT / page).resolve()
        if not file.exists() or ROOT not in file.parents:
            wrong.append(target)
        elif fragment:
            found = anchors(str(file.relative_to(ROOT))) if file.suffix == ".md" else ()
            wrong += [] if fragment in found else [target]
    assert not wrong


def test_every_page_is_in_the_index():
    index = prose("docs/README.md")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


@pytest.fixture(scope="module")
def api() -> ModuleType:
    for package in ("transformers", "trl", "yaml"):
        pytest.importorskip(package)
    return script("docs/api.py")


@pytest.mark.filterwarnings("ignore")
def test_api_page_is_current(api):
    assert read(API_PAGE) == api.page(), "run: make docs"


def test_tables_of_objectives_are_current():
    module = script("docs/objectives.py")
    for page in module.PAGES:
        assert read(page) == module.written(read(page)), "run: make docs"
        assert all(f"| `{name}` |" in read(page) for name in fk.OBJECTIVES)


def mentioned(doc: str | None, seen: tuple[str, ...] = ()) -> set[str]:
    """Parameters that a docstring documents: entries of a section, literals, and what a class it names documents."""
    text = inspect.cleandoc(doc or "")
    found = set(re.findall(r"``\**(\w+)``", text))
    for names in re.findall(r"^ {4}([\w*, ]+): ", text, re.MULTILINE):
        found |= {name.strip(" *") for name in names.split(",")}
    for name in re.findall(r":class:`(?:fused_kd\.)?(\w+)`", text):
        cls = getattr(fk, name, None)
        if inspect.isclass(cls) and name not in seen:
            members = [cls, *(x for key, x in vars(cls).items() if inspect.isfunction(x) and key[0] != "_")]
            found |= {p for x in members for p in mentioned(x.__doc__, (*seen, name))}
    return found


@pytest.mark.parametrize("name", [name for name in fk.__all__ if callable(getattr(fk, name))])
def test_public_names_are_documented(name):
    value = getattr(fk, name)
    doc = value.__doc__ or ""
    assert doc and not doc.startswith(f"{name}("), "no docstring"  # a dataclass writes a bare signature itself
    assert set(inspect.signature(value).parameters) - mentioned(doc) == set()
    for member, function in vars(value).items() if inspect.isclass(value) else ():
        if inspect.isfunction(function) and member == "forward":
            assert set(inspect.signature(function).parameters) - mentioned(function.__doc__) == {"self"}


@pytest.mark.parametrize("name", [cls.__name__ for cls in fk.OBJECTIVES.values()])
def test_objectives_give_their_formula_and_ranges(name):
    doc = inspect.getdoc(getattr(fk.objectives, name)) or ""
    # SelfEvolution's two are its branches'.
    assert re.search(r"``[^`]*(KL\(|log|\|p - q\||p\*\*a)", doc)
    for parameter in inspect.signature(getattr(fk.objectives, name)).parameters:
        entry = re.search(
            rf"^ {{4}}(?:\w+, )*{parameter}(?:, \w+)*: (.*?)(?=^ {{4}}\w|\Z)", doc, re.MULTILINE | re.DOTALL
        )
        allowed = '"difficulty"' if parameter == "gate" else r"in \[(0|1e-3), (1|inf|1 - 1e-3)\]"
        assert entry is not None and re.search(allowed, entry[1]), parameter


def test_shell_parser_joins_lines(monkeypatch):
    monkeypatch.setattr(
        sys.modules[__name__], "blocks", lambda page: [Block(3, "", "A=1 make demo  # why\npython a \\\n  --b $C\n")]
    )
    assert list(commands("")) == [(4, ["make", "demo"]), (6, ["python", "a", "--b", "0"])]
