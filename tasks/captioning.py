"""How good is a written caption? Three numbers that count the words it shares with references.

Why these: captioning papers report them. None of them understands a sentence. BLEU asks how much of
the caption is in the references, ROUGE-L how much of a reference comes in the same order, and
CIDEr-D weighs words by how much they tell: a word that every caption has counts nothing. For a
caption that says "left" where it should say "right", all three see one wrong word of eight. On the
generated world, `moving_shapes.parse_caption` therefore checks the facts, too.

    captions  ["a dog runs"], references  [["a dog is running", "the dog runs"]]
      -> {"BLEU-4": ..., "ROUGE-L": ..., "CIDEr-D": ...}

Each function takes B captions (str) and, for each, a list of one or more references (str). `score`
gives all three times 100, as papers print them. BLEU and ROUGE-L then reach 100. CIDEr-D has a
factor of 10 by definition and may reach 1000; good captions get about 100 on COCO.

Where we differ: papers split words with a Java program (PTBTokenizer). `words` takes runs of
letters and digits in lower case, which is the same except for "it's" and the like. On equal words
the numbers are those of the COCO code (LOG.md).

Sources: BLEU, Papineni et al. 2002, Sec. 2.1 to 2.3. ROUGE-L, Lin 2004, Sec. 3.1 and 3.2, with the
beta of "Microsoft COCO Captions", arXiv 1504.00325, Sec. 3. CIDEr-D, arXiv 1411.5726, Sec. 3 and 6.

>>> found = score(["a dog runs home"], [["a dog runs home", "it runs"]])
>>> {name: round(value, 1) for name, value in found.items()}  # one clip: no word tells anything
{'BLEU-4': 100.0, 'ROUGE-L': 100.0, 'CIDEr-D': 0.0}
"""

import contextlib
import math
import re
from collections import Counter

import numpy as np
import torch

from engine import pictures, processes
from video import transforms


def words(text):
    """"A dog, running." -> ["a", "dog", "running"]"""
    return re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text.lower())


def ngrams(tokens, n):
    """All runs of n words, counted."""
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def bleu(captions, references, n=4):
    """Geometric mean, over runs of 1 to n words, of the share of the captions' runs that a
    reference has, each as often as some reference has it. Times exp(1 - r/c) where the captions (c
    words in all) are shorter than the references nearest to them in length (r words). Counted over
    all captions, not averaged -> float in [0, 1]."""
    hits, total, caption_words, reference_words = [0] * n, [0] * n, 0, 0
    for caption, others in zip(captions, references, strict=True):
        caption, others = words(caption), [words(other) for other in others]
        caption_words += len(caption)
        reference_words += min((abs(len(other) - len(caption)), len(other)) for other in others)[1]
        for k in range(n):
            most = Counter()
            for other in others:
                most |= ngrams(other, k + 1)
            runs = ngrams(caption, k + 1)
            hits[k] += sum((runs & most).values())
            total[k] += sum(runs.values())
    if not all(hits):
        return 0.0
    precision = sum(math.log(hit / of) for hit, of in zip(hits, total)) / n
    return math.exp(precision + min(0.0, 1 - reference_words / caption_words))


