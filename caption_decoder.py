"""A caption decoder: write a sentence about a video, one token at a time.

Contrastive learning compares one vector per video with one vector per caption. Captioning predicts
every word, so the video tokens must keep details such as counts. InternVideo sums both losses
(arXiv 2212.03191, Sec. 3.2), from one forward pass (CoCa, arXiv 2205.01917, Sec. 3.2).

    video tokens (B, M, D) -- Q learned queries attend to them --> pooled video (B, Q, W)
                                                                       | keys, values
    text features (B, L, W) -- norm --> [ causal self-attention, cross-attention ] x depth
        --> hidden (B, L, W) -- norm, linear, gelu, norm, linear --> logits (B, L, V)

      position         0        1    2     3
      text feature of  <start>  a    dog   runs         depends on the tokens up to its position
      target           a        dog  runs  <end>        the next token

Letters: M video tokens, Q pooled tokens, L text tokens, W text width, V size of the vocabulary.

1. `CaptionDecoder.pool`: Q learned queries attend to M = t * (1+S) video tokens (1576 for 8
   frames of ViT-B), so each layer attends to Q only (CoCa, Sec. 3.2, Attentional Poolers). It adds
   no positions. UniFormerV2 without local_units and temporal_downsample writes no time into its
   tokens. The order of the frames then has no effect on the caption.
2. The decoder's input is the output of the causal text encoder, not a word embedding.
3. `SelfBlock`: attention and MLP run in parallel on one norm (PaLM, arXiv 2204.02311, Sec. 2).
   Positions are rotary (arXiv 2104.09864, Sec. 3.2). `CrossBlock` attends to the pooled video. In
   both, all query heads share one head of keys and values (multi-query attention, arXiv
   1911.02150, Sec. 3), so that the cache is small.
4. `caption_loss` trains with teacher forcing: the true tokens are the input, so a single pass
   predicts all L - 1 next tokens.
5. `generate` feeds the predicted tokens back, one by one. `step` caches the keys and values.
6. `VideoText` is the model of stage 2: `VideoCLIP` and this decoder.

Where we differ from the official code (CoTrain clip_decoders.py, coca.py): new weights have a
standard deviation of 0.02 * sqrt(768 / W), not 0.02. With 0.02, the attention of a narrow decoder
stays uniform for hundreds of steps (LOG.md). Decoding and training recipe are ours.

>>> decoder = CaptionDecoder(64, heads=4, depth=2, visual_width=48, vocabulary=100, queries=8)
>>> video_tokens, text_features = torch.zeros(2, 40, 48), torch.zeros(2, 9, 64)
>>> decoder(video_tokens, text_features).shape   # (B, L, V)
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
    """LayerNorm without a trained offset. `beta` is a buffer: zero, or the value of loaded weights.
    As in the official code, blocks and pooler have this norm, the decoder itself nn.LayerNorm."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, eps=1e-5)


def swiglu(x):
    """(..., 2*n) -> (..., n): the first half times silu(second half) (arXiv 2002.05202, Sec. 2)."""
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def rotary_frequencies(head_width):
    """K -> (K/2,) float32, in radians per position. They fall from 1 towards 1/10000."""
    return 1.0 / 10000 ** (torch.arange(0, head_width, 2).float() / head_width)


def rotate(x, angles):
    """Rotate the channel pairs (j, j + K/2) of x (B, L, heads, K) by angles (L, K/2), in radians.
    If q is rotated by angle a and k by angle b, only a - b matters for their dot product: an angle
    proportional to the distance of their positions."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]                  # (L, 1, K/2)
    first, second = x.chunk(2, dim=-1)                                       # (B, L, heads, K/2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def multi_query(q, k, v, mask=None):
    """Attention. All query heads share one head of keys and values.
    q (B, L, heads, K), k, v (B, 1, Nk, K) -> (B, L, heads*K)"""
    if mask is None:  # one head with all queries, (B, 1, L*heads, K): same result, no transposes
        return attention(q.flatten(1, 2)[:, None], k, v).reshape(*q.shape[:2], -1)
    return attention(q.transpose(1, 2), k, v, mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Multi-query attention from tokens of width W to tokens of width context_width."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width // heads, bias=False)   # one head: 2*K
        self.proj = nn.Linear(width, width, bias=False)

    def keys(self, context):
        """context (B, Nk, context_width) -> keys and values, (B, 1, Nk, K) each."""
        return self.kv(context)[:, None].chunk(2, dim=-1)

    def forward(self, x, k, v):
        """x (B, L, W), k, v (B, 1, Nk, K) -> (B, L, W)"""
        return self.proj(multi_query(self.q(x).unflatten(-1, (self.heads, -1)), k, v))


class Pooler(nn.Module):
    """Cross-attention from learned queries, without residual and MLP. As in the official code, it
    norms the context and `CrossBlock` does not."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.norm, self.context_norm = Norm(width), Norm(context_width)
        self.attn = CrossAttention(width, heads, context_width)

    def forward(self, queries, context):
        """queries (Q, W), context (B, M, D) -> (B, Q, W)"""
        queries = self.norm(queries).expand(context.shape[0], -1, -1)        # (B, Q, W)
        return self.attn(queries, *self.attn.keys(self.context_norm(context)))


