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

import functools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import caption_decoder
import clip_video
import weights
from attention import Dropout
from engine import pictures, processes
from engine.errors import UserError
from engine.stage import ClipStage, flag
from video import transforms
from weights.tokenizer import tokenizer_of


def normalise_answer(answer):
    """An answer as it is compared: lower case, single spaces, no punctuation at its ends -> str."""
    return re.sub(r"\s+", " ", answer.lower()).strip(" .,;:!?\"'")


def answer_table(answers, most=1500):
    """The `most` commonest of these answers, normalised; equally common ones in the order of the alphabet."""
    count = Counter(map(normalise_answer, answers))
    return sorted(count, key=lambda answer: (-count[answer], answer))[:most]


class QuestionOnly:
    """The baseline that sees no video: the answer that a question mostly had in training.

    questions, answers   of training, str each

    self(question) -> the commonest answer to that very question, or of all questions where it is new.
    """

    def __init__(self, questions, answers):
        heard, self.most = defaultdict(Counter), answer_table(answers, 1)[0]
        for question, answer in zip(questions, answers, strict=True):
            heard[normalise_answer(question)][normalise_answer(answer)] += 1
        self.answers = {question: min(count, key=lambda answer: (-count[answer], answer))
                        for question, count in heard.items()}

    def __call__(self, question):
        return self.answers.get(normalise_answer(question), self.most)


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


# ------------------------------------------------------------------------------------------------
# Measuring and training


@torch.no_grad()
def evaluate(scores_of, batches, answers):
    """What the model answers: [(question, right answer, answer of the model), ...] in their order.

    scores_of  function of a batch -> (B, answers)
    batches    dicts with the lists "question" and "answer", and "number"
    answers    the answers that a model can give, in the order of its scores
    """
    rows = []
    for batch in batches:
        chosen = scores_of(batch).argmax(dim=1).tolist()
        rows.append((batch["number"], [
            (question, normalise_answer(answer), answers[i])
            for question, answer, i in zip(batch["question"], batch["answer"], chosen)]))
    return [row for _, part in processes.collect(rows) for row in part]


