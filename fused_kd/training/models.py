"""Models by preset name, path or hub name, the tokenizer that a student and its teacher share, and LoRA adapters."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fused_kd.training.checkpoints import MANIFEST, seal
from fused_kd.training.loading import TOKENIZERS, has_tokenizer, is_missing, read_adapter_config
from fused_kd.training.loading import load_pretrained as load_pretrained
from fused_kd.training.stage import fingerprint, fingerprint_file, remove_folder, replace_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


# sizes of Llama-style models with tied embeddings; the vocabulary is the tokenizer's
PRESETS: dict[str, dict[str, Any]] = {
    "tiny-teacher": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 352},
    "tiny-student": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176},
    "medium-teacher": {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "small-teacher": {"hidden_size": 224, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 608},
    "small-student": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 352},
    # for a GPU: 50M and 17M parameters with a vocabulary of 16,000; few layers, as each costs launches
    "base-teacher": {"hidden_size": 640, "num_hidden_layers": 8, "num_attention_heads": 10, "intermediate_size": 1728},
    "base-student": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
}
# from a wider start than transformers' 0.02 so narrow a model learns in fewer steps
PRESETS |= {f"demo-{role}": PRESETS[f"tiny-{role}"] | {"initializer_range": 0.05} for role in ("teacher", "student")}


def threads_for(names: Iterable[str]) -> int | None:
    """The CPU threads at which a step of the presets among these models is fastest; None where none is one.

    Barriers between tiny parallel regions cost more than a second core gives.
    """
    return 1 if any(name in PRESETS for name in names) else None


def load_model(
    name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal LM: a preset with random weights, or a model from a folder or the hub.

    Args:
        name_or_path: a name in ``PRESETS``, a folder, a hub name, or a GGUF file (which needs the package ``gguf``).
        tokenizer: gives a preset its vocabulary; a loaded model must have room for it, and the tokenizer
            beside the loaded model must have the same tokens and ids.
        seed: of a preset's weights; the global generator is left as it was.
        dtype: of a loaded model; default ``"auto"``, that of its files. Presets are float32.
        attn_implementation: of a loaded model; None (default) lets transformers choose.

    Raises:
        ValueError: an unknown name, another tokenizer, too small a vocabulary, tensors that are missing or of another
            shape, a model that needs code of its own.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return _from_preset(name, tokenizer, seed)
    same_tokenizer(load_tokenizer(name), tokenizer, name)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model: Any = load_any(name, dtype=dtype, **attention)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(f"{name} has {rows} embeddings, fewer than the {len(tokenizer)} tokens of its tokenizer")
    return cast("PreTrainedModel", model)


def load_any(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """The causal LM of a folder or hub name, whatever its tokenizer; options are those of ``from_pretrained``.

    Raises:
        ValueError: as :func:`load_model`.
    """
    from transformers import AutoModelForCausalLM

    return cast("PreTrainedModel", _pretrained(AutoModelForCausalLM, str(name_or_path), **options))


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub. Raises ``ValueError`` where there is none."""
    from transformers import AutoTokenizer

    if Path(name_or_path).is_dir() and not has_tokenizer(name_or_path):
        raise ValueError(f"{str(name_or_path)!r} has no tokenizer files: none of {', '.join(TOKENIZERS)}")
    tokenizer: PreTrainedTokenizerBase = _pretrained(AutoTokenizer, str(name_or_path))
    return tokenizer


def model_content(name_or_path: str | Path) -> str:
    """What a model's name stands for now: the SHA-256 of a file or a folder's files, or a hub name with its commit.

    Of a folder, the files directly in it count, without hidden ones and ``*.md``.

    Raises:
        ValueError: as :func:`load_model`.
    """
    name, folder = str(name_or_path), Path(name_or_path)
    if name in PRESETS:
        return name
    if folder.is_dir():
        files = (path for path in folder.iterdir() if path.is_file() and path.suffix != ".md" and path.name[0] != ".")
        return "sha256:" + fingerprint({path.name: fingerprint_file(path) for path in files})
    if folder.is_file():
        return "sha256:" + fingerprint_file(folder)
    from transformers import AutoConfig

    return f"{name}@{_pretrained(AutoConfig, name)._commit_hash}"


def on_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """The model, moved to the accelerator where there is one: for evaluation and generation outside a trainer."""
    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return cast("PreTrainedModel", model.to(place))  # type: ignore[arg-type]


