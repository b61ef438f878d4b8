"""Multiply-adds per token: 3 D^2 for queries, keys and values, D^2 for the output projection, 8 D^2
for the MLP, and 2 N D for the pairs with all N tokens. A multiply-add is two FLOPs.

With 1568 tokens of width 768 the pairs are about a quarter of the cost. Their cost falls with the
square of the number of tokens, so masking makes a block 12.7 times cheaper."""


def block_flops(tokens, width):
    return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


def saving(tokens, visible, width):
    return block_flops(tokens, width) / block_flops(visible, width)
