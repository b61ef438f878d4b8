"""Divided space-time attention, an alternative to joint attention in mae.py.

    x (B, N, D) --> attention over time at each place --> attention over space in each step --> MLP

TimeSformer, arXiv 2102.05095, Sec. 3, Space-Time Self-Attention Models. A token is compared with
t + N/t others instead of N. However, the attention over time has its own projections. At ViT-B's
width a block costs 3 % more than a joint one for all 1568 tokens, and 29 % more for the 160 visible
tokens. Divided attention is cheaper for longer clips. tools/claims.py compares the accuracies.

>>> model = DividedVideoMAE("tiny", frames=8, image_size=40)
>>> hidden = mae.tube_mask(2, model.grid, 0.75, torch.Generator().manual_seed(0))
>>> model(torch.zeros(2, 3, 8, 40, 40), hidden).shape
torch.Size([2, 72, 384])
"""

import torch
from torch import nn

import mae
from attention import Attention, Block


class DividedBlock(Block):
    """Attention over time, attention over space, MLP; each with its own norm and residual.

    times    t, time steps of a clip. Every step must have the same places: all of them, or the
             visible ones of a tube mask

    Other arguments as for Block.
    """

    def __init__(self, width, heads, times, *, eps, bias, cosine, **options):
        super().__init__(width, heads, eps=eps, bias=bias, cosine=cosine, **options)
        self.times = times
        self.norm_time = nn.LayerNorm(width, eps=eps)
        self.attn_time = Attention(width, heads, bias=bias, cosine=cosine)

    def forward(self, x, context=None):
        """x (B, N, D) -> (B, N, D). ValueError for an attention mask, or another length of clip."""
        masked = context and any(value is not None for value in vars(context).values())
        if masked or x.shape[1] % self.times:
            raise ValueError(f"divided attention needs clips of {self.times} time steps with the "
                             "same places in each, and no attention mask")
        B, N, D = x.shape
        time = x.unflatten(1, (self.times, -1)).transpose(1, 2).flatten(0, 1)    # (B*places, t, D)
        time = self.attn_time(self.norm_time(time)).unflatten(0, (B, -1)).transpose(1, 2)
        x = x + self.drop_path(time.reshape(B, N, D))
        space = self.norm1(x).unflatten(1, (self.times, -1))                     # (B, t, places, D)
        space = self.attn(space.flatten(0, 1)).view(B, N, D)
        x = x + self.drop_path(space if self.gamma1 is None else self.gamma1 * space)
        out = self.mlp(self.norm2(x))
        return x + self.drop_path(out if self.gamma2 is None else self.gamma2 * out)


class DividedEncoder(mae.Encoder):
    """mae.Encoder with divided attention, for clips of one length."""

    def block_class(self, width, heads, **options):
        return DividedBlock(width, heads, self.grid[0], **options)

    def start(self, video, visible=None):
        if self.grid_of(*video.shape[2:])[0] != self.grid[0]:
            raise ValueError("this divided attention is for clips of "
                             f"{self.grid[0] * self.tubelet} frames, not of {video.shape[2]}")
        return super().start(video, visible)


class Divided:
    """Base of the two networks below. Older runs have space_time="divided" in their config."""

    encoder_class, classifier = DividedEncoder, "DividedVideoClassifier"

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return super().from_config({k: v for k, v in config.items() if k != "space_time"})

    def to_official(self):
        """Raises ValueError, because the official code has no such network."""
        raise ValueError("divided attention is unknown to the official code")


class DividedVideoMAE(Divided, mae.VideoMAE):
    """VideoMAE whose encoder has divided attention; the decoder stays joint."""

    model_name = "DividedVideoMAE"

    def forward(self, video, hidden):
        """As VideoMAE.forward. ValueError unless every frame hides the same places."""
        steps = hidden.unflatten(1, (self.grid[0], -1))
        if (steps != steps[:, :1]).any():
            raise ValueError("divided attention needs the same places hidden in every frame: "
                             "a tube mask")
        return super().forward(video, hidden)


class DividedVideoClassifier(Divided, mae.VideoClassifier):
    """VideoClassifier with divided attention."""

    model_name = "DividedVideoClassifier"