class SelfBlock(nn.Module):
    """x + attention(norm x) + mlp(norm x). One matrix holds q, k, v and the MLP's first layer."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.heads = heads
        self.sizes = (width, width // heads, width // heads, 2 * mlp_width)  # q, k, v, for swiglu
        self.norm = Norm(width)
        self.register_buffer("frequencies", rotary_frequencies(width // heads))
        self.fused = nn.Linear(width, sum(self.sizes), bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.fc2 = nn.Linear(mlp_width, width, bias=False)

    def angles(self, first, count, device):
        """Radians of positions first .. first + count - 1: (count, K/2)."""
        frequencies = self.frequencies
        # After model.bfloat16() the buffer is too coarse for late positions: compute it again.
        if frequencies.dtype not in (torch.float32, torch.float64):
            frequencies = rotary_frequencies(2 * len(frequencies)).to(device)
        return torch.arange(first, first + count, device=device)[:, None] * frequencies

    def forward(self, x, past=None):
        """Each token attends to itself and to the tokens before it.

        x        (B, L, W)
        past     keys and values (B, 1, n, K) of n earlier tokens, or None
        returns  (B, L, W), and the keys and values (B, 1, n+L, K) of all tokens
        """
        angles = self.angles(0 if past is None else past[0].shape[2], x.shape[1], x.device)
        q, k, v, mlp_hidden = self.fused(self.norm(x)).split(self.sizes, dim=-1)
        q = rotate(q.unflatten(-1, (self.heads, -1)), angles)                # (B, L, heads, K)
        k, v = rotate(k[:, :, None], angles).transpose(1, 2), v[:, None]     # (B, 1, L, K)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = Mask(causal=True) if x.shape[1] > 1 else None  # one token: no key comes after it
        return x + self.proj(multi_query(q, k, v, mask)) + self.fc2(swiglu(mlp_hidden)), (k, v)


class CrossBlock(nn.Module):
    """x + cross-attention(norm x; pooled video) + mlp(norm x)"""

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
    """All options of `CaptionDecoder`."""
    width: int  # W, of the text features and of the decoder; a multiple of heads
    heads: int
    visual_width: int  # D, of the video tokens
    vocabulary: int  # V
    depth: int = 6  # layers; each has a SelfBlock and a CrossBlock
    queries: int = 256  # Q, learned queries of the pooler
    mlp_width: int | None = None  # None: 4*W


class CaptionDecoder(nn.Module):
    """Predict the next token from the video and the text so far. Arguments: see Options."""

    def __init__(self, width, **options):
        super().__init__()
        o = Options(width, **options)
        self.options = o = replace(o, mlp_width=o.mlp_width or 4 * width)
        self.config = {"model": "CaptionDecoder"} | asdict(o)
        if width % o.heads or width // o.heads % 2:
            raise ValueError(f"width {width} does not divide into {o.heads} heads of an even width")
        self.queries = nn.Parameter(torch.randn(o.queries, width) * width**-0.5)  # (Q, W)
        self.pooler = Pooler(width, o.heads, o.visual_width)
        self.pooled_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        sizes = width, o.heads, o.mlp_width
        self.self_blocks = nn.ModuleList(SelfBlock(*sizes) for _ in range(o.depth))
        self.cross_blocks = nn.ModuleList(CrossBlock(*sizes) for _ in range(o.depth))
        self.predictor = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                       nn.LayerNorm(width))
        self.vocabulary = nn.Linear(width, o.vocabulary)  # output layer, not tied to the embedding
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 * (768 / width)**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pool(self, video_tokens):
        """video_tokens (B, M, D), in any order -> (B, Q, W)"""
        return self.pooled_norm(self.pooler(self.queries, video_tokens))

    def step(self, text_features, pooled, cache):
        """Decode L more tokens: one at a time in `generate`, all at once with teacher forcing.

        text_features  (B, L, W) of the new tokens
        pooled         (B, Q, W) from `pool`; only the first call uses it
        cache          None in the first call, then the result of the previous call. For each layer:
                       (k, v) of the n earlier tokens (B, 1, n, K), (k, v) of the video (B, 1, Q, K)
        returns        hidden (B, L, W) and the new cache
        """
        if cache is None:
            cache = [(None, block.attn.keys(pooled)) for block in self.cross_blocks]
        x, new_cache = self.text_norm(text_features), []
        for self_block, cross_block, (text_kv, video_kv) in zip(
                self.self_blocks, self.cross_blocks, cache):
            x, text_kv = self_block(x, text_kv)
            x = cross_block(x, *video_kv)
            new_cache.append((text_kv, video_kv))
        return x, new_cache

    def hidden(self, video_tokens, text_features):
        """(B, M, D), (B, L, W) -> (B, L, W), the input of `logits` and of question answering."""
        return self.step(text_features, self.pool(video_tokens), None)[0]

    def logits(self, hidden):
        """(..., W) -> (..., V)"""
        return self.vocabulary(self.predictor(hidden))

    def forward(self, video_tokens, text_features):
        """Teacher forcing: logits (B, L, V) of the token after each position.

        video_tokens   (B, M, D) float, of the last visual layer, with class tokens, without a norm
        text_features  (B, L, W) float, of a causal text encoder, after its last norm
        """
        return self.logits(self.hidden(video_tokens, text_features))

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None):
        """Load InternVideo-MM's decoder or a run's, in eval mode: weights.caption_decoder.load."""
        from weights import caption_decoder
        return caption_decoder.load(cls, source, heads=heads)

    def to_official(self):
        """{official name: tensor}, with the names of InternVideo's code."""
        from weights import caption_decoder
        return caption_decoder.to_official(self)


