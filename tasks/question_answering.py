"""Answer a question about a video: which of a fixed list of answers fits what was seen and what was asked?

Why: of all the tasks of the paper this one needs both of its halves at once. Contrast has taught two
encoders to agree, and the caption decoder has learned to look for what a sentence needs. Give that decoder
a question in place of a caption, and at the question's end it holds what the video says about it. The
answers of the benchmarks are mostly one word, so a classifier over the commonest of them does, as in all the work
that the paper compares with (InternVideo, arXiv 2212.03191, Sec. 4.4, video question answering; its code).

    video -> visual tower --+------------------------------- norm -- what is seen (B, D) ---------+
                            | tokens                                                              |
                            +--> caption decoder -- at the question's end (B, W) -------------- concat -> head -> (B, Y)
                            | tokens                                                              |
    question -> text tower -+------------------------------- at its end (B, W) -- what is asked --+

The idea, in steps:
1. `answer_table` makes the list: the commonest answers of the training questions. Rarer ones are lost, and
   in evaluation count as wrong, always.
2. `VideoQA` is the video-text model and, on top, `AnswerHead`. Left out is what only contrast and captioning
   need: the two projections, the scale, the layers from the decoder to words.
3. `QuestionOnly` is the baseline to beat: it never sees a video, and says the answer that this very question
   mostly has. On real benchmarks that alone is right surprisingly often ("Making the V in VQA Matter", arXiv
   1612.00837), so a number without it says little.

Where we differ: the paper speaks of a head of three layers, its code has two, and so have we. The code
overflows where a question fills all 77 tokens; ours does not.

    python train.py answer --weights RUN                      # moving shapes; --data FILE for yours
    python question_answering.py VIDEO "which way does the red square go?" --weights RUN

Numbers: on a ViT-B, D = 768 and W = 512, the head has 11.8 M parameters for 1,500 answers.

>>> answer_table(["Yes", "no", "yes.", "a dog"], most=2)
['yes', 'a dog']
>>> AnswerHead(96, 32, 10)(torch.zeros(4, 96 + 2 * 32)).shape       # (B, D + 2*W) -> (B, Y)
torch.Size([4, 10])
"""

import re
import sys
from collections import Counter, defaultdict

import torch
from torch import nn

import caption_decoder
import clip_video
import weights
from weights.tokenizer import tokenizer_of, train_tokenizer
from attention import Dropout


def normalised(answer):
    """An answer as it is compared: lower case, single spaces, no punctuation at its ends -> str."""
    return re.sub(r"\s+", " ", answer.lower()).strip(" .,;:!?\"'")


def answer_table(answers, most=1500):
    """The `most` commonest of these answers, normalised; equally common ones in the order of the alphabet."""
    count = Counter(map(normalised, answers))
    return sorted(count, key=lambda answer: (-count[answer], answer))[:most]


class QuestionOnly:
    """The baseline that sees no video: the answer that a question mostly had in training.

    questions, answers   of training, str each

    self(question) -> the commonest answer to that very question, or of all questions where it is new.
    """

    def __init__(self, questions, answers):
        heard, self.most = defaultdict(Counter), answer_table(answers, 1)[0]
        for question, answer in zip(questions, answers, strict=True):
            heard[normalised(question)][normalised(answer)] += 1
        self.answers = {question: min(count, key=lambda answer: (-count[answer], answer))
                        for question, count in heard.items()}

    def __call__(self, question):
        return self.answers.get(normalised(question), self.most)


class AnswerHead(nn.Sequential):
    """(B, D + 2*W) -> scores (B, answers): drop, Linear to twice the width, norm, GELU, drop, Linear."""

    def __init__(self, visual_width, text_width, answers, drop=0.5):
        width = visual_width + 2 * text_width
        super().__init__(Dropout(drop), nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(),
                         Dropout(drop), nn.Linear(2 * width, answers))


class VideoQA(nn.Module):
    """A video-text model that answers.

    clip      clip_video.VideoCLIP
    decoder   caption_decoder.CaptionDecoder of the same widths
    answers   list of str, what may be answered
    drop      dropout in the head, a probability

    What only contrast and captions need (both projections, the scale, the layers from the decoder to
    words) stays in the model, frozen, so that its weights can be saved and loaded whole.
    """

    def __init__(self, clip, decoder, answers, drop=0.5):
        super().__init__()
        self.clip, self.caption_decoder, self.answers = clip, decoder, list(answers)
        size, text = clip.config["size"], clip.config["text_size"]
        self.head = AnswerHead(size["width"], text["width"], len(self.answers), drop)
        for part in (clip.visual_proj, clip.text.proj, decoder.predictor, decoder.vocabulary):
            part.requires_grad_(False)
        clip.scale.requires_grad_(False)

    @property
    def config(self):
        return {"model": "VideoQA", "clip": self.clip.config, "caption_decoder": self.caption_decoder.config,
                "answers": self.answers}

    def forward(self, video, ids):
        """video (B, C, T, H, W) float, normalised with clip.mean and clip.std; ids (B, L) int64, the questions
        -> scores (B, answers)."""
        seen, tokens = self.clip.visual.encode(video)
        words = self.clip.text.tokens(ids)                                   # (B, L, W)
        found = self.caption_decoder.hidden(tokens.flatten(1, 2), words)     # (B, L, W), one pass for all places
        at_end = self.clip.text.at_end
        return self.head(torch.cat([at_end(found, ids), self.clip.visual_norm(seen), at_end(words, ids)], dim=-1))

    @classmethod
    def from_run(cls, folder, drop=0.0):
        """Load a run of the answer card, in eval mode; drop: as above, to train on. Raises WeightsError."""
        def make(config):
            return cls(clip_video.VideoCLIP.from_config(config["clip"]),
                       caption_decoder.CaptionDecoder.from_config(config["caption_decoder"]),
                       config["answers"], drop)

        return weights.load_run(make, folder, "VideoQA", "answer")


