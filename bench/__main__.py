"""``python -m bench run | gpu | report FILE | compare BEFORE AFTER | model``: how much memory, how fast, how exact."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import gpu


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:  # the others import torch, which a run on a GPU leaves to its stages
        parser = argparse.ArgumentParser(
            prog="python -m bench gpu", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        gpu.add_arguments(parser)
        return gpu.main(parser.parse_args(arguments[1:]))
    from . import compare, model, run
    from .report import write_report

    if arguments[:1] == ["model"]:
        return model.main(arguments[1:]) or 0
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure, resuming where it was stopped; then report")
    run.add_arguments(measure)
    report = commands.add_parser("report", help="Markdown, plots and the README's table again, from the JSON alone")
    report.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    comparison = commands.add_parser("compare", help="two results files, row by row; exit code 1 past a regression")
    comparison.add_argument("before", type=Path, metavar="BEFORE.json")
    comparison.add_argument("after", type=Path, metavar="AFTER.json")
    comparison.add_argument(
        "--limit", type=float, default=1.1, help="the largest ratio of time or memory that is none (default 1.1)"
    )
    commands.add_parser("gpu", help="tests and measurements on an NVIDIA GPU (--help says more)", add_help=False)
    commands.add_parser("model", help="what the performance model predicts (--help says how to ask)", add_help=False)
    args = parser.parse_args(arguments)
    if args.command == "run":
        return run.main(args)
    try:
        if args.command == "report":
            for path in args.results:
                print(write_report(path))
            return 0
        before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
        changes = compare.compare(before, after, args.limit)
    except (OSError, ValueError) as error:
        print(f"bench {args.command}: {error}", file=sys.stderr)
        return 2
    print(compare.markdown(changes, args.limit))
    return int(any(change.worse for change in changes))


if __name__ == "__main__":
    raise SystemExit(main())
