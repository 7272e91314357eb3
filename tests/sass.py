"""Count what NVIDIA machine code does in a kernel's main loops: instructions, special functions, barriers, accesses.

A main loop is an innermost one (a backward branch around no other) that loads from global memory. Counts are of the
instructions that stand in it, also of those that a predicate or a forward branch may skip.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Loop:
    """Of one main loop: instructions by kind, and by bytes a thread moves at once how many loads and stores."""

    instructions: int
    special: int
    barriers: int
    shuffles: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]

    def elements(self, bytes_read: int) -> float:
        """Elements a thread takes in an iteration, of each of which it reads so many bytes."""
        return sum(width * n for width, n in self.loads.items()) / bytes_read


def find_tool(name: str) -> str | None:
    """NVIDIA's binary tool of that name: triton's wheel has ``cuobjdump`` and ``nvdisasm``."""
    with contextlib.suppress(ImportError):
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    return shutil.which(name)


def ask(tool: str, option: str, cubin: bytes) -> str:
    """What a tool, ``cuobjdump`` or ``nvdisasm`` by its path, says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes, cuobjdump: str) -> dict[str, int]:
    """A kernel's ``registers``, and its bytes of ``stack`` and ``spills``."""
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", ask(cuobjdump, "-res-usage", cubin)))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "spills": int(found["LOCAL"])}


def main_loops(cubin: bytes, nvdisasm: str) -> list[Loop]:
    """The main loops of a kernel, in the order of its code."""
    return [loop for loop in map(_count, inner_loops(cubin, nvdisasm)) if loop.loads]


def inner_loops(cubin: bytes, nvdisasm: str) -> list[list[str]]:
    """The innermost loops' instructions by name, in the order of the code, without those that are never executed."""
    code: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in ask(nvdisasm, "-c", cubin).splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif (instruction := _INSTRUCTION.search(line)) and instruction[1] != "@!PT":
            if instruction[2].startswith("BRA") and (target := _TARGET.search(instruction[3])):
                branches.append((len(code), target[1]))
            code.append(instruction[2])
    ends: dict[int, int] = {}  # a loop may be continued from several places
    for end, label in branches:
        if label in labels and labels[label] <= end:
            ends[labels[label]] = max(end, ends.get(labels[label], 0))
    spans = sorted(ends.items())
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [code[first : last + 1] for first, last in inner]


def _count(code: list[str]) -> Loop:
    def of(*names: str) -> list[str]:
        return [name for name in code if name.split(".")[0] in names]

    return Loop(
        # What pads code to whole groups is never reached.
        instructions=sum(not name.startswith("NOP") for name in code),
        special=len(of("MUFU")),
        barriers=len(of("BAR")),
        shuffles=len(of("SHFL")),
        shared=len(of("LDS", "STS", "LDSM", "STSM")),
        loads=_widths(of("LDG", "LDGSTS")),
        stores=_widths(of("STG")),
    )


def _widths(accesses: list[str]) -> dict[int, int]:
    widths = [next((_BYTES[part] for part in name.split(".") if part in _BYTES), 4) for name in accesses]
    return {width: widths.count(width) for width in sorted(set(widths))}


def per_element(loop: Loop, bytes_read: int) -> dict[str, Any]:
    """A loop's instructions and special functions by element that a thread takes; the rest by iteration."""
    elements = loop.elements(bytes_read)
    counts = asdict(loop) | {"elements": elements}
    return counts | {key: round(counts[key] / elements, 2) for key in ("instructions", "special")}
