"""Two frozen encoders, cross-model attention between them, and a learned sum of their scores.

    clip --+--> masked encoder (VideoMAE) ----[attn]-- blocks --[attn]-- blocks --+--> score A
           |                                    ^                 ^               |
           |                               keys, values      keys, values    keys, values
           |                                    |                 |               v
           +--> multimodal encoder (UniFormerV2) +-----------------+--> query --[attn]--> score M

           logits = (1 - u) * score A + u * score M,  u learned

Masked modelling learns how things move; language supervision learns what they are. InternVideo
keeps both encoders and adds attention between them (arXiv 2212.03191, Sec. 3.2, Cross-Model
Interaction). It reached 91.1 % on Kinetics-400. The paper does not compare with a plain average of
both scores; `train.py fuse` does.

1. `CrossModelAttention`: attention to the other model's tokens, then an MLP. Each is multiplied by
   a gate tanh(g) with g = 0 at the start, so every encoder starts exactly as it was. In the first
   step the gates get a gradient and the rest of the layer none: in y = tanh(g) * f(x), dy/dg = f(x)
   and dy/df = tanh(0) = 0. Once the gates open, f learns too.
2. `InternVideo.encode_masked`: such a layer stands before chosen blocks of the masked encoder. It
   reads the multimodal encoder after a chosen block, at several depths, because early blocks hold
   what the last ones no longer do. At the end the global token (paper: "query token") attends to
   the masked encoder's tokens.
3. Both heads give scores. Their weights are a softmax of learned numbers that start equal, so the
   first result is the mean of both models' logits.
4. `InternVideo.freeze`: only the cross-model attention, the weights of the scores, the heads with
   their norms, and the global token's start are trained. The encoders stay in eval mode.

None of this was released. The paper leaves open, and we chose: before which blocks (four, evenly),
which multimodal blocks are read (at the same relative depth), which tokens give keys (all), heads
(the masked encoder's), gates (one number each), how scores combine (convex, of logits). With
VideoMAE-H and UniFormerV2-L, 90.2 M parameters train beside 985 M frozen ones.

>>> from mae import VideoClassifier
>>> from uniformerv2 import UniFormerV2
>>> masked = VideoClassifier("tiny", classes=5, frames=8, image_size=64)
>>> model = InternVideo(masked, UniFormerV2("tiny", classes=5, frames=8)).eval()
>>> model(torch.randint(256, (2, 8, 64, 64, 3), dtype=torch.uint8)).shape
torch.Size([2, 5])
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Attention, Dropout, Mlp
from video.transforms import normalise


class CrossModelAttention(nn.Module):
    """Tokens of one model attend to tokens of another.

        x = x + tanh(gate_attn) * attention(norm x; norm_context y)
        x = x + tanh(gate_mlp) * mlp(norm_mlp x)

    width, context_width   D of the queries x, D of the context y, which gives keys and values
    gates                  True: both start at 0; False: no gates, for comparison

    From the paper: gated attention and MLP. Ours: pre-norm, exact GELU, an MLP four times as wide.
    """

    def __init__(self, width, context_width, heads, gates=True):
        super().__init__()
        self.norm, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(context_width)
        self.attn = Attention(width, heads, context_width=context_width)
        self.norm_mlp, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)
        self.gate_attn = nn.Parameter(torch.zeros(())) if gates else None
        self.gate_mlp = nn.Parameter(torch.zeros(())) if gates else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x, context):
        """x (B, N, D), context (B, M, context_width) -> (B, N, D)"""
        attended = self.attn(self.norm(x), keys_from=self.norm_context(context))
        x = x + self.gated(self.gate_attn, attended)
        return x + self.gated(self.gate_mlp, self.mlp(self.norm_mlp(x)))

    @staticmethod
    def gated(gate, x):
        return x if gate is None else gate.tanh().to(x.dtype) * x

    @torch.no_grad()
    def attention_maps(self, x, context):
        """Attention weights (B, N, M) of `forward`: mean over heads, rows sum to 1."""
        keys, _ = self.attn.kv(self.norm_context(context)).chunk(2, dim=-1)
        q, k = (y.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2).float()
                for y in (self.attn.q(self.norm(x)), keys))
        return (q * q.shape[-1]**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)


@dataclass(frozen=True)
class Options:
    """Options of an InternVideo. `fitted` checks them and replaces None."""

    before: list | None = None  # masked blocks with attention before them, rising; None: `evenly`
    # For each, the multimodal block after which it reads; None: at the same relative depth. Two
    # multimodal encoders: a list for each.
    layers: list | None = None
    last: bool = True  # False: the global token does not attend to the masked encoder
    heads: int | None = None  # of the masked tokens' attention; None: the masked encoder's
    source: str = "all"  # keys and values from "all" tokens, or "patches": no class tokens
    gates: bool = True  # False: no gates; the start is then not the encoders' average
    bridges: bool = True  # False: no cross-model attention at all: before=[], last=False
    drop: float = 0.0  # dropout before the heads, a probability (paper: 0.9)

    def fitted(self, masked, encoders):
        """These options with defaults for these encoders. ValueError where they do not fit."""
        if self.source not in ("all", "patches"):
            raise ValueError(f"source is {self.source!r}: choose all or patches")
        depth, before, layers = masked.depth, self.before, self.layers
        before = evenly(min(4, depth), depth) if before is None else list(before)
        before = before if self.bridges else []
        if before != sorted(set(before) & set(range(depth))):
            raise ValueError(f"before {before}: name blocks 0 to {depth - 1} of the masked "
                             "encoder, rising")
        if layers is None:  # before block 7 of 32 it reads block 5 of 24: a quarter of each model
            layers = [[max(0, round((block + 1) * encoder.depth / depth) - 1) for block in before]
                      for encoder in encoders]
        elif len(encoders) == 1 and not any(isinstance(x, (list, tuple)) for x in layers):
            layers = [layers]
        if len(layers) != len(encoders) or not all(isinstance(x, (list, tuple)) for x in layers):
            raise ValueError(f"layers {layers}: give a list for each of the {len(encoders)} "
                             "multimodal encoders")
        for encoder, chosen in zip(encoders, layers):
            if len(chosen) != len(before) or not set(chosen) <= set(range(encoder.depth)):
                raise ValueError(f"layers {list(chosen)}: name {len(before)} layers, one for each "
                                 f"bridge, from 0 to {encoder.depth - 1} of the multimodal encoder")
        return replace(self, before=before, layers=[list(chosen) for chosen in layers],
                       last=self.last and self.bridges)


class InternVideo(nn.Module):
    """A masked encoder, one or two multimodal encoders, cross-model attention, and one answer.

    masked       an encoder of the masked family, as mae.VideoClassifier, with a head for Y classes
    multimodal   one of the multimodal family, as uniformerv2.UniFormerV2, with a head for the same
                 classes; or a list of two (InternVideo-T)
    raises       ValueError where these and the options do not fit together

    A clip is uint8 (B, T, H, W, 3), as data.py returns it; each encoder gets its own `view` of it.
    """

    def __init__(self, masked, multimodal, **options):
        super().__init__()
        encoders = list(multimodal) if isinstance(multimodal, (list, tuple)) else [multimodal]
        self.check(masked, encoders)
        self.options = options = Options(**options).fitted(masked, encoders)
        self.config = {"model": "InternVideo", "masked": masked.config,
                       "multimodal": [encoder.config for encoder in encoders]} | asdict(options)
        self.before, self.layers = options.before, options.layers
        self.masked, self.multimodal = masked, nn.ModuleList(encoders)

        def attention(encoder, context, heads):
            return CrossModelAttention(encoder.width, context.width, heads, options.gates)

        # The attention of masked tokens, and of global tokens. Saved files contain these names.
        self.bridges = nn.ModuleList(
            nn.ModuleList(attention(masked, encoder, options.heads or masked.heads)
                          for _ in self.before) for encoder in encoders)
        self.last = nn.ModuleList(attention(encoder, masked, encoder.heads)
                                  for encoder in encoders if options.last)
        self.balance = nn.Parameter(torch.zeros(len(encoders)))  # the masked encoder's is fixed: 0
        self.drop = Dropout(options.drop)
        self.freeze()
        self.train(False)

    @staticmethod
    def check(masked, encoders):
        """ValueError where these cannot work together."""
        families = [("masked", "VideoClassifier")] + [("multimodal", "UniFormerV2")] * len(encoders)
        for model, (family, usual) in zip((masked, *encoders), families):
            if getattr(model, "family", None) != family:
                raise ValueError(f"the {family} encoder is a {type(model).__name__}: "
                                 f"give a {usual}")
            channels = model.config["channels"]
            if channels != 3:
                raise ValueError(f"a {usual} for {channels} colour channels: clips have 3")
        if not 1 <= len(encoders) <= 2:
            raise ValueError(f"{len(encoders)} multimodal encoders: give one, or two "
                             "(InternVideo-T)")
        classes = [model.config["classes"] for model in (masked, *encoders)]
        if len(set(classes)) > 1 or not classes[0]:
            raise ValueError(f"the encoders' heads name {', '.join(map(str, classes))} classes: "
                             "all need the same, at least one; see their with_head")

    def freeze(self):
        """Let only `learned_parts` train; `frozen` names the parameters that never do."""
        self.requires_grad_(False)
        for part in self.learned_parts():
            part.requires_grad_(True)
        self.frozen = {name for name, p in self.named_parameters() if not p.requires_grad}

    def learned_parts(self):
        """The modules and parameters that train (InternVideo, Sec. 3.2)."""
        yield from (self.bridges, self.last, self.balance)
        for encoder in (self.masked, *self.multimodal):
            yield from encoder.learned_parts()

    def train(self, mode=True):
        """The encoders stay in eval mode: no dropout, no new batch statistics."""
        super().train(mode)
        for encoder in (self.masked, *self.multimodal):
            encoder.eval()
        return self

    def encode_multimodal(self, encoder, clip, chosen):
        """A multimodal encoder alone -> its state after the last block, and its tokens (B, M, Dm)
        after each chosen block, from which the masked encoder's attention takes keys and values."""
        state, tokens, done = encoder.start(view(clip, encoder)), {}, 0
        for layer in sorted(set(chosen)):
            state, done = encoder.run(state, done, layer + 1), layer + 1
            kept = state.tokens if self.options.source == "all" else state.tokens[:, :, 1:]
            tokens[layer] = kept.flatten(1, 2)
        return encoder.run(state, done, encoder.depth), [tokens[layer] for layer in chosen]

    def encode_masked(self, clip, contexts):
        """The masked encoder with cross-model attention -> its state after the last block.
        contexts: for each multimodal encoder, for each place, tokens (B, M, Dm)."""
        edges = [*self.before, self.masked.depth]
        state = self.masked.run(self.masked.start(view(clip, self.masked)), 0, edges[0])
        for place, (start, stop) in enumerate(zip(edges, edges[1:])):
            for layers, tokens in zip(self.bridges, contexts):
                state = replace(state, tokens=layers[place](state.tokens, tokens[place]))
            state = self.masked.run(state, start, stop)
        return state

    def encode(self, clip):
        """uint8 (B, T, H, W, 3) -> [final state of the masked encoder, of each multimodal one]"""
        states, contexts = zip(*(self.encode_multimodal(encoder, clip, chosen)
                                 for encoder, chosen in zip(self.multimodal, self.layers)))
        masked, states = self.encode_masked(clip, contexts), list(states)
        for i, layer in enumerate(self.last):
            query = states[i].query
            if query is None:  # an encoder without global blocks: the mean class token
                query = states[i].tokens[:, :, 0].mean(dim=1, keepdim=True)
            states[i] = replace(states[i], query=layer(query, masked.tokens))
        return [masked, *states]

    def scores(self, clip):
        """uint8 (B, T, H, W, 3) -> [logits (B, Y) of the masked encoder, of each multimodal one]"""
        return [encoder.head(self.drop(encoder.finish(state)))
                for encoder, state in zip((self.masked, *self.multimodal), self.encode(clip))]

    def shares(self):
        """The weight of each score, (1 + encoders,): positive, sum 1, equal at the start."""
        return torch.cat([self.balance.new_zeros(1), self.balance]).softmax(dim=0)

    def combine(self, scores):
        """The learned convex combination: list of (B, Y) -> (B, Y)."""
        return sum(share * score for share, score in zip(self.shares(), scores))

    def forward(self, clip):
        """uint8 (B, T, H, W, 3) -> logits (B, Y)"""
        return self.combine(self.scores(clip))

    def features(self, clip):
        """For other tasks: {"clip": (B, Da + Dm + ...), what the heads see, side by side,
        "masked": tokens (B, N, Da) after cross-model attention, "multimodal": for each encoder its
        last tokens (B, t, 1+S, Dm), which do not depend on the masked encoder}."""
        masked, *others = states = self.encode(clip)
        encoders = (self.masked, *self.multimodal)
        features = [encoder.finish(state) for encoder, state in zip(encoders, states)]
        return {"clip": torch.cat(features, dim=1), "masked": masked.tokens,
                "multimodal": [state.tokens for state in others]}

    @torch.no_grad()
    def attention_maps(self, clip, place=-1, encoder=0):
        """Where the masked encoder's tokens attend in a multimodal encoder: (B, N, t, 1+S or S),
        mean over heads, rows sum to 1. place: index into `before`; encoder: into `multimodal`."""
        layer, inputs = self.bridges[encoder][place], []
        hook = layer.register_forward_pre_hook(lambda _, given: inputs.extend(given))
        try:
            self.encode(clip)
        finally:
            hook.remove()
        model = self.multimodal[encoder]
        t, _, _ = model.grid_of(model.config["frames"], *model.config["image_size"])
        return layer.attention_maps(*inputs).unflatten(2, (t, -1))

    @torch.no_grad()
    def with_head(self, classes, *, rows=None):
        """The same for Y classes. rows: which row of both heads each class is, None = a new one."""
        masked, *others = (encoder.with_head(classes, rows=rows)
                           for encoder in (self.masked, *self.multimodal))
        new = type(self)(masked, others, **asdict(self.options))
        for name in ("bridges", "last"):
            getattr(new, name).load_state_dict(getattr(self, name).state_dict())
        new.balance.copy_(self.balance)
        return new

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks. All other blocks are frozen and read
        nothing that trains, so autograd keeps nothing of them."""
        self.masked.recompute(on)

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        from weights.encoders import from_config
        masked, multimodal = from_config(config["masked"]), map(from_config, config["multimodal"])
        return cls(masked, list(multimodal), **{key: value for key, value in config.items() if key
                                                not in ("model", "masked", "multimodal")})

    @classmethod
    def from_run(cls, folder):
        """Load a run of `train.py fuse`, encoders included, in eval mode. WeightsError if none."""
        return weights.load_run(cls.from_config, folder, "InternVideo", "fuse")


def evenly(count, depth):
    """`count` places among `depth` blocks, evenly, the last one before the last block.

    >>> evenly(4, 32), evenly(4, 12), evenly(2, 3)
    ([7, 15, 23, 31], [2, 5, 8, 11], [1, 2])
    """
    return sorted({round((i + 1) * depth / count) - 1 for i in range(count)})


def largest(encoders):
    """(H, W) in pixels of a clip that has, in each direction, what the largest view takes."""
    return tuple(map(max, zip(*(encoder.config["image_size"] for encoder in encoders))))


def view(clip, encoder):
    """A clip as one encoder takes it: uint8 (B, T, H, W, 3) -> float32 (B, 3, frames, *image_size),
    normalised with the encoder's `mean` and `std`.

    Frames are the middle ones of equal parts of the clip. Resizing is bilinear and antialiased, and
    does not keep the aspect ratio. ValueError: not such a clip, or too few frames.
    """
    frames, size = encoder.config["frames"], tuple(encoder.config["image_size"])
    if clip.dtype != torch.uint8 or clip.ndim != 5 or clip.shape[-1] != 3:
        raise ValueError(f"a clip is uint8 (B, T, H, W, 3), not {str(clip.dtype)[6:]} "
                         f"{tuple(clip.shape)}; each encoder normalises it for itself")
    B, T, H, W, _ = clip.shape
    if T < frames:
        raise ValueError(f"a clip of {T} frames for an encoder of {frames}: sample more frames")
    if T != frames:
        clip = clip[:, ((torch.arange(frames, device=clip.device) + 0.5) * T / frames).long()]
    if (H, W) != size:
        frames_first = clip.flatten(0, 1).permute(0, 3, 1, 2).float()        # (B*t, 3, H, W)
        resized = F.interpolate(frames_first, size, mode="bilinear", antialias=True)
        clip = resized.permute(0, 2, 3, 1).unflatten(0, (B, frames))         # (B, t, h, w, 3)
    return normalise(clip, encoder.mean, encoder.std)


@torch.no_grad()
def main():
    """`python fusion.py`: the shapes of a generated clip on its way through two tiny encoders."""
    from mae import VideoClassifier
    from uniformerv2 import UniFormerV2
    from video.moving_shapes import MovingShapes

    model = InternVideo(VideoClassifier("tiny", classes=16, frames=8, image_size=64),
                        UniFormerV2("tiny", classes=16, frames=8)).eval()
    clip = torch.as_tensor(MovingShapes("test", 8, (64, 64), 0)[0]["video"])[None]
    masked, multimodal = model.encode(clip)
    rows = [("clip", "(B, T, H, W, 3)", clip),
            ("what an encoder takes of it", "(B, C, T, H, W)", view(clip, model.masked))]
    for place, (block, layer) in enumerate(zip(model.before, model.layers[0])):
        rows.append((f"attention before block {block} to block {layer}", "(B, N, t, 1+S)",
                     model.attention_maps(clip, place)))
    rows += [("masked tokens at the end", "(B, N, D)", masked.tokens),
             ("global token after attention to them", "(B, 1, D)", multimodal.query),
             ("logits", "(B, Y)", model(clip))]
    for name, letters, x in rows:
        print(f"{name:45s} {letters:16s} {tuple(x.shape)}")


if __name__ == "__main__":
    main()
