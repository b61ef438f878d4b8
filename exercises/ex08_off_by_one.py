"""This captioning loss falls quickly to zero, and the captions are nonsense. Why?

logits at position t have seen the words 0..t. ids are (B, L): start, words, end, padding; is_text says where they are real. The
end must be learned, the padding not, and the start is given. Mend it.
"""

import torch.nn.functional as F


def caption_loss(logits, ids, is_text):
    """logits (B, L, V), those of the last position included (`caption_decoder.caption_loss` gets L-1 of them), ids (B, L) int64, is_text (B, L) bool, True = a real token -> mean loss (), in nats."""
    return F.cross_entropy(logits[is_text], ids[is_text])
