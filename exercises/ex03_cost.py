"""How many FLOPs does a block need, and how many does masking save?

Count only matrix products, and each multiply-add as two FLOPs, as torch.utils.flop_counter does. A
block of width D has the projection to queries, keys and values (D -> 3D), q k^T, attention weights
times v, the output projection (D -> D), and an MLP (D -> 4D -> D). The cost of projections and MLP
is proportional to N, that of the two products of attention to N^2.

Predict before you compute: a block of ViT-B has 1568 tokens, and 90 % are hidden. Is it then
cheaper by a factor of 10, more, or less?
"""


def block_flops(tokens, width):
    """-> int, FLOPs of one block on `tokens` tokens of one clip."""
    raise NotImplementedError


def saving(tokens, visible, width):
    """-> float, FLOPs with all `tokens` divided by FLOPs with only the `visible` ones."""
    raise NotImplementedError
