"""Masked video modelling (VideoMAE): hide 90 % of a video and train a network to reconstruct it.

This is stage 1 of InternVideo (arXiv 2212.03191, Sec. 3.2). The method is VideoMAE (arXiv
2203.12602). It needs no labels. To reconstruct the hidden part of a clip, a network must model
objects and their motion. Neighbouring frames are nearly equal, so a patch hidden in one frame could
be copied from the next. A tube mask makes this harder: it hides the same patches in all frames. For
images a mask ratio of 75 % is best (MAE, arXiv 2111.06377, Fig. 5). Videos are more redundant, and
90 % is best (VideoMAE, Sec. 3.2 and 3.3).

    video (B, 3, T, H, W) --take_tubelets--> visible (B, Nv, P)
      visible --embed, + position--> (B, Nv, D) --Encoder--> (B, Nv, D) --linear--> (B, Nv, Dd)
      [visible | mask tokens], + position (B, N, Dd) --Decoder--> last Nm --head--> (B, Nm, P)
      loss = mean (prediction - target)^2,  target = normalised pixels of the hidden tubelets

    Nv Nm   visible and hidden tokens, Nv + Nm = N   160, 1408      Dd   decoder width      384
    P       numbers in a tubelet, 2 * 16 * 16 * 3    1536           Y    number of classes  400

1. A tubelet is 2 frames x 16 x 16 pixels. 16 x 224 x 224 pixels make N = 8 * 14 * 14 = 1568 tokens.
2. `tube_mask` hides int(0.9 * 196) = 176 of 196 tokens per time step; 8 * 20 = 160 are visible.
3. `Encoder` runs on the visible tokens only. Each token attends to all of them, in space and time.
   A block needs 12.7 times less computation for 160 tokens than for 1568. The encoder never gets
   mask tokens, so its input in fine-tuning is of the kind that it was trained on.
4. `Decoder` gets the encoded visible tokens, and one learned mask token for each hidden position.
   Position encodings are added to both. Only pretraining needs it, so it is small: see SIZES.
5. `reconstruction_target` normalises each tubelet and channel to mean 0 and variance 1. A
   prediction of 0 has a loss of (n-1)/n for n pixels, because the variance is the unbiased one.
6. `VideoClassifier` reuses the encoder on all tokens: mean over tokens, norm, linear layer.

Where we differ from the official code (VideoMAE modeling_pretrain.py), with equal results: only
visible tubelets are embedded, only hidden ones get a target, and the last decoder block computes
hidden positions only. Masks differ, because they come from another random generator.

>>> model = VideoMAE("tiny", image_size=64)
>>> hidden = tube_mask(2, model.grid, 0.9, torch.Generator().manual_seed(0))
>>> model(torch.zeros(2, 3, 16, 64, 64), hidden).shape  # (B, Nm, P) = 2, 8*int(0.9*8*8), 2*8*8*3
torch.Size([2, 456, 384])
"""

import functools
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import Block, Context, Dropout, State, run_blocks, sinusoid_table

# For red, green and blue in [0, 1]. All VideoMAE models are trained with these values.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """Widths and depths of encoder and decoder; `patch` is the side of a tubelet in pixels."""
    width: int  # D
    depth: int
    heads: int
    mlp_width: int
    patch: int
    decoder_width: int  # Dd
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int


# VideoMAE, Appendix, Tab. "Architectures"; giant and gigantic: VideoMAE V2 (arXiv 2303.16727).
# The decoder of "huge" is 640 wide in VideoMAE, 512 in InternVideo: `from_official` reads the width
# from the weights.
SIZES = {
    #                D  depth heads  MLP patch  decoder: D depth heads MLP
    "tiny":     Size(96,   3,  4,  384,  8,             96,  4,  4,  384),  # ours, for laptops
    "small":    Size(384, 12,  6, 1536, 16,            192,  4,  3,  768),
    "base":     Size(768, 12, 12, 3072, 16,            384,  4,  6, 1536),
    "large":    Size(1024, 24, 16, 4096, 16,           512, 12,  8, 2048),
    "huge":     Size(1280, 32, 16, 5120, 16,           640, 12,  8, 2560),
    "giant":    Size(1408, 40, 16, 6144, 14,           512,  4,  8, 2234),
    "gigantic": Size(1664, 48, 16, 8192, 14,           512,  4,  8, 2520),
}
POSITIONS = ("sinusoid", "resized", "axes", "cosines", "stored")


