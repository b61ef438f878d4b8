"""Say which sentence belongs to which video: two encoders with one embedding space.

A label names one fact of a clip, a caption names many, and the web is full of captions. In a batch
of B pairs, each video must find its own sentence among B, and each sentence its video; all other
pairs are negatives (CLIP, arXiv 2103.00020, Sec. 2.3, Selecting an Efficient Pre-Training Method;
InternVideo, arXiv 2212.03191, Sec. 3.2, Self-Supervised Video Pretraining).

    video (B, C, T, H, W) --visual encoder--> feature (B, D) --norm, project--> (B, E) ---+
                                              tokens (B, t, 1+S, D), for captions         | cosines
                                                                                          | (B, B)
    text ids (B, L) --text encoder, causal--> tokens (B, L, W) --at the end---> (B, E) ---+
    loss = cross entropy of exp(logit_scale) * cosines, over rows and columns; target: the diagonal

1. A tokenizer turns sentences into token numbers (weights/tokenizer.py).
2. `TextEncoder` is causal. Only the end-of-text token has seen the whole sentence, so its feature
   represents the sentence. `TextEncoder.step` reads token by token, for caption_decoder.py.
3. `VideoCLIP` adds one of three visual encoders: UniFormerV2 ("video", InternVideo's own), the same
   without its video parts ("frames": CLIP, averaged over frames), or `JointEncoder`, in which the
   tokens of all frames attend to each other ("joint": ViCLIP, arXiv 2307.06942, Sec. 4).
4. `contrastive_loss`: cosines lie between -1 and 1, so their softmax would be almost flat. The
   learned factor exp(logit_scale), the inverse temperature, sharpens it. engine/large_batches.py
   has forms with the same numbers for batches that do not fit into memory.
5. `zero_shot` names things for which the model never saw a label: one sentence for each class.

Where we differ from the official code (InternVideo1 clip_utils/model.py, ViCLIP viclip.py), with
equal numbers: batch first. A batch of captions may be cut to its longest, because what follows the
end does not change a causal encoder's feature. ViCLIP orders tokens by place, then time; we do the
reverse. InternVideo-MM's embedding for hidden words is not read: no published recipe uses it.
B/16 has 150 M parameters (86 M visual, 63 M text), with four global blocks 178 M.

>>> model = VideoCLIP("tiny", frames=4, image_size=32, vocabulary=600, context=16)
>>> video, ids = torch.randn(3, 3, 4, 32, 32), torch.randint(600, (3, 16))
>>> contrastive_loss(*model(video, ids)).shape            # of two embeddings (B, E) and logit_scale
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

# Red, green, blue of pixels in [0, 1]. ViCLIP uses ImageNet's, the others CLIP's.
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
KINDS = {"video": "UniFormerV2", "frames": "frame-wise CLIP", "joint": "ViCLIP"}


@dataclass(frozen=True)
class Options:
    """All options of a VideoCLIP. Its configuration holds them with names of sizes and None
    replaced. ValueError where they do not fit together."""

    size: str | uniformerv2.Size = "b16"  # of the visual encoder
    kind: str = "video"  # of visual encoder, one of KINDS
    frames: int = 8  # T; "frames" and "video" take clips of any other length, too
    image_size: int | list | None = None  # pixels, H = W or [H, W]; None: the size's own
    global_layers: list | None = None  # "video": see UniFormerV2, as the next three
    global_heads: int | None = None
    local_units: int = 0  # no official video-text model has these, nor the next
    temporal_downsample: bool = False
    tubelet: int = 1  # "joint": frames that the first convolution spans, and its stride
    text_size: str | TextSize | None = None  # None: the one with the name in `size`
    embedding: int | None = None  # E, width of the joint space; None: as wide as the text encoder
    vocabulary: int = 49408  # V, number of tokens
    context: int = 77  # most tokens of a sentence
    end: int | None = None  # end-of-text token; None: the largest number in each row, as in CLIP

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose {', '.join(KINDS)}")
        if self.kind != "video" and (self.local_units or self.temporal_downsample):
            raise ValueError("local_units and temporal_downsample are for kind='video', not "
                             f"{self.kind!r}")
        if self.kind != "joint" and self.tubelet != 1:
            raise ValueError(f"tubelet is for kind='joint', not {self.kind!r}")
        text = self.text_size or self.size
        text = TEXT_SIZES[text] if isinstance(text, str) else text
        text = TextSize(**text) if isinstance(text, dict) else text
        if not isinstance(text, TextSize):
            raise ValueError("a Size of your own needs a text_size")
        visual = uniformerv2.Options(
            self.size, image_size=self.image_size,
            global_layers=self.global_layers if self.kind == "video" else ())
        for name, value in (("size", visual.size), ("image_size", list(visual.image_size)),
                            ("global_layers", list(visual.global_layers)), ("text_size", text),
                            ("embedding", self.embedding or text.width)):
            object.__setattr__(self, name, value)  # the dataclass is frozen for all others


def clip_block(width, heads, mlp_width=None):
    """attention.Block as in CLIP: all biases, QuickGELU, norms with epsilon 1e-5."""
    return Block(width, heads, mlp_width=mlp_width, bias="qkv", eps=1e-5, activation=quick_gelu)


class TextEncoder(nn.Module):
    """A causal transformer over token numbers (CLIP, Sec. 2.4, Choosing and Scaling a Model).
    size: TextSize; the other arguments: see Options."""

    undecayed = "positions",  # by weight decay, as `embed`: see engine/optimisers.py

    def __init__(self, size, *, vocabulary, context, embedding, end=None):
        super().__init__()
        self.end, self.recompute, width = end, False, size.width
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(clip_block(width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embedding, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        # CLIP, Sec. 2.4: the last layer of a residual branch starts smaller in a deeper model.
        last = width**-0.5 * (2 * size.depth)**-0.5
        for block in self.blocks:
            for layer, std in ((block.attn.qkv, width**-0.5), (block.attn.proj, last),
                               (block.mlp.fc1, (2 * width)**-0.5), (block.mlp.fc2, last)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def tokens(self, ids):
        """ids (B, L) int64 -> (B, L, W) after the final norm. Token i has seen tokens 0..i."""
        if ids.ndim != 2 or ids.shape[1] > len(self.positions):
            raise ValueError(f"text {tuple(ids.shape)}: need (B, L), L <= {len(self.positions)}")
        x = self.embed(ids) + self.positions[:ids.shape[1]]
        return self.norm(run_blocks(self.blocks, x, Context(Mask(causal=True)),
                                    recompute=self.recompute))

    def forward(self, ids):
        """ids (B, L) -> embedding (B, E), not normalised, and tokens (B, L, W)."""
        tokens = self.tokens(ids)
        return self.proj(self.at_end(tokens, ids)), tokens

    def at_end(self, tokens, ids):
        """Tokens (B, L, W) -> (B, W), those at the end of each sentence of ids (B, L)."""
        ends = ids if self.end is None else (ids == self.end).int()
        check = self.end is not None and not torch.compiler.is_compiling()  # a graph cannot raise
        if check and not ends.any(dim=1).all():
            raise ValueError(f"a text without its end, token {self.end}")
        place = ends.argmax(dim=1)                                           # (B,), the first end
        return tokens.gather(1, place[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]

    def start_cache(self, batch):
        """For `step`: [keys, values] of each block, (batch, heads, n, K) each, n = 0 tokens."""
        heads, weight = self.blocks[0].attn.heads, self.positions
        empty = weight.detach().new_zeros(batch, heads, 0, weight.shape[1] // heads)
        return [[empty, empty] for _ in self.blocks]

    def step(self, ids, cache):
        """Read n more tokens: ids (B, n) -> (B, n, W), as from `tokens`, and the new cache."""
        first, last = cache[0][0].shape[2], cache[0][0].shape[2] + ids.shape[1]
        if last > len(self.positions):
            raise ValueError(f"token {last} of a text encoder of {len(self.positions)}")
        x, new_cache = self.embed(ids) + self.positions[first:last], []
        mask = Mask(causal=True) if ids.shape[1] > 1 else None  # one token: everything is its past
        for block, past in zip(self.blocks, cache):
            q, *new = block.attn.queries_keys_values(block.norm1(x))
            k, v = (torch.cat([old.to(y.dtype), y], dim=2) for old, y in zip(past, new))
            x = x + block.attn.proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            new_cache.append([k, v])
        return self.norm(x), new_cache


class JointEncoder(nn.Module):
    """ViCLIP's visual encoder: one class token and the patches of all frames in one sequence.
    Arguments: see Options. Each patch gets a position for its place plus one for its time."""

    undecayed = "class_token", "positions", "times"  # see engine/optimisers.py

    def __init__(self, size, *, frames, image_size, tubelet=1):
        super().__init__()
        D, p, (H, W) = size.width, size.patch, image_size
        if frames % tubelet:
            raise ValueError(f"{frames} frames do not divide into tubelets of {tubelet}")
        self.patch, self.grid, self.stride, self._recompute = p, (H // p, W // p), tubelet, False
        self.embed = nn.Linear(3 * tubelet * p * p, D, bias=False)
        self.class_token = nn.Parameter(D**-0.5 * torch.randn(D))
        self.positions = nn.Parameter(uniformerv2.place_codes(*self.grid, D))
        self.times = nn.Parameter(torch.zeros(frames // tubelet, D))
        self.norm_pre = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(
            clip_block(D, size.heads, size.mlp_width) for _ in range(size.depth))

    def encode(self, video):
        """video (B, C, T, H, W) -> feature (B, D) and tokens (B, 1, 1+N, D), without a final norm:
        the class token, then the patches, time slowest."""
        B, C, T, H, W = video.shape
        p, step, (h, w) = self.patch, self.stride, self.grid
        if (H, W) != (h * p, w * p) or T > step * len(self.times) or T % step:
            raise ValueError(f"a clip of {T} frames of {H} x {W}: this encoder takes up to "
                             f"{step * len(self.times)} frames of {h * p} x {w * p} pixels"
                             + f", a multiple of {step}" * (step > 1))
        patches = video.reshape(B, C, T // step, step, h, p, w, p)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)                    # b t h w (c step p p)
        # As in the official code, an image gets the mean of all times.
        times = self.times.mean(dim=0, keepdim=True) if T == step else self.times[:T // step]
        x = self.embed(patches.reshape(B, T // step, h * w, -1)) + self.positions[1:]
        x = (x + times[:, None]).flatten(1, 2)                               # (B, N, D)
        first = (self.class_token + self.positions[0]).expand(B, 1, -1)
        x = self.norm_pre(torch.cat([first.to(x.dtype), x], dim=1))
        x = run_blocks(self.blocks, x, recompute=self._recompute)
        return x[:, 0], x[:, None]

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        self._recompute = on


class VideoCLIP(nn.Module):
    """A visual and a text encoder with a joint space of width E. Arguments: see Options.
    Its `mean` and `std` normalise pixels in [0, 1]: three numbers each."""

    def __init__(self, size="b16", **options):
        super().__init__()
        self.options = o = Options(size, **options)
        self.config = {"model": "VideoCLIP"} | asdict(o)
        self.kind = o.kind
        self.unused = []  # names of tensors that from_official left in the file on purpose
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
        # As files store it. CLIP, InternVideo: the logarithm of the factor on the cosines, from a
        # temperature of 0.07 (CLIP, Sec. 2.5, Training). ViCLIP: the temperature itself.
        self.scale = nn.Parameter(
            torch.tensor(0.01) if o.kind == "joint" else torch.tensor(1 / 0.07).log())

    @property
    def logit_scale(self):
        """(): ln of the factor on the cosines, between 0 and ln 100; in ViCLIP at most ln 100."""
        return -self.scale.log() if self.kind == "joint" else self.scale

    @torch.no_grad()
    def clamp_scale(self):
        """Keep the factor on the cosines at or below 100, as all official models do, and at or
        above 1, as InternVideo does. A larger one makes training unstable (CLIP, Sec. 2.5)."""
        # .data: autograd must not see a change of this parameter if it recomputes a forward pass.
        if self.kind == "joint":
            self.scale.data.clamp_(min=0.01)
        else:
            self.scale.data.clamp_(0, math.log(100))

    def encode_video_tokens(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std, or images
        (B, C, H, W) -> embedding (B, E), not normalised, and the tokens of the last layer before
        any norm: (B, t, 1+S, D), the class token of each frame first; "joint": (B, 1, 1+N, D)."""
        feature, tokens = self.visual.encode(video[:, :, None] if video.ndim == 4 else video)
        return self.visual_proj(self.visual_norm(feature)), tokens

    def encode_video(self, video):
        return self.encode_video_tokens(video)[0]                            # (B, E)

    def encode_text_tokens(self, ids):
        """ids (B, L) int64 -> embedding (B, E), not normalised, and tokens (B, L, W), normed."""
        return self.text(ids)

    def encode_text(self, ids):
        return self.text(ids)[0]                                             # (B, E)

    def forward(self, video, ids):
        """What `contrastive_loss` takes: two embeddings (B, E) and logit_scale ()."""
        if self.training:
            self.clamp_scale()
        return self.encode_video(video), self.encode_text(ids), self.logit_scale

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        self.visual.recompute(on)
        self.text.recompute = on

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(**{key: value for key, value in config.items() if key != "model"})

    @classmethod
    def from_official(cls, source, *, heads=None, text_heads=None, global_heads=None, **options):
        """InternVideo-MM, ViCLIP, OpenAI's or Hugging Face's CLIP, or a run of ours, in eval mode.
        Options: frames, global_layers, grow (CLIP becomes a video model); see weights.clip.load."""
        from weights import clip
        return clip.load(cls, source, heads=heads, text_heads=text_heads, global_heads=global_heads,
                         **options)

    def to_official(self):
        """{official name: tensor} as in InternVideo-MM ("video"), OpenAI's CLIP ("frames") or
        ViCLIP ("joint"). ValueError where the official model has no such option."""
        from weights import clip
        return clip.to_official(self)


