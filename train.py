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

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zlib
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
from engine import processes
from tasks import question_answering
import uniformerv2
import weights
from attention import Attention, Block
from engine.errors import Interrupted, RunError, UserError, printable


def flag(default, help, low=None, high=None, choices=None):
    """A field of a card: a default and, for the command line, help with a unit and the legal range."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


# ------------------------------------------------------------------------------------------------
# The knobs that every stage shares


@dataclass
class Stage:
    """A recipe. Cards inherit the fields below; `STAGES`, at the end of the cards, gives them their names. A card defines

    build()                  -> the model, untrained or from weights, with a dict `config` of what it was made with
    datasets()               -> (training set, held-out set); an item is a dict with "video", see data.py
    loss(model, batch, rng)  -> (loss, {name: number}); chance comes from the generator `rng` alone

    and may redefine `evaluate`, `note` (the protocol in words), `pictures`, and whatever else it does otherwise."""

    data: str = flag("", "folder of videos, or a list of `path label` lines; default: generated moving shapes")
    val_data: str = flag("", "the same for evaluation; default: every tenth file of --data")
    out: str = flag("", "folder for logs, weights and pictures; default: runs/<stage>")
    weights: str = flag("", "start from these weights: a run's folder or an official file")
    resume: bool = flag(False, "go on from the newest good checkpoint in --out; starts anew where there is none, so that a "
                               "cluster may start the same line again and again")
    keep: int = flag(2, "checkpoints to keep, last.pt included: should one be damaged, --resume takes the one before",
                     low=1)
    steps: int = flag(1000, "optimiser steps; 0 = evaluate only", low=0)
    batch_size: int = flag(32, "clips per process and step", low=1)
    accum: int = flag(1, "micro-batches per step: more clips a step, no more memory", low=1)
    blr: float = flag(1.5e-4, "learning rate at 256 clips a step; scaled by clips/256", low=0)
    lr: float = flag(0.0, "learning rate as it is; overrides --blr when above 0", low=0)
    min_lr: float = flag(0.01, "final learning rate as a fraction of the peak", low=0, high=1)
    warmup: float = flag(0.05, "share of the steps that warm up linearly from 0", low=0, high=1)
    optimizer: str = flag("muon", "muon = Muon for the matrices of numbered layers (blocks, bridges, heads of several), AdamW for the rest; adamw = AdamW for "
                          "all (paper: adamw)", choices=("muon", "adamw"))
    weight_decay: float = flag(0.05, "weight decay, on matrices only", low=0)
    beta2: float = flag(0.999, "AdamW second-moment decay", low=0, high=0.999999)
    clip_grad: float = flag(1.0, "largest gradient norm; 0 = no clipping", low=0)
    spike: float = flag(0.0, "leave out steps whose loss is more than so many times its running mean; 0 = none", low=0)
    ema: float = flag(0.0, "decay per step of an average of the weights, used for evaluation; 0 = none",
                      low=0, high=1)
    figures: bool = flag(True, "pictures at the end of the run; --no-figures saves some seconds")
    seed: int = flag(0, "of everything random", low=0)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = flag("auto", "bf16 = bfloat16 autocast; auto = that where the processor has it",
                          choices=("auto", "bf16", "fp32"))
    attention: str = flag("auto", "form of all attentions: auto = by device, type and mask, see attention.choose",
                          choices=attention.FORMS)
    onednn: str = flag("auto", "CPU: float32 matrix products by oneDNN; auto = where the processor is not Intel's and a probe finds it as exact",
                       choices=("auto", "on", "off"))
    compile: str = flag("auto", "torch.compile each block; auto = on CUDA: on a CPU it takes half a minute and gains at "
                        "most 4 percent", choices=("auto", "on", "off"))
    recompute: bool = flag(False, "gradient checkpointing: a third more time for a fraction of the memory")
    shard: bool = flag(False, "several processes: each keeps a part of weights, gradients and optimiser states (FSDP2)")
    workers: int = flag(1, "processes that prepare clips, per training process; 0 = in that one", low=0, high=1000)
    max_bad: float = flag(0.5, "share of unreadable clips at which the run stops, once there are ten", low=0, high=1)
    decoder: str = flag("pyav", "what decodes files; torchcodec, where installed, refuses some files and is rarely faster",
                        choices=("pyav", "torchcodec"))
    eval_clips: int = flag(256, "held-out clips per evaluation", low=1)
    eval_batch: int = flag(32, "clips at a time in evaluation, per process; no number depends on --batch-size", low=1)
    eval_every: int = flag(0, "steps between evaluations; 0 = five times in the run", low=0)
    save_every: int = flag(100, "steps between checkpoints", low=1)
    log_every: int = flag(10, "steps between lines of log.jsonl", low=1)
    dry_run: bool = flag(False, "print parameters, FLOPs per clip and memory, then stop")
    began = False  # True once what is in --out is this run's

    def decided(self, **own):
        """What --weights have decided: UserError where a flag asks for something else than these values."""
        for name, value in own.items():
            asked, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            if asked not in (usual, value):
                raise UserError(f"--{name.replace('_', '-')} {asked}: {self.weights} keeps its own, {value}; leave it out")

    def autocast(self):
        """Run networks, not losses, in bfloat16 where --precision says so."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")

    def faster(self, function):
        """The function, compiled into one kernel where --compile says so."""
        return compiled(function) if self.compile == "on" else function

    def batches(self, train_set, first):
        """What each micro-batch holds, from step `first` on; a function of (seed, step) alone."""
        return data.batches(train_set, self.batch_size, self.seed, self.steps * self.accum, start=first * self.accum,
                            workers=self.workers, rank=processes.rank(), world=processes.world())

    def held_out(self, dataset, count, batch_size):
        """Batches of clips to look at once, on the device, each with its "number". Of several processes each
        gets other ones; `processes.collect` puts together what they found."""
        for batch in data.held_out(dataset, count, batch_size, self.workers, processes.rank(), processes.world()):
            if batch["video"] is not None:
                yield to_device(batch, self.device)

    def evaluate(self, model, batches):
        """Mean of the training metrics over held-out batches -> {name: float}."""
        rows = []
        for batch in batches:
            _, metrics = self.loss(model, batch, generator(self.seed, "evaluation", batch["number"]))
            rows.append((batch["number"], len(batch["video"]), {name: float(value) for name, value in metrics.items()}))
        return {f"val_{name}": value for name, value in weighted_mean(processes.collect(rows)).items()}

    def prepare(self, model):
        """Whatever takes time and must be there before the first step."""

    def scale_of(self, name):
        """Factor on the learning rate of the parameter with this name."""
        return 1.0

    def note(self):
        """What a reader must know to judge the curve, printed at the start."""
        return ""

    def finish(self, model):
        """What is measured once, after the last step -> {name: float}."""
        return {}

    def pictures(self, model, batch, folder):
        """Draw what the stage learned on one held-out batch; returns the paths."""
        return []

    def extras(self, folder):
        """Write what else belongs beside the weights."""


# ------------------------------------------------------------------------------------------------
# The cards