@dataclass(frozen=True)
class Options:
    """Options of VideoMAE and VideoClassifier. A run saves all of them in its config.json."""
    size: Size | str             # Size, or a name in SIZES
    frames: int = 16             # T of the clips; clips with another T, H or W are accepted, too
    image_size: int | tuple = 224  # H and W in pixels; one number = both; stored as [H, W]
    tubelet: int = 2             # frames per tubelet
    channels: int = 3
    positions: str = "sinusoid"  # position encoding, one of POSITIONS: see `position_codes`
    bias: str = "qv"             # see attention.Attention
    cosine: bool = False         # see attention.Attention
    layer_scale: float | None = None  # see attention.Block
    eps: float = 1e-6            # of all LayerNorms but one: head_eps
    head_eps: float = 1e-6       # of the LayerNorm before the head of the decoder or classifier

    def __post_init__(self):
        size, sides = self.size, self.image_size
        size = SIZES[size] if isinstance(size, str) else size
        size = Size(**size) if isinstance(size, dict) else size  # from config.json
        object.__setattr__(self, "size", size)                   # because the class is frozen
        sides = [sides] * 2 if isinstance(sides, int) else list(sides)
        object.__setattr__(self, "image_size", sides)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}: choose {', '.join(POSITIONS)}")

    @property
    def block(self):
        """Options that every attention.Block gets."""
        return dict(bias=self.bias, cosine=self.cosine, eps=self.eps, layer_scale=self.layer_scale)


# ------------------------------------------------------------------------------------------------
# Tubelets, masks and position encodings


