"""The CUDA row's build and cache, and what is said where it cannot run."""

from __future__ import annotations

import contextlib
import json
import sys
from ctypes import c_float, c_int32, c_int64
from types import SimpleNamespace

import pytest
import torch

import fused_kd as fk
from fused_kd.engines import dispatch
from fused_kd.rows import select
from fused_kd.rows.build_cache import CACHE_VARIABLE
from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.cuda import row as cuda_row
from fused_kd.rows.cuda.build import CudaRowError
from fused_kd.rows.cuda.launch import Cut, Device, Launch, parameters

GPU = torch.device("cuda:0")


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    """Its version; what is compiled is kept in ``tmp_path``."""
    pytest.importorskip("cuda.core", reason="needs the extra cuda")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    try:
        return cuda_build._nvrtc_version()
    except CudaRowError as error:
        pytest.skip(str(error))


def test_tensors_elsewhere_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' needs tensors on an NVIDIA GPU, got tensors on cpu"):
        fk.kd_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), fk.NoEvo(), backend="cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="needs tensors on an NVIDIA GPU, got tensors on cuda:0"):
        select.choose_backend("cuda", GPU)
    with pytest.raises(CudaRowError, match="this PyTorch is for AMD ones; use backend='triton'"):
        cuda_build.require()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(select, "installed", lambda package: package != "cuda.core")
    with pytest.raises(ValueError, match=r"cuda-core, which is not installed: pip install 'fused_kd\[cuda\]'"):
        select.choose_backend("cuda", GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so(nvrtc):
    with pytest.raises(CudaRowError, match=r"torch.cuda.is_available\(\) is false; use backend='torch'"):
        select.get_row("cuda")


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda which: SimpleNamespace(major=7, minor=5, name="Tesla T4")
    )
    with pytest.raises(CudaRowError, match="sm_80 or later, Tesla T4 is sm_75; use backend='torch'"):
        cuda_build.device.__wrapped__(GPU)


@pytest.mark.parametrize(
    "major, minor, arch, cluster", [(8, 6, "sm_86", 1), (9, 0, "sm_90a", 8), (10, 0, "sm_100a", 8)]
)
def test_gpus_get_their_own_binary(monkeypatch, major, minor, arch, cluster):
    found = SimpleNamespace(
        major=major, minor=minor, name="", shared_memory_per_block_optin=1, shared_memory_per_multiprocessor=2
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: found)
    assert cuda_build.device.__wrapped__(GPU) == Device(cluster, 1, 2)
    assert cuda_build.architecture(major, minor) == arch


def test_none_keeps_preferring_triton(monkeypatch):
    monkeypatch.setattr(select, "installed", lambda package: True)
    assert select.choose_backend(None, GPU) == "triton"
    assert select.choose_backend("cuda", GPU) == "cuda"


