"""How many tokens does the encoder of a masked autoencoder see?

A clip of `frames` frames of `height` x `width` pixels is cut into tubelets of `tubelet` frames and
`patch` x `patch` pixels. Each time step has h * w places, with h = height // patch and
w = width // patch. int(ratio * h * w) of them are hidden, the same in all time steps (VideoMAE,
arXiv 2203.12602, Sec. 3.3). Note that the number is rounded down per time step, not per clip.
For a clip of 16 x 224 x 224 and a ratio of 0.9, the encoder of ViT-B sees 160 of 1568 tokens.
"""


def visible_tokens(frames, height, width, ratio, patch=16, tubelet=2):
    """-> int, number of tokens per clip that the encoder sees."""
    raise NotImplementedError
