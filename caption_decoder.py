"""Write a sentence about a video, one word at a time, looking at the video before each word.

Why: a contrastive loss asks which of these captions belongs to this clip, and two coarse summaries
answer that. A captioning loss asks for every word of the caption in turn, so the video tokens have
to keep what a summary drops: who, what, how many, in which order. "Align before fuse": each encoder
first works alone, the contrastive loss aligns their summaries, and only then does this decoder let
words look at the video. So one forward pass of both encoders serves both losses, and InternVideo
simply adds them. (CoCa, arXiv 2205.01917, Sec. 3.2, Contrastive Captioners Pretraining; InternVideo,
arXiv 2212.03191, Sec. 3.2, Self-Supervised Video Pretraining.)

    video tokens (B, M, C) -- Q learned queries ask --> pooled (B, Q, W) ---+ once per video
                                                                            | keys and values
    text features (B, L, W) -norm-> [ self, causal -> cross ] x depth -> hidden (B, L, W)
                                                                            |
      hidden -- predictor: norm, linear, gelu, norm --> vocabulary --> logits (B, L, V)
      text features:  <start>  a     dog   runs         position t has seen words 0..t
      must predict:   a        dog   runs  <end>        and answers for word t+1

The letters are those of attention.py, but C: width of a video token (not colours). M: number of video
tokens, all of them, S+1 per frame with the class token of each.

The idea, in steps:
1. `CaptionDecoder.pool`: M grows with frames and pixels (1576 for 8 frames of ViT-B), a caption
   needs a few facts. Q learned queries, the same for every video, each ask the tokens one question;
   all that follows sees Q answers, whatever M was (CoCa, Sec. 3.2, Attentional Poolers). No
   position code is added on the way, so the order of the tokens is irrelevant here: what is known
   about time is inside the tokens. (Official: places slowest, frames fastest. Any order will do.)
2. There is no word embedding. The input are the features of a causal text tower (CLIP's), whose
   token t has seen words 0..t and nothing later: half of the language model is there already. So one causal tower
   serves both losses: contrast takes its token at the end, projected, captioning all tokens, not projected.
3. `SelfBlock` differs from `attention.Block` in three ways. Attention and MLP are computed side by side,
   from one norm and one product, instead of in turn ("parallel blocks": PaLM, arXiv 2204.02311, Sec. 2, Model
   Architecture). All query heads share ONE head of keys and values (arXiv 1911.02150, Sec. 3,
   Multi-Query Attention), so that the cache of a decoder is `heads` times smaller. `rotate` turns
   queries and keys by their position, after which their dot product knows only how far apart they are
   (arXiv 2104.09864, Sec. 3.2, Rotary Position Embedding).
4. `CrossBlock` looks at the pooled answers. It has no mask: the video is not the future.
5. `caption_loss`, teacher forcing: the true words are the input, whatever the model would have
   said, so all L-1 predictions are one pass. `chunked_caption_loss` is the same number with the
   same gradients, without ever holding (B*L, V) logits.
6. `generate`, decoding: now its own words are the input and they come one by one. `step` keeps keys
   and values of the past in a cache, those of the text tower and of this decoder, and, once, those of the pooled
   video; computed for each new word are its own queries, keys, values, MLPs and logits. The numbers are those of the full pass.

Tied, masked, ignored: the vocabulary layer is NOT tied to the text tower's embedding. Attention
over text is causal and needs no padding mask, since padding comes last. Padding is ignored in the
loss; the end token is not: a decoder that never learns to predict it never stops. The start token
is never a target, and the text features of the last position are never an input. (Without that shift the loss falls to
zero: the model is asked for the word that it has just read.)

Where we differ from the official code (CoTrain clip_decoders.py, coca.py), with equal numbers:
cross attention runs as ONE head with L*heads queries, which saves all transposes; the loss skips
padding before the vocabulary layer. Not equal: fresh weights have a deviation of 0.02 * sqrt(768 / W), for with 0.02 a
narrow decoder attends evenly to everything for hundreds of steps (LOG.md). The official project never released a way to generate text, nor
the recipe that trains this decoder: step 6 is ours. The norms' offset `beta` is a buffer there,
zero and never trained; ours is too, and a file with another beta is honoured.

Numbers: with W = 512, six layers and V = 49408 it has 71 M parameters: 45 M in the layers, 25 M in
the vocabulary. 32 captions of 77 tokens are 2432 predictions, 480 MB of float32 logits at once: the
plain loss peaks at 1400 MB, the chunked one at 300 MB, in two thirds of the time when a third is
padding. The cache writes 64 words five times as fast as `forward` anew for each word, nine times
for four videos at once (one core; what remains is reading 284 MB of weights per word).

>>> decoder = CaptionDecoder(64, heads=4, depth=2, visual_width=48, vocabulary=100, queries=8)
>>> video, text = torch.zeros(2, 40, 48), torch.zeros(2, 10, 64)  # 10 words: start, eight, end
>>> logits = decoder(video, text[:, :-1])
>>> logits.shape                                                   # (B, L-1, V)
torch.Size([2, 9, 100])
>>> ids, is_text = torch.ones(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.bool)
>>> round(caption_loss(logits, ids, is_text).item(), 1)            # at the start near ln V = 4.6
4.6
>>> _, cache = decoder.step(text[:, :1], decoder.pool(video), None)  # decoding, word by word
>>> hidden, cache = decoder.step(text[:, 1:2], None, cache)
>>> torch.allclose(decoder.logits(hidden), logits[:, 1:2], atol=1e-5)
True
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Mask, attention
from weights import Rule, WeightsError, commonest

# ------------------------------------------------------------------------------------------------
# Layers


class Norm(nn.Module):
    """LayerNorm with a learned factor gamma; the offset beta is a buffer, zero unless a file says
    otherwise, and never trained. x (..., width) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, eps=1e-5)


