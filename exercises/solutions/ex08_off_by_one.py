"""The wrong loss used token t as the target at position t, which the model has just read. The
target is token t + 1, if it is not padding."""

import torch.nn.functional as F


def caption_loss(logits, ids, is_text):
    return F.cross_entropy(logits[:, :-1][is_text[:, 1:]], ids[:, 1:][is_text[:, 1:]])
