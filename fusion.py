"""Cross-model attention between two frozen video encoders, and a learned sum of their scores.

InternVideo trains one encoder by masked modelling and one with language. The paper expects the
first to learn actions and the second to learn meaning. It lets them attend to each other (arXiv
2212.03191, Sec. 3.2, Cross-Model Interaction). With two multimodal encoders it reached 91.1 % on
Kinetics-400. It does not compare this with the average of the scores; `train.py fuse` does.

    clip (B, T, H, W, 3), uint8
     +--> masked encoder     (B, N, D) --[attn]-- blocks --[attn]-- blocks --+--> score A (B, Y)
     |                                      ^                 ^              |
     |                                 keys, values      keys, values   keys, values
     |                                      |                 |              v
     +--> multimodal encoder (B, M, Dm) ----+-----------------+--> query --[attn]--> score B (B, Y)
    logits (B, Y) = (1 - u) * score A + u * score B,  u learned

Masked encoder (VideoMAE): N tokens, width D. Multimodal encoder (UniFormerV2): M = t * (1+S)
tokens, width Dm. A score is the output of an encoder's head: the logits of Y classes.

1. `CrossModelAttention` ([attn] above): attention to the tokens of the other encoder, then an MLP.
   Each result is multiplied by its gate tanh(g), as in Flamingo (arXiv 2204.14198). g starts at
   0, so the encoders start unchanged. At g = 0, y = tanh(g) * f(x) has dy/dg = f(x) and
   dy/df = 0. The gate therefore trains from the first step, and f after it.
2. `InternVideo.encode_masked` puts such layers before chosen blocks of the masked encoder. The keys
   come from the multimodal block at the same share of the depth. At the end, the multimodal
   encoder's global token (in the paper "query token") attends to the masked encoder's tokens. The
   head for score B gets this token and the class tokens (UniFormerV2.combine).
3. `InternVideo.combine`: 1-u and u are the softmax of 0 and a learned number, which starts at 0.
   Before training, the result is therefore the mean of both encoders' logits.
4. `InternVideo.freeze`: only the cross-model attention, the weights of the scores, the heads with
   their norms, and the initial global token train. The encoders stay in eval mode.

None of this was released. Our choices: four evenly spaced blocks; the same share of the depth; keys
from all tokens; heads as in the queries' encoder; one number per gate; weights that sum to 1.

>>> from mae import VideoClassifier
>>> from uniformerv2 import UniFormerV2
>>> masked = VideoClassifier("tiny", classes=5, frames=8, image_size=64)
>>> model = InternVideo(masked, UniFormerV2("tiny", classes=5, frames=8)).eval()
>>> model(torch.randint(256, (2, 8, 64, 64, 3), dtype=torch.uint8)).shape   # (B, Y)
torch.Size([2, 5])
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Attention, Dropout, Mlp, attention_weights
from video.transforms import normalise


class CrossModelAttention(nn.Module):
    """Tokens x of one encoder attend to tokens y of another.

        x = x + tanh(gate_attn) * attention(norm x; norm_context y)
        x = x + tanh(gate_mlp) * mlp(norm_mlp x)

    width           of x, which gives the queries
    context_width   of y, which gives keys and values
    heads           number of heads; it divides width
    gates           True: both start at 0; False: no gates, for comparison

    The paper describes gated attention and a gated MLP. Pre-norm, exact GELU, and an MLP width of
    4 * width are our choice.
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
        """x (B, Nq, width), context (B, Nk, context_width) -> (B, Nq, width)"""
        attended = self.attn(self.norm(x), keys_from=self.norm_context(context))
        x = x + self.gated(self.gate_attn, attended)
        return x + self.gated(self.gate_mlp, self.mlp(self.norm_mlp(x)))

    @staticmethod
    def gated(gate, x):
        return x if gate is None else gate.tanh().to(x.dtype) * x

    @torch.no_grad()
    def attention_maps(self, x, context):
        """Attention weights (B, Nq, Nk) of `forward`: mean over heads; each row sums to 1."""
        q, k, _ = self.attn.queries_keys_values(self.norm(x), self.norm_context(context))
        return attention_weights(q.float(), k.float()).mean(dim=1)


