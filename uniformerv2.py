"""A video encoder that grows from an image model (UniFormerV2, arXiv 2211.09552, Sec. 3, Method).

CLIP, trained on 400 million captioned images, knows what things look like, and nothing about time.
Training all of it on video damages what it knows. UniFormerV2 keeps the image blocks, frame by
frame, and adds blocks whose branches start at zero. Training therefore starts exactly at the image
model. This is the multimodal encoder of InternVideo (arXiv 2212.03191).

    video (B, C, T, H, W) --embed each frame, + class token, + positions--> (B, t, 1+S, D)
      | per block:  local unit    each place over three frames       (optional)
      |             attention     among the 1+S tokens of one frame  (CLIP's)
      |             local unit    again                              (optional)
      |             mlp           token by token                     (CLIP's)
      |                 \\-- after chosen blocks: global block, all t*(1+S) tokens --> (B, 1, D)
      v                                                                                  |
    mean over frames of the class tokens (B, D) -------- balance -------- global token --+
                                                            |
                         feature (B, D) --norm, dropout, linear--> logits (B, Y)

1. `embed_frames`: CLIP's embedding of every frame. Nothing in it tells one frame from another. For
   motion it takes three frames, at every second one (`temporal_downsample`): t = T/2.
2. `LocalUnit`: a depth-wise convolution over time, in a narrower space (Local UniBlock).
3. `GlobalBlock`: one query, a learned vector that starts at zero, attends to all tokens of the clip
   (Global UniBlock). Its output is the query of the next global block ("sequential" fusion).
4. `UniFormerV2.combine`: (1 - w) * global token + w * mean class token, w = sigmoid(balance). At
   the start the global token is 0 and w is 1/2.

All layers that start at zero have a gradient at the first step, except the second local unit of the
last block. Only the last global block reads it, through a weight that is zero at step one. Where we
differ from the official code: batch first; convolutions of size 1 are matrices; DropPath drops
clips, not token positions. As in that code, unlike the paper, w weighs the mean class token. B/16
has 115 M parameters, L/14 354 M; configured for motion 163 M and 574 M.

>>> model = UniFormerV2("tiny", classes=5).eval()
>>> video = torch.randn(2, 3, 8, 64, 64)
>>> model(video).shape, model.tokens(video).shape   # (B, Y), (B, t*(1+S), D)
(torch.Size([2, 5]), torch.Size([2, 520, 192]))
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import Block, Dropout, State, attention, quick_gelu, sinusoid_table
from engine.batch_norm import BatchNorm

# Of pixels in [0, 1], for all published UniFormerV2 models. clip_video.py uses CLIP's numbers.
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@dataclass(frozen=True)
class Size:
    """The measures of the image model; global blocks have the same width."""
    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    image_size: int = 224


# CLIP (arXiv 2103.00020), Tab. "CLIP-ViT hyperparameters".
SIZES = {
    #               D  depth heads MLP patch pixels
    "tiny":    Size(192,  4,  3,  768,  8,  64),  # ours, for laptops
    "b16":     Size(768, 12, 12, 3072, 16, 224),
    "l14":     Size(1024, 24, 16, 4096, 14, 224),
    "l14_336": Size(1024, 24, 16, 4096, 14, 336),
}


@dataclass(frozen=True)
class Options:
    """All options of a UniFormerV2. Its configuration holds these and nothing else.

    The paper's choices for Kinetics are the defaults. For Something-Something: local_units 2,
    temporal_downsample, global blocks on the last two thirds of the layers, frames 16, drop_path
    0.2, global_drop_path 0.4. For a frozen image model: balance False.
    """
    size: Size | str = "b16"             # or a name in SIZES
    frames: int = 8                      # T of the clips it is meant for; other lengths work too
    image_size: int | tuple | None = None  # H = W or (H, W) in pixels; None = the size's own
    channels: int = 3
    classes: int = 0                     # Y; 0 = no head, forward returns the feature
    global_layers: tuple | None = None   # layers, from 0, with a global block after them; () = no
    #                                      layer; None = the last four, at most half of all
    global_heads: int | None = None      # heads of the global blocks; None = the image model's
    global_mlp_width: int | None = None  # width inside their MLP; None = the image model's
    local_units: int = 0                 # 0, 1 or 2 in each block
    reduction: float = 1.5               # they are int(D // reduction) wide inside
    temporal_downsample: bool = False    # embed 3 frames, at every second one; T must be even
    balance: bool = True                 # False: the feature is the global token alone
    drop_path: float = 0.0               # probability that a clip skips a branch of the last block;
    global_drop_path: float = 0.0        # it rises linearly from 0 in the first: attention.DropPath
    global_mlp_dropout: float = 0.5
    head_dropout: float = 0.5
    mean: tuple = MEAN                   # pixels in [0, 1] are normalised with these
    std: tuple = STD

    def __post_init__(self):
        size = SIZES[self.size] if isinstance(self.size, str) else self.size
        size = Size(**size) if isinstance(size, dict) else size  # from config.json
        sides = size.image_size if self.image_size is None else self.image_size
        H, W = (sides, sides) if isinstance(sides, int) else sides
        last = range(max(size.depth - 4, size.depth // 2), size.depth)
        layers = tuple(last if self.global_layers is None else self.global_layers)
        p = size.patch
        if H % p or W % p:
            raise ValueError(f"frames of {H} x {W} pixels do not divide into patches of {p} x {p}")
        if list(layers) != sorted(set(layers) & set(range(size.depth))):
            raise ValueError(f"global_layers {layers}: name layers 0 to {size.depth - 1}, rising")
        if self.local_units not in (0, 1, 2):
            raise ValueError(f"local_units is {self.local_units!r}: choose 0, 1 or 2")
        for name, value in (("size", size), ("image_size", (H, W)), ("global_layers", layers),
                            ("mean", tuple(self.mean)), ("std", tuple(self.std))):
            object.__setattr__(self, name, value)  # the dataclass is frozen for all others


# ------------------------------------------------------------------------------------------------
# Convolutions and blocks


def temporal_conv(x, kernel, bias):
    """Each channel of each place mixed over three frames; outside the clip there are zeros.
    x (B, t, S, C), kernel (C, 3), bias (C,) -> (B, t, S, C)"""
    # A 3 x 1 convolution over the axes (t, S): in memory the tokens are a channels-last picture.
    picture = x.permute(0, 3, 1, 2)                                          # (B, C, t, S)
    kernel = kernel[:, None, :, None]
    return F.conv2d(picture, kernel, bias, padding=(1, 0), groups=len(kernel)).permute(0, 2, 3, 1)


def grid_conv(x, kernel, bias):
    """Each channel mixed over its 3 x 3 x 3 neighbours; outside the clip there are zeros.
    x (B, t, h, w, D), kernel (D, 1, 3, 3, 3), bias (D,) -> (B, t, h, w, D)

    Three 3 x 3 convolutions over space, for the frames before, now and after; their sum is the
    result. On CPUs conv3d trains 3 times slower, in bfloat16 9 times.
    """
    frames = x.flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    before, now, after = (
        F.conv2d(frames, kernel[:, :, i], bias if i == 1 else None, padding=1, groups=len(kernel))
        .permute(0, 2, 3, 1).unflatten(0, x.shape[:2]) for i in range(3))    # (B, t, h, w, D) each
    return (now + F.pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
            + F.pad(after[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1)))


def inflate(kernel, frames):
    """An image kernel (D, C, p, p) -> a video kernel (D, C, frames, p, p), zero around the middle
    frame. The video network then starts with the image network's numbers."""
    out = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    out[:, :, frames // 2] = kernel
    return out


class Kernel(nn.Module):
    """Weight and bias of a depth-wise convolution; starts as torch's convolutions do, bias 0."""

    def __init__(self, *shape):
        super().__init__()
        bound = math.prod(shape[1:]) ** -0.5
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(shape[0]))


