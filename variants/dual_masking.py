"""Dual masking: the decoder reconstructs half of the tokens.

VideoMAE V2, arXiv 2303.16727, Sec. 3.2, Dual Masking.

    hidden (B, N)   True = the encoder does not see it        mae.tube_mask
    skipped (B, N)  True = the decoder does not predict it    running_cell_mask

The decoder of mae.py sees all N tokens; here it sees the visible and the decoded ones. It predicts
every token that is not skipped, hidden or not. The loss counts those that were hidden. The network
has VideoMAE's weights, so its runs and files are those of VideoMAE.

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
    """Which tokens the decoder leaves out: half of each 2 x 2 cell, moving on with time.

    Returns (batch, t*h*w) bool, True = not decoded. Every cell is decoded in full within three time
    steps; each sample starts at a random one of four.
    """
    t, h, w = grid
    if h % 2 or w % 2:
        raise ValueError(f"running cells are 2 x 2: a token grid of {h} x {w} does not divide")
    cells = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]])
    start = torch.randint(4, (batch, 1), generator=generator)
    step = (start + torch.arange(t)) % 4                                     # (batch, t)
    return cells[step].bool().repeat(1, 1, h // 2, w // 2).flatten(1)


class DualMaskedVideoMAE(mae.VideoMAE):
    """VideoMAE that decodes a part of the tokens."""

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
    """Which of the decoded tokens the encoder did not see, (B, n) bool: they count in the loss."""
    return hidden.gather(1, mae.split_by_mask(skipped, "skipped")[0])


def dual_masking_loss(prediction, target, weight, *, count=None):
    """Mean squared error over the tokens with weight.

    prediction, target  (B, n, P); target = mae.reconstruction_target(video, ~skipped)
    weight              (B, n), see `hidden_among_decoded`
    count               what the sum is divided by; default: the sum of the weights. For several
                        processes with one batch: that sum over all / processes
    """
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    error, weight = (prediction - target) ** 2, weight.to(prediction.dtype)
    return (error.mean(dim=-1) * weight).sum() / (weight.sum() if count is None else count)
