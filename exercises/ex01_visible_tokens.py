"""How many tokens does the encoder of a masked autoencoder see?

A clip of T frames of H x W pixels is cut into tubelets of `tubelet` frames and `patch` x `patch` pixels. Of each frame's places
int(ratio * places) are hidden, the same in all frames (VideoMAE, arXiv 2203.12602, Sec. 3.3). ViT-B sees 160 of 1568.
"""


def visible_tokens(frames, height, width, ratio, patch=16, tubelet=2):
    """-> int, tokens per clip that the encoder sees."""
    raise NotImplementedError