def zeroed(layer):
    """A Linear layer that starts at zero, so that its branch does. Its own gradient is not zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class LocalUnit(nn.Module):
    """Each place mixed with the same place in the frames before and after: the local multi-head
    relation aggregator (MHRA) of UniFormerV2, Sec. 3, Local UniBlock.

    x (B, t, S, D) -> expand(temporal_conv(reduce(BatchNorm(x)))), int(D // reduction) wide inside.
    The norm's statistics are per channel, over all clips, frames and places (the official
    BatchNorm3d). `expand` starts at zero.
    """

    def __init__(self, width, reduction):
        super().__init__()
        narrow = int(width // reduction)
        self.norm = BatchNorm(width)
        self.reduce = nn.Linear(width, narrow)
        self.time = Kernel(narrow, 3)
        self.expand = zeroed(nn.Linear(narrow, width))

    def forward(self, x):
        normed = self.norm(x.flatten(0, 2)).view(x.shape)
        return self.expand(temporal_conv(self.reduce(normed), self.time.weight, self.time.bias))


class FrameBlock(Block):
    """CLIP's block on each frame by itself, with up to two local units that reach across frames.

    x = x + local[0](patches)      only the patch tokens; a class token stays with its frame
    x = x + attn(norm1 x)          among the 1+S tokens of one frame
    x = x + local[1](patches)
    x = x + mlp(norm2 x)
    """

    def __init__(self, size, local_units, reduction, drop_path):
        super().__init__(size.width, size.heads, mlp_width=size.mlp_width, eps=1e-5,
                         drop_path=drop_path, activation=quick_gelu)
        self.local = nn.ModuleList(LocalUnit(size.width, reduction) for _ in range(local_units))

    def mix_frames(self, i, x):
        """Add local unit i, if there is one, to the patch tokens of x (B, t, 1+S, D)."""
        if i >= len(self.local):
            return x
        patches = x[:, :, 1:]
        mixed = patches + self.drop_path(self.local[i](patches))
        return torch.cat([x[:, :, :1], mixed], dim=2)

    def forward(self, x, recompute=False):
        """x (B, t, 1+S, D) -> the same shape. recompute: see UniFormerV2.recompute."""
        def attend(x):
            frames = self.norm1(x).flatten(0, 1)                             # (B*t, 1+S, D)
            return self.attn(frames).view(x.shape)

        def run(part, x):
            if recompute and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
            return part(x)

        x = self.mix_frames(0, x)
        x = x + self.drop_path(run(attend, x))
        x = self.mix_frames(1, x)
        return x + self.drop_path(run(lambda x: self.mlp(self.norm2(x)), x))


class GlobalBlock(Block):
    """One query attends to all tokens of a clip (UniFormerV2, Sec. 3, Global UniBlock).

    y = norm_context(tokens, patches + grid_conv(patches))     a copy: the frames never see it
    query = query + attn(norm1 query; y)
    query = query + mlp(norm2 query)                           dropout between the two layers

    grid_conv is the only part of this block that knows where and when a token is.
    """

    def __init__(self, size, heads, mlp_width, dropout, drop_path):
        super().__init__(size.width, heads, mlp_width=mlp_width, eps=1e-5, drop_path=drop_path,
                         activation=quick_gelu)
        self.near = Kernel(size.width, 1, 3, 3, 3)
        self.norm_context = nn.LayerNorm(size.width)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.attn.qkv.weight)
        nn.init.zeros_(self.attn.qkv.bias)
        nn.init.xavier_uniform_(self.mlp.fc1.weight)
        # fc1 keeps its random bias: while the query is 0, nothing else reaches fc2.
        zeroed(self.attn.proj), zeroed(self.mlp.fc2)

    def project(self, query, context):
        """query (B, 1, D), context (B, N, D) -> queries, keys, values (B, heads, 1 or N, K)"""
        layer, D = self.attn.qkv, query.shape[-1]
        q = F.linear(query, layer.weight[:D], layer.bias[:D])
        k, v = F.linear(context, layer.weight[D:], layer.bias[D:]).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def attend(self, query, context):
        """query (B, 1, D), context (B, N, D) -> (B, 1, D): attention with a single query."""
        out = attention(*self.project(query, context))                       # (B, heads, 1, K)
        return self.attn.proj(out.transpose(1, 2).flatten(2))

    def context(self, tokens, grid):
        """What the query attends to: tokens (B, t, 1+S, D), grid (h, w) -> (B, t*(1+S), D)."""
        patches = tokens[:, :, 1:]
        near = grid_conv(patches.unflatten(2, grid), self.near.weight, self.near.bias)
        context = torch.cat([tokens[:, :, :1], patches + near.flatten(2, 3)], dim=2)
        return self.norm_context(context.flatten(1, 2))

    def forward(self, query, tokens, grid):
        """query (B, 1, D), tokens (B, t, 1+S, D), grid (h, w) -> query (B, 1, D)."""
        query = query + self.drop_path(self.attend(self.norm1(query), self.context(tokens, grid)))
        hidden = self.dropout(quick_gelu(self.mlp.fc1(self.norm2(query))))
        return query + self.drop_path(self.mlp.fc2(hidden))

    def attention_map(self, query, tokens, grid):
        """Attention weights, arguments as `forward`: (B, t, 1+S), mean over heads, sum 1."""
        q, k, _ = self.project(self.norm1(query), self.context(tokens, grid))
        share = (q @ k.mT * q.shape[-1]**-0.5).softmax(dim=-1).mean(dim=1)
        return share.view(tokens.shape[:3])


# ------------------------------------------------------------------------------------------------
# The network


class UniFormerV2(nn.Module):
    """CLIP's image tower on every frame, and the blocks that make it a video encoder.

    size, options: see `Options`. mae.VideoClassifier has the same interface, from `start` on.

    >>> plain = UniFormerV2("tiny", global_layers=())  # CLIP without its last norm, frames averaged
    >>> plain(torch.zeros(1, 3, 5, 64, 64)).shape
    torch.Size([1, 192])
    """

    family = "multimodal"
    undecayed = "class_token", "positions", "global_token"  # see engine/optimisers.py

    def __init__(self, size="b16", **options):
        super().__init__()
        self.options = options = Options(size, **options)
        self.config = {"model": "UniFormerV2"} | {
            key: list(x) if isinstance(x, tuple) else x for key, x in asdict(options).items()}
        size, (H, W), layers = options.size, options.image_size, options.global_layers
        self.width, self.depth, self.heads = size.width, size.depth, size.heads
        self.mean, self.std, self.global_layers = options.mean, options.std, layers
        self.patch, self.grid = size.patch, (H // size.patch, W // size.patch)
        self.window, self.stride = (3, 2) if options.temporal_downsample else (1, 1)  # in frames
        self._recompute = False
        self.grid_of(options.frames, H, W)
        D = size.width
        self.embed = nn.Linear(options.channels * self.window * size.patch**2, D, bias=False)
        self.class_token = nn.Parameter(D**-0.5 * torch.randn(D))
        self.positions = nn.Parameter(place_codes(*self.grid, D))
        self.norm_pre = nn.LayerNorm(D)
        rates = torch.linspace(0, options.drop_path, size.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            FrameBlock(size, options.local_units, options.reduction, rate) for rate in rates)
        self.global_token = self.balance = None
        if layers:
            self.global_token = nn.Parameter(torch.zeros(1, 1, D))
            rates = torch.linspace(0, options.global_drop_path, len(layers), device="cpu").tolist()
            self.global_blocks = nn.ModuleList(
                GlobalBlock(size, options.global_heads or size.heads,
                            options.global_mlp_width or size.mlp_width,
                            options.global_mlp_dropout, rate) for rate in rates)
            self.balance = nn.Parameter(torch.zeros(D)) if options.balance else None
        if options.classes:
            self.norm, self.drop = nn.LayerNorm(D), Dropout(options.head_dropout)
            self.head = nn.Linear(D, options.classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Image blocks start as CLIP's text blocks do, with smaller branches in deeper models. The
        new parts have initialised themselves."""
        D, depth = self.width, self.depth
        if self.window > 1:  # start as the image model on the middle frame
            shape = (-1, self.window, self.patch, self.patch)
            frame = self.embed.weight.unflatten(1, shape)[:, :, 1]
            self.embed.weight.copy_(inflate(frame * self.window**0.5, self.window).flatten(1))
        for block in self.blocks:
            for layer, std in ((block.attn.qkv, D**-0.5), (block.attn.proj, (2 * D * depth)**-0.5),
                               (block.mlp.fc1, (2 * D)**-0.5),
                               (block.mlp.fc2, (2 * D * depth)**-0.5)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def grid_of(self, T, H, W):
        """Token grid (t, h, w) of a clip of T frames of H x W pixels, or ValueError."""
        h, w = self.grid
        if (H, W) != (h * self.patch, w * self.patch):
            raise ValueError(f"frames of {H} x {W} pixels: the position table of this model is for "
                             f"{h * self.patch} x {w * self.patch}")
        if T < 1 or T % self.stride:
            raise ValueError(f"a clip of {T} frames: this model takes a multiple of {self.stride}")
        return T // self.stride, h, w

    def embed_frames(self, video):
        """video (B, C, T, H, W) -> tokens (B, t, 1+S, D), the class token of each frame first."""
        B, (t, h, w) = video.shape[0], self.grid_of(*video.shape[2:])
        if self.window > 1:  # zeros (the mean colour) before the first frame; none is needed behind
            video = F.pad(video, (0, 0, 0, 0, 1, 0))
        p = self.patch
        # The official strided convolution, as a matrix on patches that are cut out first.
        cut = video.unfold(2, self.window, self.stride).unfold(3, p, p).unfold(4, p, p)
        cut = cut.permute(0, 2, 3, 4, 1, 5, 6, 7)                           # b t h w (c window p p)
        patches = self.embed(cut.reshape(B, t, h * w, -1)) + self.positions[1:]
        first = (self.class_token + self.positions[0]).to(patches.dtype)
        return self.norm_pre(torch.cat([first.expand(B, t, 1, -1), patches], dim=2))

    def start(self, video):
        """video (B, C, T, H, W) float, normalised with mean and std -> State before block 0."""
        B = video.shape[0]  # not len(video): an export takes that for a constant
        query = None if self.global_token is None else self.global_token.expand(B, -1, -1)
        return State(self.embed_frames(video), query)

    def run(self, state, start, stop):
        """Run blocks start to stop - 1 and the global blocks after them -> State."""
        x, query = state.tokens, state.query
        for i in range(start, stop):
            x = self.blocks[i](x, self._recompute)
            if i in self.global_layers:
                query = self.global_blocks[self.global_layers.index(i)](query, x, self.grid)
        return replace(state, tokens=x, query=query)

    def combine(self, state):
        """State after the last block -> feature (B, D), before the head's norm."""
        mean = state.tokens[:, :, 0].mean(dim=1)
        if state.query is None:
            return mean
        if self.balance is None:  # also a query that fusion.py gave a model without global blocks
            return state.query[:, 0]
        share = self.balance.sigmoid()
        return (1 - share) * state.query[:, 0] + share * mean

    def finish(self, state):
        """State after the last block -> (B, D), what the head sees."""
        feature = self.combine(state)
        return self.norm(feature) if self.options.classes else feature

    def encode(self, video):
        """video (B, C, T, H, W) -> feature (B, D), tokens (B, t, 1+S, D), before any last norm."""
        state = self.run(self.start(video), 0, self.depth)
        return self.combine(state), state.tokens

    def tokens(self, video):
        """video (B, C, T, H, W) -> the tokens of the last block (B, t*(1+S), D), frame by frame."""
        return self.encode(video)[1].flatten(1, 2)

    def feature(self, video):
        """video (B, C, T, H, W) -> (B, D), what the head sees."""
        return self.finish(self.run(self.start(video), 0, self.depth))

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)."""
        feature = self.feature(video)
        return self.head(self.drop(feature)) if self.options.classes else feature

    def learned_parts(self):
        """What trains in stage 4, fusion: the head with its norm, and the global token's start."""
        return [self.norm, self.head] + [self.global_token] * (self.global_token is not None)

    def layer_of(self, name):
        """For layer-wise learning rates: 0 = embedding, i + 1 = block i, depth + 1 = the rest."""
        part, *rest = name.split(".")
        if part == "blocks":
            return int(rest[0]) + 1
        return 0 if part in ("embed", "norm_pre", "class_token", "positions") else self.depth + 1

    def with_head(self, classes, *, norm=None, rows=None, **options):
        """A classifier for Y classes with these weights: see weights.heads.multimodal."""
        from weights import heads
        return heads.multimodal(self, classes, norm, rows, options)

    def recompute(self, on=True):
        """Save memory, spend time: keep no activations inside attention and MLP of the frames."""
        self._recompute = on

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None, global_heads=None, **options):
        """Load published weights, or a run of ours, in eval mode. Arguments and errors: see
        weights.uniformerv2.load."""
        from weights import uniformerv2
        return uniformerv2.load(cls, source, heads=heads, global_heads=global_heads, **options)

    def to_official(self):
        """{official name: tensor}; ValueError unless global blocks stand after the last layers."""
        from weights import uniformerv2
        return uniformerv2.to_official(self)

    @classmethod
    def from_clip(cls, source, **options):
        """Grow a video model from CLIP's image tower: see weights.uniformerv2.grow."""
        from weights import uniformerv2
        return uniformerv2.grow(cls, source, **options)


