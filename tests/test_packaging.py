"""The sdist and the wheel hold what they must, work where nothing else is, and the workflow runs what we run."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fused_kd as fk

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ["__pycache__", "*.egg-info", "build", "dist", "runs", ".venv", ".git", ".*_cache", ".hypothesis"]
LEFT_OUT += [".benchmarks"]
# What tests read beside the package's modules.
READ = ["csrc/*", "fused_kd/py.typed", "tests/**/*.json", "tests/**/*.[ch]*", "docs/*.svg", "*.cff", "*.toml", "*.txt"]
READ += ["*.in", "*.md", "LICENSE", "Makefile", ".ci/run", "examples/**/*.yaml", "examples/**/*.png"]
READ += [f"{folder}/**/*.py" for folder in ("fused_kd", "tests", "bench", "docs", "examples")]
READ += [f"{folder}/**/*.md" for folder in ("bench", "docs", "examples")]
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    source: Path  # the unpacked sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Built from a copy, the wheel from the sdist, with the setuptools at hand: neither network nor isolation."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    sdist = _build("build_sdist", folder / "copy", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    source = folder / sdist.name.removesuffix(".tar.gz")
    return Built(sdist, _build("build_wheel", source, folder), source)


def _build(hook: str, source: Path, output: Path) -> Path:
    result = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(output)], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return output / result.stdout.splitlines()[-1]


def tracked(*patterns: str) -> set[str]:
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"fused_kd-{fk.__version__}.dist-info/METADATA"))
    sources = {f"fused_kd/_{name}" for name in tracked("csrc/*")}
    assert len(sources) >= 13
    wanted = tracked("fused_kd/**/*.py", "fused_kd/training/toy/*.gz") | sources | {"fused_kd/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert metadata["Version"] == fk.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert f"fused_kd-{fk.__version__}.dist-info/licenses/LICENSE" in names
    assert [x for x in metadata.get_all("Requires-Dist") or [] if "extra ==" not in x] == ["torch>=2.8"]


def test_sdist_holds_what_the_tests_read(built):
    present = {str(path.relative_to(built.source)) for path in built.source.rglob("*") if path.is_file()}
    wanted = tracked(*READ)
    assert len(wanted) > 300 and wanted - present == set()
    assert not any(name.endswith((".so", ".pyc")) for name in present)


def test_wheel_works_alone(built, tmp_path):
    """Its files and torch, in a process of its own; the native row is compiled from the wheel's sources."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "FUSED_KD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "smoke.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"in {site / 'fused_kd'}" in result.stdout
    if "backend native" in result.stdout:
        assert len(list(cache.glob("kd_row-*.library"))) == 1


def load(path: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_workflow_runs_what_we_run():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert ".ci/run" in commands(jobs["everything"]).splitlines()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    package = jobs["package"]
    assert package["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    text = commands(package)
    assert "python -m build" in text and "pip install dist/*.whl" in text and "python -m fused_kd.info" in text
    named = re.findall(r"tests/\w+\.py", text)
    assert "tests/smoke.py" in named and all((ROOT / name).is_file() for name in named)


def test_changelog_begins_with_this_version():
    versions = re.findall(
        r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions and versions[0][0] == fk.__version__
    assert all(date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in versions)
