"""Two frozen experts and a bridge: cross-model attention, and a learned sum of two scores.

    the same clip --+--> masked encoder (VideoMAE) -----[bridge]--- blocks ---[bridge]--- blocks --+--> mean -> score A
                    |                                       ^                     ^                |
                    |                                 keys, values           keys, values          |
                    |                                       |                     |                v
                    +--> multimodal encoder (UniFormerV2) --+---------------------+--> global token asks -> score M

                    logits = (1 - u) * score A + u * score M,  u learned

Why: masked modelling learns how things move, language what they are. InternVideo keeps both encoders
as they are and lets them talk: tokens of the masked encoder ask the multimodal one at every stage, and
at the end the multimodal encoder's global token asks the masked one (InternVideo, Sec. 3.2, Cross-Model
Interaction; the paper's "class token" and "query token", the one learned vector of uniformerv2.py that has read
the clip; in a tower without global blocks, the mean class token). At several depths, because what an early block could use, edges and parts, the last layers no
longer hold. It scored 91.1 % on Kinetics-400; how much of that plain averaging would have given the paper
does not say. `train.py fuse` measures it.

The idea, in steps:
1. `CrossModelAttention` is the bridge: attention to the other model's tokens, then an MLP, each behind
   a gate tanh(g) that starts at 0. At the start nothing passes and every stream is what it was, bit
   for bit. Of tanh(g) * y the derivative by y is then tanh(0) = 0, by g it is y, which is not zero: of the bridge only
   the gates have a gradient, and once they open, the rest learns.
2. `InternVideo` places bridges before chosen blocks of the masked encoder; each reads the multimodal
   encoder after a chosen layer. The last bridge goes the other way, with the global token as its query.
3. Both heads give scores. Their shares are a softmax of learned numbers that start equal: at the start
   the whole is exactly the equal average of two working models' logits (which `late_fusion`, below, is not:
   it averages probabilities). An expert whose classes are others than the data's gets a fresh head first.
4. `InternVideo.freeze`: trained are bridges, gates, shares, the classification layers with their norms, and
   the global token's first value (the paper's query token). UniFormerV2's balance of its two tokens stays as it is;
   all else, too, is frozen and stays in eval mode (BatchNorm, dropout). It runs without
   gradients where nothing trained comes before it: the frames of the multimodal encoder, and the masked
   encoder up to the first bridge. Gradients do pass through frozen weights after that: through the masked
   blocks above the first bridge, and through the global blocks that the global token climbs. The later
   the first bridge, the cheaper a step.
5. `late_fusion` (of probabilities, as published) and `best_weight` are the baselines that every bridge must
   beat; the strictest is `train.py fuse --no-bridges`, which trains heads and shares on their sum, bridges
   alone left out.

Nothing of this was released: no code, no weights, no list of layers. The paper's sentences and figure
give steps 1 to 4; what they leave open is an argument here, with a default that we inferred:
where the bridges stand (paper: "all stages"; ours: four, evenly, the last before the last block; before each
of fewer blocks), which multimodal layers they read (as far up as the block that follows the bridge), which
tokens give keys (all, with the class tokens), heads (the masked encoder's), gates (one number each), how
scores combine (convex, of logits); flags change all but the form of gates and sum. With two multimodal encoders, a VideoMAE-H
with two UniFormerV2-L, it is InternVideo-T, the paper's model for 91.1 %: two bridges at each place, three scores.

Numbers: for VideoMAE-H and UniFormerV2-L a bridge has 19.0 M parameters and the last one 13.1 M; with
heads 90.2 M train, beside 985 M frozen. InternVideo-T: 179.8 M beside 1339 M. A training step takes about
half the time and memory of one with gradients for everything; with bridges in the last quarter alone a
third to a half of the time and a quarter of the memory (tools/bench.py fuse). All of that comes from
freezing: autograd keeps nothing for weights and inputs that need no gradient; writing `no_grad` there
as well saves nothing measurable, it only tells the reader where nothing is learned.

Try it: python fusion.py; python fusion.py VIDEO --weights runs/default/fuse

>>> masked = VideoClassifier("tiny", classes=5, frames=8, image_size=64)
>>> multimodal = UniFormerV2("tiny", classes=5, frames=8)
>>> model = InternVideo(masked, multimodal).eval()
>>> clip = torch.randint(256, (2, 8, 64, 64, 3), dtype=torch.uint8)
>>> model(clip).shape, [tuple(score.shape) for score in model.scores(clip)]
(torch.Size([2, 5]), [(2, 5), (2, 5)])
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

import weights
from attention import Attention, Dropout, Mlp, attention_weights, run_blocks
from mae import VideoClassifier
from uniformerv2 import UniFormerV2
from weights import WeightsError


class CrossModelAttention(nn.Module):
    """The bridge: tokens of one model ask tokens of another (InternVideo, Sec. 3.2, Cross-Model Interaction).

        x = x + tanh(gate_attn) * attention(norm x; norm_context y)
        x = x + tanh(gate_mlp) * mlp(norm_mlp x)

    width, context_width   D of the asking tokens, D of those that are asked
    heads                  of the attention, in the asking model's width
    gates                  True: both start at 0 and nothing passes; False: no gates, for comparison

    Ours: pre-norm, exact GELU, an MLP four times as wide, one number per gate.
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
        x = x + self.gated(self.gate_attn, self.attn(self.norm(x), keys_from=self.norm_context(context)))
        return x + self.gated(self.gate_mlp, self.mlp(self.norm_mlp(x)))

    @staticmethod
    def gated(gate, x):
        return x if gate is None else gate.tanh().to(x.dtype) * x

    @torch.no_grad()
    def looks(self, x, context):
        """Where each token looks: shares of attention, mean over heads, (B, N, M); rows sum to 1."""
        q, k, _ = self.attn.queries_keys_values(self.norm(x), self.norm_context(context))
        return attention_weights(q.float(), k.float()).mean(dim=1)


