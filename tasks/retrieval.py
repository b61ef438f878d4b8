"""Text-video retrieval in both directions, and multiple choice: metrics and a stage.

    texts (n, E), videos (m, E) -> similarity (n, m) -> ranks -> {"t2v_R@1": percent, ...}

1. `retrieval_metrics` measures how often the correct item is among the first 1, 5 or 10. Ties count
   against the model. In the official code they count in its favour, so a model that gives all pairs
   the same score reaches 100 %.
2. `choose` selects the sentence that fits a video (InternVideo, Sec. 4.4, multiple choice).
3. `evaluate` and `multiple_choice` measure both for a model on held-out batches.
4. `Retrieval` is the stage that fine-tunes a model for retrieval.

>>> metrics = retrieval_metrics(torch.eye(3))
>>> metrics["t2v_R@1"], metrics["v2t_MdR"]
(100.0, 1.0)
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import clip_video
from engine import large_batches, processes
from engine.errors import UserError
from engine.frame_size import LARGEST, frame_size, spelled
from engine.stage import TEST_CLIPS, flag
from tasks.sentences import SentenceStage
from video import transforms
from weights import encoders

# InternVideo's prompts for zero-shot classification; {} stands for the name of the action.
PROMPTS = (
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}",
)


def retrieval_metrics(similarity, owner=None, grouped=False):
    """Ranks of videos for each text (t2v) and of texts for each video (v2t), as metrics.

    similarity  (texts, videos): exp(logit_scale) * cosines. The factor changes only dual softmax
    owner       (texts,) int, the video that each text describes; default: text i, video i
    grouped     how v2t treats videos with several captions. False: rank the best own caption among
                the captions of all other videos. True: rank it among the best captions of the other
                videos (the protocol of InternVideo on MSVD). True gives lower ranks, the same R@1
    returns     {"t2v_R@1", "t2v_R@5", "t2v_R@10": percent; "t2v_MdR", "t2v_MnR": median and mean
                rank, from 1; the same for v2t; the same again with "dsl_" in front}. A rank is 1 +
                the number of others that are at least as similar

    dsl_: dual softmax (CAMoE, arXiv 2109.04290, Dual Softmax Loss). Each similarity is multiplied
    by its softmax over all queries of the test, S * softmax(S). It needs the whole test set, which
    a user does not have. It is therefore never reported without the raw numbers.
    """
    S = torch.as_tensor(similarity).detach().double().cpu()
    if S.ndim != 2 or not S.numel() or not S.isfinite().all():
        raise ValueError(f"similarity {tuple(S.shape)}: expected numbers (texts, videos)")
    texts, videos = S.shape
    owner = torch.arange(texts) if owner is None else torch.as_tensor(owner).cpu().long()
    if owner.shape != (texts,) or not torch.equal(owner.unique(), torch.arange(videos)):
        raise ValueError(f"owner {tuple(owner.shape)} must name a video for each of {texts} texts, "
                         f"and each of {videos} videos at least once")
    over_texts = S * S.softmax(dim=0)
    # With several texts per video the published protocol uses the softmax over texts for v2t, too.
    over_videos = over_texts if texts > videos else S * S.softmax(dim=1)
    metrics = {}
    for name, to_video, to_text in (("", S, S), ("dsl_", over_texts, over_videos)):
        t2v = (to_video >= to_video.gather(1, owner[:, None])).sum(dim=1)
        for task, rank in (("t2v", t2v), ("v2t", text_ranks(to_text, owner, grouped))):
            for k in (1, 5, 10):
                metrics[f"{name}{task}_R@{k}"] = 100 * (rank <= k).double().mean().item()
            metrics[f"{name}{task}_MdR"] = rank.double().quantile(0.5).item()
            metrics[f"{name}{task}_MnR"] = rank.double().mean().item()
    return metrics


def text_ranks(similarity, owner, grouped):
    """The rank of the best own text of each video: (texts, videos), (texts,) -> (videos,)."""
    videos = similarity.shape[1]
    own = owner[:, None] == torch.arange(videos)                             # (texts, videos) bool
    best = similarity.masked_fill(~own, -math.inf).amax(dim=0)
    others = similarity.masked_fill(own, -math.inf)
    if grouped:  # keep only the best text of each other video
        empty = torch.full((videos, videos), -math.inf, dtype=similarity.dtype)
        others = empty.scatter_reduce(0, owner[:, None].expand(-1, videos), others, "amax")
    return 1 + (others >= best).sum(dim=0)


def gallery_protocol(dataset, indices):
    """Describe a gallery for a stage's `protocol`: {name: text}.

    indices  indices of the videos of the data set that form the gallery
    """
    videos, captions = len(indices), dataset.count_captions(indices)
    return {"gallery": f"{videos} videos, {captions} captions; chance of R@1 is "
                       f"{100 / videos:.1f} %",
            "ranks": "raw and dual softmax (dsl); ties count against us; v2t among videos by their "
                     "best caption"}


@torch.no_grad()
def choose(model, video, options):
    """Multiple choice: choose the sentence with the largest cosine.

    model    clip_video.VideoCLIP
    video    (B, C, T, H, W), as for `VideoCLIP.encode_video`
    options  for each video the token numbers of its sentences, (n, L) int64
    returns  (B,) int64, the index of the chosen sentence; the first of equal ones
    """
    video_embeddings = F.normalize(model.encode_video(video).float(), dim=-1)
    return torch.stack([
        (F.normalize(model.encode_text(ids).float(), dim=-1) @ embedding).argmax()
        for embedding, ids in zip(video_embeddings, options)])


def caption_numbers(captions, device="cpu"):
    """A number for each caption, int64 (B,). Equal sentences get equal numbers in every process.

    `clip_video.contrastive_loss` does not use clips with equal numbers as negatives of each other.
    """
    hashes = [hashlib.blake2b(text.encode(), digest_size=7).digest() for text in captions]
    return torch.tensor([int.from_bytes(part, "big") for part in hashes], device=device)


def pair_loss(video, text, scale, batch, *, gather):
    """`clip_video.contrastive_loss` of a batch; block by block for more than BLOCKED_ABOVE pairs.

    Two pairs with the same caption or the same clip are not negatives of each other.

    video, text  embeddings (B, E)
    batch        with "caption", B sentences, and, if a clip may occur twice, "clip", B numbers
    gather       True: compare the pairs of all processes
    """
    pairs = len(video) * (processes.world() if gather else 1)
    targets = caption_numbers(batch["caption"], video.device)                # (B,)
    if "clip" in batch:
        targets = torch.stack([targets, torch.tensor(batch["clip"]).to(targets)], dim=1)  # (B, 2)
    return clip_video.contrastive_loss(
        video, text, scale, targets=targets, gather=gather,
        rows=256 if pairs > large_batches.BLOCKED_ABOVE else None)


# ------------------------------------------------------------------------------------------------
# Measuring a model


@torch.no_grad()
def evaluate(model, batches, bpe, *, gallery=None, context=None, autocast=contextlib.nullcontext,
             device="cpu"):
    """Retrieval metrics of a model on held-out batches.

    model    clip_video.VideoCLIP, in eval mode
    batches  dicts with "video" uint8 (B, T, H, W, 3), "captions" (all of each video) and "number"
    bpe      weights.tokenizer.Tokenizer
    gallery  use only this many videos, the first ones; None = all
    context  maximum tokens of a caption; None = the model's maximum
    returns  as `retrieval_metrics` with grouped=True
    """
    rows = []
    for batch in batches:
        video = transforms.normalise(batch["video"], model.mean, model.std)
        texts = [text for captions in batch["captions"] for text in captions]
        ids, _ = bpe.encode(texts, context or model.config["context"], trim=True)
        with autocast():
            video_features = model.encode_video(video)
            text_features = model.encode_text(ids.to(video.device))
        counts = [len(captions) for captions in batch["captions"]]
        rows.append((batch["number"], video_features, text_features, counts))
    _, video_features, text_features, counts = zip(*processes.gather_rows(rows, device))
    video_features, text_features = (F.normalize(torch.cat(part).float(), dim=-1)
                                     for part in (video_features, text_features))
    counts = torch.tensor(sum(counts, []))[:gallery]
    owner = torch.arange(len(counts)).repeat_interleave(counts)          # the video of each caption
    similarity = text_features[:len(owner)] @ video_features[:len(counts)].T
    return retrieval_metrics(model.logit_scale.exp() * similarity, owner, grouped=True)


@torch.no_grad()
def multiple_choice(model, batches, bpe, choices, *, context=None,
                    autocast=contextlib.nullcontext):
    """{"multiple_choice": percent of clips whose correct sentence is the most similar one}.

    choices  function of a batch -> [(sentences, index of the correct one), ...], one for each clip.
             [] if the data offer no choices; the result is then {}. See video.clip_set

    Other arguments as for `evaluate`.
    """
    rows = []
    for batch in batches:
        options = choices(batch)
        if not options:
            return {}
        video = transforms.normalise(batch["video"], model.mean, model.std)
        ids = [bpe.encode(list(sentences), context or model.config["context"], trim=True)[0]
               .to(video.device) for sentences, _ in options]
        with autocast():
            chosen = choose(model, video, ids).tolist()
        rows.append((batch["number"], [c == correct for c, (_, correct) in zip(chosen, options)]))
    hits = [hit for _, part in processes.gather_rows(rows) for hit in part]
    return {"multiple_choice": 100 * sum(hits) / len(hits)}


# ------------------------------------------------------------------------------------------------
# The stage


@dataclass
class Retrieval(SentenceStage, name="retrieve"):
    """Fine-tuned retrieval: the contrastive loss alone, from stage 2's weights (InternVideo, Sec.
    4.4).

    Generated clips show two acts in a row, unlike those of stage 2. The sentences name their order.
    """

    weights: str = flag("", "start from these weights: a run of clip, or an official file")
    steps: int = flag(600, paper="5 epochs; 30 on ActivityNet")
    lr: float = flag(2e-3, paper="2e-6 to 5e-6")
    warmup: float = flag(0.1, paper="0.1")
    weight_decay: float = flag(0.2, paper="0.2")
    beta2: float = flag(0.98, paper="0.98")
    context: int = flag(32, "maximum tokens of a caption, with start and end", paper="77", low=3)
    num_frames: int = flag(16, paper="12; LSMDC, MSVD, VATEX 8, DiDeMo 32, ActivityNet 64")
    input_size: frame_size = flag(0, "height and width in pixels, or HxW, as 112x160; 0 = those of "
                                  "--weights", low=0, high=LARGEST)
    sampling: str = flag("segment", paper="internvideo")
    transform: str = flag("plain", paper="internvideo")
    eval_clips: int = flag(500, "held-out videos, all of them in the gallery", low=2,
                           paper="1,000 of MSR-VTT")
    eval_every: int = flag(0, "steps between evaluations; 0 = at the end")
    test: int = TEST_CLIPS

    generated = "ActShapes"  # the class of video.moving_shapes that generates its clips

    def datasets(self):
        """Clips with sentences. Held-out videos come once each, with all their captions."""
        if not self.weights:
            raise UserError("--weights: fine-tuning starts from a model; give a run of clip, or an "
                            "official file")
        self.loaded = encoders.load_clip(self.weights, frames=self.num_frames,
                                         image_size=self.sides if self.input_size else None)
        self.input_size = spelled(self.loaded.config["image_size"])
        self.eval_every = self.eval_every or max(1, self.steps)
        train_set, held_out = self.open_sets(flip=False)
        train_set.training_captions()  # an error if the list has no captions
        held_out["val"].one_item_per_video()
        return train_set, held_out

    def build(self, train_set):
        """Video and text encoder, without a caption decoder."""
        self.read_tokenizer(self.loaded.config, self.context)
        self.loaded.recompute(self.recompute)
        return self.loaded

    def loss(self, model, batch, rng):
        """The symmetric contrastive loss of videos and sentences."""
        video = transforms.normalise(batch["video"], model.mean, model.std)
        ids, _ = self.bpe.encode(batch["caption"], self.context, trim=True)
        with self.autocast():
            video_features, text_features, scale = model(video, ids.to(video.device))
        loss = pair_loss(video_features, text_features, scale, batch, gather=model.training)
        return loss, {"loss": loss.detach(), "contrastive": loss.detach()}

    def evaluate(self, model, batches, dataset):
        """The loss, and the metrics of both directions, raw and with dual softmax."""
        return super().evaluate(model, batches, dataset) | evaluate(
            model, batches, self.bpe, context=self.context, autocast=self.autocast,
            device=self.device)

    def finish(self, model, held_out, results):
        """Print a table of all metrics and return them, with multiple choice if the data has it."""
        columns, numbers = ("R@1", "R@5", "R@10", "MdR", "MnR"), {}
        print(f"{'':28s}" + "".join(f"{column:>8s}" for column in columns))
        for task, name in (("t2v", "text to video"), ("v2t", "video to text")):
            for kind, words in (("", ""), ("dsl_", ", dual softmax")):
                row = {f"{kind}{task}_{column}": results["val"][f"{kind}{task}_{column}"]
                       for column in columns}
                print(f"{name + words:28s}" + "".join(f"{value:8.1f}" for value in row.values()))
                numbers |= row
        batches = self.held_out(held_out["val"], self.eval_clips, self.eval_batch)
        return numbers | multiple_choice(model, batches, self.bpe, held_out["val"].choices,
                                         context=self.context, autocast=self.autocast)

    def protocol(self, held_out):
        """How the ranks are measured, for metrics.json."""
        val = held_out["val"]
        return self.clips_protocol(held_out) | gallery_protocol(val, self.evaluated(val)) | (
            {"limit": val.limit} if val.limit else {})