def swiglu(x):
    """(..., 2*n) -> (..., n): the first half, gated by silu of the second ("GLU Variants Improve
    Transformer", arXiv 2002.05202, Sec. 2)."""
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def rotary_frequencies(head_width):
    """(K/2,) float32, radians per position: 1 for the first pair of channels, down to 1/10000."""
    return 1.0 / 10000 ** (torch.arange(0, head_width, 2).float() / head_width)


def rotate(x, angles):
    """Turn the pairs of channels (j, j + K/2) of x (B, L, heads, K) by angles (L, K/2).

    q turned by a, k turned by b: their product depends on a - b alone, on the distance.
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]                  # (L, 1, K/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def multi_query(q, k, v, mask=None):
    """Attention with one head of keys and values. q (B, L, heads, K), k, v (B, 1, N, K) ->
    (B, L, heads*K). Without a mask the heads are just more queries, and no tensor is transposed."""
    if mask is None:
        return attention(q.flatten(1, 2)[:, None], k, v).reshape(*q.shape[:2], -1)
    return attention(q.transpose(1, 2), k, v, mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Queries of width D look at tokens of another width, through one head of keys and values."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width // heads, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def keys(self, context):
        """context (B, N, context_width) -> keys, values (B, 1, N, K): the part worth caching."""
        return self.kv(context)[:, None].chunk(2, dim=-1)

    def forward(self, x, k, v):
        """x (B, L, D) -> (B, L, D)."""
        return self.proj(multi_query(self.q(x).unflatten(-1, (self.heads, -1)), k, v))


class Pooler(nn.Module):
    """Learned queries compress any number of tokens to Q: no residual, for there is nothing to
    keep, and no MLP. Here alone the context has a norm."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm = Norm(width)
        self.context_norm = Norm(context_width)
        self.attn = CrossAttention(width, heads, context_width)

    def forward(self, queries, context):
        """queries (Q, W), context (B, M, C) -> (B, Q, W)."""
        queries = self.norm(queries).expand(context.shape[0], -1, -1)
        return self.attn(queries, *self.attn.keys(self.context_norm(context)))


