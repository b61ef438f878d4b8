"""Score generated captions against references: BLEU-4, ROUGE-L and CIDEr-D.

    captions  ["a dog runs"], references  [["a dog is running", "the dog runs"]]
      -> {"BLEU-4": ..., "ROUGE-L": ..., "CIDEr-D": ...}

1. BLEU measures which share of the caption's n-grams occurs in the references.
2. ROUGE-L measures the longest sequence of words that caption and reference share.
3. CIDEr-D compares n-gram counts and gives rare n-grams a higher weight. An n-gram that occurs in
   the references of every clip has weight 0.

All three only count shared words. A caption of eight words that says "left" instead of "right" has
one wrong word and scores high. On the generated world, `evaluate_facts` therefore also checks the
facts that a caption states.

Each metric takes B captions (str) and, for each caption, a list of one or more references (str).
`score` multiplies all three by 100, as papers do. BLEU and ROUGE-L then reach 100. CIDEr-D contains
another factor of 10 and can reach 1000; good captions get about 100 on COCO.

Where we differ: papers split sentences with a Java program (PTBTokenizer). `words` takes runs of
letters and digits in lower case. Results differ only for words such as "it's". On the same words
the numbers equal those of the COCO code (LOG.md).

Sources: BLEU, Papineni et al. 2002, Sec. 2.1 to 2.3. ROUGE-L, Lin 2004, Sec. 3.1 and 3.2, with the
beta of "Microsoft COCO Captions", arXiv 1504.00325, Sec. 3. CIDEr-D, arXiv 1411.5726, Sec. 3 and 6.

>>> scores = score(["a dog runs home"], [["a dog runs home", "it runs"]])
>>> {name: round(value, 1) for name, value in scores.items()}  # one clip: every weight is 0
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
    """Count the n-grams: {(word, ..., word): number of times}."""
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def bleu(captions, references, n=4):
    """BLEU over all captions together -> float in [0, 1].

    The geometric mean of the precisions of 1-grams to n-grams. An n-gram of a caption counts at
    most as often as it occurs in one of its references. If the captions (c words in total) are
    shorter than the references nearest in length (r words), the score is multiplied by
    exp(1 - r/c).
    """
    hits, total, caption_words, reference_words = [0] * n, [0] * n, 0, 0
    for caption, others in zip(captions, references, strict=True):
        caption, others = words(caption), [words(other) for other in others]
        caption_words += len(caption)
        reference_words += min((abs(len(other) - len(caption)), len(other)) for other in others)[1]
        for k in range(n):
            allowed = Counter()
            for other in others:
                allowed |= ngrams(other, k + 1)
            grams = ngrams(caption, k + 1)
            hits[k] += sum((grams & allowed).values())
            total[k] += sum(grams.values())
    if not all(hits):
        return 0.0
    log_precision = sum(math.log(hit / count) for hit, count in zip(hits, total)) / n
    return math.exp(log_precision + min(0.0, 1 - reference_words / caption_words))


def common(a, b):
    """Length of the longest common subsequence of two lists of words (gaps are allowed)."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(captions, references, beta=1.2):
    """Mean over clips of (1 + beta^2) P R / (R + beta^2 P) -> float in [0, 1].

    P is the length of the longest common subsequence divided by the length of the caption, R the
    same divided by the length of the reference. P and R each take the reference that gives the
    largest value.
    """
    total = 0.0
    for caption, others in zip(captions, references, strict=True):
        caption, others = words(caption), [words(other) for other in others]
        shared = [common(caption, other) for other in others]
        P = max(shared) / max(1, len(caption))
        R = max(length / max(1, len(other)) for length, other in zip(shared, others))
        total += (1 + beta**2) * P * R / (R + beta**2 * P) if max(shared) else 0.0
    return total / len(captions)


def cider_d(captions, references, n=4, sigma=6.0):
    """Ten times the mean cosine between the n-gram counts of captions and references, for 1-grams
    to n-grams, over all clips and references -> float in [0, 10].

    The weight of each n-gram is ln(clips / clips whose references contain it).

    The D stands for two changes, so that repeating a rare word does not help. An n-gram counts at
    most as often as in the reference. A length difference of d words multiplies the score by
    exp(-d^2 / (2 sigma^2)).
    """
    counts = [[[ngrams(words(other), k + 1) for k in range(n)] for other in others]
              for others in references]
    clips_with = [Counter() for _ in range(n)]
    for others in counts:
        for k in range(n):
            clips_with[k].update({gram for other in others for gram in other[k]})

    def weighted(grams, k):
        return {gram: count * math.log(len(counts) / max(1, clips_with[k][gram]))
                for gram, count in grams.items()}

    def norm(vector):
        return math.sqrt(sum(value**2 for value in vector.values()))

    total = 0.0
    for caption, others in zip(captions, counts, strict=True):
        grams = [ngrams(words(caption), k + 1) for k in range(n)]
        ours = [weighted(grams[k], k) for k in range(n)]
        value = 0.0
        for other in others:
            difference = sum(grams[0].values()) - sum(other[0].values())
            for k in range(n):
                theirs = weighted(other[k], k)
                length = norm(ours[k]) * norm(theirs)
                if length:
                    value += math.exp(-difference**2 / (2 * sigma**2)) / length * sum(
                        min(weight, theirs[gram]) * theirs[gram]
                        for gram, weight in ours[k].items() if gram in theirs)
        total += 10 * value / (n * len(others))
    return total / len(captions)


def score(captions, references):
    """All three metrics times 100: {"BLEU-4": float, "ROUGE-L": float, "CIDEr-D": float}."""
    return {"BLEU-4": 100 * bleu(captions, references),
            "ROUGE-L": 100 * rouge_l(captions, references),
            "CIDEr-D": 100 * cider_d(captions, references)}


