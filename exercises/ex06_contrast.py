"""Which sentence belongs to which video?

Row i of both is a pair; all others are negatives. Scores are cosines times exp(logit_scale). The
loss is the mean of two cross-entropies, video among texts and text among videos (CLIP, arXiv
2103.00020, Sec. 2.3 and Figure 3).
"""


def contrastive_loss(video, text, logit_scale):
    """video, text (B, E), not normalised; logit_scale () -> loss ()."""
    raise NotImplementedError