@dataclass
class MAE(Stage):
    """Stage one: masked video modelling (InternVideo, Sec. 3.2; VideoMAE, arXiv 2203.12602).

    Hide most of each clip in tubes, paint it back, keep the encoder."""

    steps: int = flag(1500, "optimiser steps; 0 = evaluate only (paper: 800 to 1600 epochs of Kinetics-400)",
                      low=0)
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

    def build(self):
        if self.weights:
            model = mae.VideoMAE.from_official(self.weights, frames=self.num_frames,
                                               image_size=self.input_size)
            size = model.config["size"]
            self.decided(normalise=model.config["normalised"])
            self.normalise = model.config["normalised"]
            self.decided(positions=model.config["positions"], space_time=model.config["space_time"],
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

    def datasets(self):
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

    def note(self):
        if not self.normalise:
            return "targets are pixels in [0, 1]: the loss is a squared brightness error"
        return ("painting every hidden tubelet with its mean alone costs 0.99 to 1.0: that is the trivial baseline. "
                "A good loss is not near 0, for fine texture and noise cannot be foreseen")

    def pictures(self, model, batch, folder):
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
class Clip(Stage):
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

    def build(self):
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
        self.decided(kind=clip.kind, local_units=clip.config["local_units"], temporal_downsample=clip.config["temporal_downsample"],
                     vocabulary=clip.config["vocabulary"], model=size_named(clip.config["size"], uniformerv2.SIZES | {"small": SMALL}))
        self.local_units = clip.config["local_units"]
        if any(key.startswith("caption_decoder.") for key in weights.read(self.weights)[0]):
            decoder = caption_decoder.CaptionDecoder.from_official(self.weights)
            self.decided(caption_depth=decoder.config["depth"], queries=decoder.config["queries"])
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
                               flip=False, part=part, transform=self.transform, decoder=self.decoder)

    def datasets(self):
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

    def evaluate(self, model, batches):
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

    def finish(self, model):
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

    def note(self):
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
    def pictures(self, model, batch, folder):
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
class Retrieve(Clip):
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

    def build(self):
        if not self.weights:
            raise UserError("--weights: fine-tuning starts from a model; give a run of clip, or an official file")
        if self.gallery != type(self).gallery or not self.data and self.motion_words != 1:
            raise UserError("--gallery: here all of --eval-clips are in it; --motion-words: clips of two acts name both motions; "
                          "leave them out")
        self.gallery, self.eval_every = self.eval_clips, self.eval_every or max(1, self.steps)
        return super().build()

    def open(self):
        return super().open() if self.data else (self.world("train"), self.world("val"))

    def world(self, split):
        return moving_shapes.ActShapes(split, self.num_frames, self.input_size, self.seed)

    def classes_of(self, model):
        return None

    def evaluate(self, model, batches):
        """Loss and R@1 both ways, raw and dual softmax."""
        return self.measure(model, batches, None, "val_")

    def finish(self, model):
        """All ranks as a table."""
        print(f"{'':28s}" + "".join(f"{name:>8s}" for name in ("R@1", "R@5", "R@10", "MdR", "MnR")))
        for way, name in (("t2v", "text to video"), ("v2t", "video to text")):
            for kind in ("", "dsl_"):
                print(f"{name + ', dual softmax' * bool(kind):28s}" + "".join(
                    f"{self.ranks[f'{kind}{way}_{rank}']:8.1f}" for rank in ("R@1", "R@5", "R@10", "MdR", "MnR")))
        return self.ranks | super().finish(model)

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
        query = self.query.expand(len(tokens), -1, -1)
        return self.head(self.attn(query, keys_from=self.norm(tokens))[:, 0])

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
class Labels(Stage):
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

    def datasets(self):
        return self.sets

    def note(self):
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

    def finish(self, model):
        """Accuracies over several views of each held-out video: softmax per view, averaged in memory. With --test, on the
        test split."""
        if self.test and not self.data:
            world = moving_shapes.MovingShapes("test", self.num_frames, self.input_size, self.seed).only(self.sets[1].shown)
            return self.measure(model, self.held_out(world, self.test, self.eval_batch), "test_")
        if self.test_clips * self.test_crops == 1:
            return {}
        views = data.open_clips(self.val_data or self.data, self.num_frames, self.input_size, self.sampling_rate,
                                self.sampling, train=False, classes=self.sets[1].classes,
                                part="all" if self.val_data else "val", transform=self.transform, decoder=self.decoder,
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

    def evaluate(self, model, batches):
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

    def pictures(self, model, batch, folder):
        first, names = next(iter(self.questions.items()))
        pictures.confusion({f"{first}, {when}": counts for when, counts in self.confusions().items()}, names,
                       folder / "confusion.png")
        return [folder / "confusion.png"]

    def confusions(self):
        """What the last evaluation said for what, of the first question: {when: (Y, Y) counts}."""
        return {"held-out clips": self.confusion}


@dataclass
class Classify(Labels):
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

    def evaluate(self, model, batches):
        """As all cards with labels. With --unknown also the AUROC, in percent, of telling known from unknown classes by
        the largest probability that the model gives (arXiv 1610.02136, Sec. 3, Softmax Prediction Probability).
        InternVideo (Sec. 4.3, open-set action recognition) learns how much evidence there is instead (DEAR, arXiv
        2107.10161); we do not."""
        metrics = super().evaluate(model, batches)
        if self.unknown:
            question = next(iter(self.questions))
            strange = torch.cat([self.split(self.logits(model, to_device(batch, self.device))[0])[question].softmax(
                dim=1).amax(dim=1) for batch in data.held_out(self.strangers, self.eval_clips, self.eval_batch)])
            metrics |= {"val_unknown_auroc": 100 * auroc(self.sureness, strange), "val_unknown_clips": len(strange)}
        return metrics

    def note(self):
        if not self.unknown:
            return super().note()
        name, known = next(iter(self.questions.items()))
        return super().note() + (f"; open set: trained on {len(known)} classes of {name}; the AUROC compares the largest probability on held-out "
                f"clips of these with clips of those left out ({self.unknown}); chance is 50")

    def build(self):
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
            self.decided(encoder="masked" if masked else "multimodal",
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

    def scale_of(self, name):
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

    def prepare(self, model):
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
class Fuse(Labels):
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

    def build(self):
        model = fusion.InternVideo.from_run(self.weights) if self.weights else None
        experts = [model.masked, *model.multimodal] if model else self.experts()
        frames = max(expert.config["frames"] for expert in experts)
        if self.num_frames and self.num_frames < frames:
            raise UserError(f"--num-frames {self.num_frames}: the encoders look at up to {frames} frames")
        self.num_frames = self.num_frames or frames
        self.input_size = self.input_size or max(max(expert.config["image_size"]) for expert in experts)
        classes = self.ask()
        if model:
            self.decided(masked="", multimodal="", second="", before="", layers="", heads=0, way="both", bridges=True,
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

    def scale_of(self, name):
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

    def note(self):
        return super().note() + ("; untrained, the bridges are silent: step 0 is the equal average of both experts' logits, and what is "
                                 "gained from there on is what training bridges, heads and shares adds")

    def finish(self, model):
        """As all cards with labels; before that, for a picture, the equal average of the experts' logits as they came.
        Here, where all processes are, for they share the clips."""
        self.before_training, classes = {}, sum(map(len, self.questions.values()))
        experts = [] if self.weights or not self.figures else self.experts()
        if experts and all(expert.config["classes"] == classes for expert in experts):  # else nothing could answer
            late, kept = fusion.InternVideo(experts[0], experts[1:], bridges=False).to(self.device).eval(), self.confusion
            self.measure(late, self.held_out(self.sets[1], self.eval_clips, self.eval_batch), "", keep=True)
            self.before_training, self.confusion = {"equal average, before": self.confusion}, kept
        return super().finish(model)

    def confusions(self):
        """Of the experts' average, and of what training made of it."""
        return self.before_training | {"after": self.confusion}

    def pictures(self, model, batch, folder):
        paths = super().pictures(model, batch, folder) + [folder / "gates.png"]
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
class Localise(Stage):
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

    def build(self):
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

    def datasets(self):
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

    def evaluate(self, model, batches):
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

    def finish(self, model):
        """The same of the baseline, and both as a table."""
        items = self.sets[1][:self.eval_clips]
        rows = {"localise": self.mean_ap("val", items, lambda item: self.found(model, item)),
                "mean segments": self.mean_ap("mean_segments", items, lambda item: self.mean(item["duration"]))}
        print(f"{'mAP in percent at temporal IoU':32s}" + "".join(f"{t:>7g}" for t in localisation.THRESHOLDS) + "   mean")
        for name, values in rows.items():
            print(f"{name:32s}" + "".join(f"{value:7.1f}" for value in values.values()))
        return rows["mean segments"]

    def note(self):
        what = "videos of --data" if self.data else "long videos of moving shapes, 14 motions, 8 frames a second"
        return (f"protocol: {self.eval_clips} held-out {what}; a feature every {self.stride} frames from a frozen encoder; "
                "Gaussian soft-NMS; interpolated AP as ActivityNet's, mean over classes, at temporal IoU 0.3 to 0.7; the "
                "baseline looks at no video and says the mean segments of the training videos, for every class")

    def pictures(self, model, batch, folder):
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
class Answer(Stage):
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

    def build(self):
        if not self.weights:
            raise UserError("--weights: answering starts from a video-text model; give a run of clip, or InternVideo-MM weights")
        run = weights.read(self.weights)[1].get("model") == "VideoQA"
        try:
            if run:
                model = question_answering.VideoQA.from_run(self.weights, self.drop)
                self.decided(answers=len(model.answers))
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

    def datasets(self):
        return self.sets

    def extras(self, folder):
        self.words.save(folder)

    def scale_of(self, name):
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

    def evaluate(self, model, batches):
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

    def finish(self, model):
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

    def note(self):
        count = min(self.eval_clips, len(self.sets[1])) if self.data else self.eval_clips
        return (f"protocol: {count} held-out questions{'' if self.data else ' about moving shapes'}, open-ended; the answer is one "
                f"of the {len(self.table)} commonest of training, compared in lower case without punctuation, others count as "
                f"wrong; {self.num_frames} frames{f', sampling {self.sampling}, transform {self.transform}' if self.data else ''}; chance is {100 / len(self.table):.1f} %")

    @torch.no_grad()
    def pictures(self, model, batch, folder):
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


STAGES = {"mae": MAE, "clip": Clip, "retrieve": Retrieve, "classify": Classify, "fuse": Fuse, "localise": Localise, "answer": Answer}

# The default run: folder, card, what differs from the card ({} is the run's folder), seconds on two cores.
DEFAULT_RUN = (
    ("mae", MAE, {}, 120),
    ("clip", Clip, {}, 260),
    ("masked", Classify, dict(weights="{}/mae"), 45),
    ("multimodal", Classify, dict(weights="{}/clip", lr=2e-3, layer_decay=0.75, steps=200), 25),
    ("scratch", Classify, {}, 45),
    ("fuse", Fuse, dict(masked="{}/masked", multimodal="{}/multimodal"), 45),
)


def weighted_mean(rows):
    """[(number, clips, {name: value}, ...), ...] -> {name: mean over all clips}."""
    total = {}
    for _, count, values, *_ in rows:
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value * count
    return {name: value / sum(row[1] for row in rows) for name, value in total.items()}


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
                   flip=flip, transform=transform, decoder=stage.decoder)
    part = "all" if stage.val_data else "train"
    train = data.open_clips(stage.data, train=True, part=part, **options, **augment)
    held_out = data.open_clips(stage.val_data or stage.data, train=False, classes=train.classes,
                               part="all" if stage.val_data else "val", **options)
    print(f"--data {train.summary()}")
    print(f"held out: {len(held_out)} files")
    return train, held_out


# ------------------------------------------------------------------------------------------------
# Chance, optimisers, log, machine


def text_of(path):
    """What is in a file of text, UTF-8. OSError or ValueError where it is none; a pipe would keep us waiting for ever."""
    if not os.path.isfile(path):
        raise OSError("no such file")
    return Path(path).read_text(encoding="utf-8")


def generator(seed, *parts):
    """A torch.Generator on the CPU whose state is a function of its arguments alone."""
    words = [seed] + [zlib.crc32(str(part).encode()) for part in parts]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


def clips_per_step(stage):
    """Of all micro-batches and all processes."""
    return stage.batch_size * stage.accum * processes.world()


def learning_rate(stage, step):
    """Rate of step 0, 1, ...: linear warm-up from 0, then half a cosine down to min_lr of the peak."""
    peak = stage.lr or stage.blr * clips_per_step(stage) / 256
    warm = int(stage.warmup * stage.steps)
    if step < warm:
        return peak * step / warm
    progress = (step - warm) / max(1, stage.steps - warm)
    return peak * (stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024): a matrix moves by an orthogonal matrix, so that all directions of the gradient
    count alike, also the faint ones, such as "look at the neighbour", that AdamW needs thousands of steps to
    find (LOG.md). The library's optimiser, but for taking all matrices of a shape in one stack: the same
    numbers within rounding, and small matrices are handed out once, not one by one."""

    @torch.no_grad()
    def step(self):
        stacks = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
                moment = self.state[parameter]["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = processes.whole(parameter.grad.lerp(moment, group["momentum"]))
                wide = update if update.shape[0] <= update.shape[1] else update.T
                stacks.setdefault(wide.shape, []).append((parameter, wide, group))
        for members in stacks.values():
            stack = self.orthogonal(torch.stack([wide for _, wide, _ in members]), *members[0][2]["ns_coefficients"])
            for (parameter, _, group), update in zip(members, stack):
                rate = 0.2 * max(parameter.shape) ** 0.5 * group["lr"]  # the size of a step of AdamW
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update if update.shape == parameter.shape else update.T
                parameter.add_(processes.place(update.to(parameter.dtype), parameter), alpha=-rate)

    @staticmethod
    def orthogonal(stack, a, b, c, steps=5):
        """(n, rows, columns), rows <= columns -> the same in bfloat16, every singular value pushed towards 1 by
        `steps` rounds of x -> a x + b x x'x + c x x'x x'x, which need no singular vectors (Newton and Schulz)."""
        x = stack.bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x


def optimisers_of(model, stage):
    """The optimisers of a recipe, as a list; their learning rates are set before each step.

    AdamW decays matrices only: not biases, norms, nor class, mask and global tokens, whose size means something. `Muon`
    moves the matrices of numbered layers: those of blocks and bridges, and of heads that have several; scaled to the step size of
    AdamW, one learning rate serves both.
    """
    hidden, others = {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 or name.endswith("_token") else stage.weight_decay
        matrix = decay and parameter.ndim == 2 and re.search(r"\.\d+\.", name)
        groups = hidden if stage.optimizer == "muon" and matrix else others
        # Parameters cut into parts (--shard) and whole ones do not mix in a group.
        groups.setdefault((decay, stage.scale_of(name), hasattr(parameter, "placements")), []).append(parameter)
    found = []
    for groups, make in ((hidden, lambda groups: Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")),
                         (others, lambda groups: torch.optim.AdamW(groups, lr=0.0, fused=True, betas=(0.9, stage.beta2)))):
        if groups:
            found.append(make([{"params": parameters, "weight_decay": decay, "scale": scale}
                               for (decay, scale, _), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)]))
    return found


class Average:
    """Exponential moving average of the weights (Polyak), kept in float32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - self.decay)
            else:
                self.state[key].copy_(value)

    @contextlib.contextmanager
    def in_place(self, model):
        """The model with averaged weights, for a while."""
        own = {key: value.detach().clone() for key, value in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)


class Log:
    """log.jsonl: one JSON object per line. After a resume, lines past the checkpoint go."""

    def __init__(self, path, step):
        self.path, kept = path, []
        if processes.rank() > 0:
            return
        if step and path.exists():
            for line in path.read_text(errors="replace").split("\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may have been cut off by a kill
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
        weights.write_aside(path, lambda aside: Path(aside).write_text("".join(x + "\n" for x in kept)))

    def write(self, **values):
        if processes.rank() > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({k: round(v, 7) if isinstance(v, float) else v
                                   for k, v in values.items()}) + "\n")


def choose_device(name):
    """"auto" or a torch device name -> the device's name; UserError where it is not to be had."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here; use cpu"
                      + (" or cuda" if torch.cuda.is_available() else "")) from None
    return str(device)


def choose_precision(name, device):
    """bf16 where the processor multiplies bfloat16 itself; elsewhere it would be emulated, slowly."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # torch before 2.13
        fast = bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16") or known())
    return "bf16" if fast else "fp32"


def choose_products(choice):
    """Let oneDNN multiply float32 matrices on a CPU, or not -> "on" or "off", and why.

    MKL, which PyTorch uses otherwise where there is one, is slower on processors that are not Intel's, by a tenth (Zen 4)
    to a half (Zen 5; LOG.md). The switch permits bfloat16 units, which oneDNN takes only where there are AMX units;
    elsewhere it goes on in float32. So one product is tried, which must be right to 1e-5. No stopwatch: what is decided here changes
    the last bits of a run, so it is the same each time, and in all processes of a run."""
    setting = torch.backends.mkldnn.matmul
    setting.fp32_precision = "none"
    if choice == "off" or not torch.backends.mkldnn.is_available():
        return "off", "as asked" if choice == "off" else "not there"
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact, error = a.double() @ b.double(), {}
    for precision in ("none", "bf16"):
        setting.fp32_precision = precision
        error[precision] = float((a @ b - exact).abs().max() / exact.abs().max())
    maker = processor_maker()
    slow = torch.backends.mkl.is_available() and maker not in ("", "GenuineIntel")
    found = processes.collect([(processes.rank(), slow and error["bf16"] < 1e-5)])
    take = choice == "on" or all(better for _, better in found)
    setting.fp32_precision = "bf16" if take else "none"
    return "on" if take else "off", (f"processor by {maker or 'an unknown maker'}, error {error['bf16']:.0e} in place of "
                                     f"{error['none']:.0e}")


def processor_maker():
    """"GenuineIntel", "AuthenticAMD" ... as the processor itself says; "" where the system does not tell."""
    with contextlib.suppress(OSError):
        if found := re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return os.environ.get("PROCESSOR_IDENTIFIER", "").rpartition(" ")[2]  # Windows


def keep_memory():
    """Linux: the C library gives large tensors back to the system when they are freed and asks for them again,
    page by page, a moment later: up to a quarter of a large step on a CPU. Let it keep them. Elsewhere: nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            library.mallopt(option, value)


# Modules whose forward pass is compiled, each by itself; subclasses of Block too.
COMPILED = (Block, caption_decoder.SelfBlock, caption_decoder.CrossBlock, fusion.CrossModelAttention)


@functools.lru_cache(maxsize=None)
def compiled(function):
    """torch.compile without graph breaks, by the backend that attention.py uses."""
    return torch.compile(function, fullgraph=True, backend=attention.BACKEND)


def choose_compile(stage):
    """"on" or "off", and why. Blocks of one shape share their code; the rest of the network stays as it is."""
    cuda = stage.device.startswith("cuda")
    if stage.compile == "off" or (stage.compile == "auto" and not cuda):
        return "off", ""
    if stage.shard:
        return "off", "--shard moves weights in and out around each block, which cannot be compiled"
    reason = attention.no_compiler("cuda" if cuda else "cpu")
    return ("off", f"nothing can be compiled here: {reason}") if reason else ("on", "")


def compile_blocks(model):
    """Compile the blocks in place: names and weights stay. fullgraph: a graph break is an error, not a slow
    block. One piece of code serves encoder and decoder, training and evaluation, so it may have many versions."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, COMPILED):
            module.compile(fullgraph=True, backend=attention.BACKEND)


def memory_mib(device):
    """Most memory used so far, in MiB: of the GPU, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def to_device(batch, device):
    """A batch, a dict, with its tensors on the device; from pinned memory without waiting."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def clips_in(batch):
    """How many clips a batch holds, as pixels or as features."""
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))


# ------------------------------------------------------------------------------------------------
# Checkpoints

FREE_TO_CHANGE = {"out", "resume", "keep", "device", "workers", "steps", "eval_every", "save_every", "log_every",
                  "eval_clips", "eval_batch", "dry_run", "weights", "shard", "max_bad", "attention", "onednn", "compile",
                  "precision", "recompute", "figures"}


FACTS_OF_A_RUN = {"left_out": int, "step": int, "settings": dict, "seconds": float, "processes": int, "initial": dict, "bad": dict}


def recipe_of(stage):
    """The settings that decide what is learned."""
    return {key: value for key, value in dataclasses.asdict(stage).items() if key not in FREE_TO_CHANGE}


def tensors_of(model, optimisers, average):
    """Everything a run must remember beside its step: {"model": ..., "average": ..., "optimiser": {"<parameter>.<what>":
    tensor}}. By name, so that it can be read however many processes hold it in parts."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    slots = {f"{names[parameter]}.{what}": value for optimiser in optimisers
             for parameter, state in optimiser.state.items() for what, value in state.items()}
    return {"model": model.state_dict(), "average": average.state if average else {}, "optimiser": slots}


def restore(tensors, model, optimisers, average):
    """Put back what `tensors_of` took, whole or in parts."""
    other = UserError("the checkpoint's tensors are not those of this model; start anew without --resume")
    for found, own in ((tensors["model"], model.state_dict()), (tensors["average"], average.state if average else {})):
        if list(found) != list(own) or any(found[name].shape != own[name].shape for name in own):
            raise other
        for name, value in own.items():
            value.detach().copy_(processes.place(found[name], value))
    parameters = dict(model.named_parameters())
    owner = {parameter: optimiser for optimiser in optimisers for group in optimiser.param_groups
             for parameter in group["params"]}
    slots = {}
    for key, value in tensors["optimiser"].items():
        name, what = key.rpartition(".")[::2]
        if owner.get(parameters.get(name)) is None or value.ndim and value.shape != parameters[name].shape:
            raise other
        slots.setdefault(owner[parameters[name]], {}).setdefault(name, set()).add(what)
    if any(whats != next(iter(group.values())) for group in slots.values() for whats in group.values()):
        raise other  # an optimiser remembers the same of every parameter
    for key, value in tensors["optimiser"].items():
        name, what = key.rpartition(".")[::2]
        owner[parameters[name]].state[parameters[name]][what] = processes.place(value, parameters[name])


def checkpoints(out):
    """Those in a run's folder, newest first: last.pt, last.1.pt, last.2.pt ... A run with --shard has folders."""
    older = {int(path.name.split(".")[1]): path for path in out.glob("last.*.pt") if path.name.split(".")[1].isdecimal()}
    return [path for path in (out / "last.pt", *(older[n] for n in sorted(older))) if path.exists()]


def save_checkpoint(out, facts, tensors, keep, shard=False):
    """Write last.pt aside, move the earlier ones on by one number, give it its name, then remove what is beyond `keep`.
    All processes call this; with `shard` each writes its part, else the first writes all."""
    new = out / "last.pt.part"
    if shard:
        if processes.rank() == 0:
            shutil.rmtree(new, ignore_errors=True)
        processes.wait()
        flat = {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}
        processes.save_parts(new, flat, facts)
    if processes.rank() > 0:
        return
    if not shard:
        weights.write_torch(out / "last.pt.whole", facts | tensors)
        new = out / "last.pt.whole"

    def place(n):
        return out / (f"last.{n}.pt" if n else "last.pt")

    hole = next(n for n in itertools.count() if n == keep or not place(n).exists())
    remove(place(hole))  # there if it is beyond `keep`; a folder gives its place to nobody
    for n in range(hole, 0, -1):
        os.replace(place(n - 1), place(n))
    os.replace(new, place(0))
    weights.settle(out)
    for old in checkpoints(out)[keep:]:
        remove(old)


def remove(path):
    """A file or a whole folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_checkpoint(path, like):
    """(facts, tensors) of one checkpoint; ValueError where it is not what was written. like: tensors as those that
    are wanted, `tensors_of` without the optimisers'."""
    try:
        if not path.is_dir():
            saved = weights.load(path)
            tensors = {key: saved.pop(key) for key in ("model", "average", "optimiser")}
            if saved["tensors"] != [len(group) for group in tensors.values()]:
                raise ValueError("some of its tensors are missing")
            if any(not isinstance(saved[key], kind) for key, kind in FACTS_OF_A_RUN.items()) or "usual" not in saved:
                raise ValueError("what it says of its run is no such thing")
            if not all(isinstance(value, torch.Tensor) for group in tensors.values() for value in group.values()):
                raise ValueError("holds something else than tensors")
            return saved, tensors
        saved = processes.read_facts(path)

        def make(name, shape, dtype):
            group, name = name.split("/", 1)
            own = like["model"].get(name if group != "optimiser" else name.rpartition(".")[0])
            return torch.zeros_like(own.detach()) if own is not None and own.shape == shape else torch.empty(shape, dtype=dtype)

        tensors = {"model": {}, "average": {}, "optimiser": {}}
        for name, value in processes.read_parts(path, make).items():
            group, name = name.split("/", 1)
            tensors[group][name] = value
        for group in ("model", "average"):  # parts come in an order of their own
            tensors[group] = {name: tensors[group][name] for name in like["model"] if name in tensors[group]}
        return saved, tensors
    except MemoryError:
        raise
    except Exception as error:  # whatever a torn file makes torch raise
        if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # no fault of the file's
        raise ValueError(str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__) from None


def resume_from(out, stage, like):
    """(facts, tensors) of the newest checkpoint that can be read, or None where there is none; a damaged one is
    named and set aside. UserError where none can be read or the recipe is not this one."""
    damaged = []
    for path in checkpoints(out):
        try:
            saved, tensors = read_checkpoint(path, like)
            break
        except ValueError as error:
            damaged.append((path, error))
    else:
        if damaged:
            raise UserError(f"{damaged[0][0]}: not a readable checkpoint ({damaged[0][1]}), nor is an older one there; "
                          "start anew without --resume")
        print(f"nothing to resume in {out}: starting at step 0")
        return None
    was, now = saved["settings"], recipe_of(stage)
    before, clips = saved["processes"] * was["batch_size"] * was["accum"], clips_per_step(stage)
    same = {"batch_size", "accum"} if before == clips else set()  # shared out in another way
    other = {key: value for key, value in was.items() if key in now and now[key] != value and key not in same}
    if other:
        raise UserError(f"{path} was made with " + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in
                      other.items()) + ": resume with the same, or use another --out")
    for bad, error in damaged:
        aside = next(place for n in itertools.count() if not (place := Path(f"{bad}.damaged" + f".{n}" * (n > 0))).exists())
        print(f"{bad}: damaged ({error}); taking {path}, step {saved['step']}, and setting it aside as {aside}")
        if processes.rank() == 0:
            bad.rename(aside)
    if was["steps"] != stage.steps:
        print(f"--steps was {was['steps']} and is {stage.steps} now: the learning rate follows the new schedule from "
              "here on")
    if was["precision"] != stage.precision:
        print(f"--precision was {was['precision']} and is {stage.precision} now")
    if saved["processes"] != processes.world():
        print(f"{path} was made by {saved['processes']} processes, {processes.world()} go on with it: "
              + (f"{clips} clips a step as before" if before == clips else
                 f"a step had {before} clips and has {clips} now (--batch-size is per process)"))
    return saved, tensors


