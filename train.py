"""Every stage of InternVideo, side by side, driven by one loop.

    python train.py                       the default run: every stage, on built-in clips, on a CPU
    python train.py --seed 1 --out DIR    ... again, with other random numbers
    python train.py mae                   one stage; `python train.py mae --help` lists its flags
    python train.py mae --data DIR        ... on your videos
    python train.py clip --data LIST      videos and sentences: CSV with a header `path,caption`, or JSONL
    python train.py classify --weights RUN --data DIR       fine-tune or probe either encoder
    python train.py fuse --masked RUN --multimodal RUN      the bridge between two of them
    python train.py localise --weights RUN         what happens when, in long videos; the encoder stays frozen
    python train.py answer --weights RUN           questions about videos
    python train.py mae --steps 0 --weights RUN    evaluate only
    python train.py mae --resume          go on where the last run stopped
    torchrun --nproc-per-node 8 train.py mae --data DIR     the same on eight GPUs; see processes.py

Why: the stages differ in model, data, loss and recipe, and in nothing else. So each is a card: a
dataclass whose fields are the recipe (and, generated from them, the flags) and whose methods are
the behaviour. One loop, `fit`, runs any card and knows none by name.

    card.build() ----------> model --+
    card.datasets() --batches--------+--> fit: loss, backward, clip, optimiser, schedule, log,
    card.loss(model, batch, rng) ----+         evaluate, checkpoint, resume ----> out/

The idea, in steps:
1. `Stage` holds the knobs that all stages share; a card adds its own and overrides defaults.
2. Equations live in the components (mae.reconstruction_loss), choices on the cards (mask ratio).
3. Randomness is a function of (seed, step) alone: masks, dropout and the choice of clips are drawn
   from generators seeded so. There is no loader state to save, and a run that was killed and
   resumed on the same processor, with as many threads, ends with the same weights, bit for bit. Nor does it matter how many workers load clips,
   or, within rounding, how many processes share a batch. (Tar shards alone are not repeatable so.)
4. Evaluation seeds itself: the same held-out clips, the same masks, every time.
5. What goes wrong ends in one line: a `UserError` of the user's, exit code 2; a `RunError` of the machine
   or of the numbers, exit code 1, which says where the last good checkpoint is.

What lies in --out afterwards: `log.jsonl` (a line per logged step), `metrics.json` (the last
evaluation and the settings), `model.safetensors` with `config.json` (what others load), `last.pt`
(what --resume needs), `last.1.pt` (the one before it, in case that is damaged) and the pictures.

Numbers: the default run takes minutes on two CPU cores; README.md has the table it prints.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import pkgutil
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from video import annotations
import attention
import caption_decoder
from tasks import captioning
import clip_video
import data
from video import moving_shapes
from engine import pictures
import fusion
from tasks import localisation
import mae
from engine import machine, processes
from tasks import question_answering
import tasks
import uniformerv2
import weights
from attention import Attention, Block
from engine.checkpoints import recipe_of
from engine.command_line import Parser, exit_code, parse, text_of
from engine.dry_run import dry_run
from engine.errors import UserError, printable
from engine.evaluation import to_device, weighted_mean
from engine.optimisers import build_optimizer, clip_gradients, learning_rate
from engine.run import Run, add_means, one_line_errors
from engine.stage import STAGES, Stage, flag, generator


# ------------------------------------------------------------------------------------------------
# The cards

class OldCard(Stage):
    """ADAPTER, to be deleted when the cards have the new interface: build(), datasets(), evaluate(model, batches),
    finish(model), pictures(model, batch, folder), note(), prepare(model) behind the methods of Stage."""

    def __init_subclass__(cls, name=None, **options):
        for field in vars(cls).values():
            if isinstance(field, dataclasses.Field) and "help" in field.metadata:
                text, more = field.metadata["help"], {}
                for prefix, only in (("files: ", "files"), ("moving shapes: ", "generated")):
                    if text.startswith(prefix):
                        text, more["only"] = text[len(prefix):], only
                if found := re.search(r" \(papers?: (.*)\)$", text):
                    text, more["paper"] = text[:found.start()], found[1]
                field.metadata = dict(field.metadata, help=text, **more)
        super().__init_subclass__(name, **options)

    def build(self, train_set=None):
        return self.__dict__.pop("built", None) or self.old_build()

    def datasets(self):
        self.built = self.old_build().to(self.device if self.device != "auto" else "cpu")
        if self.out and not self.dry_run:
            with contextlib.suppress(OSError, ValueError):
                Path(self.out).mkdir(parents=True, exist_ok=True)
        train_set, held_out_set = self.old_datasets()
        sets = {"val": held_out_set}
        if not self.data and isinstance(self, (Clip, Labels)) and not isinstance(self, Retrieve):
            sets["unseen"] = moving_shapes.MovingShapes("unseen", self.num_frames, self.input_size, self.seed)
        return train_set, sets

    def evaluate(self, model, batches, held_out_set=None):
        if not hasattr(self, "old_evaluate"):
            return super().evaluate(model, batches, held_out_set)
        if getattr(held_out_set, "split", "") == "unseen":
            return self.unseen
        found = self.old_evaluate(model, batches)
        self.unseen = {name[7:]: value for name, value in found.items() if name.startswith("unseen_")}
        return {name.removeprefix("val_"): value for name, value in found.items() if not name.startswith("unseen_")}

    def prepare(self, model, train_set):
        if hasattr(self, "old_prepare"):
            self.old_prepare(model)

    def protocol(self, held_out):
        return {"note": self.note()} if self.note() else {}

    def note(self):
        return self.old_note()

    def old_note(self):
        return ""

    def finish(self, model, held_out, results):
        return self.old_finish(model)

    def old_finish(self, model):
        return {}

    def pictures(self, model, batch, folder, results):
        return self.old_pictures(model, batch, folder)




@dataclass
class MAE(OldCard, name="mae"):
    """Stage one: masked video modelling (InternVideo, Sec. 3.2; VideoMAE, arXiv 2203.12602).

    Hide most of each clip in tubes, paint it back, keep the encoder."""

    steps: int = flag(1500, "optimiser steps; 0 = evaluate only (paper: 800 to 1600 epochs of Kinetics-400)",
                      low=0)
    lr: float = flag(0.0, "learning rate as it is; overrides --blr when above 0", low=0)
    blr: float = flag(8e-2, "learning rate at 256 clips a step; scaled by clips/256 (paper: 1.5e-4, AdamW)", low=0)
    warmup: float = flag(0.05, "share of the steps that warm up linearly from 0 (paper: 40 of 800 epochs)",
                         low=0, high=1)
    batch_size: int = flag(16, "clips per process and step (paper: 1024 in all)", low=1)
    beta2: float = flag(0.95, "AdamW second-moment decay (paper: 0.95)", low=0, high=0.999999)
    model: str = flag("tiny", "size of the network (paper: base, large, huge)", choices=tuple(mae.SIZES))
    num_frames: int = flag(8, "frames per clip (paper: 16)", low=1, high=10**4)
    input_size: int = flag(40, "height and width in pixels (paper: 224)", low=1, high=10**4)
    sampling_rate: int = flag(4, "a clip takes every n-th frame of a video (paper: 4; 2 on Something-Something)",
                              low=1)
    sampling: str = flag("dense", "dense = neighbouring frames, segment = spread over the video; the others are those "
                         "of the published models (paper: videomae-pretrain)", choices=tuple(data.SAMPLINGS))
    transform: str = flag("plain", "files: how frames are resized and cropped; plain is ours, the others are those of "
                          "the published models (paper: videomae-pretrain)", choices=tuple(data.TRANSFORMS))
    mask_ratio: float = flag(0.75, "share of each frame that is hidden; leaves 7 of 25 places at 40 px (paper: "
                             "0.9, which leaves 20 of 196 at 224 px)", low=0, high=1)
    mask_type: str = flag("tube", "tube = same places in every frame (paper: tube)", choices=tuple(mae.MASKS))
    dual_mask: bool = flag(False, "decode half of the tokens only (VideoMAE V2, running cells)")
    normalise: bool = flag(True, "targets with mean 0 and variance 1 per tubelet and channel (paper: yes)")
    positions: str = flag("axes", "position codes: axes = of time, row and column; sinusoid = of the token's number "
                          "(paper: sinusoid)", choices=("axes", "sinusoid"))
    space_time: str = flag("joint", "attention of the encoder: joint = every token sees every other; divided = over time, then "
                           "over space (paper: joint)", choices=("joint", "divided"))
    decoder_depth: int = flag(0, "decoder blocks; 0 = as the size says (paper: 4; 12 for large)", low=0)
    decoder_width: int = flag(0, "width of the decoder; 0 = as the size says (paper: half of the encoder's)", low=0)
    drop_path: float = flag(0.0, "share of samples that skip a block (paper: 0)", low=0, high=1)
    pack_frames: str = flag("", "train on clips of several lengths, drawn for each clip, in one row without padding, "
                            "as 4,6,8: at most --num-frames (paper: all the same)")
    pack_ratios: str = flag("", "the same for mask ratios, as 0.6,0.75,0.9 (paper: all the same)")
    pack = None  # both lists, once `build` has read them

    def old_build(self):
        if self.weights:
            model = mae.VideoMAE.from_official(self.weights, frames=self.num_frames,
                                               image_size=self.input_size)
            size = model.config["size"]
            self.check_against_weights(normalise=model.config["normalised"])
            self.normalise = model.config["normalised"]
            self.check_against_weights(positions=model.config["positions"], space_time=model.config["space_time"],
                      decoder_depth=size["decoder_depth"], decoder_width=size["decoder_width"], drop_path=0.0,
                      model=size_named(size, mae.SIZES))
        else:
            size = mae.SIZES[self.model]
            if self.decoder_depth:
                size = dataclasses.replace(size, decoder_depth=self.decoder_depth)
            if self.decoder_width:
                if self.decoder_width % size.decoder_heads:
                    raise UserError(f"--decoder-width {self.decoder_width}: must be a multiple of the {size.decoder_heads} heads")
                size = dataclasses.replace(size, decoder_width=self.decoder_width, decoder_mlp_width=4 * self.decoder_width)
            try:
                model = mae.VideoMAE(size, frames=self.num_frames, image_size=self.input_size,
                                     positions=self.positions, drop_path=self.drop_path,
                                     normalised=self.normalise, space_time=self.space_time)
            except ValueError as error:
                raise UserError(f"--num-frames, --input-size: {error}") from None
        t, h, w = model.encoder.grid_of(self.num_frames, self.input_size, self.input_size)
        frames, ratios = numbers(self.pack_frames, "pack-frames"), numbers(self.pack_ratios, "pack-ratios", float)
        for T in frames or ():
            if T % model.encoder.tubelet or not 0 < T <= self.num_frames:
                raise UserError(f"--pack-frames {self.pack_frames}: {T} is not a multiple of {model.encoder.tubelet} "
                              f"up to --num-frames {self.num_frames}")
        if (frames or ratios) and (self.dual_mask or self.drop_path):
            raise UserError("--pack-frames, --pack-ratios: not with --dual-mask or --drop-path, which treat rows, not clips")
        self.pack = (frames or [self.num_frames], ratios or [self.mask_ratio]) if frames or ratios else None
        for name, values in (("mask-ratio", [self.mask_ratio]), ("pack-ratios", ratios or ())):
            shortest = min(frames or [self.num_frames]) // model.encoder.tubelet
            places, unit = (shortest, "frames") if self.mask_type == "frame" else (h * w, "places of a frame")
            for ratio in values:
                if not 0 < int(ratio * places) < places:
                    raise UserError(f"--{name} {ratio}: must hide at least one of the {places} {unit} "
                                  "and leave at least one")
        if model.config["space_time"] == "divided" and (self.mask_type != "tube" or self.pack):
            raise UserError("--space-time divided: every frame must show the same places; only with --mask-type tube, not with "
                          "--pack-frames or --pack-ratios")
        if self.dual_mask and (h % 2 or w % 2):
            raise UserError(f"--dual-mask: needs an even token grid, this one is {h} x {w}")
        model.recompute(self.recompute)
        return model

    def old_datasets(self):
        return clips(self, self.num_frames, self.input_size, self.sampling, self.sampling_rate, transform=self.transform)

    def loss(self, model, batch, rng):
        video = batch["video"].permute(0, 4, 1, 2, 3)                        # (B, 3, T, H, W), still bytes
        if self.pack and model.training:
            return self.packed_loss(model, video, rng)
        grid = model.encoder.grid_of(*video.shape[2:])
        rows, mine = processes.joined(len(video)) if model.training else (len(video), slice(None))
        hidden = mae.MASKS[self.mask_type](rows, grid, self.mask_ratio, rng)[mine]
        patch, tubelet = model.encoder.patch, model.encoder.tubelet
        wanted, skipped, weight, count = hidden, None, None, None
        if self.dual_mask:
            skipped = mae.running_cell_mask(rows, grid, rng)[mine]
            wanted = ~skipped
            weight = mae.gather(hidden[..., None], mae.split(wanted)[1])[..., 0].to(video.device)
            count = processes.mean(weight.float().sum()) if model.training else None
        index = mae.split(wanted)[1].to(video.device)
        target = self.faster(mae.target_of)(video, index, self.normalise, patch, tubelet)
        with self.autocast():
            prediction = model(video, hidden, skipped)
        loss = mae.reconstruction_loss(prediction, target, weight, count=count)
        metrics = {"loss": loss.detach()}
        if self.normalise and not model.training:
            metrics["trivial_loss"] = mae.reconstruction_loss(torch.zeros_like(target), target, weight)
        return loss, metrics

    def packed_loss(self, model, video, rng):
        """The mean over all hidden numbers of all clips, so that a long clip counts as much as its tubelets do."""
        rows, mine = processes.joined(len(video))
        patch, tubelet = model.encoder.patch, model.encoder.tubelet
        lengths, ratios = ([choices[i] for i in torch.randint(len(choices), (rows,), generator=rng)] for choices in self.pack)
        hidden = [mae.MASKS[self.mask_type](1, model.encoder.grid_of(T, *video.shape[3:]), ratio, rng)
                  for T, ratio in zip(lengths, ratios)][mine]
        videos = [clip[:, :T] for clip, T in zip(video, lengths[mine])]
        target = torch.cat([mae.reconstruction_target(clip[None], mask, self.normalise, patch=patch, tubelet=tubelet)
                            for clip, mask in zip(videos, hidden)], dim=1)[0]
        with self.autocast():
            prediction = model.packed(videos, [mask[0] for mask in hidden])
        weight = torch.ones(len(target), device=video.device)
        loss = mae.reconstruction_loss(prediction, target, weight, count=processes.mean(weight.sum()))
        return loss, {"loss": loss.detach()}

    def old_note(self):
        if not self.normalise:
            return "targets are pixels in [0, 1]: the loss is a squared brightness error"
        return ("painting every hidden tubelet with its mean alone costs 0.99 to 1.0: that is the trivial baseline. "
                "A good loss is not near 0, for fine texture and noise cannot be foreseen")

    def old_pictures(self, model, batch, folder):
        paths = []
        grid = model.encoder.grid_of(*batch["video"].shape[1:4])
        for i in range(min(4, len(batch["video"]))):
            video = data.normalise(batch["video"][i:i + 1], mae.IMAGENET_MEAN, mae.IMAGENET_STD)
            hidden = mae.MASKS[self.mask_type](1, grid, self.mask_ratio, generator(self.seed, "picture", i))
            path = folder / f"reconstruction_{i}.png"
            title = batch["caption"][i] if "caption" in batch else Path(batch["path"][i]).name
            mae.draw(model, video, hidden, path, f"held-out clip: {title}")
            paths += [path, path.with_suffix(".gif")]
        return paths


# The towers of the clip card's default run, made for four minutes on a laptop.
SMALL = uniformerv2.Size(96, 3, 4, 384, 8, 40)
SMALL_TEXT = clip_video.TextSize(96, 2, 2)
FACTS = {"motion": moving_shapes.MOTIONS, "shape": moving_shapes.SHAPES, "colour": tuple(moving_shapes.COLOURS)}


class VideoText(torch.nn.Module):
    """What the clip card trains: both encoders and the caption decoder, under the names they have in
    InternVideo's own file, so that a run is laid out like it: `clip.*` and `caption_decoder.*`.

    The two config entries rebuild the parts; each part also reads such a run by itself, with
    VideoCLIP.from_official(RUN) and CaptionDecoder.from_official(RUN)."""

    def __init__(self, clip, caption_decoder):
        super().__init__()
        self.clip, self.caption_decoder = clip, caption_decoder

    @property
    def config(self):
        return {"model": "VideoText", "clip": self.clip.config, "caption_decoder": self.caption_decoder.config}

    @classmethod
    def from_run(cls, folder):
        """Load a run of the clip card, in eval mode."""
        return cls(clip_video.VideoCLIP.from_official(folder),
                   caption_decoder.CaptionDecoder.from_official(folder)).eval()

    def to_official(self):
        """{official name: tensor}, laid out like InternVideo's own file."""
        clip = {"clip." + name: tensor for name, tensor in self.clip.to_official().items()}
        return clip | self.caption_decoder.to_official()

    def encode(self, video, ids, hidden=True):
        """video (B, C, T, H, W), ids (B, L) -> embeddings (B, E), (B, E), and, where `hidden` is wanted, what the
        decoder knows before each word, (B, L-1, W). The loss needs no more, and each clip is treated alone."""
        seen, tokens = self.clip.encode_video_tokens(video)
        read, words = self.clip.encode_text_tokens(ids)
        return (seen, read, self.caption_decoder.hidden(tokens.flatten(1, 2), words[:, :-1])) if hidden else (seen, read)

    def caption(self, video, tokenizer, maximum):
        """video (B, C, T, H, W), normalised -> B sentences, greedy."""
        _, tokens = self.clip.encode_video_tokens(video)
        return tokenizer.decode(caption_decoder.generate(
            self.caption_decoder, self.clip.text, tokens.flatten(1, 2), start=tokenizer.start,
            end=tokenizer.end, maximum=maximum))


