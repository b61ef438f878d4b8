"""The target of the decoder: normalised pixels.

From each tubelet and colour channel subtract the mean of its pixels, and divide by their standard
deviation (unbiased, with 1e-6 added after the root). Why does it cost about 1 to predict the mean
of every tubelet, that is zeros?
"""


def normalised(tubelets):
    """(B, N, pixels, C) float -> the same shape."""
    raise NotImplementedError


def cost_of_zeros(tubelets):
    """-> float, the mean squared error of zeros against the normalised tubelets."""
    raise NotImplementedError
