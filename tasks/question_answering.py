"""Video question answering: choose one of a fixed list of answers.

The caption decoder reads the question instead of a caption, so its output at the end of the
question depends on question and video. Most answers of the benchmarks are one word. A classifier
over the most frequent answers is therefore enough (InternVideo, arXiv 2212.03191, Sec. 4.4, video
question answering).

    video -> visual encoder --+------------------------ norm -- video feature (B, D) ----+
                              | tokens                                                   |
                              +--> caption decoder -- at the end token (B, W) ------- concat
                              | tokens                                                   |
    question -> text encoder -+---------------------- at the end token (B, W) -----------+
                                                  head (B, D + 2*W) -> scores (B, answers)

The idea, in steps:
1. `answer_table` lists the most frequent answers of the training questions. The model can give only
   these. A question with another answer always counts as wrong.
2. `VideoQA` is the video-text model with `AnswerHead` on top. It does not use the parts that only
   the contrastive loss and captioning need.
3. `QuestionOnly` is a baseline that never sees a video. It gives the most frequent training answer
   to the same question. On real benchmarks this is often correct ("Making the V in VQA Matter",
   arXiv 1612.00837), so both accuracies are reported.

Where we differ: the paper describes a head of three layers. The official code has two, as here
(11.8 M parameters on a ViT-B for 1,500 answers). The official code fails if a question fills all
77 tokens.

    python train.py answer --weights RUN              # generated questions; --data FILE for yours
    python tools/predict.py VIDEO --question "which way does the red square go?" --weights RUN

>>> answer_table(["Yes", "no", "yes.", "a dog"], most=2)
['yes', 'a dog']
>>> AnswerHead(96, 32, 10)(torch.zeros(4, 96 + 2 * 32)).shape       # (B, D + 2*W) -> (B, answers)
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
from engine.frame_size import frame_size, spelled
from engine.stage import flag
from tasks.sentences import SentenceStage
from video import transforms


def normalise_answer(answer):
    """Spelling in which answers are compared: lower case, single spaces, no punctuation at the
    ends."""
    return re.sub(r"\s+", " ", answer.lower()).strip(" .,;:!?\"'")


def answer_table(answers, most=1500):
    """The `most` most frequent answers, normalised. Ties are sorted alphabetically."""
    count = Counter(map(normalise_answer, answers))
    return sorted(count, key=lambda answer: (-count[answer], answer))[:most]


class QuestionOnly:
    """The baseline that sees no video: it gives the most frequent training answer to a question.

    questions, answers  str, of the training set

    self(question) -> that answer; for a question that is not in the training set, the most frequent
    answer of all.
    """

    def __init__(self, questions, answers):
        counts, self.most = defaultdict(Counter), answer_table(answers, 1)[0]
        for question, answer in zip(questions, answers, strict=True):
            counts[normalise_answer(question)][normalise_answer(answer)] += 1
        self.answers = {question: min(count, key=lambda answer: (-count[answer], answer))
                        for question, count in counts.items()}

    def __call__(self, question):
        return self.answers.get(normalise_answer(question), self.most)


class AnswerHead(nn.Sequential):
    """Dropout, Linear to twice the width, LayerNorm, GELU, dropout, Linear.

    (B, D + 2*W) -> scores (B, answers)
    """

    def __init__(self, visual_width, text_width, answers, drop=0.5):
        width = visual_width + 2 * text_width
        super().__init__(Dropout(drop), nn.Linear(width, 2 * width), nn.LayerNorm(2 * width),
                         nn.GELU(), Dropout(drop), nn.Linear(2 * width, answers))


class VideoQA(nn.Module):
    """A video-text model that answers questions.

    clip     clip_video.VideoCLIP
    decoder  caption_decoder.CaptionDecoder of the same widths
    answers  list of str: the possible answers
    drop     dropout probability in the head

    The parts that only the contrastive loss and captioning need are frozen: both projections, the
    scale, the decoder's layers that predict words. They stay in the model, so that runs contain all
    weights of both components.
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
        """The arguments of the constructor, for config.json."""
        return {"model": "VideoQA", "clip": self.clip.config,
                "caption_decoder": self.caption_decoder.config, "answers": self.answers}

    def forward(self, video, ids):
        """Score every answer.

        video    (B, C, T, H, W) float, normalised with clip.mean and clip.std
        ids      (B, L) int64, token numbers of the questions
        returns  scores (B, answers)
        """
        feature, tokens = self.clip.visual.encode(video)                 # (B, D), (B, t, 1+S, D)
        words, at_end = self.clip.text.tokens(ids), self.clip.text.at_end               # (B, L, W)
        hidden = self.caption_decoder.hidden(tokens.flatten(1, 2), words)               # (B, L, W)
        return self.head(torch.cat([at_end(hidden, ids), self.clip.visual_norm(feature),
                                    at_end(words, ids)], dim=-1))

    @classmethod
    def from_run(cls, folder, drop=0.0):
        """Load a run of `answer`, in eval mode. drop: dropout for further training. Raises
        WeightsError."""
        def make(config):
            return cls(clip_video.VideoCLIP.from_config(config["clip"]),
                       caption_decoder.CaptionDecoder.from_config(config["caption_decoder"]),
                       config["answers"], drop)

        return weights.load_run(make, folder, "VideoQA", "answer")


