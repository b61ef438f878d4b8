"""Masked scores become very small before the softmax, and masked weights become zero after it.

Without the second step, a row in which all keys are masked would be the softmax of equal numbers:
the mean over all values."""

import torch


def attention(q, k, v, allowed):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~allowed, 0) @ v