@torch.no_grad()
def main(argv=None):
    """`python question_answering.py`: the shapes. With VIDEO, QUESTION and --weights: the likeliest answers."""
    import argparse

    from video.annotations import DataError
    from video.clips import one_clip
    from video.transforms import normalise
    from video import moving_shapes

    parser = argparse.ArgumentParser(description="Answer a question about a video.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip and a question about it")
    parser.add_argument("question", nargs="?", help="in words; what its answer can be, training has decided")
    parser.add_argument("--weights", help="a run of `train.py answer`; default: an untrained tiny model")
    parser.add_argument("--tokenizer", help="tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; "
                                            "default: the one in the run's folder")
    args = parser.parse_args(argv)
    try:
        if args.video and not (args.question and args.weights):
            raise ValueError("a video needs a question and --weights, a run of `train.py answer`")
        if args.weights:
            model = VideoQA.from_run(args.weights)
            tokenizer = tokenizer_of(args.weights, args.tokenizer, model.clip.config["vocabulary"])
        else:
            model, tokenizer = untrained(moving_shapes)
        config = model.clip.config
        T, (H, W) = config["frames"], config["image_size"]
        if args.video:
            clip = one_clip(args.video, T, (H, W))
        else:
            item = moving_shapes.QuestionShapes("test", T, (H, W))[0]
            clip, args.question = item["video"], item["question"]
            print(f"a generated clip; {item['question']!r} is to be answered with {item['answer']!r}")
        ids, _ = tokenizer.encode([args.question], config["context"], trim=True)
        video = normalise(torch.as_tensor(clip)[None], model.clip.mean, model.clip.std)
        scores = model(video, ids)
        if not args.weights:
            explain(model, video, ids, scores)
        share = scores[0].softmax(dim=-1)
        print(f"protocol: one view of {T} frames, spread over the video, {H} x {W} px; softmax over the {len(share)} answers that "
              "training has decided")
        for p, i in zip(*(found.tolist() for found in share.topk(min(5, len(share))))):
            print(f"{100 * p:5.1f} %  {model.answers[i]}")
    except (weights.WeightsError, DataError, ValueError, OSError) as error:
        print(f"question_answering.py: {error}", file=sys.stderr)
        return 2
    return 0


def untrained(moving_shapes):
    """A tiny model that knows nothing, and its tokenizer; moving_shapes: the module."""
    torch.manual_seed(0)
    world = moving_shapes.QuestionShapes("train", 4, 64)
    items = [world[i] for i in range(100)]
    tokenizer = train_tokenizer([item["question"] for item in items], 600)
    clip = clip_video.VideoCLIP("tiny", frames=4, image_size=64, vocabulary=tokenizer.vocabulary, context=32, end=tokenizer.end)
    decoder = caption_decoder.CaptionDecoder(128, heads=2, depth=2, visual_width=192, vocabulary=tokenizer.vocabulary, queries=8)
    return VideoQA(clip, decoder, answer_table([item["answer"] for item in items])).eval(), tokenizer


def explain(model, video, ids, scores):
    """Print what happens to video (1, C, T, H, W) and question ids (1, L), shape by shape."""
    seen, tokens = model.clip.visual.encode(video)
    words = model.clip.text.tokens(ids)
    found = model.caption_decoder.hidden(tokens.flatten(1, 2), words)
    at_end = model.clip.text.at_end(found, ids)
    for name, letters, value in (
            ("the video", "(B, C, T, H, W)", video), ("what is seen", "(B, D)", seen),
            ("its tokens, side by side", "(B, M, D)", tokens.flatten(1, 2)), ("the question", "(B, L)", ids),
            ("its tokens", "(B, L, W)", words), ("what the decoder makes of both", "(B, L, W)", found),
            ("the same at the question's end", "(B, W)", at_end), ("scores of the answers", "(B, Y)", scores)):
        print(f"{name:34s} {letters:16s} {tuple(value.shape)}")


if __name__ == "__main__":
    raise SystemExit(main())
