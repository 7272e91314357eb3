"""KDLossMixin before transformers' Trainers and TRL's: the loss and the weights of a compute_loss with full logits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.transformers import KDLossMixin, OwnTeacher  # noqa: E402
from fused_kd.reference import reference_kd_loss  # noqa: E402
from fused_kd.training import Collator, with_context  # noqa: E402
from tests.integrations.test_transformers import BART_SIZES, T5_SIZES  # noqa: E402
from tests.training.test_trainer import weights  # noqa: E402
from tests.training.tiny import VOCAB, rows, tiny  # noqa: E402

OBJECTIVE = fk.SelfEvolution(gamma=2.0)
LEARNING_RATE = 0.1


class KDTrainer(KDLossMixin, transformers.Trainer):
    pass


class KDSeq2SeqTrainer(KDLossMixin, transformers.Seq2SeqTrainer):
    pass


class FullLogits:
    """The same training as its users write it: both models' logits, and the oracle's loss."""

    loss_is_scaled_for_ga = True
    teacher: Any
    objective: fk.objectives.Objective

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        logits = model(**inputs).logits
        shift = not model.config.is_encoder_decoder
        return reference_kd_loss(logits, target, labels, self.objective, shift=shift, num_items=num_items_in_batch).loss


class FullTrainer(FullLogits, transformers.Trainer):
    pass


class FullSeq2SeqTrainer(FullLogits, transformers.Seq2SeqTrainer):
    pass


class Tokenizer:
    """As much of one as collators need."""

    padding_side = "right"
    pad_token_id = 0

    def __len__(self) -> int:
        return VOCAB

    def pad(self, features: list[dict], return_tensors: str | None = None, **_: object) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in features)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "decoder_input_ids": 0}
        padded = {
            name: torch.tensor([list(row[name]) + [fill[name]] * (width - len(row[name])) for row in features])
            for name in features[0]
            if name in ("input_ids", "attention_mask")
        }
        if "labels" in features[0]:
            padded["labels"] = torch.tensor(np.array([row["labels"] for row in features]))
        return padded


def arguments(folder: Path, seq2seq: bool = False, kind: Any = None, **options: object) -> Any:
    kind = kind or (transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments)
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 0,
    }
    return kind(**{**defaults, **options})


def causal_rows(count: int, seed: int = 0) -> list[dict]:
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows(count, seed)]


def pairs(count: int, seed: int = 0) -> list[dict]:
    """Sources and targets of other lengths."""
    sources, targets = causal_rows(count, seed), rows(count, seed + 50)
    return [{**row, "labels": target["input_ids"] + [2]} for row, target in zip(sources, targets, strict=True)]


def collator() -> Any:
    return transformers.DataCollatorForSeq2Seq(Tokenizer(), padding=True)


def encoder_decoder(kind: str, width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(**{**T5_SIZES, "d_model": width, "dropout_rate": 0.0})
    else:
        dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        family = transformers.BartConfig if kind == "bart" else transformers.M2M100Config
        layers = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
        config = family(**{**BART_SIZES, "d_model": width, **dropout, **layers})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():  # peaked outputs, so that easy and hard tokens both occur
        model.get_output_embeddings().weight.mul_(20 if kind != "t5" else 2)
        if kind == "bart":
            model.final_logits_bias.normal_()
    return model


CASES = {
    "causal": (lambda width, seed: tiny(width, seed), causal_rows, KDTrainer, FullTrainer),
    "t5": (functools.partial(encoder_decoder, "t5"), pairs, KDSeq2SeqTrainer, FullSeq2SeqTrainer),
    "m2m100": (functools.partial(encoder_decoder, "m2m100"), pairs, KDTrainer, FullTrainer),
}


def oracle(model: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> float:
    """Mean loss of a batch from both models' logits."""
    with torch.no_grad():
        sides = [each.eval()(**batch).logits for each in (model, teacher)]
    shift = not model.config.is_encoder_decoder
    return reference_kd_loss(*sides, batch["labels"], OBJECTIVE, shift=shift).loss.item()


