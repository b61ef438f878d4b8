"""Draw a tube mask.

For each clip draw int(ratio * h * w) places, without repetition and with equal probability. Hide
them in every time step. The number of a token is n = tau*h*w + y*w + x. Take random numbers only
from `generator`. Generators with the same state then give the same mask.
"""


def tube_mask(batch, grid, ratio, generator):
    """grid (t, h, w) -> (batch, t*h*w) bool, True = hidden."""
    raise NotImplementedError
