"""UniFormerV2: a video encoder built from CLIP's image encoder (arXiv 2211.09552, Sec. 3, Method).

CLIP was trained on 400 million images with captions. It knows objects and scenes, but nothing about
time. UniFormerV2 runs CLIP's blocks on every frame and adds new blocks for time. The output of the
new blocks is zero at the start, so the tokens of each frame start as those of CLIP. InternVideo
(arXiv 2212.03191) uses UniFormerV2 as its multimodal encoder.

    video (B, C, T, H, W) --embed each frame, + class token, + positions--> (B, t, 1+S, D)
      | per block:  local unit    convolution over three frames        (optional)
      |             attention     among the 1+S tokens of one frame    (CLIP's)
      |             local unit    convolution over three frames        (optional)
      |             mlp           on each token                        (CLIP's)
      |                 \\-- after chosen blocks: global block, all t*(1+S) tokens --> (B, 1, D)
      v                                                                                  |
    mean over frames of the class tokens (B, D) ------ weighted sum ----- global token --+
                                                            |
                         feature (B, D) --norm, dropout, linear--> logits (B, Y)

1. `embed_frames` is CLIP's patch embedding of each frame, so t = T. As in CLIP, the position table
   is for row and column, not for time. With `temporal_downsample` (for videos in which motion
   matters) an embedding covers three frames with a stride of two, so t = T/2.
2. `LocalUnit` is a depth-wise convolution over time, in R < D channels (paper: Local UniBlock).
3. `GlobalBlock`: the global token attends to all tokens of the clip (paper: Global UniBlock). The
   global token is a learned vector, zero at the start. Each global block updates it for the next.
4. `UniFormerV2.combine` returns (1-w) * global token + w * mean class token, w = sigmoid(balance).
   At the start the global token is 0 and w is 1/2, so the feature is half the mean class token.
   The norm before the head removes the factor 1/2.

At step one the layers that `zero_init` set to zero have a nonzero gradient, but for one in the last
block's second local unit: only a global block, whose output layers are still zero, reads it.

Where we differ from the official code: tensors are batch first, convolutions of size 1 are Linear
layers, and DropPath drops clips, not token positions. As in that code, w is the weight of the mean
class token; in the paper it is the weight of the global token. B/16 has 115 M parameters, L/14
354 M; with the options for motion (see `Options`) 163 M and 574 M.

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

# Mean and standard deviation of red, green and blue, for pixels in [0, 1], in all published
# UniFormerV2 models. clip_video.py uses those of CLIP.
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@dataclass(frozen=True)
class Size:
    """Sizes of the image model. Global blocks have its width. patch, image_size: side in pixels."""
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
    """All options of a UniFormerV2. A run saves all of them in its config.json.

    The defaults are the paper's options for Kinetics. Its options for motion (Something-Something):
    local_units 2, temporal_downsample, global_layers = the last two thirds of the layers, frames
    16, drop_path 0.2, global_drop_path 0.4. For a frozen image model: balance False.
    """
    size: Size | str = "b16"             # Size, or a name in SIZES
    frames: int = 8                      # T of the clips; other lengths are accepted, too
    image_size: int | tuple | None = None  # H = W or (H, W) in pixels; None = image_size of `size`
    channels: int = 3
    classes: int = 0                     # Y; 0 = no head, forward returns the feature
    global_layers: tuple | None = None   # numbers (from 0) of the blocks with a global block after
    #                                      them; () = none; None = the last 4, at most half of all
    global_heads: int | None = None      # heads of the global blocks; None = as the image model
    global_mlp_width: int | None = None  # hidden width of their MLP; None = as the image model
    local_units: int = 0                 # 0, 1 or 2 in each block
    reduction: float = 1.5               # R = int(D // reduction), the width of a local unit's conv
    temporal_downsample: bool = False    # True = embed 3 frames with stride 2; T must be even
    balance: bool = True                 # False = the feature is the global token alone
    drop_path: float = 0.0               # DropPath rate of the last block, rising linearly from 0
    global_drop_path: float = 0.0        # the same for the global blocks
    global_mlp_dropout: float = 0.5
    head_dropout: float = 0.5
    mean: tuple = MEAN                   # pixels in [0, 1] are normalised with these
    std: tuple = STD

    def __post_init__(self):
        size = SIZES[self.size] if isinstance(self.size, str) else self.size
        size = Size(**size) if isinstance(size, dict) else size  # from config.json
        sides = size.image_size if self.image_size is None else self.image_size
        H, W = (sides, sides) if isinstance(sides, int) else sides
        last_layers = range(max(size.depth - 4, size.depth // 2), size.depth)
        layers = tuple(last_layers if self.global_layers is None else self.global_layers)
        p = size.patch
        if H % p or W % p:
            raise ValueError(f"frames of {H} x {W} pixels do not divide into patches of {p} x {p}")
        if list(layers) != sorted(set(layers) & set(range(size.depth))):
            raise ValueError(f"global_layers {layers}: name layers 0 to {size.depth - 1}, rising")
        if self.local_units not in (0, 1, 2):
            raise ValueError(f"local_units is {self.local_units!r}: choose 0, 1 or 2")
        for name, value in (("size", size), ("image_size", (H, W)), ("global_layers", layers),
                            ("mean", tuple(self.mean)), ("std", tuple(self.std))):
            object.__setattr__(self, name, value)  # because the class is frozen


# ------------------------------------------------------------------------------------------------
# Convolutions and blocks


def temporal_conv(x, kernel, bias):
    """Depth-wise convolution over three frames, padded with zeros.

    x (B, t, S, R), kernel (R, 3), bias (R,) -> (B, t, S, R)
    """
    # A 2-D convolution over the axes (t, S) with a 3 x 1 kernel. In memory the channels of x are
    # last, as torch's channels_last format wants for images. So nothing is copied.
    image = x.permute(0, 3, 1, 2)                                            # (B, R, t, S)
    kernel = kernel[:, None, :, None]                                        # (R, 1, 3, 1)
    return F.conv2d(image, kernel, bias, padding=(1, 0), groups=len(kernel)).permute(0, 2, 3, 1)


def grid_conv(x, kernel, bias):
    """Depth-wise 3 x 3 x 3 convolution over frames, rows and columns, padded with zeros.

    x (B, t, h, w, D), kernel (D, 1, 3, 3, 3), bias (D,) -> (B, t, h, w, D)
    """
    # A sum of three 3 x 3 convolutions of frames (B*t, D, h, w): the previous, the same and the
    # following frame. On a CPU, training with conv3d takes 3 times as long, in bfloat16 9 times.
    frames = x.flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    previous, same, following = (
        F.conv2d(frames, kernel[:, :, i], bias if i == 1 else None, padding=1, groups=len(kernel))
        .permute(0, 2, 3, 1).unflatten(0, x.shape[:2]) for i in range(3))    # (B, t, h, w, D) each
    # Shift by one frame: frame 0 has no previous frame and the last one no following frame.
    return (same + F.pad(previous[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
            + F.pad(following[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1)))             # (B, t, h, w, D)


def inflate(kernel, frames):
    """Image kernel (D, C, p, p) -> video kernel (D, C, frames, p, p) with the same result.

    The image kernel is applied to the middle frame. The kernels for the other frames are zero.
    """
    out = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    out[:, :, frames // 2] = kernel
    return out


class DepthwiseKernel(nn.Module):
    """Weight and bias of a depth-wise convolution. The weight is initialised as in torch's
    convolutions, the bias with zeros. shape: (channels, ...) of the weight."""

    def __init__(self, *shape):
        super().__init__()
        bound = math.prod(shape[1:]) ** -0.5  # 1 / sqrt(inputs of one output)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(shape[0]))


def zero_init(layer):
    """Set a Linear layer to zero and return it. The residual branch that ends with it is then zero
    at the start. Its input is not zero, so its gradient is not zero either: it learns."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class LocalUnit(nn.Module):
    """Mix each patch with the patches at its position in the previous and the next frame.

    expand(temporal_conv(reduce(norm(x)))), x (B, t, S, D) -> (B, t, S, D)

    The paper calls it local multi-head relation aggregator, MHRA (Sec. 3, Local UniBlock). The norm
    is a batch norm: its mean and variance are those of a channel over clips, frames and patches.
    """

    def __init__(self, width, reduction):
        super().__init__()
        reduced = int(width // reduction)  # R
        self.norm = BatchNorm(width)
        self.reduce = nn.Linear(width, reduced)
        self.time = DepthwiseKernel(reduced, 3)
        self.expand = zero_init(nn.Linear(reduced, width))

    def forward(self, x):
        """x (B, t, S, D) -> (B, t, S, D)."""
        normed = self.norm(x.flatten(0, 2)).view(x.shape)                    # (B, t, S, D)
        return self.expand(temporal_conv(self.reduce(normed), self.time.weight, self.time.bias))


class FrameBlock(Block):
    """CLIP's block applied to each frame, plus 0 to 2 local units that connect the frames.

    patches = patches + local[0](patches)   x without the class tokens
    x       = x + attn(norm1(x))            among the 1+S tokens of one frame
    patches = patches + local[1](patches)
    x       = x + mlp(norm2(x))
    """

    def __init__(self, size, local_units, reduction, drop_path):
        super().__init__(size.width, size.heads, mlp_width=size.mlp_width, eps=1e-5,
                         drop_path=drop_path, activation=quick_gelu)
        self.local = nn.ModuleList(LocalUnit(size.width, reduction) for _ in range(local_units))

    def apply_local_unit(self, i, x):
        """Apply local unit i, if it exists, to the patch tokens of x (B, t, 1+S, D)."""
        if i >= len(self.local):
            return x
        patches = x[:, :, 1:]                                                # (B, t, S, D)
        mixed = patches + self.drop_path(self.local[i](patches))
        return torch.cat([x[:, :, :1], mixed], dim=2)

    def forward(self, x, recompute=False):
        """x (B, t, 1+S, D) -> (B, t, 1+S, D). recompute: see UniFormerV2.recompute."""
        def attend(x):  # each frame is a batch element, so tokens attend to their own frame only
            frames = self.norm1(x).flatten(0, 1)                             # (B*t, 1+S, D)
            return self.attn(frames).view(x.shape)

        def run(branch, x):
            if recompute and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(branch, x, use_reentrant=False)
            return branch(x)

        x = self.apply_local_unit(0, x)
        x = x + self.drop_path(run(attend, x))
        x = self.apply_local_unit(1, x)
        return x + self.drop_path(run(lambda x: self.mlp(self.norm2(x)), x))


class GlobalBlock(Block):
    """One query attends to all tokens of a clip (UniFormerV2, Sec. 3, Global UniBlock).

    y = norm_context([class tokens | patches + grid_conv(patches)])     keys and values
    query = query + attn(norm1(query), y)
    query = query + mlp(norm2(query))                 with dropout before the last layer

    The query is the global token. The block does not change the tokens of the frames. grid_conv is
    a position encoding: without it, the block would ignore the order of its tokens.
    """

    def __init__(self, size, heads, mlp_width, dropout, drop_path):
        super().__init__(size.width, heads, mlp_width=mlp_width, eps=1e-5, drop_path=drop_path,
                         activation=quick_gelu)
        self.near = DepthwiseKernel(size.width, 1, 3, 3, 3)  # of grid_conv: tokens near in t, h, w
        self.norm_context = nn.LayerNorm(size.width)
        self.dropout = Dropout(dropout)
        # As nn.MultiheadAttention, which the official code has here.
        nn.init.xavier_uniform_(self.attn.qkv.weight)
        nn.init.zeros_(self.attn.qkv.bias)
        nn.init.xavier_uniform_(self.mlp.fc1.weight)
        # fc1 keeps its random bias: while the query is 0, fc2 has no other input to learn from.
        zero_init(self.attn.proj), zero_init(self.mlp.fc2)

    def project(self, query, context):
        """query (B, 1, D), context (B, Nk, D) -> q (B, heads, 1, K), k and v (B, heads, Nk, K)."""
        layer, D = self.attn.qkv, query.shape[-1]  # weight (3*D, D): rows of q, then k, then v
        q = F.linear(query, layer.weight[:D], layer.bias[:D])
        k, v = F.linear(context, layer.weight[D:], layer.bias[D:]).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def attend(self, query, context):
        """Attention of one query: query (B, 1, D), context (B, Nk, D) -> (B, 1, D)."""
        out = attention(*self.project(query, context))                       # (B, heads, 1, K)
        return self.attn.proj(out.transpose(1, 2).flatten(2))

    def context(self, tokens, grid):
        """Tokens that keys and values come from: (B, t, 1+S, D), grid (h, w) -> (B, t*(1+S), D)."""
        patches = tokens[:, :, 1:]                                           # (B, t, S, D)
        encoding = grid_conv(patches.unflatten(2, grid), self.near.weight, self.near.bias)
        # encoding (B, t, h, w, D), context (B, t, 1+S, D)
        context = torch.cat([tokens[:, :, :1], patches + encoding.flatten(2, 3)], dim=2)
        return self.norm_context(context.flatten(1, 2))

    def forward(self, query, tokens, grid):
        """query (B, 1, D), tokens (B, t, 1+S, D), grid (h, w) -> query (B, 1, D)."""
        query = query + self.drop_path(self.attend(self.norm1(query), self.context(tokens, grid)))
        hidden = self.dropout(quick_gelu(self.mlp.fc1(self.norm2(query))))   # (B, 1, mlp width)
        return query + self.drop_path(self.mlp.fc2(hidden))

    def attention_map(self, query, tokens, grid):
        """Attention weights of the query, mean over heads -> (B, t, 1+S), with sum 1 per clip.

        Arguments as in `forward`.
        """
        q, k, _ = self.project(self.norm1(query), self.context(tokens, grid))
        weights = (q @ k.mT * q.shape[-1]**-0.5).softmax(dim=-1).mean(dim=1)  # (B, 1, t*(1+S))
        return weights.view(tokens.shape[:3])


# ------------------------------------------------------------------------------------------------
# The network


class UniFormerV2(nn.Module):
    """CLIP's image encoder on every frame, plus local units and global blocks.

    size, options: see `Options`. mae.VideoClassifier lists the interface that both encoders share.

    >>> plain = UniFormerV2("tiny", global_layers=())  # class tokens of CLIP, mean over frames
    >>> plain(torch.zeros(1, 3, 5, 64, 64)).shape
    torch.Size([1, 192])
    """

    family = "multimodal"
    no_weight_decay = "class_token", "positions", "global_token"  # see engine/optimisers.py

    def __init__(self, size="b16", **options):
        super().__init__()
        self.options = options = Options(size, **options)
        self.config = {"model": "UniFormerV2"} | {
            key: list(x) if isinstance(x, tuple) else x for key, x in asdict(options).items()}
        size, (H, W), layers = options.size, options.image_size, options.global_layers
        self.width, self.depth, self.heads = size.width, size.depth, size.heads
        self.mean, self.std, self.global_layers = options.mean, options.std, layers
        self.patch, self.grid = size.patch, (H // size.patch, W // size.patch)
        # Frames per embedding, and from one embedding to the next.
        self.window, self.stride = (3, 2) if options.temporal_downsample else (1, 1)
        self._recompute = False
        self.grid_of(options.frames, H, W)  # ValueError if the options do not fit each other
        D = size.width
        self.embed = nn.Linear(options.channels * self.window * size.patch**2, D, bias=False)
        self.class_token = nn.Parameter(D**-0.5 * torch.randn(D))
        self.positions = nn.Parameter(spatial_position_table(*self.grid, D))
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
        """Initialise `embed` for three frames, and the frame blocks as CLIP's text blocks."""
        D, depth = self.width, self.depth
        if self.window > 1:  # start as an image model that sees the middle frame only
            shape = (-1, self.window, self.patch, self.patch)
            middle = self.embed.weight.unflatten(1, shape)[:, :, 1]          # (D, C, patch, patch)
            # torch drew the weights for three frames of input: too small for one, by sqrt(3).
            self.embed.weight.copy_(inflate(middle * self.window**0.5, self.window).flatten(1))
        for block in self.blocks:  # in deeper models proj and fc2 start smaller
            for layer, std in ((block.attn.qkv, D**-0.5), (block.attn.proj, (2 * D * depth)**-0.5),
                               (block.mlp.fc1, (2 * D)**-0.5),
                               (block.mlp.fc2, (2 * D * depth)**-0.5)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def grid_of(self, T, H, W):
        """Token grid (t, h, w) of T frames of H x W pixels. ValueError if they do not fit."""
        h, w = self.grid
        if (H, W) != (h * self.patch, w * self.patch):
            raise ValueError(f"frames of {H} x {W} pixels: the position table of this model is for "
                             f"{h * self.patch} x {w * self.patch}")
        if T < 1 or T % self.stride:
            raise ValueError(f"a clip of {T} frames: this model takes a multiple of {self.stride}")
        return T // self.stride, h, w

    def embed_frames(self, video):
        """video (B, C, T, H, W) -> tokens (B, t, 1+S, D); token 0 of a frame is its class token."""
        B, (t, h, w) = video.shape[0], self.grid_of(*video.shape[2:])
        if self.window > 1:  # a frame of zeros in front; T is even, so the end needs no padding
            video = F.pad(video, (0, 0, 0, 0, 1, 0))
        p = self.patch
        # The same as the strided convolution of the official code: cut out patches, then Linear.
        pixels = video.unfold(2, self.window, self.stride).unfold(3, p, p).unfold(4, p, p)
        pixels = pixels.permute(0, 2, 3, 4, 1, 5, 6, 7)              # (B, t, h, w, C, window, p, p)
        patches = self.embed(pixels.reshape(B, t, h * w, -1)) + self.positions[1:]   # (B, t, S, D)
        class_token = (self.class_token + self.positions[0]).to(patches.dtype)       # (D,)
        return self.norm_pre(torch.cat([class_token.expand(B, t, 1, -1), patches], dim=2))

    def start(self, video):
        """video (B, C, T, H, W) float, normalised with mean and std -> State before block 0."""
        B = video.shape[0]  # torch.export would make a constant of len(video)
        query = None if self.global_token is None else self.global_token.expand(B, -1, -1)
        return State(self.embed_frames(video), query)

    def run(self, state, start, stop):
        """Run blocks start to stop - 1, each with the global block after it, if there is one.

        The State before them -> the State after them.
        """
        x, query = state.tokens, state.query
        for i in range(start, stop):
            x = self.blocks[i](x, self._recompute)
            if i in self.global_layers:
                query = self.global_blocks[self.global_layers.index(i)](query, x, self.grid)
        return replace(state, tokens=x, query=query)

    def combine(self, state):
        """State after the last block -> feature (B, D), before the norm of the head."""
        mean_class_token = state.tokens[:, :, 0].mean(dim=1)                 # (B, D)
        if state.query is None:
            return mean_class_token
        if self.balance is None:  # balance=False; or no global blocks, but fusion.py sets a query
            return state.query[:, 0]
        w = self.balance.sigmoid()                                           # (D,)
        return (1 - w) * state.query[:, 0] + w * mean_class_token

    def finish(self, state):
        """State after the last block -> feature (B, D), normed if there is a head."""
        feature = self.combine(state)
        return self.norm(feature) if self.options.classes else feature

    def encode(self, video):
        """video (B, C, T, H, W) -> feature (B, D), tokens (B, t, 1+S, D), both without a norm."""
        state = self.run(self.start(video), 0, self.depth)
        return self.combine(state), state.tokens

    def tokens(self, video):
        """video (B, C, T, H, W) -> tokens of the last block (B, t*(1+S), D), frame by frame."""
        return self.encode(video)[1].flatten(1, 2)

    def feature(self, video):
        """video (B, C, T, H, W) -> feature (B, D), the input of the head."""
        return self.finish(self.run(self.start(video), 0, self.depth))

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)."""
        feature = self.feature(video)
        return self.head(self.drop(feature)) if self.options.classes else feature

    def trainable_modules(self):
        """What stage 4 (fusion.py) trains while the blocks are frozen. The model needs a head."""
        return [self.norm, self.head] + [self.global_token] * (self.global_token is not None)

    def layer_index(self, name):
        """Layer of a parameter, for layer-wise learning rates: 0 = embedding, i + 1 = block i,
        depth + 1 = all others."""
        part, *rest = name.split(".")
        if part == "blocks":
            return int(rest[0]) + 1
        return 0 if part in ("embed", "norm_pre", "class_token", "positions") else self.depth + 1

    def with_head(self, classes, *, norm=None, rows=None, **options):
        """A new classifier for Y classes with this encoder: see weights.heads.multimodal."""
        from weights import heads
        return heads.multimodal(self, classes, norm, rows, options)

    def recompute(self, on=True):
        """Switch activation checkpointing on or off, for attention and MLP of the frame blocks."""
        self._recompute = on

    @classmethod
    def from_config(cls, config):
        """Build the network from the config.json of a run."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None, global_heads=None, **options):
        """Load published weights or a run, in eval mode. Details: weights.uniformerv2.load."""
        from weights import uniformerv2
        return uniformerv2.load(cls, source, heads=heads, global_heads=global_heads, **options)

    def to_official(self):
        """The weights as {official name: tensor}. ValueError unless the global blocks follow the
        last layers."""
        from weights import uniformerv2
        return uniformerv2.to_official(self)

    @classmethod
    def from_clip(cls, source, **options):
        """Build a video model from CLIP's image encoder. Details: weights.uniformerv2.grow."""
        from weights import uniformerv2
        return uniformerv2.grow(cls, source, **options)


def spatial_position_table(h, w, width):
    """Initial values of a learned position table (1 + h*w, width) float32.

    Half of the channels hold sinusoids of the row, half of the column. The class token has zeros.
    CLIP's table starts with noise, and 400 million images teach it which patches are neighbours. A
    small model has too few images for that.
    """
    half = width // 4 * 2
    parts = (sinusoid_table(h, half)[:, None], sinusoid_table(w, width - half)[None])
    table = torch.cat([part.expand(h, w, -1) for part in parts], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), table])


@torch.no_grad()
def main():
    """`python uniformerv2.py`: print the shapes of a forward pass on a generated clip."""
    from video.moving_shapes import MovingShapes
    from video.transforms import normalise

    model = UniFormerV2("tiny", classes=16, frames=16, temporal_downsample=True).eval()
    clip = torch.as_tensor(MovingShapes("test", 16, (64, 64), 0)[0]["video"])
    video = normalise(clip[None], MEAN, STD)                                 # (B, C, T, H, W)
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