def check_device(name: str) -> None:
    """Raise ``ValueError`` unless tensors can be on this device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, name: str = "the model") -> None:
    """Raise ``ValueError`` unless both have the same tokens with the same ids: distillation goes by id."""
    ours, theirs = second.get_vocab(), first.get_vocab()
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if differing:
        shown = ", ".join(repr(token) for token in sorted(differing)[:3])
        raise ValueError(
            f"the tokenizer of {name} differs from the other model's in {len(differing)} tokens ({shown}): "
            "student and teacher must share one tokenizer (for two, KDTrainer takes fused_kd.vocab_map)"
        )


def language_id(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    """The id of a language's token: named by its code (NLLB), or as ``__code__`` (M2M-100).

    Raises:
        ValueError: the tokenizer has no such token.
    """
    for name in (code, f"__{code}__"):
        found = tokenizer.convert_tokens_to_ids(name)
        if found is not None and found != tokenizer.unk_token_id:
            return cast(int, found)
    raise ValueError(f"codes: {code!r} is no language of {type(tokenizer).__name__}")


def shared_tokenizer(
    names: Sequence[str], folder: Path, texts: Iterable[str], vocab_size: int
) -> PreTrainedTokenizerBase:
    """The one tokenizer of all these models.

    That of the loaded models, which must agree; if all are presets, the one saved in ``folder``, trained on
    ``texts`` the first time. Raises ``ValueError`` as :func:`same_tokenizer` and :func:`train_tokenizer`.
    """
    loaded = [name for name in names if name not in PRESETS]
    if loaded:
        tokenizer = load_tokenizer(loaded[0])
        for name in loaded[1:]:
            same_tokenizer(load_tokenizer(name), tokenizer, name)
        return tokenizer
    finished = folder / "finished"
    if not finished.exists():
        train_tokenizer(texts, vocab_size).save_pretrained(folder)
        finished.touch()
    return load_tokenizer(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with ``<pad>``, ``<bos>`` (put in front of every text) and ``<eos>``.

    Args:
        texts: what it shall compress; the same texts in the same order give the same tokenizer.
        vocab_size: at most this many tokens, at least 260 (256 bytes, 3 special tokens, 1 merge).

    Raises:
        ValueError: ``vocab_size`` below 260.
    """
    if vocab_size < 260:
        raise ValueError(f"vocab_size must be at least 260 (256 bytes and special tokens), got {vocab_size}")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # a word has the same tokens at the start of a text as within
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class LoRA:
    """Adapters on the student's body, as of ``peft.LoraConfig``."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


def with_adapters(model: nn.Module, lora: LoRA | None, task_type: str | None = None) -> Any:
    """``model`` with fresh adapters that change nothing yet, if any; a head is left alone: the loss needs it whole.

    ``task_type`` as of ``peft.LoraConfig``: "CAUSAL_LM" for a model with a head, None for a body.

    Raises:
        ImportError: no peft.
    """
    if lora is None:
        return model
    peft, targets = _peft(), lora.target_modules
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task_type,
    )
    return peft.get_peft_model(model, config)


def load_adapters(model: Any, name: str | Path) -> Any:
    """``model`` as a PEFT model with the adapters of a folder or hub name.

    Raises:
        ValueError: no adapters there, or a configuration that :func:`read_adapter_config` refuses; tensors of the
            adapters are missing. ImportError: no peft.
    """
    peft = _peft()
    if read_adapter_config(name) is None:
        raise ValueError(f"{str(name)!r} is no folder and no hub name at hand with an adapter_config.json")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            return peft.PeftModel.from_pretrained(model, str(name))
    except UserWarning as error:
        raise ValueError(f"the adapters of {str(name)!r} must be whole: {str(error)[:500]}") from error


def merged(base: PreTrainedModel, adapters: str | Path) -> PreTrainedModel:
    """The base with the adapters of that folder or hub name added, in place; the sum is made in float32 and kept in
    the base's dtype."""
    dtype = base.dtype
    return cast("PreTrainedModel", load_adapters(base.float(), adapters).merge_and_unload(safe_merge=True).to(dtype))


def merge(base: PreTrainedModel, adapters: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save :func:`merged`, whole or not at all, and sealed."""
    save_whole(merged(base, adapters), tokenizer, folder, sealed=True)


def save_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, sealed: bool = False
) -> None:
    """Save a model and its tokenizer in one folder, whole or not at all; what is there is replaced.

    ``sealed``: with the manifest of :func:`fused_kd.training.checkpoints.seal`.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    remove_folder(partial)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    sentencepiece = Path(str(getattr(tokenizer, "vocab_file", None)))
    if sentencepiece.suffix == ".model" and sentencepiece.is_file() and not (partial / sentencepiece.name).exists():
        shutil.copyfile(sentencepiece, partial / sentencepiece.name)  # llama.cpp's converter reads it
    seal(partial)
    if not sealed:
        (partial / MANIFEST).unlink()
    replace_folder(partial, folder)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need the 'peft' package: install fused_kd[lora]") from error
    return peft


def _from_preset(name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **PRESETS[name],
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _pretrained(loader: Any, name: str, **options: Any) -> Any:
    path = Path(name)
    if is_missing(name):
        raise ValueError(f"{name!r}: no such folder or file")
    try:
        return load_pretrained(loader, name, **options)
    except (OSError, ValueError) as error:
        if path.exists():
            what = f"{name!r} gives no {loader.__name__}"
        elif len(path.parts) > 1 and path.parent.is_dir():
            what = f"{name!r}: no such folder, and not on the hub"
        else:
            presets = ", ".join(PRESETS)
            what = f"{name!r} is neither a preset ({presets}) nor a folder or hub name that gives {loader.__name__}"
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