def contrastive_loss(video, text, logit_scale, *, targets=None, gather=False, rows=None):
    """Find the sentence of each video and the video of each sentence (CLIP, Sec. 2.3, Fig. 3).

    loss = mean of CE(s * v @ t.T) and CE(s * t @ v.T), s = exp(logit_scale), with the truth on the
    diagonal, in nats; about ln B for an untrained model.

    video, text  (B, E) embeddings, not normalised
    targets      (B,) or (B, K) int: pairs with an equal number in the same place are right answers
                 to each other and share the probability evenly (ViCLIP: several clips with one
                 caption; ours also: several captions of one clip). None: all differ
    gather       join the batches of all processes first; every process needs the same B
    rows         compute so many rows of the logits at a time: the same numbers in less memory, for
                 batches of thousands. None: all at once
    returns      () float32 (float64 for float64 inputs), also under autocast
    """
    if video.shape != text.shape or video.ndim != 2:
        raise ValueError(f"embeddings {tuple(video.shape)}, {tuple(text.shape)}: need (B, E) twice")
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
        same = targets[:, None] == targets                                   # (B, B) or (B, B, K)
        truth = (same if same.ndim == 2 else same.any(dim=2)).to(v.dtype)
        truth = truth / truth.sum(dim=1, keepdim=True)                       # rows sum to 1
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def zero_shot(video, classes, logit_scale, combine="probabilities"):
    """Probabilities (B, Y) of classes that were never trained (CLIP, Sec. 3.1.2).

    video     (B, E) embeddings
    classes   (prompts, Y, E), normalised embeddings of one sentence per class, for each prompt
    combine   "probabilities": softmax over classes for each prompt, then the mean (InternVideo);
              "embeddings": the mean, normalised, of a class's sentences, then one softmax (CLIP)
    """
    if combine not in ("probabilities", "embeddings"):
        raise ValueError(f"combine is {combine!r}: choose probabilities or embeddings")
    if combine == "embeddings":
        classes = F.normalize(classes.mean(dim=0, keepdim=True), dim=-1)
    cosines = torch.einsum("be,pye->bpy", F.normalize(video, dim=-1), classes)
    return (logit_scale.exp() * cosines).softmax(dim=-1).mean(dim=1)


