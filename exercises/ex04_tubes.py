"""Hide tubes.

For each clip draw int(ratio * h * w) places, without repetition and all equally likely, and hide
them in every time step. Tokens are numbered with time slowest: n = tau*h*w + y*w + x. Take random
numbers from `generator` only, so that the same generator gives the same mask.
"""


def tube_mask(batch, grid, ratio, generator):
    """grid (t, h, w) -> (batch, t*h*w) bool, True = hidden."""
    raise NotImplementedError
