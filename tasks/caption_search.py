"""Other ways to choose the tokens of a caption than greedy decoding: beams and nucleus sampling.

`caption_decoder.generate(..., search=Beams(end))` keeps the best sentences instead of the best next
token. `search=Nucleus()` draws tokens at random. In every step the loop of `generate` calls

    search(logits (n, V), words (n, tokens so far), ended (n,) bool, cache, text_cache)
        -> next tokens (m,), and the same four for the m sentences that these tokens continue

Sentences of one clip are neighbours, the best first.
"""

import math

import torch


class Beams:
    """Beam search: keep the `beams` best sentences so far. With one beam it is greedy decoding.

    end              id of the token that closes a sentence
    length_penalty   sentences are ranked by log-probability / tokens**length_penalty, the end
                     included; 0 favours short captions. A finished one stays while it ranks

    An object serves one call of `generate`: it keeps the log-probabilities, in nats.
    """

    def __init__(self, end, beams=4, length_penalty=1.0):
        if beams < 1:
            raise ValueError(f"need beams >= 1; got {beams}")
        self.end, self.beams, self.length_penalty, self.score = end, beams, length_penalty, None

    def __call__(self, logits, words, ended, *caches):
        """See the module docstring."""
        if self.score is None:  # the first step: one sentence per clip
            self.clips, self.score = len(logits), torch.zeros(len(logits), device=logits.device)
        value, token = logits.topk(min(self.beams, logits.shape[1]))         # (n, k) are enough
        gain = value - logits.logsumexp(dim=-1, keepdim=True)
        stay = torch.full_like(gain, -math.inf)
        stay[:, 0] = 0                                   # a finished sentence continues as itself
        gain = torch.where(ended[:, None], stay, gain)
        token = token.masked_fill(ended[:, None], self.end)
        total = self.score[:, None] + gain
        length = (words != self.end).sum(dim=1) + 1
        rank = (total / length[:, None]**self.length_penalty).view(self.clips, -1)
        best = rank.topk(min(self.beams, rank.shape[1])).indices             # (clips, beams)
        first = rank.shape[1] * torch.arange(self.clips, device=rank.device)
        best = (best + first[:, None]).flatten()
        self.score = total.flatten()[best]
        rows = best // gain.shape[1]
        return token.flatten()[best], *reorder((words, ended, *caches), rows)


def reorder(cache, rows):
    """Rows `rows` of every tensor in nested lists and tuples; anything else stays as it is."""
    if isinstance(cache, torch.Tensor):
        return cache.index_select(0, rows)
    if isinstance(cache, (list, tuple)):
        return type(cache)(reorder(part, rows) for part in cache)
    return cache


class Nucleus:
    """Draw from the fewest tokens that hold a share top_p of the probability (arXiv 1904.09751,
    Sec. 3.1).

    top_p         in (0, 1]
    temperature   below 1 it sharpens the probabilities first
    generator     torch.Generator of the draws; the same state gives the same captions
    """

    def __init__(self, top_p=0.9, temperature=1.0, generator=None):
        if not 0 < top_p <= 1 or temperature <= 0:
            raise ValueError(f"need 0 < top_p <= 1, temperature > 0; got {top_p}, {temperature}")
        self.top_p, self.temperature, self.generator = top_p, temperature, generator

    def __call__(self, logits, *state):
        """See the module docstring. Each sentence continues."""
        chance, token = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        before = chance.cumsum(dim=-1) - chance          # exactly 0 for the most probable token
        mass = chance.masked_fill(before >= self.top_p, 0).cumsum(dim=-1)
        device = "cpu" if self.generator is None else self.generator.device
        draw = torch.rand(len(logits), 1, generator=self.generator, device=device).to(mass)
        chosen = (mass < draw * mass[:, -1:]).sum(dim=-1, keepdim=True)
        return token.gather(1, chosen)[:, 0], *state