def assert_same_moves(start: dict, ours: dict, theirs: dict) -> None:
    """What the training changed, all weights together: keys' biases have gradients of rounding alone."""
    left, right = (torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in (ours, theirs))
    assert right.norm() > 1e-2
    error = (left - right).norm() / right.norm()
    assert error <= 5e-5, f"relative difference {error:.2e}"


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def quiet(run: Any) -> Any:
    run.remove_callback(transformers.trainer_callback.PrinterCallback)
    return run


def of_full_logits(full: type, student: Any, teacher: Any, args: Any, data: list[dict]) -> Any:
    """The trainer of full logits after its training."""
    run = quiet(full(student, args, train_dataset=data, data_collator=collator()))
    run.teacher, run.objective = teacher, OBJECTIVE
    run.train()
    return run


@pytest.mark.parametrize("case", CASES)
def test_same_as_full_logits_under_accumulation(tmp_path: Path, case: str) -> None:
    """Losses and weights of the training, and an evaluation that is the mean over tokens of unequal batches."""
    build, make_rows, fused, full = CASES[case]
    data, held_out, teacher = make_rows(12), make_rows(5, seed=9), build(24, 2).eval()
    args = arguments(tmp_path, seq2seq="Seq2Seq" in fused.__name__, train_sampling_strategy="sequential")
    start = weights(build(16, 1))
    plain = of_full_logits(full, build(16, 1), teacher, args, data)
    student = build(16, 1)
    given = {"train_dataset": data, "data_collator": collator(), "eval_dataset": held_out}
    run = quiet(fused(student, args, teacher=teacher, objective=OBJECTIVE, **given))
    run.train()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert_same_moves(start, weights(student), weights(plain.model))

    def no_logits(module: object, inputs: object, output: object) -> None:
        assert isinstance(output, dict), "logits were computed"

    for model in (student, teacher):
        model.get_output_embeddings().register_forward_hook(no_logits)
    expected = oracle(plain.model, build(24, 2), collator()(held_out))
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert teacher.get_output_embeddings().weight.grad is None and not teacher.training


def test_evaluation_that_generates(tmp_path: Path) -> None:
    """A Seq2SeqTrainer's metrics on generated tokens, its loss without logits; the decoder starts afresh."""
    data, student, seen = pairs(5), encoder_decoder("bart", 16, 1), []
    with_inputs = transformers.DataCollatorForSeq2Seq(Tokenizer(), model=student)
    args = arguments(tmp_path, True, predict_with_generate=True, generation_max_length=6, generation_num_beams=1)
    run = quiet(
        KDSeq2SeqTrainer(
            student,
            args,
            teacher=encoder_decoder("bart", 24, 2),
            objective="no_evo",
            data_collator=with_inputs,
            compute_metrics=lambda prediction: seen.append(prediction) or {"rows": len(prediction.predictions)},
        )
    )
    assert "decoder_input_ids" in with_inputs(data)
    scores = run.evaluate(data)
    assert scores["eval_rows"] == 5 and scores["eval_loss"] > 0
    labels = with_inputs(data)["labels"].numpy()
    assert (seen[0].label_ids[labels != -100] == labels[labels != -100]).all()
    batch = {key: value for key, value in with_inputs(data).items() if key in ("input_ids", "attention_mask")}
    free = student.generate(**batch, max_length=6, num_beams=1, do_sample=False).numpy()
    assert (seen[0].predictions[:, : free.shape[1]] == free).all()
    unlabelled = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in data]
    assert (run.predict(unlabelled).predictions[:, : free.shape[1]] == free).all()


def test_ranking_spans_the_accumulated_step(tmp_path: Path) -> None:
    trained = []
    for size, steps in ((4, 1), (2, 2)):
        student = tiny(16, 1)
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path, train_sampling_strategy="sequential", max_steps=2, **batches)
        given = {"teacher": tiny(24, 2), "objective": fk.SelfEvolutionTopK(fraction=0.3), "data_collator": collator()}
        start = weights(student)
        quiet(KDTrainer(student, args, train_dataset=causal_rows(12), **given)).train()
        trained.append(weights(student))
    assert_same_moves(start, *trained)


