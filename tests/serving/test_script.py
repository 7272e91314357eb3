"""examples/train.py with a served teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fused_kd.serving import TeacherServer
from fused_kd.training.models import load_model, load_tokenizer
from tests.training.scripts import apart, train, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train("sft", folder, student="tiny-student")
    return folder / "model"


def test_a_served_teacher(teacher: Path, tmp_path: Path) -> None:
    """The weights of a run with the model itself; bound to the teacher's content, wherever its server is."""
    tokenizer = load_tokenizer(teacher)
    model = load_model(teacher, tokenizer, 0)
    (tmp_path / "token").write_text("secret\n")
    given = {"student": teacher, "teacher_token_file": tmp_path / "token", "statistics": "kl"}
    with TeacherServer(model, tokenizer, token="secret") as server:
        train("self_evolution", tmp_path / "served", teacher=server.url, **given)
        with pytest.raises(ValueError, match="gamma_quantile needs an online teacher in this process"):
            train("self_evolution_quantile", tmp_path / "served", teacher=server.url, **given)
    with TeacherServer(model, tokenizer, token="secret") as server:  # at another port: the same run, which is done
        train("self_evolution", tmp_path / "served", teacher=server.url, **given)
    del given["teacher_token_file"]
    train("self_evolution", tmp_path / "local", teacher=teacher, **given)
    ours, theirs = (weights(tmp_path / name / "model") for name in ("served", "local"))
    start = weights(teacher)
    assert apart(ours, theirs) < 1e-4 * apart(theirs, start)

    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with TeacherServer(model, tokenizer) as server, pytest.raises(ValueError, match="teacher's content: "):
        train("self_evolution", tmp_path / "served", teacher=server.url, **given)
    with pytest.raises(ConnectionError, match=r"patience=0\.5"):
        train("self_evolution", tmp_path / "served", teacher=server.url, **given, teacher_patience=0.5)
    with pytest.raises(ValueError, match="teacher_token_file needs a teacher at http://HOST:PORT"):
        train("self_evolution", tmp_path / "other", teacher=teacher, **given, teacher_token_file="token")
