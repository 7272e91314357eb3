"""examples/cache_teacher.py from text to cache: its rows, its table, going on, refusing, vLLM's output."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

for library in ("transformers", "tokenizers", "rich", "tqdm"):
    pytest.importorskip(library)

from fused_kd.training.cache import writer  # noqa: E402
from fused_kd.training.cache.teacher_cache import CachedRows, target_positions  # noqa: E402
from fused_kd.training.data.noise import misalign  # noqa: E402
from fused_kd.training.data.pairs import Pair, load_pairs  # noqa: E402
from fused_kd.training.data.prompts import tokenize_pairs  # noqa: E402
from fused_kd.training.presets import train_tokenizer  # noqa: E402

from .caching import files, model  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("cache_teacher", ROOT / "examples" / "cache_teacher.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script(script, tmp_path: Path, capsys, monkeypatch) -> None:
    pairs = [Pair(f"A man sees {i} dogs.", f"Ein Mann sieht {i} Hunde.") for i in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"en": pair.source, "de": pair.target}) + "\n" for pair in pairs))
    tokenizer = train_tokenizer([*(text for pair in pairs for text in pair)], 300)
    tokenizer.save_pretrained(tmp_path / "teacher")
    model(0, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    command = (
        f"--data {data} --split all --teacher {tmp_path / 'teacher'} --output {tmp_path / 'cache'} "
        "--direction en-de de-en --limit 12 --kd-size 5 --kd-noise 0.4 --seed 3 --k 8 "
        "--dtype 8bit --shard-rows 4 --device cpu"
    ).split()
    cache = script.main(command)
    shown = capsys.readouterr().out
    assert "en-de: PairDataset(5 rows" in shown and "loss    (" in shown
    assert "bytes/token" in shown and f"{cache.bytes_per_token:.1f}" in shown and f"{cache.mass_mean:.4f}" in shown
    parts = [misalign(load_pairs(str(data), "all", d)[-5:], 0.4, 3) for d in ("en-de", "de-en")]
    expected = [
        row
        for part, direction in zip(parts, ("en-de", "de-en"), strict=True)
        for row in tokenize_pairs(tokenizer, "tiny", part, direction, 256).rows
    ]
    cached = cache.rows(expected)
    assert isinstance(cached, CachedRows) and len(cached) == 10 and cache.dtype == "8bit"
    assert all(len(cached[i]["teacher_indices"]) == len(target_positions(expected[i]["labels"])) for i in range(10))

    before = files(tmp_path / "cache")
    monkeypatch.setattr(writer, "hidden_states", None)  # nothing is left to run
    script.main(command)
    assert files(tmp_path / "cache") == before
    with pytest.raises(ValueError, match="made with other arguments"):
        script.main([*command, "--k", "9"])
    with pytest.raises(SystemExit, match="has random weights"):
        script.main([*command, "--teacher", "tiny-teacher"])
    with pytest.raises(SystemExit, match=r"--kd-size must be in \[1, 12\]"):
        script.main([*command, "--kd-size", "13"])

    path = tmp_path / "vllm.jsonl"
    uniform = {str(i): {"logprob": -math.log(len(tokenizer))} for i in range(len(tokenizer))}
    path.write_text("".join(json.dumps([None] + [uniform] * (len(row["input_ids"]) - 1)) + "\n" for row in expected))
    read = script.main([*command, "--output", str(tmp_path / "read"), "--from-vllm", str(path)])
    assert read.mass_mean == pytest.approx(8 / len(tokenizer), rel=1e-4) and read.about["file"] == "vllm.jsonl"
