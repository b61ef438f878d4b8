"""Start from an image model and let small extra blocks read the video in it.

Why: a transformer trained on 400 million captioned images (CLIP) knows what things look like and
nothing of time. Training it anew on video forgets the first to learn the second. UniFormerV2 arms
it instead: the image blocks stay, frame by frame, and the new blocks around them begin silent, so that
training starts exactly at the image model (UniFormerV2, arXiv 2211.09552, Sec. 3, Method; the video
tower of InternVideo, arXiv 2212.03191).

    video (B, C, T, H, W) --embed each frame, + class token, + place--> (B, t, 1+S, D)
      |
      | per block:  local unit    each place looks at itself one step before and after   (optional)
      |             attention     the 1+S tokens of one frame among themselves           (CLIP's)
      |             local unit    once more                                              (optional)
      |             mlp           token by token                                         (CLIP's)
      |                 \\-- on chosen layers: global block, all t*(1+S) tokens --> token (B, 1, D)
      v                                                                                      |
    mean over frames of the class tokens (B, D) ------- balance ------- what the token read -+
                                                           |
                        feature (B, D) --norm, dropout, linear--> logits (B, Y)

The idea, in steps:
1. `UniFormerV2.embed_frames`: every frame is an image to CLIP. Nothing tells one frame from another.
   For data about motion an embedding takes three frames, at every second one (`temporal_downsample`), so t = T/2.
2. `LocalUnit` mixes neighbouring frames, place by place: a depth-wise convolution over time in a
   narrower space (Sec. 3, Local UniBlock; its "local MHRA"). `FrameBlock` is CLIP's block with up to two of them.
3. `GlobalBlock`: one query, a learned vector, zero at the start and alike for every clip (`global_token`), gathers
   from all N tokens of all frames what matters for the clip: N pairs, not N*N (Sec. 3, Global UniBlock). A 3x3x3 convolution first tells each token about its neighbours, the only
   trace of order here; the frames' own stream never sees it. The token goes on to the next global
   block: "sequential" among the four ways of Sec. 3, Multi-Stage Fusion Block, and the only one here (the others
   are parallel, hierarchical by keys and values, and hierarchical by queries).
4. Every frame's class token (CLIP's summary of it) is averaged over frames, and a learned balance per channel,
   w = sigmoid(balance), mixes the two: feature = (1 - w) * token that read the clip + w * mean class token.
5. `temporal_conv` and `grid_conv`: the two convolutions in the form that the device runs fastest.

What makes it work, and a test proves: at the start every new branch ends in zeros, so the token that reads
the clip is exactly 0; w is 1/2. The network is then the image model averaged over frames, times 1/2, which
the norm of any head removes; frames may come in any order. (A frozen tower, balance=False, is the token alone. With
`temporal_downsample` the embedding begins as the middle one of its three frames, so the network is the image model
on frames 0, 2, 4 ...) Yet those zeros have a gradient from the first step on: they are the last layers of their branches, and what feeds them is not zero.
(The second local unit of the last layer waits one step: no one but the silent global block reads it.)

Where we differ from the official code (UniFormerV2 uniformerv2_model.py), with equal numbers: batch
first everywhere; convolutions of size 1 are matrices; keys and values of the single query are never
computed (`GlobalBlock.read`). On purpose not equal: DropPath skips clips, where the official
sequence-first code skips token positions in all clips at once. Equal, though the paper says it the
other way round: w weighs the mean class token, not the token that read the clip. Also equal:
clips are normalised with MEAN and STD below though CLIP was not. Frames may be any number.

Numbers: B/16 115 M parameters, L/14 354 M; with local units and more global blocks, for motion, 163 M
and 574 M. 197 and 257 tokens per frame. Our tiny one: 2.7 M.

>>> model = UniFormerV2("tiny", classes=5).eval()
>>> video = torch.randn(2, 3, 8, 64, 64)
>>> model(video).shape                              # (B, Y)
torch.Size([2, 5])
>>> feature, tokens = model.encode(video)
>>> feature.shape, tokens.shape                     # (B, D), (B, t, 1+S, D)
(torch.Size([2, 192]), torch.Size([2, 8, 65, 192]))
>>> torch.allclose(feature, tokens[:, :, 0].mean(dim=1) / 2)
True
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Block, Dropout, attention, attention_weights, quick_gelu, sinusoid_table
from engine.processes import gather_with_gradient, world
from weights import Rule, WeightsError, commonest

# Grey levels in [0, 1]: every UniFormerV2 model was trained on clips normalised so. Inside
# InternVideo's video-text model CLIP's own numbers apply (clip_video.py).
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@dataclass(frozen=True)
class Size:
    """The measures of the image model; global blocks are as wide."""

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


def preset(family, size):
    """The paper's options for a kind of data: UniFormerV2("b16", **preset("motion", "b16")).

    family  "scenes": what is in the picture nearly decides, Kinetics and the like (8 frames or more).
            "motion": Something-Something (16 frames or more): local units and a global block on
            each of the last two thirds of the layers.
            "frozen": the image model is not trained, and the head reads the global token alone.
    """
    depth = (SIZES[size] if isinstance(size, str) else size).depth
    families = {"scenes": {"global_layers": last_layers(depth)},
                "motion": {"global_layers": tuple(range(depth // 3, depth)), "local_units": 2,
                           "temporal_downsample": True, "frames": 16, "drop_path": 0.2,
                           "global_drop_path": 0.4},
                "frozen": {"global_layers": last_layers(depth), "balance": False}}
    if family not in families:
        raise ValueError(f"no family {family!r}: choose {', '.join(families)}")
    return families[family]


def last_layers(depth):
    """Where the global blocks read unless told otherwise: the last four layers, at most half of all."""
    return tuple(range(max(depth - 4, depth // 2), depth))


# ------------------------------------------------------------------------------------------------
# Two depth-wise convolutions, each in several forms with the same numbers


def temporal_conv(x, kernel, bias, form="auto"):
    """Each channel of each place mixed over three frames; beyond the clip there are zeros.

    x (B, t, S, C), kernel (C, 3), bias (C,) -> (B, t, S, C)
    form  "conv3d", as written in the paper; "conv2d" over (t, S), where the tokens as they lie in
          memory are a channels-last picture; "shift", three multiplications
    """
    if form == "auto":
        form = fastest(temporal_conv, x, kernel)
    if form == "shift":
        before, after = F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)), F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))
        kernel = kernel.to(x.dtype)
        return before * kernel[:, 0] + x * kernel[:, 1] + after * kernel[:, 2] + bias.to(x.dtype)
    picture = x.permute(0, 3, 1, 2)                                          # (B, C, t, S)
    if form == "conv2d":
        out = F.conv2d(picture, kernel[:, None, :, None], bias, padding=(1, 0), groups=len(kernel))
    else:
        out = F.conv3d(picture[..., None], kernel[:, None, :, None, None], bias, padding=(1, 0, 0),
                       groups=len(kernel))[..., 0]
    return out.permute(0, 2, 3, 1)


def grid_conv(x, kernel, bias, form="auto"):
    """Each channel mixed over its 3 x 3 x 3 neighbours; beyond the clip there are zeros.

    x (B, t, h, w, D), kernel (D, 1, 3, 3, 3), bias (D,) -> (B, t, h, w, D)
    form  "conv3d", or "conv2d": one convolution over space for each of three frames, added up
    """
    if form == "auto":
        form = fastest(grid_conv, x, kernel)
    if form == "conv3d":
        return F.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, padding=1,
                        groups=len(kernel)).permute(0, 2, 3, 4, 1)
    frames = x.flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    before, now, after = (
        F.conv2d(frames, kernel[:, :, i], bias if i == 1 else None, padding=1, groups=len(kernel))
        .permute(0, 2, 3, 1).unflatten(0, x.shape[:2]) for i in range(3))    # (B, t, h, w, D) each
    return (now + F.pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
            + F.pad(after[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1)))


def fastest(convolution, x, kernel):
    """The form to use, from timings on a CPU at ViT-B's sizes. conv2d over time: 6 to 30 times
    conv3d. The grid: conv3d is quicker forward (3 times), but its backward pass is slow, so three
    conv2d win in training (3 times). For CUDA, where nothing was measured: `shift` because it reads
    memory in order, and torch has no quick kernel of size 3 x 1 there; the grid as on a CPU."""
    if convolution is temporal_conv:
        return "shift" if x.device.type == "cuda" else "conv2d"
    learning = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    return "conv2d" if learning else "conv3d"


def inflate(kernel, frames, centre=True):
    """An image kernel as a video kernel: (D, C, p, p) -> (D, C, frames, p, p).

    centre  True: it looks at the middle frame, the others get zeros, so that the video network starts
            with the image network's numbers. False: every frame gets 1/frames of it, as I3D
            (arXiv 1705.07750) proposed; equal only on a clip that stands still.
    """
    if not centre:
        return kernel[:, :, None].expand(-1, -1, frames, -1, -1) / frames
    out = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    out[:, :, frames // 2] = kernel
    return out


# ------------------------------------------------------------------------------------------------
# Blocks


def place_codes(h, w, width):
    """How a table of learned places begins: (1 + h*w, width), a zero row for the class token, then half of
    the channels sinusoids of the row and half of the column. CLIP began with noise and had 400 million
    images to find out which places are neighbours; a model that begins here knows (LOG.md)."""
    half = width // 4 * 2
    codes = (sinusoid_table(h, half)[:, None], sinusoid_table(w, width - half)[None])
    codes = torch.cat([code.expand(h, w, -1) for code in codes], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), codes])


class Kernel(nn.Module):
    """Weight and bias of a depth-wise convolution; starts as torch's convolutions do, bias 0."""

    def __init__(self, *shape):
        super().__init__()
        bound = math.prod(shape[1:]) ** -0.5
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(shape[0]))