class InternVideo(nn.Module):
    """The whole: a masked encoder, one or two multimodal encoders, bridges, and one answer.

    masked       mae.VideoClassifier with a head for Y classes
    multimodal   uniformerv2.UniFormerV2 with a head for the same classes, or a list of two (InternVideo-T)
    before       numbers of the masked encoder's blocks, rising, before which a bridge stands;
                 None: four, evenly spread, the last before the last block (`evenly`)
    layers       for each of them, after which layer of the multimodal encoder it reads; None: the layer
                 that is as far up its model as the block that follows the bridge is in its own: for
                 block 7 of 32, layer 5 of 24, both counted from 0. With two encoders a list for each
    last         False: no bridge back, so that the multimodal encoder's global token asks nothing; and with before=[]
                 it alone asks. One direction at a time, for comparison
    heads        of the bridges; None: the masked encoder's. The last bridge has the multimodal encoder's.
    source       "all": keys and values from patch and class tokens; "patches": without class tokens
    gates        False: bridges without gates (the start is then no longer the experts' average)
    bridges      False: none at all, before=[] and last=False: only heads and the learned sum of scores
    drop         dropout before both heads, a probability (paper: 0.9)

    A clip is uint8 (B, T, H, W, 3), as it comes out of data.py. Each encoder sees it in its own way
    (`view`): as many frames as it was made for, its size, its normalisation.

    `frozen` names the parameters that never train (`freeze`). ValueError where the parts do not fit.
    """

    def __init__(self, masked, multimodal, *, before=None, layers=None, last=True, heads=None, source="all",
                 gates=True, bridges=True, drop=0.0):
        super().__init__()
        experts = list(multimodal) if isinstance(multimodal, (list, tuple)) else [multimodal]
        self.check(masked, experts, source)
        depth = masked.config["size"]["depth"]
        before = list(evenly(min(4, depth), depth) if before is None else before) if bridges else []
        last = last and bridges
        if before != sorted(set(before) & set(range(depth))):
            raise ValueError(f"before {before}: name blocks 0 to {depth - 1} of the masked encoder, rising")
        if layers is None:  # as many layers of the other model, in proportion, as blocks with the one that follows
            layers = [[max(0, round((place + 1) * expert.config["size"]["depth"] / depth) - 1) for place in before]
                      for expert in experts]
        elif len(experts) == 1 and not any(isinstance(layer, (list, tuple)) for layer in layers):
            layers = [layers]
        if len(layers) != len(experts) or not all(isinstance(chosen, (list, tuple)) for chosen in layers):
            raise ValueError(f"layers {layers}: give a list for each of the {len(experts)} multimodal encoders")
        for expert, chosen in zip(experts, layers):
            if len(chosen) != len(before) or not set(chosen) <= set(range(expert.config["size"]["depth"])):
                raise ValueError(f"layers {list(chosen)}: name {len(before)} layers, one for each bridge, from 0 to "
                                 f"{expert.config['size']['depth'] - 1} of the multimodal encoder")
        self.config = {"model": "InternVideo", "masked": masked.config,
                       "multimodal": [expert.config for expert in experts], "before": before,
                       "layers": [list(chosen) for chosen in layers], "last": last, "heads": heads,
                       "source": source, "gates": gates, "bridges": bridges, "drop": drop}
        self.before, self.layers, self.source = before, self.config["layers"], source
        self.masked, self.multimodal = masked, nn.ModuleList(experts)
        width, own_heads = (masked.config["size"][key] for key in ("width", "heads"))
        widths = [(expert.config["size"]["width"], expert.config["size"]["heads"]) for expert in experts]
        self.bridges = nn.ModuleList(
            nn.ModuleList(CrossModelAttention(width, other, heads or own_heads, gates) for _ in before)
            for other, _ in widths)
        self.last = nn.ModuleList(CrossModelAttention(other, width, other_heads, gates)
                                  for other, other_heads in widths if last)
        self.balance = nn.Parameter(torch.zeros(len(experts)))  # of the multimodal scores, against 0 for A
        self.drop = Dropout(drop)
        self.freeze()
        self.train(False)

    @staticmethod
    def check(masked, experts, source):
        """ValueError where these cannot work together."""
        for model, kind in ((masked, VideoClassifier), *((expert, UniFormerV2) for expert in experts)):
            if not isinstance(model, kind):
                raise ValueError(f"the {'masked' if kind is VideoClassifier else 'multimodal'} encoder is a "
                                 f"{type(model).__name__}: give a {kind.__name__}")
            if model.config["channels"] != 3:
                raise ValueError(f"a {kind.__name__} for {model.config['channels']} colour channels: clips have 3")
        if not 1 <= len(experts) <= 2:
            raise ValueError(f"{len(experts)} multimodal encoders: give one, or two (InternVideo-T)")
        classes = [model.config["classes"] for model in (masked, *experts)]
        if len(set(classes)) > 1 or not classes[0]:
            raise ValueError(f"the encoders' heads name {', '.join(map(str, classes))} classes: all need the same, "
                             "at least one; see their with_head")
        if source not in ("all", "patches"):
            raise ValueError(f"source is {source!r}: choose all or patches")

    def freeze(self):
        """Let only `learned` train; done at the start. `self.frozen` then names the other parameters."""
        self.requires_grad_(False)
        for part in self.learned():
            part.requires_grad_(True)
        self.frozen = {name for name, p in self.named_parameters() if not p.requires_grad}

    def learned(self):
        """The modules and parameters that train (InternVideo, Sec. 3.2: bridges, gates, shares,
        classification layers, and the multimodal encoder's query token). Of the masked encoder's two norms
        one is the classifier's, the other an Identity: see `pool` of mae.VideoClassifier."""
        yield from (self.bridges, self.last, self.balance, self.masked.encoder.norm, self.masked.fc_norm,
                    self.masked.head)
        for expert in self.multimodal:
            yield from (expert.norm, expert.head)
            if expert.global_token is not None:
                yield expert.global_token

    def quietly(self):
        """No gradients for what is frozen, unless somebody has thawed it (`requires_grad_`), to compare."""
        thawed = any(p.requires_grad for name, p in self.named_parameters() if name in self.frozen)
        return contextlib.nullcontext() if thawed else torch.no_grad()

    def train(self, mode=True):
        """The experts stay in eval mode: no dropout of theirs, no new batch statistics, whatever is trained."""
        super().train(mode)
        for expert in (self.masked, *self.multimodal):
            expert.eval()
        return self

    # The forward pass, piece by piece

    def scores(self, clip):
        """uint8 (B, T, H, W, 3) -> [logits (B, Y) of the masked encoder, then of each multimodal one], after
        they have talked."""
        masked, features, _ = self.streams(clip)
        found = [self.masked.head(self.drop(self.masked.pooled(masked)))]
        return found + [expert.head(self.drop(expert.norm(feature)))
                        for expert, feature in zip(self.multimodal, features)]

    def shares(self):
        """The share of each score, (1 + experts,): positive, sum 1; equal at the start."""
        return torch.cat([self.balance.new_zeros(1), self.balance]).softmax(dim=0)

    def combine(self, scores):
        """The learned convex combination: list of (B, Y) -> (B, Y)."""
        return sum(weight * score for weight, score in zip(self.shares(), scores))

    def forward(self, clip):
        """uint8 (B, T, H, W, 3) -> logits (B, Y)"""
        return self.combine(self.scores(clip))

    def features(self, clip):
        """For other work, as localisation or retrieval: {"clip": (B, Da + Dm + ...), what the heads see, side by
        side; "masked": tokens (B, N, Da), t*h*w of them, after the bridges; "multimodal": for each encoder its
        last tokens (B, t, 1+S, Dm), class token of each frame first, which no bridge touches}."""
        masked, features, tokens = self.streams(clip)
        seen = [self.masked.pooled(masked)]
        seen += [expert.norm(feature) for expert, feature in zip(self.multimodal, features)]
        return {"clip": torch.cat(seen, dim=1), "masked": masked, "multimodal": tokens}

    def streams(self, clip):
        """Tokens of the masked encoder (B, N, Da); of each multimodal one the feature (B, Dm) that its
        norm sees, and its last tokens (B, t, 1+S, Dm)."""
        read = [self.watch(expert, clip, chosen) for expert, chosen in zip(self.multimodal, self.layers)]
        x = self.cross(clip, [told for _, _, told in read])
        features = []
        for i, (expert, (token, tokens, _)) in enumerate(zip(self.multimodal, read)):
            if len(self.last):
                asks = tokens[:, :, 0].mean(dim=1, keepdim=True) if token is None else token
                told = self.last[i](asks, x)
                if token is None:  # a plain image tower: its class token, the mean over frames, is all there is
                    features.append(told[:, 0])
                    continue
                token = told
            features.append(expert.combine(token, tokens))
        return x, features, [tokens for _, tokens, _ in read]

    def watch(self, expert, clip, chosen):
        """A multimodal encoder: its global token (B, 1, D) or None, the last tokens (B, t, 1+S, D), and what it
        has to say at the chosen layers. Its frames depend on nothing that trains; its global blocks do."""
        final = len(expert.blocks) - 1
        wanted = {*chosen, *expert.readers(), final}  # the other layers' tokens need not be kept
        with self.quietly():
            outputs = {i: x for i, x in enumerate(expert.layers(view(clip, expert))) if i in wanted}
        told = [(outputs[layer] if self.source == "all" else outputs[layer][:, :, 1:]).flatten(1, 2)
                for layer in chosen]
        return expert.read(outputs), outputs[final], told

    def cross(self, clip, told, until=None):
        """The masked encoder with its bridges, -> (B, N, D). told: for each expert, for each bridge, tokens
        (B, M, Dm). Up to the first bridge nothing trains. until: a bridge, (place, expert); stop before it."""
        encoder, edges = self.masked.encoder, [*self.before, len(self.masked.encoder.blocks)]
        with self.quietly():
            x = run_blocks(encoder.blocks[:edges[0]], encoder.begin(view(clip, self.masked)))
        for place, (start, stop) in enumerate(zip(edges, edges[1:])):
            for expert, (bridges, words) in enumerate(zip(self.bridges, told)):
                if (place, expert) == until:
                    return x
                x = bridges[place](x, words[place])
            x = run_blocks(encoder.blocks[start:stop], x, recompute=encoder.recompute)
        return encoder.norm(x)

    @torch.no_grad()
    def looks(self, clip, place=-1, expert=0):
        """Where the masked encoder's tokens look in the other model, at one bridge: (B, N, t, 1+S or S), mean over
        heads, rows sum to 1. place: which bridge, as a list counts; expert: which multimodal encoder."""
        place = range(len(self.before))[place]
        told = [self.watch(other, clip, chosen)[2] for other, chosen in zip(self.multimodal, self.layers)]
        x = self.cross(clip, told, until=(place, expert))
        found = self.bridges[expert][place].looks(x, told[expert][place])
        per_frame = math.prod(self.multimodal[expert].grid) + (self.source == "all")
        return found.unflatten(2, (-1, per_frame))

    def recompute(self, on=True):
        """Save memory, spend time, in the blocks behind the first bridge: see attention.run_blocks. All other
        frozen blocks keep nothing as it is."""
        self.masked.recompute(on)

    # Loading

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        masked = VideoClassifier.from_config(config["masked"])
        experts = [UniFormerV2.from_config(part) for part in config["multimodal"]]
        return cls(masked, experts, **{key: value for key, value in config.items()
                                       if key not in ("model", "masked", "multimodal")})

    @classmethod
    def from_run(cls, folder):
        """Load a run of the fuse stage, experts included, in eval mode. WeightsError where it is none."""
        tensors, config = weights.read(folder)
        if config.get("model") != "InternVideo":
            raise WeightsError(f"{folder}: holds a {config.get('model', 'file without a configuration')}, not an "
                               "InternVideo; give the folder of a fuse run")
        return weights.fill(weights.build(cls.from_config, config, folder), tensors, name=str(folder)).eval()


