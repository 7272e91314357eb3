"""Tables of ``python -m bench training``, from its lines alone."""

from __future__ import annotations

import statistics

from .end_to_end import Model
from .registry import GROUPS
from .session import Row
from .tables import fixed, over, table

# Of the first step's loss and gradient norm, relative to eager's: what rounding to bf16 may cost.
LOSS_AGREES, NORM_AGREES = 2e-3, 2e-2


def markdown(rows: list[Row]) -> str:
    rows = latest(rows)
    settings = {row["name"]: row for row in rows if row["kind"] == "setting"}
    parts = ["# Training steps of whole models", about(rows)]
    for name, setting in settings.items():
        parts += [f"## {name}", described(setting)]
        groups = dict.fromkeys(row["group"] for row in rows if row.get("setting") == name)
        for group in groups:
            of = [row for row in rows if row.get("setting") == name and row["group"] == group]
            parts += [f"{GROUPS[group]}:", rows_table(of, setting["limit"])]
    unreached = [row for row in rows if row["status"] == "not reached"]
    if unreached:
        names = dict.fromkeys(f"{row['setting']}, {row['group']}, {row['kind']}" for row in unreached)
        parts.append("Not reached: " + "; ".join(names) + ".")
    return "\n\n".join([*parts, METHOD]) + "\n"


def latest(rows: list[Row]) -> list[Row]:
    """Of each row the last line, in the order of the first, with what its run says of ``beside``.

    A row that was not reached later on is left as it was.
    """
    found: dict[tuple, Row] = {}
    beside = False
    for row in rows:
        beside = row.get("beside", False) if row["kind"] == "environment" else beside
        key = tuple(row.get(name) for name in ("kind", "name", "setting", "group", "way"))
        if row["status"] != "not reached" or key not in found:
            found[key] = {**row, "beside": beside}
    return list(found.values())


def about(rows: list[Row]) -> str:
    row = next(row for row in rows if row["kind"] == "environment")
    hardware, source = row["hardware"], row["source"]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    card = hardware.get("gpu", "a rehearsal on a CPU: its numbers mean nothing")
    return f"- {card}\n- {versions}\n- commit {(source['commit'] or 'unknown')[:12]}, code {source['digest']}"


def described(setting: Row) -> str:
    """What a setting is, in two lines."""
    student, teacher = (Model(**setting[name]) for name in ("student", "teacher"))
    weights = "bf16" if setting["weights"] == "bf16" else "fp32 under bf16 autocast"
    more = ", gradient checkpointing" if setting["checkpointing"] else ""
    return (
        f"Student {student}; its weights, gradients and AdamW state {weights}{more}. Teacher {teacher}; bf16.\n"
        f"{setting['batch']} x {setting['length']} tokens a step."
    )


def rows_table(rows: list[Row], limit: float = 0.0) -> str:
    steps = {row["way"]: row for row in rows if row["kind"] == "step"}
    full = {row["way"]: row for row in rows if row["kind"] == "largest"}
    eager = steps.get("eager", {})
    lines = []
    for way in dict.fromkeys([*steps, *full]):
        row = steps.get(way, {"status": ""})
        cells = [way]
        if row["status"] == "ok":
            cells += speed_cells(row, eager)
            cells += [f"{row['peak'] / 1e9:.1f}", fixed(over(row["peak"], eager.get("peak")))]
            cells += [f"{row['loss']:.5f}", differs(row, eager)]
        else:
            cells += [" ".join(filter(None, [row["status"], row.get("reason", "")]))[:120], *[""] * 6]
        if full:
            cells += largest_cells(full.get(way, {"status": ""}))
        lines.append(cells)
    head = ["way", "ms a step", "tokens/s", "/ eager", "peak GB", "/ eager", "first loss", "beside eager's"]
    if full:
        head += [f"largest batch in {limit / 1e9:g} GB", "tokens/s there"]
    return table(head, lines)


def speed_cells(row: Row, eager: Row) -> list[str]:
    """Of a row that was measured with the GPU to itself; empty of another."""
    if row.get("beside"):
        return ["", "", ""]
    quick = None if eager.get("beside") else over(row["tokens_per_s"], eager.get("tokens_per_s"))
    return [f"{1e3 * statistics.median(row['seconds']):.1f}", f"{row['tokens_per_s']:.0f}", fixed(quick)]


def differs(row: Row, eager: Row) -> str:
    """Whether loss and gradient norm of the first step are eager's."""
    if eager.get("status") != "ok" or row is eager:
        return ""
    loss = abs(row["loss"] / eager["loss"] - 1)
    norm = abs(row["gradient_norm"] / eager["gradient_norm"] - 1)
    told = f"loss {loss:.0e}, gradient norm {norm:.0e}"
    return told if loss <= LOSS_AGREES and norm <= NORM_AGREES else f"**differs**: {told}"


def largest_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [" ".join(filter(None, [row["status"], row.get("reason", "")]))[:80], ""]
    told = ("at least " if row["refused"] is None else "") + str(row["largest"])
    return [told, f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row and not row.get("beside") else ""]


METHOD = f"""\
A step is the student's forward, the teacher's without gradients (none for cross-entropy), the loss, backward and
`torch.optim.AdamW(fused=True)` with a learning rate of 0, so that all ways meet the same random weights and tokens in
every step; SDPA attention; the bodies of the models are the same code for all ways. Medians of steps by the host's
clock, launches included. "eager" is plain PyTorch's loss of `bench/registry.py` (the heads' logits, a softmax in fp32,
`kl_div`), "torch.compile" the same compiled, heads included; "Liger fused" its `LigerFusedLinearJSD` with beta 0 or its
fused linear cross-entropy, "Liger chunked" its compiled `LigerFusedLinearJSDLoss`; it has no Self-Evolution. Peak: of
allocated memory, models and optimizer state included. Largest batch: sequences; what is given was run within the limit
by the allocator's count, and 1/16 more (one sequence at least) was not. Loss and gradient norm of the first step are
compared with eager's, whose logits are rounded to bf16: {LOSS_AGREES:g} and {NORM_AGREES:g} are allowed. Rows without
a speed were measured while other processes used the GPU, which changes no memory and no loss."""
