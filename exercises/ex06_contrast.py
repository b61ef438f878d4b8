"""The contrastive loss: which sentence belongs to which video?

Video i and text i are a pair; all other combinations are negatives. Scores are cosines times
exp(logit_scale). The loss is the mean of two cross-entropies: each video chooses among all texts,
and each text among all videos (CLIP, arXiv 2103.00020, Sec. 2.3 and Figure 3).
"""


def contrastive_loss(video, text, logit_scale):
    """video, text (B, E), not normalised; logit_scale () -> loss ()."""
    raise NotImplementedError
