"""Whether the fused_kd that Python finds works: ``python tests/smoke.py`` after an installation; needs torch alone."""

from __future__ import annotations

from pathlib import Path

import torch

import fused_kd as fk
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.native.build import NativeRowError, find_compiler


def main() -> int:
    """Loss and gradients of every backend for CPUs against the float64 reference, and the files beside the code."""
    folder = Path(fk.__file__).parent
    for name in ("py.typed", "_csrc/kd_row.c", "_csrc/kd_row.cu", "_csrc/kd_math.h"):
        assert (folder / name).is_file(), f"{folder / name} is missing"
    try:
        find_compiler()
        backends = ["torch", "native"]
    except NativeRowError as error:
        print(error)
        backends = ["torch"]

    torch.manual_seed(0)
    h_t, W_t, labels = torch.randn(33, 24), torch.randn(301, 24), torch.randint(301, (33,))
    h_s, W_s = torch.randn(33, 16, requires_grad=True), torch.randn(301, 16, requires_grad=True)
    problem = fk.LMHead(h_s, W_s), fk.LMHead(h_t, W_t), labels, fk.SelfEvolution()
    truth = reference_kd_loss(*problem).loss
    gradients = torch.autograd.grad(truth, (h_s, W_s))
    for backend in backends:
        loss = fk.kd_loss(*problem, backend=backend).loss
        found = torch.autograd.grad(loss, (h_s, W_s))
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, gradients, strict=True)]
        errors.append(abs(float(loss) / float(truth) - 1))
        print(f"fused_kd {fk.__version__} in {folder}, backend {backend}: relative errors {errors}")
        assert max(errors) < 1e-5, errors
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
