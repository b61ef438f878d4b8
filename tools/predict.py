"""Predict something about one video with a trained model. The weights determine what.

    python tools/predict.py VIDEO --weights RUN_OR_FILE

| weights hold | prediction |
| --- | --- |
| VideoMAE | a reconstruction of the video from its visible part (.png, .gif) |
| VideoClassifier, AttentiveProbe | the most likely answers to each question |
| UniFormerV2 | the same, and where its global token attends |
| VideoText, VideoCLIP | with --text: which text fits; else a caption, and attention per word |
| InternVideo | answers of each encoder and of both, gates, cross-model attention |
| Localiser | segments of a video of any length |
| VideoQA | answers to --question |

RUN_OR_FILE is the folder of a run of train.py, or an official file of weights. Without VIDEO a clip
is generated, and its true caption or answer is printed. The model determines the number of frames
and pixels of the clip. The frames are spread over the video. A user's error gives one line and the
exit code 2.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import caption_decoder  # noqa: E402
import clip_video  # noqa: E402
import mae  # noqa: E402
import weights  # noqa: E402
from engine import pictures  # noqa: E402
from engine.errors import UserError, printable  # noqa: E402
from tasks import (  # noqa: E402
    caption_search, captioning, localisation, predictions, question_answering, reconstruction,
    two_encoders)
from video import moving_shapes  # noqa: E402
from video.clips import one_clip  # noqa: E402
from video.decoding import Video  # noqa: E402
from video.sampling import segment_indices  # noqa: E402
from video.transforms import normalise  # noqa: E402
from weights.tokenizer import tokenizer_of  # noqa: E402


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description="Predict something about one video with a trained model.")
    parser.add_argument("video", nargs="?", help="a video file; default: a generated clip")
    parser.add_argument("--weights", required=True, metavar="RUN_OR_FILE",
                        help="folder of a run, or a file of official weights")
    parser.add_argument("--text", nargs="+", action="extend", metavar="TEXT",
                        help="video-text models: which of these texts fits; default: a caption")
    parser.add_argument("--question", help="VideoQA: a question about the video")
    parser.add_argument("--method", default="greedy", choices=("greedy", "beam", "nucleus"),
                        help="how a caption is generated (default: greedy)")
    parser.add_argument("--max-tokens", type=int, default=30,
                        help="maximum tokens of a caption (default: 30)")
    parser.add_argument("--mask-ratio", type=float, default=0.75,
                        help="VideoMAE: share of each frame to hide, 0 to 1 (default: 0.75; "
                             "paper: 0.9)")
    parser.add_argument("--top", type=int, help="number of answers or segments to print")
    parser.add_argument("--min-score", type=float, default=0.2,
                        help="Localiser: lowest score of a segment to print, 0 to 1 (default: 0.2)")
    parser.add_argument("--frames", type=int,
                        help="video-text models: frames of the clip; default: those of the weights")
    parser.add_argument("--tokenizer",
                        help="tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the "
                             "one beside the weights")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the generated clip, of the mask, of --method nucleus")
    parser.add_argument("--out", default="runs/prediction.png", metavar="PICTURE.png",
                        help="file for the picture (default: runs/prediction.png)")
    return parser


# ------------------------------------------------------------------------------------------------
# Shared by all models


def model_in(source):
    """Name of the model in a run or a file, from its configuration or else from its tensors."""
    tensors, config = weights.read(source)
    if config.get("model"):
        return config["model"]
    _, loaders = weights.describe(tensors)
    if not loaders:
        raise UserError(f"{source}: not a file of a known family of weights")
    return loaders[0]


def clip_for(args, frames, size, sampling="segment"):
    """A clip of the video or a generated one, uint8 (T, H, W, 3). Prints the caption of the latter.
    """
    if args.video:
        return one_clip(args.video, frames, size, sampling)
    item = moving_shapes.MovingShapes("test", frames, size, args.seed)[0]
    print(f"a generated clip: {item['caption']}")
    return item["video"]


def as_input(clip, model):
    """uint8 (T, H, W, 3) -> float (1, 3, T, H, W), normalised as the model expects."""
    return normalise(torch.as_tensor(clip)[None], model.mean, model.std)


def picture_path(args):
    """The path of the picture. Makes its folder."""
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ------------------------------------------------------------------------------------------------
# One function for each model


def reconstruct(args):
    """VideoMAE: hide most of the clip, and draw its reconstruction."""
    model = mae.VideoMAE.from_official(args.weights).eval()
    T, size = model.config["frames"], model.config["image_size"]
    t, h, w = model.grid
    if not 0 < int(args.mask_ratio * h * w) < h * w:
        raise UserError(f"--mask-ratio {args.mask_ratio}: must leave at least one of the "
                        f"{h * w} places of a frame visible and hide at least one")
    clip = torch.as_tensor(clip_for(args, T, size, "dense"))[None]
    video = normalise(clip, mae.IMAGENET_MEAN, mae.IMAGENET_STD)
    hidden = mae.tube_mask(1, model.grid, args.mask_ratio,
                           torch.Generator().manual_seed(args.seed))
    config = model.config
    target = mae.reconstruction_target(video, hidden, config["normalised"],
                                       patch=model.encoder.patch, tubelet=model.encoder.tubelet)
    loss = mae.reconstruction_loss(model(video, hidden), target)
    print(f"{int(hidden[0, :h * w].sum())} of {h * w} places of every frame are hidden; "
          f"loss on this clip {loss:.3f}")
    drawn = reconstruction.reconstruction_pictures(model, video, hidden)
    still, moving = pictures.reconstruction(drawn, picture_path(args),
                                            borrowed=config["normalised"])
    print(f"drawn: {still} and {moving}")


def classify(args):
    """VideoClassifier, AttentiveProbe: print the most likely answers to each question."""
    answer_questions(args)


def classify_multimodal(args):
    """UniFormerV2: print the most likely answers, and draw where the global token attends."""
    model, clip = answer_questions(args)
    maps = global_attention(model, as_input(clip, model))
    if maps:
        path = picture_path(args)
        pictures.attention_maps(clip, torch.cat(list(maps.values())),
                                [f"after layer {i}" for i in maps],
                                "where the global token attends", path)
        print(f"drawn: {path}")


def global_attention(model, video):
    """{layer: attention map of its global block, (B, t, h, w)}. Without class tokens, so the sum of
    a map is at most 1."""
    state, maps = model.start(video), {}
    for i in range(model.depth):
        query, state = state.query, model.run(state, i, i + 1)
        if i in model.global_layers:
            block = model.global_blocks[model.global_layers.index(i)]
            weights = block.attention_map(query, state.tokens, model.grid)
            maps[i] = weights[:, :, 1:].unflatten(2, model.grid)
    return maps


def answer_questions(args):
    """Print the most likely answers of a classifier. Returns the model and the clip."""
    classifier = predictions.Classifier(args.weights)
    clip = clip_for(args, classifier.frames, classifier.size)
    probabilities = classifier.probabilities(classifier.scores(clip[None]))
    predictions.print_likeliest(probabilities, classifier.classes, args.top or 3)
    return classifier.model, clip


def describe(args):
    """VideoText, VideoCLIP: print which text of --text fits, or a caption with attention maps."""
    model = clip_video.VideoCLIP.from_official(args.weights, frames=args.frames).eval()
    config = model.config
    if not args.text:
        decoder = caption_decoder.CaptionDecoder.from_official(args.weights)
        model = caption_decoder.VideoText(model, decoder).eval()
    tokenizer = tokenizer_of(args.weights, args.tokenizer, config["vocabulary"])
    clip = clip_for(args, args.frames or config["frames"], config["image_size"])
    (match if args.text else caption)(args, model, tokenizer, clip)


def match(args, model, tokenizer, clip):
    """Print a probability for each text, the highest first; clip (T, H, W, 3)."""
    ids, _ = tokenizer.encode(args.text, model.config["context"])
    classes = F.normalize(model.encode_text(ids), dim=-1)[None]
    video = model.encode_video(as_input(clip, model))
    shares = clip_video.zero_shot(video, classes, model.logit_scale)[0]
    for share, text in sorted(zip(shares.tolist(), args.text), reverse=True):
        print(f"{share:8.4f}  {text}")


def caption(args, model, tokenizer, clip):
    """Print a caption of a clip (T, H, W, 3), and draw where the model attends for each word."""
    video, context = as_input(clip, model.clip), model.clip.config["context"]
    search = {"greedy": None, "beam": caption_search.Beams(tokenizer.end),
              "nucleus": caption_search.Nucleus(
                  generator=torch.Generator().manual_seed(args.seed))}[args.method]
    sentence, = model.caption(video, tokenizer, min(args.max_tokens, context - 1), search=search)
    print(sentence)
    if model.clip.kind == "joint":  # its tokens do not belong to single frames
        return
    path = picture_path(args)
    captioning.draw_attention(model, clip, video, sentence, tokenizer, path)
    print(f"drawn: {path}")


def fuse(args):
    """InternVideo: print the answers of each encoder and of both, gates and shares; draw
    cross-model attention."""
    classifier = predictions.Classifier(args.weights)
    model = classifier.model
    clip = torch.as_tensor(clip_for(args, classifier.frames, classifier.size))[None]
    scores = model.scores(clip)                                             # (1, Y) each
    names = ["masked", *["multimodal"] * len(model.multimodal), "together"]
    for name, score in zip(names, [*scores, model.combine(scores)]):
        predictions.print_likeliest(classifier.probabilities(score), classifier.classes,
                                    args.top or 3, f"{name:11s} ")
    print("weights of the scores: "
          + ", ".join(f"{weight:.2f}" for weight in model.score_weights().tolist()))
    for name, gate in model.named_parameters():
        if "gate_" in name:
            print(f"{name:45s} tanh = {float(gate.tanh()):+.3f}")
    if model.before:
        path = picture_path(args)
        two_encoders.draw_attention(model, clip, path)
        print(f"drawn: {path}")


def localise(args):
    """Localiser: print the segments of a video of any length, and draw them over time."""
    model = localisation.Localiser.from_run(args.weights)
    if model.encoder is None:
        raise UserError(f"--weights {args.weights}: was trained on features from files and has no "
                        "encoder for a video; train it with --weights as well")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    find = segments_of_file if args.video else segments_of_generated
    name, frames, duration, true, segments, strip = find(args, model)
    best = segments[segments[:, 2] >= args.min_score]
    print(f"{name}: {duration:.1f} s, {frames} frames, one step per {model.stride} frames; "
          f"{len(segments)} segments, {len(best)} with a score of {args.min_score:g} or more")
    best = best[:args.top or 20]
    for start, end, score, label in best[np.argsort(best[:, 0])]:
        print(f"{start:9.2f} s to {end:9.2f} s   {score:4.0%}  {model.names[int(label)]}")
    path = picture_path(args)  # after printing, because this may fail
    clearest = localisation.clearest(segments, args.min_score)
    pictures.segments([(Path(name).name, strip(), duration, true, clearest)], model.names, path)
    print(f"drawn: {path}")


def segments_of_file(args, model):
    """Find the segments of args.video.

    returns  (name, number of frames, duration in s, true segments or None, found segments (n, 4),
             function that returns a strip of frames for the picture)
    """
    with Video(args.video) as video:
        info = video.info
        with tqdm(total=info.frames, unit="frame", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
            segments = model.find(video, tick=bar.update)

    def strip():
        indices = dict.fromkeys(segment_indices(info.frames, 12).tolist())
        with Video(args.video, info) as video:
            return np.concatenate(list(video.read(list(indices), 90)), axis=1)

    return args.video, info.frames, info.duration, None, segments, strip


def segments_of_generated(args, model):
    """As `segments_of_file`, for a generated video, with its true segments."""
    world = moving_shapes.LongShapes("test", model.encoder.config["image_size"], args.seed)
    if list(model.names) != list(world.motions):
        raise UserError(f"--weights {args.weights}: knows other classes than the generated videos; "
                        "give a video")
    item = world[0]
    video, duration = item["video"], item["duration"]
    for start, end, label in item["segments"]:
        print(f"true: {start:9.2f} s to {end:9.2f} s   {model.names[label]}")
    segments = model.find_in(video, np.arange(len(video)) / world.FPS, duration)
    return (item["path"], len(video), duration, item["segments"], segments,
            lambda: pictures.strip(video, 24))


def answer(args):
    """VideoQA: print the most likely answers to --question, or to a generated question."""
    model = question_answering.VideoQA.from_run(args.weights)
    config = model.clip.config
    tokenizer = tokenizer_of(args.weights, args.tokenizer, config["vocabulary"])
    T, (H, W) = config["frames"], config["image_size"]
    if args.video:
        if not args.question:
            raise UserError(f"{args.weights}: answers questions; give one with --question")
        clip, question = one_clip(args.video, T, (H, W)), args.question
    else:
        item = moving_shapes.QuestionShapes("test", T, (H, W), args.seed)[0]
        clip, question = item["video"], args.question or item["question"]
        print(f"a generated clip; the answer to {item['question']!r} is {item['answer']!r}")
    ids, _ = tokenizer.encode([question], config["context"], trim=True)
    shares = model(as_input(clip, model.clip), ids)[0].softmax(dim=-1)
    print(f"protocol: one view of {T} frames, spread over the video, {H} x {W} px; softmax over "
          f"the {len(shares)} answers of the training set")
    for share, i in zip(*map(torch.Tensor.tolist, shares.topk(min(args.top or 5, len(shares))))):
        print(f"{100 * share:5.1f} %  {model.answers[i]}")


MODELS = {  # name in a run's configuration -> function of the arguments
    "VideoMAE": reconstruct,
    "VideoClassifier": classify,
    "UniFormerV2": classify_multimodal,
    "AttentiveProbe": classify,
    "VideoCLIP": describe,
    "VideoText": describe,
    "InternVideo": fuse,
    "Localiser": localise,
    "VideoQA": answer,
}


@torch.no_grad()
def main(argv=None):
    """The command. Returns the exit code: 0, or 2 for a user's error."""
    args = parser().parse_args(argv)
    try:
        for flag, value, least in (("--top", args.top, 1), ("--frames", args.frames, 1),
                                   ("--max-tokens", args.max_tokens, 1), ("--seed", args.seed, 0)):
            if value is not None and value < least:
                raise UserError(f"{flag} {value}: must be at least {least}")
        if Path(args.out).suffix != ".png":
            raise UserError(f"--out {args.out}: must end in .png")
        model = model_in(args.weights)
        predict = MODELS.get(model)
        if predict is None:
            raise UserError(f"{args.weights}: holds {model}, which this command does not support; "
                            f"give weights of {', '.join(MODELS)}")
        if args.question and predict is not answer:
            raise UserError(f"--question: {args.weights} holds {model}; give a run of "
                            "train.py answer")
        if (args.text or args.frames) and predict is not describe:
            raise UserError(f"--text, --frames: {args.weights} holds {model}; give a video-text "
                            "model")
        torch.manual_seed(args.seed)
        predict(args)
    except (ValueError, OSError) as error:  # UserError is a ValueError
        print(f"predict.py: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
