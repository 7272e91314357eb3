"""Models in GGUF files become plain ones, which can be cut, trained and saved."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from transformers import AutoModelForCausalLM  # noqa: E402

from fused_kd.training import export, load_student, load_teacher, shrink  # noqa: E402
from fused_kd.training.loading import gguf_of, gguf_read_once  # noqa: E402
from fused_kd.training.models import load_any, load_model, load_tokenizer, model_content, train_tokenizer  # noqa: E402
from fused_kd.training.named import tokenizer_of  # noqa: E402

TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(path: Path, model: Any, tokenizer: Any) -> None:
    """A Llama in a GGUF file: float32, the feed-forward parts in blocks of 8 bits."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config.vocab_size)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([name for name, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in inner["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    for name, value in model.state_dict().items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] == "lm_head":
            continue  # tied
        if parts[0] == "layers":
            theirs = f"blk.{parts[1]}.{TENSORS[parts[2]]}"
        else:
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[0]]
        if theirs.endswith(("attn_q", "attn_k")):  # as llama.cpp orders the halves of its rotations
            value = value.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(value.shape)
        array = value.contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn" in theirs and value.dim() == 2 else None
        array = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{theirs}.weight", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_metadata_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["The old man walks across the street."] * 4, 300)
    tokenizer.add_tokens(["<|endoftext|>"])
    write(tmp_path / "model.gguf", load_model("small-teacher", tokenizer, 0), tokenizer)
    calls: list[str] = []

    def counted(name: str, own: Any, *args: Any) -> Any:
        calls.append(name)
        return own(*args)

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, partial(counted, name, getattr(gguf, name)))
    own = gguf.GGUFReader
    for _ in range(2):  # what was read is not kept: the file may be another one by then
        load_any(tmp_path / "model.gguf")
    assert sorted(calls) == ["GGUFReader"] * 2 + ["get_tensor_name_map"] * 2
    with gguf_read_once():
        load_tokenizer(tmp_path / "model.gguf"), load_any(tmp_path / "model.gguf")
    assert calls.count("GGUFReader") == 3
    assert gguf.GGUFReader is own, "as it was"


@torch.no_grad()
def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[bool] = []
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf").GgufHfQuantizer
    make = quantizer.__init__

    def init(self: Any, config: Any, **options: Any) -> None:
        unpacked.append(config.dequantize)
        make(self, config, **options)

    monkeypatch.setattr(quantizer, "__init__", init)
    tokenizer = train_tokenizer(["The old man walks across the street."] * 4, 300)
    tokenizer.add_tokens(["<|endoftext|>"])  # which transformers gives every such tokenizer
    model = load_model("small-teacher", tokenizer, 0).eval()
    file = tmp_path / "model.gguf"
    write(file, model, tokenizer)
    assert gguf_of(file) == gguf_of(tmp_path) == (str(tmp_path), "model.gguf")
    ids = torch.arange(3, 40)[None]
    loaded = load_any(file)
    want = model(ids).logits
    assert float((loaded(ids).logits - want).norm() / want.norm()) < 0.02
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert load_any(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(file).get_vocab() == tokenizer.get_vocab()
    assert model_content(file).startswith("sha256:")
    assert unpacked and all(unpacked), "blocks are read by kernels from the hub"
    export(file, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert shrink(file, 2).config.num_hidden_layers == 2
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has 2 GGUF files \(model.gguf, other.gguf\): name the one to use"):
        load_any(tmp_path)
    with pytest.raises(ValueError, match=r"other\.gguf"):
        load_any(tmp_path / "other.gguf")
    assert torch.equal(load_any(file)(ids).logits, loaded(ids).logits), "it is named"
    assert load_tokenizer(file).get_vocab() == tokenizer_of(file).get_vocab() == tokenizer.get_vocab()
    assert torch.equal(load_teacher(file)(ids).logits, loaded(ids).logits)
    student = load_student(file)
    assert student.dtype == torch.float32
    student.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_student(tmp_path / "saved")(ids).logits, student(ids).logits)
