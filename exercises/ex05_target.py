"""What the decoder paints: normalised pixels.

From each tubelet and colour channel subtract the mean of its pixels and divide by their standard deviation (unbiased, with 1e-6
added after the root). Why does painting every tubelet with its mean, that is with zeros, then cost about 1?
"""


def normalised(tubelets):
    """(B, N, pixels, C) float -> the same shape."""
    raise NotImplementedError


def cost_of_painting_nothing(tubelets):
    """-> float, the mean squared error of all zeros against the normalised tubelets."""
    raise NotImplementedError
