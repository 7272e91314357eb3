"""On-policy distillation (GKD) with TRL's trainer and the fused loss.

    python examples/trl_gkd.py --teacher PATH_OR_HUB_NAME --student PATH_OR_HUB_NAME --data chats.jsonl \\
        --output runs/gkd
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/trl_gkd.py --teacher ... --lmbda 1

Each line of --data is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. The
tokenizer is the student's and needs a chat template. What is not an argument here is TRL's GKDConfig in its defaults:
--set max_new_tokens=256 sets any of it.
"""

from __future__ import annotations

import argparse
import ast

import torch
from datasets import load_dataset
from trl.experimental.gkd import GKDConfig

from fused_kd.integrations.trl import GKDTrainer
from fused_kd.training.models import load_model, load_tokenizer
from fused_kd.training.specs import parse_objective


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lmbda", type=float, default=0.5, help="share of batches that the student writes itself")
    parser.add_argument("--objective", default="generalized_jsd:beta=0.5", help="as in examples/distill.py")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further fields of GKDConfig")
    return parser.parse_args(argv)


def literal(text: str) -> object:
    """A number, True, a list, ...; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main(argv: list[str] | None = None) -> GKDTrainer:
    args = parse_arguments(argv)
    more = {key: literal(value) for key, _, value in (item.partition("=") for item in args.set)}
    config = GKDConfig(args.output, lmbda=args.lmbda, **more)
    tokenizer = load_tokenizer(args.student)
    tokenizer.padding_side = "left"
    # the student's weights are trained in float32, whatever its files hold; bf16=True computes in bf16
    student = load_model(args.student, tokenizer, 0, dtype=torch.float32)
    teacher = load_model(args.teacher, tokenizer, 0)
    trainer = GKDTrainer(
        student,
        teacher,
        config,
        objective=parse_objective(args.objective).objective,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(args.output)
    return trainer


if __name__ == "__main__":
    main()
