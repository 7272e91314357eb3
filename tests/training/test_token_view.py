"""The token view: numbers against full logits in float64, characters of several tokens, page, terminal, script."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console  # noqa: E402

import fused_kd as fk  # noqa: E402
from fused_kd.reference import reference_rows  # noqa: E402
from fused_kd.training.data.pairs import Pair  # noqa: E402
from fused_kd.training.data.prompts import LABEL_PAD, tokenize_pairs  # noqa: E402
from fused_kd.training.evaluation import token_view, token_view_render  # noqa: E402
from fused_kd.training.evaluation.token_view import SentenceView, TokenView, checkpoint_labels, token_difficulties  # noqa: E402
from fused_kd.training.evaluation.token_view_render import render_html, render_terminal  # noqa: E402
from tests.training.byte_level import make_tokenizer  # noqa: E402

PAIRS = [
    Pair("The dog sleeps.", "Der Hund schläft."),
    Pair("A <b>bold</b> & \"quoted\" child says 'hi' 😀", "Ein <b>fettes</b> & \"wörtliches\" Kind sagt 日本 'hi' 😀"),
    Pair("Streets", "Straßen"),
]
SCRIPT = Path(__file__).parents[2] / "examples" / "inspect_tokens.py"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([pair.target for pair in PAIRS[:1]] * 3)


def model(tokenizer, hidden: int, seed: int, *, vocab: int | None = None, kind: str = "Llama"):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden // 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"Gemma2": {"final_logit_softcapping": 5.0}, "Cohere": {"logit_scale": 0.3}}.get(kind, {}),
    )
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # peaked outputs, so that easy and hard tokens both occur
        made.get_output_embeddings().weight.mul_(20)
        if made.get_output_embeddings().bias is not None:
            made.get_output_embeddings().bias.normal_()
    return made


@pytest.fixture(scope="module")
def rows(tokenizer):
    return tokenize_pairs(tokenizer, "tiny", PAIRS, "en-de", 200, skip_long=False)


def expected(student, teacher, rows, objective, vocab: int):
    """Loss, difficulty, hardness and both distributions of all labelled tokens, one unpadded row at a time."""
    logits, labels = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            pair = [m.eval()(input_ids=ids).logits[0, :-1, :vocab].double() for m in (student, teacher)]
        wanted = torch.tensor(row["labels"][1:])
        valid = wanted != LABEL_PAD
        logits.append([z[valid] for z in pair])
        labels.append(wanted[valid])
    z, t = (torch.cat(side) for side in zip(*logits, strict=True))
    y = torch.cat(labels)
    _, difficulty, hard = reference_rows(z, t, y, objective)
    return difficulty, hard, z.softmax(-1), t.softmax(-1), y


@pytest.mark.parametrize(
    "objective",
    [fk.SelfEvolution(gamma=4.5), fk.SelfEvolutionTopK(fraction=0.3, lam=0.7), fk.ForwardKD(), fk.SFT()],
    ids=lambda o: o.name,
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_numbers_are_those_of_full_logits(tokenizer, rows, objective, batch_size: int, monkeypatch) -> None:
    student, teacher = model(tokenizer, 16, 1), model(tokenizer, 24, 2)
    monkeypatch.setattr(token_view, "_LOOKUP_BYTES", 4 * len(tokenizer) * 7)  # seven tokens at a time
    views = token_difficulties(student, teacher, rows, tokenizer, objective, batch_size=batch_size)
    difficulty, hard, q, p, y = expected(student, teacher, rows, objective, len(tokenizer))
    if not objective.spec.gated:
        hard = difficulty > 0.4
    else:
        assert 0.1 < hard.double().mean() < 0.9, "the test needs both kinds"
    tokens = [token for view in views for token in view.tokens]
    assert [len(view.tokens) for view in views] == [sum(i != LABEL_PAD for i in row["labels"]) for row in rows]
    torch.testing.assert_close(
        torch.tensor([t.difficulty for t in tokens], dtype=torch.float64), difficulty, rtol=1e-5, atol=1e-5
    )
    assert [t.is_hard for t in tokens] == hard.tolist()
    for name, probs in (("student", q), ("teacher", p)):
        chosen = torch.tensor([t.q_y if name == "student" else t.p_y for t in tokens], dtype=torch.float64)
        torch.testing.assert_close(chosen, probs.gather(1, y[:, None])[:, 0], rtol=1e-4, atol=1e-7)
        best = probs.topk(3)
        for token, values, ids in zip(tokens, best.values.tolist(), best.indices.tolist(), strict=True):
            top = token.student_top if name == "student" else token.teacher_top
            assert [value for _, value in top] == pytest.approx(values, rel=1e-4)
            assert [piece for piece, _ in top] == [token_view._piece(tokenizer, i) for i in ids]
    for view in views:
        assert view.mean_difficulty == pytest.approx(sum(t.difficulty for t in view.tokens) / len(view.tokens))
        assert view.hard_fraction == sum(t.is_hard for t in view.tokens) / len(view.tokens)
        assert view.objective == objective and view.checkpoint == "student"
    assert views[0].title == "en: The dog sleeps.\nde:"


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Phi"])
def test_capped_scaled_and_biased_logits(tokenizer, rows, kind: str) -> None:
    """Teachers with a softcap, a logit scale and a bias, whose heads have rows that are no tokens."""
    student = model(tokenizer, 16, 1)
    teacher = model(tokenizer, 24, 2, vocab=len(tokenizer) + 11, kind=kind)
    objective = fk.SelfEvolution()
    views = token_difficulties(student, teacher, rows, tokenizer, objective, top=2, titles=["a", "b", "c"])
    difficulty, _, _, p, y = expected(student, teacher, rows, objective, len(tokenizer))
    tokens = [token for view in views for token in view.tokens]
    assert [t.difficulty for t in tokens] == pytest.approx(difficulty.tolist(), rel=1e-4)
    assert [t.p_y for t in tokens] == pytest.approx(p.gather(1, y[:, None])[:, 0].tolist(), rel=1e-4)
    assert {len(t.teacher_top) for t in tokens} == {2} and [view.title for view in views] == ["a", "b", "c"]


def test_models_are_left_as_they_were(tokenizer, rows) -> None:
    student, teacher = model(tokenizer, 16, 1).train(), model(tokenizer, 24, 2).eval()
    dropped = student.model.layers[0].mlp.register_forward_hook(lambda m, i, out: out * float(not m.training))
    first = token_difficulties(student, teacher, rows, tokenizer, fk.SelfEvolution())
    assert student.training and not teacher.training and student.lm_head.weight.grad is None
    assert first == token_difficulties(student.eval(), teacher, rows, tokenizer, fk.SelfEvolution())
    dropped.remove()


def test_a_label_without_a_prediction_is_left_out(tokenizer) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    (view,) = token_difficulties(model(tokenizer, 16, 1), model(tokenizer, 16, 2), [row], tokenizer, fk.NoEvo())
    assert len(view.tokens) == 2


def test_characters_of_several_tokens(tokenizer) -> None:
    text = "ä 😀日 x"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = token_view._spans(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(spans) == len(ids) + 1
    assert "".join(span for span, part, _ in spans if part == 1) == text + "</s>"
    smiley = [(part, parts) for span, part, parts in spans if "😀" in span]
    assert smiley == [(i, 4) for i in range(1, 5)] or smiley[0][1] > 1
    pieces = [token_view._piece(tokenizer, i) for i in tokenizer("😀", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == "".join(f"<0x{byte:02X}>" for byte in "😀".encode())
    cut = token_view._spans(tokenizer, ids[: ids.index(tokenizer("😀", add_special_tokens=False)["input_ids"][0]) + 2])
    assert cut[-1][0].endswith("\ufffd") and cut[-1][1:] == (cut[-1][2], cut[-1][2]), "a cut character is shown as such"
    assert token_view._piece(tokenizer, len(tokenizer) + 3) == f"<{len(tokenizer) + 3}>"


def test_metaspace_pieces_keep_their_space() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "▁Der": 1, "▁Hund": 2, "e": 3, "</s>": 4}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.decoder = tokenizers.decoders.Metaspace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert [token_view._piece(made, i) for i in range(1, 4)] == [" Der", " Hund", "e"]
    assert [span for span, _, _ in token_view._spans(made, [1, 2, 3])] == ["Der", " Hund", "e"]


def test_checkpoint_labels() -> None:
    assert checkpoint_labels(["runs/x/checkpoint-10", "runs/x/checkpoint-20"]) == ["checkpoint-10", "checkpoint-20"]
    assert checkpoint_labels(["runs/a/model", "runs/b/c/model"]) == ["a", "b/c"]
    assert checkpoint_labels(["a/b", "a/b/c"]) == ["b", "b/c"]
    assert checkpoint_labels(["runs/x/step-5"]) == ["step-5"]
    with pytest.raises(ValueError, match="student checkpoints must differ, got a, a"):
        checkpoint_labels(["a", "a"])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rows": []}, "rows is empty"),
        ({"titles": ["a"]}, "1 titles for 3 rows"),
        ({"top": 0}, "top=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"rows": [{"input_ids": [5, 6], "labels": [5, -100]}]}, "no token with a label"),
        ({"objective": "self_evolution"}, "objective must be a fused_kd objective, got 'self_evolution'"),
    ],
)
def test_bad_input(tokenizer, rows, change: dict, message: str) -> None:
    made = model(tokenizer, 16, 1)
    given = {"rows": rows, "objective": fk.NoEvo(), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        token_difficulties(made, made, given.pop("rows"), tokenizer, given.pop("objective"), **given)


def view(checkpoint: str, index: int, difficulties: list[float], texts: list[str], gamma: float = 0.4) -> SentenceView:
    tokens = tuple(
        TokenView(text, text, 1, 1, d, d > gamma, 0.25, 0.5, ((text, 0.25),), (("other", 0.75),))
        for d, text in zip(difficulties, texts, strict=True)
    )
    return SentenceView(checkpoint, index, f"<title {index}>", fk.SelfEvolution(gamma=gamma), tokens)


VIEWS = [
    view("early", 0, [3.0, 0.1], ["Hund", " <i>&\"'"]),
    view("early", 1, [0.5], ["\n"]),
    view("late", 0, [1.0, 0.0], ["Hund", " <i>&\"'"]),
    view("late", 1, [0.2], ["\n"]),
]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not [tag for tag in self.open if tag not in ("meta", "br", "th", "td", "tr")], "all tags are closed"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        attrs = self.tags[-1][1]
        if self.open[-1] == "span" and "title" in attrs:
            self.tokens.append((data, attrs["class"], attrs["title"]))
        if self.open[-1] == "td":
            self.cells.append(data)


def test_page() -> None:
    page = render_html(VIEWS, teacher="the <teacher>")
    parsed = Page(page)
    assert [text for text, _, _ in parsed.tokens] == ["Hund", " <i>&\"'", "Hund", " <i>&\"'", "⏎", "⏎"]
    assert [" hard" in name for _, name, _ in parsed.tokens] == [True, False, True, False, True, False]
    _, name, tip = parsed.tokens[0]
    assert name == "t c100 hard" and parsed.tokens[2][1] == f"t c{round(100 * math.sqrt(1 / 3))} hard"
    assert tip.splitlines() == [
        "'Hund': hard", "difficulty 3.000 nats", "q_y 0.25, p_y 0.5", "student: 'Hund' 0.25",
        "teacher: 'other' 0.75",
    ]  # fmt: skip
    assert parsed.cells == ["early", "3", "1.200 nats", "66.7%", "late", "3", "0.400 nats", "33.3%"]
    assert "the &lt;teacher&gt;" in page and "&lt;title 0&gt;" in page and "Γ = 0.4" in page
    assert "<i>&" not in page
    for outside in ("http", "src=", "href", "@import", "url(", "<link"):
        assert outside not in page, "a page needs nothing but itself"
    assert "prefers-color-scheme: dark" in page


def test_scale() -> None:
    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for page, sign, text in (("light", -1, 0.0), ("dark", 1, 1.0)):
        levels = [luminance(token_view_render._colour(step / 50, page)) for step in range(51)]
        assert all(sign * (b - a) > 0 for a, b in pairwise(levels)), "harder is further from easy"
        contrast = [(max(level, text) + 0.05) / (min(level, text) + 0.05) for level in levels]
        assert min(contrast) >= 4.5, "text must stay legible"
    shares = [token_view_render._share(d, 4.0) for d in (-1e-7, 0.0, 1.0, 4.0, 90.0)]
    assert shares == [0, 0, 0.5, 1, 1]
    wide = render_html(VIEWS, scale_max=12.0)
    assert Page(wide).tokens[0][1] == "t c50 hard"


def test_a_ranked_and_an_ungated_objective_say_what_hard_means() -> None:
    ranked = [dataclasses.replace(VIEWS[0], objective=fk.SelfEvolutionTopK(fraction=0.3))]
    assert "the 30% with the largest difficulty" in render_html(ranked)
    plain = [dataclasses.replace(VIEWS[0], objective=fk.ForwardKD())]
    assert "difficulty above Γ = 0.4 (counted so; this objective treats all tokens alike)" in render_html(plain)


def test_terminal_reads_without_colours() -> None:
    for colours in (None, "truecolor"):
        console = Console(file=io.StringIO(), width=90, color_system=colours, force_terminal=colours is not None)
        console.print(render_terminal(VIEWS))
        shown = console.file.getvalue()
        assert ("\x1b[" in shown) == (colours is not None)
        if colours is None:
            assert "[Hund] <i>&\"'" in shown and "[⏎]" in shown and "1. <title 0>" in shown
            assert "1.55 nats, 50% hard" in shown and "difficulty above Γ = 0.4" in shown
            assert shown.index("early") < shown.index("late")
    blank = token_view_render._token_text(dataclasses.replace(VIEWS[0].tokens[0], text=" "), 3.0)
    assert blank.plain == " [␣]"
    with pytest.raises(ValueError, match="views is empty"):
        render_terminal([])
    with pytest.raises(ValueError, match="scale_max=0: expected a positive number"):
        render_html(VIEWS, scale_max=0)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("inspect_tokens", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    sizes = {"teacher": 24, "checkpoint-10": 16, "checkpoint-20": 16}
    for seed, (name, hidden) in enumerate(sizes.items()):
        model(tokenizer, hidden, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps({"en": pair.source, "de": pair.target}) + "\n" for pair in PAIRS]
    (folder / "valid.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    students = [str(folder / f"checkpoint-{step}") for step in (10, 20)]
    fixed = ["--data", str(folder / "valid.jsonl"), "--teacher", str(folder / "teacher"), "--student", *students]
    return [*fixed, "--output", str(folder / "out" / "page.html"), *more]


def test_script(script, folder: Path, tokenizer, rows, capsys) -> None:
    written = script.main(command(folder, "--ids", "3", "1", "--objective", "self_evolution:gamma=2", "--terminal"))
    assert [path.name for path in written.parent.iterdir()] == ["page.html"]
    parsed = Page(written.read_text(encoding="utf-8"))
    counts = {i: sum(label != LABEL_PAD for label in rows[i]["labels"]) for i in range(3)}
    assert len(parsed.tokens) == 2 * (counts[2] + counts[0])
    assert parsed.cells[0::4] == ["checkpoint-10", "checkpoint-20"]
    student = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint-20")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher")
    difficulty, hard, *_ = expected(student, teacher, [rows[2], rows[0]], fk.SelfEvolution(gamma=2.0), len(tokenizer))
    assert parsed.cells[6:] == [f"{difficulty.mean():.3f} nats", f"{hard.double().mean():.1%}"]
    shown = capsys.readouterr().out
    assert "4 sentences of 2 checkpoints" in shown and shown.index("1. Streets") < shown.index("2. The dog sleeps.")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--ids 4", "--ids: valid has 3 pairs, got 4"),
        ("--objective nonsense", "objective must be one of"),
        ("--max-length 9", "max_length=9 leaves no room"),
        ("--split test", "holds the valid split by its name"),
        ("--student ./nowhere", "neither a preset"),
    ],
)
def test_script_refuses(script, folder: Path, arguments: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        script.main(command(folder, *arguments.split()))


def test_script_refuses_counts(script, folder: Path, capsys) -> None:
    for arguments, message in (("--limit 0", "must be at least 1, got 0"), ("--ids 0", "--ids count from 1, got 0")):
        with pytest.raises(SystemExit):
            script.main(command(folder, *arguments.split()))
        assert message in capsys.readouterr().err
