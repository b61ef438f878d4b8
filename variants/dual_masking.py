"""Dual masking: the decoder reconstructs only half of the tokens.

VideoMAE V2, arXiv 2303.16727, Sec. 3.2, Dual Masking.

    hidden (B, N)   True = not an input of the encoder     mae.tube_mask
    skipped (B, N)  True = not predicted by the decoder    running_cell_mask

The decoder of mae.py reads all N tokens. Here it reads only the visible tokens and those that it
predicts. It predicts every token that is not skipped, hidden or visible, and the loss uses the
hidden ones. The weights have the same names and shapes as VideoMAE's, so runs and files are
interchangeable.

>>> model = DualMaskedVideoMAE("tiny", frames=8, image_size=64)
>>> rng = torch.Generator().manual_seed(0)
>>> hidden = mae.tube_mask(2, model.grid, 0.75, rng)
>>> skipped = running_cell_mask(2, model.grid, rng)
>>> prediction = model(torch.zeros(2, 3, 8, 64, 64), hidden, skipped)
>>> prediction.shape, hidden_among_decoded(hidden, skipped).shape
(torch.Size([2, 128, 384]), torch.Size([2, 128]))
"""

import torch

import mae


def running_cell_mask(batch, grid, generator=None):
    """Choose the tokens that the decoder skips: half of each 2 x 2 cell, another half in each step.

    Returns (batch, t*h*w) bool, True = skipped. Four patterns alternate, and each sample starts at
    a random one. Within three time steps every place is decoded at least once.
    """
    t, h, w = grid
    if h % 2 or w % 2:
        raise ValueError(f"running cells are 2 x 2: a token grid of {h} x {w} cannot be divided")
    cells = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]])
    start = torch.randint(4, (batch, 1), generator=generator)
    step = (start + torch.arange(t)) % 4                                     # (batch, t)
    return cells[step].bool().repeat(1, 1, h // 2, w // 2).flatten(1)


class DualMaskedVideoMAE(mae.VideoMAE):
    """A VideoMAE that decodes only a part of the tokens."""

    def forward(self, video, hidden, skipped=None):
        """As VideoMAE.forward, for the tokens that are not skipped -> (B, n, P).

        skipped  (B, N) bool, the same count in every row. None = decode the hidden tokens, as
                 VideoMAE does
        """
        if skipped is None:
            return super().forward(video, hidden)
        decoded, _ = mae.split_by_mask(skipped, "skipped")
        return super().forward(video, hidden, decoded.to(video.device))


def hidden_among_decoded(hidden, skipped):
    """(B, n) bool, True = this decoded token was hidden from the encoder, so the loss uses it."""
    return hidden.gather(1, mae.split_by_mask(skipped, "skipped")[0])


def dual_masking_loss(prediction, target, weight, *, count=None):
    """Weighted mean squared error.

    prediction, target  (B, n, P); target = mae.reconstruction_target(video, ~skipped)
    weight              (B, n), see `hidden_among_decoded`
    count               divisor of the weighted sum; default: the sum of the weights. If processes
                        share a batch: the sum over all of them, divided by their number
    """
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    error, weight = (prediction - target) ** 2, weight.to(prediction.dtype)
    return (error.mean(dim=-1) * weight).sum() / (weight.sum() if count is None else count)