def test_criterion_and_its_options(tmp_path: Path) -> None:
    """A KDLoss brings its options; columns beyond vocab_size take no part, which the tokenizer tells."""
    teacher, data = tiny(24, 2, vocab=72), causal_rows(4)
    student = tiny(16, 1, vocab=64)
    criterion = fk.KDLoss(fk.ForwardKD(lam=0.3), temperature=2.0, vocab_size=VOCAB, backend="torch")
    run = quiet(KDTrainer(student, arguments(tmp_path), teacher=teacher, criterion=criterion, data_collator=collator()))
    batch = collator()(data)
    sides = (model(**batch).logits for model in (student, teacher))
    options = {"temperature": 2.0, "vocab_size": VOCAB, "shift": True}
    expected = reference_kd_loss(*sides, batch["labels"], fk.ForwardKD(lam=0.3), **options).loss.item()
    assert run.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert run.kd_options["backend"] == "torch"
    loss, outputs = run.compute_loss(student, batch, return_outputs=True)
    assert torch.equal(loss, outputs["loss"]) and outputs["difficulty"].shape == batch["labels"].shape
    told = KDTrainer(
        student, arguments(tmp_path), teacher=teacher, objective="forward_kd", processing_class=Tokenizer()
    )
    assert told.vocab_size == VOCAB


def sft_trainer(*given: Any, **options: Any) -> Any:
    trl = pytest.importorskip("trl")

    class KDSFTTrainer(KDLossMixin, trl.SFTTrainer):
        pass

    config = {"kind": trl.SFTConfig, "bf16": False, "gradient_checkpointing": False, **options.pop("config", {})}
    student, teacher, folder = given
    args = arguments(folder, **config)
    return quiet(KDSFTTrainer(student, args, teacher=teacher, objective=OBJECTIVE, **options))


@pytest.mark.parametrize("column", ["teacher_id", "teacher_input_ids"])
def test_sft_trainer_with_what_rows_have_for_their_teachers(tmp_path: Path, column: str) -> None:
    """TRL's collator drops these columns; with the library's they arrive, also after TRL's preparation."""
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    names = {"pad_token": "0", "eos_token": "2", "unk_token": "0"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    data = [{key: row[key] for key in ("input_ids", "labels")} for row in causal_rows(8)]
    teacher: Any = [tiny(24, 2), tiny(24, 3)]
    if column == "teacher_id":
        rows = [{**row, "teacher_id": number % 2} for number, row in enumerate(data)]
    else:
        teacher, given = OwnTeacher(), with_context(data, None, [5, 6, 7])
        rows = [given[number] for number in range(len(given))]
    more = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    with pytest.raises(ValueError, match=f"batch must have {column}"):
        sft_trainer(tiny(16, 1), teacher, tmp_path, **more).train()
    run = sft_trainer(tiny(16, 1), teacher, tmp_path, data_collator=Collator(0), **more)
    start = weights(run.model)
    run.train()
    assert any(not torch.equal(value, start[name]) for name, value in weights(run.model).items())


def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    """TRL's own forward patch and metrics stay out of the way, and its own tokens are counted."""
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    names = {"pad_token": "0", "eos_token": "2", "unk_token": "0"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    data, teacher = causal_rows(12), tiny(24, 2).eval()
    given = datasets.Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in data])
    run = sft_trainer(
        tiny(16, 1),
        teacher,
        tmp_path,
        config={"max_length": None, "train_sampling_strategy": "sequential"},
        train_dataset=given,
        eval_dataset=given.select(range(5)),
        processing_class=tokenizer,
    )
    start = weights(run.model)
    run.train()
    args = arguments(tmp_path, train_sampling_strategy="sequential")
    plain = of_full_logits(FullTrainer, tiny(16, 1), teacher, args, data)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert_same_moves(start, weights(run.model), weights(plain.model))
    expected = oracle(plain.model, teacher, collator()(data[:5]))
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_another_loss_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type must be 'nll', got 'dft': the objective is the loss"):
        sft_trainer(tiny(16, 1), tiny(24, 2), tmp_path, config={"loss_type": "dft"})
    # SFTTrainer turns the router's loss on by itself
    import tests.integrations.test_trl as trl_tests

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=45, num_hidden_layers=1, num_local_experts=2, **sizes)
    pair = [transformers.MixtralForCausalLM(config) for _ in range(2)]
    data = {"train_dataset": trl_tests.dialogues(), "processing_class": trl_tests.tokenizer()}
    assert sft_trainer(*pair, tmp_path, config={"router_aux_loss_coef": 0.25}, **data).router_coefficient == 0.25
    pair = [transformers.MixtralForCausalLM(config) for _ in range(2)]
    assert sft_trainer(*pair, tmp_path, config={"router_aux_loss_coef": 0.0}, **data).router_coefficient is None