@pytest.fixture
def cuda_first(monkeypatch):
    """As if the CUDA row had been measured to be the faster one on sm_90, and every GPU were one."""
    monkeypatch.setattr(select, "CUDA_FIRST", frozenset({(9, 0)}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(select, "installed", lambda package: True)
    select._cuda_or_triton.cache_clear()
    yield
    select._cuda_or_triton.cache_clear()


def test_none_can_prefer_cuda_by_one_line(cuda_first, monkeypatch):
    assert select.choose_backend(None, GPU) == select.CUDA_OR_TRITON
    assert select.choose_backend("triton", GPU) == "triton"
    assert dispatch.choose_engine(None, None, fk.ForwardKD().spec, 0.0, GPU, sharded=True) == ("chunked", "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert select.choose_backend(None, GPU) == "triton"
    monkeypatch.setattr(select, "installed", lambda package: package != "triton")
    assert select.choose_backend(None, GPU) == "torch"


def test_the_choice_is_a_constant_to_torch_compile(cuda_first):
    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + len(select.choose_backend(None, GPU))

    assert chosen(torch.zeros(())) == len(select.CUDA_OR_TRITON)


class Inputs:
    """What the choice between rows looks at."""

    def __init__(self, V: int) -> None:
        self.student = SimpleNamespace(raw=torch.empty(1, V, device="meta"))
        self.teacher = self.beyond = None


def test_none_falls_back_to_triton_without_a_word(cuda_first, monkeypatch):
    """Packages missing; a kernel that can not be loaded, asked for once; more columns than int32 counts."""
    pytest.importorskip("triton")
    from fused_kd.rows.triton import row as triton_row

    ran = []
    monkeypatch.setattr(triton_row, "row", lambda inputs, outputs: ran.append("triton"))
    monkeypatch.setattr(cuda_row, "row", lambda inputs, outputs: ran.append("cuda"))

    def refuse(*_):
        raise CudaRowError("not here")

    monkeypatch.setattr(cuda_build, "require", refuse)
    select.get_row(select.CUDA_OR_TRITON)(Inputs(5), None)
    assert ran == ["triton"]
    with pytest.raises(CudaRowError, match="not here"):
        select.get_row("cuda")

    monkeypatch.setattr(cuda_build, "require", lambda: None)
    select._cuda_or_triton.cache_clear()
    for V in (5, cuda_build.LARGEST_VOCAB, cuda_build.LARGEST_VOCAB + 1):
        select.get_row(select.CUDA_OR_TRITON)(Inputs(V), None)
    assert ran[1:] == ["cuda", "cuda", "triton"]

    tried = []
    monkeypatch.setattr(cuda_row, "row", lambda inputs, outputs: tried.append(1) or refuse())
    select._cuda_or_triton.cache_clear()
    for _ in range(3):
        select.get_row(select.CUDA_OR_TRITON)(Inputs(5), None)
    assert ran[4:] == ["triton"] * 3 and tried == [1]


MACROS = (
    *cuda_row.formula_macros(fk.ForwardKD(lam=1).spec, cold_labels=False).items(),
    *((f"FKD_{name}", 0) for name in ("STUDENT", "DLOGITS", "LISTED", "SHAPED", "WHOLE", "EXCLUDES")),
    *(("FKD_TEACHER", -1), ("FKD_VECTOR", 1), ("FKD_WIDTH", 4), ("FKD_THREADS", 128)),
)


def test_a_binary_is_compiled_once(nvrtc, monkeypatch, tmp_path):
    code = cuda_build.cubin("fkd_row", MACROS, "sm_90a")
    assert code.startswith(b"\x7fELF")
    compiled = []
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: compiled.append(1) or b"another")
    assert cuda_build.cubin("fkd_row", MACROS, "sm_90a") == code and not compiled
    assert cuda_build.cubin("fkd_row", MACROS, "sm_80") == b"another"
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert cuda_build.cubin("fkd_row", MACROS, "sm_90a") == b"another"  # nowhere to keep it


def test_a_binary_of_another_nvrtc_is_found(nvrtc, monkeypatch, tmp_path):
    """Carried from a machine with a newer one; who made it is written in the entry."""
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: b"binary")
    cuda_build.cubin("fkd_row", MACROS, "sm_90a")
    (path,) = tmp_path.glob("*.cubin")
    assert json.loads(path.read_bytes().split(b"\n")[0])["nvrtc"] == ".".join(map(str, nvrtc))
    monkeypatch.setattr(cuda_build, "_nvrtc_version", lambda: (12, 8))
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: b"another")
    assert cuda_build.cubin("fkd_row", MACROS, "sm_90a") == b"binary"
    assert cuda_build.cubin("fkd_row", MACROS, "sm_90a", fresh=True) == b"another"
    assert cuda_build.cubin("fkd_row", MACROS, "sm_90a") == b"another"


def test_a_damaged_binary_or_another_gpu_s_is_compiled_again(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "_compile", lambda source, macros, arch: f"binary for {arch}".encode())
    paths = []
    for arch in ("sm_90a", "sm_80"):
        cuda_build.cubin("fkd_row", MACROS, arch)
        paths += set(tmp_path.glob("*.cubin")) - set(paths)
    path, other = paths
    compiled = []
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: compiled.append(1) or b"good")
    for times, damaged in enumerate((path.read_bytes()[:-1], other.read_bytes()), 1):
        path.write_bytes(damaged)
        for _ in range(2):
            assert cuda_build.cubin("fkd_row", MACROS, "sm_90a") == b"good" and len(compiled) == times
    assert not list(tmp_path.glob("new-*"))


def test_a_binary_of_other_sources_is_not_used(nvrtc, monkeypatch):
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: b"old")
    cuda_build.cubin("fkd_row", MACROS, "sm_90a")
    monkeypatch.setattr(cuda_build, "_compile", lambda *_: b"new")
    monkeypatch.setattr(cuda_build, "c_header", lambda: "another table\n")
    assert cuda_build.cubin("fkd_row", MACROS, "sm_90a") == b"new"


