"""Masked video modelling: hide 90 % of a video in tubes and reconstruct it.

Labels are expensive; raw video is not. A network that reconstructs the hidden part of a clip must
model what moves where. Neighbouring frames are nearly equal, so a patch hidden in one frame could
be copied from the frame before. Hiding the same places in all frames (a tube) prevents that. BERT
hides 15 % of the words (arXiv 1810.04805, Sec. 3.1), MAE 75 % of an image (arXiv 2111.06377,
Fig. 5). Video is the most redundant of the three: 90 % works best (VideoMAE, arXiv 2203.12602,
Sec. 3.2). This is the first stage of InternVideo (arXiv 2212.03191, Sec. 3.2).

    video (B, 3, T, H, W) --take_tubelets--> visible (B, Nv, P)
      visible --embed, + position--> (B, Nv, D) --Encoder--> (B, Nv, D) --linear--> (B, Nv, Dd)
      [visible | mask tokens + position] (B, N, Dd) --Decoder--> last Nm --head--> (B, Nm, P)
      loss = mean (prediction - target)^2,  target = normalised pixels of the hidden tubelets

1. A tubelet is 2 frames x 16 x 16 pixels: 16 x 224 x 224 makes N = 8 x 14 x 14 = 1568 tokens.
2. `tube_mask` hides int(0.9 * 196) = 176 places in every frame. 20 remain: Nv = 160 in the clip.
3. `Encoder` runs joint space-time attention on the visible tokens only. A block is 12.7 times
   cheaper on 160 tokens than on 1568. The encoder never sees mask tokens, in pretraining or later,
   so fine-tuning starts from the same kind of input.
4. `Decoder` adds one learned mask token at every hidden place; the position code tells them apart.
   It sees all N tokens and is thrown away after pretraining, so it is small: see SIZES.
5. `reconstruction_target` removes mean and contrast of every tubelet and channel, so the loss
   measures structure. Predicting zeros, the trivial baseline, costs (n-1)/n for n pixels of a
   tubelet and channel, because the deviation divides by n-1: 0.998 at 2 x 16 x 16.
6. `VideoClassifier` reuses the encoder on all tokens: mean over tokens, norm, linear layer.

Where we differ from the official code (VideoMAE modeling_pretrain.py), with equal numbers: hidden
tubelets are never embedded, visible ones get no target, the last decoder block computes hidden
positions only, and tokens are gathered with fixed counts. Masks draw other random places.

>>> model = VideoMAE("tiny", image_size=64)
>>> hidden = tube_mask(2, model.grid, 0.9, torch.Generator().manual_seed(0))
>>> model(torch.zeros(2, 3, 16, 64, 64), hidden).shape    # (B, Nm, P) = 8*int(0.9*64), 2*8*8*3
torch.Size([2, 456, 384])
"""

import functools
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import Block, Context, Dropout, State, run_blocks, sinusoid_table

# Red, green, blue; pixels in [0, 1]. Every VideoMAE model was trained on clips normalised so.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """The widths and depths of one model."""
    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int


# VideoMAE, Appendix, Tab. "Architectures"; giant and gigantic from VideoMAE V2 (arXiv 2303.16727).
# The huge decoder is 640 wide in VideoMAE, 512 in InternVideo: `from_official` reads it off.
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
    """What both networks of this file are built from. A run saves all of it in its config.json."""
    size: Size | str             # or a name in SIZES
    frames: int = 16             # T of the clips; another T, H or W is accepted, too
    image_size: tuple = 224      # H and W in pixels; one number = both
    tubelet: int = 2             # frames per tubelet
    channels: int = 3
    positions: str = "sinusoid"  # position codes, one of POSITIONS: see `position_codes`
    bias: str = "qv"             # see attention.Attention
    cosine: bool = False         # see attention.Attention
    layer_scale: float = None    # see attention.Block
    eps: float = 1e-6            # of all LayerNorms but one
    head_eps: float = 1e-6       # of the LayerNorm before the decoder's or classifier's head

    def __post_init__(self):
        size, sides = self.size, self.image_size
        size = SIZES[size] if isinstance(size, str) else size
        size = Size(**size) if isinstance(size, dict) else size  # from config.json
        object.__setattr__(self, "size", size)                   # the dataclass is frozen
        sides = [sides] * 2 if isinstance(sides, int) else list(sides)
        object.__setattr__(self, "image_size", sides)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}: choose {', '.join(POSITIONS)}")

    @property
    def block(self):
        """The arguments of every attention.Block."""
        return dict(bias=self.bias, cosine=self.cosine, eps=self.eps, layer_scale=self.layer_scale)


