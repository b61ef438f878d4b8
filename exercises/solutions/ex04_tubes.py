"""Give each of the h*w places a random number. Those with the smallest numbers are a random choice
without repetition."""

import torch


def tube_mask(batch, grid, ratio, generator):
    t, h, w = grid
    order = torch.rand(batch, h * w, generator=generator).argsort(dim=1)
    hidden = torch.zeros(batch, h * w, dtype=torch.bool)
    hidden.scatter_(1, order[:, :int(ratio * h * w)], True)
    return hidden.repeat(1, t)
