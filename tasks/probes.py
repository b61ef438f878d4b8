"""Probes: small classifiers on the features of a frozen encoder.

    clip -> frozen encoder -> features --+--> linear layer on the mean token      (linear probe)
                                         +--> one query attends to all tokens     (attentive probe)

The linear probe is the encoder's own head. The features are computed once; training then draws
batches of stored features at random.
"""

import torch
from tqdm import tqdm

import weights
from attention import Attention
from engine import processes
from engine.checkpoints import recipe_of
from engine.stage import generator
from tasks import recognition
from video import transforms
from weights import encoders, heads


class AttentiveProbe(torch.nn.Module):
    """One learned query attends to a frozen encoder's tokens; a linear layer predicts the class.

    The attentive probe of V-JEPA (arXiv 2404.08471, Sec. 3.2). It suits encoders whose mean token
    was not trained to represent the clip.

    encoder  a masked or a multimodal encoder; its own head is not used
    classes  Y
    heads    attention heads
    """

    def __init__(self, encoder, classes, heads):
        super().__init__()
        self.encoder, self.mean, self.std = encoder, encoder.mean, encoder.std
        self.family, self.width, self.depth = encoder.family, encoder.width, encoder.depth
        self.heads = heads
        self.config = encoder.config | {"model": "AttentiveProbe", "encoder": encoder.config,
                                        "classes": classes, "heads": heads}
        self.query = torch.nn.Parameter(torch.randn(1, 1, encoder.width) * encoder.width**-0.5)
        self.norm = torch.nn.LayerNorm(encoder.width)
        self.attn = Attention(encoder.width, heads, context_width=encoder.width)
        self.head = torch.nn.Linear(encoder.width, classes)

    @classmethod
    def from_config(cls, config):
        """Build from the configuration that a run saved (config.json)."""
        return cls(encoders.from_config(config["encoder"]), config["classes"], config["heads"])

    @classmethod
    def from_run(cls, folder):
        """Load a run of `classify --mode attentive`, in eval mode. Raises WeightsError."""
        return weights.load_run(cls.from_config, folder, "AttentiveProbe",
                                "classify --mode attentive")

    @torch.no_grad()
    def with_head(self, classes, *, rows=None):
        """A copy with a head for Y classes. rows: the row of each class in this head, None = a new
        row."""
        new = type(self)(self.encoder, classes, self.heads)
        new.query.copy_(self.query)
        for part in ("norm", "attn"):
            getattr(new, part).load_state_dict(getattr(self, part).state_dict())
        heads.copy_rows(new.head, self.head, rows or range(classes))
        return new

    # The interface of an encoder (mae.VideoClassifier), for fusion.py

    def grid_of(self, T, H, W):
        """Token grid (t, h, w) of a clip of T frames of H x W pixels; ValueError if it has none."""
        return self.encoder.grid_of(T, H, W)

    def start(self, video):
        """video (B, C, T, H, W), normalised -> the encoder's State before block 0."""
        return self.encoder.start(video)

    def run(self, state, start, stop):
        """The state after blocks start..stop-1."""
        return self.encoder.run(state, start, stop)

    def finish(self, state):
        """The state of a masked encoder after its last block -> what the head sees, (B, D)."""
        return self.attend(state.tokens)

    def tokens(self, video):
        """video (B, C, T, H, W) -> all tokens of the encoder's last block, (B, N, D)."""
        return self.encoder.tokens(video)

    def feature(self, video):
        """video (B, C, T, H, W) -> what the head sees, (B, D)."""
        return self.attend(self.encoder.tokens(video))

    def recompute(self, on=True):
        """Save memory, spend time: see attention.run_blocks."""
        self.encoder.recompute(on)

    def trainable_modules(self):
        """The modules and parameters that train while the encoder is frozen."""
        return [self.query, self.norm, self.attn, self.head]

    def to_official(self):
        """ValueError: the official code has no such head."""
        raise ValueError("official names have no attentive probe; give a run of its encoder")

    # The probe

    def attend(self, tokens):
        """tokens (B, N, D) -> what the query reads from them, (B, D)"""
        query = self.query.expand(tokens.shape[0], -1, -1)  # len() would fix B in an export
        return self.attn(query, keys_from=self.norm(tokens))[:, 0]

    def classify(self, tokens):
        """tokens (B, N, D) -> logits (B, Y)"""
        return self.head(self.attend(tokens))

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)"""
        return self.classify(self.encoder.tokens(video))


def probe_of(model):
    """The trainable part of a probed model, as a function from features to logits."""
    return model.classify if isinstance(model, AttentiveProbe) else model.head


def freeze_all_but_the_probe(model):
    """Let only the probe train. Returns the model."""
    model.requires_grad_(False)
    for part in model.trainable_modules() if isinstance(model, AttentiveProbe) else [model.head]:
        part.requires_grad_(True)
    return model


def features_of(model, video, autocast):
    """Input of the probe: video (B, T, H, W, 3) uint8 -> (B, D); for an attentive probe (B, N, D).
    """
    video = transforms.normalise(video, model.mean, model.std)
    with autocast(), torch.no_grad():
        encode = model.encoder.tokens if isinstance(model, AttentiveProbe) else model.feature
        return encode(video).float()


def stored_features(stage, model, train_set):
    """(features bfloat16, targets) of the training clips, computed once; see Stage.cached."""
    settings = recipe_of(stage) | {"weights": stage.weights, "precision": stage.precision}

    def compute():
        stored = compute_features(stage, model, train_set)
        if stage.standardise:
            stored = standardised(stored, model.trainable_modules()[0])
        return stored | {"features": stored["features"].to(torch.bfloat16)}

    stored = stage.cached(settings, compute)
    if stage.standardise:
        model.trainable_modules()[0].load_state_dict(stored["norm"])
    return stored["features"], stored["targets"]


def standardised(stored, norm):
    """Give every feature mean 0 and variance 1 over the training clips.

    MAE's linear probe does this with a BatchNorm without learned factors (arXiv 2111.06377,
    Appendix A.1, "Linear probing"). Here the statistics are those of all clips, not of batches.

    stored   {"features", "targets"}
    norm     the encoder's last LayerNorm, whose outputs the features are
    returns  the same dict with standardised features, and "norm": weight and bias with which `norm`
             itself returns standardised features
    """
    features, bias = stored["features"], norm.bias.detach().cpu()
    mean, deviation = features.mean(dim=0), (features.var(dim=0, correction=0) + 1e-6).sqrt()
    return stored | {"features": (features - mean) / deviation,
                     "norm": {"weight": norm.weight.detach().cpu() / deviation,
                              "bias": (bias - mean) / deviation}}


def compute_features(stage, model, train_set):
    """{"features": float32, "targets"} of --probe-clips training clips."""
    finite = hasattr(train_set, "__len__")
    count = stage.probe_clips or (len(train_set) if finite else 2000)
    count = min(count, len(train_set)) if finite else min(count, stage.train_clips or count)
    rows = []
    for batch in tqdm(stage.held_out(train_set, count, stage.eval_batch), desc="features",
                      unit="batch", total=-(-count // stage.eval_batch // processes.world()),
                      disable=processes.rank() > 0 or None):
        features = features_of(model.eval(), batch["video"], stage.autocast)
        rows.append((batch["number"], features.cpu(), stage.target(batch).cpu()))
    _, features, targets = zip(*processes.gather_rows(rows))
    return {"features": torch.cat(features), "targets": torch.cat(targets)}


def feature_batches(stage, stored, first):
    """Yield random batches of stored features and their targets, a function of (seed, step)."""
    features, targets = stored
    answers = recognition.answers_in(targets, stage.classes, stage.several)
    balanced = stage.balance == "sampler"
    shares = recognition.clip_weights(answers, stage.classes) if balanced else None
    for step in range(first * stage.accum, stage.steps * stage.accum):
        rows, mine = processes.global_rows(stage.batch_size)
        rng = generator(stage.seed, "probe", step)
        chosen = torch.randint(len(features), (rows,), generator=rng) if shares is None else \
            torch.multinomial(shares, rows, replacement=True, generator=rng)
        chosen = chosen[mine]
        yield {"features": features[chosen].float(), "target": targets[chosen]}