def take_tubelets(video, index, patch, tubelet):
    """Cut tubelets out of a video (B, C, T, H, W) -> (B, n, C, tubelet*patch*patch).

    index           (B, n) int64, numbers tau*h*w + y*w + x of the tubelets to take; None = all N
    patch, tubelet  side of a tubelet in pixels; frames in a tubelet
    """
    B, C, T, H, W = video.shape
    t, h, w = T // tubelet, H // patch, W // patch
    # (B, t, h, w, C, tubelet, patch, patch)
    tubelets = video.view(B, C, t, tubelet, h, patch, w, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    if index is None:
        return tubelets.reshape(B, t * h * w, C, -1)
    b = torch.arange(B, device=index.device)[:, None]                        # (B, 1)
    # Indices of clip, tau, y and x -> (B, n, C, tubelet, patch, patch), then pixels on one axis.
    return tubelets[b, index // (h * w), index // w % h, index % w].flatten(3)


def imagenet_statistics(like):
    """ImageNet mean and standard deviation, each (3, 1) float32, on the device of tensor `like`."""
    return (torch.tensor(x, device=like.device)[:, None] for x in (IMAGENET_MEAN, IMAGENET_STD))


def imagenet_normalise(tubelets):
    """Normalise uint8 tubelets (B, n, 3, pixels) -> float32. Float tubelets are returned unchanged.

    A video stays uint8 until the visible 10 % are selected. Only these need to become float32.
    """
    if tubelets.dtype != torch.uint8:
        return tubelets
    mean, std = imagenet_statistics(tubelets)
    return tubelets.float().div_(255).sub_(mean).div_(std)


def draw_mask(batch, length, count, generator):
    """Random mask (batch, length) bool with exactly `count` True in each row."""
    order = torch.rand(batch, length, generator=generator).argsort(dim=1)    # random permutations
    return torch.zeros(batch, length, dtype=torch.bool).scatter_(1, order[:, :count], True)


def tube_mask(batch, grid, ratio, generator=None):
    """Hide the same int(ratio * h * w) positions at every time step (VideoMAE, Sec. 3.3).

    grid (t, h, w), ratio in [0, 1) -> (batch, t*h*w) bool on the CPU, True = hidden
    """
    t, h, w = grid
    return draw_mask(batch, h * w, int(ratio * h * w), generator).repeat(1, t)


def random_mask(batch, grid, ratio, generator=None):
    """Hide as many tokens as `tube_mask`, drawn from all positions in space and time."""
    t, h, w = grid
    return draw_mask(batch, t * h * w, t * int(ratio * h * w), generator)


def frame_mask(batch, grid, ratio, generator=None):
    """As `tube_mask`, but hide all tokens of int(ratio * t) random time steps."""
    t, h, w = grid
    return draw_mask(batch, t, int(ratio * t), generator).repeat_interleave(h * w, dim=1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}


def split_by_mask(mask, name="hidden"):
    """Token numbers where a mask (B, N) bool is False, (B, N - n), and where it is True, (B, n).

    The numbers are int64 and ascending. Every row must have the same number n of True, because
    rows of a tensor have one length; otherwise ValueError, which calls the mask `name`.
    """
    N, counts, compiling = mask.shape[1], mask.sum(dim=1), torch.compiler.is_compiling()
    count = counts[0].item()
    if compiling:  # a compiled graph cannot compare the rows, but it needs 0 < count < N
        torch._check(count > 0), torch._check(count < N)
    elif (counts != count).any():
        raise ValueError(f"every row of `{name}` must mark the same number of tokens, "
                         f"got {sorted(set(counts.tolist()))}")
    # The value of token n is n if the mask is False and N + n if it is True. Sorted, all False come
    # first. No values are equal, so any sort will do: stable is faster, but ONNX has none.
    values = mask * N + torch.arange(N, device=mask.device)                  # (B, N)
    order = values.argsort(dim=1) if compiling else values.argsort(dim=1, stable=True)
    return order[:, :N - count], order[:, N - count:]


def gather(tokens, index):
    """Take the tokens with numbers `index` (B, n) from tokens (B or 1, N, D) -> (B, n, D)."""
    tokens = tokens.expand(index.shape[0], -1, -1)                           # (B, N, D)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def resize_positions(table, old_grid, new_grid):
    """Resize a position table to another token grid: bicubic in space, then linear in time.

    table (1, t*h*w, D), grids (t, h, w) -> (1, N, D) for the new grid. InternVideo trained its
    ViT-H for 32 frames of 384 px with such a table. Sinusoids computed for the new grid are worse
    (InternVideo, appendix).
    """
    (t, h, w), (new_t, new_h, new_w) = old_grid, new_grid
    if (h, w) != (new_h, new_w):
        maps = table.unflatten(1, old_grid)[0].permute(0, 3, 1, 2)           # (t, D, h, w)
        maps = F.interpolate(maps, size=(new_h, new_w), mode="bicubic", align_corners=False)
        table = maps.permute(0, 2, 3, 1).flatten(0, 2)[None]                 # (1, t*new_h*new_w, D)
    if t != new_t:
        series = table[0].unflatten(0, (t, new_h * new_w)).permute(1, 2, 0)  # (new_h*new_w, D, t)
        series = F.interpolate(series, size=new_t, mode="linear", align_corners=False)
        table = series.permute(2, 0, 1).flatten(0, 1)[None]                  # (1, N, D)
    return table


def cosine_table(length, width):
    """Position encodings (length, width) float32 from the discrete cosine transform (DCT).

    Columns are the DCT's basis functions without the constant one, repeated to fill the width. If
    width is a multiple of length - 1, the encodings of any two positions are equally far apart.
    """
    frequency = 1 + torch.arange(width) % max(1, length - 1)                 # (width,)
    position = torch.arange(length, dtype=torch.float64)[:, None] + 0.5      # (length, 1)
    return (2**0.5 * torch.cos(math.pi * frequency * position / length)).float()


def position_codes(positions, grid, patch, tubelet, width):
    """Position encodings of a token grid (t, h, w) -> (1, N, width) float32.

    positions selects how they are computed:

    "sinusoid"  as in the official code: sinusoids of the token number n, for this grid
    "resized"   sinusoids for 16 frames of 224 px, resized to this grid (`resize_positions`)
    "axes"      sinusoids of time, row and column in a third of the channels each. Dot products
                depend only on the three distances. Small models learn sooner with it (LOG.md)
    "cosines"   as "axes", with `cosine_table`. Sinusoids have wavelengths up to 60,000, so along an
                axis of 4 positions most of their columns are almost constant (LOG.md)
    "stored"    here as "sinusoid". `Encoder` then keeps the table among its weights, not trained
    """
    t, h, w = grid
    if positions in ("axes", "cosines"):
        third, table = width // 6 * 2, sinusoid_table if positions == "axes" else cosine_table
        time, row, column = (table(length, channels) for length, channels in
                             ((t, third), (h, third), (w, width - 2 * third)))
        parts = (time[:, None, None], row[None, :, None], column[None, None])
        return torch.cat([part.expand(t, h, w, -1) for part in parts], 3).view(1, t * h * w, width)
    if positions == "resized":
        trained_grid = (16 // tubelet, 224 // patch, 224 // patch)
        return resize_positions(sinusoid_table(math.prod(trained_grid), width)[None], trained_grid,
                                grid)
    return sinusoid_table(t * h * w, width)[None]


# ------------------------------------------------------------------------------------------------
# Networks


def initialise(network, scheme):
    """Initialise all Linear layers of a network: weights by scheme(weight), biases with zeros."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            scheme(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """Video transformer: tubelet embedding plus position encoding, blocks, norm.

    scheme     function that initialises the weights of the blocks, see `initialise`. The embedding
               keeps torch's initialisation, as in the official code
    drop_path  DropPath rate of the last block. The rates rise linearly from 0 in the first block
    norm       True = LayerNorm after the blocks. VideoClassifier has none: it norms the mean
    """

    block_class = Block  # subclasses may replace it: variants/divided_attention.py

    def __init__(self, options, *, scheme=nn.init.xavier_uniform_, drop_path=0.0, norm=True):
        super().__init__()
        size = options.size
        self.patch, self.tubelet, self.positions = size.patch, options.tubelet, options.positions
        self.grid = self.grid_of(options.frames, *options.image_size)
        self.embed = nn.Linear(options.channels * options.tubelet * size.patch**2, size.width)
        rates = torch.linspace(0, drop_path, size.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            self.block_class(size.width, size.heads, mlp_width=size.mlp_width, drop_path=rate,
                             **options.block) for rate in rates)
        self.norm = nn.LayerNorm(size.width, eps=options.eps) if norm else nn.Identity()
        # Position encodings for self.grid. Only with positions="stored" are they in the weights.
        self.register_buffer("stored", self.codes_of(self.grid),
                             persistent=self.positions == "stored")
        self.recompute = False
        initialise(self.blocks, scheme)

    def grid_of(self, T, H, W):
        """Token grid (t, h, w) of T frames of H x W pixels. ValueError if tubelets do not fit."""
        if T % self.tubelet or H % self.patch or W % self.patch:
            raise ValueError(f"a clip of {T} frames of {H} x {W} pixels does not divide into "
                             f"tubelets of {self.tubelet} x {self.patch} x {self.patch}")
        return T // self.tubelet, H // self.patch, W // self.patch

    def codes_of(self, grid):
        """Position encodings computed for a grid, (1, N, D)."""
        return position_codes(self.positions, grid, self.patch, self.tubelet,
                              self.embed.out_features)

    def start(self, video, visible=None):
        """Embed tubelets and add position encodings: video (B, C, T, H, W) -> State before block 0.

        visible  (B, Nv) int64, numbers of the tokens to embed; None = all N
        """
        grid, codes = self.grid_of(*video.shape[2:]), self.stored            # codes (1, N, D)
        if grid != self.grid and self.positions == "stored":
            codes = resize_positions(codes, self.grid, grid)
        elif grid != self.grid:
            codes = self.codes_of(grid).to(codes)
        tubelets = imagenet_normalise(take_tubelets(video, visible, self.patch, self.tubelet))
        # In P the colour is the slowest axis here, in the target the fastest (as officially).
        tokens = self.embed(tubelets.flatten(2))                             # (B, Nv, D)
        return State(tokens + (codes if visible is None else gather(codes, visible)))

    def run(self, state, start, stop):
        """Run blocks start to stop - 1: the State before them -> the State after them."""
        blocks = list(self.blocks)[start:stop]  # a slice of a ModuleList would be a new module
        return replace(state, tokens=run_blocks(blocks, state.tokens, recompute=self.recompute))

    def forward(self, video, visible=None):
        """Arguments as in `start` -> normed tokens of the last block, (B, Nv, D)."""
        return self.norm(self.run(self.start(video, visible), 0, len(self.blocks)).tokens)


class Decoder(nn.Module):
    """Blocks on visible and mask tokens, then norm and head on the mask tokens, which are last."""

    def __init__(self, options):
        super().__init__()
        size = options.size
        self.blocks = nn.ModuleList(
            Block(size.decoder_width, size.decoder_heads, mlp_width=size.decoder_mlp_width,
                  **options.block) for _ in range(size.decoder_depth))
        self.norm = nn.LayerNorm(size.decoder_width, eps=options.head_eps)
        self.head = nn.Linear(size.decoder_width,
                              options.channels * options.tubelet * size.patch**2)  # P
        self.recompute = False
        initialise(self, nn.init.xavier_uniform_)

    def forward(self, tokens, n):
        """tokens (B, Nv + n, Dd) -> predicted tubelets for the last n tokens, (B, n, P)."""
        tokens = run_blocks(self.blocks, tokens, Context(last=n), recompute=self.recompute)
        return self.head(self.norm(tokens))                                  # (B, n, P)


class Network(nn.Module):
    """Base class of VideoMAE and VideoClassifier: options, encoder, configuration, conversion.

    options          Options
    more_config      {name: value}, what config.json holds besides model_name and options
    encoder_options  further arguments of Encoder
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    classifier = "VideoClassifier"  # what with_head builds; variants/ replace these two
    encoder_class = Encoder

    def __init__(self, options, more_config, **encoder_options):
        super().__init__()
        self.options = options
        self.config = {"model": self.model_name} | asdict(options) | more_config
        self.encoder = self.encoder_class(options, **encoder_options)

    def recompute(self, on=True):
        """Switch activation checkpointing on or off: see attention.run_blocks."""
        for module in self.children():
            module.recompute = on

    def with_head(self, classes, *, rows=None, **options):
        """A new classifier for Y classes with this encoder, for fine-tuning.

        rows     rows of the old head that the new one starts with: see weights.heads.rows_of
        options  of the new classifier, where they differ: drop, drop_path, frames, image_size, ...
        """
        from weights import heads
        return heads.masked(self, classes, rows, options)

    @classmethod
    def from_config(cls, config):
        """Build the network from the config.json of a run."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    def to_official(self):
        """The weights as {official name: tensor}. ValueError for a position encoding that the
        official code does not have."""
        from weights import videomae
        return videomae.to_official(self)


class VideoMAE(Network):
    """Masked autoencoder (VideoMAE, Sec. 3.3). ViT-B has 94 M parameters, 86 M in the encoder.

    size, options  see Options
    drop_path      see Encoder
    normalised     True = trained on normalised targets. `forward` does not use it
    """

    model_name = "VideoMAE"    # in config.json
    no_weight_decay = "mask_token",  # read by engine/optimisers.py

    def __init__(self, size="base", *, drop_path=0.0, normalised=True, **options):
        options = Options(size, **options)
        super().__init__(options, {"normalised": normalised}, drop_path=drop_path)
        size, self.grid = options.size, self.encoder.grid
        # This layer keeps torch's initialisation, as in the official code.
        self.encoder_to_decoder = nn.Linear(size.width, size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder = Decoder(options)
        self.register_buffer("codes", self.codes_of(self.grid), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def codes_of(self, grid):
        """Position encodings of the decoder, (1, N, Dd): computed for this grid, never resized."""
        size, positions = self.options.size, self.options.positions
        computed = positions if positions in ("axes", "cosines") else "sinusoid"
        return position_codes(computed, grid, size.patch, self.options.tubelet, size.decoder_width)

    def forward(self, video, hidden, decoded=None):
        """Predict the hidden tubelets -> (B, Nm, P), in the layout of `reconstruction_target`.

        video    (B, C, T, H, W) float, ImageNet-normalised, or uint8, 0 to 255
        hidden   (B, N) bool, True = hidden from the encoder; the same number in every row
        decoded  (B, n) int64, numbers of the tokens to predict; default: the Nm hidden ones
        """
        visible, masked = (index.to(video.device) for index in split_by_mask(hidden))
        decoded = masked if decoded is None else decoded
        tokens = self.encoder_to_decoder(self.encoder(video, visible))       # (B, Nv, Dd)
        grid = self.encoder.grid_of(*video.shape[2:])
        codes = self.codes if grid == self.grid else self.codes_of(grid).to(self.codes)
        # Visible tokens first, then mask tokens. The codes tell where they are, not their order.
        tokens = torch.cat([tokens + gather(codes, visible),
                            self.mask_token + gather(codes, decoded)], dim=1)  # (B, Nv + n, Dd)
        return self.decoder(tokens, decoded.shape[1])

    @classmethod
    def from_official(cls, source, *, heads=None, decoder_heads=None, **options):
        """Load a pretrained VideoMAE, in eval mode. The source is a file of VideoMAE, InternVideo,
        VideoMAE V2 or Hugging Face, or a run. Details: weights.videomae.load_pretrained."""
        from weights import videomae
        return videomae.load_pretrained(cls, source, heads=heads, decoder_heads=decoder_heads,
                                        **options)


class VideoClassifier(Network):
    """Classifier: encoder on all tokens, mean over tokens, norm, linear layer (VideoMAE, Sec. 4).

    There is no class token, so the mean of all tokens represents the clip. `fc_norm` norms this
    mean. It replaces the norm of the encoder.

    size, options  see Options
    classes        Y; 0 = no head: `forward` returns the feature
    drop           dropout probability before the head
    drop_path      see Encoder
    head_scale     factor on the initial weights of the head

    uniformerv2.UniFormerV2 has the same interface: width, depth, heads, mean, std, family, grid_of,
    start, run, finish, tokens, feature, with_head, layer_index, trainable_modules.
    """

    model_name, family = "VideoClassifier", "masked"

    def __init__(self, size="base", *, classes, drop=0.0, drop_path=0.0, head_scale=0.001,
                 **options):
        options = Options(size, **options)
        scheme = functools.partial(nn.init.trunc_normal_, std=0.02)
        super().__init__(options, {"classes": classes}, scheme=scheme, drop_path=drop_path,
                         norm=False)
        size = options.size
        self.width, self.depth, self.heads = size.width, size.depth, size.heads
        self.fc_norm = nn.LayerNorm(size.width, eps=options.head_eps)
        self.drop = Dropout(drop)
        self.head = nn.Linear(size.width, classes) if classes else nn.Identity()
        initialise(self.head, scheme)
        if classes:
            self.head.weight.data.mul_(head_scale)

    def grid_of(self, T, H, W):
        """See Encoder.grid_of."""
        return self.encoder.grid_of(T, H, W)

    def start(self, video):
        """video (B, C, T, H, W) float or uint8 -> State before block 0."""
        return self.encoder.start(video)

    def run(self, state, start, stop):
        """See Encoder.run."""
        return self.encoder.run(state, start, stop)

    def finish(self, state):
        """State after the last block -> feature (B, D), the input of the head."""
        return self.fc_norm(state.tokens.mean(dim=1))

    def tokens(self, video):
        """video (B, C, T, H, W) -> tokens of the last block, (B, N, D), without a norm."""
        return self.run(self.start(video), 0, self.depth).tokens

    def feature(self, video):
        """video (B, C, T, H, W) -> feature (B, D), the input of the head."""
        return self.finish(self.run(self.start(video), 0, self.depth))

    def forward(self, video):
        """video (B, C, T, H, W) float, ImageNet-normalised, or uint8 -> logits (B, Y)."""
        return self.head(self.drop(self.feature(video)))

    def trainable_modules(self):
        """The modules that stage 4 (fusion.py) trains while the blocks are frozen."""
        return [self.fc_norm, self.head]

    def layer_index(self, name):
        """Layer of a parameter, for layer-wise learning rates: 0 = embedding, i + 1 = block i,
        depth + 1 = norm and head."""
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith("encoder.embed.") else self.depth + 1

    @classmethod
    def from_official(cls, source, *, heads=None, **options):
        """Load fine-tuned weights, in eval mode. Details: weights.videomae.load_classifier."""
        from weights import videomae
        return videomae.load_classifier(cls, source, heads=heads, **options)


def reconstruction_target(video, hidden, normalise=True, *, patch=None, tubelet=2):
    """Pixels of the hidden tubelets: what the model learns to predict (VideoMAE, Sec. 3.3).

    video, hidden  as in VideoMAE.forward; ValueError if N does not fit the size of the video
    normalise      True = normalise each tubelet and channel to mean 0 and variance 1 (MAE, arXiv
                   2111.06377, Sec. 3); False = pixels in [0, 1]
    patch          side of a tubelet in pixels; default: computed from N
    tubelet        frames in a tubelet
    returns        (B, Nm, P); tokens ascending; order in P: frame, row, column, colour
    """
    T, H, W = video.shape[2:]
    if patch is None:
        patch = round((T // tubelet * H * W / hidden.shape[1]) ** 0.5)
    if (T // tubelet) * (H // patch) * (W // patch) != hidden.shape[1]:
        raise ValueError(f"a mask of {hidden.shape[1]} tokens does not fit a clip of {T} frames of "
                         f"{H} x {W} pixels in tubelets of {tubelet} x {patch} x {patch}")
    _, index = split_by_mask(hidden)                                         # (B, Nm)
    tubelets = tubelet_pixels(video, index.to(video.device), patch, tubelet)  # (B, Nm, 3, pixels)
    if normalise:
        mean, std = tubelet_statistics(tubelets)
        tubelets = tubelets.sub_(mean).div_(std)
    return tubelets.transpose(2, 3).flatten(2)                               # (B, Nm, P)


def tubelet_pixels(video, index, patch, tubelet):
    """Tubelets with numbers `index` (B, n), as colours in [0, 1] -> (B, n, 3, pixels) float."""
    tubelets = take_tubelets(video, index, patch, tubelet)
    if tubelets.dtype == torch.uint8:
        return tubelets.float().div_(255)
    mean, std = (x.to(tubelets.dtype) for x in imagenet_statistics(video))
    return tubelets * std + mean


def tubelet_statistics(tubelets):
    """Mean, and unbiased standard deviation plus 1e-6, of each tubelet and channel.

    tubelets (B, n, 3, pixels) -> (B, n, 3, 1) each
    """
    mean = tubelets.mean(dim=-1, keepdim=True)                               # (B, n, 3, 1)
    # On a CPU, norm takes a tenth of the time of torch.var_mean.
    norm = (tubelets - mean).norm(dim=-1, keepdim=True)                      # (B, n, 3, 1)
    return mean, norm / (tubelets.shape[-1] - 1) ** 0.5 + 1e-6


def trivial_prediction(video, hidden, normalise=True, *, patch=None, tubelet=2):
    """The prediction of a trivial baseline. Arguments and result as in `reconstruction_target`.

    normalise  True = zeros, the mean of every target; False = the mean visible colour of the clip
    """
    if normalise:
        return torch.zeros_like(reconstruction_target(video, hidden, patch=patch, tubelet=tubelet))
    target = reconstruction_target(video, hidden, False, patch=patch, tubelet=tubelet)
    visible = reconstruction_target(video, ~hidden, False, patch=patch, tubelet=tubelet)
    colour = visible.unflatten(-1, (-1, 3)).mean(dim=(1, 2))                 # (B, 3)
    return colour[:, None].repeat(1, target.shape[1], target.shape[2] // 3)  # (B, Nm, P)


def reconstruction_loss(prediction, target):
    """Mean squared error of prediction and target, both (B, Nm, P), computed in float32 or more."""
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    return F.mse_loss(prediction, target)


@torch.no_grad()
def main():
    """`python mae.py`: print the shapes of a forward pass on a generated clip."""
    from video import moving_shapes

    model = VideoMAE("tiny", frames=8, image_size=40, positions="cosines").eval()
    clip = torch.as_tensor(moving_shapes.MovingShapes("test", 8, (40, 40), 0)[0]["video"])
    video, hidden = clip[None].permute(0, 4, 1, 2, 3), tube_mask(1, model.grid, 0.75)
    tokens = model.encoder(video, split_by_mask(hidden)[0])
    prediction, target = model(video, hidden), reconstruction_target(video, hidden)
    for name, value in (("video (B, C, T, H, W)", video), ("hidden (B, N)", hidden),
                        ("encoded visible tokens (B, Nv, D)", tokens),
                        ("target (B, Nm, P)", target), ("prediction (B, Nm, P)", prediction)):
        print(f"{name:40s} {tuple(value.shape)}")
    print(f"loss before training {reconstruction_loss(prediction, target):.3f}")


if __name__ == "__main__":
    main()
