"""Heads that are no plain parameters: PEFT's adapters and saved copies, quantised weights."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

transformers = pytest.importorskip("transformers")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.transformers import (  # noqa: E402
    check_head_module,
    check_lm_head,
    hidden_states,
    lm_head_of,
    route_head_loss,
    rows_of,
)
from fused_kd.reference import reference_kd_loss  # noqa: E402
from tests.integrations.test_transformers import assert_near, batch, tiny, written_out  # noqa: E402

INPUTS = {key: value for key, value in batch().items() if key != "use_cache"}
LORA = {"r": 4, "lora_alpha": 8}


def adapted(name: str, **options: object) -> torch.nn.Module:
    """A PEFT model, whose B's are not 0 as at their start."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(name), peft.LoraConfig(**LORA, **options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def assert_trains_as_with_logits(model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Loss and gradients of the trained parameters, through the routed forward and without it."""
    teacher, labels, shift = torch.randn(2, 7, 61), inputs["input_ids"], "labels" not in inputs
    if not shift:
        labels, teacher = inputs["labels"], teacher[:, :5]
    objective = fk.Skew()
    expected = reference_kd_loss(model(**inputs).logits, teacher, labels, objective, shift=shift).loss
    truth = gradients(expected, model)
    criterion = fk.KDLoss(objective, shift=shift)
    losses = [criterion(lm_head_of(model, hidden_states(model, **inputs)), teacher, labels)]
    route_head_loss(model)
    losses.append(model(**inputs, head_loss=lambda head: {"loss": criterion(head, teacher, labels)})["loss"])
    for loss in losses:
        assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
        ours = gradients(loss, model)
        assert ours.keys() == truth.keys()
        for key, value in truth.items():
            assert_near(ours[key], value, 2e-5)
    check_lm_head(model)
    return truth


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Without ``use_cache``, which PEFT's models pass themselves."""
    return {key: value for key, value in batch(name).items() if key != "use_cache"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_adapter_on_the_body(name: str) -> None:
    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    task = {"task_type": "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"}
    model = adapted(name, target_modules=targets, **task)
    assert check_head_module(model) is model.get_base_model().lm_head
    trained = assert_trains_as_with_logits(model, inputs_of(name))
    assert trained and all("lora_" in key for key in trained)


@pytest.mark.parametrize("name", ["llama", "phi", "cohere", "bart"])
def test_lora_on_the_head(name: str) -> None:
    """With a bias (Phi), a scale (Cohere), a final bias (BART)."""
    model = adapted(name, target_modules=["lm_head"])
    with pytest.raises(TypeError, match="plain linear map, it also has base_layer"):
        check_head_module(model, plain=True)
    head = lm_head_of(model, torch.zeros(2, 16))
    assert head.weight.shape == (61, 20) and head.hidden.shape == (2, 20)
    trained = assert_trains_as_with_logits(model, inputs_of(name))
    assert sorted(key.split(".")[-3] for key in trained) == ["lora_A", "lora_B"]


def test_lora_on_the_head_in_its_states() -> None:
    model = adapted("llama", target_modules=["lm_head"], lora_dropout=0.5)
    base, hidden = model.get_base_model(), hidden_states(model, **INPUTS)
    plain = hidden @ base.lm_head.base_layer.weight.T
    on = base.lm_head(hidden)
    assert (on - plain).norm() > 0.01 * plain.norm()
    model.train()
    torch.manual_seed(3)
    expected = base.lm_head(hidden)
    torch.manual_seed(3)
    assert_near(written_out(lm_head_of(model, hidden)), expected, 1e-5)
    assert (expected - on).norm() > 1e-3 * on.norm(), "dropout must show"
    model.eval()
    with model.disable_adapter():
        assert_near(written_out(lm_head_of(model, hidden)), plain, 1e-6)
        model.get_base_model().lm_head.merge()
        with pytest.raises(ValueError, match="merged and disabled"):
            lm_head_of(model, hidden)
    assert lm_head_of(model, hidden).weight is base.lm_head.weight
    assert_near(written_out(lm_head_of(model, hidden)), on, 1e-5)


def test_lora_on_the_head_keeps_its_digits_in_half_precision() -> None:
    """A small adapter beside half-precision weights, where merged weights would lose half of it."""
    model = adapted("llama", target_modules=["lm_head"]).to(torch.bfloat16)
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.mul_(1e-4)
    hidden = hidden_states(model, **INPUTS).detach()
    part = (hidden.double() @ head.lora_A["default"].weight.double().T) @ head.lora_B["default"].weight.double().T * 2
    made = lm_head_of(model, hidden)
    assert_near(made.hidden[..., 16:].double() @ made.weight[:, 16:].double().T, part, 1e-2)
    merged = (head.base_layer.weight + head.get_delta_weight("default")) - head.base_layer.weight
    assert (hidden.double() @ merged.double().T - part).norm() > 0.1 * part.norm()


def test_saved_copy_of_the_head() -> None:
    model = adapted("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    copy = wrapper.modules_to_save["default"]
    assert lm_head_of(model, torch.zeros(1, 16)).weight is copy.weight
    trained = assert_trains_as_with_logits(model, INPUTS)
    assert any("modules_to_save" in key for key in trained)
    with model.disable_adapter():
        assert lm_head_of(model, torch.zeros(1, 16)).weight is wrapper.original_module.weight
    with pytest.raises(TypeError, match=r"plain linear map, it also has modules_to_save"):
        check_head_module(model, plain=True)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_on_the_head_are_refused(options: dict) -> None:
    name = "phi" if "lora_bias" in options else "llama"
    model = adapted(name, target_modules=["lm_head"], **options)
    with pytest.raises(TypeError, match=r"adapter 'default' on the head of .* must be plain LoRA"):
        lm_head_of(model, torch.zeros(1, 16))


class Packed(torch.Tensor):
    """A stand-in for torchao's tensors: int8 and scales that call themselves float32."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self.values, self.scales = values, scales

    def dequantize(self) -> torch.Tensor:
        return self.values.float() * self.scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scales"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict, context: None, size: object, stride: object) -> torch.Tensor:
        return Packed(parts["values"], parts["scales"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scales)
        args, kwargs = tree_map(lambda x: x.dequantize() if isinstance(x, Packed) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def test_tensors_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's are dequantised; of an unknown package such a tensor is refused: its dtype says nothing."""
    model = tiny("llama")
    values = torch.randint(-127, 128, (61, 16), dtype=torch.int8)
    model.lm_head.weight = torch.nn.Parameter(Packed(values, torch.rand(61, 1) / 50), requires_grad=False)
    with pytest.raises(TypeError, match=r"must have a float weight .* got Packed of torch.float32"):
        lm_head_of(model, torch.zeros(1, 16))
    monkeypatch.setattr(Packed, "__module__", "torchao.fake")
    head = lm_head_of(model, hidden_states(model, **INPUTS))
    assert type(head.weight) is torch.Tensor
    assert_near(written_out(head), model(**INPUTS).logits, 1e-5)
    check_lm_head(model)
    half = lm_head_of(model, torch.zeros(1, 16, dtype=torch.bfloat16))
    assert half.weight.dtype == torch.bfloat16, "in the hidden states' dtype"


def test_bitsandbytes_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of its functions is asked for which weight, and what packing hides; not its arithmetic."""
    dense = torch.randn(61, 16)

    class Params4bit(torch.nn.Parameter):
        pass

    class Int8Params(torch.nn.Parameter):
        pass

    for kind in (Params4bit, Int8Params):
        kind.__module__ = "bitsandbytes.nn.modules"
    scales = torch.rand(61)
    asked = []

    def four(data: torch.Tensor, state: object) -> torch.Tensor:
        asked.append(state.shape)
        return dense.half()

    def eight(data: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        assert given is scales
        asked.append(data.dtype)
        return dense

    model = tiny("llama")
    packed = Params4bit(torch.zeros(488, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=(61, 16))
    model.lm_head.weight = packed
    assert rows_of(packed) == 61 and check_head_module(model) is model.lm_head
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="needs bitsandbytes"):
        lm_head_of(model, torch.zeros(1, 16))
    fake = ModuleType("bitsandbytes")
    fake.functional = SimpleNamespace(dequantize_4bit=four, int8_vectorwise_dequant=eight)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    assert torch.equal(lm_head_of(model, torch.zeros(1, 16)).weight, dense.half().float())
    model.lm_head.weight = Int8Params(torch.zeros(61, 16, dtype=torch.int8), requires_grad=False)
    model.lm_head.weight.SCB = scales
    assert torch.equal(lm_head_of(model, torch.zeros(1, 16)).weight, dense)
    model.lm_head.weight.SCB, model.lm_head.state = None, SimpleNamespace(SCB=scales)  # as after its first call
    assert torch.equal(lm_head_of(model, torch.zeros(1, 16)).weight, dense)
    assert asked == [(61, 16), torch.int8, torch.int8]


def test_bitsandbytes_itself() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for kind, options, tolerance in (
        (bitsandbytes.nn.Linear4bit, {"quant_type": "nf4", "compute_dtype": torch.float32}, 1e-5),
        (bitsandbytes.nn.Linear8bitLt, {"has_fp16_weights": False}, 5e-2),
    ):
        model = tiny("llama")
        dense = model.lm_head.weight.detach().clone()
        model.lm_head = kind(16, 61, bias=False, **options)
        model.lm_head.load_state_dict({"weight": dense})
        model.lm_head.to("cpu")
        try:
            expected = model(**INPUTS).logits
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"{kind.__name__} does not run here: {error}")
        assert not model.lm_head.weight.is_floating_point() and rows_of(model.lm_head.weight) == 61
        head = lm_head_of(model, hidden_states(model, **INPUTS))
        assert 0 < (head.weight - dense).norm() < 0.2 * dense.norm()
        assert_near(written_out(head), expected, tolerance)
        check_lm_head(model)


def test_torchao_itself() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    dense = model.lm_head.weight.detach().clone()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    head = lm_head_of(model, hidden_states(model, **INPUTS))
    assert type(head.weight) is torch.Tensor and 0 < (head.weight - dense).norm() < 0.02 * dense.norm()
    assert_near(written_out(head), model(**INPUTS).logits, 1e-5)
    check_lm_head(model)