@dataclass
class Answering(ClipStage, name="answer"):
    """Questions about videos: a head on the caption decoder and both encoders, all of them trained.

    InternVideo, Sec. 4.4, video question answering. On generated questions about moving shapes, or on
    a file of `video, question, answer`. Then: python tools/predict.py VIDEO --question Q --weights RUN"""

    weights: str = flag("", "the video-text model: a run of clip, InternVideo-MM weights, or a run of "
                        "this stage")
    steps: int = flag(600, paper="20 epochs")
    batch_size: int = flag(32, "questions per process and step", paper="512 in all")
    lr: float = flag(1e-3, paper="1e-5")
    head_scale: float = flag(3.0, "factor on the learning rate of the head", paper="10", low=0)
    weight_decay: float = flag(0.01, paper="0.01")
    warmup: float = flag(0.1, paper="0.1")
    answers: int = flag(1500, "the most frequent answers of training; only these can be given",
                        paper="1,000 to 1,540", low=2)
    drop: float = flag(0.1, "dropout in the head", paper="0.5", low=0, high=1)
    tokenizer: str = flag("", "tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the "
                          "one beside --weights")
    data: str = flag("", "a file with questions: JSON, JSONL or CSV with video, question and answer; "
                     "default: questions about moving shapes")
    num_frames: int = flag(0, "frames per clip; 0 = as --weights", low=0, paper="8")
    input_size: int = flag(0, "height and width in pixels; 0 = as --weights", low=0)
    sampling: str = flag("segment", paper="internvideo")
    transform: str = flag("plain", paper="internvideo")
    eval_clips: int = flag(1000, "held-out questions per evaluation")
    eval_every: int = flag(500)

    world = "QuestionShapes"

    @functools.cached_property
    def parts(self):
        """(video-text encoders, caption decoder, a finished VideoQA or None), out of --weights."""
        if not self.weights:
            raise UserError("--weights: answering starts from a video-text model; give a run of "
                            "clip, or InternVideo-MM weights")
        if weights.read(self.weights)[1].get("model") == "VideoQA":
            model = VideoQA.from_run(self.weights, self.drop)
            self.check_against_weights(answers=len(model.answers))
            return model.clip, model.caption_decoder, model
        clip = clip_video.VideoCLIP.from_official(self.weights, frames=self.num_frames or None)
        return clip, caption_decoder.CaptionDecoder.from_official(self.weights), None

    def datasets(self):
        """Clips with a question each, of the size that the model takes."""
        config = self.parts[0].config
        self.num_frames = self.num_frames or config["frames"]
        if self.input_size not in (0, config["image_size"][0]):
            raise UserError(f"--input-size {self.input_size}: {self.weights} is for "
                            f"{config['image_size'][0]} pixels; leave it out")
        self.input_size = config["image_size"][0]
        train_set, held_out = self.open_sets(flip=False)
        held_out["val"].training_questions()  # refuses a list without
        return train_set, held_out

    def build(self, train_set):
        """The finished model, or a new head on the video-text model."""
        clip, decoder, model = self.parts
        self.bpe = tokenizer_of(self.weights, self.tokenizer, clip.config["vocabulary"])
        pairs = train_set.training_questions()
        self.baseline = QuestionOnly(*zip(*pairs))
        table = answer_table((answer for _, answer in pairs), self.answers)
        model = model or VideoQA(clip, decoder, table, self.drop)
        model.clip.recompute(self.recompute)
        return model

    def scale_of(self, model, name):
        """The head learns faster."""
        return self.head_scale if name.startswith("head.") else 1.0

    def scores(self, model, batch):
        """The score of each answer, (B, answers) float32."""
        video = transforms.normalise(batch["video"], model.clip.mean, model.clip.std)
        ids, _ = self.bpe.encode(batch["question"], model.clip.config["context"], trim=True)
        with self.autocast():
            return model(video, ids.to(video.device)).float()

    def loss(self, model, batch, rng):
        """Cross entropy over the answers; a question whose answer is not among them has no target."""
        scores = self.scores(model, batch)
        place = {answer: i for i, answer in enumerate(model.answers)}
        right = torch.tensor([place.get(normalise_answer(answer), -1) for answer in batch["answer"]],
                             device=scores.device)
        count = (right >= 0).sum()
        count = processes.mean(count) if model.training else count
        loss = torch.nn.functional.cross_entropy(scores, right, ignore_index=-1, reduction="sum")
        loss = loss / count.clamp(min=1)
        return loss, {"loss": loss.detach()}

    def evaluate(self, model, batches, held_out_set):
        """Accuracy in percent; "rows" has all answers."""
        rows = evaluate(functools.partial(self.scores, model), batches, model.answers)
        right = [said == answer for _, answer, said in rows]
        return {"accuracy": 100 * sum(right) / len(right), "rows": rows}

    def finish(self, model, held_out, results):
        """A table by kind of question, with two baselines: the question alone, the likeliest answer."""
        kinds, numbers = {}, {}
        for question, answer, said in results["val"]["rows"]:
            words = question.lower().split()
            right = (said == answer, self.baseline(question) == answer, self.baseline.most == answer)
            for kind in ("all questions", words[0] if self.data else " ".join(words[:2])):
                kinds.setdefault(kind, []).append(right)
        print(f"{'accuracy in percent':24s}{'questions':>10s}{'answered':>10s}{'question only':>15s}"
              f"{'commonest answer':>18s}")
        for kind, right in sorted(kinds.items(), key=lambda item: -len(item[1])):
            answered, alone, commonest = (100 * np.mean(right, axis=0)).tolist()
            print(f"{kind:24s}{len(right):10d}{answered:10.1f}{alone:15.1f}{commonest:18.1f}")
            numbers[kind.replace(" ", "_")] = answered
            if kind == "all questions":
                numbers |= {"question_only": alone, "commonest_answer": commonest}
        return numbers

    def protocol(self, held_out):
        """How the accuracy is measured."""
        return self.clips_protocol(held_out) | {
            "answers": "open-ended: one of the most frequent answers of training, compared in lower "
                       "case without punctuation; others count as wrong"}

    @torch.no_grad()
    def pictures(self, model, batch, folder, results):
        """answers.png: clips with question, right answer, and answer of the model."""
        answers = [model.answers[i] for i in self.scores(model, batch).argmax(dim=1).tolist()]
        told = [f"{question} {answer}" for question, answer in zip(batch["question"],
                                                                   batch["answer"])]
        pictures.captions(batch["video"].cpu().numpy(), told, answers, folder / "answers.png")
        return [folder / "answers.png"]

    def extras(self, folder):
        """tokenizer.json"""
        self.bpe.save(folder)