class SelfBlock(nn.Module):
    """x + attention(norm x) + mlp(norm x): both read the same norm, through one matrix."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.heads = heads
        self.sizes = (width, width // heads, width // heads, 2 * mlp_width)  # q, k, v, mlp
        self.norm = Norm(width)
        self.register_buffer("frequencies", rotary_frequencies(width // heads))
        self.fused = nn.Linear(width, sum(self.sizes), bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.fc2 = nn.Linear(mlp_width, width, bias=False)

    def angles(self, first, count, device):
        """Of positions first .. first + count - 1, in radians: (count, K/2)."""
        frequencies = self.frequencies
        if frequencies.dtype not in (torch.float32, torch.float64):  # model.bfloat16() rounded them
            frequencies = rotary_frequencies(2 * len(frequencies)).to(device)
        return torch.arange(first, first + count, device=device)[:, None] * frequencies

    def forward(self, x, past=None):
        """x (B, L, W); past: keys and values (B, 1, n, K) of earlier tokens, or None.
        Returns (B, L, W) and the keys and values of all n + L."""
        angles = self.angles(0 if past is None else past[0].shape[2], x.shape[1], x.device)
        q, k, v, inner = self.fused(self.norm(x)).split(self.sizes, dim=-1)
        q = rotate(q.unflatten(-1, (self.heads, -1)), angles)                # (B, L, heads, K)
        k, v = rotate(k[:, :, None], angles).transpose(1, 2), v[:, None]     # (B, 1, L, K)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = Mask(causal=True) if x.shape[1] > 1 else None  # one token: everything is its past
        return x + self.proj(multi_query(q, k, v, mask)) + self.fc2(swiglu(inner)), (k, v)


class CrossBlock(nn.Module):
    """x + attention(norm x, pooled video) + mlp(norm x), again side by side."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.norm = Norm(width)
        self.attn = CrossAttention(width, heads, width)
        self.fc1 = nn.Linear(width, 2 * mlp_width, bias=False)
        self.fc2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x, k, v):
        """x (B, L, W), k, v (B, 1, Q, K) -> (B, L, W)."""
        normed = self.norm(x)
        return x + self.attn(normed, k, v) + self.fc2(swiglu(self.fc1(normed)))


class CaptionDecoder(nn.Module):
    """From video tokens and the text so far to the next word, at all positions at once.

    width         W, of text features and decoder; a multiple of heads
    depth         layers, each a SelfBlock and a CrossBlock
    visual_width  C, width of a video token
    vocabulary    V
    queries       Q, learned queries of the pooler
    mlp_width     default 4*W
    """

    def __init__(self, width, *, heads, depth=6, visual_width, vocabulary, queries=256,
                 mlp_width=None):
        super().__init__()
        if width % heads or width // heads % 2:
            raise ValueError(f"width {width} does not divide into {heads} heads of an even width")
        mlp_width = mlp_width or 4 * width
        self.config = {"model": "CaptionDecoder", "width": width, "heads": heads, "depth": depth,
                       "visual_width": visual_width, "vocabulary": vocabulary, "queries": queries,
                       "mlp_width": mlp_width}
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.pooler = Pooler(width, heads, visual_width)
        self.pooled_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.self_blocks = nn.ModuleList(SelfBlock(width, heads, mlp_width) for _ in range(depth))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, heads, mlp_width) for _ in range(depth))
        self.predictor = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                       nn.LayerNorm(width))
        self.vocabulary = nn.Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 * (768 / width)**0.5)  # official: 0.02 whatever the width
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pool(self, visual):
        """visual (B, M, C), tokens in any order -> (B, Q, W). Once per video is enough."""
        return self.pooled_norm(self.pooler(self.queries, visual))

    def step(self, text, pooled, cache):
        """Go on by L tokens (decoding: one; teacher forcing: all of them).

        text     (B, L, W), features of the new tokens
        pooled   (B, Q, W) from `pool`; read at the first step only, None later
        cache    None at the first step, then what the step before returned: for each layer a pair
                 (keys, values) (B, 1, n, K) of the text and one (B, 1, Q, K) of the pooled video
        returns  hidden (B, L, W) and the new cache
        """
        if cache is None:
            cache = [(None, block.attn.keys(pooled)) for block in self.cross_blocks]
        x, grown = self.text_norm(text), []
        for self_block, cross_block, (seen, video) in zip(self.self_blocks, self.cross_blocks,
                                                          cache):
            x, seen = self_block(x, seen)
            x = cross_block(x, *video)
            grown.append((seen, video))
        return x, grown

    def hidden(self, visual, text):
        """What the decoder knows after each token, before the predictor: the input of the chunked
        loss and of a question-answering head. (B, M, C), (B, L, W) -> (B, L, W)."""
        return self.step(text, self.pool(visual), None)[0]

    def logits(self, hidden):
        """(..., W) -> (..., V)"""
        return self.vocabulary(self.predictor(hidden))

    def forward(self, visual, text):
        """Teacher forcing: scores for the word after each position.

        visual   (B, M, C) float, tokens of the last vision layer, class tokens included, no norm
        text     (B, L, W) float, from a causal text tower, after its last norm, not projected
        returns  logits (B, L, V); position t has seen text 0..t
        """
        return self.logits(self.hidden(visual, text))

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None):
        """Load the caption decoder of InternVideo-MM.

        source   path or {name: tensor}, see weights.read: the decoder alone, or a whole checkpoint,
                 of which `caption_decoder.*` is read and the rest is left alone
        heads    query heads; default: what the shapes say (published: W/64)
        returns  the decoder in eval mode
        raises   WeightsError: no decoder inside, or one that does not fit to the last tensor
        """
        tensors, config = weights.part(*weights.read(source), "caption_decoder")
        name = "the dict of weights" if isinstance(source, dict) else str(source)
        if config.get("model") == "CaptionDecoder":  # a run of ours
            return weights.fill(weights.build(cls.from_config, config, name), tensors, name=name).eval()
        prefix = "caption_decoder."
        if not any(key.startswith(prefix) for key in tensors):
            prefix = ""
        tensors = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        sizes = official_sizes(tensors, prefix, name, heads)
        try:
            decoder = cls(**sizes)
        except ValueError as error:
            raise WeightsError(f"{name}: {error}") from None
        rules = [Rule(key, prefix + official_name(key)) for key in decoder.state_dict()]
        weights.fill(decoder, tensors, rules, name=name)
        check_rotary(decoder, prefix, name)
        return decoder.eval()

    def to_official(self):
        """{official name: tensor}, what InternVideo's own code calls them."""
        return weights.official(self, [Rule(key, "caption_decoder." + official_name(key)) for key in self.state_dict()])


