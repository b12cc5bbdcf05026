"""A divergence of your own: the squared Hellinger distance, sum (sqrt p - sqrt q)^2."""

from dataclasses import dataclass

import torch

from esr_kernels import Divergence, linear_divergence


@dataclass(frozen=True)
class Hellinger(Divergence):
    """p: student, q: teacher, log_ratio = log q - log p, all of them elementwise over classes."""

    def summand(self, p, q, log_ratio):
        return (p.sqrt() - q.sqrt()) ** 2

    def pull(self, p, q, log_ratio):
        # p times the derivative of the summand for p, 1 - sqrt(q / p); a multiple of p cancels.
        return -(p * q).sqrt()


torch.manual_seed(0)
weight, teacher_head = torch.randn(5_000, 64) / 4, torch.randn(5_000, 96) / 4
teacher_hidden, truth = torch.randn(32, 96), torch.randn(32, 64)


def gradient(impl):
    hidden = truth.clone().requires_grad_()
    out = linear_divergence(hidden, weight, teacher_hidden, teacher_head, Hellinger(), impl=impl)
    out.loss.backward()
    return out.loss.item(), hidden.grad


(loss, grad), (expected, by_autograd) = gradient("auto"), gradient("reference")
error = float((grad - by_autograd).norm() / by_autograd.norm())
print(f"loss {loss:.5f}, by autograd through the summand {expected:.5f}")
print(f"relative error of the gradient {error:.1e}: {'it agrees' if error < 1e-4 else 'WRONG'}")
