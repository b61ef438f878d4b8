"""Find the video for each sentence, and once more with all the other sentences known.

similarity (texts, videos) holds exp(logit_scale) * cosines, with the pairs on its diagonal. Recall
at 1 is the share of texts, in percent, whose own video scores higher than every other; equal scores
count against you.

The dual softmax multiplies each score by a softmax over all texts, for each video (CAMoE, arXiv
2109.04290). No user has all other sentences. Before you run it: can it make things worse?
"""


def recall_at_1(similarity):
    """-> float, percent, text to video."""
    raise NotImplementedError


def dual_softmax(similarity):
    """-> (texts, videos), to be ranked like the plain ones."""
    raise NotImplementedError
