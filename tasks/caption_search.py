"""Beam search and nucleus sampling: two alternatives to greedy decoding of captions.

`caption_decoder.generate(..., search=Beams(end))` keeps several candidate sentences per clip.
`search=Nucleus()` draws each token at random. In every step `generate` calls

    search(logits (n, V), words (n, tokens so far), ended (n,) bool, cache, text_cache)
        -> next tokens (m,), then words, ended and both caches of the m sentences they continue

The sentences of one clip stand next to each other, the best first.
"""

import math

import torch


class Beams:
    """Beam search: keep the `beams` best sentences so far. With one beam it is greedy decoding.

    end              id of the token that ends a sentence
    length_penalty   sentences are ranked by log-probability / tokens**length_penalty. The end token
                     counts. 0 favours short captions

    A finished sentence stays among the beams while its rank is high enough. An object serves one
    call of `generate`, because it keeps the log-probabilities (in nats) between steps.
    """

    def __init__(self, end, beams=4, length_penalty=1.0):
        if beams < 1:
            raise ValueError(f"need beams >= 1; got {beams}")
        self.end, self.beams, self.length_penalty, self.score = end, beams, length_penalty, None

    def __call__(self, logits, words, ended, *caches):
        """See the module docstring."""
        if self.score is None:  # the first step: one sentence per clip
            self.clips, self.score = len(logits), torch.zeros(len(logits), device=logits.device)
        # The best k tokens of each sentence are enough for the best k sentences.
        value, token = logits.topk(min(self.beams, logits.shape[1]))         # (n, k)
        log_prob = value - logits.logsumexp(dim=-1, keepdim=True)
        finished = torch.full_like(log_prob, -math.inf)
        finished[:, 0] = 0                               # one continuation, which costs nothing
        log_prob = torch.where(ended[:, None], finished, log_prob)
        token = token.masked_fill(ended[:, None], self.end)
        total = self.score[:, None] + log_prob
        length = (words != self.end).sum(dim=1) + 1
        rank = (total / length[:, None]**self.length_penalty).view(self.clips, -1)
        best = rank.topk(min(self.beams, rank.shape[1])).indices             # (clips, beams)
        first = rank.shape[1] * torch.arange(self.clips, device=rank.device)
        best = (best + first[:, None]).flatten()
        self.score = total.flatten()[best]
        rows = best // log_prob.shape[1]
        return token.flatten()[best], *reorder((words, ended, *caches), rows)


def reorder(cache, rows):
    """Select these rows of every tensor in nested lists and tuples; keep anything else."""
    if isinstance(cache, torch.Tensor):
        return cache.index_select(0, rows)
    if isinstance(cache, (list, tuple)):
        return type(cache)(reorder(part, rows) for part in cache)
    return cache


class Nucleus:
    """Nucleus sampling (arXiv 1904.09751, Sec. 3.1): draw the next token from the smallest set of
    tokens whose probabilities add up to top_p.

    top_p         in (0, 1]
    temperature   divides the logits first; below 1 it makes likely tokens likelier
    generator     torch.Generator of the draws; the same state gives the same captions
    """

    def __init__(self, top_p=0.9, temperature=1.0, generator=None):
        if not 0 < top_p <= 1 or temperature <= 0:
            raise ValueError(f"need 0 < top_p <= 1, temperature > 0; got {top_p}, {temperature}")
        self.top_p, self.temperature, self.generator = top_p, temperature, generator

    def __call__(self, logits, *state):
        """See the module docstring. Every sentence continues with one token."""
        prob, token = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        before = prob.cumsum(dim=-1) - prob          # exactly 0 for the most probable token
        cum_prob = prob.masked_fill(before >= self.top_p, 0).cumsum(dim=-1)
        device = "cpu" if self.generator is None else self.generator.device
        draw = torch.rand(len(logits), 1, generator=self.generator, device=device).to(cum_prob)
        chosen = (cum_prob < draw * cum_prob[:, -1:]).sum(dim=-1, keepdim=True)
        return token.gather(1, chosen)[:, 0], *state