# ------------------------------------------------------------------------------------------------
# Measuring a model


@torch.no_grad()
def generate_captions(model, batches, bpe, *, maximum, autocast=contextlib.nullcontext):
    """Generate captions of held-out clips: yields (batch, list of captions).

    model    caption_decoder.VideoText, in eval mode
    batches  dicts with "video" uint8 (B, T, H, W, 3) and "number"
    maximum  largest number of tokens per caption
    """
    for batch in batches:
        video = transforms.normalise(batch["video"], model.clip.mean, model.clip.std)
        with autocast():
            yield batch, model.caption(video, bpe, maximum)


def evaluate_facts(model, batches, bpe, dataset, *, maximum, autocast=contextlib.nullcontext):
    """Share of clips whose caption states each fact correctly -> {name: percent}.

    dataset  its `facts_in` returns the facts that a sentence states, its `classes` all possible
             facts. A data set without them gives {}
    """
    classes = dataset.classes
    if not classes or not dataset.can_read_facts:
        return {}
    rows = []
    for batch, captions in generate_captions(model, batches, bpe, maximum=maximum,
                                             autocast=autocast):
        stated = [dataset.facts_in(caption) for caption in captions]
        labels = {question: batch["labels"][question].tolist() for question in classes}
        rows.append((batch["number"], [
            [facts.get(question) == names[labels[question][i]]
             for question, names in classes.items()] for i, facts in enumerate(stated)]))
    correct = np.array([row for _, part in processes.gather_rows(rows) for row in part])
    return {f"captions_{question}": 100 * float(share) for question, share in
            zip(classes, correct.mean(axis=0))} | {
        "captions_all_three": 100 * float(correct.all(axis=1).mean())}


def evaluate(model, batches, bpe, dataset, *, maximum, autocast=contextlib.nullcontext):
    """BLEU-4, ROUGE-L and CIDEr-D of captions against all true sentences of each clip.

    dataset  its `references` returns the true sentences of a batch's clips. They are encoded and
             decoded once, because captions come from the tokenizer and it changes the spelling:
             "counter-clockwise" becomes "counter - clockwise"
    """
    rows = []
    for batch, captions in generate_captions(model, batches, bpe, maximum=maximum,
                                             autocast=autocast):
        references = [bpe.decode(bpe.encode(list(texts), 10**4, trim=True)[0])
                      for texts in dataset.references(batch)]
        rows.append((batch["number"], captions, references))
    rows = processes.gather_rows(rows)
    return score([caption for _, part, _ in rows for caption in part],
                 [texts for *_, part in rows for texts in part])


# ------------------------------------------------------------------------------------------------
# Where the decoder attends


@torch.no_grad()
def attention_maps(model, video, ids):
    """Attention maps of a VideoText for each token that it writes -> (B, L-1, t, h, w).

    The weights on class tokens are left out.

    video  (B, C, T, H, W), normalised
    ids    (B, L) int64, the caption

    A model of kind "joint" has no such maps: its tokens do not belong to single frames.
    """
    _, tokens = model.clip.encode_video_tokens(video)                        # (B, t, 1+S, D)
    text = model.clip.encode_text_tokens(ids)[1][:, :-1]
    maps = decoder_maps(model.caption_decoder, tokens.flatten(1, 2).float(), text.float())
    return maps.unflatten(2, tokens.shape[1:3])[..., 1:].unflatten(3, model.clip.visual.grid)


def draw_attention(model, clip, video, sentence, bpe, path):
    """Draw where a VideoText attends while it writes each word of a sentence.

    clip   uint8 (T, H, W, 3) numpy
    video  (1, C, T, H, W), the same clip, normalised
    """
    ids, _ = bpe.encode([sentence], model.clip.config["context"], trim=True)
    words = [bpe.decode([token]) or "(end)" for token in ids[0, 1:].tolist()]
    maps = attention_maps(model, video, ids.to(video.device))[0].cpu()
    pictures.attention_maps(clip, maps, words,
                            f'where the decoder attends as it writes "{sentence}"', path)


@torch.no_grad()
def decoder_maps(decoder, visual, text):
    """Attention of a CaptionDecoder from each text token to each visual token.

    visual (B, M, D), text (B, L, W) -> (B, L, M), rows sum to 1.

    The product of two attention matrices, each averaged over heads: from the text to the Q pooled
    vectors in the last block, and from these to the M tokens in the pooler. Earlier layers have
    already mixed information between tokens. A map therefore does not prove which token caused
    a word.
    """
    def mean_attention(attn, queries, keys):
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
    to_pooled = mean_attention(last.attn, last.norm(before), last.attn.keys(pooled)[0])  # (B, L, Q)
    return to_pooled @ mean_attention(pooler.attn, queries, keys)


def main():
    """`python -m tasks.captioning`: print the three metrics for some example captions."""
    references = [["a red square moves to the left", "the red square goes left"],
                  ["a blue ring grows", "the ring gets larger"],
                  ["two green stars meet", "a pair of green stars comes together"]]
    for name, captions in (
            ("identical", [sentences[0] for sentences in references]),
            ("one wrong fact", ["a red square moves to the right", "a blue ring shrinks",
                                "two green circles meet"]),
            ("correct, other words", ["leftwards goes the red square",
                                      "the blue ring becomes bigger",
                                      "green stars approach each other"]),
            ("one caption for all", ["a red square moves to the left"] * 3)):
        scores = score(captions, references)
        print(f"{name:24s}" + "   ".join(f"{key} {value:6.1f}" for key, value in scores.items()))


if __name__ == "__main__":
    main()
