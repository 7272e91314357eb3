"""pytest on one folder after another, each in a process forked from this one, which has imported what is slow to.

A line of JSON in, ``[folder, test, ...]``; a line of JSON out, ``[exit code, output]``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile

LIMIT = 300  # seconds of one folder
SLOW = ("numpy", "torch", "torch._dynamo", "triton", "triton.language", "pytest", "hypothesis")


def run(folder: str, tests: list[str]) -> int:
    import pytest

    signal.alarm(LIMIT)
    os.chdir(folder)
    sys.path[0] = folder  # instead of this file's
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]))


def main() -> None:
    for module in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        folder, *tests = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = 70
                with contextlib.suppress(SystemExit):
                    code = run(folder, tests)
                sys.stdout.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([code, output.read().decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    main()