def place_codes(h, w, width):
    """The start of a learned position table, (1 + h*w, width): sinusoids of the row in half of the
    channels, of the column in the other half; zeros for the class token. CLIP started with noise
    and learned from 400 million images which places are neighbours; a small model does not."""
    half = width // 4 * 2
    codes = (sinusoid_table(h, half)[:, None], sinusoid_table(w, width - half)[None])
    codes = torch.cat([code.expand(h, w, -1) for code in codes], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), codes])


@torch.no_grad()
def main():
    """`python uniformerv2.py`: the shapes of a generated clip on its way through a tiny model."""
    from video.moving_shapes import MovingShapes
    from video.transforms import normalise

    model = UniFormerV2("tiny", classes=16, frames=16, temporal_downsample=True).eval()
    clip = torch.as_tensor(MovingShapes("test", 16, (64, 64), 0)[0]["video"])
    video = normalise(clip[None], MEAN, STD)
    state = model.start(video)
    rows = [("video (B, C, T, H, W)", video), ("tokens (B, t, 1+S, D)", state.tokens)]
    for i in range(model.depth):
        state = model.run(state, i, i + 1)
        rows.append((f"after block {i} (B, t, 1+S, D)", state.tokens))
        if i in model.global_layers:
            rows.append(("  global token (B, 1, D)", state.query))
    rows += [("feature (B, D)", model.finish(state)), ("logits (B, Y)", model(video))]
    for name, x in rows:
        print(f"{name:32s} {tuple(x.shape)}")


if __name__ == "__main__":
    main()
