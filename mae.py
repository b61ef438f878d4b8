"""Hide ninety percent of a video in tubes and learn by painting it back.

Why: labels are dear and pixels are free. A network that can paint the hidden part of a clip must
have understood what moves where. Neighbouring frames are nearly equal, so hiding single patches
at random would let it copy the answer from the frame before; hiding the same places in all frames
(a tube) takes that short cut away. Every word of a sentence says something new, and BERT hides 15 %
of them (arXiv 1810.04805, Sec. 3.1, Masked LM); a still picture repeats itself and is best hidden to 75 %
(MAE, arXiv 2111.06377, Fig. 5); a clip says most things several times over, so still more must be hidden
before the task is hard enough to teach, and 90 % is best.
(VideoMAE, arXiv 2203.12602, Sec. 3.2, Characteristics of Video Data; the first stage of
InternVideo, arXiv 2212.03191, Sec. 3.2, Self-Supervised Video Pretraining.)

    video (B, 3, T, H, W) --take_tubelets--> visible (B, Nv, P)     hidden ones are never embedded
      visible --embed, + position--> (B, Nv, D) --encoder--> (B, Nv, D) --linear--> (B, Nv, D/2)
      [visible | mask tokens + position] (B, N, D/2) --decoder--> last Nm --head--> (B, Nm, P)
      loss = mean (prediction - target)^2,   target = normalised pixels of the hidden tubelets

The idea, in steps:
1. A tubelet is 2 frames x 16 x 16 pixels: 16 x 224 x 224 makes 8 x 14 x 14 = 1568 tokens.
   `take_tubelets` cuts out just the ones asked for.
2. `tube_mask` hides int(0.9 * 196) = 176 places in every frame (89.8 %: int() rounds down); 20 remain,
   160 in the clip.
3. `Encoder` runs joint space-time attention, every token to every other, on those 160 only: a tenth
   of the tokens in projections and MLPs, a hundredth of the pairs in the attention, a block 12.7 times
   cheaper in all. It meets nothing but real tubelets, as later in fine-tuning, where a mask token would be
   an input that never comes again. (`DividedBlock` is the rival: first over time, then over space.)
4. `Decoder` puts a mask token at every hidden place, all of them alike but for the position code, which
   says what is asked for there. So it sees all N positions, ten times what the
   encoder sees: it must be cheap. ViT-B's is half as wide and 4 blocks deep, to the encoder's 12. The
   work is lopsided on purpose: the encoder is kept, the decoder is thrown away. (Our tiny one is not
   lopsided: 96 wide and 4 deep beside 96 and 3; it has too little width to halve.)
5. `reconstruction_target` removes mean and contrast of every tubelet and channel, so that the loss
   is about structure. Predicting plain zeros, the mean of each tubelet, costs (n-1)/n for n pixels of a
   tubelet and channel (the deviation divides by n-1), 0.998 at 2 x 16 x 16 and 0.99 at 2 x 8 x 8: the trivial baseline, and the number to compare every curve with.
6. `VideoMAE.packed` takes clips of different length or mask ratio in one row, without padding: a mask
   keeps them apart, and no pair of tokens of different clips costs anything.
7. `VideoClassifier` reuses the encoder on all tokens: mean over tokens, norm, linear. The mean, for there is no
   class token, and pretraining asks no single token to speak for the clip.

What the features are good and bad at: motion and fine detail early on; names of things only after
labels, which is what the other encoder of InternVideo is for.

Where we differ from the official code (VideoMAE modeling_pretrain.py), with equal numbers: only
visible tubelets are embedded and only hidden ones get a target; the last decoder block answers for
hidden positions alone; tokens are gathered with fixed counts, not by boolean indexing. Equal on
purpose, though unusual: position codes are sinusoids over the flattened token index; the decoder's
tokens stay in the order visible, then hidden; a "learnable" position table is detached and never
learns. The masks differ in which random places they draw.

Numbers: ViT-B has 94 M parameters in pretraining (86 M kept) and 1568 tokens; our tiny one
0.9 M (0.4 M kept), and 100 tokens of 8 frames of 40 x 40 pixels.

>>> video = torch.zeros(2, 3, 16, 64, 64)
>>> model = VideoMAE("tiny", image_size=64)
>>> hidden = tube_mask(2, model.grid, 0.9, torch.Generator().manual_seed(0))
>>> hidden.shape, int(hidden[0].sum())               # (B, N), Nm = 8 * int(0.9 * 64)
(torch.Size([2, 512]), 456)
>>> model(video, hidden).shape                       # (B, Nm, P), P = 2 * 8 * 8 * 3
torch.Size([2, 456, 384])
"""

import functools
import re
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Attention, Block, Context, Dropout, Mask, run_blocks, sinusoid_table
from weights import Rule, WeightsError

# Red, green, blue; pixels in [0, 1]. Every VideoMAE model was trained on clips normalised so.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """The measures of one model; `decoder_depth` is a choice of the recipe, not of the name."""

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


# ------------------------------------------------------------------------------------------------
# Tubelets and masks


