"""Find videos by text and text by videos: metrics, multiple choice and zero-shot classes.

    texts (n, E), videos (m, E) -> similarity (n, m) -> ranks -> {"t2v_R@1": percent, ...}

1. `retrieval_metrics`: how often the right one is among the first 1, 5, 10. Ties count against the
   model: official code lets ties win, so that a model which gives everything the same score gets
   100 %.
2. `choose`: which of a few sentences fits a video (InternVideo, Sec. 4.4, multiple choice).
3. `embed_classes`: class names as sentences, for `clip_video.zero_shot`.
4. `protocol`: how it was measured, in one line.

>>> metrics = retrieval_metrics(torch.eye(3))
>>> metrics["t2v_R@1"], metrics["v2t_MdR"]
(100.0, 1.0)
"""

import math

import torch
import torch.nn.functional as F

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


def protocol(dataset, *, videos, captions, frames, sampling, crop, size, merge=None, grouped=False):
    """One line that says how retrieval was measured; numbers without it cannot be compared.

    dataset    name and split, "MSR-VTT 1k-A"
    sampling   how frames were chosen; crop, size: which part of them was used, pixels
    merge      share of CLIP's weights mixed into the model's, None = none
    """
    several = "" if captions == videos else (
        ", v2t " + ("among videos by their best caption" if grouped else "by the best own caption"))
    merged = "no weight merge" if merge is None else f"{merge:g} of CLIP merged"
    return (f"{dataset}: {videos} videos, {captions} captions{several}; {frames} frames, "
            f"{sampling}; {crop} {size} px; {merged}; raw and dual softmax (dsl); ties count "
            "against us")


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


@torch.no_grad()
def embed_classes(model, tokenizer, classes, prompts=PROMPTS):
    """Every class name in every prompt: (prompts, Y, E), normalised."""
    device, context = model.scale.device, model.config["context"]
    embeddings = []
    for prompt in prompts:
        sentences = [prompt.replace("{}", name) for name in classes]
        ids, _ = tokenizer.encode(sentences, context, trim=True)
        embeddings.append(F.normalize(model.encode_text(ids.to(device)), dim=-1))
    return torch.stack(embeddings)
