"""A student made of its teacher's layers: the same numbers as the teacher with its other layers left out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from fused_kd import shrink as command  # noqa: E402
from fused_kd.training import shrink  # noqa: E402
from fused_kd.training.models import load_model, train_tokenizer  # noqa: E402
from fused_kd.training.script import run_script  # noqa: E402
from fused_kd.training.shrinking import plan_cut, spread, stack_of  # noqa: E402

LAYERS = 6
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "gpt2": {},
    "gpt_neox": {},
    "falcon": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere2": {"head_dim": 8, "sliding_window": 4},
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {**MOE, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MOE, "head_dim": 8, "mlp_only_layers": [1, 5]},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4},
}


def make(family: str = "llama", **options: Any) -> Any:
    """A random model in eager attention, whose tensors are all unlike each other."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **options})
    except ValueError:
        pytest.skip(f"no {family} in this transformers")
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ids(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


class Left(nn.Module):
    """What a layer that is left out does."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, None, None) if self.returns_tuple else hidden


@contextmanager
def without(model: Any, kept: Sequence[int]) -> Iterator[None]:
    """Within, the model's other layers give back what they are given."""
    stack = stack_of(model)[1]
    old, seen = list(stack), []
    handle = old[0].register_forward_hook(lambda module, args, output: seen.append(isinstance(output, tuple)))
    model(ids(), use_cache=False)
    handle.remove()
    for index in set(range(len(old))) - set(kept):
        stack[index] = Left(seen[0])
    yield
    for index, layer in enumerate(old):
        stack[index] = layer


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_without_its_other_layers(family: str, tmp_path: Path) -> None:
    teacher, kept, x = make(family), [0, 2, 5], ids()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = shrink(teacher, kept)
    got = student(x).logits
    with without(teacher, kept):
        want = teacher(x, use_cache=False).logits
    assert torch.equal(got, want)
    assert float((got - teacher(x).logits).norm() / got.norm()) > 0.1, "the layers left out must matter"

    plain, cached = (student.generate(x, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (False, True))
    assert torch.equal(plain, cached)

    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) == tied
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (student, teacher))
    assert not ours & theirs
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(again(x).logits, got)
    assert again.config.num_hidden_layers == 3


def test_it_is_trained_as_any_model(tmp_path: Path) -> None:
    teacher = make().requires_grad_(False).to(torch.bfloat16)
    student = shrink(teacher, 2).train()
    assert student.dtype == torch.bfloat16
    student(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in student.parameters())