def silent(layer):
    """A Linear layer that begins as zero, so that its branch does. Its own gradient is not zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on x (n, D) whose statistics are those of all processes' batches together, also on a CPU:
    the variance of all is the mean of the variances plus the variance of the means. Every n must be equal."""

    def forward(self, x):
        if not self.training or world() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            var, mean = torch.var_mean(wide, dim=0, correction=0)
            both = gather_with_gradient(torch.stack([mean, var])[None])      # (processes, 2, D)
            mean = both[:, 0].mean(dim=0)
            var = both[:, 1].mean(dim=0) + both[:, 0].var(dim=0, correction=0)
            with torch.no_grad():
                n = world() * len(x)
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), self.momentum)
                self.num_batches_tracked += 1
            return ((wide - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class LocalUnit(nn.Module):
    """What each place learns from the frames next to it: the local multi-head relation aggregator (MHRA) of UniFormerV2,
    Sec. 3, Local UniBlock.

    out = expand(temporal_conv(reduce(BatchNorm(x)))), x (B, t, S, D), inside int(D // reduction) wide.
    The norm's statistics are per channel over all clips, frames and places: torch's BatchNorm3d, seen
    on a (B*t*S, D) matrix. `expand` starts at zero.
    """

    def __init__(self, width, reduction):
        super().__init__()
        narrow = int(width // reduction)
        self.norm = BatchNorm(width)
        self.reduce = nn.Linear(width, narrow)
        self.time = Kernel(narrow, 3)
        self.expand = silent(nn.Linear(narrow, width))

    def forward(self, x):
        normed = self.norm(x.flatten(0, 2)).view(x.shape)
        return self.expand(temporal_conv(self.reduce(normed), self.time.weight, self.time.bias))


class FrameBlock(Block):
    """CLIP's block on each frame by itself, and up to two local units that reach across frames.

    x = x + local[0](patches)      only the patch tokens; a class token stays with its frame
    x = x + attn(norm1 x)          among the 1+S tokens of one frame
    x = x + local[1](patches)
    x = x + mlp(norm2 x)
    """

    def __init__(self, size, local_units, reduction, drop_path):
        super().__init__(size.width, size.heads, mlp_width=size.mlp_width, eps=1e-5, drop_path=drop_path,
                         activation=quick_gelu)
        self.local = nn.ModuleList(LocalUnit(size.width, reduction) for _ in range(local_units))

    def look_across(self, i, x):
        """Add local unit i, if there is one, to the patch tokens."""
        if i >= len(self.local):
            return x
        patches = x[:, :, 1:]
        return torch.cat([x[:, :, :1], patches + self.drop_path(self.local[i](patches))], dim=2)

    def forward(self, x, recompute=False):
        """x (B, t, 1+S, D) -> the same shape. recompute: see UniFormerV2.recompute."""
        run = remember_nothing if recompute and torch.is_grad_enabled() else (lambda part, x: part(x))
        x = self.look_across(0, x)
        x = x + self.drop_path(run(self.attend, x))
        x = self.look_across(1, x)
        return x + self.drop_path(run(self.digest, x))

    def attend(self, x):
        """(B, t, 1+S, D) -> the same: attention inside each frame."""
        frames = self.norm1(x).flatten(0, 1)                                 # (B*t, 1+S, D)
        return self.attn(frames).view(x.shape)

    def digest(self, x):
        """(B, t, 1+S, D) -> the same: the MLP, token by token."""
        return self.mlp(self.norm2(x))


def remember_nothing(part, x):
    """part(x), whose activations are computed again in the backward pass (arXiv 1604.06174). Local
    units never run this way: a second run would count twice in the statistics of their norm."""
    return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)


class GlobalBlock(Block):
    """One token reads a whole clip (UniFormerV2, Sec. 3, Global UniBlock).

    y = norm_context(tokens, patches + grid_conv(patches))     the copy that only this block sees
    token = token + attn(norm1 token; y)
    token = token + mlp(norm2 token)                           dropout between the two layers
    """

    def __init__(self, size, heads, dropout, drop_path):
        super().__init__(size.width, heads, mlp_width=size.mlp_width, eps=1e-5, drop_path=drop_path,
                         activation=quick_gelu)
        self.near = Kernel(size.width, 1, 3, 3, 3)
        self.norm_context = nn.LayerNorm(size.width)
        self.dropout = Dropout(dropout)
        for layer in (self.attn.qkv, self.mlp.fc1):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.attn.qkv.bias)
        # fc1 keeps its random bias: while the token is 0, nothing else feeds fc2.
        for layer in (self.attn.proj, self.mlp.fc2):
            silent(layer)

    def read(self, query, context):
        """query (B, 1, D) asks context (B, N, D); returns (B, 1, D). Keys and values of the N tokens
        are never made. For one query q of a head, q.(Wk y) = (Wk^T q).y, so the query moves to the
        tokens instead; the values' matrix comes after the mixing, a^T (Y Wv^T) = (a^T Y) Wv^T. The
        key bias cancels in the softmax; the weights sum to one, so the value bias is added once.
        N*heads*D multiplications twice, in place of N*D*D twice.
        """
        heads = self.attn.heads
        to_q, to_k, to_v = self.attn.qkv.weight.chunk(3)                     # (D, D) each
        bias_q, _, bias_v = self.attn.qkv.bias.chunk(3)
        to_k, to_v = (w.unflatten(0, (heads, -1)) for w in (to_k, to_v))     # (heads, K, D)
        q = F.linear(query, to_q, bias_q).view(len(query), heads, -1)        # (B, heads, K)
        moved = torch.einsum("bhk,hkd->bhd", q, to_k)[:, None]               # heads as queries of one head
        seen = attention(moved, context[:, None], context[:, None], scale=q.shape[-1] ** -0.5,
                         form="reference")[:, 0]                         # (B, heads, D)
        out = torch.einsum("bhd,hkd->bhk", seen, to_v).flatten(1) + bias_v
        return self.attn.proj(out)[:, None]

    def context(self, tokens, grid):
        """What the token reads: tokens (B, t, 1+S, D), grid (h, w) -> (B, t*(1+S), D)."""
        patches = tokens[:, :, 1:]
        near = grid_conv(patches.unflatten(2, grid), self.near.weight, self.near.bias).flatten(2, 3)
        context = torch.cat([tokens[:, :, :1], patches + near], dim=2).flatten(1, 2)
        return self.norm_context(context)

    def forward(self, token, tokens, grid):
        """token (B, 1, D), tokens (B, t, 1+S, D), grid (h, w) -> token (B, 1, D)."""
        token = token + self.drop_path(self.read(self.norm1(token), self.context(tokens, grid)))
        hidden = self.dropout(quick_gelu(self.mlp.fc1(self.norm2(token))))
        return token + self.drop_path(self.mlp.fc2(hidden))

    def looks(self, token, tokens, grid):
        """Where the token looks, arguments as `forward`: (B, t, 1+S), mean over heads, each clip's sum 1."""
        both = torch.cat([self.norm1(token), self.context(tokens, grid)], dim=1)
        q, k, _ = self.attn.queries_keys_values(both)
        share = attention_weights(q[:, :, :1], k[:, :, 1:]).mean(dim=1)
        return share.view(tokens.shape[:3])


# ------------------------------------------------------------------------------------------------
# The network


class UniFormerV2(nn.Module):
    """CLIP's image tower on every frame, armed for video.

    size            a name in SIZES or a Size
    frames          T of the clips it is meant for; no weight depends on it, any clip will do
    image_size      H = W or (H, W) in pixels, a multiple of the patch; default: the size's own
    classes         Y; 0 = no head, forward returns the feature
    global_layers   numbers of the layers, from 0, after which a global block reads; None: the last
                    four, at most half; (): none, just the image tower, whose feature is the mean
                    over frames of the class token (CLIP without its last norm)
    global_heads    heads of the global blocks; default: those of the tower
    local_units     0, 1 or 2 per block; reduction: how much narrower than D they are inside
    temporal_downsample   True: the embedding takes 3 frames at every second one, t = T/2, T even
    balance         False: the feature is the global token alone (for a frozen tower)
    drop_path, global_drop_path   probability that a clip skips a branch in the last block; rises
                    linearly from 0 in the first. See attention.DropPath.
    global_mlp_dropout, head_dropout   probabilities
    mean, std       what pixels are normalised with: three numbers each, of values in [0, 1]

    >>> plain = UniFormerV2("tiny", global_layers=())
    >>> plain(torch.zeros(1, 3, 5, 64, 64)).shape
    torch.Size([1, 192])
    """

    def __init__(self, size="b16", *, frames=8, image_size=None, channels=3, classes=0,
                 global_layers=None, global_heads=None, local_units=0, reduction=1.5,
                 temporal_downsample=False, balance=True, drop_path=0.0, global_drop_path=0.0,
                 global_mlp_dropout=0.5, head_dropout=0.5, mean=MEAN, std=STD):
        super().__init__()
        size = SIZES[size] if isinstance(size, str) else size
        D, p = size.width, size.patch
        image_size = size.image_size if image_size is None else image_size
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        layers = last_layers(size.depth) if global_layers is None else tuple(global_layers)
        if H % p or W % p:
            raise ValueError(f"frames of {H} x {W} pixels do not divide into patches of {p} x {p}")
        if list(layers) != sorted(set(layers) & set(range(size.depth))):
            raise ValueError(f"global_layers {layers}: name layers 0 to {size.depth - 1}, rising")
        if local_units not in (0, 1, 2):
            raise ValueError(f"local_units is {local_units!r}: choose 0, 1 or 2")
        self.config = {
            "model": "UniFormerV2", "size": asdict(size), "frames": frames, "image_size": [H, W],
            "channels": channels, "classes": classes, "global_layers": list(layers),
            "global_heads": global_heads, "local_units": local_units, "reduction": reduction,
            "temporal_downsample": temporal_downsample, "balance": balance, "drop_path": drop_path,
            "global_drop_path": global_drop_path, "global_mlp_dropout": global_mlp_dropout,
            "head_dropout": head_dropout, "mean": list(mean), "std": list(std)}
        self.mean, self.std = tuple(mean), tuple(std)
        self.patch, self.grid, self.global_layers, self._recompute = p, (H // p, W // p), layers, False
        self.window, self.stride = (3, 2) if temporal_downsample else (1, 1)  # frames per embedding
        self.grid_of(frames, H, W)
        self.embed = nn.Linear(channels * self.window * p**2, D, bias=False)
        self.class_token = nn.Parameter(D**-0.5 * torch.randn(D))
        self.positions = nn.Parameter(place_codes(*self.grid, D))
        self.norm_pre = nn.LayerNorm(D)
        rates = torch.linspace(0, drop_path, size.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(FrameBlock(size, local_units, reduction, rate) for rate in rates)
        self.global_token = self.balance = None
        if layers:
            self.global_token = nn.Parameter(torch.zeros(1, 1, D))
            rates = torch.linspace(0, global_drop_path, len(layers), device="cpu").tolist()
            self.global_blocks = nn.ModuleList(
                GlobalBlock(size, global_heads or size.heads, global_mlp_dropout, rate) for rate in rates)
            self.balance = nn.Parameter(torch.zeros(D)) if balance else None
        if classes:
            self.norm, self.drop, self.head = nn.LayerNorm(D), Dropout(head_dropout), nn.Linear(D, classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """The image tower as CLIP's code starts its text tower: residual branches smaller in a deep
        model. The new parts have set up themselves."""
        D, depth = self.embed.out_features, len(self.blocks)
        if self.window > 1:  # begin by looking at one frame, like the image model
            frame = self.embed.weight.unflatten(1, (-1, self.window, self.patch, self.patch))[:, :, 1]
            self.embed.weight.copy_(inflate(frame * self.window**0.5, self.window).flatten(1))
        for block in self.blocks:
            for layer, std in ((block.attn.qkv, D**-0.5), (block.attn.proj, (2 * D * depth)**-0.5),
                               (block.mlp.fc1, (2 * D)**-0.5), (block.mlp.fc2, (2 * D * depth)**-0.5)):
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
        """video (B, C, T, H, W) -> tokens (B, t, 1+S, D), the class token of each frame first.

        The official strided convolution, as a matrix: cut into patches first."""
        t, h, w = self.grid_of(*video.shape[2:])
        if self.window > 1:  # zeros, the mean colour, before the first frame; behind the last none is ever reached
            video = F.pad(video, (0, 0, 0, 0, 1, 0))
        p = self.patch
        cut = video.unfold(2, self.window, self.stride).unfold(3, p, p).unfold(4, p, p)
        cut = cut.permute(0, 2, 3, 4, 1, 5, 6, 7)                            # b t h w (c window p p)
        patches = self.embed(cut.reshape(len(video), t, h * w, -1)) + self.positions[1:]
        first = (self.class_token + self.positions[0]).to(patches.dtype)
        return self.norm_pre(torch.cat([first.expand(len(video), t, 1, -1), patches], dim=2))

    def encode(self, video):
        """video (B, C, T, H, W) float, normalised -> feature (B, D); tokens of the last block
        (B, t, 1+S, D), class token of each frame first, no final norm."""
        reader = self.readers()
        token = None if self.global_token is None else self.global_token.expand(len(video), -1, -1)
        for i, x in enumerate(self.layers(video)):
            if i in reader:
                token = reader[i](token, x, self.grid)
        return self.combine(token, x), x

    def layers(self, video):
        """Yield the tokens (B, t, 1+S, D) after each layer: frames and local units, no global block."""
        x = self.embed_frames(video)
        for block in self.blocks:
            x = block(x, self._recompute)
            yield x

    def read(self, outputs):
        """The global token (B, 1, D) after all global blocks; None where there are none. `encode` does the same
        on the way. outputs: tokens by number of layer, at least of those that a global block reads."""
        if self.global_token is None:
            return None
        token = self.global_token.expand(len(outputs[self.global_layers[0]]), -1, -1)
        for i, block in self.readers().items():
            token = block(token, outputs[i], self.grid)
        return token

    def readers(self):
        """{number of a layer: the global block that reads after it}, rising"""
        return dict(zip(self.global_layers, self.global_blocks)) if self.global_layers else {}

    def combine(self, token, x):
        """Global token (B, 1, D) or None, last tokens (B, t, 1+S, D) -> feature (B, D)."""
        mean = x[:, :, 0].mean(dim=1)
        if token is None:
            return mean
        if self.balance is None:
            return token[:, 0]
        share = self.balance.sigmoid()
        return (1 - share) * token[:, 0] + share * mean

    def features(self, video):
        """video (B, C, T, H, W) -> (B, D), what the head's norm sees."""
        return self.encode(video)[0]

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)."""
        feature = self.features(video)
        return self.head(self.drop(self.norm(feature))) if self.config["classes"] else feature

    def with_head(self, classes, *, norm=None, rows=None, **options):
        """A classifier for Y classes with these weights. As many classes: the head too. 400 after the 710 of
        Kinetics-710: its first 400 rows, which are Kinetics-400. Any other number: a fresh head.

        rows     which row of the old head each class is, Y numbers; default: as above
        norm     a LayerNorm to start the head's norm with; default: this model's, where it has one
        options  head_dropout, drop_path, mean, std, ..., as for the constructor
        """
        config = {key: value for key, value in self.config.items() if key not in ("model", "classes")}
        model = UniFormerV2(**config | {"size": Size(**config["size"])} | options, classes=classes)
        tensors = self.state_dict()
        if norm is not None:
            tensors |= {f"norm.{key}": value for key, value in norm.state_dict().items()}
        old, ours = self.config["classes"], model.state_dict()
        if rows is None and (old, classes) == (710, 400):
            rows = range(400)
        if rows is not None:
            tensors |= {key: tensors[key][list(rows)] for key in ("head.weight", "head.bias")}
        elif old != classes:
            tensors = {key: value for key, value in tensors.items() if not key.startswith("head.") and key in ours}
        missing, unknown = model.load_state_dict(tensors, strict=False)
        assert not unknown and all(key.startswith(("norm.", "head.")) for key in missing), (missing, unknown)
        return model

    def resized(self, image_size):
        """The same model for frames of another size, H = W or (H, W): its table of places is interpolated, bicubic, as CLIP's
        was for 336 pixels. Raises ValueError where patches do not fit."""
        config = {key: value for key, value in self.config.items() if key != "model"}
        model = UniFormerV2(**config | {"size": Size(**config["size"]), "image_size": image_size})
        places = resize_positions(self.positions, self.grid, model.grid)
        model.load_state_dict(self.state_dict() | {"positions": places})
        return model.train(self.training)

    def recompute(self, on=True):
        """Save memory, spend time: keep no activations inside attention and MLP of the frames."""
        self._recompute = on

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        config = {key: value for key, value in config.items() if key != "model"}
        return cls(Size(**config.pop("size")), **config)

    @classmethod
    def from_official(cls, source, *, heads=None, global_heads=None, global_layers=None, frames=None):
        """Load published UniFormerV2 weights, or a run of ours.

        source         path or {name: tensor}; see weights.read
        heads, global_heads   shapes cannot tell them; default: heads of 64, and as many globally
        global_layers  after which layers the global blocks read; default: the last ones, as in
                       all published models
        frames         T, for the record; default 8, with temporal downsampling 16
        returns        the model in eval mode. Sizes and options come from names and shapes; a file
                       without a balance is a frozen one, a file without a head gives features.
        raises         WeightsError: not such a file, or one that does not fit to the last tensor
        """
        file = OfficialFile(source)
        if file.config.get("model") == "UniFormerV2":
            return weights.fill(weights.build(cls.from_config, file.config, file.name), file.tensors, name=file.name).eval()
        if file.config:
            raise WeightsError(f"{file.name}: holds a {file.config.get('model')}, no UniFormerV2 alone; give a run of `train.py "
                               "classify` on one, as runs/default/multimodal")
        size, options = file.measures(heads, global_layers)
        frames = frames or (16 if options["temporal_downsample"] else 8)
        model = cls(size, frames=frames, global_heads=global_heads, **options)
        return weights.fill(model, file.tensors, file.rules(model), name=file.name).eval()

    def to_official(self):
        """{official name: tensor}, what UniFormerV2's own code calls them."""
        if not self.global_layers:
            raise ValueError("a plain tower is no UniFormerV2: it has no name of its own officially")
        officially_last(self.global_layers, len(self.blocks))
        return weights.official(self, [replace(rule, official="backbone." + rule.official) for rule in official_rules(self)])

    @classmethod
    def from_clip(cls, source, *, heads=None, image_size=None, **options):
        """Grow a video model from CLIP's image tower: its numbers, and everything new silent.

        source      path or {name: tensor} of OpenAI's names; `visual.*` is used, to the last tensor
                    but for CLIP's own last norm and projection, `visual.ln_post.*` and `visual.proj`
        heads       default: heads of 64
        image_size  H = W in pixels; another one than CLIP's stretches its position table
        options     as UniFormerV2: classes, frames, global_layers, local_units, ...
        returns     the model in eval mode
        raises      WeightsError, as from_official
        """
        file = OfficialFile(source, prefix="visual.")
        size, plain = file.measures(heads, global_layers=())
        tower = weights.fill(cls(size, **plain), file.tensors, file.rules(cls(size, **plain)), name=file.name)
        model = cls(size, image_size=image_size, **options)
        ours = tower.state_dict()
        ours["positions"] = resize_positions(ours["positions"], tower.grid, model.grid)
        kernel = ours["embed.weight"].unflatten(1, (-1, size.patch, size.patch))
        ours["embed.weight"] = inflate(kernel, model.window).flatten(1)
        model.load_state_dict({**model.state_dict(), **ours}, strict=True)
        return model.eval()


def officially_last(layers, depth):
    """ValueError unless global blocks stand after the last of `depth` layers: official names count them, no more."""
    if list(layers) != list(range(depth - len(layers), depth)):
        raise ValueError(f"global blocks after layers {list(layers)}; officially they stand after the last ones")


def resize_positions(table, old, new):
    """A position table for another grid: (1+h*w, D), old and new (h, w) -> (1+h'*w', D), bicubic. The
    code of the class token stays."""
    if tuple(old) == tuple(new):
        return table
    places = table[1:].unflatten(0, old).permute(2, 0, 1)[None]
    places = F.interpolate(places, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], places[0].flatten(1).T])


# ------------------------------------------------------------------------------------------------
# Official weights


class OfficialFile:
    """An official file of weights: its names without the prefix, and what its shapes tell.

    prefix  what the names begin with; None: "backbone." where the file has it
    """

    def __init__(self, source, prefix=None):
        self.tensors, self.config = weights.read(source)
        self.name = "the dict of weights" if isinstance(source, dict) else str(source)
        self.prefix = ""
        if self.config:
            return
        if prefix is None:
            prefix = "backbone." if any(key.startswith("backbone.") for key in self.tensors) else ""
        else:  # CLIP: leave the text tower and what stands behind the blocks
            self.tensors = {key: value for key, value in self.tensors.items() if key.startswith(prefix)
                            and key != prefix + "proj" and not key.startswith(prefix + "ln_post.")}
        self.prefix = prefix
        if not self.depth("transformer.resblocks."):
            raise WeightsError(f"{self.name}: no {prefix}transformer.resblocks.*, so not the weights of a "
                               f"{'CLIP image tower' if prefix == 'visual.' else 'UniFormerV2'}")

    def depth(self, blocks):
        return weights.depth_of(self.tensors, self.prefix + blocks)

    def has(self, part):
        return any(part in key for key in self.tensors)

    def sizes(self, *endings):
        """The first dimension of all tensors of the blocks whose names end so."""
        blocks = self.prefix + "transformer.resblocks."
        return [value.shape[0] for key, value in self.tensors.items()
                if key.startswith(blocks) and key.endswith(endings) and value.ndim]

    def shape(self, name, ndim):
        return weights.shape_of(self.tensors, self.prefix + name, ndim, self.name)

    def measures(self, heads, global_layers):
        """(Size, options of UniFormerV2). Where many tensors tell a size, most of them decide, so that
        a damaged one is named alone when the model is filled."""
        found = self.sizes(".ln_1.weight", ".ln_2.weight", ".ln_1.bias", ".ln_2.bias")
        hidden = self.sizes(".mlp.c_fc.bias", ".mlp.c_fc.weight")
        if not found or not hidden:
            missing = "mlp.c_fc.weight" if found else "ln_1.weight"
            raise WeightsError(f"{self.name}: missing: {self.prefix}transformer.resblocks.0.{missing}")
        width = commonest(found)
        if not heads and width % 64:
            raise WeightsError(f"{self.name}: shapes cannot tell how many heads a width of {width} has; "
                               "pass heads=")
        kernel = self.shape("conv1.weight", 4 if self.prefix == "visual." else 5)
        window = kernel[2] if len(kernel) == 5 else 1
        places = self.shape("positional_embedding", 2)[0] - 1
        side = math.isqrt(max(places, 0))
        if kernel[-1] != kernel[-2] or window not in (1, 3):
            raise WeightsError(f"{self.name}: wrong shape: {self.prefix}conv1.weight is {kernel}; expected "
                               "square patches of 1 or 3 frames")
        if side < 1 or side * side != places:
            raise WeightsError(f"{self.name}: wrong shape: {self.prefix}positional_embedding has {places} "
                               "places besides the class token, which is not a square")
        size = Size(width, self.depth("transformer.resblocks."), heads or width // 64, commonest(hidden),
                    kernel[-1], side * kernel[-1])
        count = max(self.depth("transformer.dec."), self.depth("transformer.dpe."))
        if global_layers is None:
            global_layers = range(size.depth - count, size.depth)
        if len(global_layers) != count:
            raise WeightsError(f"{self.name}: holds {count} global blocks, global_layers names "
                               f"{len(global_layers)} layers")
        local_units = 2 if self.has(".lmhra2.") else 1 if self.has(".lmhra1.") else 0
        if local_units and not self.has(".num_batches_tracked"):  # a counter that no output depends on
            for i in range(size.depth):
                for unit in range(1, local_units + 1):
                    self.tensors[f"{self.prefix}transformer.resblocks.{i}.lmhra{unit}.pos_embed.0."
                                 "num_batches_tracked"] = torch.tensor(0)
        narrow = self.sizes(".pos_embed.1.bias", ".pos_embed.1.weight", ".pos_embed.2.bias")
        narrow = commonest(narrow) if narrow else int(width // 1.5)
        reduction = 1.5 if int(width // 1.5) == narrow else width / (narrow + 0.5)  # gives int(narrow + 0.5)
        return size, dict(channels=kernel[1], classes=self.classes(), global_layers=tuple(global_layers),
                          local_units=local_units, reduction=reduction, temporal_downsample=window == 3,
                          balance=self.has("transformer.balance"))

    def classes(self):
        """Y, 0 where the file has no head."""
        if not self.has("transformer.proj."):
            return 0
        head = {key: tuple(value.shape) for key, value in self.tensors.items()
                if key.startswith(self.prefix + "transformer.proj.2.") and value.ndim}
        if len({shape[0] for shape in head.values()}) > 1:
            raise WeightsError(f"{self.name}: wrong shape: the head's tensors disagree: {head}")
        if not head:
            raise WeightsError(f"{self.name}: missing: {self.prefix}transformer.proj.2.weight, "
                               f"{self.prefix}transformer.proj.2.bias")
        return next(iter(head.values()))[0]

    def rules(self, model):
        return [replace(rule, official=self.prefix + rule.official) for rule in official_rules(model)]


def official_rules(model):
    """The key map of a UniFormerV2, in network order; official names without `backbone.`. A plain tower
    (no global layers) is CLIP's `visual.*`."""
    p, channels = model.config["size"]["patch"], model.config["channels"]
    window = (model.window,) if model.global_layers else ()  # a plain tower's kernel is that of an image
    rules = [Rule("embed.weight", "conv1.weight", as_matrix, as_kernel(channels, *window, p, p)), Rule("class_token", "class_embedding"),
             Rule("positions", "positional_embedding")] + pairs("norm_pre.", "ln_pre.")
    for i, block in enumerate(model.blocks):
        ours, official = f"blocks.{i}.", f"transformer.resblocks.{i}."
        rules += block_rules(ours, official)
        for j in range(len(block.local)):
            a, b = f"{ours}local.{j}.", f"{official}lmhra{j + 1}.pos_embed."
            rules += [Rule(f"{a}norm.{name}", f"{b}0.{name}") for name in
                      ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
            for k, (part, frames) in enumerate((("reduce.", 1), ("time.", 3), ("expand.", 1)), start=1):
                rules += pairs(a + part, f"{b}{k}.", as_matrix, as_kernel(-1, frames, 1, 1))
    if model.global_layers:
        rules.append(Rule("global_token", "transformer.temporal_cls_token"))
    for j in range(len(model.global_layers)):
        ours, official = f"global_blocks.{j}.", f"transformer.dec.{j}."
        rules += (pairs(ours + "near.", f"transformer.dpe.{j}.")
                  + pairs(ours + "norm_context.", official + "ln_3.") + block_rules(ours, official))
    if model.balance is not None:
        rules.append(Rule("balance", "transformer.balance"))
    if model.config["classes"]:
        rules += pairs("norm.", "transformer.proj.0.") + pairs("head.", "transformer.proj.2.")
    return rules


def block_rules(ours, official):
    """Key map of what every block of CLIP has."""
    return [rule for a, b in (("norm1.", "ln_1."), ("attn.qkv.", "attn.in_proj_"),
                              ("attn.proj.", "attn.out_proj."), ("norm2.", "ln_2."),
                              ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."))
            for rule in pairs(ours + a, official + b)]


def pairs(ours, official, convert=None, back=None):
    """The two rules of a layer with weight and bias."""
    return [Rule(ours + part, official + part, convert, back) for part in ("weight", "bias")]


def as_matrix(kernel):
    """A convolution as the matrix that it is: (D, C, ...) -> (D, C * the rest)."""
    return kernel.flatten(1) if kernel.ndim in (4, 5) else kernel


def as_kernel(*shape):
    """The way back: (D, n) -> (D, *shape); a bias stays as it is."""
    return lambda matrix: matrix.unflatten(1, shape) if matrix.ndim == 2 else matrix


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    """`python uniformerv2.py [VIDEO --weights RUN]`: what happens to a clip, shape by shape, and where it looks."""
    import argparse
    import sys
    from pathlib import Path

    import data
    from video import moving_shapes
    from engine import pictures

    parser = argparse.ArgumentParser(description="An image model, armed to watch video: its steps on one clip.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip")
    parser.add_argument("--weights", help="a run of `train.py classify` on this encoder, or an official file; default: an "
                                          "untrained tiny model")
    parser.add_argument("--family", default="motion", choices=("scenes", "motion", "frozen"),
                        help="without weights: which of the paper's configurations; see preset()")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the clip")
    parser.add_argument("--out", default="runs/global_token.png", help="where the global token looks; PNG")
    args = parser.parse_args(argv)
    try:
        torch.manual_seed(args.seed)
        model = UniFormerV2.from_official(args.weights) if args.weights else \
            UniFormerV2("tiny", classes=16, **{"frames": 16} | preset(args.family, "tiny"))
        T, (H, W) = model.config["frames"], model.config["image_size"]
        if args.video:
            clip = data.one_clip(args.video, T, (H, W))
        else:
            clip = moving_shapes.MovingShapes("test", T, (H, W), args.seed)[0]["video"]
        video = data.normalise(torch.as_tensor(clip)[None], model.mean, model.std)
        explain(model.eval(), video)
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = looks(model, video)
        if found:
            title = "where the global token looks" + ("" if args.weights else ": everywhere, for nothing is trained")
            pictures.attention(clip, torch.cat(list(found.values())), [f"after layer {i}" for i in found], title, path)
            print(f"drawn: {path}")
    except (WeightsError, data.DataError, ValueError, OSError) as error:
        print(f"uniformerv2.py: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def looks(model, video):
    """{number of a layer: where the global block after it looks (B, t, h, w), patches alone}, rising."""
    token, found, reader = None, {}, model.readers()
    for i, x in enumerate(model.layers(video)):
        if i in reader:
            token = model.global_token.expand(len(video), -1, -1) if token is None else token
            found[i] = reader[i].looks(token, x, model.grid)[:, :, 1:].unflatten(2, model.grid)
            token = reader[i](token, x, model.grid)
    return found


@torch.no_grad()
def explain(model, video):
    """Print what happens to a clip, stage by stage."""
    t, h, w = model.grid_of(*video.shape[2:])
    x = model.embed_frames(video)
    B, _, places, D = x.shape
    count = sum(p.numel() for p in model.parameters()) / 1e6
    rows = [("video", "(B, C, T, H, W)", video.shape),
            (f"patches of {model.window}x{model.patch}x{model.patch}, and class tokens", "(B, t, 1+S, D)",
             x.shape)]
    if len(model.blocks[0].local):
        rows.append((f"each layer: local units, a place over {t} frames", "(B, t, S, D)", (B, t, h * w, D)))
    rows.append((f"each of {len(model.blocks)} layers: attention in a frame, mlp", "(B*t, 1+S, D)",
                 (B * t, places, D)))
    for i in model.global_layers:
        rows.append((f"after layer {i}: one token reads all {t * places}", "(B, 1, D)", (B, 1, D)))
    feature, tokens = model.encode(video)
    mean = tokens[:, :, 0].mean(dim=1)
    rows += [("mean over frames of the class tokens", "(B, D)", mean.shape),
             ("feature", "(B, D)", feature.shape), ("logits", "(B, Y)", model(video).shape)]
    for name, letters, shape in rows:
        print(f"{name:50s} {letters:16s} {tuple(shape)}")
    scale = (feature * mean).sum() / mean.square().sum()
    along = F.cosine_similarity(feature, mean).item()
    print(f"{count:.1f} M parameters. The feature is {scale:.3f} times the mean class token"
          + ("" if along > 0.9999 else f", and something of its own (cosine {along:.2f})")
          + "; untrained, when the new parts are silent, half of it and nothing else")


if __name__ == "__main__":
    raise SystemExit(main())
