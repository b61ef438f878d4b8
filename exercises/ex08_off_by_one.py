"""This captioning loss quickly falls to zero, but the captions are nonsense. Why? Correct it.

The logits at position t depend on tokens 0 to t. ids (B, L) are start, words, end, padding. The
model must learn to predict the end token, but not the padding. The start token is given.
"""

import torch.nn.functional as F


def caption_loss(logits, ids, is_text):
    """-> mean loss (), in nats.

    logits   (B, L, V), also at the last position (caption_decoder.caption_loss gets only L-1)
    ids      (B, L) int64
    is_text  (B, L) bool, False = padding
    """
    return F.cross_entropy(logits[is_text], ids[is_text])
