"""Write a sentence about a video, one token at a time, with the video in view for each.

A contrastive loss asks which caption belongs to a clip; two coarse summaries answer that. A
captioning loss asks for every word, so the video tokens have to keep what a summary drops: who,
what, how many, in which order. InternVideo adds both losses, from one forward pass of both encoders
(CoCa, arXiv 2205.01917, Sec. 3.2; InternVideo, arXiv 2212.03191, Sec. 3.2).

    video tokens (B, M, D) -- Q learned queries attend --> pooled (B, Q, W) ---+ once per video
                                                                               | keys and values
    text features (B, L, W) -norm-> [ self, causal -> cross ] x depth -> hidden (B, L, W)
      hidden -- predictor: norm, linear, gelu, norm --> vocabulary --> logits (B, L, V)
      text features:  <start>  a     dog   runs         position t has seen tokens 0..t
      must predict:   a        dog   runs  <end>        and predicts token t+1

1. `CaptionDecoder.pool`: a clip has M = t * (1+S) tokens, 1576 for 8 frames of ViT-B. Q learned
   queries attend to them, and all later layers see Q vectors (CoCa, Sec. 3.2, Attentional Poolers).
   No positions are added, so the order of the video tokens does not matter here.
2. There is no word embedding. The input is the output of the causal text encoder at all positions.
3. `SelfBlock`: attention and MLP are parallel, from one norm and one product (PaLM, arXiv
   2204.02311, Sec. 2). All query heads share ONE head of keys and values (arXiv 1911.02150, Sec.
   3). Positions are rotary (arXiv 2104.09864, Sec. 3.2). `CrossBlock` attends to the pooled video.
4. `caption_loss`, teacher forcing: the true tokens are the input; all L-1 predictions are one pass.
5. `generate`: the model's own tokens are the input, one by one. `step` caches keys and values.
6. `VideoText` is the whole model of stage 2: `VideoCLIP` and this decoder.

Where we differ from the official code (CoTrain clip_decoders.py, coca.py), with equal numbers:
cross attention runs as ONE head with L*heads queries, which saves transposes. Not equal: fresh
weights have a standard deviation of 0.02 * sqrt(768 / W). With 0.02, a narrow decoder attends
evenly to everything for hundreds of steps (LOG.md). Neither decoding nor the recipe was released.

>>> decoder = CaptionDecoder(64, heads=4, depth=2, visual_width=48, vocabulary=100, queries=8)
>>> video, text = torch.zeros(2, 40, 48), torch.zeros(2, 10, 64)  # 10 tokens: start, eight, end
>>> decoder(video, text[:, :-1]).shape                            # logits (B, L-1, V)
torch.Size([2, 9, 100])
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import Mask, attention
from clip_video import VideoCLIP


class Norm(nn.Module):
    """LayerNorm over the last axis. As in the official code, its offset beta is never trained: a
    buffer, zero unless a file of weights says otherwise."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, eps=1e-5)


def swiglu(x):
    """(..., 2*n) -> (..., n): the first half, gated by the second (arXiv 2002.05202, Sec. 2)."""
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def rotary_frequencies(head_width):
    """(K/2,) float32, radians per position: 1 for the first pair of channels, down to 1/10000."""
    return 1.0 / 10000 ** (torch.arange(0, head_width, 2).float() / head_width)


def rotate(x, angles):
    """Rotate the pairs of channels (j, j + K/2) of x (B, L, heads, K) by angles (L, K/2). The dot
    product of q rotated by a and k rotated by b depends on the distance a - b, not on a or b."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]                  # (L, 1, K/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def multi_query(q, k, v, mask=None):
    """q (B, L, heads, K), k, v (B, 1, N, K) -> (B, L, heads*K): one head of keys and values serves
    all heads of queries. Without a mask, the heads are treated as more queries of one head."""
    if mask is None:
        return attention(q.flatten(1, 2)[:, None], k, v).reshape(*q.shape[:2], -1)
    return attention(q.transpose(1, 2), k, v, mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Tokens of width W attend to tokens of another width, with one head of keys and values."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width // heads, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def keys(self, context):
        """context (B, N, context_width) -> keys, values (B, 1, N, K), computed once per video."""
        return self.kv(context)[:, None].chunk(2, dim=-1)

    def forward(self, x, k, v):
        """x (B, L, W) -> (B, L, W)"""
        return self.proj(multi_query(self.q(x).unflatten(-1, (self.heads, -1)), k, v))


class Pooler(nn.Module):
    """Learned queries compress any number of tokens to Q vectors. There is no residual and no MLP.
    Only here the context has a norm."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm, self.context_norm = Norm(width), Norm(context_width)
        self.attn = CrossAttention(width, heads, context_width)

    def forward(self, queries, context):
        """queries (Q, W), context (B, M, D) -> (B, Q, W)"""
        queries = self.norm(queries).expand(context.shape[0], -1, -1)
        return self.attn(queries, *self.attn.keys(self.context_norm(context)))


