"""Batch normalisation with the statistics of all processes."""

import torch
from torch import nn

from engine.processes import gather_with_gradient, world


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on x (n, D) with mean and variance over the rows of all processes.

    The total variance is the mean of the processes' variances plus the variance of their means.
    This holds only where n is equal in all processes.
    """

    def forward(self, x):
        if not self.training or world() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            var, mean = torch.var_mean(wide, dim=0, correction=0)
            stats = gather_with_gradient(torch.stack([mean, var])[None])      # (processes, 2, D)
            mean = stats[:, 0].mean(dim=0)
            var = stats[:, 1].mean(dim=0) + stats[:, 0].var(dim=0, correction=0)
            with torch.no_grad():
                n = world() * len(x)
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), self.momentum)
                self.num_batches_tracked += 1
            return ((wide - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)
