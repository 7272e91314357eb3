"""Two random heads, one loss, its gradients, and the memory that they took: with fused_kd and in plain PyTorch."""

import resource
import sys

import torch
from torch.nn.functional import kl_div

import fused_kd as fk

N, H_S, H_T, V = 1024, 128, 256, 32_000  # tokens, hidden sizes of student and teacher, vocabulary
GAMMA, BETA, LAM = 0.4, 0.5, 0.5


def fused(h_s, W_s, h_t, W_t, labels):
    criterion = fk.KDLoss(fk.SelfEvolution(gamma=GAMMA, beta=BETA, lam=LAM))
    return criterion(fk.LMHead(h_s, W_s), fk.LMHead(h_t, W_t), labels)


def plain(h_s, W_s, h_t, W_t, labels):
    log_q = (h_s @ W_s.T).log_softmax(-1)
    with torch.no_grad():
        target = LAM * (h_t @ W_t.T).softmax(-1)
        target.scatter_add_(1, labels[:, None], torch.full_like(target[:, :1], 1 - LAM))
    easy = kl_div(log_q, target, reduction="none").sum(-1)
    hard = kl_div((BETA * log_q.exp() + (1 - BETA) * target).log(), target, reduction="none").sum(-1)
    return torch.where(easy.detach() > GAMMA, hard, easy).mean()


def high_water():
    """The most bytes that were resident in this process so far, as the system counts them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    torch.manual_seed(0)
    h_s, h_t = torch.randn(N, H_S, requires_grad=True), torch.randn(N, H_T)
    W_s = torch.randn(V, H_S).div_(H_S**0.5).requires_grad_()
    W_t, labels = torch.randn(V, H_T).div_(H_T**0.5), torch.randint(V, (N,))
    for way in (fused, plain):  # a tiny call: what is loaded or compiled at first use is not the loss's memory
        torch.autograd.grad(way(h_s[:8], W_s[:64], h_t[:8], W_t[:64], labels[:8] % 64), h_s)
    fk.empty_cache()
    before, found = high_water(), []
    for way in (fused, plain):  # fused first: the mark only rises
        loss = way(h_s, W_s, h_t, W_t, labels)
        loss.backward()
        print(f"{way.__name__}: loss {loss:.4f}, peak {(high_water() - before) / 1e6:.0f} MB over the inputs")
        found.append(h_s.grad)
        h_s.grad = W_s.grad = None
        fk.empty_cache()  # fused_kd keeps its buffers for the next call
    print(f"dH differs by {(found[0] - found[1]).norm() / found[1].norm():.0e} of its norm")


if __name__ == "__main__":
    main()
