"""Find videos by text and text by videos: metrics, multiple choice and zero-shot classes.

    texts (n, E), videos (m, E) -> similarity (n, m) -> ranks -> {"t2v_R@1": percent, ...}

1. `retrieval_metrics`: how often the right one is among the first 1, 5, 10. Ties count against the
   model: official code lets ties win, so that a model which gives everything the same score gets
   100 %.
2. `choose`: which of a few sentences fits a video (InternVideo, Sec. 4.4, multiple choice).
3. `evaluate` and `multiple_choice`: both of a model on held-out batches.
4. `Retrieval`: the stage that fine-tunes for it.

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
from engine.frame_size import height_width
from engine.stage import TEST_CLIPS, flag
from tasks.sentences import SentenceStage
from video import transforms
from weights import encoders

# The sentences into which InternVideo puts the names of actions.
PROMPTS = (
    "a photo of action {}", "a picture of action {}", "Human action of {}", "{}, an action",
    "{} this is an action", "{}, a video of action", "Playing action of {}", "{}",
    "Playing a kind of action, {}", "Doing a kind of action, {}", "Look, the human is {}",
    "Can you recognize the action of {}?", "Video classification of {}", "A video of {}",
    "The man is {}", "The woman is {}",
)


def retrieval_metrics(similarity, owner=None, grouped=False):
    """How well videos are found by text (t2v) and text by videos (v2t).

    similarity  (texts, videos): exp(logit_scale) * cosines. The factor changes dual softmax alone
    owner       (texts,) int, the video that each text describes; default: text i, video i
    grouped     v2t where videos have several captions. False: the rank of the best own caption
                among the captions of all other videos. True: among videos, each with its best
                caption (the protocol of InternVideo on MSVD); it gives better ranks beyond the
                first
    returns     {"t2v_R@1", "t2v_R@5", "t2v_R@10": percent; "t2v_MdR", "t2v_MnR": median and mean
                rank, from 1; the same for v2t; the same again with "dsl_" in front}. A rank is 1 +
                the number of others that are at least as similar

    dsl_: dual softmax (CAMoE, arXiv 2109.04290, Dual Softmax Loss). Each similarity is multiplied
    by its softmax over all queries of the test, S * softmax(S). It uses the whole test set, which
    no user has, so it is never shown without the raw numbers.
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
    # With several texts per video the published protocol takes the softmax over texts both ways.
    over_videos = over_texts if texts > videos else S * S.softmax(dim=1)
    metrics = {}
    for name, to_video, to_text in (("", S, S), ("dsl_", over_texts, over_videos)):
        t2v = (to_video >= to_video.gather(1, owner[:, None])).sum(dim=1)
        for way, rank in (("t2v", t2v), ("v2t", text_ranks(to_text, owner, grouped))):
            for k in (1, 5, 10):
                metrics[f"{name}{way}_R@{k}"] = 100 * (rank <= k).double().mean().item()
            metrics[f"{name}{way}_MdR"] = rank.double().quantile(0.5).item()
            metrics[f"{name}{way}_MnR"] = rank.double().mean().item()
    return metrics


def text_ranks(similarity, owner, grouped):
    """For each video the rank of its best own text: (texts, videos), (texts,) -> (videos,)."""
    videos = similarity.shape[1]
    own = owner[:, None] == torch.arange(videos)                             # (texts, videos) bool
    best = similarity.masked_fill(~own, -math.inf).amax(dim=0)
    others = similarity.masked_fill(own, -math.inf)
    if grouped:  # of each other video, its best text
        empty = torch.full((videos, videos), -math.inf, dtype=similarity.dtype)
        others = empty.scatter_reduce(0, owner[:, None].expand(-1, videos), others, "amax")
    return 1 + (others >= best).sum(dim=0)


def gallery_protocol(dataset, places):
    """What ranks among these items of a data set mean: {word: value} for a stage's `protocol`."""
    videos, captions = len(places), dataset.captions_of(places)
    return {"gallery": f"{videos} videos, {captions} captions; chance of R@1 is "
                       f"{100 / videos:.1f} %",
            "ranks": "raw and dual softmax (dsl); ties count against us; v2t among videos by their "
                     "best caption"}


@torch.no_grad()
def choose(model, video, options):
    """Multiple choice: the sentence with the largest cosine.

    model    clip_video.VideoCLIP
    video    (B, C, T, H, W), as `VideoCLIP.encode_video`
    options  for each video the token numbers of its sentences, (n, L) int64
    returns  (B,) int64, the index of the chosen one; of equal ones the first
    """
    video_embeddings = F.normalize(model.encode_video(video).float(), dim=-1)
    return torch.stack([
        (F.normalize(model.encode_text(ids).float(), dim=-1) @ embedding).argmax()
        for embedding, ids in zip(video_embeddings, options)])


def caption_numbers(captions, device="cpu"):
    """A number for each caption, int64 (B,): the same for the same sentence, in every process.

    For `clip_video.contrastive_loss`: clips with the same sentence are not each other's negatives.
    """
    hashes = [hashlib.blake2b(text.encode(), digest_size=7).digest() for text in captions]
    return torch.tensor([int.from_bytes(part, "big") for part in hashes], device=device)


