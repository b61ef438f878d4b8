"""Forbidden scores become very small before the softmax, and forbidden weights zero after it. In a
row with nothing allowed, the softmax of equal numbers would be a mean over everything."""

import torch


def attention(q, k, v, allowed):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0) @ v