@pytest.mark.parametrize(
    ("keep", "count", "kept"),
    [
        ("even", 1, [0]),
        ("even", 2, [0, 5]),
        ("even", 4, [0, 2, 3, 5]),
        ("even", 6, [0, 1, 2, 3, 4, 5]),
        ("first_last", 1, [0]),
        ("first_last", 3, [0, 1, 5]),
        ("first_last", 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_layers(keep: Any, count: int, kept: list[int]) -> None:
    assert list(plan_cut(make(), count, keep=keep).layers) == kept
    assert all(len(set(spread(30, n))) == n for n in range(1, 31))


def test_importance_is_one_minus_the_cosine_of_states() -> None:
    model, x = make(), ids(3, 10)
    with torch.no_grad():
        for index, scale in ((1, 1e-3), (4, 1e-2)):  # layers that change next to nothing
            for name, parameter in stack_of(model)[1][index].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter *= scale
        states = model.double()(x, output_hidden_states=True).hidden_states
        last: list[torch.Tensor] = []
        handle = stack_of(model)[1][-1].register_forward_hook(lambda module, args, output: last.append(output))
        model(x)
        handle.remove()
    states = [*states[:-1], last[0]]  # the model gives the last ones normed
    cosine = torch.nn.functional.cosine_similarity
    want = [1 - float(cosine(before, after, dim=-1).mean()) for before, after in pairwise(states)]
    model.float()
    plan = plan_cut(model, 4, keep="importance", text=[{"input_ids": row.tolist()} for row in x])
    assert plan.influence == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert list(plan.layers) == [0, 2, 3, 5]
    batch = {
        "input_ids": torch.nn.functional.pad(x, (0, 4)),
        "attention_mask": torch.nn.functional.pad(x * 0 + 1, (0, 4)),
    }
    assert plan_cut(model, 4, keep="importance", text=[batch]) == plan, "padding must not count"
    assert plan_cut(model, 4, keep="importance", text=[batch], tokens=30) == plan
    assert plan_cut(model, 4, keep="importance", text=[batch], tokens=11).influence != plan.influence


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo2", "mixtral"])
def test_channels_that_do_nothing_can_go(family: str) -> None:
    """Without the channels that are zero everywhere the model computes the same."""
    width, x = 24, ids()
    alive = sorted(torch.randperm(32, generator=torch.Generator().manual_seed(2))[:width].tolist())
    mask = torch.zeros(32).index_fill(0, torch.tensor(alive), 1)
    teacher = make(family, rms_norm_eps=1e-12)  # what is added in the root does not grow with the width
    for name, parameter in teacher.named_parameters():
        if "embed_tokens" in name:
            parameter *= mask
        elif name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter *= mask[:, None]
    student = shrink(teacher, width=width, text=[{"input_ids": row.tolist()} for row in x])
    assert student.config.hidden_size == width and student.config.num_hidden_layers == LAYERS
    assert student.get_input_embeddings().weight.shape == (VOCAB, width)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, alive])
    want, got = teacher(x).logits, student(x).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


@torch.no_grad()
def test_inner_channels_that_do_nothing_can_go() -> None:
    teacher, x = make(), ids()
    for index, layer in enumerate(stack_of(teacher)[1]):
        layer.mlp.up_proj.weight[index::2] = 0  # others in each layer
        layer.mlp.up_proj.weight[: index + 1] = 0
    text = [{"input_ids": row.tolist()} for row in x]
    student = shrink(teacher, intermediate=30, text=text)
    assert student.config.intermediate_size == 30
    assert student.model.layers[0].mlp.down_proj.weight.shape == (32, 30)
    want, got = teacher(x).logits, student(x).logits
    assert float((got - want).norm() / want.norm()) < 1e-5
    both = shrink(teacher, [0, 3], width=24, intermediate=30, text=text)
    assert both.model.layers[1].mlp.up_proj.weight.shape == (30, 24)
    both.generate(x, max_new_tokens=4)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "many": ("llama", {}, {"layers": 7}, r"layers must be an int in \[1, 6\], the teacher's, got 7"),
    "none": ("llama", {}, {"layers": 0}, r"layers must be an int in \[1, 6\]"),
    "bool": ("llama", {}, {"layers": True}, r"layers must be an int in \[1, 6\]"),
    "index": ("llama", {}, {"layers": [0, 6]}, r"layers must be ascending indices in \[0, 5\], got \[0, 6\]"),
    "order": ("llama", {}, {"layers": [2, 1]}, "ascending indices"),
    "twice": ("llama", {}, {"layers": [1, 1]}, "ascending indices"),
    "empty": ("llama", {}, {"layers": []}, "ascending indices"),
    "words": ("llama", {}, {"layers": ["a"]}, "layers must be a number or a list of indices"),
    "nothing": ("llama", {}, {}, "one of layers, width and intermediate must be given"),
    "keep": ("llama", {}, {"layers": 2, "keep": "odd"}, "keep must be one of 'first_last', 'even', 'importance'"),
    "text": ("llama", {}, {"layers": 2, "keep": "importance"}, "text must be given: keep='importance'"),
    "text of width": ("llama", {}, {"width": 16}, "text must be given: width"),
    "no file": ("llama", {}, {"width": 16, "text": "nothing.txt"}, "text='nothing.txt' must be a text file"),
    "no reader": ("llama", {}, {"width": 16, "text": "chat.jsonl"}, "tokenizer must be given to measure on a data"),
    "no tokenizer": ("llama", {}, {"width": 16, "text": ["a"]}, "tokenizer must be given"),
    "no tokens": ("llama", {}, {"width": 16, "text": []}, "text must have tokens"),
    "tokens": ("llama", {}, {"width": 16, "text": [{"input_ids": [1]}], "tokens": 0}, "tokens must be an int"),
    "vocabulary": ("llama", {}, {"width": 16, "text": [{"input_ids": [VOCAB]}]}, "has the token 61, .* ends at 60"),
    "width": ("llama", {}, {"width": 33, "text": ["a"]}, r"width must be an int in \[1, 32\]"),
    "intermediate": ("llama", {}, {"intermediate": 49, "text": ["a"]}, r"intermediate must be an int in \[1, 48\]"),
    "heads": ("gpt2", {}, {"width": 24, "text": [{"input_ids": [1]}]}, "head_dim would be 6, not 8"),
    "scaled": ("gemma2", {}, {"width": 24, "text": [{"input_ids": [1]}]}, "gemma2 scales its embeddings"),
    "fused": ("phi3", {}, {"intermediate": 24, "text": [{"input_ids": [1]}]}, "gate_up_proj.out_features would be"),
    "experts": ("mixtral", {}, {"intermediate": 24, "text": [{"input_ids": [1]}]}, "must have one down_proj"),
    "multiple": ("llama", {}, {"width": 21, "text": ["a"]}, "size .21. is not a multiple of the number of attention"),
    "same sizes": (
        "llama", {"intermediate_size": 32}, {"width": 24, "intermediate": 24, "text": [{"input_ids": [1]}]},
        "cannot both be cut where both are 32",
    ),
    "scaled attention": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"layers": 2}, "attention is scaled by the layer's number",
    ),
    "numbered": ("diffllama", {}, {"layers": [0, 2]}, "layer 2 cannot stand at place 1 .*lambda_init would be"),
    "depth": ("xlstm", {"num_heads": 4}, {"layers": 2}, "not that of num_hidden_layers alone: 2 of 6 layers would be"),
    "no attention": (
        "lfm2", {"full_attn_idxs": [2, 4]}, {"layers": [0, 1, 3]},
        r"have an attention layer of this Lfm2Config, one of \[2, 4\]:",
    ),
    "no attention of Qwen": (
        "qwen3_next", {**MOE, "head_dim": 8}, {"layers": [0, 1]},
        r"attention layer of this Qwen3NextConfig, one of \[3\]:",
    ),
    "encoder": ("t5", {}, {"layers": 2}, "encoder-decoders are not taken"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said(case: str) -> None:
    family, options, arguments, message = REFUSED[case]
    if family == "t5":
        teacher: Any = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=4, num_heads=2)
        )
    else:
        teacher = make(family, **options)
    with pytest.raises(ValueError, match=message):
        shrink(teacher, **arguments)