def take_tubelets(video, index, patch, tubelet):
    """Cut chosen tubelets out of a video, copying nothing else.

    video    (B, C, T, H, W)
    index    (B, n) int64, which of the N = t*h*w tubelets, n = tau*h*w + y*w + x; None = all
    returns  (B, n, C, tubelet*patch*patch), pixels in the order frame, row, column
    """
    B, C, T, H, W = video.shape
    t, h, w = T // tubelet, H // patch, W // patch
    cut = video.view(B, C, t, tubelet, h, patch, w, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    if index is None:
        return cut.reshape(B, t * h * w, C, -1)
    row = torch.arange(B, device=index.device)[:, None]
    return cut[row, index // (h * w), index // w % h, index % w].flatten(3)


def normalised(tubelets):
    """Tubelets (B, n, 3, pixels) of uint8 -> float32, ImageNet-normalised; others are so already. Bytes are a
    quarter of the traffic, and what is never looked at need not become a float: the encoder sees a tenth."""
    if tubelets.dtype != torch.uint8:
        return tubelets
    mean, std = (torch.tensor(x, device=tubelets.device)[:, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return tubelets.float().div_(255).sub_(mean).div_(std)


def put_tubelets(video, index, tubelets, patch, tubelet):
    """The inverse of `take_tubelets`: a copy of the video with these tubelets painted in."""
    B, C, T, H, W = video.shape
    t, h, w = T // tubelet, H // patch, W // patch
    video = video.clone(memory_format=torch.contiguous_format)
    cut = video.view(B, C, t, tubelet, h, patch, w, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    row = torch.arange(B, device=index.device)[:, None]
    cut[row, index // (h * w), index // w % h, index % w] = \
        tubelets.reshape(*index.shape, C, tubelet, patch, patch).to(video.dtype)
    return video


def hide(batch, places, count, generator):
    """(batch, places) bool with exactly `count` True in each row, places drawn uniformly."""
    rank = torch.rand(batch, places, generator=generator).argsort(dim=1)
    return torch.zeros(batch, places, dtype=torch.bool).scatter_(1, rank[:, :count], True)


def tube_mask(batch, grid, ratio, generator=None):
    """Hide the same places in every frame (VideoMAE, Sec. 3.3, Tube masking).

    grid     (t, h, w), the token grid
    ratio    share of each frame to hide, in [0, 1): int(ratio * h * w) places
    returns  (batch, t*h*w) bool on the CPU, True = hidden from the encoder
    """
    t, h, w = grid
    return hide(batch, h * w, int(ratio * h * w), generator).repeat(1, t)


def random_mask(batch, grid, ratio, generator=None):
    """Hide as many places, each anywhere in space and time. Arguments as `tube_mask`."""
    t, h, w = grid
    return hide(batch, t * h * w, t * int(ratio * h * w), generator)


def frame_mask(batch, grid, ratio, generator=None):
    """Hide whole frames: int(ratio * t) of them. Arguments as `tube_mask`."""
    t, h, w = grid
    return hide(batch, t, int(ratio * t), generator).repeat_interleave(h * w, dim=1)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}


def running_cell_mask(batch, grid, generator=None):
    """Which tokens the decoder leaves out in VideoMAE V2: half of each 2 x 2 cell, running on in time.

    Returns (batch, t*h*w) bool, True = not decoded. The decoder, which sees all places, has half the
    tokens to do. Every cell is decoded in full within three time steps; each sample starts at a random
    one of four. (VideoMAE V2, arXiv 2303.16727, Sec. 3.2, Dual Masking.)
    """
    t, h, w = grid
    if h % 2 or w % 2:
        raise ValueError(f"running cells are 2 x 2: a token grid of {h} x {w} does not divide")
    cells = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]])
    start = torch.randint(4, (batch, 1), generator=generator)
    step = (start + torch.arange(t)) % 4                                     # (batch, t)
    return cells[step].bool().repeat(1, 1, h // 2, w // 2).flatten(1)


def split(mask, name="hidden"):
    """Token numbers where the mask is False and where it is True, each in rising order.

    mask (B, N) bool -> (B, N - n), (B, n) int64. Every row must hold the same number n of True:
    fixed counts keep the shapes static, for torch.compile and for batching.
    """
    counts = mask.sum(dim=1)
    count = int(counts[0])
    if (counts != count).any():
        raise ValueError(f"every row of `{name}` must mark the same number of tokens, "
                         f"got {sorted(set(counts.tolist()))}")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :mask.shape[1] - count], order[:, mask.shape[1] - count:]


def gather(tokens, index):
    """tokens (B, N, D) at index (B, n) -> (B, n, D); a table (1, N, D) serves every row."""
    tokens = tokens.expand(index.shape[0], -1, -1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


# ------------------------------------------------------------------------------------------------
# Position codes


def resize_positions(table, old, new):
    """Stretch a position table over another token grid: bicubic in space, then linear in time.

    table (1, t*h*w, D) on grid old=(t, h, w) -> (1, t'*h'*w', D). For the InternVideo weights at
    384 px and 32 frames, which were trained so (its appendix: computing the sinusoids anew hurts).
    """
    (t, h, w), (T, H, W) = old, new
    D = table.shape[-1]
    if (h, w) != (H, W):
        frames = table.reshape(t, h, w, D).permute(0, 3, 1, 2)
        frames = F.interpolate(frames, size=(H, W), mode="bicubic", align_corners=False)
        table = frames.permute(0, 2, 3, 1).reshape(1, t * H * W, D)
    if t != T:
        places = table.reshape(t, H * W, D).permute(1, 2, 0)
        places = F.interpolate(places, size=T, mode="linear", align_corners=False)
        table = places.permute(2, 0, 1).reshape(1, T * H * W, D)
    return table


@functools.lru_cache(maxsize=32)
def position_codes(kind, grid, patch, tubelet, width, device):
    """(1, N, D) float32 for a token grid.

    kind  "sinusoid": of the flattened token index, made for this grid (official); "resized": made for 16
          frames of 224 px and stretched to it; "axes": a third of the channels each for time, row and
          column, so that "next row" is the same shift everywhere. Small models find it sooner (LOG.md)."""
    t, h, w = grid
    if kind == "axes":
        third = width // 6 * 2
        codes = (sinusoid_table(t, third)[:, None, None], sinusoid_table(h, third)[None, :, None],
                 sinusoid_table(w, width - 2 * third)[None, None])
        return torch.cat([code.expand(t, h, w, -1) for code in codes], dim=3).view(1, t * h * w, width).to(device)
    if kind == "sinusoid":
        return sinusoid_table(t * h * w, width)[None].to(device)
    trained = (16 // tubelet, 224 // patch, 224 // patch)
    table = sinusoid_table(trained[0] * trained[1] * trained[2], width)[None]
    return resize_positions(table, trained, grid).to(device)


# ------------------------------------------------------------------------------------------------
# Networks


def pair(image_size):
    """int or (H, W) -> (H, W)"""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


class DividedBlock(Block):
    """First each place attends over time, then each time step over its places, then the MLP: divided space-time
    attention (TimeSformer, arXiv 2102.05095, Sec. 3, Space-Time Self-Attention Models), the rival of joint
    attention, in which every token sees every other. A token meets t + N/t others in place of N, but the attention
    over time has projections of its own: at ViT-B's width a block costs 3 % more than a joint one on all 1568 tokens,
    29 % more on the 160 visible ones, and pays on longer clips. `--space-time divided` compares the two.

    times    t, time steps of a clip; its N tokens are t times as many places, the same in every step: all of
             them, or those that a tube mask leaves
    Other arguments as Block; the layer over time has its own norm and weights.
    """

    def __init__(self, width, heads, times, **options):
        super().__init__(width, heads, **options)
        self.times = times
        self.norm_time = nn.LayerNorm(width, eps=options["eps"])
        self.attn_time = Attention(width, heads, bias=options["bias"], cosine=options["cosine"])

    def forward(self, x, context=None):
        """x (B, N, D) -> (B, N, D)."""
        context = context or Context()
        if context.mask is not None or context.last is not None or x.shape[1] % self.times:
            raise ValueError(f"divided attention is for whole clips of {self.times} time steps, the same places in each")
        B, N, D = x.shape
        along = x.unflatten(1, (self.times, -1)).transpose(1, 2).flatten(0, 1)                  # (B*places, t, D)
        along = self.attn_time(self.norm_time(along)).unflatten(0, (B, -1)).transpose(1, 2)     # (B, t, places, D)
        return super().forward(x + self.drop_path(along.reshape(B, N, D)))

    def self_attention(self, x, context):
        """Over space: the tokens of each time step among themselves."""
        return self.attn(x.unflatten(1, (self.times, -1)).flatten(0, 1)).view(x.shape)


class Encoder(nn.Module):
    """A plain video transformer: tubelet embedding, position codes, blocks, norm.

    frames, image_size  what the grid is for; another clip is fine too, its codes are computed
    space_time          "joint": every token attends to every other; "divided": see DividedBlock
    positions           "sinusoid", "resized", "axes" (see `position_codes`) or "stored": a table in the
                        weights, which is added but never trained (as the official code does)
    norm                LayerNorm after the blocks; False where the classifier norms the mean instead
    """

    def __init__(self, size, *, frames, image_size, channels=3, tubelet=2, positions="sinusoid",
                 bias="qv", cosine=False, layer_scale=None, eps=1e-6, drop_path=0.0, norm=True, space_time="joint"):
        super().__init__()
        if space_time not in ("joint", "divided"):
            raise ValueError(f"space_time is {space_time!r}: choose joint or divided")
        self.patch, self.tubelet, self.kind, self.space_time = size.patch, tubelet, positions, space_time
        self.grid = self.grid_of(frames, *pair(image_size))
        self.embed = nn.Linear(channels * tubelet * size.patch**2, size.width)
        rates = torch.linspace(0, drop_path, size.depth, device="cpu").tolist()
        block = Block if space_time == "joint" else functools.partial(DividedBlock, times=self.grid[0])
        self.blocks = nn.ModuleList(
            block(size.width, size.heads, mlp_width=size.mlp_width, bias=bias, cosine=cosine, eps=eps,
                  drop_path=rate, layer_scale=layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(size.width, eps=eps) if norm else nn.Identity()
        if positions == "stored":
            t, h, w = self.grid
            self.register_buffer("stored", sinusoid_table(t * h * w, size.width)[None])
        elif positions not in ("sinusoid", "resized", "axes"):
            raise ValueError(f"positions is {positions!r}: choose sinusoid, resized, axes or stored")
        self.recompute = False

    def grid_of(self, T, H, W):
        """Token grid (t, h, w) of a clip of T frames of H x W pixels."""
        if T % self.tubelet or H % self.patch or W % self.patch:
            raise ValueError(f"a clip of {T} frames of {H} x {W} pixels does not divide into "
                             f"tubelets of {self.tubelet} x {self.patch} x {self.patch}")
        return T // self.tubelet, H // self.patch, W // self.patch

    def codes(self, grid, like):
        """Position codes (1, N, D) for a grid, in dtype and on the device of `like`."""
        if self.kind == "stored":
            if grid != self.grid:
                return resize_positions(self.stored, self.grid, grid)
            return self.stored
        table = position_codes(self.kind, grid, self.patch, self.tubelet,
                               self.embed.out_features, like.device)
        return table.to(torch.promote_types(like.dtype, torch.float32))

    def forward(self, video, visible=None):
        """video (B, C, T, H, W), visible (B, Nv) int64 or None (all) -> tokens (B, Nv, D)."""
        return self.norm(run_blocks(self.blocks, self.begin(video, visible), recompute=self.recompute))

    def begin(self, video, visible=None):
        """The tokens before the first block: embedded tubelets and position codes, (B, Nv, D)."""
        grid = self.grid_of(*video.shape[2:])
        if self.space_time == "divided" and grid[0] != self.grid[0]:
            raise ValueError(f"divided attention was made for clips of {self.grid[0] * self.tubelet} frames, not of {video.shape[2]}")
        codes = self.codes(grid, video)
        tokens = self.embed(normalised(take_tubelets(video, visible, self.patch, self.tubelet)).flatten(2))
        return tokens + (codes if visible is None else gather(codes, visible))

    def packed(self, videos, visible, segments):
        """Several clips in one row: lists of (1, C, T, H, W) and of (1, Nv), and the clip of each token, (1, sum
        of Nv) int -> tokens (1, sum of Nv, D)."""
        tubelets = [normalised(take_tubelets(video, index, self.patch, self.tubelet))
                    for video, index in zip(videos, visible)]
        codes = [gather(self.codes(self.grid_of(*video.shape[2:]), video), index)
                 for video, index in zip(videos, visible)]
        tokens = self.embed(torch.cat(tubelets, dim=1).flatten(2)) + torch.cat(codes, dim=1)
        return self.norm(run_blocks(self.blocks, tokens, Context(Mask(frames=segments)), recompute=self.recompute))


class Decoder(nn.Module):
    """Blocks over all positions, then norm and head for the last n of them."""

    def __init__(self, size, outputs, *, bias="qv", cosine=False, layer_scale=None, eps=1e-6,
                 head_eps=1e-6):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(size.decoder_width, size.decoder_heads, mlp_width=size.decoder_mlp_width, bias=bias,
                  cosine=cosine, eps=eps, layer_scale=layer_scale) for _ in range(size.decoder_depth))
        self.norm = nn.LayerNorm(size.decoder_width, eps=head_eps)
        self.head = nn.Linear(size.decoder_width, outputs)
        self.recompute = False

    def forward(self, tokens, n, mask=None):
        """tokens (B, Nv + n, D/2) -> predictions for the last n, (B, n, P)."""
        tokens = run_blocks(self.blocks, tokens, Context(mask, last=n), recompute=self.recompute)
        return self.head(self.norm(tokens))


def _sized(config, kept):
    """Of a saved configuration, these entries, as arguments."""
    return {key: Size(**config[key]) if key == "size" else config[key] for key in kept}


class VideoMAE(nn.Module):
    """Masked autoencoder for video (VideoMAE, Sec. 3.3, VideoMAE).

    size        a name in SIZES or a Size
    frames, image_size, tubelet, channels   the clip: T, H (and W), frames per tubelet, colours
    positions, bias, cosine, layer_scale, drop_path, space_time   see Encoder; the decoder is joint
    eps, head_eps   of the LayerNorms in blocks and encoder; of the decoder's last one
    normalised  True = it predicts normalised pixels; only drawing needs to know

    >>> VideoMAE("tiny", image_size=(32, 48)).grid     # t, h, w
    (8, 4, 6)
    """

    def __init__(self, size="base", *, frames=16, image_size=224, tubelet=2, channels=3,
                 positions="sinusoid", bias="qv", cosine=False, layer_scale=None, drop_path=0.0,
                 eps=1e-6, head_eps=1e-6, normalised=True, space_time="joint"):
        super().__init__()
        size = SIZES[size] if isinstance(size, str) else size
        self.config = {"model": "VideoMAE", "size": asdict(size), "frames": frames,
                       "image_size": list(pair(image_size)), "tubelet": tubelet,
                       "channels": channels, "positions": positions, "bias": bias, "cosine": cosine,
                       "layer_scale": layer_scale, "eps": eps, "head_eps": head_eps,
                       "normalised": normalised, "space_time": space_time}
        block = dict(bias=bias, cosine=cosine, layer_scale=layer_scale, eps=eps)
        self.encoder = Encoder(size, frames=frames, image_size=image_size, channels=channels,
                               tubelet=tubelet, positions=positions, drop_path=drop_path, space_time=space_time, **block)
        self.encoder_to_decoder = nn.Linear(size.width, size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder = Decoder(size, channels * tubelet * size.patch**2, head_eps=head_eps, **block)
        self.initialise()

    @property
    def grid(self):
        """Token grid (t, h, w) of the clips it was made for."""
        return self.encoder.grid

    @torch.no_grad()
    def initialise(self):
        """Xavier for the Linear layers, zero biases. Two layers keep torch's default, as in the
        official code, whose initialiser never reaches them: embedding and encoder_to_decoder."""
        for part in (self.encoder.blocks, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, video, hidden, skipped=None):
        """Predict the hidden tubelets.

        video    (B, C, T, H, W) float, ImageNet-normalised, or uint8 as read from a file
        hidden   (B, N) bool, True = not shown to the encoder; the same count in every row
        skipped  (B, N) bool or None, True = not decoded (VideoMAE V2's dual mask). With it the
                 decoder predicts every token that is not skipped, hidden or not.
        returns  (B, Nm, P): predictions in rising token order, P = tubelet*patch*patch*C with the
                 colour fastest, in the units of `reconstruction_target`
        """
        visible, wanted = split(hidden)
        if self.encoder.space_time == "divided":
            times = hidden.unflatten(1, (self.grid[0], -1))
            if (times != times[:, :1]).any():
                raise ValueError("divided attention needs the same places hidden in every frame: a tube mask")
        if skipped is not None:
            wanted, _ = split(skipped, "skipped")
        return self.reconstruct(video, visible.to(video.device), wanted.to(video.device))

    def reconstruct(self, video, visible, wanted):
        """`forward` with token numbers in place of masks, (B, Nv) and (B, n): static shapes."""
        tokens = self.encoder_to_decoder(self.encoder(video, visible))       # (B, Nv, D/2)
        table = self.decoder_codes(video)
        tokens = torch.cat([tokens + gather(table, visible),
                            self.mask_token + gather(table, wanted)], dim=1)
        return self.decoder(tokens, wanted.shape[1])

    def decoder_codes(self, video):
        """Position codes of the decoder for the grid of a video (B, C, T, H, W): (1, N, D/2)."""
        table = position_codes("axes" if self.encoder.kind == "axes" else "sinusoid",
                               self.encoder.grid_of(*video.shape[2:]), self.encoder.patch, self.encoder.tubelet,
                               self.encoder_to_decoder.out_features, video.device)
        return table.to(torch.promote_types(video.dtype, torch.float32))

    def packed(self, videos, hidden):
        """`forward` for clips that differ in length, size or mask ratio: all in one row, no padding.

        videos   list of (C, T, H, W), each with its own T, H and W; float or uint8 as for `forward`
        hidden   list of (N,) bool, one for each, with any number of True
        returns  (sum of Nm, P): what `forward` predicts for the first clip alone, then for the second ...

        Sequence packing as in "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027,
        Sec. 3) and, for images, NaViT (arXiv 2307.06304, Sec. 2).
        """
        videos = [video[None] for video in videos]
        visible, wanted = zip(*(split(mask[None]) for mask in hidden))       # (1, Nv), (1, Nm) of each
        clip = torch.arange(len(videos))
        of_visible, of_wanted = (clip.repeat_interleave(torch.tensor([x.shape[1] for x in part]))[None]
                                 for part in (visible, wanted))
        visible, wanted = ([x.to(video.device) for x, video in zip(part, videos)] for part in (visible, wanted))
        segments = torch.cat([of_visible, of_wanted], dim=1).to(videos[0].device)
        encoded = self.encoder.packed(videos, visible, segments[:, :of_visible.shape[1]])
        tables = [self.decoder_codes(video) for video in videos]
        seen, asked = (torch.cat([gather(*pair) for pair in zip(tables, part)], dim=1) for part in (visible, wanted))
        # All visible tokens, then all hidden ones: so the last block answers for hidden ones alone here, too.
        tokens = torch.cat([self.encoder_to_decoder(encoded) + seen, self.mask_token + asked], dim=1)
        return self.decoder(tokens, asked.shape[1], Mask(frames=segments))[0]

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        self.encoder.recompute = self.decoder.recompute = on

    def with_head(self, classes, **options):
        """A VideoClassifier for Y classes whose encoder has these weights. The encoder's own norm is left
        behind, fc_norm and head start fresh: VideoMAE's way into fine-tuning. options: drop, drop_path,
        frames, image_size, ..."""
        kept = ("size", "frames", "image_size", "tubelet", "channels", "positions", "bias", "cosine", "layer_scale", "eps",
                "space_time")
        return VideoClassifier(**_sized(self.config, kept) | options, classes=classes).take(self)

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        config = {key: value for key, value in config.items() if key != "model"}
        return cls(Size(**config.pop("size")), **config)

    @classmethod
    def from_official(cls, source, *, heads=None, decoder_heads=None, frames=None, image_size=None,
                      positions="sinusoid"):
        """Load VideoMAE, InternVideo, VideoMAE V2 or Hugging Face pretraining weights.

        source          path or {name: tensor}; see weights.read
        heads, decoder_heads   shapes cannot tell them; default: those of the published models
        frames, image_size     T and H (or (H, W)) of the clips; default 16 and 224
        positions       "resized" for InternVideo's ViT-H at 384 px, see `position_codes`
        returns         the model in eval mode. Sizes come from the shapes. Hugging Face files keep
                        Hugging Face's LayerNorm epsilons (1e-12; 1e-5 before the head).
        raises          WeightsError: not such a file, or one that does not fit to the last tensor
        """
        file = OfficialFile(source, pretraining=True)
        told = file.hub_config(source)
        heads = heads or told.get("num_attention_heads")
        decoder_heads = decoder_heads or told.get("decoder_num_attention_heads")
        if file.config.get("model") == "VideoMAE":  # a run of ours
            return weights.fill(weights.build(cls.from_config, file.config, file.name), file.tensors, name=file.name).eval()
        if not (file.has("encoder_to_decoder.weight") or file.has("mask_token")):
            raise WeightsError(f"{file.name}: a masked autoencoder needs its decoder, and this file has "
                               "none (no encoder_to_decoder.weight, no mask_token); a fine-tuned file "
                               "loads with VideoClassifier.from_official")
        size, options = file.encoder(heads, frames, image_size, positions)
        decoder_width = file.width("decoder.blocks.")
        size = replace(size, decoder_width=decoder_width, decoder_depth=file.depth("decoder.blocks."),
                       decoder_heads=decoder_heads or file.heads(decoder_width, "decoder_heads"),
                       decoder_mlp_width=file.mlp_width("decoder.blocks."))
        rules = file.pretraining_rules(size, options)
        return weights.fill(cls(size, **options), file.tensors, rules, name=file.name).eval()

    def to_official(self):
        """{official name: tensor}, what VideoMAE's own code calls them. Raises ValueError for positions by axes."""
        return weights.official(self, Names().pretraining_rules(Size(**self.config["size"]), published(self.config)))


class VideoClassifier(nn.Module):
    """The encoder on all tokens, their mean, a norm and a linear layer (VideoMAE, Sec. 4, fine-tuning).

    classes    Y; 0 = no head, forward returns the features
    pool       "mean": mean over tokens, then fc_norm; the encoder's own norm, which saw each token, is left out.
               "first": norm, then the first token, which is no class token: an option of the official
               code that no released model uses
    drop       dropout before the head, a probability
    head_scale factor on the head's first weights
    Other arguments as VideoMAE.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, size="base", *, classes, frames=16, image_size=224, tubelet=2, channels=3,
                 positions="sinusoid", bias="qv", cosine=False, layer_scale=None, drop_path=0.0,
                 drop=0.0, pool="mean", eps=1e-6, head_eps=1e-6, head_scale=0.001, space_time="joint"):
        super().__init__()
        size = SIZES[size] if isinstance(size, str) else size
        if pool not in ("mean", "first"):
            raise ValueError(f"pool is {pool!r}: choose mean or first")
        self.config = {"model": "VideoClassifier", "size": asdict(size), "classes": classes,
                       "frames": frames, "image_size": list(pair(image_size)), "tubelet": tubelet,
                       "channels": channels, "positions": positions, "bias": bias, "cosine": cosine,
                       "layer_scale": layer_scale, "pool": pool, "eps": eps, "head_eps": head_eps,
                       "space_time": space_time}
        self.encoder = Encoder(size, frames=frames, image_size=image_size, channels=channels,
                               tubelet=tubelet, positions=positions, drop_path=drop_path, bias=bias,
                               cosine=cosine, layer_scale=layer_scale, eps=eps, norm=pool == "first",
                               space_time=space_time)
        self.fc_norm = nn.LayerNorm(size.width, eps=head_eps) if pool == "mean" else nn.Identity()
        self.drop = Dropout(drop)
        self.head = nn.Linear(size.width, classes) if classes else nn.Identity()
        self.pool = pool
        for module in self.encoder.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.weight.data.mul_(head_scale)

    def with_head(self, classes, *, rows=None, **options):
        """A classifier for Y classes with these weights. As many classes: the head too. 400 after the 710 of
        Kinetics-710: its first 400 rows, which are Kinetics-400 in InternVideo's order (not in VideoMAE V2's, and no shape tells
        them apart). Any other number: a fresh head.

        rows     which row of the old head each class is, Y numbers; default: as above
        """
        model = VideoClassifier(**_sized(self.config, set(self.config) - {"model", "classes"}) | options,
                                classes=classes).take(self)
        if self.pool == "mean":
            model.fc_norm.load_state_dict(self.fc_norm.state_dict())
        if classes and rows is None and (classes == self.config["classes"] or (self.config["classes"], classes) == (710, 400)):
            rows = range(classes)
        if rows is not None:
            with torch.no_grad():
                model.head.weight.copy_(self.head.weight[list(rows)])
                model.head.bias.copy_(self.head.bias[list(rows)])
        return model

    def take(self, other):
        """The encoder's weights of another model, but for its last norm; returns self."""
        tensors = {key: value for key, value in other.encoder.state_dict().items()
                   if key in self.encoder.state_dict() and not key.startswith("stored")}
        if "stored" in self.encoder.state_dict() and hasattr(other.encoder, "stored"):
            tensors["stored"] = resize_positions(other.encoder.stored, other.encoder.grid, self.encoder.grid)
        missing, unknown = self.encoder.load_state_dict(tensors, strict=False)
        assert not unknown and all(key == "stored" or key.startswith("norm.") for key in missing), (missing, unknown)
        return self

    def features(self, video):
        """video (B, C, T, H, W) -> (B, D), what the head sees."""
        return self.pooled(self.encoder(video))

    def pooled(self, tokens):
        """What the encoder gave, (B, N, D) -> (B, D), what the head sees."""
        return self.fc_norm(tokens.mean(dim=1)) if self.pool == "mean" else tokens[:, 0]

    def forward(self, video):
        """video (B, C, T, H, W) float, ImageNet-normalised -> logits (B, Y)."""
        return self.head(self.drop(self.features(video)))

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        self.encoder.recompute = on

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        config = {key: value for key, value in config.items() if key != "model"}
        return cls(Size(**config.pop("size")), **config)

    @classmethod
    def from_official(cls, source, *, heads=None, frames=None, image_size=None, positions="sinusoid"):
        """Load fine-tuned VideoMAE, InternVideo, VideoMAE V2 or Hugging Face weights.

        Arguments, result and errors as VideoMAE.from_official. A file without a head loads as a
        feature extractor (classes = 0).
        """
        file = OfficialFile(source, pretraining=False)
        heads = heads or file.hub_config(source).get("num_attention_heads")
        if file.config.get("model") == "VideoClassifier":
            return weights.fill(weights.build(cls.from_config, file.config, file.name), file.tensors, name=file.name).eval()
        if file.has("encoder_to_decoder.weight") or file.has("mask_token"):
            raise WeightsError(f"{file.name}: a pretraining file, without a classifier; it loads with "
                               "VideoMAE.from_official")
        size, options = file.encoder(heads, frames, image_size, positions)
        pool = "mean"
        if not file.has("fc_norm.weight") and file.spell("encoder.norm.weight") in file.tensors:
            pool = "first"
        head = [key for key in ("head.weight", "head.bias") if file.spell(key) in file.tensors]
        classes = [file.sizes(key)[0] for key in head]
        if len(set(classes)) > 1:
            shapes = {file.spell(key): tuple(file.tensors[file.spell(key)].shape) for key in head}
            raise WeightsError(f"{file.name}: wrong shape: the head's tensors disagree: {shapes}")
        classes = classes[0] if head else 0
        rules = file.classifier_rules(size, options, pool, classes)
        model = cls(size, classes=classes, pool=pool, **options)
        return weights.fill(model, file.tensors, rules, name=file.name).eval()

    def to_official(self):
        """{official name: tensor}, what VideoMAE's own code calls them. Raises ValueError for positions by axes."""
        size = Size(**self.config["size"])
        rules = Names(FINE_TUNED).classifier_rules(size, published(self.config), self.pool, self.config["classes"])
        return weights.official(self, rules)


# ------------------------------------------------------------------------------------------------
# What is to be painted


def reconstruction_target(video, hidden, normalise=True, *, patch=None, tubelet=2):
    """The pixels that the model shall paint (VideoMAE, Sec. 3.3; "Masked Autoencoders Are Scalable
    Vision Learners", arXiv 2111.06377, Sec. 3, Reconstruction target).

    video      (B, 3, T, H, W) float, ImageNet-normalised, or uint8
    hidden     (B, N) bool, True = wanted here
    normalise  True: of every tubelet and channel, subtract the mean and divide by the standard
               deviation (unbiased; 1e-6 added after the root). False: pixels in [0, 1].
    patch      side of a tubelet in pixels; default: what fits N, the length of `hidden`
    returns    (B, Nm, P), P in the order frame, row, column, colour
    """
    B, C, T, H, W = video.shape
    if patch is None:
        patch = round((T // tubelet * H * W / hidden.shape[1]) ** 0.5)
    if (T // tubelet) * (H // patch) * (W // patch) != hidden.shape[1]:
        raise ValueError(f"a mask of {hidden.shape[1]} tokens does not fit a clip of {T} frames of "
                         f"{H} x {W} pixels in tubelets of {tubelet} x {patch} x {patch}")
    return target_of(video, split(hidden)[1].to(video.device), normalise, patch, tubelet)


def target_of(video, wanted, normalise, patch, tubelet):
    """`reconstruction_target` with token numbers (B, Nm) in place of a mask: static shapes."""
    tubelets = wanted_tubelets(video, wanted, patch, tubelet)
    if normalise:
        mean, std = tubelet_statistics(tubelets)
        tubelets = (tubelets - mean) / std
    return tubelets.transpose(2, 3).flatten(2)


def wanted_tubelets(video, wanted, patch, tubelet):
    """Tubelets (B, Nm, 3, pixels) as colours in [0, 1]."""
    tubelets = normalised(take_tubelets(video, wanted, patch, tubelet))  # and back: to the last bit as published
    mean, std = (torch.tensor(x, device=video.device).to(tubelets.dtype)[:, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return tubelets * std + mean


def tubelet_statistics(tubelets):
    """Mean, and standard deviation plus 1e-6, of each tubelet and channel: (B, Nm, 3, 1) each."""
    mean = tubelets.mean(dim=-1, keepdim=True)
    length = (tubelets - mean).norm(dim=-1, keepdim=True)  # on a CPU a tenth of the time of torch.var_mean
    return mean, length / (tubelets.shape[-1] - 1) ** 0.5 + 1e-6


def reconstruction_loss(prediction, target, weight=None, *, count=None):
    """Mean squared error over all numbers of the hidden tubelets; predicting 0 costs about 1.

    prediction, target  (B, Nm, P)
    weight              (B, Nm) or None: how much each token counts. VideoMAE V2 decodes some tokens
                        that the encoder saw; they get weight 0.
    count               with weights, what the sum is divided by; default: their sum. When several
                        processes share a batch: the sum over all / processes.
    """
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    if weight is None:
        return F.mse_loss(prediction, target)
    error, weight = (prediction - target) ** 2, weight.to(prediction.dtype)
    return (error.mean(dim=-1) * weight).sum() / (weight.sum() if count is None else count)


# ------------------------------------------------------------------------------------------------
# Official weights

# How Hugging Face names what the official files call otherwise, in network order. The three in
# braces are stacked into one matrix.
HUGGING_FACE = (
    (r"^encoder\.patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^encoder\.blocks\.", "videomae.encoder.layer."),
    (r"^encoder\.norm\.", "videomae.layernorm."),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"norm1\.", "layernorm_before."),
    (r"attn\.qkv\.weight", "attention.attention.{query,key,value}.weight"),
    (r"attn\.([qv]_bias)", r"attention.attention.\1"),
    (r"attn\.proj\.", "attention.output.dense."),
    (r"norm2\.", "layernorm_after."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
    (r"^head\.", "classifier."),
)
# transformers 5 spells the two biases like any other layer's.
HUGGING_FACE_5 = HUGGING_FACE + ((r"attention\.q_bias", "attention.query.bias"),
                                 (r"attention\.v_bias", "attention.value.bias"))
FINE_TUNED = ((r"^encoder\.", ""),)  # the official classifier is the encoder, without a prefix

# Width -> heads of the published models; other widths have heads of 64.
USUAL_HEADS = {640: 8, 1280: 16, 1408: 16, 1664: 16}


class Names:
    """How a family calls the tensors of the official pretraining model, and the key maps in its spelling."""

    def __init__(self, respellings=()):
        self.respellings = respellings

    def spell(self, name):
        """What this family calls the tensor that the official pretraining model calls `name`."""
        for pattern, replacement in self.respellings:
            name = re.sub(pattern, replacement, name)
        return name

    def rule(self, ours, official, convert=None, back=None):
        """A weights.Rule in this spelling."""
        name = self.spell(official)
        if "{" in name:
            before, middle, after = re.split("[{}]", name)
            name = tuple(before + part + after for part in middle.split(","))
        return Rule(ours, name, convert, back)

    def pairs(self, ours, official):
        """The two rules of a layer with weight and bias."""
        return [self.rule(ours + part, official + part) for part in ("weight", "bias")]

    def pretraining_rules(self, size, options):
        """Key map of VideoMAE."""
        return (self.encoder_rules(size, options) + self.pairs("encoder.norm.", "encoder.norm.")
                + [Rule("encoder_to_decoder.weight", "encoder_to_decoder.weight"), Rule("mask_token", "mask_token")]
                + self.block_rules("decoder.blocks.", size.decoder_depth, options)
                + self.pairs("decoder.norm.", "decoder.norm.") + self.pairs("decoder.head.", "decoder.head."))

    def classifier_rules(self, size, options, pool, classes):
        """Key map of VideoClassifier."""
        norm = {"mean": "fc_norm.", "first": "encoder.norm."}[pool]
        return (self.encoder_rules(size, options) + self.pairs(norm, norm)
                + (self.pairs("head.", "head.") if classes else []))

    def encoder_rules(self, size, options):
        """Key map of embedding and blocks."""
        kernel = "encoder.patch_embed.proj."
        stored = [Rule("encoder.stored", "pos_embed")] if options["positions"] == "stored" else []
        shape = (options["channels"], options["tubelet"], size.patch, size.patch)
        return ([self.rule("encoder.embed.weight", kernel + "weight", kernel_as_matrix, lambda matrix: matrix.unflatten(1, shape)),
                 self.rule("encoder.embed.bias", kernel + "bias")] + stored
                + self.block_rules("encoder.blocks.", size.depth, options))

    def block_rules(self, blocks, depth, options):
        """Key map of `depth` blocks, in network order; our names are the official ones but for
        temperature and gamma."""
        rules = []
        for i in range(depth):
            a = f"{blocks}{i}."
            rules += self.pairs(a + "norm1.", a + "norm1.")
            rules.append(self.rule(a + "attn.qkv.weight", a + "attn.qkv.weight"))
            if options["bias"] == "qv":
                rules += [self.rule(a + name, a + name) for name in ("attn.q_bias", "attn.v_bias")]
            if options["cosine"]:
                rules.append(self.rule(a + "attn.temperature", a + "attn.scale"))
            rules += self.pairs(a + "attn.proj.", a + "attn.proj.")
            if options["layer_scale"] is not None:
                rules += [self.rule(a + f"gamma{n}", a + f"gamma_{n}") for n in (1, 2)]
            for part in ("norm2.", "mlp.fc1.", "mlp.fc2."):
                rules += self.pairs(a + part, a + part)
        return rules


class OfficialFile(Names):
    """An official file, seen through the names of the official pretraining model."""

    def __init__(self, source, pretraining):
        self.tensors, self.config = weights.read(source)
        self.name = "the dict of weights" if isinstance(source, dict) else str(source)
        if any(key.startswith("embeddings.patch_embeddings.") for key in self.tensors):  # transformers' VideoMAEModel alone
            self.tensors = {"videomae." + key: value for key, value in self.tensors.items()}
        if "backbone.patch_embed.proj.weight" in self.tensors:  # an encoder inside somebody's larger model
            self.tensors = {key.removeprefix("backbone."): value for key, value in self.tensors.items()}
        self.hugging_face = any(key.startswith("videomae.") for key in self.tensors)
        respellings = () if pretraining else FINE_TUNED
        if self.hugging_face:
            new = any(key.endswith("attention.query.bias") for key in self.tensors)
            respellings = HUGGING_FACE_5 if new else HUGGING_FACE
        super().__init__(respellings)

    def hub_config(self, source):
        """What transformers wrote beside its own file, else {}; WeightsError where it asks for what is not here."""
        told = weights.hub_config(source) if self.hugging_face else {}
        weights.activation(told, self.name, "gelu")
        return told

    def sizes(self, name, axis=0, blocks=None):
        """What a tensor, or the same tensor of each block, says about a size: the majority wins, so
        that one damaged tensor is named alone when the model is filled."""
        names = [name] if blocks is None else [
            f"{blocks}{i}.{name}" for i in range(self.depth(blocks))]
        names = [self.spell(name) for name in names]
        found = [self.tensors[key].shape[axis] for key in names
                 if key in self.tensors and self.tensors[key].ndim > axis]
        if not found:
            raise WeightsError(f"{self.name}: missing: {names[0] if names else self.spell(blocks) + '0.*'}")
        return found

    def depth(self, blocks):
        return weights.depth_of(self.tensors, self.spell(blocks))

    def width(self, blocks):
        return weights.commonest(self.sizes("norm1.weight", blocks=blocks)
                                 + self.sizes("norm2.weight", blocks=blocks)
                                 + self.sizes("mlp.fc2.bias", blocks=blocks))

    def mlp_width(self, blocks):
        return weights.commonest(self.sizes("mlp.fc1.bias", blocks=blocks)
                                 + self.sizes("mlp.fc1.weight", blocks=blocks)
                                 + self.sizes("mlp.fc2.weight", axis=1, blocks=blocks))

    def heads(self, width, keyword):
        if width not in USUAL_HEADS and width % 64:
            raise WeightsError(f"{self.name}: shapes cannot tell how many heads a width of {width} "
                               f"has; pass {keyword}=")
        return USUAL_HEADS.get(width, width // 64)

    def has(self, ending):
        return any(key.endswith(ending) for key in self.tensors)

    def encoder(self, heads, frames, image_size, positions):
        """Size (without a decoder) and constructor options, read off the shapes."""
        kernel = self.spell("encoder.patch_embed.proj.weight")
        _, channels, tubelet, patch, across = weights.shape_of(self.tensors, kernel, 5, self.name)
        if patch != across:
            raise WeightsError(f"{self.name}: wrong shape: {kernel} has patches of {patch} x {across}")
        width = self.width("encoder.blocks.")
        size = Size(width, self.depth("encoder.blocks."), heads or self.heads(width, "heads"),
                    self.mlp_width("encoder.blocks."), patch, 0, 0, 0, 0)
        # Hugging Face files always have the biases: an early transformers 5 lost them in a renaming
        # and went on with zeros, so a file without them is refused.
        biased = self.hugging_face or self.has(".attn.q_bias") or self.has(".attn.v_bias")
        options = dict(
            frames=frames or 16, image_size=image_size or 224, tubelet=tubelet, channels=channels,
            positions="stored" if "pos_embed" in self.tensors else positions,
            bias="qv" if biased else "none", cosine=self.has(".attn.scale"),
            layer_scale=1.0 if self.has(".gamma_1") or self.has(".gamma_2") else None,
            eps=1e-12 if self.hugging_face else 1e-6, head_eps=1e-5 if self.hugging_face else 1e-6)
        return size, options


def published(config):
    """The configuration, where the official code can express it; ValueError where not."""
    if config["positions"] not in ("sinusoid", "stored"):
        raise ValueError(f"position codes {config['positions']!r} are unknown to the official code; train with --positions sinusoid")
    if config["space_time"] != "joint":
        raise ValueError("divided attention is unknown to the official code; train with --space-time joint")
    return config


def kernel_as_matrix(kernel):
    """A convolution whose stride is its size is a matrix: (D, C, tubelet, p, p) -> (D, C*tubelet*p*p)."""
    return kernel.flatten(1) if kernel.ndim == 5 else kernel


# ------------------------------------------------------------------------------------------------
# Pictures


@torch.no_grad()
def paint(model, video, hidden):
    """What the model makes of a masked clip, as pictures.

    video, hidden  as VideoMAE.forward
    returns        {"input", "seen", "painted", "borrowed"}, each (B, 3, T, H, W) float in [0, 1]. A model
                   of normalised pixels knows structure, not brightness: "painted" borrows mean and
                   contrast of each hidden tubelet from the input. "borrowed" shows that loan with
                   nothing painted on it, so that one can see what the model itself added.
    """
    patch, tubelet = model.encoder.patch, model.encoder.tubelet
    _, wanted = split(hidden)
    wanted = wanted.to(video.device)
    mean, std = (torch.tensor(x, device=video.device).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = video * std + mean
    true = wanted_tubelets(video, wanted, patch, tubelet)                    # (B, Nm, 3, pixels)
    guess = model(video, hidden).float().unflatten(-1, (-1, 3)).transpose(2, 3)
    middle, contrast = tubelet_statistics(true)
    if model.config["normalised"]:
        guess = guess * contrast + middle
    pictures = {"input": true, "seen": torch.full_like(true, 0.5), "painted": guess,
                "borrowed": middle.expand_as(true)}
    return {name: put_tubelets(pixels, wanted, tubelets, patch, tubelet).clamp(0, 1)
            for name, tubelets in pictures.items()}


def draw(model, video, hidden, path, title=""):
    """Write a strip of frames to `path` (.png) and the moving picture beside it (.gif).

    video (1, 3, T, H, W), hidden (1, N): one clip, as `paint`.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    pictures = paint(model, video, hidden)
    loan = "mean and contrast\nborrowed from input" if model.config["normalised"] else "nothing borrowed"
    labels = {"input": "input", "seen": f"what the encoder saw\n({1 - hidden.float().mean():.0%})",
              "painted": f"reconstruction\n({loan})", "borrowed": "what was borrowed:\nthe mean alone"}
    if not model.config["normalised"]:
        del pictures["borrowed"]
    T, H, W = video.shape[2:]
    shown = torch.linspace(0, T - 1, min(T, 8)).round().long().tolist()
    figure, axes = plt.subplots(len(pictures), len(shown), squeeze=False, facecolor="white",
                                figsize=(1.3 * len(shown) * W / H + 1.7, 1.35 * len(pictures) + 0.5))
    for row, (name, clip) in zip(axes, pictures.items()):
        for axis, frame in zip(row, shown):
            axis.imshow(clip[0, :, frame].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if name == "input":
                axis.set_title(f"frame {frame}", fontsize=8)
        row[0].set_ylabel(labels[name], fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)

    side_by_side = torch.cat([clip[0] for clip in pictures.values()], dim=-1)  # (3, T, H, rows*W)
    zoom = max(1, 144 // H)
    frames = (side_by_side.permute(1, 2, 3, 0) * 255).round().byte().cpu()
    frames = frames.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path.with_suffix(".gif"), save_all=True, append_images=images[1:], duration=120, loop=0)


def main(argv=None):
    """`python mae.py`: the shapes, step by step. `python mae.py VIDEO --weights FILE`: its picture."""
    import argparse
    import sys
    from pathlib import Path

    import data
    from video import moving_shapes

    parser = argparse.ArgumentParser(description="Hide most of a video and paint it back.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip")
    parser.add_argument("--weights", help="a run's folder or official pretraining weights; "
                                          "default: an untrained tiny model")
    parser.add_argument("--mask-ratio", "--mask_ratio", type=float, default=0.75,
                        help="share of each frame to hide, 0 to 1 (paper: 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="which places are hidden")
    parser.add_argument("--out", default="runs/reconstruction.png", help="where the picture goes (.png)")
    args = parser.parse_args(argv)
    try:
        model = VideoMAE.from_official(args.weights) if args.weights else VideoMAE("tiny", image_size=64)
        T, (H, W) = model.config["frames"], model.config["image_size"]
        if args.video:
            count = data.probe(args.video).frames
            clip = data.read_clip(args.video, data.dense_indices(count, T, 4), min(H, W))
            top, left = (clip.shape[1] - H) // 2, (clip.shape[2] - W) // 2
            clip = clip[:, top:top + H, left:left + W]
        else:
            clip = moving_shapes.MovingShapes("test", T, (H, W), args.seed)[0]["video"]
        t, h, w = model.grid
        if not 0 < int(args.mask_ratio * h * w) < h * w:
            raise ValueError(f"--mask-ratio {args.mask_ratio}: must leave at least one of the "
                             f"{h * w} places of a frame visible and hide at least one")
        video = data.normalise(torch.as_tensor(clip)[None], IMAGENET_MEAN, IMAGENET_STD)
        hidden = tube_mask(1, model.grid, args.mask_ratio, torch.Generator().manual_seed(args.seed))
        explain(model, video, hidden)
        path = Path(args.out).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(model, video, hidden, path, "" if args.weights else "an untrained model: pass --weights")
        print(f"drawn: {path} and {path.with_suffix('.gif')}")
    except (WeightsError, data.DataError, ValueError, OSError) as error:
        print(f"mae.py: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def explain(model, video, hidden):
    """Print what happens to a clip, shape by shape."""
    visible, wanted = split(hidden)
    t, h, w = model.grid
    encoded = model.encoder(video, visible)
    normalised, patch, tubelet = model.config["normalised"], model.encoder.patch, model.encoder.tubelet
    target = reconstruction_target(video, hidden, normalised, patch=patch, tubelet=tubelet)
    loss = reconstruction_loss(model(video, hidden), target)
    pixels = tubelet * patch**2
    for name, value in (
            ("video (B, C, T, H, W)", tuple(video.shape)),
            (f"token grid t x h x w = {t} x {h} x {w}", f"N = {t * h * w} tokens"),
            ("hidden in every frame", f"{int(hidden[0, :h * w].sum())} of {h * w} places"),
            ("shown to the encoder (B, Nv, D)", tuple(encoded.shape)),
            ("to be painted (B, Nm, P)", tuple(target.shape)),
            ("loss on this clip" + f" (means alone cost {(pixels - 1) / pixels:.3f})" * normalised, f"{loss:.3f}")):
        print(f"{name:48s} {value}")


if __name__ == "__main__":
    raise SystemExit(main())
