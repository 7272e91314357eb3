"""pytest in one folder, again and again, each in a process forked from this one, which has imported what is slow to.

Its argument is the folder. A line of JSON in, ``[test, ...]``; a line of JSON out, ``[exit code, output]``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile

LIMIT = 300  # seconds of one run
SLOW = ("numpy", "mpmath", "torch", "torch._dynamo", "triton", "triton.language", "pytest", "hypothesis")
# Collections of all garbage cost more than most tests.
OPTIONS = ["-x", "-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


def prepare() -> None:
    for module in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with contextlib.suppress(ImportError):
        from hypothesis import Phase, settings

        # One failure is enough; it need not be the smallest.
        settings.register_profile("fails", phases=(Phase.explicit, Phase.generate), database=None)
        settings.load_profile("fails")
    gc.disable()
    gc.freeze()


def run(tests: list[str]) -> int:
    import pytest

    signal.alarm(LIMIT)
    return int(pytest.main([*OPTIONS, *tests]))


def main() -> None:
    prepare()
    os.chdir(sys.argv[1])
    sys.path[0] = sys.argv[1]  # instead of this file's
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = 70
                with contextlib.suppress(SystemExit):
                    code = run(json.loads(line))
                sys.stdout.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([code, output.read().decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    main()
