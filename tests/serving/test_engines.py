"""Stand-ins that speak SGLang's and vLLM's documented formats; and heads read from files."""

from __future__ import annotations

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fused_kd.serving import SGLangTeacher, VLLMTeacher
from fused_kd.serving.head_files import head_of_files
from tests.training.tiny import VOCAB

from .serving import CPU, apart, batch_of, local, saved, teacher, tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Engine:
    """Both engines' formats over one model; the attributes are what may go wrong with a deployment."""

    def __init__(self, model: Any) -> None:
        self.model, self.name = model, "some/teacher"
        self.cached, self.chunk, self.before_norm, self.normalised, self.whole = 0, None, False, False, True
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []

    @torch.no_grad()
    def states(self, ids: list[int]) -> torch.Tensor:
        read = {"input_ids": torch.tensor([ids])}
        if self.before_norm:
            kept = []
            hook = self.model.model.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
            local(self.model, read)
            hook.remove()
            return kept[0][0]
        return local(self.model, read)[0]

    def generate(self, request: dict[str, Any]) -> Any:
        assert request["return_hidden_states"] and request["sampling_params"]["max_new_tokens"] == 1
        answers = []
        for ids in request["input_ids"]:
            states = self.states(ids)[self.chunk :]
            about = {"prompt_tokens": len(ids), "completion_tokens": 1, "cached_tokens": self.cached}
            if self.whole:
                about["hidden_states"] = [states.tolist()]
            if request.get("return_logprob"):
                with torch.no_grad():
                    logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                top = logits.log_softmax(-1).topk(request["top_logprobs_num"])
                about["output_top_logprobs"] = [[[float(x), int(i), None] for x, i in zip(*top, strict=True)]]
            answers.append({"text": "?", "meta_info": about})
        return answers

    def pooling(self, request: dict[str, Any]) -> bytes:
        assert request["task"] == "token_embed" and request["encoding_format"] == "bytes_only"
        assert request["use_activation"] is False and request["endianness"] == "little"
        states = torch.cat([self.states(ids) for ids in request["input"]])
        if self.normalised:
            states = torch.nn.functional.normalize(states, dim=-1)
        body = states.to(DTYPES[request["embed_dtype"]]).view(torch.uint8).numpy().tobytes()
        return body if self.whole else body[: len(body) // 2]


@pytest.fixture
def engine():
    made = Engine(teacher())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(json.dumps({"object": "list", "data": [{"id": made.name, "object": "model"}]}).encode())

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.requests.append(request)
            if self.path == "/generate":
                self.answer(json.dumps(made.generate(request)).encode())
            else:
                assert self.path == "/pooling" and request["model"] == made.name
                self.answer(made.pooling(request))

        def answer(self, body: bytes) -> None:
            allowed = made.key is None or self.headers.get("Authorization") == f"Bearer {made.key}"
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(saved(tmp_path_factory.mktemp("files") / "model"))


@pytest.mark.parametrize("cls", [SGLangTeacher, VLLMTeacher])
def test_states_are_those_of_the_local_model(cls, engine, folder):
    client = cls(engine.url, folder, patience=5, most_tokens=30)
    batch, targets = batch_of(9)
    client.prefetch(batch, targets)
    found = client.head(batch, targets, CPU)
    assert apart(found.hidden[targets], local(engine.model, batch)[targets]) < 1e-6
    assert not found.hidden[~targets].any() and torch.equal(found.weight, engine.model.lm_head.weight)
    assert (client.vocab_size, client.hidden_size, client.columns, client.model) == (VOCAB, 16, (), "some/teacher")
    assert len(engine.requests) > 2 and "some/teacher" in repr(client)
    copied = pickle.loads(pickle.dumps(client))
    assert torch.equal(copied.head(batch, targets, CPU).weight, found.weight)
    client.check_tokenizer(tokenizer())
    with pytest.raises(ValueError, match="differs from the other model's"):
        client.check_tokenizer(tokenizer("other"))


def test_half_precision_from_vllm(engine, folder):
    client = VLLMTeacher(engine.url, folder, patience=5, dtype="bf16")
    batch, targets = batch_of()
    found = client.head(batch, targets, CPU)
    assert found.hidden.dtype == found.weight.dtype == torch.bfloat16
    assert apart(found.hidden[targets], local(engine.model, batch)[targets]) < 5e-3


@pytest.mark.parametrize("cls", [SGLangTeacher, VLLMTeacher])
def test_a_key(cls, engine, folder):
    engine.key = "secret"
    with pytest.raises(PermissionError):
        cls(engine.url, folder, patience=0)
    assert cls(engine.url, folder, patience=0, token="secret").model == "some/teacher"


@pytest.mark.parametrize(
    "cls, fault, message",
    [
        (SGLangTeacher, {"cached": 3}, "with 3 cached tokens, .* start SGLang with --disable-radix-cache"),
        (SGLangTeacher, {"chunk": 2}, r"gave states \(6, 16\) .*--chunked-prefill-size -1"),
        (
            SGLangTeacher,
            {"whole": False},
            "KeyError: 'hidden_states'.*: start SGLang with --enable-return-hidden-states",
        ),
        (SGLangTeacher, {"before_norm": True}, "after the final norm"),
        (VLLMTeacher, {"normalised": True}, "states of length 1: it does not heed use_activation"),
        (VLLMTeacher, {"whole": False}, "bytes, expected .* start vLLM with --runner pooling"),
    ],
)
def test_deployments_that_will_not_do(cls, fault, message, engine, folder):
    vars(engine).update(fault)
    with pytest.raises(ValueError, match=message):
        cls(engine.url, folder, patience=0).head(*batch_of(), CPU)


def test_a_head_that_is_another_models(engine, tmp_path):
    other = saved(tmp_path / "other", teacher(seed=4))
    with pytest.raises(ValueError, match="must give the log-probabilities that SGLang gives, but differ by"):
        SGLangTeacher(engine.url, str(other), patience=0)


def test_another_model_after_an_outage_is_named(engine, folder):
    client = VLLMTeacher(engine.url, folder, patience=0)
    engine.name = "other/teacher"
    client._connection.outages += 1
    before = client._connection.outages
    real = client._post

    def away(*given):
        client._connection.outages = before + 1
        return real(path=given[0], request={**given[1], "model": engine.name})

    client._post = away
    with pytest.raises(ValueError, match="serves another model than before: 'some/teacher', now 'other/teacher'"):
        client.head(*batch_of(), CPU)


# Heads from files.


SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def models() -> list[Any]:
    torch.manual_seed(0)
    phi = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))
    torch.nn.init.normal_(phi.lm_head.bias)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)
    )  # tied
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(head_dim=8, num_key_value_heads=2, final_logit_softcapping=3.0, **SIZES)
    )
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(logit_scale=0.3, **SIZES))
    return [phi, gpt2, gemma, neox, cohere]


