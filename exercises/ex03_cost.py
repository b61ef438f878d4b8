"""What does a block cost, and what does hiding save?

Count multiply-adds times two, of matrix products alone, as torch.utils.flop_counter does. A block
of width D has the projection to queries, keys and values (D -> 3D), q k^T, weights times v, the
projection back (D -> D), and an MLP (D -> 4D -> D). The projections and the MLP grow with N, the
two products of attention with N^2.

Predict before you compute: hiding 90 % makes a block of ViT-B on 1568 tokens cheaper by a factor of
10, more, or less?
"""


def block_flops(tokens, width):
    """-> int, FLOPs of one block on `tokens` tokens of one clip."""
    raise NotImplementedError


def saving(tokens, visible, width):
    """-> float, how many times cheaper a block is on `visible` of the `tokens`."""
    raise NotImplementedError
