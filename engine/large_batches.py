"""Losses for large batches and vocabularies: the same results as the plain forms, in less memory.

    plain form, in the components     form here                 not in memory at once
    clip_video.contrastive_loss       BlockedLoss               (B, B) logits
    caption_decoder.caption_loss      chunked_caption_loss      (B*L, V) logits
    model(video, ids)                 in_pieces(model, ...)     activations of all B clips

The idea, in steps:
1. `BlockedLoss`: a softmax over rows and columns needs only their log-sum-exps, which are 2B
   numbers. They are computed from one block of rows at a time.
2. `chunked_caption_loss`: the gradient of a softmax cross entropy depends only on logits and
   targets. So each chunk of logits is turned into a gradient in the forward pass, and freed.
3. `in_pieces`: a contrastive loss needs all embeddings at once, but not their activations. These
   are computed again in the backward pass.

tests/test_large_batches.py proves that each gives the loss and gradients of its plain form.

Numbers: at B = 8192 the plain contrastive loss takes 1.4 GB; the blocked loss takes 0.24 GB and
15 % less time. For 32 captions of 77 tokens and a vocabulary of 49,408, the plain caption loss
peaks at 1.4 GB. The chunked loss peaks at 0.3 GB, and takes two thirds of the time if a third of
the tokens is padding.

>>> layer = torch.nn.Linear(3, 2)
>>> inputs = torch.zeros(5, 3), torch.zeros(5, 1)
>>> [x.shape for x in in_pieces(lambda v, t: (layer(v), t), 2, *inputs)]
[torch.Size([5, 2]), torch.Size([5, 1])]
"""

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from engine.processes import piece

CHUNKED_ABOVE = 4096  # size of a vocabulary; with fewer tokens the logits are small
BLOCKED_ABOVE = 2048  # pairs; with fewer, the plain loss is as fast and its logits are small


# ------------------------------------------------------------------------------------------------
# Contrastive loss in blocks


def are_positives(targets, start, rows):
    """(rows, B) bool: True where a pair is a positive of the pairs start .. start + rows - 1."""
    same = targets[start:start + rows, None] == targets
    return same if same.ndim == 2 else same.any(dim=2)


def positive_counts(targets, rows):
    """(B,) int: number of positives of each pair, with itself."""
    return torch.cat([are_positives(targets, start, rows).sum(dim=1)
                      for start in range(0, len(targets), rows)])


def mean_targets(targets, counts, start, rows):
    """Rows start .. start + rows - 1 of the target (P + Q) / 2 (B, B).

    Row i of P is uniform over the positive sentences of video i. Column j of Q is uniform over the
    positive videos of sentence j. counts: result of `positive_counts`, as floats.
    """
    share = (1 / counts[start:start + rows, None] + 1 / counts) / 2
    return share * are_positives(targets, start, rows)


class BlockedLoss(torch.autograd.Function):
    """The contrastive loss of normalised v, t (B, E), log scale (), targets (B,) or (B, K).

    Z are the logits, r_i and c_j the log-sum-exps of row i and column j, and P is the target
    averaged over both directions (`mean_targets`):
        loss = (mean r + mean c) / 2 - sum(P * Z) / B
        dloss/dZ = (exp(Z - r) + exp(Z - c)) / 2B - P / B
    The forward pass saves r and c. The backward pass computes each block of Z again. c is
    accumulated over blocks of rows with logaddexp.
    """

    @staticmethod
    def forward(ctx, v, t, scale, targets, rows):
        B, counts = len(v), positive_counts(targets, rows).to(v.dtype)
        r, c, hits = v.new_empty(B), v.new_full((B,), -math.inf), v.new_zeros(())
        for start in range(0, B, rows):
            Z = scale.exp() * v[start:start + rows] @ t.T
            hits += (Z * mean_targets(targets, counts, start, rows)).sum()
            r[start:start + rows] = Z.logsumexp(dim=1)
            c = torch.logaddexp(c, Z.logsumexp(dim=0))
        ctx.save_for_backward(v, t, scale, targets, counts, r, c)
        ctx.rows = rows
        return (r.mean() + c.mean()) / 2 - hits / B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        v, t, scale, targets, counts, r, c = ctx.saved_tensors
        B, rows, factor = len(v), ctx.rows, scale.exp() * grad
        dv, dt, dscale = torch.empty_like(v), torch.zeros_like(t), torch.zeros_like(scale)
        with torch.autocast(v.device.type, enabled=False):
            for start in range(0, B, rows):
                Z = scale.exp() * v[start:start + rows] @ t.T
                d = (Z - r[start:start + rows, None]).exp_().add_((Z - c).exp_()).mul_(0.5 / B)
                d -= mean_targets(targets, counts, start, rows) / B
                dv[start:start + rows] = factor * (d @ t)
                dt.addmm_(d.T, v[start:start + rows])
                dscale += (d * Z).sum()
        return dv, factor * dt, grad * dscale, None, None


