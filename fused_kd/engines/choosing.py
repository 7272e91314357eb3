"""Lists that are chosen in a chunk, from the logits that are there anyway: one side's largest, read at the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergences import LOG_ZERO
from ..rows.contract import Leading, Logits
from ..rows.largest import take
from ..rows.torch.math import finish_logits_
from .listing import Listed, finished
from .problem import Listing


def chosen(
    student: Logits, teacher: Logits, listing: Listing, temperature: Tensor, backend: str, *, reusable: bool
) -> Listed:
    """The teacher's entries (C, k), with what all others of its hold, exact.

    Args:
        student, teacher: (C, V).
        temperature: (1,) or (C,) fp32.
        backend: as of :func:`fused_kd.rows.largest.take`.
        reusable: whether the teacher's logits may be written over.
    """
    by = student if listing.of_student else teacher
    C, V = by.raw.shape
    k, device = min(listing.k, V), by.raw.device
    found = Leading.none(C, k, device)
    take(by, 0, found, temperature, backend)
    listed = finished(found, temperature, k, listing.top_p)
    if not listing.of_student:
        return listed
    z = teacher.raw if reusable else teacher.raw.float().clone()
    finish_logits_(z, teacher._replace(finite=True))  # -inf stays
    there = listed.indices >= 0
    index = torch.where(there, listed.indices, listed.indices[:, :1]).clamp(min=0)
    values = z.gather(1, index).clamp(min=LOG_ZERO).where(there, -math.inf)  # excluded, but listed
    z.scatter_(1, index, -math.inf)
    others = Leading.none(C, 0, device)
    take(Logits(z, 1.0, None, False), 0, others, temperature, backend)
    return finished(others._replace(values=values, indices=listed.indices), temperature)