@dataclass(frozen=True)
class Options:
    """All options of `InternVideo`. `fitted` checks them and replaces None in the first two."""
    # Blocks of the masked encoder with cross-model attention before them, rising; None: four,
    # evenly spaced.
    before: list | None = None
    # For each of these, the multimodal block whose output gives the keys; None: the block at the
    # same share of the depth. With two multimodal encoders: a list for each.
    layers: list | None = None
    last: bool = True  # the global token attends to the masked encoder's tokens
    heads: int | None = None  # of the attention before masked blocks; None: as these blocks
    source: str = "all"  # keys and values come from "all" tokens, or from "patches" only
    gates: bool = True  # False: no gates; training then does not start from the encoders' average
    bridges: bool = True  # False: no cross-model attention at all, as before=[] with last=False
    drop: float = 0.0  # dropout before the heads, a probability (paper: 0.9)

    def fitted(self, masked, encoders):
        """A copy without None in before and layers, for a masked encoder and a list of multimodal
        encoders. ValueError if an option does not fit them."""
        if self.source not in ("all", "patches"):
            raise ValueError(f"source is {self.source!r}: choose all or patches")
        depth, before, layers = masked.depth, self.before, self.layers
        before = evenly_spaced_blocks(min(4, depth), depth) if before is None else list(before)
        before = before if self.bridges else []
        if before != sorted(set(before) & set(range(depth))):
            raise ValueError(f"before is {before}: give blocks 0 to {depth - 1} of the masked "
                             "encoder, rising")
        if layers is None:  # block 7, the 8th of 32, and block 5, the 6th of 24: a quarter of each
            layers = [[max(0, round((block + 1) * encoder.depth / depth) - 1) for block in before]
                      for encoder in encoders]
        elif len(encoders) == 1 and not any(isinstance(x, (list, tuple)) for x in layers):
            layers = [layers]
        if len(layers) != len(encoders) or not all(isinstance(x, (list, tuple)) for x in layers):
            raise ValueError(f"layers is {layers}: give a list for each of the {len(encoders)} "
                             "multimodal encoders")
        for encoder, blocks in zip(encoders, layers):
            if len(blocks) != len(before) or not set(blocks) <= set(range(encoder.depth)):
                raise ValueError(f"layers is {list(blocks)}: give {len(before)} blocks of the "
                                 f"multimodal encoder, from 0 to {encoder.depth - 1}, one for each "
                                 "block in before")
        return replace(self, before=before, layers=[list(blocks) for blocks in layers],
                       last=self.last and self.bridges)