# ------------------------------------------------------------------------------------------------
# Measuring and training


@torch.no_grad()
def evaluate(scores_of, batches, answers):
    """Answer held-out questions: [(question, correct answer, answer of the model), ...], in order.

    scores_of  function of a batch -> (B, answers)
    batches    dicts with the lists "question" and "answer", and "number"
    answers    the possible answers, in the order of the scores
    """
    rows = []
    for batch in batches:
        chosen = scores_of(batch).argmax(dim=1).tolist()
        rows.append((batch["number"], [
            (question, normalise_answer(answer), answers[i])
            for question, answer, i in zip(batch["question"], batch["answer"], chosen)]))
    return [row for _, part in processes.gather_rows(rows) for row in part]


@dataclass
class Answering(SentenceStage, name="answer"):
    """Video question answering: a head on the caption decoder and both encoders. All parts train.

    InternVideo, Sec. 4.4, video question answering. The questions are about moving shapes, or come
    from a file of `video, question, answer`. Then, for one video:
    python tools/predict.py VIDEO --question QUESTION --weights RUN"""

    weights: str = flag("", "the video-text model: a run of clip, InternVideo-MM weights, or a run "
                        "of this stage")
    steps: int = flag(600, paper="20 epochs")
    batch_size: int = flag(32, "questions per process and step", paper="512 in all")
    lr: float = flag(1e-3, paper="1e-5")
    head_scale: float = flag(3.0, "factor on the learning rate of the head", paper="10", low=0)
    weight_decay: float = flag(0.01, paper="0.01")
    warmup: float = flag(0.1, paper="0.1")
    answers: int = flag(1500, "number of possible answers, the most frequent ones of training",
                        paper="1,000 to 1,540", low=2)
    drop: float = flag(0.1, "dropout in the head", paper="0.5", low=0, high=1)
    data: str = flag("", "a file with questions: JSON, JSONL or CSV with video, question and "
                     "answer; default: questions about moving shapes")
    num_frames: int = flag(0, "frames per clip; 0 = those of --weights", low=0, paper="8")
    input_size: frame_size = flag(0, "height and width in pixels, or HxW; 0 = that of --weights",
                                  low=0)
    sampling: str = flag("segment", paper="internvideo")
    transform: str = flag("plain", paper="internvideo")
    eval_clips: int = flag(1000, "held-out questions per evaluation")
    eval_every: int = flag(500)

    generated = "QuestionShapes"

    @functools.cached_property
    def parts(self):
        """(video-text encoders, caption decoder, a trained VideoQA or None) from --weights."""
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
        """Clips with one question each, of the model's input size."""
        config = self.parts[0].config
        self.num_frames = self.num_frames or config["frames"]
        size = spelled(config["image_size"])
        if self.input_size not in (0, size):
            raise UserError(f"--input-size {self.input_size}: {self.weights} is for {size} pixels; "
                            "leave it out")
        self.input_size = size
        train_set, held_out = self.open_sets(flip=False)
        held_out["val"].training_questions()  # an error if the list has no questions
        return train_set, held_out

    def build(self, train_set):
        """The trained model of --weights, or a new head on its video-text model."""
        clip, decoder, model = self.parts
        self.read_tokenizer(clip.config)
        pairs = train_set.training_questions()
        self.baseline = QuestionOnly(*zip(*pairs))
        table = answer_table((answer for _, answer in pairs), self.answers)
        model = model or VideoQA(clip, decoder, table, self.drop)
        self.table_size = len(model.answers)
        model.clip.recompute(self.recompute)
        return model

    def untrained(self):
        """A new head, if --weights is a video-text model."""
        return "" if self.parts[2] else "a new head"

    def scale_of(self, model, name):
        """Factor on the learning rate of a parameter: --head-scale for the head."""
        return self.head_scale if name.startswith("head.") else 1.0

    def scores(self, model, batch):
        """Scores of all answers, (B, answers) float32."""
        video = transforms.normalise(batch["video"], model.clip.mean, model.clip.std)
        ids, _ = self.bpe.encode(batch["question"], model.clip.config["context"], trim=True)
        with self.autocast():
            return model(video, ids.to(video.device)).float()

    def loss(self, model, batch, rng):
        """Cross-entropy over the answers. A question whose answer is not in the table is ignored.
        """
        scores = self.scores(model, batch)
        number = {answer: i for i, answer in enumerate(model.answers)}
        answers = map(normalise_answer, batch["answer"])
        target = torch.tensor([number.get(answer, -1) for answer in answers], device=scores.device)
        count = (target >= 0).sum()
        count = processes.mean(count) if model.training else count
        loss = torch.nn.functional.cross_entropy(scores, target, ignore_index=-1, reduction="sum")
        loss = loss / count.clamp(min=1)
        return loss, {"loss": loss.detach()}

    def evaluate(self, model, batches, held_out_set):
        """Accuracy in percent, and "rows" as `evaluate` returns them."""
        rows = evaluate(functools.partial(self.scores, model), batches, model.answers)
        correct = [predicted == answer for _, answer, predicted in rows]
        return {"accuracy": 100 * sum(correct) / len(correct), "rows": rows}

    def finish(self, model, held_out, results):
        """Print a table of accuracies by kind of question. Its two baselines are `QuestionOnly`,
        and the most frequent answer to everything."""
        kinds, numbers = {}, {}
        for question, answer, predicted in results["val"]["rows"]:
            words = question.lower().split()
            correct = (predicted == answer, self.baseline(question) == answer,
                       self.baseline.most == answer)
            for kind in ("all questions", words[0] if self.data else " ".join(words[:2])):
                kinds.setdefault(kind, []).append(correct)
        print(f"{'accuracy in percent':24s}{'questions':>10s}{'answered':>10s}"
              f"{'question only':>15s}{'commonest answer':>18s}")
        for kind, correct in sorted(kinds.items(), key=lambda item: -len(item[1])):
            answered, alone, commonest = (100 * np.mean(correct, axis=0)).tolist()
            print(f"{kind:24s}{len(correct):10d}{answered:10.1f}{alone:15.1f}{commonest:18.1f}")
            numbers[kind.replace(" ", "_")] = answered
            if kind == "all questions":
                numbers |= {"question_only": alone, "commonest_answer": commonest}
        return numbers

    def protocol(self, held_out):
        """How the accuracy is measured, for metrics.json."""
        return self.clips_protocol(held_out) | {
            "answers": f"open-ended: one of the {self.table_size} most frequent answers of "
                       "training, compared in lower case without punctuation; others count as "
                       "wrong"}

    @torch.no_grad()
    def pictures(self, model, batch, folder, results):
        """answers.png: clips with the question, the correct answer and the model's answer."""
        answers = [model.answers[i] for i in self.scores(model, batch).argmax(dim=1).tolist()]
        pairs = [" ".join(pair) for pair in zip(batch["question"], batch["answer"])]
        return pictures.captions(batch["video"].cpu().numpy(), pairs, answers,
                                 folder / "answers.png")
