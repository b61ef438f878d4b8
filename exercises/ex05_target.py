"""The target of the decoder: normalised pixels.

For each tubelet and colour channel, subtract the mean of the pixels and divide by their standard
deviation (unbiased, with 1e-6 added after the root). A model that always predicts the mean of the
tubelet predicts zeros in this normalisation. Why is its loss about 1?
"""


def normalised(tubelets):
    """(B, N, pixels, C) float -> the same shape."""
    raise NotImplementedError


def cost_of_zeros(tubelets):
    """-> float, the mean squared error between zeros and the normalised tubelets."""
    raise NotImplementedError