def keep_old_run(out):
    """Move what an earlier run left in `out` into out/previous-N: nothing is overwritten."""
    names = ("log.jsonl", "metrics.json", "model.safetensors", "config.json", "tokenizer.json")
    found = [out / name for name in names if (out / name).exists()] + checkpoints(out)
    if not found:
        return
    n = 1
    while (out / f"previous-{n}").exists():
        n += 1
    (out / f"previous-{n}").mkdir()
    for path in found + sorted(out.glob("*.png")) + sorted(out.glob("*.gif")):
        path.rename(out / f"previous-{n}" / path.name)
    print(f"{out} holds an earlier run: moved to {out}/previous-{n} (--resume would go on with it)")


# ------------------------------------------------------------------------------------------------
# The loop


def explained(fit):
    """What the machine says when it fails, as a `RunError`, or what a run says that is asked to stop, as `Interrupted`: one line
    with the last good checkpoint in it."""
    @functools.wraps(fit)
    def run(stage, name, again="--resume"):
        def with_checkpoint(reason):
            kept = checkpoints(Path(stage.out)) if stage.began else []  # what lies there before is another run's
            return reason + (f"; the last good checkpoint is {kept[0]}, go on with {again}" if kept else
                             "; no checkpoint was written yet")
        try:
            return fit(stage, name, again)
        except KeyboardInterrupt:
            raise Interrupted(with_checkpoint("interrupted")) from None
        except (OSError, EOFError, MemoryError, RuntimeError) as error:
            reason = trouble(error, stage)
            if not reason:
                raise
            raise RunError(with_checkpoint(reason)) from None
    return run