# ------------------------------------------------------------------------------------------------
# Loss: be surprised as little as possible by the next word


def caption_loss(logits, ids, is_text, *, count=None):
    """Mean surprise at the next word, in nats; ln V for a decoder that knows nothing.

    logits   (B, L-1, V): the decoder's answers to text features 0..L-2
    ids      (B, L) int: start, words, end, padding; words 1..L-1 are the targets
    is_text  (B, L) bool, True = start, word or end; False = padding, which is ignored
    count    what the sum is divided by; default: the number of targets in this batch. When several
             processes share a batch: all their targets / processes.
    """
    targets, wanted = shifted(ids, is_text, logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(wide, targets.masked_fill(~wanted, -100).flatten(), reduction="sum")
    return total / (wanted.sum().clamp(min=1) if count is None else count)


def chunked_caption_loss(decoder, hidden, ids, is_text, *, count=None, rows=256):
    """`caption_loss(decoder.logits(hidden), ...)`, value and gradients, in a fifth of the memory.

    hidden  (B, L-1, W) from decoder.hidden
    rows    predictions at a time: rows * V logits are in memory, never B*L*V
    """
    targets, wanted = shifted(ids, is_text, hidden)
    x = decoder.predictor(hidden[wanted])  # padding is dropped before the costly layer, not after
    layer, kind = decoder.vocabulary, x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    total = ChunkedCrossEntropy.apply(x, layer.weight, layer.bias, targets[wanted], rows, dtype,
                                      torch.is_grad_enabled())
    return total / (max(len(x), 1) if count is None else count)


def shifted(ids, is_text, output):
    """The shift by one: position t of the output is held against word t+1. (B, L-1) each."""
    if output.shape[:2] != (ids.shape[0], ids.shape[1] - 1):
        raise ValueError(f"{tuple(ids.shape)} word ids need {ids.shape[0]} x {ids.shape[1] - 1} "
                         f"predictions, got {output.shape[0]} x {output.shape[1]}: the decoder's "
                         "input are the text features without the last position")
    return ids[:, 1:].long(), is_text[:, 1:]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of linear(x), its gradients found in the forward pass.

    The gradient of a softmax cross entropy is softmax - one-hot, known as soon as the logits are;
    so each chunk of logits is turned into gradients of x, weight and bias and thrown away.
    Recomputing chunks in the backward pass instead would need as much memory and one more product.

    x (n, W), weight (V, W), bias (V,), targets (n,); dtype of the products; learn = with gradients
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, rows, dtype, learn):
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        ctx.grads = [torch.zeros_like(p) for p in (x, weight, bias)] if learn else None
        narrow, matrix, offset = (p.to(dtype) for p in (x, weight, bias))
        for first in range(0, len(x), rows):
            part = slice(first, first + rows)
            wanted = targets[part, None]
            error = F.linear(narrow[part], matrix, offset).log_softmax(dim=-1, dtype=wide)
            total -= error.gather(1, wanted).sum()
            if learn:
                error.exp_().scatter_add_(1, wanted, -torch.ones_like(error[:, :1]))
                ctx.grads[2] += error.sum(dim=0)
                error = error.to(dtype)
                ctx.grads[0][part] = error @ matrix
                if ctx.grads[1].dtype == dtype:
                    ctx.grads[1].addmm_(error.T, narrow[part])
                else:
                    ctx.grads[1] += error.T @ narrow[part]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("the chunked caption loss keeps its gradients for one backward pass")
        grads, ctx.grads = ctx.grads, None
        return *(g.mul_(grad) for g in grads), None, None, None, None