@torch.no_grad()
def main():
    """`python clip_video.py`: the shapes, of an untrained model on four generated clips."""
    from video.moving_shapes import MovingShapes
    from video.transforms import normalise
    from weights.tokenizer import train_tokenizer

    world = MovingShapes("train", 4, 64)
    captions = [world[i]["caption"] for i in range(100)]
    tokenizer = train_tokenizer(captions, 800)
    ids, is_text = tokenizer.encode(captions[:4], 24, trim=True)
    model = VideoCLIP("tiny", frames=4, image_size=64, vocabulary=tokenizer.vocabulary, context=24)
    pixels = torch.stack([torch.as_tensor(world[i]["video"]) for i in range(4)])
    video = normalise(pixels, model.mean, model.std)
    video_embedding, video_tokens = model.encode_video_tokens(video)
    text_embedding = model.encode_text(ids)
    print(f"the first caption: {captions[0]!r}, as tokens {ids[0][is_text[0]].tolist()}")
    for name, value in (
            ("video (B, C, T, H, W)", video), ("its tokens (B, t, 1+S, D)", video_tokens),
            ("its embedding (B, E)", video_embedding),
            ("text (B, L)", ids), ("its embedding (B, E)", text_embedding)):
        print(f"{name:28s} {tuple(value.shape)}")
    loss = contrastive_loss(video_embedding, text_embedding, model.logit_scale)
    print(f"contrastive loss {loss:.3f}, untrained; ln B = {math.log(4):.3f} at chance")


if __name__ == "__main__":
    main()