@pytest.mark.parametrize("shards", ["1GB", "2KB"])
def test_heads_from_files(shards, tmp_path):
    for number, model in enumerate(models()):
        folder = tmp_path / str(number)
        model.save_pretrained(folder, max_shard_size=shards)
        assert len(list(folder.glob("*.safetensors"))) > 1 or shards == "1GB"
        head, module = head_of_files(str(folder)), model.get_output_embeddings()
        assert torch.equal(head.weight, module.weight)
        assert (head.bias is None) == (module.bias is None)
        assert head.bias is None or torch.equal(head.bias, module.bias)
        assert (head.logit_scale, head.softcap) == (
            getattr(model.config, "logit_scale", 1.0), getattr(model.config, "final_logit_softcapping", None),
        )  # fmt: skip


def test_files_without_a_head(tmp_path, folder):
    with pytest.raises(ValueError, match="must be a causal LM in safetensors files"):
        head_of_files(str(tmp_path / "nothing"))
    damaged = saved(tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    weight = tensors.pop("lm_head.weight")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor lm_head\.weight in them"):
        head_of_files(str(damaged))
    save_file({**tensors, "lm_head.weight": weight[:5].clone()}, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight must have shape \(61, 16\), got \(5, 16\)"):
        head_of_files(str(damaged))