def common(a, b):
    """Length of the longest sequence of words that both have in this order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(captions, references, beta=1.2):
    """Mean over clips of (1 + beta^2) P R / (R + beta^2 P). P and R are the shares of the caption
    and of a reference that the longest common sequence makes up, each of the reference where it is
    largest -> float in [0, 1]."""
    total = 0.0
    for caption, others in zip(captions, references, strict=True):
        caption, others = words(caption), [words(other) for other in others]
        shared = [common(caption, other) for other in others]
        P = max(shared) / max(1, len(caption))
        R = max(length / max(1, len(other)) for length, other in zip(shared, others))
        total += (1 + beta**2) * P * R / (R + beta**2 * P) if max(shared) else 0.0
    return total / len(captions)


def cider_d(captions, references, n=4, sigma=6.0):
    """Ten times the mean cosine between a caption's and a reference's counts of runs of 1 to n
    words. Each count is weighted by ln(clips / clips whose references have that run). Mean over
    clips and references -> float in [0, 10].

    The D: no run counts more often in the caption than in the reference, and a length that differs
    by d words costs a factor exp(-d^2 / (2 sigma^2)). Repeating a rare word gains nothing.
    """
    counts = [[[ngrams(words(other), k + 1) for k in range(n)] for other in others]
              for others in references]
    clips_with = [Counter() for _ in range(n)]
    for others in counts:
        for k in range(n):
            clips_with[k].update({run for other in others for run in other[k]})

    def weighted(runs, k):
        return {run: count * math.log(len(counts) / max(1, clips_with[k][run]))
                for run, count in runs.items()}

    def norm(vector):
        return math.sqrt(sum(value**2 for value in vector.values()))

    total = 0.0
    for caption, others in zip(captions, counts, strict=True):
        runs = [ngrams(words(caption), k + 1) for k in range(n)]
        ours = [weighted(runs[k], k) for k in range(n)]
        value = 0.0
        for other in others:
            difference = sum(runs[0].values()) - sum(other[0].values())
            for k in range(n):
                theirs = weighted(other[k], k)
                length = norm(ours[k]) * norm(theirs)
                if length:
                    value += math.exp(-difference**2 / (2 * sigma**2)) / length * sum(
                        min(weight, theirs[run]) * theirs[run]
                        for run, weight in ours[k].items() if run in theirs)
        total += 10 * value / (n * len(others))
    return total / len(captions)


def score(captions, references):
    """All three, times 100: {"BLEU-4": float, "ROUGE-L": float, "CIDEr-D": float}."""
    return {"BLEU-4": 100 * bleu(captions, references),
            "ROUGE-L": 100 * rouge_l(captions, references),
            "CIDEr-D": 100 * cider_d(captions, references)}


# ------------------------------------------------------------------------------------------------
# Measuring a model


@torch.no_grad()
def write(model, batches, bpe, *, maximum, autocast=contextlib.nullcontext):
    """Captions of held-out clips: [(batch, list of captions), ...].

    model    caption_decoder.VideoText, in eval mode
    batches  dicts with "video" uint8 (B, T, H, W, 3) and "number"
    maximum  most tokens of a caption
    """
    for batch in batches:
        video = transforms.normalise(batch["video"], model.clip.mean, model.clip.std)
        with autocast():
            yield batch, model.caption(video, bpe, maximum)


def evaluate_facts(model, batches, bpe, dataset, *, maximum, autocast=contextlib.nullcontext):
    """Share of clips whose caption states each fact rightly -> {name: percent}.

    dataset  tells with `facts_in` what a sentence states, and with `classes` what there is to
             state; {} where it cannot tell
    """
    classes = dataset.classes
    if not classes or not dataset.states_facts:
        return {}
    rows = []
    for batch, captions in write(model, batches, bpe, maximum=maximum, autocast=autocast):
        stated = [dataset.facts_in(caption) for caption in captions]
        labels = {question: batch["labels"][question].tolist() for question in classes}
        rows.append((batch["number"], [
            [facts.get(question) == names[labels[question][i]]
             for question, names in classes.items()] for i, facts in enumerate(stated)]))
    right = np.array([row for _, part in processes.collect(rows) for row in part])
    return {f"captions_{question}": 100 * float(share) for question, share in
            zip(classes, right.mean(axis=0))} | {
        "captions_all_three": 100 * float(right.all(axis=1).mean())}


def evaluate(model, batches, bpe, dataset, *, maximum, autocast=contextlib.nullcontext):
    """BLEU-4, ROUGE-L and CIDEr-D of captions against all true sentences of each clip.

    dataset  gives with `references` the true sentences of a batch's clips. They are written as the
             tokenizer writes captions: "counter-clockwise" and "counter - clockwise" are one
    """
    rows = []
    for batch, captions in write(model, batches, bpe, maximum=maximum, autocast=autocast):
        references = [bpe.decode(bpe.encode(list(texts), 10**4, trim=True)[0])
                      for texts in dataset.references(batch)]
        rows.append((batch["number"], captions, references))
    rows = processes.collect(rows)
    return score([caption for _, part, _ in rows for caption in part],
                 [texts for *_, part in rows for texts in part])


# ------------------------------------------------------------------------------------------------
# Where the decoder attends


@torch.no_grad()
def attention_maps(model, video, ids):
    """Where a VideoText attends in each frame as it writes: (B, L-1, t, h, w), without the share of
    class tokens.

    video  (B, C, T, H, W), normalised; not for kind "joint", whose tokens are not of single frames
    ids    (B, L) int64
    """
    _, tokens = model.clip.encode_video_tokens(video)                        # (B, t, 1+S, D)
    text = model.clip.encode_text_tokens(ids)[1][:, :-1]
    maps = decoder_maps(model.caption_decoder, tokens.flatten(1, 2).float(), text.float())
    return maps.unflatten(2, tokens.shape[1:3])[..., 1:].unflatten(3, model.clip.visual.grid)


def draw_attention(model, clip, video, sentence, bpe, path):
    """Where a VideoText attends as it writes each word of a sentence: a picture.

    clip  uint8 (T, H, W, 3) numpy; video (1, C, T, H, W), the same as `attention_maps` takes it
    """
    ids, _ = bpe.encode([sentence], model.clip.config["context"], trim=True)
    words = [bpe.decode([token]) or "(end)" for token in ids[0, 1:].tolist()]
    maps = attention_maps(model, video, ids.to(video.device))[0].cpu()
    pictures.attention_maps(clip, maps, words,
                            f'where the decoder attends as it writes "{sentence}"', path)


@torch.no_grad()
def decoder_maps(decoder, visual, text):
    """Where a CaptionDecoder attends at each text token: visual (B, M, D), text (B, L, W) ->
    (B, L, M), rows sum to 1.

    It is the last block's attention to the Q pooled vectors, times the pooler's attention to the M
    tokens, both averaged over heads. Earlier layers mixed the tokens, so a map proves no cause.
    """
    def share(attn, queries, keys):
        """queries (B, n, W), keys (B, 1, N, K) -> (B, n, N)"""
        q = attn.q(queries).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, n, K)
        return (q @ keys.transpose(2, 3) * q.shape[-1]**-0.5).softmax(dim=-1).mean(dim=1)

    pooler, pooled = decoder.pooler, decoder.pool(visual)
    keys = pooler.attn.keys(pooler.context_norm(visual))[0]
    queries = pooler.norm(decoder.queries).expand(len(visual), -1, -1)
    x = decoder.text_norm(text)
    for self_block, cross_block in zip(decoder.self_blocks, decoder.cross_blocks):
        before, _ = self_block(x)
        x = cross_block(before, *cross_block.attn.keys(pooled))
    last = decoder.cross_blocks[-1]
    words = share(last.attn, last.norm(before), last.attn.keys(pooled)[0])   # (B, L, Q)
    return words @ share(pooler.attn, queries, keys)


def main():
    """`python -m tasks.captioning`: what each number makes of a few captions."""
    references = [["a red square moves to the left", "the red square goes left"],
                  ["a blue ring grows", "the ring gets larger"],
                  ["two green stars meet", "a pair of green stars comes together"]]
    for name, captions in (
            ("word for word", [sentences[0] for sentences in references]),
            ("one wrong fact", ["a red square moves to the right", "a blue ring shrinks",
                                "two green circles meet"]),
            ("right, in other words", ["leftwards goes the red square",
                                       "the blue ring becomes bigger",
                                       "green stars approach each other"]),
            ("the same for all", ["a red square moves to the left"] * 3)):
        found = score(captions, references)
        print(f"{name:24s}" + "   ".join(f"{key} {value:6.1f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