class SelfBlock(nn.Module):
    """x + attention(norm x) + mlp(norm x), the first product of both in one matrix."""

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
        """Radians of positions first .. first + count - 1: (count, K/2)."""
        frequencies = self.frequencies
        if frequencies.dtype not in (torch.float32, torch.float64):  # model.bfloat16() rounded them
            frequencies = rotary_frequencies(2 * len(frequencies)).to(device)
        return torch.arange(first, first + count, device=device)[:, None] * frequencies

    def forward(self, x, past=None):
        """x (B, L, W); past: keys and values (B, 1, n, K) of n earlier tokens, or None -> (B, L, W)
        and the keys and values (B, 1, n+L, K) of all."""
        angles = self.angles(0 if past is None else past[0].shape[2], x.shape[1], x.device)
        q, k, v, inner = self.fused(self.norm(x)).split(self.sizes, dim=-1)
        q = rotate(q.unflatten(-1, (self.heads, -1)), angles)                # (B, L, heads, K)
        k, v = rotate(k[:, :, None], angles).transpose(1, 2), v[:, None]     # (B, 1, L, K)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = Mask(causal=True) if x.shape[1] > 1 else None  # one token: everything is its past
        return x + self.proj(multi_query(q, k, v, mask)) + self.fc2(swiglu(inner)), (k, v)


class CrossBlock(nn.Module):
    """x + attention(norm x, pooled video) + mlp(norm x), also in parallel."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.norm = Norm(width)
        self.attn = CrossAttention(width, heads, width)
        self.fc1 = nn.Linear(width, 2 * mlp_width, bias=False)
        self.fc2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x, k, v):
        """x (B, L, W), k, v (B, 1, Q, K) -> (B, L, W)"""
        normed = self.norm(x)
        return x + self.attn(normed, k, v) + self.fc2(swiglu(self.fc1(normed)))


@dataclass(frozen=True)
class Options:
    """The options of `CaptionDecoder`."""

    width: int  # W, of text features and decoder; a multiple of heads
    heads: int
    visual_width: int  # D, width of a video token
    vocabulary: int  # V
    depth: int = 6  # layers, each a SelfBlock and a CrossBlock
    queries: int = 256  # Q, learned queries of the pooler
    mlp_width: int | None = None  # None: 4*W


class CaptionDecoder(nn.Module):
    """From video tokens and the text so far to the next token. Arguments: see Options."""

    def __init__(self, width, **options):
        super().__init__()
        o = Options(width, **options)
        self.options = o = replace(o, mlp_width=o.mlp_width or 4 * width)
        self.config = {"model": "CaptionDecoder"} | asdict(o)
        if width % o.heads or width // o.heads % 2:
            raise ValueError(f"width {width} does not divide into {o.heads} heads of an even width")
        self.queries = nn.Parameter(torch.randn(o.queries, width) * width**-0.5)
        self.pooler = Pooler(width, o.heads, o.visual_width)
        self.pooled_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        sizes = width, o.heads, o.mlp_width
        self.self_blocks = nn.ModuleList(SelfBlock(*sizes) for _ in range(o.depth))
        self.cross_blocks = nn.ModuleList(CrossBlock(*sizes) for _ in range(o.depth))
        self.predictor = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                       nn.LayerNorm(width))
        self.vocabulary = nn.Linear(width, o.vocabulary)  # not tied to the text encoder's embedding
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 * (768 / width)**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pool(self, visual):
        """visual (B, M, D), tokens in any order -> (B, Q, W), computed once per video."""
        return self.pooled_norm(self.pooler(self.queries, visual))

    def step(self, text, pooled, cache):
        """Go on by L tokens: one in decoding, all of them in teacher forcing.

        text     (B, L, W), features of the new tokens
        pooled   (B, Q, W) from `pool`, read at the first step only
        cache    None at the first step, then what the last step returned: for each layer the keys
                 and values (B, 1, n, K) of the text and those (B, 1, Q, K) of the pooled video
        returns  hidden (B, L, W) and the new cache
        """
        if cache is None:
            cache = [(None, block.attn.keys(pooled)) for block in self.cross_blocks]
        x, new_cache = self.text_norm(text), []
        for block, cross, (past, video) in zip(self.self_blocks, self.cross_blocks, cache):
            x, past = block(x, past)
            x = cross(x, *video)
            new_cache.append((past, video))
        return x, new_cache

    def hidden(self, visual, text):
        """(B, M, D), (B, L, W) -> (B, L, W), what the predictor and answers to questions read."""
        return self.step(text, self.pool(visual), None)[0]

    def logits(self, hidden):
        """(..., W) -> (..., V)"""
        return self.vocabulary(self.predictor(hidden))

    def forward(self, visual, text):
        """Teacher forcing: logits (B, L, V) of the token after each position.

        visual   (B, M, D) float, tokens of the last vision layer, class tokens included, no norm
        text     (B, L, W) float, from a causal text encoder, after its last norm, not projected
        """
        return self.logits(self.hidden(visual, text))

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None):
        """InternVideo-MM's decoder, in eval mode: see weights.caption_decoder.load."""
        from weights import caption_decoder
        return caption_decoder.load(cls, source, heads=heads)

    def to_official(self):
        """{official name: tensor}, as InternVideo's own code names them."""
        from weights import caption_decoder
        return caption_decoder.to_official(self)


