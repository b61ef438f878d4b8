"""The output is tanh(0) * y: its derivative by y is 0, so the attention and its norm learn nothing in the first step; by the
gate it is y, which is not 0. After one step the gate is open and all of them learn."""

import torch
from torch import nn

from attention import Attention


class Bridge(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width, heads, context_width=context_width)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, context):
        return x + self.gate.tanh() * self.attn(self.norm(x), keys_from=context)


def silent_at_step_one():
    return {"norm", "attn"}