# ------------------------------------------------------------------------------------------------
# Captioning loss in chunks


def chunked_caption_loss(decoder, hidden, ids, is_text, *, count=None, rows=256):
    """caption_decoder.caption_loss(decoder.logits(hidden), ids, is_text, count=count) in a fifth of
    the memory; the same value and gradients.

    decoder  has `predictor` and `vocabulary` (a Linear), see caption_decoder.CaptionDecoder
    hidden   (B, L-1, W), the input of `predictor`
    rows     predictions per chunk: rows * V logits are in memory instead of B*L*V
    """
    targets, is_target = ids[:, 1:].long(), is_text[:, 1:]
    x = decoder.predictor(hidden[is_target])  # padding is dropped before the expensive layers
    layer, device = decoder.vocabulary, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    total = ChunkedCrossEntropy.apply(x, layer.weight, layer.bias, targets[is_target], rows, dtype,
                                      torch.is_grad_enabled())
    return total / (max(len(x), 1) if count is None else count)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of linear(x). The forward pass also computes the gradients.

    The gradient of the logits is softmax - one-hot. Each chunk of logits is turned into gradients
    of x, weight and bias, then freed. Computing chunks again in the backward pass would need as
    much memory and one more matrix product.

    x (n, W), weight (V, W), bias (V,), targets (n,)
    rows     rows of x per chunk
    dtype    of the matrix products
    learn    True = compute gradients
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, rows, dtype, learn):
        sum_dtype = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=sum_dtype, device=x.device)
        ctx.grads = [torch.zeros_like(p) for p in (x, weight, bias)] if learn else None
        x_cast, matrix, offset = (p.to(dtype) for p in (x, weight, bias))
        for first in range(0, len(x), rows):
            chunk = slice(first, first + rows)
            target = targets[chunk, None]
            error = F.linear(x_cast[chunk], matrix, offset).log_softmax(dim=-1, dtype=sum_dtype)
            total -= error.gather(1, target).sum()
            if learn:
                error.exp_().scatter_add_(1, target, -torch.ones_like(error[:, :1]))
                ctx.grads[2] += error.sum(dim=0)
                error = error.to(dtype)
                ctx.grads[0][chunk] = error @ matrix
                if ctx.grads[1].dtype == dtype:
                    ctx.grads[1].addmm_(error.T, x_cast[chunk])
                else:
                    ctx.grads[1] += error.T @ x_cast[chunk]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("the chunked caption loss keeps its gradients for one backward pass")
        grads, ctx.grads = ctx.grads, None
        return *(g.mul_(grad) for g in grads), None, None, None, None


# ------------------------------------------------------------------------------------------------
# Gradient caching


def in_pieces(encode, size, *inputs):
    """Gradient caching: a large batch in the memory of a small one.

    GradCache (arXiv 2101.06983), Sec. 3.2, Gradient Cache Technique.

    Each piece is encoded and its activations are freed. In the backward pass the piece is encoded
    again with the same random numbers, and the gradient of its embeddings is propagated into the
    weights. In terms of autograd, every piece is checkpointed (arXiv 1604.06174). The result equals
    that of the whole batch within rounding and costs one more forward pass. Dropout is equal too,
    because every piece draws the numbers of all rows and keeps its own (processes.global_rows). The
    exception are layers that use the whole batch, such as BatchNorm.

    encode   function of a piece of each input -> tuple of tensors (b, ...), computed row by row;
             random numbers come from torch's global generators
    size     rows per piece
    inputs   tensors (B, ...)
    returns  tuple of tensors (B, ...)
    """
    def encode_from(first, *rows):
        with piece(len(inputs[0]), first):
            return encode(*rows)

    devices = [inputs[0].device] if inputs[0].is_cuda else []
    starts, pieces = range(0, len(inputs[0]), size), []
    for first, *rows in zip(starts, *(x.split(size) for x in inputs)):
        # All pieces but the last restore the generators, so that all pieces start from one state.
        with torch.random.fork_rng(devices, enabled=first != starts[-1]):
            pieces.append(torch.utils.checkpoint.checkpoint(
                encode_from, first, *rows, use_reentrant=False))
    return tuple(map(torch.cat, zip(*pieces)))