# ------------------------------------------------------------------------------------------------
# Tubelets, masks and position codes


def take_tubelets(video, index, patch, tubelet):
    """Cut tubelets out of a video (B, C, T, H, W) -> (B, n, C, tubelet*patch*patch).

    index  (B, n) int64, which of the N = t*h*w tubelets, n = tau*h*w + y*w + x; None = all
    """
    B, C, T, H, W = video.shape
    t, h, w = T // tubelet, H // patch, W // patch
    cut = video.view(B, C, t, tubelet, h, patch, w, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    if index is None:
        return cut.reshape(B, t * h * w, C, -1)
    row = torch.arange(B, device=index.device)[:, None]
    return cut[row, index // (h * w), index // w % h, index % w].flatten(3)


def imagenet_statistics(like):
    """ImageNet mean and standard deviation on the device of `like`, (3, 1) float32 each."""
    return (torch.tensor(x, device=like.device)[:, None] for x in (IMAGENET_MEAN, IMAGENET_STD))


def imagenet_normalise(tubelets):
    """uint8 tubelets (B, n, 3, pixels) -> float32, normalised; float ones are returned as they are.
    Frames stay uint8 until the visible 10 % are selected: that saves memory traffic."""
    if tubelets.dtype != torch.uint8:
        return tubelets
    mean, std = imagenet_statistics(tubelets)
    return tubelets.float().div_(255).sub_(mean).div_(std)


def hide(batch, places, count, generator):
    """(batch, places) bool with exactly `count` True in each row, places drawn uniformly."""
    rank = torch.rand(batch, places, generator=generator).argsort(dim=1)
    return torch.zeros(batch, places, dtype=torch.bool).scatter_(1, rank[:, :count], True)


def tube_mask(batch, grid, ratio, generator=None):
    """Hide the same places in every frame (VideoMAE, Sec. 3.3): int(ratio * h * w) of them.

    grid (t, h, w), ratio in [0, 1) -> (batch, t*h*w) bool on the CPU, True = hidden
    """
    t, h, w = grid
    return hide(batch, h * w, int(ratio * h * w), generator).repeat(1, t)


def random_mask(batch, grid, ratio, generator=None):
    """As `tube_mask`: as many hidden tokens, each anywhere in space and time."""
    t, h, w = grid
    return hide(batch, t * h * w, t * int(ratio * h * w), generator)


def frame_mask(batch, grid, ratio, generator=None):
    """As `tube_mask`: whole frames, int(ratio * t) time steps."""
    t, h, w = grid
    return hide(batch, t, int(ratio * t), generator).repeat_interleave(h * w, dim=1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}


def split_by_mask(mask, name="hidden"):
    """mask (B, N) bool -> token numbers, rising: (B, N - n) of False, (B, n) of True. ValueError
    unless every row holds the same number n of True: fixed counts keep the shapes static."""
    N, counts, in_graph = mask.shape[1], mask.sum(dim=1), torch.compiler.is_compiling()
    count = counts[0].item()
    if in_graph:  # it cannot compare rows, and has to know that 0 < count < N
        torch._check(count > 0), torch._check(count < N)
    elif (counts != count).any():
        raise ValueError(f"every row of `{name}` must mark the same number of tokens, "
                         f"got {sorted(set(counts.tolist()))}")
    keys = mask * N + torch.arange(N, device=mask.device)
    # No two are equal, so any sort will do: ONNX lacks the stable one, which is faster elsewhere.
    order = keys.argsort(dim=1) if in_graph else keys.argsort(dim=1, stable=True)
    return order[:, :N - count], order[:, N - count:]


def gather(tokens, index):
    """tokens (B, N, D) at index (B, n) -> (B, n, D); a table (1, N, D) serves every row."""
    tokens = tokens.expand(index.shape[0], -1, -1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def resize_positions(table, old, new):
    """Stretch a position table over another token grid: bicubic in space, then linear in time.

    table (1, t*h*w, D), old and new (t, h, w) -> (1, N, D). InternVideo's weights for 384 px and 32
    frames were trained so (its appendix: computing the sinusoids anew is worse).
    """
    (t, h, w), (new_t, new_h, new_w) = old, new
    if (h, w) != (new_h, new_w):
        frames = table.unflatten(1, old)[0].permute(0, 3, 1, 2)              # (t, D, h, w)
        frames = F.interpolate(frames, size=(new_h, new_w), mode="bicubic", align_corners=False)
        table = frames.permute(0, 2, 3, 1).flatten(0, 2)[None]
    if t != new_t:
        places = table[0].unflatten(0, (t, new_h * new_w)).permute(1, 2, 0)  # (h*w, D, t)
        places = F.interpolate(places, size=new_t, mode="linear", align_corners=False)
        table = places.permute(2, 0, 1).flatten(0, 1)[None]
    return table


def cosine_table(places, width):
    """Position codes (places, width) float32: the columns of the discrete cosine transform but the
    constant one, over and over. Any two of the places are equally far apart."""
    number = 1 + torch.arange(width) % max(1, places - 1)
    place = torch.arange(places, dtype=torch.float64)[:, None] + 0.5
    return (2**0.5 * torch.cos(math.pi * number * place / places)).float()


def position_codes(positions, grid, patch, tubelet, width):
    """Position codes of a token grid (t, h, w): (1, N, width) float32.

    "sinusoid"  official: of the flattened token index, computed for this grid
    "resized"   computed for 16 frames of 224 px and stretched to this grid
    "axes"      a third of the channels each for time, row and column: "next row" is the same shift
                everywhere. Small models learn it sooner (LOG.md)
    "cosines"   as "axes", but cosines that fit the grid in place of wavelengths up to 60,000: on a
                grid of four, most columns of "axes" hardly change from place to place (LOG.md)
    "stored"    a table in the weights, at first "sinusoid". It never learns: nor does the official
    """
    t, h, w = grid
    if positions in ("axes", "cosines"):
        third, table = width // 6 * 2, sinusoid_table if positions == "axes" else cosine_table
        time, row, column = (table(length, channels) for length, channels in
                             ((t, third), (h, third), (w, width - 2 * third)))
        codes = (time[:, None, None], row[None, :, None], column[None, None])
        return torch.cat([code.expand(t, h, w, -1) for code in codes], 3).view(1, t * h * w, width)
    if positions == "resized":
        trained = (16 // tubelet, 224 // patch, 224 // patch)
        return resize_positions(sinusoid_table(math.prod(trained), width)[None], trained, grid)
    return sinusoid_table(t * h * w, width)[None]


# ------------------------------------------------------------------------------------------------
# Networks


def initialise(part, scheme):
    """Draw the matrices of all Linear layers in `part` with scheme(weight); zero their biases."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            scheme(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """A plain video transformer: tubelet embedding, position codes, blocks, norm.

    scheme     draws the blocks' matrices, see `initialise`. Embedding and `encoder_to_decoder` keep
               torch's default: the official initialiser never reaches them
    drop_path  share of samples that skip the last block; rises from 0 over the blocks
    norm       LayerNorm after the blocks; False where the classifier norms the mean instead
    """

    block_class = Block  # a variant has its own

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
        self.register_buffer("stored", self.codes_of(self.grid),
                             persistent=self.positions == "stored")  # else not in the weights
        self.recompute = False
        initialise(self.blocks, scheme)

    def grid_of(self, T, H, W):
        """Token grid (t, h, w) of a clip of T frames of H x W pixels; ValueError if it has none."""
        if T % self.tubelet or H % self.patch or W % self.patch:
            raise ValueError(f"a clip of {T} frames of {H} x {W} pixels does not divide into "
                             f"tubelets of {self.tubelet} x {self.patch} x {self.patch}")
        return T // self.tubelet, H // self.patch, W // self.patch

    def codes_of(self, grid):
        """Position codes computed for a grid, (1, N, D)."""
        return position_codes(self.positions, grid, self.patch, self.tubelet,
                              self.embed.out_features)

    def start(self, video, visible=None):
        """video (B, C, T, H, W) -> the state before block 0: embedded tubelets plus position codes.
        visible (B, Nv) int64: the tokens to embed; None = all."""
        grid, codes = self.grid_of(*video.shape[2:]), self.stored            # (1, N, D)
        if grid != self.grid and self.positions == "stored":
            codes = resize_positions(codes, self.grid, grid)
        elif grid != self.grid:
            codes = self.codes_of(grid).to(codes)
        tubelets = imagenet_normalise(take_tubelets(video, visible, self.patch, self.tubelet))
        tokens = self.embed(tubelets.flatten(2))                             # (B, Nv, D)
        return State(tokens + (codes if visible is None else gather(codes, visible)))

    def run(self, state, start, stop):
        """The state after blocks start..stop-1."""
        blocks = list(self.blocks)[start:stop]
        return replace(state, tokens=run_blocks(blocks, state.tokens, recompute=self.recompute))

    def forward(self, video, visible=None):
        """Arguments as `start` -> tokens of the last block after the norm, (B, Nv, D)."""
        return self.norm(self.run(self.start(video, visible), 0, len(self.blocks)).tokens)


class Decoder(nn.Module):
    """Blocks over all positions, then norm and head for the last n of them."""

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
        """tokens (B, Nv + n, Dd) -> predictions for the last n, (B, n, P)."""
        tokens = run_blocks(self.blocks, tokens, Context(last=n), recompute=self.recompute)
        return self.head(self.norm(tokens))


class Network(nn.Module):
    """What the two networks below share: options, an encoder, and new networks from old ones."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    classifier = "VideoClassifier"  # its model_name; a variant has its own, and its own encoder
    encoder_class = Encoder

    def __init__(self, options, saved, **encoder):
        super().__init__()
        self.options = options
        self.config = {"model": self.model_name} | asdict(options) | saved
        self.encoder = self.encoder_class(options, **encoder)

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        for part in self.children():
            part.recompute = on

    def with_head(self, classes, *, rows=None, **options):
        """A classifier for Y classes with this encoder: the way into fine-tuning, and to other
        classes. rows, options (drop, drop_path, frames, image_size, ...): see weights.heads."""
        from weights import heads
        return heads.masked(self, classes, rows, options)

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    def to_official(self):
        """{official name: tensor}; ValueError for position codes unknown to the official code."""
        from weights import videomae
        return videomae.to_official(self)


class VideoMAE(Network):
    """Masked autoencoder (VideoMAE, Sec. 3.3). ViT-B has 94 M parameters, 86 M in the encoder.

    drop_path   see Encoder. size, options: see Options
    normalised  True = it predicts normalised pixels; only drawing needs to know
    """

    model_name = "VideoMAE"  # in config.json
    undecayed = "mask_token",  # see engine/optimisers.py

    def __init__(self, size="base", *, drop_path=0.0, normalised=True, **options):
        options = Options(size, **options)
        super().__init__(options, {"normalised": normalised}, drop_path=drop_path)
        size, self.grid = options.size, self.encoder.grid
        self.encoder_to_decoder = nn.Linear(size.width, size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder = Decoder(options)
        self.register_buffer("codes", self.codes_of(self.grid), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def codes_of(self, grid):
        """Position codes of the decoder for a grid, (1, N, Dd): never resized or stored."""
        size, positions = self.options.size, self.options.positions
        computed = positions if positions in ("axes", "cosines") else "sinusoid"
        return position_codes(computed, grid, size.patch, self.options.tubelet, size.decoder_width)

    def forward(self, video, hidden, targets=None):
        """Predict the hidden tubelets -> (B, Nm, P), as `reconstruction_target` returns them.

        video    (B, C, T, H, W) float, ImageNet-normalised, or uint8 as read from a file
        hidden   (B, N) bool, True = not shown to the encoder; the same count in every row
        targets  (B, n) int64, tokens to predict; default: the hidden ones, rising
        """
        visible, masked = (index.to(video.device) for index in split_by_mask(hidden))
        targets = masked if targets is None else targets
        tokens = self.encoder_to_decoder(self.encoder(video, visible))       # (B, Nv, Dd)
        grid = self.encoder.grid_of(*video.shape[2:])
        codes = self.codes if grid == self.grid else self.codes_of(grid).to(self.codes)
        # First the visible tokens, then the hidden ones, as in the official code.
        tokens = torch.cat([tokens + gather(codes, visible),
                            self.mask_token + gather(codes, targets)], dim=1)
        return self.decoder(tokens, targets.shape[1])

    @classmethod
    def from_official(cls, source, *, heads=None, decoder_heads=None, **options):
        """Load pretraining weights of VideoMAE, InternVideo, VideoMAE V2 or Hugging Face, or a run
        of ours, in eval mode. Arguments and errors: see weights.videomae.load_pretrained."""
        from weights import videomae
        return videomae.load_pretrained(cls, source, heads=heads, decoder_heads=decoder_heads,
                                        **options)


class VideoClassifier(Network):
    """The encoder on all tokens, their mean, a norm and a linear layer (VideoMAE, Sec. 4).

    The mean, because there is no class token: pretraining trains no single token to represent the
    clip. The encoder's own norm, made for single tokens, is left out.

    classes     Y; 0 = no head, forward returns the features
    drop        dropout before the head, a probability. drop_path: see Encoder
    head_scale  factor on the head's first weights

    UniFormerV2 has the same interface: width, depth, heads, mean, std, family, grid_of, start, run,
    finish, tokens, feature, with_head, layer_of, learned_parts.
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
        """Token grid (t, h, w) of a clip of T frames of H x W pixels; ValueError if it has none."""
        return self.encoder.grid_of(T, H, W)

    def start(self, video):
        """video (B, C, T, H, W) float or uint8 -> the State before block 0."""
        return self.encoder.start(video)

    def run(self, state, start, stop):
        """The state after blocks start..stop-1."""
        return self.encoder.run(state, start, stop)

    def finish(self, state):
        """The state after the last block -> what the head sees, (B, D)."""
        return self.fc_norm(state.tokens.mean(dim=1))

    def tokens(self, video):
        """video (B, C, T, H, W) -> all tokens of the last block, (B, N, D)."""
        return self.run(self.start(video), 0, self.depth).tokens

    def feature(self, video):
        """video (B, C, T, H, W) -> what the head sees, (B, D)."""
        return self.finish(self.run(self.start(video), 0, self.depth))

    def forward(self, video):
        """video (B, C, T, H, W) float, ImageNet-normalised, or uint8 -> logits (B, Y)."""
        return self.head(self.drop(self.feature(video)))

    def learned_parts(self):
        """The modules that train while the encoder is frozen (fusion.py)."""
        return [self.fc_norm, self.head]

    def layer_of(self, name):
        """Depth of a parameter: 0 = embedding, i + 1 = block i, `depth` + 1 = all that follows."""
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith("encoder.embed.") else self.depth + 1

    @classmethod
    def from_official(cls, source, *, heads=None, **options):
        """Load fine-tuned weights, as VideoMAE.from_official: weights.videomae.load_classifier."""
        from weights import videomae
        return videomae.load_classifier(cls, source, heads=heads, **options)


def reconstruction_target(video, hidden, normalise=True, *, patch=None, tubelet=2):
    """What the model must predict (VideoMAE, Sec. 3.3; MAE, arXiv 2111.06377, Sec. 3).

    video, hidden  as VideoMAE.forward; ValueError where they do not fit each other
    normalise      True: of every tubelet and channel, subtract the mean and divide by the standard
                   deviation (unbiased; 1e-6 added after the root). False: pixels in [0, 1]
    patch          side of a tubelet in pixels; default: what fits N, the length of `hidden`
    returns        (B, Nm, P), tokens rising, P in the order frame, row, column, colour
    """
    T, H, W = video.shape[2:]
    if patch is None:
        patch = round((T // tubelet * H * W / hidden.shape[1]) ** 0.5)
    if (T // tubelet) * (H // patch) * (W // patch) != hidden.shape[1]:
        raise ValueError(f"a mask of {hidden.shape[1]} tokens does not fit a clip of {T} frames of "
                         f"{H} x {W} pixels in tubelets of {tubelet} x {patch} x {patch}")
    _, targets = split_by_mask(hidden)
    tubelets = pixels_of(video, targets.to(video.device), patch, tubelet)
    if normalise:
        mean, std = tubelet_statistics(tubelets)
        tubelets = (tubelets - mean) / std
    return tubelets.transpose(2, 3).flatten(2)


def pixels_of(video, index, patch, tubelet):
    """Tubelets `index` (B, n) of a video as colours in [0, 1]: (B, n, 3, pixels)."""
    # uint8 is normalised and scaled back, so that the last bit is that of the official code.
    tubelets = imagenet_normalise(take_tubelets(video, index, patch, tubelet))
    mean, std = (x.to(tubelets.dtype) for x in imagenet_statistics(video))
    return tubelets * std + mean


def tubelet_statistics(tubelets):
    """Mean, and standard deviation plus 1e-6, of each tubelet and channel: (B, n, 3, 1) each."""
    mean = tubelets.mean(dim=-1, keepdim=True)
    # On a CPU this takes a tenth of the time of torch.var_mean.
    length = (tubelets - mean).norm(dim=-1, keepdim=True)
    return mean, length / (tubelets.shape[-1] - 1) ** 0.5 + 1e-6


def trivial_guess(video, hidden, normalise=True, *, patch=None, tubelet=2):
    """What can be said without a model, as `reconstruction_target` returns it; arguments as there.

    Normalised: the mean of each tubelet, which is 0. Plain: the clip's mean visible colour.
    """
    if normalise:
        return torch.zeros_like(reconstruction_target(video, hidden, patch=patch, tubelet=tubelet))
    target = reconstruction_target(video, hidden, False, patch=patch, tubelet=tubelet)
    seen = reconstruction_target(video, ~hidden, False, patch=patch, tubelet=tubelet)
    colour = seen.unflatten(-1, (-1, 3)).mean(dim=(1, 2))                    # (B, 3)
    return colour[:, None].repeat(1, target.shape[1], target.shape[2] // 3)


def reconstruction_loss(prediction, target):
    """Mean squared error of (B, Nm, P), in float32 or float64; predicting 0 costs about 1."""
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    return F.mse_loss(prediction, target)


@torch.no_grad()
def main():
    """`python mae.py`: one masked step on a generated clip, shape by shape."""
    from video import moving_shapes

    model = VideoMAE("tiny", frames=8, image_size=40, positions="cosines").eval()
    clip = torch.as_tensor(moving_shapes.MovingShapes("test", 8, (40, 40), 0)[0]["video"])
    video, hidden = clip[None].permute(0, 4, 1, 2, 3), tube_mask(1, model.grid, 0.75)
    tokens = model.encoder(video, split_by_mask(hidden)[0])
    prediction, target = model(video, hidden), reconstruction_target(video, hidden)
    for name, value in (("video (B, C, T, H, W)", video), ("hidden (B, N)", hidden),
                        ("visible tokens, encoded (B, Nv, D)", tokens),
                        ("target (B, Nm, P)", target), ("prediction (B, Nm, P)", prediction)):
        print(f"{name:40s} {tuple(value.shape)}")
    print(f"untrained loss {reconstruction_loss(prediction, target):.3f}")


if __name__ == "__main__":
    main()
