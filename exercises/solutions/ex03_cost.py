"""12 N D^2 for the four projections' worth of matrices, 2 N^2 D for attention, times two. With 1568 tokens of width 768
attention is a quarter of it, so hiding 90 % saves more than ten times: 12.7."""


def block_flops(tokens, width):
    return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


def saving(tokens, visible, width):
    return block_flops(tokens, width) / block_flops(visible, width)