def trouble(error, stage):
    """One line on an error that is nobody's typing, or None where it is an error of this program."""
    text = str(error)
    if isinstance(error, RunError):
        return None
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        B, lower = stage.batch_size, []
        parts = next((n for n in range(2, B + 1) if B % n == 0), 1)  # the smallest number of equal parts
        if hasattr(stage, "cache_size"):
            lower += [f"--cache-size {(stage.cache_size or B) // 2}"] * ((stage.cache_size or B) > 1)
        else:
            lower += [f"--batch-size {B // parts} --accum {parts * stage.accum}, which is the same step"] * (parts > 1)
        lower += [f"--eval-batch {stage.eval_batch // 2}"] * (stage.eval_batch > 1)
        lower += ["--recompute"] * (not stage.recompute) + ["--precision bf16"] * (stage.precision == "fp32")
        lower += ["--shard"] * (processes.world() > 1 and not stage.shard) + ["fewer --workers"]
        return f"out of memory on {stage.device}: try {', or '.join(lower)}; --dry-run estimates what a step needs"
    chain = error  # the news of a dead worker comes at any time, also in the midst of writing a checkpoint
    while chain is not None:
        if dead := data.dead_worker(chain):
            return dead
        chain = chain.__context__
    if not getattr(error, "filename", None) and re.search(  # torch hands clips over there
            r"shared memory (object|file)|shared memory\(shm\)|</torch_\d+_\d+|items of ancdata|Too many open files", text):
        return (f"no room to hand clips from one process to another ({text.strip().splitlines()[0][:150]}): fewer --workers, "
                "a smaller --batch-size, a larger /dev/shm, or a higher `ulimit -n`")
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or stage.out}: {error.strerror}"
    if processes.world() > 1 and re.search(r"[Cc]onnection|peer|NCCL|gloo", text):
        return "another process of this run has ended; its own line says why"
    return None