# ------------------------------------------------------------------------------------------------
# Decoding


def reorder(cache, index):
    """Rows `index` of every tensor in nested lists and tuples; anything else stays as it is."""
    if isinstance(cache, torch.Tensor):
        return cache.index_select(0, index)
    if isinstance(cache, (list, tuple)):
        return type(cache)(reorder(part, index) for part in cache)
    return cache


@torch.no_grad()
def generate(decoder, text_encoder, visual, *, start, end, maximum, minimum=0, method="greedy",
             top_p=0.9, temperature=1.0, beams=4, length_penalty=1.0, generator=None):
    """Captions for a batch of videos.

    text_encoder    the causal text tower that the decoder was trained with, as two methods:
                      start_cache(batch) -> cache for `batch` empty sentences
                      step(ids (B, n), cache) -> (features (B, n, W), cache)
                    Features are what its full pass would give at these positions: after the last
                    norm, not projected. A cache is any nesting of lists and tuples whose tensors
                    have the batch first (see `reorder`); numbers in it are the same for all rows.
    visual          (B, M, C) video tokens
    start, end      ids of the tokens that open and close a sentence
    maximum         most words, at least 1; the tower needs room for that many tokens with the start
    minimum         fewest words: before that many, the end is forbidden
    method          "greedy": always the likeliest next word.
                    "beam": keep the `beams` best sentences so far, ranked by log-probability /
                    tokens**length_penalty (end included; 0 favours short captions). A finished one
                    keeps its place while it ranks. With one beam it is greedy.
                    "nucleus": draw from the fewest words that hold a share top_p in (0, 1] of the
                    probability (arXiv 1904.09751, Sec. 3.1); temperature < 1 sharpens it first.
    generator       torch.Generator of the draws; the same state gives the same captions
    returns         B lists of word ids, without start and end, of various lengths
    """
    if method not in ("greedy", "beam", "nucleus"):
        raise ValueError(f"method is {method!r}: choose greedy, beam or nucleus")
    if not 0 <= minimum <= maximum or maximum < 1:
        raise ValueError(f"between {minimum} and {maximum} words: need 0 <= minimum <= maximum, "
                         "maximum at least 1")
    if not 0 < top_p <= 1 or temperature <= 0 or beams < 1:
        raise ValueError(f"need 0 < top_p <= 1, temperature > 0, beams >= 1; got {top_p}, "
                         f"{temperature}, {beams}")
    beams, clips = beams if method == "beam" else 1, visual.shape[0]
    pooled, cache, text_cache = decoder.pool(visual), None, text_encoder.start_cache(clips)
    ids = torch.full((clips,), start, device=visual.device)      # the newest word of each sentence
    words = ids[:, None][:, :0]                                  # (sentences, words so far)
    score = torch.zeros(clips, device=visual.device)             # log-probability, nats
    ended = torch.zeros_like(ids, dtype=torch.bool)
    for place in range(maximum):
        features, text_cache = text_encoder.step(ids[:, None], text_cache)
        hidden, cache = decoder.step(features, pooled, cache)
        logits = decoder.logits(hidden[:, -1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if place < minimum:
            logits[:, end] = -math.inf
        if method == "nucleus":
            ids = draw_from_nucleus(logits, top_p, temperature, generator)
        else:
            length = (words != end).sum(dim=1) + 1               # the end counts, once
            source, ids, score = grow_beams(logits, score, length, ended, clips, beams,
                                            length_penalty, end)
            if beams > 1:
                words, ended = words[source], ended[source]
                cache, text_cache = reorder(cache, source), reorder(text_cache, source)
        words = torch.cat([words, ids[:, None]], dim=1)
        ended = ended | (ids == end)
        if ended.all():
            break
    best = words.unflatten(0, (clips, -1))[:, 0].tolist()
    return [row[:row.index(end)] if end in row else row for row in best]


def draw_from_nucleus(logits, top_p, temperature, generator):
    """One word for each row of logits (B, V), from the smallest set that holds top_p: (B,)."""
    chance, word = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = chance.cumsum(dim=-1) - chance                      # exactly 0 for the likeliest
    mass = chance.masked_fill(before >= top_p, 0).cumsum(dim=-1)
    device = "cpu" if generator is None else generator.device
    draw = torch.rand(len(logits), 1, generator=generator, device=device).to(mass)
    return word.gather(1, (mass < draw * mass[:, -1:]).sum(dim=-1, keepdim=True))[:, 0]


def grow_beams(logits, score, length, ended, clips, beams, length_penalty, end):
    """The best continuations of each clip's sentences by one word.

    logits (clips*r, V), r sentences per clip so far; score their log-probabilities; length their
    tokens after this step; ended bool, True = it stays as it is
    returns  source, word, score (clips*beams,): row continued, with which word, log-probability;
             best first within a clip
    """
    value, word = logits.topk(min(beams, logits.shape[1]))       # no clip can need more of one row
    gain = value - logits.logsumexp(dim=-1, keepdim=True)
    stay = torch.full_like(gain, -math.inf)
    stay[:, 0] = 0                                               # an ended one continues as itself
    gain = torch.where(ended[:, None], stay, gain)
    word = word.masked_fill(ended[:, None], end)
    total = score[:, None] + gain                                # (clips*r, k)
    rank = (total / length[:, None]**length_penalty).view(clips, -1)      # (clips, r*k)
    chosen = rank.topk(min(beams, rank.shape[1])).indices
    chosen = (chosen + rank.shape[1] * torch.arange(clips, device=total.device)[:, None]).flatten()
    return chosen // gain.shape[1], word.flatten()[chosen], total.flatten()[chosen]


@torch.no_grad()
def word_attention(decoder, visual, text):
    """Where in the video the decoder looks while it reads each token: (B, L, M), rows sum to 1.

    The last block's attention over the Q answers, times the pooler's over the M tokens, both averaged
    over heads. It says what was looked at, not what decided: the layers before have mixed the words.
    visual (B, M, C), text (B, L, W), as `CaptionDecoder.forward`
    """
    def share(attn, queries, keys):
        """queries (B, n, W), keys (B, 1, N, K) -> (B, n, N)."""
        q = attn.q(queries).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, n, K)
        return (q @ keys.transpose(2, 3) * q.shape[-1]**-0.5).softmax(dim=-1).mean(dim=1)

    pooler, last = decoder.pooler, decoder.cross_blocks[-1]
    keys = pooler.attn.keys(pooler.context_norm(visual))[0]
    asked = share(pooler.attn, pooler.norm(decoder.queries).expand(len(visual), -1, -1), keys)
    pooled, x = decoder.pool(visual), decoder.text_norm(text)
    for self_block, cross_block in zip(decoder.self_blocks, decoder.cross_blocks):
        x, _ = self_block(x)
        if cross_block is last:
            return share(last.attn, last.norm(x), last.attn.keys(pooled)[0]) @ asked
        x = cross_block(x, *cross_block.attn.keys(pooled))


# ------------------------------------------------------------------------------------------------
# Official weights

# Our names -> official names, in network order; each line is applied to what the one above gave.
OFFICIAL = (
    (r"^queries$", "visual_queries"),
    (r"^pooler\.(attn\.)?", "visual_attn_pooler."),
    (r"^pooled_norm\.", "visual_pooler_norm."),
    (r"^self_blocks\.(\d+)\.", r"multimodal_layers.\1.0.fn."),
    (r"fn\.frequencies$", "fn.rotary_emb.inv_freq"),
    (r"fn\.fused\.", "fn.fused_attn_ff_proj."),  # rows: queries, keys, values, MLP
    (r"fn\.proj\.", "fn.attn_out."),
    (r"fn\.fc2\.", "fn.ff_out.1."),
    (r"^cross_blocks\.(\d+)\.(attn\.)?", r"multimodal_layers.\1.1.fn."),
    (r"\.q\.", ".to_q."),
    (r"\.kv\.", ".to_kv."),
    (r"\.proj\.", ".to_out."),
    (r"\.fc1\.", ".ff.0."),
    (r"\.fc2\.", ".ff.2."),
    (r"^vocabulary\.", "predictor.4."),  # all others have the same name in both
)


def official_name(name):
    """What the official files call our tensor `name`, without the prefix."""
    for pattern, replacement in OFFICIAL:
        name = re.sub(pattern, replacement, name)
    return name


def official_sizes(tensors, prefix, name, heads=None):
    """Constructor arguments, read off the shapes. Where several tensors tell a size the majority
    wins, so that one damaged tensor is named alone when the model is filled."""
    layers, pooler = prefix + "multimodal_layers.", prefix + "visual_attn_pooler."
    depth = weights.depth_of(tensors, layers)
    if not depth or not any(key.startswith(prefix + "visual_") for key in tensors):
        raise WeightsError(f"{name}: holds no caption decoder (no caption_decoder.*, nor "
                           "visual_queries and multimodal_layers.* without that prefix)")

    def size(axis, *names):
        names = dict.fromkeys(name.replace("*", str(i)) for name in names for i in range(depth))
        found = [tensors[key].shape[axis] for key in names
                 if key in tensors and tensors[key].ndim > axis]
        return commonest(found) if found else 2  # any: `fill` will name what is missing

    width = size(0, prefix + "text_norm.weight", prefix + "text_norm.bias",
                 layers + "*.0.fn.norm.gamma", layers + "*.1.fn.norm.gamma")
    head_width = size(0, pooler + "to_kv.weight", layers + "*.1.fn.to_kv.weight") // 2
    context = [pooler + key for key in ("context_norm.gamma", "context_norm.beta", "to_kv.weight")]
    visual = [tensors[key].shape[-1] for key in context if key in tensors]
    last = [prefix + "predictor.4.weight", prefix + "predictor.4.bias"]
    words = [len(tensors[key]) for key in last if key in tensors]
    if len(set(words)) > 1:  # one against one: no majority
        raise WeightsError(f"{name} does not fit CaptionDecoder: wrong shape: {last[0]} says that "
                           f"the vocabulary has {words[0]} words, {last[1]} says {words[1]}")
    return {"width": width, "heads": heads or max(1, width // max(1, head_width)), "depth": depth,
            "visual_width": commonest(visual or [2]),
            "vocabulary": words[0] if words else 2,
            "queries": size(0, prefix + "visual_queries"),
            "mlp_width": size(1, layers + "*.0.fn.ff_out.1.weight", layers + "*.1.fn.ff.2.weight")}


@torch.no_grad()
def check_rotary(decoder, prefix, name):
    """Files repeat a table that the code computes; another table would be another model. A file in
    half precision holds it rounded: hence the tolerance, and the exact table put back."""
    for i, block in enumerate(decoder.self_blocks):
        table = rotary_frequencies(2 * len(block.frequencies)).to(block.frequencies)
        if not torch.allclose(block.frequencies, table, rtol=0.01, atol=0):
            key = prefix + official_name(f"self_blocks.{i}.frequencies")
            raise WeightsError(f"{name}: {key} holds other frequencies than 10000^(-2j/K)")
        block.frequencies.copy_(table)


# ------------------------------------------------------------------------------------------------
# Try it


@torch.no_grad()
def main(argv=None):
    """`python caption_decoder.py`: the shapes. With VIDEO and --weights: a sentence, and where each word looked."""
    import argparse
    import sys
    from pathlib import Path

    import clip_video
    from video.annotations import DataError
    from video.clips import one_clip
    from video.transforms import normalise
    from video import moving_shapes
    from engine import pictures

    parser = argparse.ArgumentParser(description="Write a sentence about a video.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip")
    parser.add_argument("--weights", help="a run's folder, or InternVideo-MM weights; default: an untrained tiny model")
    parser.add_argument("--tokenizer", help="tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; "
                                            "default: the one in the run's folder")
    parser.add_argument("--method", default="greedy", choices=("greedy", "beam", "nucleus"))
    parser.add_argument("--maximum", type=int, default=30, help="most word pieces (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of --method nucleus, and of the generated clip (default: 0)")
    parser.add_argument("--out", default="runs/caption.png", help="where the decoder looks as it writes; PNG")
    args = parser.parse_args(argv)
    try:
        if args.weights:
            model = clip_video.VideoCLIP.from_official(args.weights)
            decoder = CaptionDecoder.from_official(args.weights)
            tokenizer = clip_video.tokenizer_of(args.weights, args.tokenizer, model.config["vocabulary"])
        else:
            torch.manual_seed(args.seed)
            world = moving_shapes.MovingShapes("train", 4, 64)
            tokenizer = clip_video.train_tokenizer([world[i]["caption"] for i in range(100)], 800)
            model = clip_video.VideoCLIP("tiny", frames=4, image_size=64, vocabulary=tokenizer.vocabulary, context=32,
                                         end=tokenizer.end).eval()
            decoder = CaptionDecoder(128, heads=2, depth=2, visual_width=192, vocabulary=tokenizer.vocabulary, queries=8).eval()
        T, (H, W) = model.config["frames"], model.config["image_size"]
        if args.video:
            clip, told = one_clip(args.video, T, (H, W)), None
        else:
            item = moving_shapes.MovingShapes("test", T, (H, W), args.seed)[args.seed]
            clip, told = item["video"], item["caption"]
        _, tokens = model.encode_video_tokens(normalise(torch.as_tensor(clip)[None], model.mean, model.std))
        words = generate(decoder, model.text, tokens.flatten(1, 2), start=tokenizer.start,
                         end=tokenizer.end, maximum=min(args.maximum, model.config["context"] - 1),
                         method=args.method, generator=torch.Generator().manual_seed(args.seed))
        sentence = tokenizer.decode(words)[0]
        if not args.weights:
            explain(model, decoder, tokenizer, tokens, told)
        print(sentence)
        if model.kind != "joint":  # whose tokens are not of single frames
            ids = tokenizer.encode([sentence], model.config["context"], trim=True)[0]
            path = Path(args.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures.attention_maps(clip, *looks(model, decoder, tokenizer, tokens, ids),
                           f'where the decoder looks as it writes "{sentence}"', path)
            print(f"drawn: {path}")
    except (WeightsError, DataError, ValueError, OSError) as error:
        print(f"caption_decoder.py: {error}", file=sys.stderr)
        return 2
    return 0


def explain(model, decoder, tokenizer, tokens, told):
    """Print what happens to a clip's tokens (1, t, 1+S, C) and its true sentence, shape by shape."""
    ids, is_token = tokenizer.encode([told], model.config["context"], trim=True)
    visual, text = tokens.flatten(1, 2), model.encode_text_tokens(ids)[1]
    logits = decoder(visual, text[:, :-1])
    for name, letters, value in (
            ("the clip, as tokens of the visual tower", "(B, t, 1+S, C)", tokens), ("side by side", "(B, M, C)", visual),
            (f"{len(decoder.queries)} questions to it, answered", "(B, Q, W)", decoder.pool(visual)),
            ("a sentence", "(B, L)", ids), ("its tokens, of the text tower", "(B, L, W)", text),
            ("for each but the last: scores of the next", "(B, L-1, V)", logits)):
        print(f"{name:46s} {letters:16s} {tuple(value.shape)}")
    loss = F.cross_entropy(logits[0], ids[0, 1:])
    chance = torch.tensor(float(logits.shape[-1])).log()
    print(f"captioning loss of {told!r}, untrained: {loss:.2f}; guessing costs ln V = {chance:.2f}. What it writes:")


@torch.no_grad()
def looks(model, decoder, tokenizer, tokens, ids):
    """For a picture: where the decoder looks as it reads ids (1, L) and writes the next, given a clip's tokens
    (1, t, 1+S, C) -> (L-1, t, h, w), no class tokens, and the words that it writes."""
    found = word_attention(decoder, tokens.flatten(1, 2), model.encode_text_tokens(ids)[1][:, :-1].float())[0]
    found = found.view(len(found), *tokens.shape[1:3])[:, :, 1:].unflatten(2, model.visual.grid)
    return found.cpu(), [tokenizer.decode([token]) or "(end)" for token in ids[0, 1:].tolist()]


if __name__ == "__main__":
    raise SystemExit(main())
