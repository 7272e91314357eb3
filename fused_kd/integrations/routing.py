"""The loss inside a model's own forward, and the proof that its head is what its logits come from.

One call of :func:`loss_of_heads`, where the loss is made all weights are gathered::

    teacher(**inputs, head_loss=...)    the teacher's forward: its body, then its head module's call, where
        student(head_t)                 its head is whole; no gradient up to here
            model(**inputs, head_loss=...)  the student's forward: its body, then its head module's call, where
                loss(head_s, head_t)    both heads are whole: the loss, and with it the gradients
        {}                              all that the teacher's forward returns
    {"loss": ...}                       what the student's forward returned: the backward begins there

Of several teachers, one lies inside the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch

from fused_kd import KDOutput, LMHead
from fused_kd.integrations.bodies import body_outputs, eval_mode, hidden_states, labels_need_shift, without_adapters
from fused_kd.integrations.heads import check_head_module, lm_head_of, logit_options, with_final_bias
from fused_kd.integrations.router import router_loss
from fused_kd.integrations.weights import is_quantised, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    _HeadLoss = Callable[[LMHead], dict[str, torch.Tensor]]
    # calls what it is given where the teachers' heads are whole, with what makes the teacher of a loss
    Within = Callable[[Callable[[Callable[[], Any]], None]], None]


def route_head_loss(model: PreTrainedModel) -> None:
    """Make ``model(**inputs, head_loss=f)`` return ``f(head)`` instead of logits; other calls stay as they are.

    ``head`` is the model's :class:`fused_kd.LMHead` on its last hidden states, ``f`` returns a dict of tensors.
    ``inputs`` are those of :func:`hidden_states`: an encoder-decoder may be given ``labels``.
    Everything runs inside the model's own call and ``f`` inside the call of its head module, so the hooks of
    DDP, FSDP2 and ZeRO-3 fire as for logits: they gather the head's weight (a tied one too) before ``f`` and see
    its gradient. Call this before a wrapper is put around the model; calling it again changes nothing. An adapter
    model is routed at its base. The signature of ``forward`` is kept.
    """
    base = without_adapters(model)
    if getattr(base.forward, "_routes_head_loss", False):
        return
    # unbound, so that a deep copy of the model calls itself and not the original
    plain: Any = getattr(base.forward, "__func__", None)
    original = plain if plain is not None else (lambda self, *args, _forward=base.forward, **kw: _forward(*args, **kw))

    @functools.wraps(original)
    def forward(
        self: Any, *args: Any, head_loss: _HeadLoss | None = None, with_router_loss: bool = False, **kwargs: Any
    ) -> Any:
        if head_loss is None:
            return original(self, *args, **kwargs)
        # adapter models name every argument, most of them None, and not every body knows them all
        given = {key: value for key, value in kwargs.items() if value is not None}
        if with_router_loss:
            given["output_router_logits"] = True
        outputs = body_outputs(self, *args, **given)
        head = check_head_module(self)
        with _forward_of(head, lambda hidden: head_loss(lm_head_of(self, hidden))):
            found = head(outputs.last_hidden_state)
        if with_router_loss:
            found = {**found, "router_loss": router_loss(self, outputs, given.get("attention_mask"))}
        return found

    # a compiler takes the body alone: it cannot follow a module whose forward is exchanged
    routed: Any = cast(Any, torch.compiler).disable(forward, recursive=False)
    routed._routes_head_loss = True
    base.forward = MethodType(routed, base)


def loss_of_heads(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    loss: Callable[[LMHead, Any], KDOutput],
    *,
    ranks: int = 1,
    within: Within | None = None,
    router_share: float | None = None,
) -> tuple[torch.Tensor, KDOutput]:
    """``ranks`` times the loss of a routed student, for the backward; and ``loss``'s own result.

    With ``router_share`` that much of the router's loss is added to what the backward begins at; its value is the
    result's ``statistics["router_loss"]``.

    The loss is made inside the student's head module's call, and that inside those of the teachers: there all heads are
    whole, whatever shards them. ``within`` is :meth:`fused_kd.integrations.forms.Teaching.within` of a step; without it
    ``loss`` is given None for a teacher.
    """
    out: list[KDOutput] = []
    returned: list[dict[str, torch.Tensor]] = []
    gradients = torch.is_grad_enabled()

    def student(target: Callable[[], Any]) -> None:
        def routed(head: LMHead) -> dict[str, torch.Tensor]:
            out.append(loss(head, target()))
            return {"loss": out[0].loss * ranks}

        with torch.set_grad_enabled(gradients):
            asked = {} if router_share is None else {"with_router_loss": True}
            returned.append(model(**inputs, **asked, head_loss=routed))

    if within is None:
        student(lambda: None)
    else:
        within(student)
    made = returned[0]["loss"]
    if made.dtype != torch.float32:
        # FSDP2 rounds what leaves the model: keep the value, and the gradient's path
        made = made.float() + (out[0].loss.detach() * ranks - made.detach().float())
    if router_share is None:
        return made, out[0]
    router = returned[0]["router_loss"].float()
    told = {**out[0].statistics, "router_loss": router.detach()}
    return made + router_share * router.to(made.device), out[0]._replace(statistics=told)


def routed_states(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A routed model's last hidden states by its own call, as its hooks want it where its weights are sharded."""
    states: list[torch.Tensor] = []

    def keep(head: LMHead) -> dict[str, torch.Tensor]:
        states.append(head.hidden)
        return {}

    model(**inputs, head_loss=keep)
    return states[0]