def evenly(count, depth):
    """`count` places among `depth` blocks, evenly, the last one before the last block.

    >>> evenly(4, 32), evenly(4, 12), evenly(2, 3)
    ([7, 15, 23, 31], [2, 5, 8, 11], [1, 2])
    """
    return sorted({round((i + 1) * depth / count) - 1 for i in range(count)})


def view(clip, encoder):
    """What one encoder sees of a clip: as many frames as it was made for, the middle ones of as many equal parts,
    its size (bilinear, antialiased; another shape of frame is squeezed) and its normalisation.

    clip     uint8 (B, T, H, W, 3)
    encoder  with .config of "frames" and "image_size", .mean and .std
    returns  float32 (B, 3, frames, *image_size)
    raises   ValueError: not such a clip, or fewer frames than it needs
    """
    frames, size = encoder.config["frames"], tuple(encoder.config["image_size"])
    if clip.dtype != torch.uint8 or clip.ndim != 5 or clip.shape[-1] != 3:
        raise ValueError(f"a clip is uint8 (B, T, H, W, 3), not {str(clip.dtype)[6:]} {tuple(clip.shape)}; each "
                         "encoder normalises it for itself")
    B, T, H, W, _ = clip.shape
    if T < frames:
        raise ValueError(f"a clip of {T} frames for an encoder of {frames}: sample more frames")
    if T != frames:
        clip = clip[:, ((torch.arange(frames, device=clip.device) + 0.5) * T / frames).long()]
    video = clip.permute(0, 1, 4, 2, 3).float()                              # (B, t, 3, H, W)
    if (H, W) != size:
        video = F.interpolate(video.flatten(0, 1), size, mode="bilinear", antialias=True).unflatten(0, (B, frames))
    mean, std = (torch.tensor(x, device=clip.device).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    return ((video / 255 - mean) / std).transpose(1, 2)


# ------------------------------------------------------------------------------------------------
# The baseline: late fusion


def late_fusion(scores, shares=None):
    """Average the probabilities of several models that never met.

    scores   a list of logits, each (B, Y), or (B, V, Y) with V views of each video: those of one model are
             averaged first, so that a model does not count more for having more views (the official script
             averages all views of all models at once)
    shares   one number per model, sum 1; None: equal
    returns  probabilities (B, Y)
    raises   ValueError: models that disagree about B or Y, or another number of shares
    """
    shares = [1 / max(1, len(scores))] * len(scores) if shares is None else shares
    if len(shares) != len(scores) or len({(len(score), score.shape[-1]) for score in scores}) != 1:
        raise ValueError(f"{len(shares)} shares for scores of {', '.join(str(tuple(score.shape)) for score in scores)}: "
                         "one for each model, and all models score the same videos and classes")
    chances = [score.softmax(dim=-1) for score in scores]
    return sum(share * (chance.mean(dim=1) if chance.ndim == 3 else chance) for share, chance in zip(shares, chances))


def best_weight(quality, steps=100):
    """The share w of the second model, among 0, 1/steps, ..., 1, for which quality(w) is highest on validation
    data; of several, the one nearest to a half.

    >>> best_weight(lambda w: -(w - 0.3)**2)
    0.3
    """
    return max((i / steps for i in range(steps + 1)), key=lambda w: (quality(w), -abs(w - 0.5)))


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    """`python fusion.py [VIDEO --weights RUN]`: what the experts say, and what they say together."""
    import argparse
    import json
    import sys
    from pathlib import Path

    import data
    from video import moving_shapes
    from engine import pictures

    parser = argparse.ArgumentParser(description="Two experts and a bridge: their answers to one clip.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip")
    parser.add_argument("--weights", help="folder of a fuse run; default: untrained, to see the shapes")
    parser.add_argument("--top", type=int, default=3, help="answers to print per question")
    parser.add_argument("--seed", type=int, default=0, help="which generated clip")
    parser.add_argument("--out", default="runs/fusion.png", help="where the masked encoder looks; PNG")
    args = parser.parse_args(argv)
    try:
        if args.top < 1:
            raise ValueError(f"--top {args.top}: must be at least 1")
        torch.manual_seed(args.seed)
        questions = None
        if args.weights:
            model = InternVideo.from_run(args.weights)
            found = Path(args.weights) / "questions.json"
            questions = json.loads(found.read_text()) if found.exists() else None
        else:
            model = InternVideo(VideoClassifier("tiny", classes=16, frames=8, image_size=64),
                                UniFormerV2("tiny", classes=16, frames=8)).eval()
        T = max(part.config["frames"] for part in (model.masked, *model.multimodal))
        H, W = (max(sides) for sides in zip(*(part.config["image_size"] for part in (model.masked, *model.multimodal))))
        if args.video:
            clip = data.one_clip(args.video, T, (H, W))
        else:
            item = moving_shapes.MovingShapes("test", T, (H, W), args.seed)[args.seed]
            clip = item["video"]
            print(f"a generated clip: {item['caption']}")
        explain(model, torch.as_tensor(clip)[None], questions, args.top)
        if model.before:
            path = Path(args.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures.looks(clip, *places(model, torch.as_tensor(clip)[None]), path)
            print(f"drawn: {path}")
    except (WeightsError, data.DataError, ValueError, OSError) as error:
        print(f"fusion.py: {error}", file=sys.stderr)
        return 2
    return 0


def places(model, clip, count=4):
    """For a picture: at the last bridge, the `count` tokens of the masked encoder whose looks are least even.

    clip     uint8 (1, T, H, W, 3)
    returns  [(token's time step, row, column), ...], its grid (t, h, w), and looks (count, t, h, w) over the
             multimodal encoder's patches, each row's sum at most 1 (class tokens take the rest)
    """
    looks = model.looks(clip)[0]                                             # (N, t, 1+S or S)
    if model.source == "all":
        looks = looks[:, :, 1:]
    looks = looks.unflatten(2, model.multimodal[0].grid)
    T, (H, W) = model.masked.config["frames"], model.masked.config["image_size"]
    grid = model.masked.encoder.grid_of(T, H, W)
    chosen = looks.flatten(1).amax(dim=1).argsort(descending=True)[:count].tolist()
    where = [(n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]) for n in chosen]
    return where, grid, looks[chosen]


@torch.no_grad()
def explain(model, clip, questions=None, top=3):
    """Print what happens to a clip uint8 (1, T, H, W, 3), and the best answers of experts and bridge.

    questions  {question: [names of its answers]}, side by side in the logits; None: numbers
    """
    rows = [("the clip", "(B, T, H, W, 3)", clip.shape),
            ("the masked encoder sees", "(B, C, T, H, W)", view(clip, model.masked).shape)]
    for expert in model.multimodal:
        rows.append(("a multimodal encoder sees", "(B, C, T, H, W)", view(clip, expert).shape))
    masked, features, tokens = model.streams(clip)
    for i, place in enumerate(model.before):
        rows.append((f"before block {place}: {masked.shape[1]} tokens ask layer "
                     + ", ".join(str(chosen[i]) for chosen in model.layers), "(B, N, D)", masked.shape))
    rows += [("its global token asks the masked tokens, then", "(B, D)", feature.shape) for feature in features]
    for name, letters, shape in rows:
        print(f"{name:45s} {letters:16s} {tuple(shape)}")
    for name, gate in model.named_parameters():
        if "gate_" in name:
            print(f"{name:45s} tanh = {float(gate.tanh()):+.3f}")
    scores = model.scores(clip)
    shares = model.shares().tolist()
    print("shares of the scores: " + ", ".join(f"{share:.2f}" for share in shares))
    print("what each says, having heard the other, and what they say together:")
    questions = questions or {"class": [str(i) for i in range(scores[0].shape[1])]}
    sizes = [len(names) for names in questions.values()]
    for who, score in zip(["masked", *(["multimodal"] * len(features)), "together"],
                          [*scores, model.combine(scores)]):
        for (question, names), part in zip(questions.items(), score[0].split(sizes)):
            best = part.softmax(dim=0).topk(min(top, len(names)))
            print(f"{who:11s} {question:8s} " + ", ".join(
                f"{names[i]} {share:.0%}" for share, i in zip(best.values.tolist(), best.indices.tolist())))


if __name__ == "__main__":
    raise SystemExit(main())
