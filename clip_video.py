"""Video-text contrastive learning: a video and a text encoder that share one embedding space.

A label states one fact about a clip, a caption several. In a batch of B videos with captions, the
model learns to find the caption of each video and the video of each caption. The other captions and
videos are negatives (CLIP, arXiv 2103.00020, Sec. 2.3, Selecting an Efficient Pre-Training Method;
InternVideo, arXiv 2212.03191, Sec. 3.2, Self-Supervised Video Pretraining).

    video (B, C, T, H, W)                               text ids (B, L)
      | visual encoder                                    | causal text encoder
    feature (B, D), tokens (B, t, 1+S, D)               tokens (B, L, W)
      | norm, linear                                      | end-of-text token, linear
    embedding (B, E) ---------> cosines (B, B) <--------- embedding (B, E)
                                  | * exp(logit_scale)
          cross entropy over rows and over columns; the targets are on the diagonal

Letters: L text tokens, W text width (after H: pixel columns), E embedding width, V vocabulary.

1. weights/tokenizer.py turns sentences into token ids: start, text, end, padding.
2. `TextEncoder` is causal. Its end-of-text token attends to the whole sentence and represents it.
   caption_decoder.py uses all tokens.
3. `VideoCLIP` has one of three visual encoders. "video" is UniFormerV2, as in InternVideo.
   "frames" is UniFormerV2 without its video parts: the feature is the mean of CLIP's class tokens.
   "joint" is `JointEncoder`, self-attention over all frames (ViCLIP, arXiv 2307.06942, Sec. 4).
4. `contrastive_loss`: two cosines differ by at most 2, so two probabilities of their softmax differ
   by a factor of at most e^2 = 7.4. The learned factor exp(logit_scale) allows larger differences.
5. `zero_shot` classifies without labels: it compares a video with one sentence per class.

Where we differ from the official code (InternVideo1 clip_utils/model.py, ViCLIP viclip.py), with
equal outputs: the batch is the first axis. The tokens of "joint" go frame by frame, in ViCLIP patch
by patch. Padding may be cut off, because no token before it attends to it. InternVideo-MM's
text_mask_embedding is not loaded, because no published recipe uses it.
B/16 has 178 M parameters for "video" with four global blocks, and 150 M for "frames".

>>> model = VideoCLIP("tiny", frames=4, image_size=32, vocabulary=600, context=16)
>>> video, ids = torch.randn(3, 3, 4, 32, 32), torch.randint(600, (3, 16))
>>> contrastive_loss(*model(video, ids)).shape   # model returns two embeddings and logit_scale
torch.Size([])
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import uniformerv2
from attention import Block, Context, Mask, attention, quick_gelu, run_blocks
from engine.large_batches import BlockedLoss
from engine.processes import gather_with_gradient
from uniformerv2 import UniFormerV2

# Mean and standard deviation of red, green and blue, for pixels in [0, 1]. "joint" uses ImageNet's.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TextSize:
    """The sizes of a text encoder."""
    width: int
    depth: int
    heads: int


TEXT_SIZES = {  # CLIP, Tab. 20, "CLIP-ViT hyperparameters"
    "tiny": TextSize(128, 4, 2),  # ours
    "b16": TextSize(512, 12, 8),
    "l14": TextSize(768, 12, 12),
    "l14_336": TextSize(768, 12, 12),
}
KINDS = {"video": "UniFormerV2", "frames": "frame-wise CLIP", "joint": "ViCLIP"}  # visual encoders


@dataclass(frozen=True)
class Options:
    """All options of VideoCLIP. ValueError if two of them contradict each other. The constructor
    replaces names of sizes by sizes, and None by a value except in global_heads and end."""
    size: str | uniformerv2.Size = "b16"  # of the visual encoder
    kind: str = "video"  # of the visual encoder, one of KINDS
    frames: int = 8  # T; "joint" takes at most this many, the others any number
    image_size: int | list | None = None  # pixels, H = W or [H, W]; None: the default of `size`
    # Only "video" uses these four: see uniformerv2.Options. Official models lack the last two.
    global_layers: list | None = None
    global_heads: int | None = None
    local_units: int = 0
    temporal_downsample: bool = False
    tubelet: int = 1  # for "joint" only: frames per token
    text_size: str | TextSize | None = None  # None: the entry `size` of TEXT_SIZES
    embedding: int | None = None  # E, width of the embedding space; None: W
    vocabulary: int = 49408  # V, number of token ids
    context: int = 77  # largest L
    end: int | None = None  # id of the end-of-text token; None: a text's largest id, as in CLIP

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose {', '.join(KINDS)}")
        for name in ("global_layers", "global_heads", "local_units", "temporal_downsample"):
            if self.kind != "video" and getattr(self, name):
                raise ValueError(f"{name} is for kind='video', not {self.kind!r}")
        if self.kind != "joint" and self.tubelet != 1:
            raise ValueError(f"tubelet is for kind='joint', not {self.kind!r}")
        text = self.text_size or self.size
        text = TEXT_SIZES[text] if isinstance(text, str) else text
        text = TextSize(**text) if isinstance(text, dict) else text
        if not isinstance(text, TextSize):
            raise ValueError("a Size of your own needs a text_size")
        visual = uniformerv2.Options(  # checks these three and fills in their values
            self.size, image_size=self.image_size,
            global_layers=self.global_layers if self.kind == "video" else ())
        for name, value in (("size", visual.size), ("image_size", list(visual.image_size)),
                            ("global_layers", list(visual.global_layers)), ("text_size", text),
                            ("embedding", self.embedding or text.width)):
            object.__setattr__(self, name, value)  # how a frozen dataclass sets its own fields


def clip_block(width, heads, mlp_width=None):
    """attention.Block as in CLIP: biases on q, k and v, QuickGELU, norms with epsilon 1e-5."""
    return Block(width, heads, mlp_width=mlp_width, bias="qkv", eps=1e-5, activation=quick_gelu)


class TextEncoder(nn.Module):
    """Causal transformer over token ids (CLIP, Sec. 2.4). size: TextSize; the others: Options."""

    no_weight_decay = "positions",  # a tuple of names: see engine/optimisers.py

    def __init__(self, size, *, vocabulary, context, embedding, end=None):
        super().__init__()
        self.end, self.recompute, width = end, False, size.width
        self.embed = nn.Embedding(vocabulary, width)                         # (V, W)
        self.positions = nn.Parameter(torch.empty(context, width))           # (context, W)
        self.blocks = nn.ModuleList(clip_block(width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embedding, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        # In a deeper model, residual branches start smaller, as in GPT-2 (CLIP, Sec. 2.4).
        branch_std = width**-0.5 * (2 * size.depth)**-0.5
        for block in self.blocks:
            for layer, std in ((block.attn.qkv, width**-0.5), (block.attn.proj, branch_std),
                               (block.mlp.fc1, (2 * width)**-0.5), (block.mlp.fc2, branch_std)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def tokens(self, ids):
        """ids (B, L) int64 -> features (B, L, W), after the last norm. Feature i depends on the
        tokens 0 to i only."""
        if ids.ndim != 2 or ids.shape[1] > len(self.positions):
            raise ValueError(f"token ids of shape {tuple(ids.shape)}: need (B, L) with "
                             f"L <= {len(self.positions)}")
        x = self.embed(ids) + self.positions[:ids.shape[1]]                  # (B, L, W)
        return self.norm(run_blocks(self.blocks, x, Context(Mask(causal=True)),
                                    recompute=self.recompute))

    def forward(self, ids):
        """ids (B, L) int64 -> embedding (B, E), not normalised, and tokens (B, L, W)."""
        tokens = self.tokens(ids)
        return self.proj(self.at_end(tokens, ids)), tokens

    def at_end(self, tokens, ids):
        """tokens (B, L, W), ids (B, L) -> (B, W), the end-of-text token of each sentence."""
        # In CLIP's vocabulary the end-of-text token has the largest id, so argmax finds it.
        marks = ids if self.end is None else (ids == self.end).int()         # (B, L)
        check = self.end is not None and not torch.compiler.is_compiling()  # a graph cannot raise
        if check and not marks.any(dim=1).all():
            raise ValueError(f"a text has no end-of-text token, id {self.end}")
        end = marks.argmax(dim=1)                 # (B,), the first one if there are several
        return tokens.gather(1, end[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]

    def start_cache(self, batch):
        """An empty cache for `step`: for each block [keys, values], (batch, heads, 0, K) each."""
        heads, positions = self.blocks[0].attn.heads, self.positions
        empty = positions.detach().new_zeros(batch, heads, 0, positions.shape[1] // heads)
        return [[empty, empty] for _ in self.blocks]

    def step(self, ids, cache):
        """Encode the next n tokens of a text, for caption_decoder.generate: ids (B, n) int64 ->
        features (B, n, W), equal to those of `tokens`, and the new cache. `cache` is the result of
        `start_cache` or of the previous call: the keys and values of all earlier tokens."""
        start, stop = cache[0][0].shape[2], cache[0][0].shape[2] + ids.shape[1]
        if stop > len(self.positions):
            raise ValueError(f"a text of {stop} tokens: this encoder takes up to "
                             f"{len(self.positions)}")
        x, new_cache = self.embed(ids) + self.positions[start:stop], []      # (B, n, W)
        mask = Mask(causal=True) if ids.shape[1] > 1 else None  # one token: no key comes after it
        for block, past in zip(self.blocks, cache):
            q, *new = block.attn.queries_keys_values(block.norm1(x))
            k, v = (torch.cat([old.to(y.dtype), y], dim=2)                   # (B, heads, stop, K)
                    for old, y in zip(past, new))  # float32 may meet bfloat16 under autocast
            x = x + block.attn.proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            new_cache.append([k, v])
        return self.norm(x), new_cache


class JointEncoder(nn.Module):
    """ViCLIP's visual encoder: one class token and the patches of all frames in one sequence.
    Arguments: see Options."""

    no_weight_decay = "class_token", "positions", "times"  # see engine/optimisers.py

    def __init__(self, size, *, frames, image_size, tubelet=1):
        super().__init__()
        D, p, (H, W) = size.width, size.patch, image_size
        if frames % tubelet:
            raise ValueError(f"{frames} frames do not divide into tubelets of {tubelet}")
        # `stride`, as in UniFormerV2: frames from one token to the next, here those of a tubelet.
        self.patch, self.grid, self.stride, self._recompute = p, (H // p, W // p), tubelet, False
        self.embed = nn.Linear(3 * tubelet * p * p, D, bias=False)
        self.class_token = nn.Parameter(D**-0.5 * torch.randn(D))
        # Position embeddings: a patch gets one for its row and column, and one for its time.
        self.positions = nn.Parameter(uniformerv2.spatial_position_table(*self.grid, D))  # (1+S, D)
        self.times = nn.Parameter(torch.zeros(frames // tubelet, D))         # (t, D)
        self.norm_pre = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(
            clip_block(D, size.heads, size.mlp_width) for _ in range(size.depth))

    def encode(self, video):
        """video (B, C, T, H, W), normalised -> class token (B, D) and all tokens (B, 1, 1+N, D),
        without a last norm: first the class token, then the patches of each frame. Axis 1
        replaces the frame axis of UniFormerV2."""
        B, C, T, H, W = video.shape
        p, tubelet, (h, w) = self.patch, self.stride, self.grid
        if (H, W) != (h * p, w * p) or T > tubelet * len(self.times) or T % tubelet:
            raise ValueError(f"a clip of {T} frames of {H} x {W}: this encoder takes up to "
                             f"{tubelet * len(self.times)} frames of {h * p} x {w * p} pixels"
                             + f", a multiple of {tubelet}" * (tubelet > 1))
        patches = video.reshape(B, C, T // tubelet, tubelet, h, p, w, p)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)        # (B, t, h, w, C, tubelet, p, p)
        # A single time step (an image) gets the mean of `times`, as in the official code.
        times = self.times.mean(dim=0, keepdim=True) if T == tubelet else self.times[:T // tubelet]
        x = (self.embed(patches.reshape(B, T // tubelet, h * w, -1))
             + self.positions[1:])                                           # (B, t, S, D)
        x = (x + times[:, None]).flatten(1, 2)                               # (B, N, D)
        class_token = (self.class_token + self.positions[0]).expand(B, 1, -1)  # (B, 1, D)
        x = self.norm_pre(torch.cat([class_token.to(x.dtype), x], dim=1))    # (B, 1+N, D)
        x = run_blocks(self.blocks, x, recompute=self._recompute)
        return x[:, 0], x[:, None]

    def recompute(self, on=True):
        """Recompute activations in the backward pass: see attention.run_blocks."""
        self._recompute = on


class VideoCLIP(nn.Module):
    """A visual and a text encoder with one embedding space. Arguments: see Options.
    Its `mean` and `std`, three numbers each, normalise pixels in [0, 1]."""

    def __init__(self, size="b16", **options):
        super().__init__()
        self.options = o = Options(size, **options)
        self.config = {"model": "VideoCLIP"} | asdict(o)
        self.kind = o.kind
        self.unused = []  # names of the tensors in a weights file that `from_official` skipped
        if o.kind == "joint":
            self.visual = JointEncoder(o.size, frames=o.frames, image_size=o.image_size,
                                       tubelet=o.tubelet)
            self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        else:
            self.visual = UniFormerV2(
                o.size, frames=o.frames, image_size=o.image_size, global_layers=o.global_layers,
                global_heads=o.global_heads, local_units=o.local_units,
                temporal_downsample=o.temporal_downsample)
            self.mean, self.std = CLIP_MEAN, CLIP_STD
        self.visual_norm = nn.LayerNorm(o.size.width)
        self.visual_proj = nn.Linear(o.size.width, o.embedding, bias=False)
        nn.init.normal_(self.visual_proj.weight, std=o.size.width**-0.5)
        self.text = TextEncoder(o.text_size, vocabulary=o.vocabulary, context=o.context,
                                embedding=o.embedding, end=o.end)
        # As in the official files. CLIP, InternVideo: the logarithm of the factor on the cosines,
        # which starts at 1 / 0.07 (CLIP, Sec. 2.5, Training). ViCLIP: the temperature, 1 / factor.
        self.scale = nn.Parameter(
            torch.tensor(0.01) if o.kind == "joint" else torch.tensor(1 / 0.07).log())

    @property
    def logit_scale(self):
        """Natural logarithm of the factor on the cosines, shape (). `clamp_scale` limits it."""
        return -self.scale.log() if self.kind == "joint" else self.scale

    @torch.no_grad()
    def clamp_scale(self):
        """Limit the factor on the cosines to 100, because a larger one makes training unstable
        (CLIP, Sec. 2.5). Except for "joint", 1 is the lower limit, as in InternVideo."""
        # `forward` may run again in the backward pass (in_pieces in engine/large_batches.py). There
        # autograd would reject a change of a weight. It does not see a change of `.data`.
        if self.kind == "joint":
            self.scale.data.clamp_(min=0.01)
        else:
            self.scale.data.clamp_(0, math.log(100))

    def encode_video_tokens(self, video):
        """Encode clips, or images as clips of one frame.

        video    (B, C, T, H, W) or (B, C, H, W) float, normalised with self.mean and self.std
        returns  embedding (B, E), not normalised, and the tokens of the last layer before any norm:
                 (B, t, 1+S, D), the class token of each frame first; "joint": (B, 1, 1+N, D)
        """
        feature, tokens = self.visual.encode(video[:, :, None] if video.ndim == 4 else video)
        return self.visual_proj(self.visual_norm(feature)), tokens

    def encode_video(self, video):
        return self.encode_video_tokens(video)[0]                            # (B, E)

    def encode_text_tokens(self, ids):
        """ids (B, L) -> embedding (B, E), not normalised; tokens (B, L, W), after the last norm."""
        return self.text(ids)

    def encode_text(self, ids):
        return self.text(ids)[0]                                             # (B, E)

    def forward(self, video, ids):
        """video (B, C, T, H, W), ids (B, L) -> the arguments of `contrastive_loss`: video and text
        embeddings (B, E), logit_scale ()."""
        if self.training:
            self.clamp_scale()
        return self.encode_video(video), self.encode_text(ids), self.logit_scale

    def recompute(self, on=True):
        """Recompute activations in the backward pass: see attention.run_blocks."""
        self.visual.recompute(on)
        self.text.recompute = on

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None, text_heads=None, global_heads=None, **options):
        """Load InternVideo-MM, ViCLIP, CLIP or a run, in eval mode. `grow`: CLIP as a video model.
        Details: weights.clip.load."""
        from weights import clip
        return clip.load(cls, source, heads=heads, text_heads=text_heads, global_heads=global_heads,
                         **options)

    def to_official(self):
        """{official name: tensor}, with the names of InternVideo-MM ("video"), OpenAI's CLIP
        ("frames") or ViCLIP ("joint"). ValueError if that model lacks an option of this one."""
        from weights import clip
        return clip.to_official(self)


def contrastive_loss(video, text, logit_scale, *, targets=None, gather=False, rows=None):
    """Symmetric cross entropy of a batch of pairs, in nats (CLIP, Sec. 2.3, Fig. 3).

    loss = (CE(s * v @ t.T) + CE(s * t @ v.T)) / 2 with s = exp(logit_scale), v and t the normalised
    embeddings, and CE the mean cross entropy of the rows. An untrained model has about ln B.

    video, text  (B, E) float embeddings, not normalised
    targets      None: each video has one positive, its own caption. (B,) int, such as a number per
                 caption (ViCLIP): pairs with equal numbers are positives of each other. They share
                 the target probability equally. (B, columns) int: one equal column is enough
    gather       True: the batch is all processes' pairs; each must have equally many
    rows         None: compute all logits at once. Otherwise this many rows at a time, which gives
                 equal results in less memory, for batches of thousands
    returns      () float32 (float64 for float64 inputs), also under autocast
    """
    if video.shape != text.shape or video.ndim != 2:
        raise ValueError(f"embeddings of shapes {tuple(video.shape)} and {tuple(text.shape)}: both "
                         "need the same (B, E)")
    with torch.autocast(video.device.type, enabled=False):
        v, t = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
                for x in (video, text))
        if gather:
            v, t = gather_with_gradient(v), gather_with_gradient(t)
            targets = None if targets is None else gather_with_gradient(targets)
        targets = torch.arange(len(v), device=v.device) if targets is None else targets
        scale = torch.as_tensor(logit_scale, dtype=v.dtype, device=v.device)
        if rows:
            return BlockedLoss.apply(v, t, scale, targets, rows)
        logits = scale.exp() * v @ t.T                                       # (B, B)
        equal = targets[:, None] == targets                            # (B, B) or (B, B, columns)
        positive = (equal if equal.ndim == 2 else equal.any(dim=2)).to(v.dtype)  # (B, B), symmetric
        soft_targets = positive / positive.sum(dim=1, keepdim=True)          # (B, B), rows sum to 1
        return (F.cross_entropy(logits, soft_targets) + F.cross_entropy(logits.T, soft_targets)) / 2


def zero_shot(video, class_embeddings, logit_scale, combine="probabilities"):
    """Classify videos without labels (CLIP, Sec. 3.1.2) -> probabilities (B, Y).

    video             (B, E) float embeddings
    class_embeddings  (prompts, Y, E) normalised: for each prompt, one sentence per class
    logit_scale       (), as in `contrastive_loss`
    combine           "probabilities": a softmax for each prompt, then their mean (InternVideo);
                      "embeddings": the normalised mean of a class's sentences, one softmax (CLIP)
    """
    if combine not in ("probabilities", "embeddings"):
        raise ValueError(f"combine is {combine!r}: choose probabilities or embeddings")
    if combine == "embeddings":
        class_embeddings = F.normalize(class_embeddings.mean(dim=0, keepdim=True), dim=-1)
    cosines = torch.einsum("be,pye->bpy", F.normalize(video, dim=-1), class_embeddings)
    return (logit_scale.exp() * cosines).softmax(dim=-1).mean(dim=1)         # (B, Y)


@torch.no_grad()
def main():
    """`python clip_video.py` prints the shapes for four generated clips and an untrained model."""
    from video.moving_shapes import MovingShapes
    from video.transforms import normalise
    from weights.tokenizer import train_tokenizer

    dataset = MovingShapes("train", 4, 64)
    captions = [dataset[i]["caption"] for i in range(100)]
    tokenizer = train_tokenizer(captions, 800)
    ids, is_text = tokenizer.encode(captions[:4], 24, trim=True)
    model = VideoCLIP("tiny", frames=4, image_size=64, vocabulary=tokenizer.vocabulary, context=24)
    pixels = torch.stack([torch.as_tensor(dataset[i]["video"]) for i in range(4)])
    video = normalise(pixels, model.mean, model.std)
    video_embedding, video_tokens = model.encode_video_tokens(video)
    text_embedding = model.encode_text(ids)
    print(f"first caption: {captions[0]!r}, token ids: {ids[0][is_text[0]].tolist()}")
    for name, tensor in (
            ("video (B, C, T, H, W)", video), ("video tokens (B, t, 1+S, D)", video_tokens),
            ("video embedding (B, E)", video_embedding),
            ("text ids (B, L)", ids), ("text embedding (B, E)", text_embedding)):
        print(f"{name:28s} {tuple(tensor.shape)}")
    loss = contrastive_loss(video_embedding, text_embedding, model.logit_scale)
    print(f"contrastive loss of the untrained model {loss:.3f}; ln B = {math.log(4):.3f}")


if __name__ == "__main__":
    main()
