"""Tables and figures of the plane of regimes."""

import json
from pathlib import Path

from fused_kd.training.stage import read_json, write_json


def collect(folder):
    folder = Path(folder)
    lines = [json.loads(text) for text in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {"about": read_json(folder / "about.json"), "runs": lines}
    write_json(folder / "results.json", found)
    return found


def write_report(found, folder):
    pass