def test_models_that_are_not_plain() -> None:
    with pytest.raises(TypeError, match="teacher must be a Hugging Face model, or its folder or name, got Linear"):
        shrink(nn.Linear(2, 2), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        shrink(make().model, 2)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(make().config)
    with pytest.raises(ValueError, match="is offloaded"):
        shrink(empty, 2)
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="teacher has adapters: merge them first"):
        shrink(peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["q_proj"])), 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["The old man walks across the street."] * 4, 300)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    model = load_model("small-teacher", tokenizer, 0)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("The old man walks across the street. " * 20)
    return tmp_path / "teacher"


@torch.no_grad()
@pytest.mark.parametrize("options", [[], ["--keep", "importance"], ["--keep", "even"]])
def test_the_command(folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out, text = folder.with_name("student"), folder.with_name("text.txt")
    if "importance" in options:
        options = [*options, "--text", str(text), "--tokens", "64"]
    command.main([str(folder), "--layers", "2", *options, "--output", str(out)])
    told = capsys.readouterr().out
    assert re.search(r"num_hidden_layers.*4.*2", told) and "layers kept: " in told and "parameters" in told
    assert ("block influence: 0:" in told) == ("importance" in options)
    kept = [int(i) for i in told.split("layers kept: ")[1].splitlines()[0].split()]
    names = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    assert {path.name for path in out.iterdir()} == {*names, "tokenizer.json", "tokenizer_config.json"}
    student = AutoModelForCausalLM.from_pretrained(out)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    assert student.generation_config.max_new_tokens == 7
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    with without(teacher, kept):
        want = teacher(ids(), use_cache=False).logits
    assert torch.allclose(student(ids()).logits, want, rtol=1e-5, atol=1e-5)
    command.main([str(folder), "--layers", "0,3", "--dtype", "bf16", "--output", str(out)])  # replaces the older one
    student = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert student.dtype == torch.bfloat16 and not list(folder.parent.glob("*.partial"))


MISTAKES = {
    "number": ("--layers 9 --output out", r"layers must be an int in \[1, 4\], the teacher's, got 9"),
    "words": ("--layers many --output out", "argument --layers: expected a number, or indices such as 0,2,4"),
    "no output": ("--layers 2", "the following arguments are required: --output"),
    "itself": ("--layers 2 --output teacher", "output='teacher' holds the model that is read"),
    "mine": ("--layers 2 --output mine", "output='mine' exists and is no model folder"),
    "text": ("--layers 2 --keep importance --output out", "text must be given: keep='importance' is measured on it"),
    "file": ("--layers 2 --keep importance --text no.txt --output out", "text='no.txt' must be a text file"),
    "rows": ("--layers 2 --keep importance --text no.jsonl --output out", "no.jsonl"),
    "device": ("--layers 2 --device tpu --output out", "device='tpu' cannot be used here"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = MISTAKES[case]
    monkeypatch.chdir(folder.parent)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["shrink.py", "teacher", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        run_script(command.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("shrink.py: error: ") and re.search(message, error), error
    assert not Path("out").exists() and Path("mine/notes.txt").exists()


def test_a_teacher_by_name(folder: Path) -> None:
    text = str(folder.with_name("text.txt"))
    assert shrink(folder, 2, keep="importance", text=text, tokens=64).config.num_hidden_layers == 2
    assert shrink(str(folder), 2, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="keep must be one of"):
        shrink("no-such-folder", 2, keep="odd")  # type: ignore[arg-type]


def test_importance_on_chats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "The old man"}, {"role": "assistant", "content": "walks across the street."}]
    chats = folder.with_name("chat.jsonl")
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    options = ["--layers", "2", "--keep", "importance", "--text", str(chats), "--output", str(folder.with_name("out"))]
    command.main([str(folder), *options])
    assert "block influence: 0:" in capsys.readouterr().out