class InternVideo(nn.Module):
    """A classifier from a masked encoder, one or two multimodal encoders and cross-model attention.

    masked       with a head for Y classes, as mae.VideoClassifier
    multimodal   with a head for the same classes, as uniformerv2.UniFormerV2; or a list of two, as
                 in InternVideo-T
    options      see Options
    raises       ValueError if the encoders and the options do not fit together

    A clip is uint8 (B, T, H, W, 3), as data.py returns it. `prepare_clip` makes the input of each
    encoder.
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

        def cross_attention(queries_from, keys_from, heads):
            return CrossModelAttention(queries_from.width, keys_from.width, heads, options.gates)

        # bridges[i][j]: before masked block before[j], with keys from multimodal encoder i.
        # last[i]: queries are the global token of multimodal encoder i, keys the masked tokens.
        self.bridges = nn.ModuleList(
            nn.ModuleList(cross_attention(masked, encoder, options.heads or masked.heads)
                          for _ in self.before) for encoder in encoders)
        self.last = nn.ModuleList(cross_attention(encoder, masked, encoder.heads)
                                  for encoder in encoders if options.last)
        self.balance = nn.Parameter(torch.zeros(len(encoders)))  # see `score_weights`
        self.drop = Dropout(options.drop)
        self.freeze()
        self.train(False)  # eval mode, as after loading

    @staticmethod
    def check(masked, encoders):
        """ValueError if these encoders cannot be combined."""
        families = [("masked", "VideoClassifier")] + [("multimodal", "UniFormerV2")] * len(encoders)
        for model, (family, class_name) in zip((masked, *encoders), families):
            if getattr(model, "family", None) != family:
                raise ValueError(f"the {family} encoder is a {type(model).__name__}: "
                                 f"give a {class_name}")
            channels = model.config["channels"]
            if channels != 3:
                raise ValueError(f"a {class_name} for {channels} colour channels: clips have 3")
        if not 1 <= len(encoders) <= 2:
            raise ValueError(f"{len(encoders)} multimodal encoders: give one, or two "
                             "(InternVideo-T)")
        classes = [model.config["classes"] for model in (masked, *encoders)]
        if len(set(classes)) > 1 or not classes[0]:
            raise ValueError(f"the encoders' heads have {', '.join(map(str, classes))} classes: "
                             "all need the same number, at least 1; see their with_head")

    def freeze(self):
        """Let only `trainable_modules` train. `frozen` holds the names of all other parameters."""
        self.requires_grad_(False)
        for part in self.trainable_modules():
            part.requires_grad_(True)
        self.frozen = {name for name, p in self.named_parameters() if not p.requires_grad}

    def trainable_modules(self):
        """The modules and parameters that train in this stage (InternVideo, Sec. 3.2)."""
        yield from (self.bridges, self.last, self.balance)
        for encoder in (self.masked, *self.multimodal):
            yield from encoder.trainable_modules()

    def train(self, mode=True):
        """As nn.Module.train, but the encoders stay in eval mode, without dropout and without new
        batch statistics."""
        super().train(mode)
        for encoder in (self.masked, *self.multimodal):
            encoder.eval()
        return self

    def encode_multimodal(self, encoder, clip, layers):
        """Run a multimodal encoder, which needs no tokens of the masked encoder.

        layers   blocks whose output gives keys and values
        returns  the state after the last block, and tokens (B, M, Dm) for each of `layers`
        """
        state, tokens, start = encoder.start(prepare_clip(clip, encoder)), {}, 0
        for layer in sorted(set(layers)):  # `layers` may be unsorted and name a block twice
            state, start = encoder.run(state, start, layer + 1), layer + 1
            context = state.tokens if self.options.source == "all" else state.tokens[:, :, 1:]
            tokens[layer] = context.flatten(1, 2)            # (B, M, Dm); for "patches" M is t*S
        return encoder.run(state, start, encoder.depth), [tokens[layer] for layer in layers]

    def encode_masked(self, clip, contexts):
        """Run the masked encoder with cross-model attention -> its state after the last block.
        contexts[i][j] (B, M, Dm): tokens of multimodal encoder i for masked block before[j]."""
        boundaries = [*self.before, self.masked.depth]
        state = self.masked.start(prepare_clip(clip, self.masked))
        state = self.masked.run(state, 0, boundaries[0])
        for j, (start, stop) in enumerate(zip(boundaries, boundaries[1:])):
            for cross_attentions, context in zip(self.bridges, contexts):  # per multimodal encoder
                state = replace(state, tokens=cross_attentions[j](state.tokens, context[j]))
            state = self.masked.run(state, start, stop)
        return state

    def encode(self, clip):
        """uint8 (B, T, H, W, 3) -> [last State of the masked encoder, of each multimodal one]"""
        states, contexts = zip(*(self.encode_multimodal(encoder, clip, layers)
                                 for encoder, layers in zip(self.multimodal, self.layers)))
        masked, states = self.encode_masked(clip, contexts), list(states)
        for i, cross_attention in enumerate(self.last):
            query = states[i].query                                          # (B, 1, Dm)
            if query is None:  # an encoder without global blocks: the mean of its class tokens
                query = states[i].tokens[:, :, 0].mean(dim=1, keepdim=True)  # (B, 1, Dm)
            states[i] = replace(states[i], query=cross_attention(query, masked.tokens))
        return [masked, *states]

    def scores(self, clip):
        """uint8 (B, T, H, W, 3) -> [logits (B, Y) of the masked encoder, of each multimodal one]"""
        return [encoder.head(self.drop(encoder.finish(state)))
                for encoder, state in zip((self.masked, *self.multimodal), self.encode(clip))]

    def score_weights(self):
        """Weights of the scores: a softmax, (1 + multimodal encoders,), equal at the start."""
        # A softmax depends on differences only, so the masked encoder's number is fixed at 0.
        return torch.cat([self.balance.new_zeros(1), self.balance]).softmax(dim=0)

    def combine(self, scores):
        """The weighted sum of the scores: a list of (B, Y) -> (B, Y)."""
        return sum(weight * score for weight, score in zip(self.score_weights(), scores))

    def forward(self, clip):
        """uint8 (B, T, H, W, 3) -> logits (B, Y)"""
        return self.combine(self.scores(clip))

    def features(self, clip):
        """Features for other tasks, a dict with three keys.

        "clip"         (B, D + Dm + ...), the inputs of all heads, concatenated
        "masked"       (B, N, D), tokens of the masked encoder, with cross-model attention
        "multimodal"   for each encoder, tokens (B, t, 1+S, Dm), independent of the masked encoder
        """
        masked, *others = states = self.encode(clip)
        encoders = (self.masked, *self.multimodal)
        features = [encoder.finish(state) for encoder, state in zip(encoders, states)]
        return {"clip": torch.cat(features, dim=1), "masked": masked.tokens,
                "multimodal": [state.tokens for state in others]}

    @torch.no_grad()
    def attention_maps(self, clip, index=-1, encoder=0):
        """Attention weights of the masked encoder's tokens over multimodal tokens: mean over heads.

        index, encoder   int, positions in the lists `before` and `multimodal`
        returns          (B, N, t, 1+S), or (B, N, t, S) for source="patches"; the weights of each
                         of the N tokens sum to 1
        """
        layer, inputs = self.bridges[encoder][index], []
        # The hook keeps x and context, the inputs of this layer in `encode`.
        hook = layer.register_forward_pre_hook(lambda _, args: inputs.extend(args))
        try:
            self.encode(clip)
        finally:
            hook.remove()
        model = self.multimodal[encoder]
        t, _, _ = model.grid_of(model.config["frames"], *model.config["image_size"])
        return layer.attention_maps(*inputs).unflatten(2, (t, -1))

    @torch.no_grad()
    def with_head(self, classes, *, rows=None):
        """A copy for Y classes. rows: for each class its row in the old heads, or None for a new
        row."""
        masked, *others = (encoder.with_head(classes, rows=rows)
                           for encoder in (self.masked, *self.multimodal))
        new = type(self)(masked, others, **asdict(self.options))
        for name in ("bridges", "last"):
            getattr(new, name).load_state_dict(getattr(self, name).state_dict())
        new.balance.copy_(self.balance)
        return new

    def recompute(self, on=True):
        """Recompute activations in the backward pass: see attention.run_blocks."""
        # Frozen multimodal encoders store none in their frame blocks: these get no gradient.
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
        """Load the model of a run of `train.py fuse`, with its encoders, in eval mode. WeightsError
        if the folder holds no such run."""
        return weights.load_run(cls.from_config, folder, "InternVideo", "fuse")


def evenly_spaced_blocks(count, depth):
    """Numbers of `count` evenly spaced blocks out of `depth`, with the last block among them.

    >>> evenly_spaced_blocks(4, 32), evenly_spaced_blocks(4, 12), evenly_spaced_blocks(2, 3)
    ([7, 15, 23, 31], [2, 5, 8, 11], [1, 2])
    """
    return sorted({round((i + 1) * depth / count) - 1 for i in range(count)})


def largest_image_size(encoders):
    """(H, W) in pixels: the largest height and the largest width that an encoder needs."""
    return tuple(map(max, zip(*(encoder.config["image_size"] for encoder in encoders))))


def prepare_clip(clip, encoder):
    """Prepare a clip for an encoder: uint8 (B, T, H, W, 3) -> float32 (B, 3, frames, *image_size),
    normalised with the encoder's `mean` and `std`.

    The clip is cut into equal parts in time, and the middle frame of each part is used. Resizing is
    bilinear with antialiasing and does not keep the aspect ratio. ValueError if the dtype or shape
    is wrong, or if there are too few frames.
    """
    frames, size = encoder.config["frames"], tuple(encoder.config["image_size"])
    if clip.dtype != torch.uint8 or clip.ndim != 5 or clip.shape[-1] != 3:
        raise ValueError(f"a clip is uint8 (B, T, H, W, 3), not {str(clip.dtype)[6:]} "
                         f"{tuple(clip.shape)}; `prepare_clip` normalises the pixels")
    B, T, H, W, _ = clip.shape
    if T < frames:
        raise ValueError(f"a clip of {T} frames for an encoder of {frames}: sample more frames")
    if T != frames:
        clip = clip[:, ((torch.arange(frames, device=clip.device) + 0.5) * T / frames).long()]
    if (H, W) != size:
        frames_first = clip.flatten(0, 1).permute(0, 3, 1, 2).float()        # (B*frames, 3, H, W)
        resized = F.interpolate(frames_first, size, mode="bilinear", antialias=True)
        clip = resized.permute(0, 2, 3, 1).unflatten(0, (B, frames))         # (B, frames, *size, 3)
    return normalise(clip, encoder.mean, encoder.std)


@torch.no_grad()
def main():
    """`python fusion.py` prints the shapes for one generated clip and two untrained encoders."""
    from mae import VideoClassifier
    from uniformerv2 import UniFormerV2
    from video.moving_shapes import MovingShapes

    model = InternVideo(VideoClassifier("tiny", classes=16, frames=8, image_size=64),
                        UniFormerV2("tiny", classes=16, frames=8)).eval()
    clip = torch.as_tensor(MovingShapes("test", 8, (64, 64), 0)[0]["video"])[None]
    masked, multimodal = model.encode(clip)
    rows = [("clip", "(B, T, H, W, 3)", clip),
            ("input of the masked encoder", "(B, C, T, H, W)", prepare_clip(clip, model.masked))]
    for index, (block, layer) in enumerate(zip(model.before, model.layers[0])):
        rows.append((f"attention: masked block {block}, multimodal block {layer}",
                     "(B, N, t, 1+S)", model.attention_maps(clip, index)))
    rows += [("masked tokens after the last block", "(B, N, D)", masked.tokens),
             ("global token after cross-model attention", "(B, 1, Dm)", multimodal.query),
             ("logits", "(B, Y)", model(clip))]
    for name, shape, tensor in rows:
        print(f"{name:45s} {shape:16s} {tuple(tensor.shape)}")


if __name__ == "__main__":
    main()