def caption_loss(logits, ids, is_text, *, count=None):
    """Mean cross entropy of the next token, in nats; about ln V for an untrained decoder.
    `engine.large_batches.chunked_caption_loss` has the same value for a large vocabulary.

    logits   (B, L-1, V): the decoder's output for text features 0..L-2
    ids      (B, L) int: start, words, end, padding; tokens 1..L-1 are the targets, the end, too:
             a decoder that never predicts it never stops
    is_text  (B, L) bool, False = padding, which is ignored. It comes last, so that causal attention
             needs no mask for it
    count    divides the sum; default: the targets in this batch. Several processes pass their mean
    """
    if logits.shape[:2] != (ids.shape[0], ids.shape[1] - 1):
        raise ValueError(f"{tuple(ids.shape)} token ids need {ids.shape[0]} x {ids.shape[1] - 1} "
                         f"predictions, got {logits.shape[0]} x {logits.shape[1]}: the decoder "
                         "takes the text features without the last position")
    targets, wanted = ids[:, 1:].long(), is_text[:, 1:]  # the shift by one
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(wide, targets.masked_fill(~wanted, -100).flatten(), reduction="sum")
    return total / (wanted.sum().clamp(min=1) if count is None else count)


class VideoText(nn.Module):
    """The model of stage 2: a `clip_video.VideoCLIP`, and a decoder of the same widths and
    vocabulary. Files name their weights `clip.*` and `caption_decoder.*`, as InternVideo's own."""

    def __init__(self, clip, caption_decoder):
        super().__init__()
        self.clip, self.caption_decoder = clip, caption_decoder

    @property
    def config(self):
        """The configurations of both parts: what config.json holds."""
        return {"model": "VideoText", "clip": self.clip.config,
                "caption_decoder": self.caption_decoder.config}

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(VideoCLIP.from_config(config["clip"]),
                   CaptionDecoder.from_config(config["caption_decoder"]))

    @classmethod
    def from_run(cls, folder):
        """Load a run of `train.py clip`, in eval mode."""
        return cls(VideoCLIP.from_official(folder), CaptionDecoder.from_official(folder)).eval()

    def to_official(self):
        """{official name: tensor}, laid out like InternVideo's own file."""
        clip = {"clip." + name: tensor for name, tensor in self.clip.to_official().items()}
        return clip | self.caption_decoder.to_official()

    def forward(self, video, ids):
        """What both losses take, from one pass of both encoders.

        video    (B, C, T, H, W) float, normalised with clip.mean and clip.std
        ids      (B, L) int64
        returns  video and text embedding (B, E), which with `clip.logit_scale` are for
                 `contrastive_loss`; hidden (B, L-1, W): `caption_decoder.logits` of it is for
                 `caption_loss`
        """
        if self.training:
            self.clip.clamp_scale()
        video_embedding, video_tokens = self.clip.encode_video_tokens(video)
        text_embedding, text_tokens = self.clip.encode_text_tokens(ids)
        hidden = self.caption_decoder.hidden(video_tokens.flatten(1, 2), text_tokens[:, :-1])
        return video_embedding, text_embedding, hidden

    def caption(self, video, tokenizer, maximum, **options):
        """video as `forward` -> B sentences of at most `maximum` tokens; options: of `generate`."""
        _, tokens = self.clip.encode_video_tokens(video)
        return tokenizer.decode(generate(
            self.caption_decoder, self.clip.text, tokens.flatten(1, 2), start=tokenizer.start,
            end=tokenizer.end, maximum=maximum, **options))