def caption_loss(logits, ids, is_text, *, count=None):
    """Mean cross entropy of the next token, in nats. An untrained decoder has about ln V.
    `engine.large_batches.chunked_caption_loss` has the same value in less memory, for a large V.

    logits   (B, L-1, V), of the text features 0 to L-2
    ids      (B, L) int: start, words, end, padding. The targets are tokens 1 to L-1. They include
             the end, so that the decoder learns to stop
    is_text  (B, L) bool, False = padding, which is no target (`is_token` of the tokenizer). Padding
             comes last, so causal attention needs no mask for it
    count    divides the sum; None: the number of targets in this batch. With several processes: the
             mean of their numbers, because DDP averages the gradients of the processes
    returns  () float32 (float64 for float64 logits)
    """
    if logits.shape[:2] != (ids.shape[0], ids.shape[1] - 1):
        raise ValueError(f"token ids of shape {tuple(ids.shape)} need logits for {ids.shape[0]} x "
                         f"{ids.shape[1] - 1} tokens, got {logits.shape[0]} x {logits.shape[1]}: "
                         "give the decoder the text features without the last position")
    targets, is_target = ids[:, 1:].long(), is_text[:, 1:]       # (B, L-1): the shift by one token
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    # cross_entropy ignores the target -100.
    total = F.cross_entropy(logits, targets.masked_fill(~is_target, -100).flatten(),
                            reduction="sum")
    return total / (is_target.sum().clamp(min=1) if count is None else count)


class VideoText(nn.Module):
    """The model of stage 2: a `clip_video.VideoCLIP`, and a `CaptionDecoder` for its widths and its
    vocabulary. Weights are named `clip.*` and `caption_decoder.*`, as in InternVideo's files."""

    def __init__(self, clip, caption_decoder):
        super().__init__()
        self.clip, self.caption_decoder = clip, caption_decoder

    @property
    def config(self):
        """The configurations of both parts, as in config.json."""
        return {"model": "VideoText", "clip": self.clip.config,
                "caption_decoder": self.caption_decoder.config}

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(VideoCLIP.from_config(config["clip"]),
                   CaptionDecoder.from_config(config["caption_decoder"]))

    @classmethod
    def from_run(cls, folder):
        """Load the model of a run of `train.py clip`, in eval mode."""
        return cls(VideoCLIP.from_official(folder), CaptionDecoder.from_official(folder)).eval()

    def to_official(self):
        """{official name: tensor}, as in InternVideo's files."""
        clip = {"clip." + name: tensor for name, tensor in self.clip.to_official().items()}
        return clip | self.caption_decoder.to_official()

    def forward(self, video, ids):
        """The inputs of both losses, from one forward pass of both encoders.

        video    (B, C, T, H, W) float, normalised with clip.mean and clip.std
        ids      (B, L) int64
        returns  video and text embeddings (B, E), for `contrastive_loss`; hidden (B, L-1, W), the
                 input of `caption_decoder.logits`. The last position has no next token to predict
        """
        if self.training:
            self.clip.clamp_scale()
        video_embedding, video_tokens = self.clip.encode_video_tokens(video)
        text_embedding, text_tokens = self.clip.encode_text_tokens(ids)
        hidden = self.caption_decoder.hidden(video_tokens.flatten(1, 2), text_tokens[:, :-1])
        return video_embedding, text_embedding, hidden

    def caption(self, video, tokenizer, maximum, **options):
        """video (B, C, T, H, W), as in `forward` -> a list of B captions, each of at most `maximum`
        tokens. options: see `generate`."""
        _, tokens = self.clip.encode_video_tokens(video)
        return tokenizer.decode(generate(
            self.caption_decoder, self.clip.text, tokens.flatten(1, 2), start=tokenizer.start,
            end=tokenizer.end, maximum=maximum, **options))


