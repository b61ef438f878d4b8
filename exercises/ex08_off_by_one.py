"""This captioning loss falls quickly to zero, and the captions are nonsense. Why?

Logits at position t have seen the words 0..t. ids are (B, L): start, words, end, padding; is_text
says where they are real. The end must be learned; the padding must not, and the start is given.
Correct it.
"""

import torch.nn.functional as F


def caption_loss(logits, ids, is_text):
    """-> mean loss (), in nats.

    logits   (B, L, V), those of the last position too (caption_decoder.caption_loss gets L-1)
    ids      (B, L) int64
    is_text  (B, L) bool, True = a real token
    """
    return F.cross_entropy(logits[is_text], ids[is_text])