def test_a_binary_that_the_driver_refuses_is_compiled_here(monkeypatch):
    """One from the cache may be newer than the driver."""

    class Refused:
        def __init__(self, code: bytes) -> None:
            self.code = code

        def get_kernel(self, name: str) -> str:
            if self.code == b"carried":
                raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
            return self.code.decode()

    core = SimpleNamespace(ObjectCode=SimpleNamespace(from_cubin=lambda code, name: Refused(code)))
    monkeypatch.setattr(cuda_build, "_core", lambda: core)
    monkeypatch.setattr(cuda_build, "cubin", lambda *_, fresh: b"own")
    cuda_build._loaded.cache_clear()
    assert cuda_build._kernel("fkd_row", MACROS, "sm_90a", b"carried") == "own"
    cuda_build._loaded.cache_clear()


def test_what_nvrtc_says_is_passed_on(nvrtc):
    with pytest.raises(CudaRowError, match=r"failed to compile for sm_20 .*(?s:.*)install a newer nvidia-cuda-nvrtc"):
        cuda_build.cubin("fkd_row", MACROS, "sm_20")


def test_arguments_go_by_the_names_of_the_kernel():
    found = parameters("fkd_condense")
    assert (found["student"], found["K"], found["C"], found["student_cap"]) == (int, c_int32, c_int64, c_float)
    assert (next(iter(found)), list(found)[-1]) == ("student", "cold")
    launch = Launch("fkd_condense", (), Cut(1, 128, 0, 0), 1, dict.fromkeys(found, 1) | {"no_such": 1})
    with pytest.raises(TypeError, match=r"fkd_condense takes student, .*, cold, got student, .*, cold, no_such"):
        launch.typed()


def test_a_launch_as_cuda_core_is_asked_for_it(monkeypatch):
    """On a stand-in for cuda-core and the driver: which calls are made, in what terms."""
    launched, attributes, modes = [], [], ["global"]

    class Occupancy:
        def max_active_clusters(self, config, *, stream):
            assert config == {"grid": 1, "cluster": 8, "block": 512, "shmem_size": 4096} and stream == "legacy"
            assert modes[-1] == "relaxed"
            return 3

        def max_active_blocks_per_multiprocessor(self, threads, shared_bytes):
            assert (threads, shared_bytes) == (128, 4096)
            return 2

    kernel = SimpleNamespace(occupancy=Occupancy(), handle="handle")
    code = SimpleNamespace(get_kernel=lambda name: kernel)
    core = SimpleNamespace(
        LEGACY_DEFAULT_STREAM="legacy",
        LaunchConfig=dict,
        ObjectCode=SimpleNamespace(from_cubin=lambda binary, name: code),
        launch=lambda *arguments: launched.append(arguments),
    )
    driver = SimpleNamespace(
        cuDeviceGet=lambda index: (0, index),
        cuKernelSetAttribute=lambda *given: attributes.append(given) or (0,),
        cuThreadExchangeStreamCaptureMode=lambda mode: (0, modes.append(mode) or modes[-2]),
        CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed"),
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most"),
    )
    monkeypatch.setattr(cuda_build, "_core", lambda: core)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(cuda_build, "cubin", lambda *_: b"")
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: SimpleNamespace(multi_processor_count=5))
    monkeypatch.setattr(cuda_build, "device", lambda where: SimpleNamespace(block_bytes=232448))
    x = torch.zeros(3)
    given = {name: None if kind is int else 0 for name, kind in parameters("fkd_row").items()}
    given |= {"student": x, "C": 7, "student_scale": 0.5}
    for cluster, threads, rows_, grid in ((8, 512, 100, 3), (8, 512, 2, 2), (1, 128, 100, 10)):
        cut = Cut(cluster, threads, 1, 4096)
        cuda_build.launch(GPU, Launch("fkd_row", ((str(rows_), 0),), cut, rows_, given))
        stream, config, launched_kernel, *values = launched[-1]
        arguments = dict(zip(given, values, strict=True))
        assert stream == "legacy" and launched_kernel is kernel
        assert config.pop("cluster", 1) == cluster
        assert config == {"grid": grid, "block": threads, "shmem_size": 4096}
        assert (arguments["student"], arguments["teacher"]) == (x.data_ptr(), 0)
        assert isinstance(arguments["C"], c_int64) and arguments["C"].value == 7
        assert arguments["student_scale"].value == 0.5
        # All that a block may have, whatever this cut takes: another may launch the same kernel.
        assert attributes[-1] == ("most", 232448, "handle", 0) and modes[-1] == "global"
    cuda_build._prepared.cache_clear()
    cuda_build._loaded.cache_clear()


def test_every_source_is_shipped():
    for source in {*cuda_build.SOURCES.values(), "cuda_slots.h", "kd_math.h"}:
        assert (cuda_build.FOLDER / source).exists()
