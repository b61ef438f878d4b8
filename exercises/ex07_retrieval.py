"""Text-to-video retrieval, plain and with dual softmax.

similarity (texts, videos) holds exp(logit_scale) * cosines, with the pairs on its diagonal. Recall
at 1 is the share of texts, in percent, whose own video has a higher score than every other video. A
tie counts as wrong.

Dual softmax multiplies each score by a softmax over all texts, for each video (CAMoE, arXiv
2109.04290). It needs the sentences of the whole test set, which a user does not have. Before you
run it: can it make the result worse?
"""


def recall_at_1(similarity):
    """-> float, percent, text to video."""
    raise NotImplementedError


def dual_softmax(similarity):
    """-> new similarities (texts, videos), from which `recall_at_1` can be computed again."""
    raise NotImplementedError