@torch.no_grad()
def check_lm_head(model: Any) -> None:
    """Run 8 tokens both ways and raise ``ValueError`` if the head differs from the model's logits.

    This finds what no list of config fields can: a model that scales, caps or transforms its logits under
    another name. Large logits are put in place of the head's output as well, as the small ones of an untrained model
    would hide a cap. The comparison is relative to the logits' norm: 1e-3 for fp32 and fp64 models, 5e-2 for half
    precision and quantised heads. A model that :func:`route_head_loss` has prepared may be sharded (then all ranks
    must call this).
    """
    base = without_adapters(getattr(model, "module", model))
    name = type(base).__name__
    embeddings = base.get_input_embeddings().weight
    ids = torch.arange(1, 9, device=embeddings.device).remainder(rows_of(embeddings)).unsqueeze(0)
    inputs = {"input_ids": ids} if labels_need_shift(base) else {"input_ids": ids, "decoder_input_ids": ids}
    head = check_head_module(base)
    exact = not is_quantised(getattr(head, "base_layer", head).weight)
    scale, softcap = logit_options(base.config)
    large: list[torch.Tensor] = []

    def written_out(head: LMHead) -> dict[str, torch.Tensor]:
        nonlocal exact
        logits = head.hidden @ head.weight.T
        exact = exact and logits.dtype in (torch.float32, torch.float64)
        logits = logits.float()
        if head.bias is not None:
            logits = logits + head.bias.float()
        return {"logits": _finished(logits, head.logit_scale, head.softcap)}

    def exchanged(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn(*hidden.shape[:-1], rows_of(head.weight), generator=generator) * (_LARGE / scale)
        large.append(raw.to(hidden))
        return large[0]

    with eval_mode(model):
        expected = model(**inputs, use_cache=False).logits.float()
        if getattr(base.forward, "_routes_head_loss", False):
            logits = model(**inputs, head_loss=written_out)["logits"].float()
        else:
            logits = written_out(lm_head_of(base, hidden_states(base, **inputs)))["logits"]
        with _forward_of(head, exchanged):
            far = model(**inputs, use_cache=False).logits.float()
    if logits.shape != expected.shape:
        raise ValueError(f"{name} gives logits of shape {tuple(expected.shape)}, its head {tuple(logits.shape)}")
    zero = torch.zeros((), dtype=torch.float32, device=far.device)
    raw = large[0].float() + cast(torch.Tensor, with_final_bias(base, zero))
    # the first comparison knows the scale; here it may be in the hidden states already
    scaled_or_not = (relative_difference(_finished(raw, each, softcap), far) for each in (scale, 1.0))
    error = max(relative_difference(logits, expected), min(scaled_or_not))
    if not error <= (1e-3 if exact else 5e-2):
        raise ValueError(
            f"{name} does more to its logits than weight, bias, scale {scale:g} "
            f"and softcap {softcap}: the head differs from model(...).logits by {error:.1%}. Pass "
            "fused_kd.LMHead yourself, with the scale that this model uses."
        )


# Standard deviation of the logits that show a cap: one of 1000 changes them by 0.5 %.
_LARGE = 100.0


def _finished(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of ``expected``."""
    return float((found - expected).float().norm() / expected.float().norm().clamp_min(1e-12))


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module's call runs ``forward`` between its hooks."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