class HeldOut:
    """The held-out batches of this process, each time they are iterated over: looked at once and kept where they are
    small, decoded again by the workers where they are not. After a pass:

    clips    how many could be read, of all processes
    bad      [(path, reason), ...] of those that could not
    first    the first batch, for pictures; None where this process has none

    The pass ends in DataError where no clip can be read. All processes must come to its end.
    """

    KEPT = 2**28  # bytes

    def __init__(self, dataset, stage):
        self.dataset, self.stage = dataset, stage
        self.first = self.clips = self.bad = self.kept = None

    def __iter__(self):
        if self.kept is not None:
            yield from self.kept
            return
        self.first, kept, size, rows = None, [], 0, []  # size: bytes up to here
        for batch in data.held_out(self.dataset, self.stage.eval_clips, self.stage.eval_batch, self.stage.workers,
                                   processes.rank(), processes.world()):
            seen = batch["video"] is not None
            size += batch["video"].nbytes if seen else 0
            rows.append((batch["number"], len(batch["video"]) if seen else 0, batch.get("bad", ()), size))
            if not seen:
                continue
            self.first = self.first or batch
            if size <= self.KEPT:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        rows = processes.collect(rows)
        self.clips, self.bad = sum(count for _, count, *_ in rows), [pair for *_, bad, _ in rows for pair in bad]
        if not self.clips:
            raise data.DataError(f"none of the held-out clips can be read; {self.bad[0][1]}")
        # All keep or none: who kept would be missing where the others meet at the end of the next pass.
        self.kept = kept if all(size <= self.KEPT for *_, size in rows) else None


