"""The loss asked for the word that position t had just read. The target is the next word, and only
real next words count."""

import torch.nn.functional as F


def caption_loss(logits, ids, is_text):
    return F.cross_entropy(logits[:, :-1][is_text[:, 1:]], ids[:, 1:][is_text[:, 1:]])