@dataclass
class Clip(OldCard, name="clip"):
    """Stage two: which sentence belongs to which video, and write one (InternVideo, Sec. 3.2).

    Contrastive and captioning loss from one pass; batches of videos and of single pictures in turn.

    More pairs in a batch are more negatives. --accum cannot give them, for micro-batches never meet;
    --cache-size can: it encodes in pieces, compares all, and encodes each piece again to go backward."""

    steps: int = flag(2000, "optimiser steps; 0 = evaluate only (paper: 400,000)", low=0)
    lr: float = flag(2e-3, "learning rate as it is; overrides --blr when above 0 (paper: 8e-5, from CLIP's "
                           "weights)", low=0)
    warmup: float = flag(0.05, "share of the steps that warm up linearly from 0 (paper: 0.01)", low=0, high=1)
    weight_decay: float = flag(0.2, "weight decay, on matrices only (paper: 0.2)", low=0)
    beta2: float = flag(0.98, "AdamW second-moment decay (paper: 0.98)", low=0, high=0.999999)
    batch_size: int = flag(32, "pairs per process and step, each the others' negatives (paper: 14,336 videos "
                               "or 86,016 images in all)", low=1)
    accum: int = flag(1, "must stay 1: micro-batches would not be each other's negatives; see --cache-size",
                      low=1)
    cache_size: int = flag(0, "gradient caching: pairs in memory at a time, equal to the large batch; 0 = all",
                           low=0)
    eval_clips: int = flag(200, "held-out clips per evaluation", low=1)
    gallery: int = flag(100, "of these, the first so many for retrieval, which is the harder the more there are", low=2)
    eval_every: int = flag(1000, "steps between evaluations; 0 = five times in the run", low=0)
    merge: str = flag("", "with --steps 0: official weights, of the CLIP that --weights grew from, to average those with "
                          "(WiSE-FT)")
    merge_share: float = flag(0.5, "share of --merge in the average (paper: 0.5, zero-shot)", low=0, high=1)
    merge_as_published: bool = flag(False, "leave out blocks 12 and above, as the published list does")
    model: str = flag("small", "size of both towers (paper: b16, l14; small is ours)",
                      choices=("small", *clip_video.TEXT_SIZES))
    kind: str = flag("video", "video = UniFormerV2 (paper), frames = frame-wise CLIP, joint = ViCLIP",
                     choices=tuple(clip_video.KINDS))
    num_frames: int = flag(8, "frames per clip (paper: 8)", low=1, high=10**4)
    input_size: int = flag(40, "height and width in pixels (paper: 224)", low=1, high=10**4)
    sampling: str = flag("segment", "files: segment = spread over the video, dense = neighbouring frames; the others are "
                         "those of the published models (paper: internvideo)", choices=tuple(data.SAMPLINGS))
    transform: str = flag("plain", "files: how frames are resized and cropped; plain is ours, the others are those of "
                          "the published models (paper: internvideo; clip for images)", choices=tuple(data.TRANSFORMS))
    local_units: int = flag(1, "0, 1 or 2 per block, to compare neighbouring frames (paper: 0; UniFormerV2 "
                               "for motion: 2)", low=0, high=2)
    temporal_downsample: bool = flag(True, "embed three frames at a time, at every second one (UniFormerV2 "
                                            "for motion: yes)")
    global_layers: str = flag("", "layers after which a global block reads the clip, as 8,9,10,11, or none; default: the last "
                              "for small, the last four else (paper: the last four)")
    context: int = flag(32, "most tokens of a caption, start and end included (CLIP: 77)", low=3)
    vocabulary: int = flag(800, "most tokens of the vocabulary, learned from the captions (CLIP: 49,408)", low=515)
    tokenizer: str = flag("", "tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the one beside "
                              "--weights, or learned from the captions")
    prompts: str = flag("", "files with classes: a text file of sentences with {} for the class name; default: the paper's 16")
    caption_depth: int = flag(2, "layers of the caption decoder (paper: 6)", low=1)
    queries: int = flag(8, "questions that the caption decoder asks the video (official: 256)", low=1)
    caption_weight: float = flag(1.0, "weight of the captioning loss (paper: 1)", low=0)
    image_every: int = flag(2, "every n-th batch is of images; 0 = none (paper: 2, they alternate)", low=0)
    image_batch: int = flag(64, "pairs in a batch of images, per process (paper: 86,016 in all, 6 times the videos)",
                            low=1)
    image_data: str = flag("", "pictures and sentences, a list like that of --data; default: frames of the videos")
    test: int = flag(0, "moving shapes: at the end measure on so many clips of the test split, too, which no choice has ever seen", low=0)
    motion_words: float = flag(1.0, "moving shapes: share of captions that name the motion; the others say what one "
                               "frame shows, as most captions of the web do", low=0, high=1)
    freeze_text: bool = flag(False, "do not train the text tower")
    freeze_visual: bool = flag(False, "do not train the visual tower")

    def old_build(self):
        if self.accum > 1:
            raise UserError(f"--accum {self.accum}: accumulation gives a contrastive loss no more negatives, each "
                          f"micro-batch is compared with itself alone; use --batch-size "
                          f"{self.batch_size * self.accum} --cache-size {self.batch_size} --local-units 0, which takes "
                          "the same memory")
        if self.kind != "video" and not self.weights:  # these two belong to UniFormerV2 alone
            self.local_units, self.temporal_downsample = 0, False
        self.sets = self.open()
        if self.image_data and not self.image_every:
            raise UserError("--image-data: --image-every 0 asks for no images; leave out one of the two")
        self.stills = self.images() if self.image_every else None
        captions = self.check_captions()
        try:
            model = self.load() if self.weights else self.fresh(captions)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.merge and (self.steps or not self.weights):
            raise UserError("--merge: averages the weights of --weights for evaluation; give both, and --steps 0")
        if self.cache_size and self.local_units:
            raise UserError("--cache-size: the BatchNorm of --local-units looks at the whole batch at once, which "
                          "pieces cannot give it; use --local-units 0")
        longer = [text for text in captions if self.words.encode(text, 10**4, trim=True)[0].shape[1] > self.context]
        if longer:
            print(f"{len(longer)} of {len(captions)} captions are longer than --context {self.context} tokens and "
                  f"are cut, as {longer[0][:60]!r}")
        for part, frozen in ((model.clip.text, self.freeze_text), (model.clip.visual, self.freeze_visual),
                             (model.caption_decoder, self.caption_weight == 0)):
            part.requires_grad_(not frozen)
        model.clip.recompute(self.recompute)
        return model

    def open(self):
        """(training set, held-out set); of the latter each video once, with all its captions."""
        sets = clips(self, self.num_frames, self.input_size, self.sampling, flip=False, transform=self.transform)
        if not self.data:
            for world in sets:
                world.told = self.motion_words
        elif isinstance(sets[1], data.VideoFiles) and sets[1].captions and not sets[1].rows[0].candidates:
            sets[1].by_video()
        return sets

    def fresh(self, captions):
        """Everything from scratch, the vocabulary too."""
        self.words = clip_video.load_tokenizer(self.tokenizer) if self.tokenizer else \
            clip_video.train_tokenizer(captions, self.vocabulary)
        size, text, layers = self.model, self.model, None
        if size == "small":  # one global block, after the last layer: two more cost time and brought nothing
            size, text, layers = SMALL, SMALL_TEXT, (SMALL.depth - 1,)
        if self.global_layers:
            layers = self.asked_layers()
        clip = clip_video.VideoCLIP(
            size, text_size=text, kind=self.kind, global_layers=layers, frames=self.num_frames, image_size=self.input_size,
            vocabulary=self.words.vocabulary, context=self.context, end=self.words.end,
            local_units=self.local_units, temporal_downsample=self.temporal_downsample)
        return VideoText(clip, self.fresh_decoder(clip))

    def asked_layers(self):
        """--global-layers as numbers."""
        if self.kind != "video":
            raise UserError(f"--global-layers: belongs to --kind video, not {self.kind}")
        return () if self.global_layers == "none" else numbers(self.global_layers, "global-layers")

    def fresh_decoder(self, clip):
        text = clip.config["text_size"]
        return caption_decoder.CaptionDecoder(
            text["width"], heads=text["heads"], depth=self.caption_depth, visual_width=clip.config["size"]["width"],
            vocabulary=clip.config["vocabulary"], queries=self.queries)

    def load(self):
        """From a run of ours, InternVideo-MM, ViCLIP, or CLIP; CLIP and a frame-wise run grow into a video model."""
        source = clip_video.OfficialFile(self.weights)
        ours = self.steps and source.config.get("kind") == "frames"  # without steps it is measured as it is
        grow = self.kind == "video" and bool(ours or source.layout in ("CLIP", "Hugging Face CLIP"))
        if self.global_layers and not grow:
            raise UserError(f"--global-layers: {self.weights} is no image model that grows; it keeps the blocks it has")
        layers = (source.config["size"]["depth"] - 1,) if ours else None  # one global block, as in `fresh`
        layers = self.asked_layers() if self.global_layers else layers
        clip = clip_video.VideoCLIP.from_official(self.weights, frames=self.num_frames, grow=grow,
                                                  global_layers=layers if grow else None)
        if grow:
            print(f"{self.weights} is an image model: it grows into a video model (--kind frames leaves it as it is)")
        size = clip.config["image_size"]
        if self.merge:
            try:
                clip_video.merge(clip, clip_video.VideoCLIP.from_official(self.merge), self.merge_share,
                                 as_published=self.merge_as_published)
            except ValueError as error:
                raise UserError(f"--merge {self.merge}: {error}") from None
        if size != [self.input_size] * 2:
            if self.input_size == type(self).input_size:
                raise UserError(f"--input-size {self.input_size}: the weights are for {size[0]} x {size[1]} pixels; pass "
                              f"--input-size {size[0]}, or another, for which their table of places is interpolated")
            clip = resized(clip, self.input_size)
        if self.context > clip.config["context"]:
            raise UserError(f"--context {self.context}: the weights read at most {clip.config['context']} tokens")
        self.words = clip_video.tokenizer_of(self.weights, self.tokenizer, clip.config["vocabulary"])
        self.check_against_weights(kind=clip.kind, local_units=clip.config["local_units"], temporal_downsample=clip.config["temporal_downsample"],
                     vocabulary=clip.config["vocabulary"], model=size_named(clip.config["size"], uniformerv2.SIZES | {"small": SMALL}))
        self.local_units = clip.config["local_units"]
        if any(key.startswith("caption_decoder.") for key in weights.read(self.weights)[0]):
            decoder = caption_decoder.CaptionDecoder.from_official(self.weights)
            self.check_against_weights(caption_depth=decoder.config["depth"], queries=decoder.config["queries"])
            return VideoText(clip, decoder)
        if not self.steps:
            self.caption_weight = 0.0
        print(f"{self.weights} holds no caption decoder: " + ("that starts from scratch" if self.steps else "no captions are scored"))
        return VideoText(clip, self.fresh_decoder(clip))

    def check_captions(self):
        """All training captions, for the vocabulary; UserError where a list has none, or an empty one."""
        for source in (*self.sets, self.stills):
            if not isinstance(source, (data.VideoFiles, data.VideoShards)):
                continue
            if source.captions is None and source.classes and not self.steps:
                continue  # zero-shot recognition needs class names alone
            if source.captions is None:
                raise UserError(f"{source.source}: has no captions; give a CSV file with a header 'path,caption', or "
                              'a .jsonl file of {"path": ..., "caption": ...}')
            for (path, _), caption in zip(source.items, source.captions):
                if not caption:
                    raise UserError(f"{source.source}: the caption of {path} is empty")
            if source.missing:
                print(f"{source.source}: {len(source.missing)} of {len(source)} files are missing and will be "
                      f"skipped, e.g. {printable(str(source.missing[0]))}")
        captions = self.sets[0].captions or [] if self.data else [
            moving_shapes.describe(self.sets[0].scene(i).facts, np.random.default_rng((self.seed, i))) for i in range(3000)]
        return captions + (self.stills.captions if self.image_data else [])

    def images(self):
        """The single pictures and their sentences, as clips of one frame."""
        if not self.data and not self.image_data:
            return moving_shapes.StillShapes("train", self.num_frames, self.input_size, self.seed)
        part = "all" if self.image_data or self.val_data else "train"
        return data.open_clips(self.image_data or self.data, 1, self.input_size, sampling="segment", seed=self.seed,
                               flip=False, part=part, transform=self.transform)

    def old_datasets(self):
        return self.sets

    def extras(self, folder):
        self.words.save(folder)

    def loss(self, model, batch, rng):
        video, captions = batch["video"], batch["caption"]
        image = "image" in batch
        if image:  # where the tower embeds several frames at a time, the picture stands still
            video = video.expand(-1, getattr(model.clip.visual, "stride", 1), -1, -1, -1)
        video = data.normalise(video, model.clip.mean, model.clip.std)
        ids, is_token = (x.to(video.device) for x in self.words.encode(captions, self.context, trim=True))
        if model.training:
            model.clip.clamp_scale()

        def encode(video, ids):
            with self.autocast():
                return model.encode(video, ids, hidden=self.caption_weight > 0)

        cached = self.cache_size and torch.is_grad_enabled()
        seen, read, *hidden = clip_video.in_pieces(encode, self.cache_size, video, ids) if cached else encode(video, ids)
        # Clips with the same caption are not each other's negatives, in whichever process they are.
        same = torch.tensor([int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") for text in captions],
                            device=video.device)
        contrastive = clip_video.contrastive_loss(seen, read, model.clip.logit_scale, targets=same, gather=model.training)
        kind = "image_" if image else ""
        if not hidden:
            return contrastive, {"loss": contrastive.detach(), kind + "contrastive": contrastive.detach()}
        count = processes.mean(is_token[:, 1:].sum()).clamp(min=1) if model.training else None
        with self.autocast():
            caption = caption_decoder.chunked_caption_loss(model.caption_decoder, hidden[0], ids, is_token, count=count)
        loss = contrastive + self.caption_weight * caption
        return loss, {"loss": loss.detach(), kind + "contrastive": contrastive.detach(),
                      kind + "caption": caption.detach()}

    def batches(self, videos, first):
        """Batches of videos and of single pictures in turn (InternVideo, Sec. 4.1). Pictures come from clips of
        their own: several of one clip, in one batch, taught far less (LOG.md)."""
        if not self.image_every:
            yield from super().batches(videos, first)
            return
        before = -(-first // self.image_every)  # steps 0, n, 2n, ... are of images
        options = dict(workers=self.workers, rank=processes.rank(), world=processes.world())
        images = data.batches(self.stills, self.image_batch, self.seed, self.steps, start=before, **options)
        clips = data.batches(videos, self.batch_size, self.seed, self.steps, start=first - before, **options)
        for step in range(first, self.steps):
            yield next(clips) if step % self.image_every else next(images) | {"image": True}

    def old_evaluate(self, model, batches):
        """Losses, retrieval, and on moving shapes zero-shot classes and facts of the written captions; the
        same for pairs of shape and colour that were never shown. Of files without captions, zero-shot classes."""
        if self.data and self.sets[1].captions is None:
            return self.recognise(model, batches)
        classes = None if self.data else self.classes_of(model)
        metrics = self.measure(model, batches, classes, "val_")
        if not self.data:
            unseen = self.held_out(self.world("unseen"), self.eval_clips, self.eval_batch)
            metrics |= self.measure(model, unseen, classes, "unseen_")
        return metrics

    def measure(self, model, batches, classes, prefix):
        """The numbers of `evaluate` for one set of clips, each name with a prefix in front."""
        rows = []
        for batch in batches:
            _, losses = self.loss(model, batch, generator(self.seed, "evaluation", batch["number"]))
            video = data.normalise(batch["video"], model.clip.mean, model.clip.std)
            told = batch.get("captions") or [[text] for text in batch["caption"]]
            with self.autocast():
                rows.append((batch["number"], len(video), {name: float(value) for name, value in losses.items()},
                             model.clip.encode_video(video),
                             model.clip.encode_text(self.encode(sum(map(list, told), []), video.device)), list(map(len, told)),
                             batch.get("facts", []),
                             model.caption(video, self.words, self.context - 1) if "facts" in batch else []))
        rows = processes.collect(rows, self.device)
        metrics = weighted_mean(rows)
        *_, seen, read, told, facts, said = zip(*rows)
        found = {"facts": sum(facts, []), "said": sum(said, [])}
        seen, read = (torch.nn.functional.normalize(torch.cat(part).float(), dim=-1) for part in (seen, read))
        self.ranks = self.retrieval(model, seen, read, sum(told, []))
        metrics |= {key: value for key, value in self.ranks.items() if key.endswith("R@1")}
        if found["facts"]:
            for fact, names in FACTS.items():
                chosen = clip_video.zero_shot(seen, classes[fact], model.clip.logit_scale, "embeddings").argmax(dim=1)
                right = [names[c] == facts[fact] for c, facts in zip(chosen.tolist(), found["facts"])]
                metrics[f"zero_shot_{fact}"] = 100 * float(np.mean(right))
            said = [moving_shapes.parse_caption(text) for text in found["said"]]
            right = np.array([[a.get(fact) == b[fact] for fact in FACTS] for a, b in zip(said, found["facts"])])
            metrics |= {f"captions_{fact}": 100 * float(share) for fact, share in zip(FACTS, right.mean(axis=0))}
            metrics["captions_all_three"] = 100 * float(right.all(axis=1).mean())
        return {prefix + name: value for name, value in metrics.items()}

    def recognise(self, model, batches):
        """Zero-shot recognition of the files' classes, by their names in every prompt -> {name: percent}."""
        names = [name.replace("_", " ") for name in self.sets[1].classes]
        with self.autocast():
            classes = clip_video.embed_classes(model.clip, self.words, names, self.sentences())
        rows = []
        for batch in batches:
            with self.autocast():
                seen = model.clip.encode_video(data.normalise(batch["video"], model.clip.mean, model.clip.std))
            rows.append((batch["number"], clip_video.zero_shot(seen.float(), classes.float(), model.clip.logit_scale), batch["label"]))
        _, shares, labels = zip(*processes.collect(rows, self.device))
        found = accuracies({"label": torch.cat(shares)}, {"label": torch.cat(labels)})
        return {f"zero_shot_{name}": value for name, value in found.items()}

    def sentences(self):
        """What class names are put into: the lines of --prompts, or InternVideo's 16."""
        if not self.prompts:
            return clip_video.PROMPTS
        try:
            lines = [line.strip() for line in text_of(self.prompts).split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts {self.prompts}: {error}") from None
        if not lines or not all("{}" in line for line in lines):
            raise UserError(f"--prompts {self.prompts}: needs a sentence on each line, with {{}} where the class name goes")
        return lines

    def retrieval(self, model, seen, read, told):
        """Ranks among the first `gallery` videos and all of their captions; told: how many each video has."""
        count = min(self.gallery, len(told))
        owner = torch.arange(count).repeat_interleave(torch.tensor(told[:count]))
        similarity = model.clip.logit_scale.exp() * read[:len(owner)] @ seen[:count].T
        return clip_video.retrieval_metrics(similarity, owner, grouped=True)

    def old_finish(self, model):
        """Multiple choice, zero-shot recognition, and the captions scored against all that is told of each clip."""
        choices, said = [], []
        if self.data and self.sets[1].captions is None:
            return {}
        for batch in self.held_out(self.sets[1], self.eval_clips, self.eval_batch):
            video = data.normalise(batch["video"], model.clip.mean, model.clip.std)
            number = range(batch["number"] * self.eval_batch, self.eval_clips)
            if "facts" in batch:
                asked = [moving_shapes.choices(facts, np.random.default_rng((self.seed, i))) for facts, i in zip(batch["facts"], number)]
            else:
                asked = [(options, options.index(text)) for options, text in zip(batch.get("candidates", ()), batch["caption"])]
            with self.autocast():
                if asked:
                    chosen = clip_video.choose(model.clip, video, [self.encode(list(options), video.device) for options, _ in asked])
                    choices += [(batch["number"], [c == right for c, (_, right) in zip(chosen.tolist(), asked)])]
                if self.caption_weight:
                    told = [moving_shapes.phrasings(facts) for facts in batch["facts"]] if "facts" in batch else \
                        batch.get("captions") or [[text] for text in batch["caption"]]
                    # References as the tokeniser would write them: "counter-clockwise" and "counter - clockwise" are one.
                    told = [self.words.decode(self.words.encode(list(texts), 10**4, trim=True)[0]) for texts in told]
                    said += [(batch["number"], model.caption(video, self.words, self.context - 1), told)]
        metrics = {}
        if self.test and not self.data:
            metrics |= self.measure(model, self.held_out(self.world("test"), self.test, self.eval_batch),
                                    self.classes_of(model), "test_")
        if self.data and self.sets[1].classes and self.sets[1].captions:
            metrics |= self.recognise(model, self.held_out(self.sets[1], self.eval_clips, self.eval_batch))
        if found := sum((part for _, part in processes.collect(choices)), []):
            metrics["multiple_choice"] = 100 * float(np.mean(found))
        if found := processes.collect(said):
            metrics |= captioning.score(sum((part for _, part, _ in found), []), sum((list(part) for *_, part in found), []))
        return metrics

    def encode(self, captions, device):
        """Sentences to token numbers (B, L), on the device."""
        return self.words.encode(captions, self.context, trim=True)[0].to(device)

    def world(self, split):
        """Generated clips of a split."""
        return moving_shapes.MovingShapes(split, self.num_frames, self.input_size, self.seed)

    def classes_of(self, model):
        """Sentences for the classes of generated clips, embedded; None where clips have no one class."""
        return self.embed_facts(model)

    def embed_facts(self, model):
        """Sentences for every class of motion, shape and colour: {fact: (prompts, classes, E)}. One table of two
        sentences for each of 16 * 6 * 8 combinations serves all three: what is not asked for is averaged."""
        shape = [len(names) for names in FACTS.values()]
        texts = [moving_shapes.describe(dict(zip(FACTS, facts)), np.random.default_rng((self.seed, i, j)))
                 for i, facts in enumerate(itertools.product(*FACTS.values())) for j in range(2)]
        with self.autocast():
            table = torch.cat([model.clip.encode_text(self.encode(texts[i:i + 256], model.clip.scale.device))
                               for i in range(0, len(texts), 256)])
        table = torch.nn.functional.normalize(table.float(), dim=-1).view(*shape, 2, -1)
        return {fact: table.movedim(axis, -2).flatten(0, 2) for axis, fact in enumerate(FACTS)}

    def videos(self):
        """How many are in the gallery."""
        return min(self.gallery, self.eval_clips, len(self.sets[1]) if self.data else self.gallery)

    def old_note(self):
        videos, files = self.videos(), isinstance(self.sets[1], data.VideoFiles)
        if self.data and self.sets[1].captions is None:
            return (f"protocol: zero-shot recognition of {min(self.eval_clips, len(self.sets[1]))} held-out files of {self.sets[1].source}, "
                    f"{len(self.sets[1].classes)} classes; the mean over {len(self.sentences())} prompts of the softmax over classes; "
                    f"one view of {self.num_frames} frames, {self.input_size} px, sampling {self.sampling}, transform {self.transform}; chance is {100 / len(self.sets[1].classes):.1f} %")
        told = list(self.sets[1].told.values()) if files and self.sets[1].told else []
        texts = sum(len(told[i]) for i in data.spread(len(told), self.eval_clips)[:videos]) if told else videos
        return clip_video.protocol(
            self.sets[1].source if self.data else "moving shapes", videos=videos, captions=texts, frames=self.num_frames,
            size=self.input_size, crop=f"transform {self.transform}" if self.data else "all of the frame",
            sampling=self.sampling if self.data else "all of the clip", merge=self.merge_share if self.merge else None,
            grouped=True) + "; merged as published, blocks 12 and above left out" * bool(self.merge and self.merge_as_published) + self.tasks()

    def tasks(self):
        """Of the protocol what is not retrieval."""
        if self.data:
            rows = getattr(self.sets[1], "rows", None)
            choice = f"; multiple choice among the sentences listed for each of {self.eval_clips} videos or fewer" if (
                rows and rows[0].candidates) else ""
            return choice + "; captions, greedy, scored against all sentences of their video" * bool(self.caption_weight)
        return (
            "; zero-shot, multiple choice (four of five sentences are wrong in one fact) and captions (scored against "
            f"every phrasing of the facts) on {self.eval_clips} clips, in percent; unseen_ = pairs of shape and "
            "colour never shown in training; chance is 6 % for motion, 17 % for shape, 12 % for colour")

    @torch.no_grad()
    def old_pictures(self, model, batch, folder):
        """The similarity matrix, the best clips for some sentences, captions under frames, and where the
        decoder looks while it writes each word."""
        if "caption" not in batch:
            return []
        shown = min(16, len(batch["video"]))
        raw, captions = batch["video"][:shown], batch["caption"][:shown]
        video = data.normalise(raw, model.clip.mean, model.clip.std)
        with self.autocast():
            seen, tokens = model.clip.encode_video_tokens(video)
            read = model.clip.encode_text(self.encode(captions, video.device))
            written = model.caption(video, self.words, self.context - 1)
        seen, read = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (seen, read))
        cosines, raw = (read @ seen.T).cpu(), raw.cpu().numpy()
        paths = [folder / name for name in ("similarity.png", "retrieval.png", "captions.png", "attention.png")]
        pictures.similarity(cosines, captions, paths[0])
        pictures.retrieval(cosines, raw, captions, paths[1])
        if not self.caption_weight:
            return paths[:2]
        pictures.captions(raw, captions, written, paths[2])
        ids = self.encode(written[:1], video.device)
        where, spoken = caption_decoder.looks(model.clip, model.caption_decoder, self.words, tokens[:1].float(), ids)
        pictures.attention(raw[0], where, spoken, f'where the decoder looks as it writes "{written[0]}"', paths[3])
        return paths


@dataclass
class Retrieve(Clip, name="retrieve"):
    """Fine-tuned retrieval: contrast alone, from the weights of stage two (InternVideo, Sec. 4.4, video-text retrieval).

    On moving shapes with clips of two acts, which stage two has never seen; the sentences say which came first."""

    weights: str = flag("", "start from these weights: a run of clip, or an official file")
    steps: int = flag(600, "optimiser steps; 0 = zero-shot only (paper: 5 epochs; 30 on ActivityNet)", low=0)
    lr: float = flag(2e-3, "learning rate as it is; overrides --blr when above 0 (paper: 2e-6 to 5e-6)", low=0)
    warmup: float = flag(0.1, "share of the steps that warm up linearly from 0 (paper: 0.1)", low=0, high=1)
    num_frames: int = flag(16, "frames per clip (paper: 12; LSMDC, MSVD, VATEX 8, DiDeMo 32, ActivityNet 64)", low=1, high=10**4)
    caption_weight: float = flag(0.0, "weight of the captioning loss; 0 = no captions (paper: 0)", low=0)
    image_every: int = flag(0, "every n-th batch is of images; 0 = none (paper: 0)", low=0)
    eval_clips: int = flag(500, "held-out videos, all of them in the gallery (MSR-VTT: 1,000)", low=2)
    eval_every: int = flag(0, "steps between evaluations; 0 = at the end", low=0)

    def old_build(self):
        if not self.weights:
            raise UserError("--weights: fine-tuning starts from a model; give a run of clip, or an official file")
        if self.gallery != type(self).gallery or not self.data and self.motion_words != 1:
            raise UserError("--gallery: here all of --eval-clips are in it; --motion-words: clips of two acts name both motions; "
                          "leave them out")
        self.gallery, self.eval_every = self.eval_clips, self.eval_every or max(1, self.steps)
        return super().old_build()

    def open(self):
        return super().open() if self.data else (self.world("train"), self.world("val"))

    def world(self, split):
        return moving_shapes.ActShapes(split, self.num_frames, self.input_size, self.seed)

    def classes_of(self, model):
        return None

    def old_evaluate(self, model, batches):
        """Loss and R@1 both ways, raw and dual softmax."""
        return self.measure(model, batches, None, "val_")

    def old_finish(self, model):
        """All ranks as a table."""
        print(f"{'':28s}" + "".join(f"{name:>8s}" for name in ("R@1", "R@5", "R@10", "MdR", "MnR")))
        for way, name in (("t2v", "text to video"), ("v2t", "video to text")):
            for kind in ("", "dsl_"):
                print(f"{name + ', dual softmax' * bool(kind):28s}" + "".join(
                    f"{self.ranks[f'{kind}{way}_{rank}']:8.1f}" for rank in ("R@1", "R@5", "R@10", "MdR", "MnR")))
        return self.ranks | super().old_finish(model)

    def tasks(self):
        what = "" if self.data else (
            "; clips of two acts, in pairs with the same shape, colour and motions in either order: without the order "
            "R@1 cannot pass 50 %")
        return what + f"; chance is {100 / self.videos():.1f} %"


class AttentiveProbe(torch.nn.Module):
    """One query asks a frozen encoder's tokens, and a linear layer names the answer (the attentive probe of
    V-JEPA, arXiv 2404.08471, Sec. 3.2): for encoders whose mean token was never asked to mean anything.

    encoder  a mae.VideoClassifier or uniformerv2.UniFormerV2; its own head is not used
    classes  Y
    """

    def __init__(self, encoder, classes, heads):
        super().__init__()
        width = encoder.config["size"]["width"]
        self.encoder, self.mean, self.std = encoder, encoder.mean, encoder.std
        self.config = {"model": "AttentiveProbe", "encoder": encoder.config, "classes": classes, "heads": heads}
        self.query = torch.nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.norm = torch.nn.LayerNorm(width)
        self.attn = Attention(width, heads, context_width=width)
        self.head = torch.nn.Linear(width, classes)

    @classmethod
    def from_run(cls, folder):
        """Load a run of `classify --mode attentive`, in eval mode. Raises WeightsError."""
        tensors, config = weights.read(folder)
        if config.get("model") != "AttentiveProbe":
            raise weights.WeightsError(f"{folder}: not a run of `train.py classify --mode attentive`")

        def make(config):
            family = mae.VideoClassifier if config["encoder"]["model"] == "VideoClassifier" else uniformerv2.UniFormerV2
            return cls(family.from_config(config["encoder"]), config["classes"], config["heads"])

        return weights.fill(weights.build(make, config, folder), tensors, name=str(folder)).eval()

    def read(self, tokens):
        """tokens (B, N, D) -> logits (B, Y)"""
        return self.head(self.attn(self.query.expand(len(tokens), -1, -1), self.norm(tokens))[:, 0])

    def forward(self, video):
        """video (B, C, T, H, W) float, normalised with self.mean and self.std -> logits (B, Y)"""
        return self.read(tokens_of(self.encoder, video))


def tokens_of(encoder, video):
    """All tokens of either encoder's last block, (B, N, D)."""
    if isinstance(encoder, mae.VideoClassifier):
        return encoder.encoder(video)
    return encoder.encode(video)[1].flatten(1, 2)


def feature_of(encoder, video):
    """What either encoder's head sees, (B, D)."""
    feature = encoder.features(video)
    return feature if isinstance(encoder, mae.VideoClassifier) else encoder.norm(feature)


def load_encoder(source, classes=None, *, frames=None, image_size=None, drop=0.0, drop_path=0.0, rows=None, positions="sinusoid"):
    """Either encoder of InternVideo, with a head for Y classes, out of whatever holds it.

    source   a run of mae, clip or classify, or an official file: VideoMAE pretrained or fine-tuned, UniFormerV2,
             CLIP (which grows), InternVideo-MM. What the file is, its names tell
    classes  Y; None: the head that it has, or where it has none a fresh one of one class, to be replaced
    rows     which row of the file's head each class is, where it has a head; default and heads: see their `with_head`
    positions   of official VideoMAE files: see mae.position_codes
    returns  mae.VideoClassifier or uniformerv2.UniFormerV2
    """
    tensors, config = weights.read(source)
    kind = config.get("model")
    masked = kind in ("VideoMAE", "VideoClassifier") if kind else any(
        "patch_embed.proj." in key or "patch_embeddings.projection." in key for key in tensors)
    if masked:
        pretrained = kind == "VideoMAE" or any(key.endswith("mask_token") for key in tensors) and not kind
        family = mae.VideoMAE if pretrained else mae.VideoClassifier
        found = family.from_official(source, frames=frames, image_size=image_size, positions=positions)
        options = {"rows": rows} if of_the_head(source, found, classes, rows) else {}
        return found.with_head(classes or found.config.get("classes") or 1, frames=frames or found.config["frames"],
                               image_size=image_size or found.config["image_size"], drop=drop, drop_path=drop_path, **options)
    options = dict(head_dropout=drop, drop_path=drop_path)
    names = " ".join(tensors)
    if kind == "UniFormerV2" or not kind and "transformer.dec." in names and "text_projection" not in names:
        found = uniformerv2.UniFormerV2.from_official(source, frames=frames)
        if of_the_head(source, found, classes, rows):
            options["rows"] = rows
        return found.with_head(classes or found.config["classes"] or 1, **options)
    of_the_head(source, None, classes, rows)
    if kind not in (None, "VideoCLIP", "VideoText"):
        raise weights.WeightsError(f"{source}: holds a {kind}, which is no encoder that `classify` knows")
    grow = not kind and clip_video.OfficialFile(source).layout in ("CLIP", "Hugging Face CLIP")
    clip = clip_video.VideoCLIP.from_official(source, frames=frames, grow=grow)
    if clip.kind == "joint":
        raise weights.WeightsError(f"{source}: ViCLIP's joint tower has no classifier here; use UniFormerV2, "
                                   "InternVideo-MM or CLIP weights")
    return clip.visual.with_head(classes or 1, norm=clip.visual_norm, mean=clip.mean, std=clip.std, **options)


def of_the_head(source, model, classes, rows):
    """True where `rows` names rows of the model's head; WeightsError where they cannot be. Says what shapes do not tell."""
    had = model.config.get("classes", 0) if model is not None else 0
    if rows is None:
        if (had, classes) == (710, 400):
            print(f"{source}: the first 400 of its 710 classes are taken for Kinetics-400, as in InternVideo and UniFormerV2; VideoMAE "
                  "V2's are in another order, for which see --head-rows")
        return False
    if len(rows) != classes or not had or not all(0 <= row < had for row in rows):
        raise weights.WeightsError(f"--head-rows: {len(rows)} rows for {classes} classes out of a head with {had} of {source}")
    return True


@dataclass
class Labels(OldCard):
    """What the cards with labels share: questions, their answers, accuracies.

    On moving shapes three questions at once, motion, shape and colour, each with a softmax of its own; on your
    videos one, the label. Targets and logits hold all answers side by side, (B, Y)."""

    num_frames: int = flag(8, "frames per clip (paper: 16, UniFormerV2 8)", low=1, high=10**4)
    input_size: int = flag(40, "height and width in pixels (paper: 224)", low=1, high=10**4)
    sampling_rate: int = flag(4, "with --sampling dense: a clip takes every n-th frame (paper: 4)", low=1)
    sampling: str = flag("segment", "files: dense = neighbouring frames, segment = spread over the video; the others are "
                         "those of the published models (paper: videomae-dense, uniformerv2)",
                         choices=tuple(data.SAMPLINGS))
    transform: str = flag("plain", "files: how frames are resized and cropped; plain is ours, the others are those of "
                          "the published models (paper: videomae, uniformerv2)", choices=tuple(data.TRANSFORMS))
    test: int = flag(0, "moving shapes: at the end measure on so many clips of the test split, too, which no choice has ever seen", low=0)
    train_clips: int = flag(0, "train on so many clips, over and over, to see what few labels are worth; 0 = all", low=0)
    flip: bool = flag(False, "files: mirror half of the training clips: not where labels know left from right")
    area: float = flag(0.0, "files: smallest share of a frame that a random crop keeps; 0 = as --transform has it (paper: 0.08)",
                       low=0, high=1)
    rand_augment: int = flag(0, "files: RandAugment operations per clip; 0 = none (paper: 4)", low=0)
    magnitude: int = flag(7, "files: their strength, of 30 (paper: 7)", low=0, high=30)
    erasing: float = flag(0.0, "files: probability that a box of the clip turns grey (paper: 0.25, with noise)",
                          low=0, high=1)
    repeats: int = flag(1, "files: clips of each video in a batch, cut out anew each time (paper: 2)", low=1)
    test_clips: int = flag(1, "files: clips along time in the last evaluation (papers: 4 to 7; 2 on Something-Something)",
                           low=1)
    test_crops: int = flag(1, "files: crops along the longer side of each (papers: 3)", low=1)

    merge_views: str = flag("softmax", "files: what is averaged over views: softmax or logits (papers: softmax; logits on "
                            "Something-Something)", choices=("softmax", "logits"))
    def ask(self):
        """Open the data sets and set the questions; returns Y, the number of all answers."""
        if self.batch_size % self.repeats:
            raise UserError(f"--batch-size {self.batch_size}: must be a multiple of --repeats {self.repeats}")
        self.sets = clips(self, self.num_frames, self.input_size, self.sampling, self.sampling_rate, self.flip, self.transform,
                          area=self.area or None, operations=self.rand_augment, magnitude=self.magnitude, erasing=self.erasing)
        if self.train_clips:
            if isinstance(self.sets[0], data.VideoShards):
                raise UserError("--train-clips: shards are read as they come; give a folder or a list")
            self.sets[0].first(self.train_clips)
        self.questions = {"label": tuple(self.sets[0].classes)} if self.data else FACTS
        if self.data and len(self.sets[0].classes) < 2:
            raise UserError(f"--data {self.data}: {len(self.sets[0].classes)} classes; needs a folder of class folders, "
                          "or a list of `path label` lines, with two or more (shards serve mae and clip)")
        return sum(map(len, self.questions.values()))

    def old_datasets(self):
        return self.sets

    def old_note(self):
        """The protocol of the accuracies."""
        count = min(self.eval_clips, len(self.sets[1])) if self.data else self.eval_clips
        what = (f"files of {self.sets[1].source}, {len(self.questions['label'])} classes, top 1 and top 5" if self.data else
                "clips of moving shapes: motion, shape, colour, and all three; unseen_ = pairs of shape and colour never shown in "
                "training")
        views = self.test_clips * self.test_crops
        frames = f", sampling {self.sampling}, transform {self.transform}" if self.data else ""
        return (f"protocol: accuracy in percent on {count} held-out {what}; one view of {self.num_frames} frames, {self.input_size} px"
                + frames + (f", at the end also the mean {'probability' if self.merge_views == 'softmax' else 'logit'} of {self.test_clips} x {self.test_crops} views" if views > 1 else ""))

    def target(self, batch):
        """(B, Y): a one for the right answer to each question."""
        if "target" in batch:
            return batch["target"]
        answers = [[names.index(facts[fact]) for facts in batch["facts"]] for fact, names in self.questions.items()] \
            if "facts" in batch else [batch["label"].tolist()]
        answers = torch.tensor(answers, device=batch["video"].device)
        if answers.min() < 0:
            raise data.DataError(f"{self.data}: a video without a label: {batch['path'][int(answers[0].argmin())]}")
        return torch.cat([torch.nn.functional.one_hot(answer, len(names)).float()
                          for answer, names in zip(answers, self.questions.values())], dim=1)

    def split(self, x):
        """(B, Y) -> the part of each question: {name: (B, classes)}."""
        return dict(zip(self.questions, x.split(list(map(len, self.questions.values())), dim=1)))

    def error(self, logits, target, smoothing=0.0):
        """Sum over the questions of the mean cross entropies, in nats."""
        return sum(torch.nn.functional.cross_entropy(a, b, label_smoothing=smoothing)
                   for a, b in zip(self.split(logits).values(), self.split(target).values()))

    def extras(self, folder):
        text = json.dumps({question: list(names) for question, names in self.questions.items()}) + "\n"
        weights.write_aside(Path(folder) / "questions.json", lambda path: Path(path).write_text(text))

    def batches(self, train_set, first):
        return data.batches(train_set, self.batch_size, self.seed, self.steps * self.accum, start=first * self.accum,
                            workers=self.workers, rank=processes.rank(), world=processes.world(), repeats=self.repeats)

    def old_finish(self, model):
        """Accuracies over several views of each held-out video: softmax per view, averaged in memory. With --test, on the
        test split."""
        if self.test and not self.data:
            world = moving_shapes.MovingShapes("test", self.num_frames, self.input_size, self.seed).only(self.sets[1].shown)
            return self.measure(model, self.held_out(world, self.test, self.eval_batch), "test_")
        if self.test_clips * self.test_crops == 1:
            return {}
        views = data.open_clips(self.val_data or self.data, self.num_frames, self.input_size, self.sampling_rate,
                                self.sampling, train=False, classes=self.sets[1].classes,
                                part="all" if self.val_data else "val", transform=self.transform,
                                views=(self.test_clips, self.test_crops))
        rows = []
        for batch in self.held_out(views, self.eval_clips, 1):
            video = batch["video"][0]                                        # (1 + views, T, H, W, 3)
            logits = [self.logits(model, {"video": part})[0] for part in video.split(self.eval_batch)]
            rows.append((batch["number"], torch.cat(logits), batch["label"]))
        _, scores, answers = zip(*processes.collect(rows, self.device))
        answers = {"label": torch.cat(answers)}
        named = {"1 clip": [logits[0] for logits in scores],
                 f"{self.test_clips} x {self.test_crops} views": [merge_views(logits[1:], self.merge_views) for logits in scores]}
        return {f"val_{name} ({kind})": value for kind, found in named.items()
                for name, value in accuracies({"label": torch.stack(found)}, answers).items()}

    def old_evaluate(self, model, batches):
        """Losses and accuracies in percent: of each question, and of all together on moving shapes, there also
        for pairs of shape and colour that were never shown."""
        metrics = self.measure(model, batches, "val_", keep=True)
        if not self.data:
            world = moving_shapes.MovingShapes("unseen", self.num_frames, self.input_size, self.seed).only(self.sets[1].shown)
            metrics |= self.measure(model, self.held_out(world, self.eval_clips, self.eval_batch), "unseen_")
        return metrics

    def measure(self, model, batches, prefix, keep=False):
        rows = []
        for batch in batches:
            target, logits = self.target(batch), self.logits(model, batch)[0]
            rows.append((batch["number"], logits, target, float(self.error(logits, target)) * len(target)))
        _, logits, targets, losses = zip(*processes.collect(rows, self.device))
        logits, targets = self.split(torch.cat(logits)), self.split(torch.cat(targets))
        metrics = accuracies(logits, {name: target.argmax(dim=1) for name, target in targets.items()})
        if keep:
            first, names = next(iter(self.questions.items()))
            self.sureness = logits[first].softmax(dim=1).amax(dim=1)
            self.confusion = torch.zeros(len(names), len(names), dtype=torch.int64).index_put_(
                (targets[first].argmax(dim=1).cpu(), logits[first].argmax(dim=1).cpu()), torch.tensor(1), accumulate=True)
        return {prefix + name: value for name, value in
                ({"loss": sum(losses) / len(next(iter(targets.values())))} | metrics).items()}

    def old_pictures(self, model, batch, folder):
        first, names = next(iter(self.questions.items()))
        pictures.confusion({f"{first}, {when}": counts for when, counts in self.confusions().items()}, names,
                       folder / "confusion.png")
        return [folder / "confusion.png"]

    def confusions(self):
        """What the last evaluation said for what, of the first question: {when: (Y, Y) counts}."""
        return {"held-out clips": self.confusion}


@dataclass
class Classify(Labels, name="classify"):
    """Stage three: supervised post-pretraining of either encoder (InternVideo, Sec. 3.2).

    Fine-tune all of it, or leave it frozen and train a probe on its features, which are computed once. On moving
    shapes three questions at once, motion, shape and colour, each with a softmax of its own; else the label."""

    steps: int = flag(500, "optimiser steps; 0 = evaluate only (VideoMAE, UniFormerV2: 35 to 100 epochs of Kinetics-400)", low=0)
    lr: float = flag(6e-3, "learning rate as it is; overrides --blr when above 0 (papers: 5e-4 to 2e-3 per 256 clips "
                           "for VideoMAE, 1e-5 for UniFormerV2)", low=0)
    mode: str = flag("finetune", "finetune = train everything; probe = a linear layer, attentive = a query that asks "
                     "the tokens, and a linear layer, on frozen features", choices=("finetune", "probe", "attentive"))
    encoder: str = flag("masked", "which one starts from scratch where there are no --weights: masked = VideoMAE's, "
                        "multimodal = UniFormerV2", choices=("masked", "multimodal"))
    model: str = flag("small", "its size; small is ours: `tiny` of mae.py, the tower of the clip stage",
                      choices=("small", *mae.SIZES, *uniformerv2.SIZES))
    layer_decay: float = flag(1.0, "each layer further from the head learns at this fraction of the rate of the next "
                              "(paper: 0.75)", low=0, high=1)
    drop_path: float = flag(0.0, "share of samples that skip the last block, fewer in earlier ones (paper: 0.1 or "
                            "0.2)", low=0, high=1)
    drop: float = flag(0.0, "dropout before the head (paper: 0 to 0.5)", low=0, high=1)
    smoothing: float = flag(0.1, "label smoothing (paper: 0.1)", low=0, high=1)
    mixup: float = flag(0.0, "alpha of mixup, 0 = none (paper: 0.8)", low=0)
    cutmix: float = flag(0.0, "alpha of cutmix, 0 = none; with both, a coin chooses (paper: 1.0)", low=0)
    head_rows: str = flag("", "a JSON list: which row of the head of --weights each class is, as VideoMAE V2's label_710to400.json; "
                          "default: the first 400 of 710, the same where there are as many, else a fresh head")
    positions: str = flag("sinusoid", "position codes of official VideoMAE weights on another grid: sinusoid = computed for it, "
                          "resized = stretched (InternVideo's ViT-H at 384 px)", choices=("sinusoid", "resized"))
    probe_clips: int = flag(2000, "with a probe: training clips whose features are computed; 0 = all files of --data",
                            low=0)
    unknown: str = flag("", "open-set recognition: classes (or motions) to leave out of training, names with commas, or how "
                        "many of the last; evaluation tells how well they are told from the known (paper: UCF101 "
                        "against HMDB51)")

    def ask(self):
        """As all cards with labels; with --unknown, set some classes aside."""
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 1e-3:  # a beta distribution that float32 cannot hold
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 0.001, or 0 for none")
        classes = super().ask()
        if not self.unknown:
            return classes
        if self.test_clips * self.test_crops > 1 or self.data and annotations.is_shards(self.data):
            raise UserError("--unknown: is evaluated on one view of listed files; leave out --test-clips, --test-crops, shards")
        question, names = next(iter(self.questions.items()))
        unknown = names[max(len(names) - int(self.unknown), 0):] if self.unknown.isdecimal() else list(
            dict.fromkeys(self.unknown.split(",")))
        known = tuple(name for name in names if name not in unknown)
        if set(unknown) - set(names) or not unknown or len(known) < 2:
            raise UserError(f"--unknown {self.unknown}: give some of {', '.join(names)}, or how many of the last; two or more "
                          "must remain")
        self.strangers = copy.copy(self.sets[1]).only(tuple(unknown))
        self.sets = tuple(part.only(known) for part in self.sets)
        self.questions = self.questions | {question: known}
        return classes - len(unknown)

    def old_evaluate(self, model, batches):
        """As all cards with labels. With --unknown also the AUROC, in percent, of telling known from unknown classes by
        the largest probability that the model gives (arXiv 1610.02136, Sec. 3, Softmax Prediction Probability).
        InternVideo (Sec. 4.3, open-set action recognition) learns how much evidence there is instead (DEAR, arXiv
        2107.10161); we do not."""
        metrics = super().old_evaluate(model, batches)
        if self.unknown:
            question = next(iter(self.questions))
            strange = torch.cat([self.split(self.logits(model, to_device(batch, self.device))[0])[question].softmax(
                dim=1).amax(dim=1) for batch in data.held_out(self.strangers, self.eval_clips, self.eval_batch)])
            metrics |= {"val_unknown_auroc": 100 * auroc(self.sureness, strange), "val_unknown_clips": len(strange)}
        return metrics

    def old_note(self):
        if not self.unknown:
            return super().old_note()
        name, known = next(iter(self.questions.items()))
        return super().old_note() + (f"; open set: trained on {len(known)} classes of {name}; the AUROC compares the largest probability on held-out "
                f"clips of these with clips of those left out ({self.unknown}); chance is 50")

    def old_build(self):
        classes = self.ask()
        probed = bool(self.weights) and weights.read(self.weights)[1].get("model") == "AttentiveProbe"
        if probed and self.mode != "attentive":
            raise UserError(f"--weights {self.weights}: is an attentive probe; add --mode attentive")
        try:
            model = AttentiveProbe.from_run(self.weights) if probed else self.encoder_for(classes)
            if probed and model.config["classes"] != classes:
                raise UserError(f"--weights {self.weights}: names {model.config['classes']} classes, the data has {classes}")
            encoder = model.encoder if probed else model
            self.check(encoder)
            self.depth = encoder.config["size"]["depth"]
            if self.mode == "attentive" and not probed:
                model = AttentiveProbe(model.with_head(0), classes, model.config["size"]["heads"])
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.mode != "finetune":
            model.requires_grad_(False)
            trained = [model.head] + ([model.query, model.norm, model.attn] if self.mode == "attentive" else [])
            for part in trained:
                part.requires_grad_(True)
            model.train = lambda mode=True: torch.nn.Module.train(model, False)  # frozen: no dropout, no statistics
        else:
            model.recompute(self.recompute)
        return model

    def rows_of_head(self):
        """The numbers in --head-rows, or None."""
        if not self.head_rows:
            return None
        try:
            rows = json.loads(text_of(self.head_rows))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--head-rows {self.head_rows}: {error}") from None
        if not isinstance(rows, list) or not rows or not all(type(row) is int for row in rows):
            raise UserError(f"--head-rows {self.head_rows}: must hold a list of numbers, as [0, 2, 5]")
        return rows

    def encoder_for(self, classes):
        if self.weights:
            found = load_encoder(self.weights, classes, frames=self.num_frames, image_size=self.input_size, drop=self.drop,
                                 drop_path=self.drop_path, rows=self.rows_of_head(), positions=self.positions)
            masked = isinstance(found, mae.VideoClassifier)
            if not masked and found.config["image_size"] != [self.input_size] * 2 and self.input_size != type(self).input_size:
                found = resized(found, self.input_size)
            self.check_against_weights(encoder="masked" if masked else "multimodal",
                      model=size_named(found.config["size"], mae.SIZES if masked else uniformerv2.SIZES))
            return found
        if self.encoder == "masked":
            if self.model not in ("small", *mae.SIZES):
                raise UserError(f"--model {self.model}: is a UniFormerV2; add --encoder multimodal")
            return mae.VideoClassifier("tiny" if self.model == "small" else self.model, classes=classes,
                                       frames=self.num_frames, image_size=self.input_size, drop=self.drop,
                                       drop_path=self.drop_path, positions="axes" if self.model == "small" else "sinusoid")
        if self.model not in ("small", *uniformerv2.SIZES):
            raise UserError(f"--model {self.model}: is a VideoMAE; add --encoder masked")
        motion = dict(local_units=1, temporal_downsample=True, global_layers=(SMALL.depth - 1,)) \
            if self.model == "small" else {}
        return uniformerv2.UniFormerV2(SMALL if self.model == "small" else self.model, frames=self.num_frames,
                                       image_size=self.input_size, classes=classes, head_dropout=self.drop,
                                       drop_path=self.drop_path, **motion)

    def check(self, model):
        """Does the model take such clips? ValueError where not."""
        (model.encoder if isinstance(model, mae.VideoClassifier) else model).grid_of(
            self.num_frames, self.input_size, self.input_size)

    def scale_of(self, model, name):
        """Layer-wise decay: the embedding is layer 0, blocks are 1 to L, all behind them L + 1."""
        if self.mode != "finetune":
            return 1.0
        block = re.match(r"(encoder\.)?blocks\.(\d+)\.", name)
        early = re.match(r"(encoder\.)?(embed|norm_pre|class_token|positions)", name)
        layer = int(block[2]) + 1 if block else 0 if early else self.depth + 1
        return self.layer_decay ** (self.depth + 1 - layer)

    def look(self, model, video):
        """uint8 clips -> the frozen features that a probe reads."""
        video = data.normalise(video, model.mean, model.std)
        with self.autocast(), torch.no_grad():
            found = tokens_of(model.encoder, video) if self.mode == "attentive" else feature_of(model, video)
        return found.float()

    def logits(self, model, batch, target=None):
        """Logits (B, Y) of a batch, and its target, mixed in training where the recipe says so."""
        if "features" in batch:
            read = model.read if self.mode == "attentive" else model.head
            return read(batch["features"]), target
        video = data.normalise(batch["video"], model.mean, model.std)
        if target is not None and model.training and self.mixup + self.cutmix > 0:
            video, target = self.mix(video, target)
        with self.autocast():
            return model(video).float(), target

    def mix(self, video, target):
        """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899): one share and one box for a whole batch, alike in
        all frames, as VideoMAE fine-tunes. Draws from torch's global generator, which the loop has seeded."""
        forms = [form(alpha=alpha, num_classes=target.shape[1]) for form, alpha in
                 ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)) if alpha > 0]
        form = forms[int(torch.randint(len(forms), ()))]
        # Each clip is mixed with the one before it in the joined batch, which may be another process's.
        video, target = (torch.cat([processes.row_before(x), x]) for x in (video, target))
        mixed, target = form(tv_tensors.Video(video.transpose(1, 2)), target)
        return mixed.as_subclass(torch.Tensor).transpose(1, 2)[1:], target[1:]

    def loss(self, model, batch, rng):
        logits, target = self.logits(model, batch, self.target(batch))
        loss = self.error(logits, target, self.smoothing if model.training else 0.0)
        return loss, {"loss": loss.detach()}

    def batches(self, train_set, first):
        """Clips; or, for a probe, stored features, drawn at random."""
        if self.mode == "finetune":
            yield from super().batches(train_set, first)
            return
        features, targets = self.features
        for step in range(first * self.accum, self.steps * self.accum):
            rows, mine = processes.joined(self.batch_size)
            chosen = torch.randint(len(features), (rows,), generator=generator(self.seed, "probe", step))[mine]
            yield {"features": features[chosen].float(), "target": targets[chosen]}

    def old_prepare(self, model):
        """For a probe: look at every training clip once, and keep what was seen in --out/features.pt."""
        if self.mode == "finetune" or not self.steps:
            return
        path, settings = Path(self.out) / "features.pt", recipe_of(self) | {"weights": self.weights, "precision": self.precision}
        if self.resume and path.exists():
            with contextlib.suppress(Exception):  # damaged, or of another recipe: looking again costs little
                saved = weights.load(path)
                if saved["settings"] == settings:
                    self.features = saved["features"], saved["targets"]
                    return
        world = self.sets[0]
        count = self.probe_clips or (len(world) if self.data else 2000)
        count = min(count, len(world)) if self.data else count
        rows = []
        for batch in tqdm(self.held_out(world, count, self.eval_batch), desc="features", unit="batch",
                          total=-(-count // self.eval_batch // processes.world()), disable=processes.rank() > 0 or None):
            rows.append((batch["number"], self.look(model.eval(), batch["video"]).cpu(), self.target(batch).cpu()))
        _, features, targets = zip(*processes.collect(rows))
        self.features = torch.cat(features).to(torch.bfloat16), torch.cat(targets)
        if processes.rank() == 0:
            weights.write_torch(path, dict(features=self.features[0], targets=self.features[1], settings=settings))


@dataclass
class Fuse(Labels, name="fuse"):
    """Stage four: a bridge between two frozen experts, and a learned sum of their scores (InternVideo, Sec. 3.2,
    Cross-Model Interaction). Only bridges, gates, shares, heads with their norms and query tokens train."""

    num_frames: int = flag(0, "frames per clip; 0 = the most that an encoder looks at (paper: 16)", low=0, high=10**4)
    input_size: int = flag(0, "height and width in pixels; 0 = the largest that an encoder looks at (paper: 224)", low=0, high=10**4)
    masked: str = flag("", "the masked encoder: a run of classify, or an official file (paper: VideoMAE-H)")
    multimodal: str = flag("", "the multimodal encoder: a run of classify, or an official file (paper: UniFormerV2-L)")
    second: str = flag("", "a second multimodal encoder, for InternVideo-T; default: none")
    steps: int = flag(200, "optimiser steps; 0 = evaluate only (paper: 5 epochs)", low=0)
    batch_size: int = flag(32, "clips per process and step (paper: 64)", low=1)
    lr: float = flag(3e-3, "learning rate as it is; overrides --blr when above 0 (paper: 5e-5, or 5e-6: it prints "
                           "5 x 10^5)", low=0)
    scalar_scale: float = flag(30.0, "factor on the learning rate of gates and shares: a step of AdamW moves each "
                                     "number alike, and these few have far to go (paper: none named)", low=0)
    warmup: float = flag(0.2, "share of the steps that warm up linearly from 0 (paper: 1 of 5 epochs)", low=0, high=1)
    weight_decay: float = flag(0.001, "weight decay, on matrices only (paper: 0.001)", low=0)
    drop: float = flag(0.0, "dropout before both heads (paper: 0.9)", low=0, high=1)
    ema: float = flag(0.0, "decay per step of an average of the weights, used for evaluation; 0 = none (paper: 0.9999)",
                      low=0, high=1)
    before: str = flag("", "blocks of the masked encoder with a bridge before them, as 7,15,23,31; default: four, "
                           "evenly (the paper names none)")
    layers: str = flag("", "layer of the multimodal encoder that each bridge reads, as 5,11,17,23; default: as far up")
    heads: int = flag(0, "heads of the bridges; 0 = as the masked encoder", low=0)
    source: str = flag("all", "keys and values from all tokens, or from patches only", choices=("all", "patches"))
    gates: bool = flag(True, "tanh gates that start at 0 (paper: yes)")
    way: str = flag("both", "who asks: both, only the masked encoder, or only the multimodal encoder's global token (paper: both)",
                    choices=("both", "masked", "multimodal"))
    thaw: bool = flag(False, "train everything, both encoders too (paper: no)")
    bridges: bool = flag(True, "cross-model attention; --no-bridges: only heads and the sum of scores train")

    def old_build(self):
        model = fusion.InternVideo.from_run(self.weights) if self.weights else None
        experts = [model.masked, *model.multimodal] if model else self.experts()
        frames = max(expert.config["frames"] for expert in experts)
        if self.num_frames and self.num_frames < frames:
            raise UserError(f"--num-frames {self.num_frames}: the encoders look at up to {frames} frames")
        self.num_frames = self.num_frames or frames
        self.input_size = self.input_size or max(max(expert.config["image_size"]) for expert in experts)
        classes = self.ask()
        if model:
            self.check_against_weights(masked="", multimodal="", second="", before="", layers="", heads=0, way="both", bridges=True,
                      source=model.config["source"], gates=model.config["gates"])
            if model.masked.config["classes"] != classes:
                raise UserError(f"--weights {self.weights}: names {model.masked.config['classes']} classes, the data "
                              f"has {classes}")
            model.recompute(self.recompute)
            return model.requires_grad_(True) if self.thaw else model
        experts = [expert if expert.config["classes"] == classes else expert.with_head(classes) for expert in experts]
        try:
            if self.way == "multimodal" and (self.before or self.layers):
                raise UserError("--way multimodal: has no bridges before blocks; leave out --before and --layers")
            before = [] if self.way == "multimodal" else numbers(self.before, "before")
            model = fusion.InternVideo(
                experts[0], experts[1:], before=before, layers=self.layers_for(len(experts) - 1), last=self.way != "masked",
                heads=self.heads or None, source=self.source, gates=self.gates, bridges=self.bridges, drop=self.drop)
            model.recompute(self.recompute)
            return model.requires_grad_(True) if self.thaw else model
        except ValueError as error:
            raise UserError(str(error)) from None

    def scale_of(self, model, name):
        return self.scalar_scale if ".gate_" in name or name == "balance" else 1.0

    def experts(self):
        """The two or three encoders, with the heads they have; UserError where one is missing or of the wrong kind."""
        for name in ("masked", "multimodal"):
            if not getattr(self, name):
                raise UserError(f"--{name}: fuse needs both encoders; give a run of `classify` or an official file")
        found = {name: load_encoder(getattr(self, name)) for name in ("masked", "multimodal", "second") if getattr(self, name)}
        for name, expert in found.items():
            if isinstance(expert, mae.VideoClassifier) != (name == "masked"):
                kind = "VideoMAE; that is for --masked" if name != "masked" else "UniFormerV2; that is for --multimodal"
                raise UserError(f"--{name} {getattr(self, name)}: is a {kind}")
        return list(found.values())

    def layers_for(self, experts):
        """--layers for every expert, or None."""
        chosen = numbers(self.layers, "layers")
        return chosen and [chosen] * experts

    def logits(self, model, batch, target=None):
        with self.autocast():
            return model(batch["video"]).float(), target

    def loss(self, model, batch, rng):
        loss = self.error(self.logits(model, batch)[0], self.target(batch))
        metrics = {"loss": loss.detach()} | {
            "share_" + name: share for name, share in zip(("masked", "multimodal", "second"), model.shares().detach())}
        for name, parameter in model.named_parameters():
            if "gate_" in name:
                metrics["gate_" + name.replace(".gate_", ".")] = parameter.detach().tanh()
        return loss, metrics

    def old_note(self):
        return super().old_note() + ("; untrained, the bridges are silent: step 0 is the equal average of both experts' logits, and what is "
                                 "gained from there on is what training bridges, heads and shares adds")

    def old_finish(self, model):
        """As all cards with labels; before that, for a picture, the equal average of the experts' logits as they came.
        Here, where all processes are, for they share the clips."""
        self.before_training, classes = {}, sum(map(len, self.questions.values()))
        experts = [] if self.weights or not self.figures else self.experts()
        if experts and all(expert.config["classes"] == classes for expert in experts):  # else nothing could answer
            late, kept = fusion.InternVideo(experts[0], experts[1:], bridges=False).to(self.device).eval(), self.confusion
            self.measure(late, self.held_out(self.sets[1], self.eval_clips, self.eval_batch), "", keep=True)
            self.before_training, self.confusion = {"equal average, before": self.confusion}, kept
        return super().old_finish(model)

    def confusions(self):
        """Of the experts' average, and of what training made of it."""
        return self.before_training | {"after": self.confusion}

    def old_pictures(self, model, batch, folder):
        paths = super().old_pictures(model, batch, folder) + [folder / "gates.png"]
        pictures.gates([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], paths[-1])
        if model.before:
            paths.append(folder / "looks.png")
            pictures.looks(batch["video"][0].cpu().numpy(), *fusion.places(model, batch["video"][:1]), paths[-1])
        return paths


class Numbers(torch.utils.data.Dataset):
    """Items that are their own numbers, for what the loop's batches cannot hold: a card looks them up."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        number = index[0] if isinstance(index, tuple) else index
        return {"video": np.int64(number), "label": -1}


@dataclass
class Localise(OldCard, name="localise"):
    """What happens when, in long videos: a small head on a frozen encoder's features (InternVideo, Sec. 4.3,
    temporal action localisation; the head after AFSD and ActionFormer, the paper of the flags).

    On long generated videos, whose features are computed once; or on real ones, whose features tools/extract.py
    has computed. Then: python localise.py VIDEO --weights RUN"""

    data: str = flag("", "folder of .npz features by tools/extract.py, with --annotations; default: long generated videos")
    val_data: str = flag("", "the same for evaluation; default: also in --data")
    weights: str = flag("", "the encoder: a run of mae, clip or classify, or an official file; or a run of this stage. With "
                        "--data not needed, but kept in the run for videos")
    annotations: str = flag("", "JSON in the form of ActivityNet: what happens when in the videos of --data")
    train_subset: str = flag("training", "subset of --annotations to train on (THUMOS14: validation)")
    val_subset: str = flag("validation", "subset to evaluate on, all of it (THUMOS14: test)")
    videos: int = flag(300, "generated videos to train on", low=1)
    eval_clips: int = flag(100, "generated videos per evaluation", low=1)
    stride: int = flag(4, "frames from one window to the next (VideoMAE V2: 4 on THUMOS14, 16 on FineAction)", low=1)
    steps: int = flag(400, "optimiser steps; 0 = evaluate only", low=0)
    batch_size: int = flag(16, "videos per step", low=1)
    lr: float = flag(2e-3, "learning rate as it is; overrides --blr when above 0 (paper: 1e-4)", low=0)
    optimizer: str = flag("adamw", "muon = Muon for the matrices of numbered layers (blocks, bridges, heads of several), AdamW for the rest; adamw = AdamW for "
                          "all (paper: adamw)", choices=("muon", "adamw"))
    weight_decay: float = flag(0.05, "weight decay, on matrices only (paper: 0.05)", low=0)
    width: int = flag(128, "of the head (paper: 512)", low=1)
    depth: int = flag(4, "blocks of the head; each doubles what it overlooks", low=1, high=10)
    drop: float = flag(0.1, "dropout in the head", low=0, high=1)
    middle: float = flag(0.6, "share of a segment whose steps answer for it", low=0, high=1)
    length: int = flag(1024, "most steps of a video in training; of a longer one a random part (paper: 2304)", low=8)

    def old_build(self):
        run = bool(self.weights) and weights.read(self.weights)[1].get("model") == "Localiser"
        model = localisation.Localiser.from_run(self.weights) if run else None
        encoder = model.encoder if run else load_encoder(self.weights) if self.weights else None
        names, self.sets, width = self.open(model, encoder)
        self.measured = run
        self.model = model or localisation.Localiser(
            encoder, localisation.Head(width, len(names), self.width, self.depth, self.drop), names, self.stride)
        if self.model.names != names or self.model.stride != self.stride:
            raise UserError(f"--weights {self.weights}: was trained with other classes, or a stride of {self.model.stride}")
        return self.model

    def open(self, model, encoder):
        """(class names, [training items, held-out items], width of the features); of generated videos the worlds."""
        if not self.data:
            if encoder is None:
                raise UserError("--weights: localise needs an encoder; give a run of mae, clip or classify, or an official file")
            size = encoder.config["image_size"]
            sets = [moving_shapes.LongShapes(split, size, self.seed) for split in ("train", "val")]
            return sets[0].motions, sets, encoder.config["size"]["width"]
        if not self.annotations:
            raise UserError("--annotations: --data is a folder of features; name the JSON that says what happens when")
        told, names, sets = annotations.read_segments(self.annotations), model and model.names, []
        for folder, subset in ((self.data, self.train_subset), (self.val_data or self.data, self.val_subset)):
            items, names, missing = data.read_features(folder, told, subset, names)
            print(f"--data {folder}: {len(items)} videos of the subset {subset}, {len(names)} classes"
                  + (f"; the features of {len(missing)} are MISSING, e.g. {printable(str(missing[0]))}" if missing else ""))
            sets.append(items)
        first = sets[0][0]
        for item in itertools.chain(*sets):
            if any(item[key] != first[key] for key in ("model", "window", "stride")) or \
                    item["features"].shape[1] != first["features"].shape[1]:
                raise UserError(f"--data: {item['path']} was extracted with another model, window or stride than {first['path']}")
        if encoder is not None and model is None and weights.fingerprint(self.weights) != first["model"]:
            raise UserError(f"--weights {self.weights}: is not the model {first['model']} that the features were extracted with")
        self.stride, self.eval_clips = first["stride"], len(sets[1])
        return names, sets, first["features"].shape[1]

    def old_datasets(self):
        if isinstance(self.sets[0], moving_shapes.LongShapes):
            self.sets = self.features()
        for items in self.sets:
            for item in items:
                item["features"] = torch.as_tensor(item["features"])
                item["steps"] = [(*np.interp(segment[:2], *localisation.clock(item["times"])[::-1]), segment[2])
                                 for segment in item["segments"]]
        if not self.measured:
            self.model.head.measure(torch.cat([item["features"] for item in self.sets[0]]).to(self.device))
        self.mean = localisation.MeanSegments([item["segments"] for item in self.sets[0]],
                                          [item["duration"] for item in self.sets[0]])
        return tuple(Numbers(len(items)) for items in self.sets)

    def features(self):
        """Look at every generated video once, and keep what was seen in --out/features.pt."""
        path = Path(self.out) / "features.pt"
        settings = {name: getattr(self, name) for name in ("weights", "videos", "eval_clips", "stride", "seed", "precision")}
        if self.resume and path.exists():
            with contextlib.suppress(Exception):  # damaged, or of another recipe: looking again costs little
                saved = weights.load(path)
                if saved["settings"] == settings:
                    return saved["sets"]
        encoder = self.model.encoder.eval()
        counts, started = [1, 1] if self.dry_run else [self.videos, self.eval_clips], time.monotonic()
        with tqdm(total=sum(counts), desc="features", unit="video", disable=processes.rank() > 0 or None) as bar:
            sets = []
            for world, count in zip(self.sets, counts):
                rows = []
                for i in range(processes.rank(), count, processes.world()):
                    video = world[i]
                    frames = video.pop("video")
                    with self.autocast():
                        seen = torch.cat(list(localisation.look(encoder, frames, self.stride, 64))).cpu()
                    times = localisation.step_times(np.arange(len(frames)) / world.FPS, encoder.config["frames"], self.stride)
                    rows.append((i, video | {"features": seen, "times": times.tolist()}))
                    bar.update(processes.world())
                sets.append([item for _, item in processes.collect(rows)])
        if not self.dry_run and processes.rank() == 0:
            weights.write_torch(path, dict(sets=sets, settings=settings))
        print(f"features of {sum(counts)} videos: {time.monotonic() - started:.0f} s")
        return sets

    def gather(self, items, rng=None):
        """Videos, or with rng a random part of each long one, as a padded batch with its targets."""
        parts = []
        for item in items:
            count = len(item["features"])
            labels, wanted = localisation.assign(count, item["steps"], self.middle)
            first = int(torch.randint(max(count - self.length, 0) + 1, (), generator=rng)) if rng else 0
            part = slice(first, first + self.length if rng else count)
            parts.append((item["features"][part], torch.ones(count, dtype=torch.bool)[part], labels[part], wanted[part]))
        return {name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=empty).to(self.device)
                for name, column, empty in zip(("features", "inside", "labels", "wanted"), zip(*parts), (0.0, False, -1, 0.0))}

    def batches(self, train_set, first):
        for step in range(first * self.accum, self.steps * self.accum):
            rng = generator(self.seed, "videos", step)
            rows, mine = processes.joined(self.batch_size)
            chosen = torch.randint(len(self.sets[0]), (rows,), generator=rng).tolist()
            batch = self.gather([self.sets[0][i] for i in chosen], rng)  # of all processes: padded alike, counted together
            count = ((batch["labels"] >= 0) & batch["inside"]).sum().clamp(min=1) / processes.world()
            yield {name: value[mine] for name, value in batch.items()} | {"count": count}

    def loss(self, model, batch, rng):
        if "features" not in batch:  # the numbers of training videos
            batch = self.gather([self.sets[0][i] for i in batch["video"].tolist()])
        scores, distances = model.head(batch["features"], batch["inside"])
        parts = localisation.head_loss(scores, distances, batch["labels"], batch["wanted"], batch["inside"], batch.get("count"))
        return sum(parts), {"loss": sum(parts).detach(), "score_loss": parts[0].detach(), "distance_loss": parts[1].detach()}

    @torch.no_grad()
    def found(self, model, item):
        """The segments of one video, (n, 4)."""
        scores, distances = model.head(item["features"][None].to(self.device))
        found = localisation.decode(scores[0].sigmoid(), distances[0])
        return localisation.soft_nms(localisation.in_seconds(found, item["times"], item["duration"]))

    def old_evaluate(self, model, batches):
        """Mean loss, and mAP in percent at each temporal IoU and on average."""
        rows = []
        for i in (i for batch in batches for i in batch["video"].tolist()):
            item = self.sets[1][i]
            rows.append((i, float(self.loss(model, self.gather([item]), None)[0]), self.found(model, item)))
        numbers, losses, found = zip(*processes.collect(rows))
        found = dict(zip(numbers, found))
        return {"val_loss": float(np.mean(losses))} | self.mean_ap("val", [self.sets[1][i] | {"number": i} for i in numbers],
                                                                   lambda item: found[item["number"]])

    def mean_ap(self, name, items, say):
        """mAP of what `say` says of each item -> {name: percent}."""
        values = localisation.mean_average_precision([item["segments"] for item in items], [say(item) for item in items])
        values = {f"{name}_mAP@{threshold:g}": 100 * value for threshold, value in values.items()}
        return values | {f"{name}_mAP": float(np.mean(list(values.values())))}

    def old_finish(self, model):
        """The same of the baseline, and both as a table."""
        items = self.sets[1][:self.eval_clips]
        rows = {"localise": self.mean_ap("val", items, lambda item: self.found(model, item)),
                "mean segments": self.mean_ap("mean_segments", items, lambda item: self.mean(item["duration"]))}
        print(f"{'mAP in percent at temporal IoU':32s}" + "".join(f"{t:>7g}" for t in localisation.THRESHOLDS) + "   mean")
        for name, values in rows.items():
            print(f"{name:32s}" + "".join(f"{value:7.1f}" for value in values.values()))
        return rows["mean segments"]

    def old_note(self):
        what = "videos of --data" if self.data else "long videos of moving shapes, 14 motions, 8 frames a second"
        return (f"protocol: {self.eval_clips} held-out {what}; a feature every {self.stride} frames from a frozen encoder; "
                "Gaussian soft-NMS; interpolated AP as ActivityNet's, mean over classes, at temporal IoU 0.3 to 0.7; the "
                "baseline looks at no video and says the mean segments of the training videos, for every class")

    def old_pictures(self, model, batch, folder):
        rows = []
        for i in batch["video"].tolist()[:4]:
            item, frames = self.sets[1][i], None
            if not self.data:
                world = moving_shapes.LongShapes("val", self.model.encoder.config["image_size"], self.seed)
                frames = pictures.strip(world[i]["video"], 24)
            found = localisation.clearest(self.found(model, item))
            rows.append((item["path"], frames, item["duration"], item["segments"], found))
        pictures.segments(rows, model.names, folder / "segments.png")
        return [folder / "segments.png"]


@dataclass
class Answer(OldCard, name="answer"):
    """Questions about videos: a head on the caption decoder and both encoders, all of them trained (InternVideo,
    Sec. 4.4, video question answering).

    On generated questions about moving shapes; or on a file of `video, question, answer`. Then:
    python question_answering.py VIDEO QUESTION --weights RUN"""

    tokenizer: str = flag("", "tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the one beside --weights")
    num_frames: int = flag(0, "frames per clip; 0 = as --weights (paper: 8)", low=0, high=10**4)
    sampling: str = flag("segment", "files: segment = spread over the video, dense = neighbouring frames; the others are "
                         "those of the published models (paper: internvideo)", choices=tuple(data.SAMPLINGS))
    transform: str = flag("plain", "files: how frames are resized and cropped; plain is ours, the others are those of "
                          "the published models (paper: internvideo)", choices=tuple(data.TRANSFORMS))
    answers: int = flag(1500, "the commonest answers of training, which alone can be given (paper: 1,000 to 1,540)", low=2)
    drop: float = flag(0.1, "dropout in the head (paper: 0.5)", low=0, high=1)
    head_scale: float = flag(3.0, "factor on the learning rate of the head (paper: 10)", low=0)
    steps: int = flag(600, "optimiser steps; 0 = evaluate only (paper: 20 epochs)", low=0)
    batch_size: int = flag(32, "questions per process and step (paper: 512 in all)", low=1)
    lr: float = flag(1e-3, "learning rate as it is; overrides --blr when above 0 (paper: 1e-5)", low=0)
    weight_decay: float = flag(0.01, "weight decay, on matrices only (paper: 0.01)", low=0)
    warmup: float = flag(0.1, "share of the steps that warm up linearly from 0 (paper: 0.1)", low=0, high=1)
    eval_clips: int = flag(1000, "held-out questions per evaluation", low=1)
    eval_every: int = flag(500, "steps between evaluations; 0 = five times in the run", low=0)
    # Last, for inside this class these names hide the modules.
    data: str = flag("", "a file with questions: JSON, JSONL or CSV with video, question and answer; default: questions "
                     "about moving shapes")
    weights: str = flag("", "the video-text model: a run of clip, InternVideo-MM weights, or a run of this stage")

    def old_build(self):
        if not self.weights:
            raise UserError("--weights: answering starts from a video-text model; give a run of clip, or InternVideo-MM weights")
        run = weights.read(self.weights)[1].get("model") == "VideoQA"
        try:
            if run:
                model = question_answering.VideoQA.from_run(self.weights, self.drop)
                self.check_against_weights(answers=len(model.answers))
            else:
                clip = clip_video.VideoCLIP.from_official(self.weights, frames=self.num_frames or None)
                decoder = caption_decoder.CaptionDecoder.from_official(self.weights)
            config = (model.clip if run else clip).config
            self.words = clip_video.tokenizer_of(self.weights, self.tokenizer, config["vocabulary"])
        except ValueError as error:
            raise UserError(str(error)) from None
        self.num_frames, size = self.num_frames or config["frames"], config["image_size"][0]
        if self.data:
            self.sets = clips(self, self.num_frames, size, self.sampling, flip=False, transform=self.transform)
            for source in self.sets:
                if not isinstance(source, data.VideoFiles) or any(row.answer is None or not (row.question or "").strip() for row in source.rows):
                    raise UserError(f"{source.source}: a question or an answer is missing; give JSON, JSONL or CSV with "
                                  "video, question and answer")
            asked = [(row.question, row.answer) for row in self.sets[0].rows]
        else:
            self.sets = tuple(moving_shapes.QuestionShapes(split, self.num_frames, size, self.seed) for split in ("train", "val"))
            asked = [moving_shapes.ask(self.sets[0].scene(i).facts, np.random.default_rng((self.seed, i))) for i in range(3000)]
        self.question_only = question_answering.QuestionOnly(*zip(*asked))
        self.most = self.question_only.most
        self.table = model.answers if run else question_answering.answer_table((answer for _, answer in asked), self.answers)
        model = model if run else question_answering.VideoQA(clip, decoder, self.table, self.drop)
        model.clip.recompute(self.recompute)
        return model

    def old_datasets(self):
        return self.sets

    def extras(self, folder):
        self.words.save(folder)

    def scale_of(self, model, name):
        return self.head_scale if name.startswith("head.") else 1.0

    def scores(self, model, batch):
        """What the model makes of each answer, (B, Y), and the places of the right ones, -1 where not in the table."""
        video = data.normalise(batch["video"], model.clip.mean, model.clip.std)
        ids = self.words.encode(batch["question"], model.clip.config["context"], trim=True)[0].to(video.device)
        place = {answer: i for i, answer in enumerate(self.table)}
        right = [place.get(question_answering.normalised(answer), -1) for answer in batch["answer"]]
        with self.autocast():
            scores = model(video, ids)
        return scores.float(), torch.tensor(right, device=video.device)

    def loss(self, model, batch, rng):
        scores, right = self.scores(model, batch)
        count = (right >= 0).sum()
        count = processes.mean(count) if model.training else count
        loss = torch.nn.functional.cross_entropy(scores, right, ignore_index=-1, reduction="sum") / count.clamp(min=1)
        return loss, {"loss": loss.detach()}

    def old_evaluate(self, model, batches):
        """Accuracy of all questions and of each kind, in percent."""
        rows = self.asked(model, batches)
        return {"val_accuracy": 100 * float(np.mean([said == answer for _, answer, said in rows]))}

    def asked(self, model, batches):
        """[(question, right answer, answer of the model), ...] of the held-out clips."""
        rows = []
        for batch in batches:
            said = self.scores(model, batch)[0].argmax(dim=1).tolist()
            rows.append((batch["number"], [(question, question_answering.normalised(answer), self.table[i])
                                           for question, answer, i in zip(batch["question"], batch["answer"], said)]))
        return [row for _, part in processes.collect(rows) for row in part]

    def old_finish(self, model):
        """A table by kind of question, with both baselines: the commonest answer, and what the question alone tells."""
        rows = self.asked(model, self.held_out(self.sets[1], self.eval_clips, self.eval_batch))
        kinds, found = {}, {}
        for question, answer, said in rows:
            words = question.lower().split()
            right = (said == answer, self.question_only(question) == answer, self.most == answer)
            for kind in ("all questions", words[0] if self.data else " ".join(words[:2])):
                kinds.setdefault(kind, []).append(right)
        print(f"{'accuracy in percent':24s}{'questions':>10s}{'answered':>10s}{'question only':>15s}{'commonest answer':>18s}")
        for kind, right in sorted(kinds.items(), key=lambda item: -len(item[1])):
            share = 100 * np.mean(right, axis=0)
            print(f"{kind:24s}{len(right):10d}{share[0]:10.1f}{share[1]:15.1f}{share[2]:18.1f}")
            found[kind.replace(" ", "_")] = share.tolist()
        for name, column in (("question_only", 1), ("commonest_answer", 2)):
            found[name] = found["all_questions"][column]
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def old_note(self):
        count = min(self.eval_clips, len(self.sets[1])) if self.data else self.eval_clips
        return (f"protocol: {count} held-out questions{'' if self.data else ' about moving shapes'}, open-ended; the answer is one "
                f"of the {len(self.table)} commonest of training, compared in lower case without punctuation, others count as "
                f"wrong; {self.num_frames} frames{f', sampling {self.sampling}, transform {self.transform}' if self.data else ''}; chance is {100 / len(self.table):.1f} %")

    @torch.no_grad()
    def old_pictures(self, model, batch, folder):
        said = [self.table[i] for i in self.scores(model, batch)[0].argmax(dim=1).tolist()]
        pictures.captions(batch["video"].cpu().numpy(), [f"{question} {answer}" for question, answer in zip(
            batch["question"], batch["answer"])], said, folder / "answers.png")
        return [folder / "answers.png"]


def size_named(size, known):
    """The name, in a table of sizes, of a model's size (a dict)."""
    return next((name for name, one in known.items() if (one.width, one.depth) == (size["width"], size["depth"])), "of its own")


def resized(model, size):
    """A UniFormerV2 or VideoCLIP for frames of another size, with a line that says so."""
    try:
        found = model.resized(size)
    except ValueError as error:
        raise UserError(f"--input-size {size}: {error}") from None
    height, width = model.config["image_size"]
    print(f"--input-size {size}: the weights' table of places, made for {height} x {width} pixels, is interpolated")
    return found


def numbers(text, name, kind=int):
    """"2,5,8" -> [2, 5, 8], "" -> None; UserError where it is neither."""
    one, example = (r"\d+", "2,5,8") if kind is int else (r"\d*\.?\d+", "0.6,0.75,0.9")
    if not text:
        return None
    if not re.fullmatch(f"{one}(,{one})*", text):
        raise UserError(f"--{name} {text}: give numbers with commas, as {example}")
    return [kind(number) for number in text.split(",")]


def merge_views(logits, form="softmax"):
    """Scores of several views of one video (n, Y) -> (Y,). "softmax": the softmax of each, then the mean (VideoMAE,
    Sec. 4; UniFormerV2 on Kinetics), so that one view that is very sure cannot outvote the others; "logits": their mean
    as they are (UniFormerV2 on Something-Something)."""
    return (logits.softmax(dim=1) if form == "softmax" else logits).mean(dim=0)


def accuracies(logits, answers):
    """{question: (B, classes)}, {question: (B,)} -> {name: percent}. One question, the label: top 1 and top 5.
    Several: each, and the share of clips with all of them right."""
    right = {name: logits[name].argmax(dim=1) == answers[name] for name in logits}
    if list(logits) == ["label"]:
        five = logits["label"].topk(min(5, logits["label"].shape[1])).indices == answers["label"][:, None]
        return {"top1": 100 * float(right["label"].float().mean()), "top5": 100 * float(five.any(dim=1).float().mean())}
    found = {name: 100 * float(hit.float().mean()) for name, hit in right.items()}
    return found | {"all_facts": 100 * float(torch.stack(list(right.values())).all(dim=0).float().mean())}



def auroc(known, unknown):
    """Area under the ROC curve: how often a known clip (n,) scores above an unknown one (m,), ties counted half ->
    float in [0, 1]; 0.5 is chance."""
    above = (known[:, None] > unknown).double() + 0.5 * (known[:, None] == unknown).double()
    return float(above.mean())


def clips(stage, frames, size, sampling="dense", rate=4, flip=True, transform="plain", **augment):
    """(training set, held-out set) of what --data names, or of moving shapes. flip: mirrored clips in
    training, too; not where a caption may say left. augment: more for the training set, see VideoFiles."""
    if not stage.data:
        return (moving_shapes.MovingShapes("train", frames, size, stage.seed),
                moving_shapes.MovingShapes("val", frames, size, stage.seed))
    options = dict(frames=frames, size=size, sampling=sampling, stride=rate, seed=stage.seed,
                   flip=flip, transform=transform)
    part = "all" if stage.val_data else "train"
    train = data.open_clips(stage.data, train=True, part=part, **options, **augment)
    held_out = data.open_clips(stage.val_data or stage.data, train=False, classes=train.classes,
                               part="all" if stage.val_data else "val", **options)
    print(f"--data {train.summary()}")
    print(f"held out: {len(held_out)} files")
    return train, held_out


# --------------------------------------------------------------------------------------------------
# The loop

# Classes of modules whose forward pass --compile compiles, each module by itself.
BLOCKS = (Block, caption_decoder.SelfBlock, caption_decoder.CrossBlock, fusion.CrossModelAttention)


@one_line_errors
def train(stage, again="--resume"):
    """Train, evaluate and save one stage; returns what its metrics.json holds.

    again  what to type to go on with this run where it ends early: "--resume", or a whole line
    """
    run = Run(stage, again)                         # folder, device, precision, kernels
    torch.manual_seed(stage.seed)
    train_set, held_out = stage.datasets()          # held_out: {"val": ..., "unseen": ...}
    model = stage.build(train_set)
    if stage.dry_run:
        return dry_run(stage, model, train_set)
    training_loss = run.prepare(model, BLOCKS)      # to the device; compiled; DDP or FSDP2
    optimizer = build_optimizer(model, stage)
    first = run.resume(optimizer)                   # 0, or where the last checkpoint stopped
    run.start(train_set, held_out)                  # the log; the evaluation before any step

    with run.training():                            # a bar; a signal ends the run after a step
        for step, micro_batches in run.steps(stage.batches(train_set, first)):
            rate, metrics = learning_rate(stage, step), {}
            optimizer.set_rate(rate)
            torch.manual_seed(generator(stage.seed, "dropout", step).initial_seed())
            for i, batch in enumerate(micro_batches):
                with run.accumulating(last=i == stage.accum - 1):
                    rng = generator(stage.seed, "loss", step, i)
                    loss, values = training_loss(batch, rng)  # stage.loss(model, batch, rng)
                    (loss / stage.accum).backward()
                add_means(metrics, values, stage.accum)
            grad_norm = clip_gradients(model, stage.clip_grad)
            metrics = run.check_finite(metrics, grad_norm, rate)  # means over processes
            optimizer.step()
            optimizer.zero_grad()
            run.update_average()                    # --ema
            done = step + 1
            run.log(done, metrics, rate, grad_norm)
            if run.evaluates_at(done):
                run.evaluate(done)
            if run.saves_at(done):
                run.save(done)
    return run.finish()                             # weights, metrics.json, pictures


# --------------------------------------------------------------------------------------------------
# The command line

# The default run: what a reader would type, and seconds on two CPU cores. {out} is its folder.
DEFAULT_RUN = {
    "mae --out {out}/mae": 120,
    "clip --out {out}/clip": 260,
    "classify --weights {out}/mae --out {out}/masked": 45,
    "classify --weights {out}/clip --out {out}/multimodal --lr 2e-3 --layer-decay 0.75 "
    "--steps 200": 25,
    "classify --out {out}/scratch": 45,
    "fuse --masked {out}/masked --multimodal {out}/multimodal --out {out}/fuse": 45,
}


def default_run(argv):
    """The commands of DEFAULT_RUN in turn, then tools/table.py. What is done is not done again."""
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="The default run: every stage on generated clips.")
    parser.add_argument("--out", default="runs/default", help="folder; in it one for each stage")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args(argv)
    if not 0 <= args.seed <= 10**9:
        raise UserError(f"--seed {args.seed}: must be at least 0 and at most {10**9}")
    began = time.monotonic()
    again = "python train.py" + f" --out {shlex.quote(args.out)}" * (args.out != "runs/default") \
        + f" --seed {args.seed}" * (args.seed > 0)
    stages = []
    for command, seconds in DEFAULT_RUN.items():
        name, *flags = shlex.split(command.format(out=shlex.quote(args.out)))
        flags += ["--seed", str(args.seed), "--resume"]
        stages.append((parse(STAGES[name], flags), seconds))
    waiting = [(stage, seconds) for stage, seconds in stages if not is_done(stage)]
    minutes = sum(seconds for _, seconds in waiting) / 60
    print(f"the default run, about {minutes:.0f} minutes on two cores: "
          + ", ".join(f"{Path(stage.out).name} {seconds} s" for stage, seconds in waiting))
    for stage, _ in stages:
        if is_done(stage):
            print(f"{Path(stage.out).name}: done already, see {stage.out}/metrics.json")
        else:
            train(stage, again)
    if processes.rank() == 0:
        from tools import table
        table.write_table(args.out, args.seed)
    print(f"the default run took {time.monotonic() - began:.0f} s; pictures, table and weights are "
          f"in {args.out}")