@torch.no_grad()
def generate(decoder, text_encoder, visual, *, start, end, maximum, minimum=0, search=None):
    """Captions for a batch of videos, by greedy decoding: always the most probable next token.

    text_encoder       has `start_cache` and `step`, as clip_video.TextEncoder
    visual             (B, M, D) video tokens
    start, end         ids of the tokens that open and close a sentence
    minimum, maximum   number of tokens, at least 0 and 1; the text encoder needs room for `maximum`
    search             chooses the tokens in place of argmax: see tasks/caption_search.py
    returns            B lists of token ids, without start and end, of various lengths
    """
    if not 0 <= minimum <= maximum or maximum < 1:
        raise ValueError(f"{minimum} to {maximum} tokens: need 0 <= minimum <= maximum >= 1")
    pooled, cache, text_cache = decoder.pool(visual), None, text_encoder.start_cache(len(visual))
    ids = torch.full((len(visual),), start, device=visual.device)  # newest token of each sentence
    words = ids[:, None][:, :0]                                    # (n, tokens so far)
    ended = torch.zeros_like(ids, dtype=torch.bool)
    for place in range(maximum):
        features, text_cache = text_encoder.step(ids[:, None], text_cache)
        hidden, cache = decoder.step(features, pooled, cache)
        logits = decoder.logits(hidden[:, -1])                     # (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if place < minimum:
            logits[:, end] = -math.inf
        if search is None:
            ids = logits.argmax(dim=-1)
        else:
            ids, words, ended, cache, text_cache = search(logits, words, ended, cache, text_cache)
        words = torch.cat([words, ids[:, None]], dim=1)
        ended = ended | (ids == end)
        if ended.all():
            break
    best = words.unflatten(0, (len(visual), -1))[:, 0].tolist()    # a search keeps the best first
    return [row[:row.index(end)] if end in row else row for row in best]


@torch.no_grad()
def main():
    """`python caption_decoder.py`: the shapes, of an untrained model on one generated clip."""
    from video.moving_shapes import MovingShapes
    from video.transforms import normalise
    from weights.tokenizer import train_tokenizer

    world = MovingShapes("train", 4, 64)
    tokenizer = train_tokenizer([world[i]["caption"] for i in range(100)], 800)
    ids, is_text = tokenizer.encode(world[0]["caption"], 32, trim=True)
    V = tokenizer.vocabulary
    clip = VideoCLIP("tiny", frames=4, image_size=64, vocabulary=V, context=32, end=tokenizer.end)
    decoder = CaptionDecoder(128, heads=2, depth=2, visual_width=192, queries=8, vocabulary=V)
    model = VideoText(clip, decoder).eval()
    video = normalise(torch.as_tensor(world[0]["video"])[None], clip.mean, clip.std)
    tokens = clip.encode_video_tokens(video)[1].flatten(1, 2)
    logits = decoder.logits(model(video, ids)[2])
    for name, value in (("video tokens (B, M, D)", tokens), ("caption (B, L)", ids),
                        ("pooled (B, Q, W)", decoder.pool(tokens)), ("logits (B, L-1, V)", logits)):
        print(f"{name:28s} {tuple(value.shape)}")
    print(f"loss of {world[0]['caption']!r}, untrained: {caption_loss(logits, ids, is_text):.2f}; "
          f"ln V = {math.log(V):.2f} at chance")
    print("what it writes, untrained:", *model.caption(video, tokenizer, maximum=10))


if __name__ == "__main__":
    main()