def test_a_teacher_in_train_mode_does_not_stay_so(tmp_path: Path) -> None:
    """Its dropout is off in every forward, whatever was called on it or a part of it."""
    student, teacher = tiny(16, 1), tiny(24, 2, attention_dropout=0.5)
    run = quiet(
        KDTrainer(student, arguments(tmp_path), teacher=teacher, objective=OBJECTIVE, eval_dataset=causal_rows(4),
                  data_collator=collator())
    )  # fmt: skip
    expected = run.evaluate()["eval_loss"]
    for part in (teacher, teacher.model.layers[0].self_attn):
        part.train()
        assert run.evaluate()["eval_loss"] == expected
        assert not any(module.training for module in teacher.modules())


def test_bad_arguments(tmp_path: Path) -> None:
    student, teacher = tiny(8, 1), tiny(8, 2)
    bart = encoder_decoder("bart", 16, 1)

    def refuse(error: type[Exception], message: str, model: Any = student, options: Any = None, **kd: Any) -> None:
        given = {"teacher": teacher, **({} if "criterion" in kd else {"objective": "no_evo"}), **kd}
        with pytest.raises(error, match=message):
            KDTrainer(model, arguments(tmp_path, **(options or {})), **given)

    refuse(ValueError, "one of objective and criterion must be given", objective=None)
    refuse(ValueError, "one of objective and criterion", criterion=fk.KDLoss(fk.NoEvo()), objective="no_evo")
    refuse(TypeError, "criterion must be a fused_kd.KDLoss, got 'no_evo'", criterion="no_evo")
    refuse(ValueError, "reduction='mean', got 'sum'", criterion=fk.KDLoss(fk.NoEvo(), reduction="sum"))
    refuse(ValueError, "ignore_index=-100, got 0", criterion=fk.KDLoss(fk.NoEvo(), ignore_index=0))
    refuse(ValueError, "objective must be one of sft, .*got 'evo'", objective="evo")
    refuse(ValueError, "teacher must be given for NoEvo", teacher=None)
    refuse(ValueError, "another model than the student", teacher=student)
    refuse(ValueError, "teacher must be a decoder-only model .*got an encoder-decoder", teacher=bart)
    refuse(ValueError, "teacher must be an encoder-decoder model", model=bart)
    refuse(ValueError, "label_smoothing_factor must be 0, got 0.1", options={"label_smoothing_factor": 0.1})
    refuse(ValueError, "use_liger_kernel must be False", options={"use_liger_kernel": True})
    refuse(ValueError, "compute_metrics must be None", compute_metrics=print)
    refuse(ValueError, "compute_loss_func must be None", compute_loss_func=print)
    refuse(ValueError, "model_init must be None", model=None, model_init=lambda: student)
    routed = tiny(8, 1)
    routed.config.output_router_logits = True
    refuse(ValueError, "output_router_logits must be False", model=routed)
    from fused_kd.training.trainer import KDTrainer as CausalTrainer

    with pytest.raises(ValueError, match=r"causal LM, BartForConditionalGeneration .* put KDLossMixin before"):
        CausalTrainer(bart, bart, "sft")
    run = KDTrainer(student, arguments(tmp_path), teacher=teacher, objective="no_evo")
    with pytest.raises(ValueError, match="batch must have labels, got input_ids"):
        run.compute_loss(student, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
