"""Hide tubes.

For each clip draw int(ratio * h * w) places, without repetition and all equally likely, and hide them in every frame. Tokens are
numbered time slowest: n = tau*h*w + y*w + x. Use only `generator` for chance, so that the same one gives the same mask.
"""


def tube_mask(batch, grid, ratio, generator):
    """grid (t, h, w) -> (batch, t*h*w) bool, True = hidden."""
    raise NotImplementedError