@explained
def fit(stage, name, again):
    """Train, evaluate and save one stage; returns its metrics. Names no stage.

    again  what to type to go on with this run, told where it ends early: "--resume", or a whole line"""
    out = Path(stage.out or f"runs/{name}")
    stage.out = str(out)
    stage.device = processes.start(choose_device(stage.device))
    stage.precision = choose_precision(stage.precision, stage.device)
    stage.compile, why_compile = choose_compile(stage)
    attention.use(stage.attention)
    products = stage.onednn
    if stage.device == "cpu":
        stage.onednn, why_products = choose_products(stage.onednn)
        if stage.attention == "flex" and stage.steps:
            raise UserError("--attention flex: FlexAttention has no backward pass on a CPU; choose auto, reference or sdpa")
    first_process = processes.rank() == 0
    torch.manual_seed(stage.seed)
    model = stage.build().to(stage.device)
    if stage.compile == "on":
        compile_blocks(model)
    if stage.dry_run:
        return dry_run(stage, model)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:  # ValueError: no letter of a name
        raise UserError(f"--out {out}: {getattr(error, 'strerror', None) or error}") from None
    train_set, held_out_set = stage.datasets()
    if not stage.resume and first_process:  # only now: a mistake leaves all where it is
        keep_old_run(out)
    stage.began = True
    processes.wait()

    take_step = processes.parallel(model, stage.loss, stage.shard, parts=(Block,))
    optimisers = optimisers_of(model, stage)
    average = Average(model, stage.ema) if stage.ema else None
    found = resume_from(out, stage, tensors_of(model, [], average)) if stage.resume else None
    first, seconds_before, usual, initial, bad, left_out = 0, 0.0, None, {}, {}, 0
    if found:
        restore(found[1], model, optimisers, average)
        first, seconds_before, usual, initial, bad, left_out = (
            found[0][key] for key in ("step", "seconds", "usual", "initial", "bad", "left_out"))
        before = found[0]["settings"].get("onednn")
        if products == "auto" and before in ("on", "off") and before != stage.onednn:
            stage.onednn, why_products = choose_products(before)  # another machine does not change a run in its midst
            why_products += ", as the run began"
    del found
    processes.wait()

    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = f", {processes.world()} processes{' with a part of the weights each' * stage.shard}" * (processes.world() > 1)
    epochs = f", {stage.steps * clips_per_step(stage) / len(train_set):.3g} epochs" if \
        hasattr(train_set, "__len__") and not isinstance(train_set, data.VideoShards) else ""
    print(f"{name}: {parameters / 1e6:.2f} M parameters, {stage.steps} steps of {clips_per_step(stage)} clips{epochs}, peak "
          f"lr {stage.lr or stage.blr * clips_per_step(stage) / 256:.2e}, {stage.device}, {stage.precision}{shared}, "
          f"{torch.get_num_threads()} threads -> {out}")
    print(f"attention: {stage.attention}; blocks {'compiled' if stage.compile == 'on' else 'as they are'}"
          + f" ({why_compile})" * bool(why_compile)
          + (f"; oneDNN for float32 {stage.onednn} ({why_products})" if stage.device == "cpu" else ""))
    print("settings: " + json.dumps(dataclasses.asdict(stage)))
    if stage.note():
        print("note: " + stage.note())
    log = Log(out / "log.jsonl", first)
    started = time.monotonic()

    def save(step):
        tensors = tensors_of(model, optimisers, average)
        facts = dict(step=step, settings=dataclasses.asdict(stage), seconds=seconds_before + time.monotonic() - started,
                     processes=processes.world(), usual=usual, initial=initial, bad=bad, left_out=left_out,
                     tensors=[len(group) for group in tensors.values()])
        save_checkpoint(out, facts, tensors, stage.keep,
                        stage.shard and processes.world() > 1)

    held_out = HeldOut(held_out_set, stage)

    def averaged():
        return average.in_place(model) if average else contextlib.nullcontext()

    def evaluate(step):
        model.eval()
        with torch.no_grad(), averaged(), processes.unsharded(take_step):
            batches = iter(held_out)
            metrics = stage.evaluate(model, (to_device(batch, stage.device) for batch in batches))
            for _ in batches:  # a stage may look at other things
                pass
        model.train()
        metrics["val_clips"] = held_out.clips
        log.write(step=step, **metrics)
        return metrics

    with processes.unsharded(take_step):
        stage.prepare(model)
    metrics = evaluate(first)
    print(f"step {first}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    initial = initial or {f"initial_{key}": value for key, value in metrics.items() if first == 0}
    stop = []

    def asked_to_stop(number, _):
        if number in stop and processes.world() == 1:  # asked twice: not after this step but now
            raise KeyboardInterrupt
        stop.append(number)

    previous = [(number, signal.signal(number, asked_to_stop)) for number in (signal.SIGINT, signal.SIGTERM)
                if signal.getsignal(number) is not signal.SIG_IGN]  # a shell's background job does not hear Ctrl-C
    bar = tqdm(total=stage.steps, initial=first, desc=name, unit="step", dynamic_ncols=True,
               disable=stage.steps == 0 or not first_process, mininterval=0.5 if sys.stderr.isatty() else 15)
    eval_every = stage.eval_every or max(1, stage.steps // 5)
    batches = iter(stage.batches(train_set, first))
    window = time.monotonic()
    waited = seen = 0.0
    asked_for = unreadable = 0
    latest = {}  # a stage may report some numbers in some steps only
    step, stopping, slow = first, False, False
    try:
        model.train()
        while step < stage.steps and not stopping:
            rate = learning_rate(stage, step)
            for group in itertools.chain.from_iterable(optimiser.param_groups for optimiser in optimisers):
                group["lr"] = rate * group["scale"]
            torch.manual_seed(generator(stage.seed, "dropout", step).initial_seed())
            sums, files = {}, []
            for part in range(stage.accum):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                for path, reason in batch.get("bad", ()):
                    if path not in bad:
                        bad[path] = reason
                        bar.write(f"skipped: {reason}")
                unreadable += len(batch.get("bad", ()))
                asked_for += clips_in(batch) + len(batch.get("bad", ()))
                if unreadable >= 10 and unreadable > stage.max_bad * asked_for:
                    raise data.DataError(f"{unreadable} of {asked_for} clips could not be read, more than --max-bad "
                                         f"{stage.max_bad}, the last: {reason}; `python data.py PATH` lists all such files")
                files += batch.get("path", ())
                with processes.exchange(take_step, on=part == stage.accum - 1):
                    loss, values = take_step(to_device(batch, stage.device), generator(stage.seed, "loss", step, part))
                    (loss / stage.accum).backward()
                seen += clips_in(batch)
                for key, value in values.items():
                    sums[key] = sums.get(key, 0.0) + float(value) / stage.accum
            norm = processes.clip(model, stage.clip_grad or math.inf)
            suspect = not all(map(math.isfinite, sums.values()))
            sums = processes.means(sums | {"stop": bool(stop)}, stage.device)
            stopping = sums.pop("stop") > 0  # one process that is asked to stop stops all, after the same step
            if not math.isfinite(norm) or not all(map(math.isfinite, sums.values())):
                save(step)
                named = processes.collect([(processes.rank(), suspect, files)])
                names = [path for _, guilty, paths in named if guilty or not any(row[1] for row in named) for path in paths]
                raise RunError(f"step {step}: loss {sums.get('loss')}, gradient norm {norm}, lr {rate:.2e}, batch "
                              f"{', '.join(names) or 'of generated clips'}: not finite; the weights before it are in "
                              f"{out}/last.pt; try a lower --blr or --lr, or --precision fp32")
            spiked = stage.spike and usual is not None and sums["loss"] > stage.spike * usual
            if spiked:
                left_out += 1
                bar.write(f"step {step} left out: loss {sums['loss']:.4g} is more than {stage.spike:g} times its mean "
                          f"{usual:.4g}; batch {', '.join(files) or 'of generated clips'}")
            else:
                usual = sums["loss"] if usual is None else 0.98 * usual + 0.02 * sums["loss"]
            for optimiser in optimisers:
                if not spiked:
                    optimiser.step()
                optimiser.zero_grad()
            if average:
                average.update(model)
            step += 1
            latest |= sums
            bar.update()
            if step % stage.log_every == 0 or step == stage.steps:
                elapsed = time.monotonic() - window
                speed = dict(clips_per_s=seen * processes.world() / elapsed, data_wait=waited / elapsed,
                             memory_mib=round(memory_mib(stage.device)))
                log.write(step=step, **latest, lr=rate, grad_norm=norm, **speed,
                          seconds=seconds_before + time.monotonic() - started)
                bar.set_postfix_str(f"loss {sums['loss']:.3f}, lr {rate:.1e}, {speed['clips_per_s']:.0f} clips/s, "
                                    f"data {speed['data_wait']:.0%}, {speed['memory_mib']} MiB")
                if speed["data_wait"] > 0.2 and step >= first + 3 * stage.log_every and not slow:
                    slow = True
                    bar.write(f"the step waits for clips {speed['data_wait']:.0%} of the time: raise --workers"
                              + (", or make small copies with data.py --cache" if stage.data else ""))
                window, waited, seen = time.monotonic(), 0.0, 0.0
            if step % eval_every == 0 or step == stage.steps:
                metrics = evaluate(step)
                bar.write(f"step {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
                window, waited, seen = time.monotonic(), 0.0, 0.0
            if step % stage.save_every == 0 or step == stage.steps or stopping:
                save(step)
    finally:
        bar.close()
        for number, _ in previous:
            signal.signal(number, signal.SIG_IGN)  # while the workers end: a moment
        del batches
        # Of several processes the first that is gone makes torchrun ask the others to end: they are ending.
        if not stopping or processes.world() == 1:
            for number, handler in previous:
                signal.signal(number, handler)
    if processes.means({"stop": bool(stop) or stopping}, stage.device)["stop"] > 0:  # also after the last step
        line = f"python train.py {name} --resume --out {out} and the same flags" if again == "--resume" else again
        raise Interrupted(f"stopped at step {step} of {stage.steps}, saved in {out}/last.pt; go on with: {line}")

    model.eval()
    with averaged():
        tensors = {key: processes.whole(value) for key, value in model.state_dict().items()}
        with torch.no_grad(), processes.unsharded(take_step):
            metrics |= stage.finish(model)
            bad = dict(pair for _, pairs in processes.collect([(processes.rank(), list(bad.items()))]) for pair in pairs)
            held_bad = held_out.bad
            report = dict(stage=name, step=step, protocol=stage.note(), **metrics, **initial, parameters=parameters, trained=trained,
                          seconds=round(seconds_before + time.monotonic() - started, 1), processes=processes.world(),
                          left_out=left_out, bad_files=bad | dict(held_bad), settings=dataclasses.asdict(stage))
            if first_process:
                leave(stage, name, model, tensors, held_out.first and to_device(held_out.first, stage.device), report)
    if held_bad:
        print(f"evaluated {metrics['val_clips']} of {metrics['val_clips'] + len(held_bad)} held-out files; not readable: "
              + "; ".join(reason for _, reason in held_bad))
    if bad:
        print(f"{len(bad)} unreadable training files were skipped (named above and in metrics.json)")
    processes.wait()
    print(f"{name}: done in {report['seconds']:.0f} s; " + ", ".join(
        f"{key} {value:.4g}" for key, value in metrics.items()))
    return report


def leave(stage, name, model, tensors, batch, report):
    """Write what a run leaves, metrics.json last: where that is, all is. batch: held-out clips to draw, or None."""
    out = Path(stage.out)
    weights.save(out, tensors, model.config)
    stage.extras(out)
    if stage.figures and batch:
        drawn = stage.pictures(model, batch, out) + (pictures.curve(out, name) if stage.steps else [])
        print("pictures: " + ", ".join(str(path) for path in drawn))
    weights.write_aside(out / "metrics.json", lambda path: Path(path).write_text(json.dumps(report, indent=1) + "\n"))


def dry_run(stage, model):
    """Print size, FLOPs and memory of a step without taking one, counted on one or two clips."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def of_cpu_kernel(q, k, v, *_, **__):  # torch counts the attention kernels of GPUs alone
        return sdpa_flop_count(q, k, v)

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_cpu_kernel}
    train_set, _ = stage.datasets()
    batch = to_device(next(iter(data.batches(train_set, 1, stage.seed, 1))), stage.device)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=mapping) as counter, \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = stage.loss(model, batch, generator(stage.seed, "dry run"))
    forward = counter.get_total_flops()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in own)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 4 * parameters + 12 * trained + (4 * parameters if stage.ema else 0)
    fixed /= processes.world() if stage.shard else 1
    total = fixed + activations * stage.batch_size
    print(f"parameters           {parameters / 1e6:10.2f} M, {trained / 1e6:.2f} M of them trained")
    print(f"FLOPs per clip       {forward / 1e9:10.2f} G forward, about {3 * forward / 1e9:.2f} G with backward")
    print(f"weights, gradients, AdamW {fixed / 2**20:5.0f} MiB")
    print(f"activations          {activations * stage.batch_size / 2**20:10.0f} MiB for {stage.batch_size} clips")
    print(f"expected memory      {total / 2**20:10.0f} MiB, plus the framework's own")
    return dict(parameters=parameters, forward_flops=forward, expected_bytes=total)


# ------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line: no usage text of fifty flags before them."""

    def error(self, message):
        self.exit(2, f"train.py: {message} (see python {self.prog} --help)\n")

    def parse_args(self, argv):
        found = super().parse_args(argv)
        for name, value in vars(found).items():
            if isinstance(value, list):  # what argparse makes of --flag=--
                raise UserError(f"--{name.replace('_', '-')}: expected a value")
        return found


def parser_of(card, name):
    """A card's fields as flags; --some-flag and --some_flag are the same."""
    parser = Parser(prog=f"train.py {name}", description=card.__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(card):
        info = field.metadata
        options = dict(dest=field.name, default=field.default,
                       help=info["help"].replace("%", "%%") + f" (default: {field.default})")
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=field.type, choices=info["choices"],
                            metavar=None if info["choices"] else field.name.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    return parser


def parse(card, name, argv):
    """Command line -> card; UserError where a value is out of range."""
    argv = ["--" + arg[2:].split("=")[0].replace("_", "-") + arg[len(arg.split("=")[0]):]
            if arg.startswith("--") else arg for arg in argv]
    argv = ["--resume" if arg == "--resume=auto" else arg for i, arg in enumerate(argv)
            if not (arg == "auto" and i and argv[i - 1] == "--resume")]  # it always is
    stage = card(**vars(parser_of(card, name).parse_args(argv)))
    for field in dataclasses.fields(stage):
        value, info = getattr(stage, field.name), field.metadata
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        most = 10**9 if info["high"] is None else info["high"]  # what numpy, torch and float32 count
        if not math.isfinite(value) or (info["low"] is not None and value < info["low"]) or value > most:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be at least {info['low']} and at most {most}")
    for field in dataclasses.fields(stage):  # a flag that would change nothing is a mistake, not a wish
        world = field.metadata["help"].partition(":")[0]
        if getattr(stage, field.name) != field.default and world == ("moving shapes" if stage.data else "files"):
            raise UserError(f"--{field.name.replace('_', '-')}: is for " + ("moving shapes; leave it or --data out" if stage.data else
                          "video files; a clip of moving shapes is all there is; give --data or leave it out"))
    return stage


def default_run(argv):
    """Every stage in turn, then the table. A stage that is done is not done again."""
    parser = Parser(prog="train.py", allow_abbrev=False, description="The default run: every stage on generated clips.")
    parser.add_argument("--out", default="runs/default", help="folder; a folder in it for each stage")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args(argv)
    if not 0 <= args.seed <= 10**9:
        raise UserError(f"--seed {args.seed}: must be at least 0 and at most {10**9}")
    out, started = Path(args.out), time.monotonic()
    again = "python train.py" + f" --out {shlex.quote(args.out)}" * (args.out != "runs/default") + f" --seed {args.seed}" * (args.seed > 0)
    waiting = [row for row in DEFAULT_RUN if not os.path.exists(out / row[0] / "metrics.json")]
    print(f"the default run, about {sum(row[3] for row in waiting) / 60:.0f} minutes on two cores: "
          + ", ".join(f"{name} {seconds} s" for name, _, _, seconds in waiting))
    for name, card, options, _ in DEFAULT_RUN:
        if (name, card) not in [row[:2] for row in waiting]:
            try:
                seed = json.loads((out / name / "metrics.json").read_text())["settings"]["seed"]
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(f"{out / name}/metrics.json: not what a run wrote; remove it to have the stage done anew") from None
            if seed != args.seed:
                raise UserError(f"--seed {args.seed}: {out / name} was made with seed {seed}; use another --out")
            print(f"{name}: done already, see {out / name}/metrics.json")
            continue
        options = {key: value.format(out) if isinstance(value, str) else value for key, value in options.items()}
        fit(card(out=str(out / name), seed=args.seed, resume=True, **options), name, again)
    if processes.rank() == 0:
        compare(out, args.seed)
    print(f"the default run took {time.monotonic() - started:.0f} s; pictures, table and weights are in {out}")


@torch.no_grad()
def compare(out, seed, clips=1000):
    """The table of the default run: what each encoder knows alone, and what putting them together adds.

    On the test split and on pairs of shape and colour never shown, `clips` of each; the weight of late fusion
    is tuned on as many validation clips. Writes table.json and table.png, prints the same; returns the rows
    {name: {column: number}}, accuracies in percent.
    """
    card = Fuse(seed=seed, device=choose_device("auto"), weights=str(out / "fuse"))
    card.precision = choose_precision("auto", card.device)
    bridge = card.build().to(card.device)
    models = {name: load_encoder(out / name).to(card.device).eval() for name in ("scratch", "masked", "multimodal")}
    found = {}
    for split in ("val", "test", "unseen"):
        world = moving_shapes.MovingShapes(split, card.num_frames, card.input_size, seed)
        said, answers = {name: [] for name in (*models, "bridge")}, []
        for batch in data.held_out(world, clips, 100):
            batch = to_device(batch, card.device)
            answers.append(card.target(batch))
            for name, model in models.items():
                with card.autocast():
                    said[name].append(model(fusion.view(batch["video"], model)).float())
            said["bridge"].append(card.logits(bridge, batch)[0])
        answers = {name: part.argmax(dim=1) for name, part in card.split(torch.cat(answers)).items()}
        found[split] = {name: card.split(torch.cat(logits)) for name, logits in said.items()}, answers

    def late(split, share):
        said, answers = found[split]
        return accuracies({name: fusion.late_fusion([said["masked"][name], said["multimodal"][name]], (1 - share, share))
                           for name in answers}, answers)

    def alone(name):
        return lambda split: accuracies(found[split][0][name], found[split][1])

    share = fusion.best_weight(lambda share: late("val", share)["all_facts"])
    runs = {name: json.loads((out / name / "metrics.json").read_text()) for name, *_ in DEFAULT_RUN}
    cost = {name: run["seconds"] for name, run in runs.items()}
    experts = cost["mae"] + cost["masked"] + cost["clip"] + cost["multimodal"]
    rows = {}
    for name, score, trained, seconds in (
            ("from scratch", alone("scratch"), runs["scratch"]["trained"], cost["scratch"]),
            ("masked encoder", alone("masked"), runs["masked"]["trained"], cost["mae"] + cost["masked"]),
            ("multimodal encoder", alone("multimodal"), runs["multimodal"]["trained"], cost["clip"] + cost["multimodal"]),
            ("late fusion, equal", lambda split: late(split, 0.5), 0, experts),
            (f"late fusion, tuned on validation ({1 - share:.2f}, {share:.2f})", lambda split: late(split, share), 1, experts),
            ("cross-model attention", alone("bridge"), runs["fuse"]["trained"], experts + cost["fuse"])):
        rows[name] = {key.replace("_", " "): value for key, value in score("test").items()}
        rows[name] |= {"unseen " + key.replace("_", " "): value for key, value in score("unseen").items()}
        rows[name] |= {"trained": trained, "seconds": round(seconds)}
    columns = list(rows["from scratch"])
    title = (f"moving shapes, {clips} test clips and {clips} of pairs of shape and colour never shown; accuracy in "
             "percent, one view")
    print(title)
    print(" " * 32 + "".join(f"{column:>{len(column) + 2}s}" for column in columns))
    for name, row in rows.items():
        print(f"{name:32s}" + "".join(f"{value:>{len(column) + 2},{'d' if isinstance(value, int) else '.1f'}}"
                                      for column, value in row.items()))
    weights.write_aside(out / "table.json", lambda path: Path(path).write_text(json.dumps(
        {"protocol": title, "seed": seed, "rows": rows}, indent=1) + "\n"))
    pictures.table(rows, columns, out / "table.png", title)
    return rows


def main(argv=None):
    """Run a stage, or the default run; returns the exit code: 0, 2 for a user's mistake, 1 for a failure, 130 where
    it was asked to stop."""
    argv = sys.argv[1:] if argv is None else argv
    keep_memory()

    def asked_to_end(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, asked_to_end)  # as Ctrl-C; in the midst of training `fit` listens itself
    try:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not os.environ.get(name, "0").isdecimal():
                raise UserError(f"{name}={os.environ.pop(name)}: torchrun makes it a number; unset it")
        if processes.several() and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise UserError(f"WORLD_SIZE={os.environ.pop('WORLD_SIZE')}: several processes are started with torchrun; unset it for one")
        if processes.several() and int(os.environ["RANK"]) > 0:  # of several processes one speaks; any may say why it ends
            sys.stdout = open(os.devnull, "w")
        if not argv or argv[0] in ("--out", "--seed") or argv[0].startswith(("--out=", "--seed=")):
            default_run(argv)
        elif argv[0] in ("-h", "--help"):
            print(__doc__)
            print("stages: " + ", ".join(f"{name} ({card.__doc__.splitlines()[0]})" for name, card in STAGES.items()))
        elif argv[0] not in STAGES:
            raise UserError(f"no stage {argv[0]!r}: choose {', '.join(STAGES)}, or nothing for the default run")
        else:
            fit(parse(STAGES[argv[0]], argv[0], argv[1:]), argv[0])
    except (UserError, weights.WeightsError, data.DataError, RunError) as error:
        text, code = str(error), 130 if isinstance(error, Interrupted) else 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:  # before a stage began, or at the table of the default run
        text, code = "interrupted; nothing is lost: the same line goes on", 130
    else:
        processes.end()
        return 0
    finally:
        if signal.getsignal(signal.SIGTERM) is asked_to_end:
            signal.signal(signal.SIGTERM, before)
    text = printable(text)  # a name may have anything in it; a mistake is one line
    if processes.first_to_say(text):
        who, line = (f"process {os.environ['RANK']}: ", "\n") if processes.several() else ("", "")  # not behind another's bar
        print(f"{line}train.py: {who}{text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