@torch.no_grad()
def generate(decoder, text_encoder, video_tokens, *, start, end, maximum, minimum=0, search=None):
    """Write a caption for each video by greedy decoding: take the most probable token every time.

    text_encoder       has `start_cache` and `step`, as clip_video.TextEncoder
    video_tokens       (B, M, D)
    start, end         token ids that begin and end a caption
    minimum, maximum   limits of a caption's length in tokens, without start and end. `maximum` is
                       at least 1 and at most the length that the text encoder takes
    search             replaces argmax: see tasks/caption_search.py
    returns            B lists of token ids of different lengths, without start and end
    """
    if not 0 <= minimum <= maximum or maximum < 1:
        raise ValueError(f"{minimum} to {maximum} tokens: need 0 <= minimum <= maximum and "
                         "maximum >= 1")
    pooled, cache, text_cache = (decoder.pool(video_tokens), None,
                                 text_encoder.start_cache(len(video_tokens)))
    # There are n = B sentences, or a multiple of B if `search` keeps several per video.
    ids = torch.full((len(video_tokens),), start, device=video_tokens.device)  # (n,), newest token
    tokens = ids[:, None][:, :0]                                   # (n, tokens so far), none yet
    ended = torch.zeros_like(ids, dtype=torch.bool)                # (n,)
    for position in range(maximum):
        text_features, text_cache = text_encoder.step(ids[:, None], text_cache)  # (n, 1, W)
        hidden, cache = decoder.step(text_features, pooled, cache)               # (n, 1, W)
        logits = decoder.logits(hidden[:, -1])                                   # (n, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if position < minimum:
            logits[:, end] = -math.inf
        if search is None:
            ids = logits.argmax(dim=-1)
        else:
            ids, tokens, ended, cache, text_cache = search(logits, tokens, ended, cache, text_cache)
        tokens = torch.cat([tokens, ids[:, None]], dim=1)
        ended = ended | (ids == end)
        if ended.all():  # until then, ended sentences grow as well; the return line cuts them
            break
    # (B, sentences per video, tokens): `search` puts the best sentence of a video first.
    best = tokens.unflatten(0, (len(video_tokens), -1))[:, 0].tolist()
    return [row[:row.index(end)] if end in row else row for row in best]


@torch.no_grad()
def main():
    """`python caption_decoder.py` prints the shapes for one clip and an untrained model."""
    from video.moving_shapes import MovingShapes
    from video.transforms import normalise
    from weights.tokenizer import train_tokenizer

    dataset = MovingShapes("train", 4, 64)
    tokenizer = train_tokenizer([dataset[i]["caption"] for i in range(100)], 800)
    ids, is_text = tokenizer.encode(dataset[0]["caption"], 32, trim=True)
    V = tokenizer.vocabulary
    clip = VideoCLIP("tiny", frames=4, image_size=64, vocabulary=V, context=32, end=tokenizer.end)
    decoder = CaptionDecoder(128, heads=2, depth=2, visual_width=192, queries=8, vocabulary=V)
    model = VideoText(clip, decoder).eval()
    video = normalise(torch.as_tensor(dataset[0]["video"])[None], clip.mean, clip.std)
    tokens = clip.encode_video_tokens(video)[1].flatten(1, 2)
    logits = decoder.logits(model(video, ids)[2])
    for name, tensor in (
            ("video tokens (B, M, D)", tokens), ("caption ids (B, L)", ids),
            ("pooled video (B, Q, W)", decoder.pool(tokens)), ("logits (B, L-1, V)", logits)):
        print(f"{name:28s} {tuple(tensor.shape)}")
    print(f"caption loss of the untrained model {caption_loss(logits, ids, is_text):.2f} for "
          f"{dataset[0]['caption']!r}; ln V = {math.log(V):.2f}")
    print("caption of the untrained model:", *model.caption(video, tokenizer, maximum=10))


if __name__ == "__main__":
    main()