def is_done(stage):
    """True where the folder of a stage has its metrics.json. UserError where that is another's."""
    path = Path(stage.out) / "metrics.json"
    if not os.path.exists(path):
        return False
    try:
        seed = json.loads(path.read_text())["settings"]["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what a run wrote; remove it to have the stage done "
                        "anew") from None
    if seed != stage.seed:
        raise UserError(f"--seed {stage.seed}: {stage.out} was made with seed {seed}; use another "
                        "--out")
    return True


def command(argv):
    """["mae", "--steps", "10"] -> that stage; [] or only --out and --seed -> the default run."""
    if not argv or argv[0].split("=")[0] in ("--out", "--seed"):
        default_run(argv)
    elif argv[0] in ("-h", "--help"):
        print(__doc__)
        print("stages: " + ", ".join(f"{name} ({stage.__doc__.splitlines()[0]})"
                                     for name, stage in STAGES.items()))
    elif argv[0] not in STAGES:
        raise UserError(f"no stage {argv[0]!r}: choose {', '.join(STAGES)}, or nothing for the "
                        "default run")
    else:
        train(parse(STAGES[argv[0]], argv[1:]))


def main(argv=None):
    """Run a stage, or the default run -> the exit code: 0; 2 for an error of the user's, 1 for
    one of the machine or of the numbers, 130 where the run was asked to stop."""
    machine.keep_memory()
    return exit_code(lambda: command(sys.argv[1:] if argv is None else argv))


# Every file in tasks/ may define stages; importing it registers them.
TASKS = {module.name: importlib.import_module(f"tasks.{module.name}")
         for module in pkgutil.iter_modules(tasks.__path__)}

if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # tools/table.py imports it: once, not twice
    raise SystemExit(main())