def pair_loss(video, text, scale, batch, *, gather):
    """`clip_video.contrastive_loss` of embeddings (B, E) of a batch; beyond BLOCKED_ABOVE pairs
    block by block.

    Pairs with the same caption are no negatives of each other, nor are captions of the same clip.

    batch   with "caption", B sentences, and where clips may come twice "clip", their B numbers
    gather  True: over all processes
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
    """Ranks of videos and captions among each other.

    model    clip_video.VideoCLIP, in eval mode
    batches  dicts with "video" uint8 (B, T, H, W, 3), "captions" (all of each video) and "number"
    bpe      weights.tokenizer.Tokenizer
    gallery  of the videos the first so many; None = all
    context  most tokens of a caption; None = as many as the model reads
    returns  what `retrieval_metrics` returns, with v2t among videos by their best caption
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
    _, video_features, text_features, counts = zip(*processes.collect(rows, device))
    video_features, text_features = (F.normalize(torch.cat(part).float(), dim=-1)
                                     for part in (video_features, text_features))
    counts = torch.tensor(sum(counts, []))[:gallery]
    owner = torch.arange(len(counts)).repeat_interleave(counts)          # the video of each caption
    similarity = text_features[:len(owner)] @ video_features[:len(counts)].T
    return retrieval_metrics(model.logit_scale.exp() * similarity, owner, grouped=True)


@torch.no_grad()
def multiple_choice(model, batches, bpe, choices, *, context=None,
                    autocast=contextlib.nullcontext):
    """{"multiple_choice": percent} of videos whose right sentence is the most similar one.

    choices  function of a batch -> [(sentences, place of the right one), ...], one for each clip,
             or [] where there is no choice: see video.clip_set. Other arguments as `evaluate`
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
        rows.append((batch["number"], [c == right for c, (_, right) in zip(chosen, options)]))
    hits = [hit for _, part in processes.collect(rows) for hit in part]
    return {"multiple_choice": 100 * sum(hits) / len(hits)}


# ------------------------------------------------------------------------------------------------
# The card


@dataclass
class Retrieval(SentenceStage, name="retrieve"):
    """Fine-tuned retrieval: contrast alone, from the weights of stage 2 (InternVideo, Sec. 4.4).

    Generated clips show two acts, which stage 2 never shows; the sentences say which came first."""

    weights: str = flag("", "start from these weights: a run of clip, or an official file")
    steps: int = flag(600, paper="5 epochs; 30 on ActivityNet")
    lr: float = flag(2e-3, paper="2e-6 to 5e-6")
    warmup: float = flag(0.1, paper="0.1")
    weight_decay: float = flag(0.2, paper="0.2")
    beta2: float = flag(0.98, paper="0.98")
    context: int = flag(32, "most tokens of a caption, start and end included", paper="77", low=3)
    num_frames: int = flag(16, paper="12; LSMDC, MSVD, VATEX 8, DiDeMo 32, ActivityNet 64")
    sampling: str = flag("segment", paper="internvideo")
    transform: str = flag("plain", paper="internvideo")
    eval_clips: int = flag(500, "held-out videos, all of them in the gallery", low=2,
                           paper="1,000 of MSR-VTT")
    eval_every: int = flag(0, "steps between evaluations; 0 = at the end")
    test: int = TEST_CLIPS

    world = "ActShapes"  # the class of video.moving_shapes that generates its clips

    def datasets(self):
        """Clips with sentences; of held-out clips each video once, with all its captions."""
        if not self.weights:
            raise UserError("--weights: fine-tuning starts from a model; give a run of clip, or an "
                            "official file")
        self.eval_every = self.eval_every or max(1, self.steps)
        train_set, held_out = self.open_sets(flip=False)
        train_set.training_captions()  # refuses a list without
        held_out["val"].by_video()
        return train_set, held_out

    def build(self, train_set):
        """Both encoders, without a caption decoder."""
        model = encoders.load_clip(self.weights, frames=self.num_frames,
                                   image_size=self.sides,
                                   usual_size=height_width(type(self).input_size))
        self.read_tokenizer(model.config, self.context)
        model.recompute(self.recompute)
        return model

    def loss(self, model, batch, rng):
        """Contrast of each video with the sentences of the batch, and the other way round."""
        video = transforms.normalise(batch["video"], model.mean, model.std)
        ids, _ = self.bpe.encode(batch["caption"], self.context, trim=True)
        with self.autocast():
            video_features, text_features, scale = model(video, ids.to(video.device))
        loss = pair_loss(video_features, text_features, scale, batch, gather=model.training)
        return loss, {"loss": loss.detach(), "contrastive": loss.detach()}

    def evaluate(self, model, batches, dataset):
        """Loss, and ranks in both directions, raw and dual softmax."""
        return super().evaluate(model, batches, dataset) | evaluate(
            model, batches, self.bpe, context=self.context, autocast=self.autocast,
            device=self.device)

    def finish(self, model, held_out, results):
        """All ranks, also printed as a table; multiple choice, where the data has one."""
        columns, numbers = ("R@1", "R@5", "R@10", "MdR", "MnR"), {}
        print(f"{'':28s}" + "".join(f"{column:>8s}" for column in columns))
        for way, name in (("t2v", "text to video"), ("v2t", "video to text")):
            for kind, words in (("", ""), ("dsl_", ", dual softmax")):
                row = {f"{kind}{way}_{column}": results["val"][f"{kind}{way}_{column}"]
                       for column in columns}
                print(f"{name + words:28s}" + "".join(f"{value:8.1f}" for value in row.values()))
                numbers |= row
        batches = self.held_out(held_out["val"], self.eval_clips, self.eval_batch)
        return numbers | multiple_choice(model, batches, self.bpe, held_out["val"].choices,
                                         context=self.context, autocast=self.autocast)

    def protocol(self, held_out):
        """How the ranks are measured."""
        val = held_out["val"]
        return self.clips_protocol(held_out) | gallery_protocol(val, self.evaluated(val)) | (
            {"limit": val.limit} if val.limit else {})
