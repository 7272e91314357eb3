"""The server of a served teacher: a causal LM's last hidden states and its head over HTTP."""

from __future__ import annotations

import mmap
import tempfile
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from fused_kd import LMHead
from fused_kd.integrations.transformers import check_head_module, check_lm_head, labels_need_shift, lm_head_of
from fused_kd.serving.batching import Batcher, ClientGone, QueueFull, Unsendable
from fused_kd.serving.http_server import Asked, HttpServer, Refused, Reply, as_json
from fused_kd.serving.wire import IDENTITY, PROTOCOL, read_request
from fused_kd.training.fingerprints import fingerprint_teacher, fingerprint_tokenizer
from fused_kd.training.hidden_codes import HIDDEN_DTYPES, name_of
from fused_kd.training.stage import check_counts, fingerprint
from fused_kd.training.stored_head import to_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GRACE_SECONDS = 30.0  # for answers that are being sent when the server ends
_MORE_CONNECTIONS = 64  # than requests may wait


class TeacherServer:
    """Serves a causal LM to :class:`fused_kd.serving.ServedTeacher`; ``python -m fused_kd.serve`` runs one.

    Args:
        model: on the device where it shall run; put into eval mode.
        tokenizer: whose tokens and ids clients are told; its text is not needed.
        name: for people.
        host: the address that is listened at, default "127.0.0.1": this machine alone.
        port: default 0, a free one.
        batch_tokens: tokens of a batch of the model, with padding; rows of several requests run together.
        queue: requests that may wait; further ones are told to come back (503).
        most_tokens: of one request; bounds the memory of a request and of its answer.
        token: what requests must bring as ``Authorization: Bearer``; None: nothing.

    The head is written once to a temporary file (in ``TMPDIR``), which all answers share. At most ``queue + 64``
    connections are open at once.

    Attributes:
        url: where it is. about: what ``GET /about`` says.

    Raises:
        ValueError: a model that is no decoder-only LM with a plain head, a number out of range, an empty token.
        OSError: the address cannot be had, or the head not be written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        batch_tokens: int = 8192,
        queue: int = 64,
        most_tokens: int = 1 << 17,
        token: str | None = None,
    ) -> None:
        check_counts(batch_tokens=batch_tokens, queue=queue, most_tokens=most_tokens)
        if token is not None and not token.strip():
            raise ValueError("token must not be empty: None serves everybody")
        if not labels_need_shift(model):
            raise ValueError(f"model must be a decoder-only language model, got {type(model).__name__}")
        self.model = model.eval()
        check_lm_head(model)
        head = empty_head(model)
        self.about = describe(model, head, tokenizer, name, most_tokens)
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port must be in [0, 65535], got {port}")
        self._head = mapped(to_bytes(head))
        self._http = HttpServer(
            host, port, self._answer, token=token, connections=queue + _MORE_CONNECTIONS,
            largest_body=17 * most_tokens + (1 << 16),  # ids, which of them are wanted, lengths of rows; names
            headers={IDENTITY: self.about["identity"]},
        )  # fmt: skip
        self.batcher = Batcher(model, batch_tokens, queue)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), name="server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept nothing more, finish and answer the requests that are here, and end."""
        self._http.stop()
        self.batcher.close()
        self._http.finish(_GRACE_SECONDS)

    def totals(self) -> str:
        """What has been done, in words."""
        done = self.batcher
        return (
            f"{done.requests} requests ({done.failed} failed), {done.tokens} tokens, {done.states} hidden states in "
            f"{done.batches} batches, {done.seconds:.1f} s of the model"
        )

    def __enter__(self) -> TeacherServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, asked: Asked) -> Reply:
        known = {
            ("GET", "/about"): lambda _: as_json(self.about),
            ("GET", "/head"): lambda _: Reply(HTTPStatus.OK, self._head),
            ("POST", "/states"): self._states,
        }
        if (asked.method, asked.path) not in known:
            raise Refused(HTTPStatus.NOT_FOUND, f"{asked.method} {asked.path[:80]} is unknown here")
        return known[asked.method, asked.path](asked)

    def _states(self, asked: Asked) -> Reply:
        dtype = asked.query.get("dtype", [self.about["dtype"]])[0]
        if dtype not in HIDDEN_DTYPES:
            known = ", ".join(HIDDEN_DTYPES)
            raise Refused(HTTPStatus.BAD_REQUEST, f"dtype must be one of {known}, got {dtype[:80]!r}")
        limits = {name: self.about[name] for name in ("input_size", "longest", "most_tokens")}
        try:
            request = read_request(asked.body, **limits)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        try:
            tensors = self.batcher.add(request, dtype, asked.gone).result()
        except QueueFull as error:
            text = f"{self.batcher.waiting} requests wait already"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, text, retry=True) from error
        except Unsendable as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        except ClientGone:
            raise
        except Exception as error:
            text = f"the model failed: {type(error).__name__}: {error}"
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, text) from error
        return Reply(HTTPStatus.OK, save(tensors))


def mapped(content: bytes) -> mmap.mmap:
    """The content in a file that no folder knows any more: answers share it, and it need not stay in memory."""
    with tempfile.TemporaryFile(prefix="fused_kd-head-") as file:
        file.write(content)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@torch.no_grad()
def empty_head(model: Any) -> LMHead:
    """The model's head without hidden states."""
    module = check_head_module(model, plain=True)
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    width = getattr(module, "in_features", weight.shape[1])
    return lm_head_of(model, torch.empty(0, width, dtype=dtype, device=weight.device))


def describe(model: Any, head: LMHead, tokenizer: Any, name: str, most_tokens: int) -> dict[str, Any]:
    """What ``GET /about`` says, see :data:`fused_kd.serving.wire.ABOUT`."""
    fingerprints = {"tokenizer": fingerprint_tokenizer(tokenizer), **fingerprint_teacher(model)}
    about = {
        "hidden_size": int(head.weight.shape[1]),
        "vocab_size": int(head.weight.shape[0]),
        "input_size": int(model.get_input_embeddings().weight.shape[0]),
        "tokens": 1 + max(tokenizer.get_vocab().values(), default=-1),
        "dtype": name_of(head.weight.dtype),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "fingerprints": fingerprints,
    }
    return {
        "protocol": PROTOCOL,
        "identity": fingerprint(about),
        "model": name or type(model).__name__,
        **about,
        "longest": int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0),
        "most_tokens": most_tokens,
    }
