"""Multiply-adds of one token: 3 D^2 to queries, keys and values, D^2 back, 8 D^2 in the MLP, and N
D twice for its N pairs; times two. With 1568 tokens of width 768 the pairs are a quarter of it
all, and pairs fall with the square: 12.7 times cheaper."""


def block_flops(tokens, width):
    return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


def saving(tokens, visible, width):
    return block_flops(tokens, width) / block_flops(visible, width)
