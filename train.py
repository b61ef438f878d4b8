"""The four stages of InternVideo, and the loop that trains each of them.

    python train.py                       the default run: all four stages on generated clips
    python train.py mae                   one stage; `python train.py mae --help` lists its flags
    python train.py mae --data DIR        the same stage on your videos
    python train.py clip --data LIST      videos and sentences: CSV with a header `path,caption`
    python train.py classify --weights RUN --data DIR       fine-tune or probe an encoder
    python train.py fuse --masked RUN --multimodal RUN      cross-model attention between two
    python train.py mae --steps 0 --weights RUN             evaluate only
    python train.py mae --resume          continue from the newest checkpoint
    torchrun --nproc-per-node 8 train.py mae --data DIR     on eight GPUs; see engine/processes.py

    stage.datasets() --> train_set, {"val": ...} --+
    stage.build(train_set) --> model --------------+--> train: loss, backward, clipping, step,
    stage.loss(model, batch, rng) -----------------+    log, evaluate, save, resume --> out/

The idea, in steps:
1. A stage is a dataclass. Its fields are the recipe; each field becomes a flag. Its methods define
   the clips, the model and the loss. engine/stage.py lists the methods that a stage may override.
2. Equations are in the components (mae.reconstruction_loss); choices are in the stages (mask
   ratio). This file has recipe, model and loss of the four stages of the paper. Their base classes
   are in tasks/: MaskedStage draws masks, VideoTextStage reads sentences, ClassifierStage and
   TwoEncodersStage match labels with heads. The stages `retrieve`, `answer` and `localise` are
   there too, beside their metrics.
3. `train` runs every stage and has no code for a particular one. Its object `run` is a `Run`
   of engine/run.py.
4. Randomness is a function of (seed, step) alone. A run that is killed and resumed on the same
   processor, with the same number of threads, ends with bit-identical weights. The number of
   workers does not matter. The number of processes changes rounding only. Tar shards are the
   exception: a resumed run draws new samples.
5. Every evaluation uses the same held-out clips and the same masks.
6. An error prints one line. The exit code is 2 for a user's error, 1 where the machine or the
   numbers fail, and 130 for an interrupted run.

A run writes into --out: log.jsonl (a line every --log-every steps and for each evaluation),
metrics.json (the last evaluation and all settings), model.safetensors, config.json, last.pt and
last.1.pt (for --resume), pictures, report.html. Stages with text add tokenizer.json. Classifiers
add questions.json and predictions.csv, probes features.pt. docs/data.md explains each file.
"""

import functools
import importlib
import pkgutil
import sys
from dataclasses import dataclass, replace

import torch

import caption_decoder
import clip_video
import data
import fusion
import mae
import tasks
import uniformerv2
import weights
from attention import Block
from caption_decoder import CaptionDecoder, VideoText, caption_loss
from engine import large_batches, machine, processes
from engine.command_line import exit_code, numbers, parse
from engine.default_run import default_run
from engine.dry_run import dry_run
from engine.errors import UserError
from engine.optimisers import build_optimizer, clip_gradients, learning_rate
from engine.run import Run, add_means, one_line_errors
from engine.stage import STAGES, TEST_CLIPS, build_model, flag, generator
from tasks import captioning, labelled, probes, recognition, reconstruction, retrieval
from tasks.labelled import ClassifierStage
from tasks.reconstruction import MaskedStage
from tasks.two_encoders import TwoEncodersStage
from tasks.video_text import VideoTextStage
from video.transforms import normalise
from weights import encoders
from weights.tokenizer import load_tokenizer, train_tokenizer

# ------------------------------------------------------------------------------------------------
# The four stages


@dataclass
class MaskedModelling(MaskedStage, name="mae"):
    """Stage 1: hide most of each clip, reconstruct it, keep the encoder.

    VideoMAE (arXiv 2203.12602), Sec. 3; InternVideo (arXiv 2212.03191), Sec. 3.2."""

    steps: int = flag(1500, paper="800 to 1600 epochs of Kinetics-400")
    blr: float = flag(8e-2, "learning rate at 256 clips a step; --lr overrides it", low=0,
                      paper="1.5e-4, AdamW")
    lr: float = flag(0.0, "learning rate; 0 = --blr times clips per step / 256")
    warmup: float = flag(0.05, paper="40 of 800 epochs")
    batch_size: int = flag(16, paper="1024 in all")
    beta2: float = flag(0.95, paper="0.95")
    model: str = flag("tiny", "network size", paper="base, large, huge", choices=tuple(mae.SIZES))
    mask_ratio: float = flag(0.75, "share of each frame that is hidden; 7 of 25 patches stay here",
                             paper="0.9: 20 of 196 stay")
    mask_type: str = flag("tube", paper="tube")
    normalise: bool = flag(True, "targets with mean 0 and variance 1 per tubelet and channel",
                           paper="yes")
    positions: str = flag("cosines", "position codes: cosines = cosines of time, row and column "
                          "with periods that fit the grid; axes = sinusoids of time, row and "
                          "column; sinusoid = sinusoids of the token's index", paper="sinusoid",
                          choices=("cosines", "axes", "sinusoid"))
    decoder_depth: int = flag(0, "decoder blocks; 0 = as in --model", low=0,
                              paper="4; 12 for large")
    decoder_width: int = flag(0, "width of the decoder; 0 = as in --model", low=0,
                              paper="half of the encoder's")
    drop_path: float = flag(0.0, "DropPath rate of the last block", paper="0", low=0, high=1)
    num_frames: int = flag(8, paper="16")
    sampling_rate: int = flag(4, paper="4; 2 on Something-Something")
    sampling: str = flag("dense", paper="videomae-pretrain")
    transform: str = flag("plain", paper="videomae-pretrain")

    network = mae.VideoMAE  # class of the model that `build` returns

    def build(self, train_set):
        """The network, from --weights or from scratch."""
        if self.weights:
            self.check_clips(weights.hub_clips(self.weights))  # clips that config.json asks for
            model = self.network.from_official(self.weights, frames=self.num_frames,
                                               image_size=self.sides)
            size, options = model.config["size"], model.config
            self.check_against_weights(
                normalise=options["normalised"], positions=options["positions"], drop_path=0.0,
                decoder_depth=size["decoder_depth"], decoder_width=size["decoder_width"],
                model=encoders.size_name(size, mae.SIZES))
        else:
            model = self.network(self.size(), frames=self.num_frames, image_size=self.sides,
                                 positions=self.positions, drop_path=self.drop_path,
                                 normalised=self.normalise)
        self.check_mask(model.grid)
        model.recompute(self.recompute)
        return model

    def size(self):
        """The mae.Size of --model, with --decoder-depth and --decoder-width."""
        size = mae.SIZES[self.model]
        if self.decoder_depth:
            size = replace(size, decoder_depth=self.decoder_depth)
        if self.decoder_width % size.decoder_heads:
            raise UserError(f"--decoder-width {self.decoder_width}: must be a multiple of the "
                            f"{size.decoder_heads} heads")
        if self.decoder_width:
            size = replace(size, decoder_width=self.decoder_width,
                           decoder_mlp_width=4 * self.decoder_width)
        return size

    def loss(self, model, batch, rng):
        """Mean squared error of the hidden tubelets (VideoMAE, Sec. 3.3).

        Evaluation also measures the loss of a trivial guess, mae.trivial_prediction."""
        video = batch["video"].permute(0, 4, 1, 2, 3)                    # (B, 3, T, H, W), uint8
        hidden = self.draw_mask(len(video), model.grid, rng, model.training)
        target = mae.reconstruction_target(video, hidden, self.normalise,
                                           tubelet=model.encoder.tubelet)
        with self.autocast():
            prediction = model(video, hidden)
        loss = mae.reconstruction_loss(prediction, target)
        metrics = {"loss": loss.detach()}
        if not model.training:
            trivial = mae.trivial_prediction(video, hidden, self.normalise,
                                             tubelet=model.encoder.tubelet)
            metrics["trivial_loss"] = mae.reconstruction_loss(trivial, target)
        return loss, metrics

    def protocol(self, held_out):
        """What the loss measures, and the loss of a trivial guess."""
        return {"loss": "mean squared error of normalised pixels; predicting the mean of every "
                        "tubelet costs 0.99 to 1.0. It does not approach 0, because fine texture "
                        "and noise cannot be predicted" if self.normalise else
                        "mean squared error of pixels in [0, 1]; the trivial loss is that of "
                        "predicting the clip's mean visible colour"}

    def pictures(self, model, batch, folder, results):
        """Draw reconstruction_0.png to _3.png, and the same clips as GIFs -> paths."""
        return reconstruction.draw(self, model, batch, folder)


# --model small: width 96, 3 blocks, 4 heads, MLP 384, patches of 8, frames of 40 pixels. The text
# encoder: width 96, 2 blocks, 2 heads. Stage 2 of the default run then takes about four minutes.
SMALL, SMALL_TEXT = uniformerv2.Size(96, 3, 4, 384, 8, 40), clip_video.TextSize(96, 2, 2)


@dataclass
class VideoLanguage(VideoTextStage, name="clip"):
    """Stage 2: align videos with sentences, and write sentences (InternVideo, Sec. 3.2).

    One forward pass gives the contrastive and the captioning loss. Batches of videos and of images
    alternate. A larger batch has more negatives. --accum adds none, because the loss compares only
    pairs of one micro-batch. --cache-size allows a larger batch in the same memory."""

    steps: int = flag(2000, paper="400,000")
    lr: float = flag(2e-3, paper="8e-5, from CLIP's weights")
    warmup: float = flag(0.05, paper="0.01")
    weight_decay: float = flag(0.2, paper="0.2")
    beta2: float = flag(0.98, paper="0.98")
    batch_size: int = flag(32, "pairs per process and step; a pair's negatives are the others",
                           paper="14,336 videos or 86,016 images in all")
    accum: int = flag(1, "must be 1: pairs of two micro-batches are not compared; see "
                      "--cache-size")
    cache_size: int = flag(0, "gradient caching: pairs in memory at a time; gives the gradient of "
                           "the whole batch; 0 = all", low=0)
    model: str = flag("small", "size of both encoders; small is for CPUs", paper="b16, l14",
                      choices=("small", *clip_video.TEXT_SIZES))
    kind: str = flag("video", "video = UniFormerV2, frames = frame-wise CLIP, joint = ViCLIP's "
                     "encoder, without its masking", paper="video", choices=tuple(clip_video.KINDS))
    local_units: int = flag(1, "0, 1 or 2 local units per block; they mix neighbouring frames",
                            low=0, high=2, paper="0; UniFormerV2 for motion: 2")
    temporal_downsample: bool = flag(True, "embed three frames at a time, with stride 2",
                                     paper="UniFormerV2 for motion: yes")
    global_layers: str = flag("", "layers that are followed by a global block, such as 8,9,10,11, "
                              "or none; default: the last one for small, else the last four",
                              paper="the last four")
    context: int = flag(32, "maximum tokens of a caption, with start and end", paper="77", low=3)
    vocabulary: int = flag(800, "maximum size of the vocabulary learned from the captions",
                           paper="49,408", low=515)
    caption_depth: int = flag(2, "layers of the caption decoder", paper="6", low=1)
    queries: int = flag(8, "learned queries of the caption decoder", paper="256", low=1)
    caption_weight: float = flag(1.0, "weight of the captioning loss", paper="1", low=0)
    num_frames: int = flag(8, paper="8")
    sampling: str = flag("segment", paper="internvideo")
    transform: str = flag("plain", paper="internvideo; clip for images")
    image_every: int = flag(2, "every n-th batch holds images; 0 = none", low=0, group="clips",
                            paper="2")
    image_batch: int = flag(64, "pairs in a batch of images, per process", low=1, group="clips",
                            paper="86,016 in all, 6 times the videos")
    motion_words: float = flag(1.0, "share of captions that name the motion; the others describe "
                               "one frame, as most captions of the web do", low=0, high=1,
                               only="generated", group="clips")
    eval_clips: int = flag(200)
    eval_every: int = flag(1000)
    gallery: int = flag(100, "number of held-out clips for retrieval, the first ones; a larger "
                        "gallery is harder", low=2, group="clips")
    test: int = TEST_CLIPS
    small = SMALL  # the size that `--model small` names

    def datasets(self):
        """Videos with captions, and images for every n-th batch. A held-out video occurs once,
        with all its captions."""
        self.check_flags()
        train_set, held_out = self.open_sets(flip=False, motion_words=self.motion_words)
        held_out["val"].one_item_per_video()
        self.images = self.open_images() if self.image_every else None
        return train_set, held_out

    def build(self, train_set):
        """Both encoders and the caption decoder, from --weights or from scratch."""
        captions = self.captions(train_set)
        model = self.load() if self.weights else self.new_model(captions)
        self.check_captions(captions)
        model.caption_decoder.requires_grad_(self.caption_weight > 0)
        model.clip.text.requires_grad_(not self.freeze_text)
        model.clip.visual.requires_grad_(not self.freeze_visual)
        model.clip.recompute(self.recompute)
        return model

    def new_model(self, captions):
        """A model from scratch, with a vocabulary learned from `captions`."""
        self.bpe = load_tokenizer(self.tokenizer) if self.tokenizer else \
            train_tokenizer(captions, self.vocabulary)
        size, text, layers = self.model, self.model, None
        if size == "small":  # one global block, after the last layer; three gave no better results
            size, text = SMALL, SMALL_TEXT
            layers = (SMALL.depth - 1,) if self.kind == "video" else None
        clip = clip_video.VideoCLIP(
            size, text_size=text, kind=self.kind, frames=self.num_frames,
            global_layers=self.layers() if self.global_layers else layers,
            image_size=self.sides, vocabulary=self.bpe.vocabulary, context=self.context,
            end=self.bpe.end, local_units=self.local_units,
            temporal_downsample=self.temporal_downsample)
        return VideoText(clip, self.fresh_decoder(clip))

    def fresh_decoder(self, clip):
        """An untrained caption decoder for the encoders of `clip`."""
        text = clip.config["text_size"]
        return CaptionDecoder(
            text["width"], heads=text["heads"], depth=self.caption_depth, queries=self.queries,
            visual_width=clip.config["size"]["width"], vocabulary=clip.config["vocabulary"])

    def loss(self, model, batch, rng):
        """loss = contrastive + caption_weight * captioning (InternVideo, Sec. 3.2).

        video_features, text_features: embeddings (B, E), one pair a row; hidden (B, L-1, W), from
        the caption decoder, which does not run where --caption-weight is 0."""
        video, captions = batch["video"], batch["caption"]
        image = "image" in batch
        if image:  # repeat the image where several frames are embedded at a time
            video = video.expand(-1, model.clip.visual.stride, -1, -1, -1)
        video = normalise(video, model.clip.mean, model.clip.std)
        ids, is_token = (x.to(video.device) for x in self.bpe.encode(captions, self.context,
                                                                     trim=True))
        network = model if self.caption_weight else model.clip

        def encode(video, ids):
            with self.autocast():  # the third result of model.clip is logit_scale, not needed here
                video_features, text_features, hidden = network(video, ids)
            return (video_features, text_features) + (hidden,) * (network is model)

        if self.cache_size and torch.is_grad_enabled():  # same numbers, less memory
            encode = functools.partial(large_batches.in_pieces, encode, self.cache_size)
        video_features, text_features, *hidden = encode(video, ids)
        contrastive = retrieval.pair_loss(video_features, text_features, model.clip.logit_scale,
                                          batch, gather=model.training)
        prefix = "image_" if image else ""
        metrics = {"loss": contrastive.detach(), prefix + "contrastive": contrastive.detach()}
        if not hidden:
            return contrastive, metrics
        # Divide by the mean number of tokens over processes: point 3 of engine/processes.py.
        count = processes.mean(is_token[:, 1:].sum()).clamp(min=1) if model.training else None
        decoder = model.caption_decoder
        with self.autocast():
            if decoder.options.vocabulary > large_batches.CHUNKED_ABOVE:  # same, less memory
                caption = large_batches.chunked_caption_loss(decoder, hidden[0], ids, is_token,
                                                             count=count)
            else:
                caption = caption_loss(decoder.logits(hidden[0]), ids, is_token, count=count)
        loss = contrastive + self.caption_weight * caption
        return loss, metrics | {"loss": loss.detach(), prefix + "caption": caption.detach()}

    def batches(self, videos, first):
        """Alternate batches of videos and of images (InternVideo, Sec. 4.1).

        All images of a batch come from different clips. Several images of one clip in a batch made
        training much worse."""
        if not self.image_every:
            yield from super().batches(videos, first)
            return
        # Steps 0, n, 2n, ... have images. Their number before step `first`: first / n, rounded up.
        images_done = -(-first // self.image_every)
        options = dict(workers=self.workers, rank=processes.rank(), world=processes.world())
        images = data.batches(self.images, self.image_batch, self.seed, self.steps,
                              start=images_done, **options)
        clips = data.batches(videos, self.batch_size, self.seed, self.steps,
                             start=first - images_done, **options)
        for step in range(first, self.steps):
            yield next(clips) if step % self.image_every else next(images) | {"image": True}

    def evaluate(self, model, batches, dataset):
        """Losses, retrieval, zero-shot accuracy, and the share of correct facts in captions."""
        options = dict(context=self.context, autocast=self.autocast, device=self.device)
        results = {}
        if dataset.has_captions:
            results |= super().evaluate(model, batches, dataset)
            ranks = retrieval.evaluate(model.clip, batches, self.bpe, gallery=self.gallery,
                                       **options)
            results |= {key: value for key, value in ranks.items() if key.endswith("R@1")}
        if dataset.classes:
            results |= recognition.evaluate_zero_shot(
                model.clip, batches, self.bpe, dataset.sentences(self.sentences()),
                combine=dataset.prompt_average, **options)
        if self.caption_weight:
            results |= captioning.evaluate_facts(model, batches, self.bpe, dataset,
                                                 maximum=self.context - 1, autocast=self.autocast)
        return results


@dataclass
class PostPretraining(ClassifierStage, name="classify"):
    """Stage 3: supervised post-pretraining of either encoder (InternVideo, Sec. 3.2).

    --mode finetune trains the whole encoder. --mode probe and attentive freeze it and train a small
    classifier on its features, which are computed once."""

    steps: int = flag(500, paper="VideoMAE, UniFormerV2: 35 to 100 epochs of Kinetics-400")
    lr: float = flag(6e-3, paper="5e-4 to 2e-3 per 256 clips for VideoMAE, 1e-5 for UniFormerV2")
    encoder: str = flag("masked", "the encoder to train from scratch where --weights is empty: "
                        "masked = VideoMAE's, multimodal = UniFormerV2",
                        choices=("masked", "multimodal"))
    model: str = flag("small", "size of the encoder; small = `tiny` of mae.py, or the encoder of "
                      "the clip stage",
                      choices=("small", *dict.fromkeys((*mae.SIZES, *uniformerv2.SIZES))))
    layer_decay: float = flag(1.0, "layer-wise decay: the learning rate of a layer is this "
                              "factor times that of the layer above", paper="0.75", low=0, high=1)
    drop_path: float = flag(0.0, "share of samples that skip the last block; less in earlier ones",
                            paper="0.1 or 0.2", low=0, high=1)
    drop: float = flag(0.0, "dropout before the head", paper="0 to 0.5", low=0, high=1)
    smoothing: float = flag(0.1, "label smoothing", paper="0.1", low=0, high=1)
    mixup: float = flag(0.0, "alpha of mixup; 0 = none", paper="0.8", low=0)
    cutmix: float = flag(0.0, "alpha of cutmix; 0 = none; with --mixup, one of both is drawn",
                         paper="1.0", low=0)
    positions: str = flag("sinusoid", "position codes of official VideoMAE weights on another "
                          "grid: sinusoid = computed for that grid, resized = interpolated "
                          "(InternVideo's ViT-H at 384 px)", choices=("sinusoid", "resized"))

    def default_clip_size(self):
        """(frames, pixels) for a network from scratch; with --data, those of a published size."""
        size = uniformerv2.SIZES.get(self.model)
        if self.data and self.model != "small":
            return (8, size.image_size) if size else (16, 224)
        return super().default_clip_size()

    def build(self, train_set):
        """The encoder with a head, or the frozen encoder with a probe."""
        classes = recognition.number_of_answers(self.classes)
        model = self.probe_in_weights(classes)
        if model is not None:
            self.check_encoder(model.encoder)
        else:
            model = self.encoder_for(classes)
        # An attentive probe in --weights has its encoder inside.
        encoder = getattr(model, "encoder", model) if self.mode == "attentive" else model
        encoder.grid_of(self.num_frames, *self.sides)  # ValueError where the clips do not fit
        if self.mode == "finetune":
            model.recompute(self.recompute)
            return model
        if self.mode == "attentive" and not isinstance(model, probes.AttentiveProbe):
            model = probes.AttentiveProbe(model.with_head(0), classes, model.heads)
        return probes.freeze_all_but_the_probe(model)

    def encoder_for(self, classes):
        """The encoder, from --weights or from scratch, with a head for `classes` classes."""
        if self.weights:
            self.check_clips(weights.hub_clips(self.weights))
            model = encoders.load_encoder(
                self.weights, classes, frames=self.num_frames, image_size=self.sides,
                drop=self.drop, drop_path=self.drop_path, rows=self.rows[0],
                positions=self.positions)
            if tuple(model.config["image_size"]) != self.sides:
                model = encoders.resized(model, self.sides)
            self.check_encoder(model)
            return model
        masked = self.encoder == "masked"
        if self.model not in ("small", *(mae.SIZES if masked else uniformerv2.SIZES)):
            raise UserError(f"--model {self.model}: is a "
                            + ("UniFormerV2; add --encoder multimodal" if masked else
                               "VideoMAE; add --encoder masked"))
        options = dict(frames=self.num_frames, image_size=self.sides, classes=classes,
                       drop_path=self.drop_path)
        small = self.model == "small"
        if masked:
            return mae.VideoClassifier("tiny" if small else self.model, drop=self.drop,
                                       positions="cosines" if small else "sinusoid", **options)
        if small:
            options |= dict(local_units=1, temporal_downsample=True,
                            global_layers=(SMALL.depth - 1,))
        return uniformerv2.UniFormerV2(SMALL if small else self.model, head_dropout=self.drop,
                                       **options)

    def check_encoder(self, encoder):
        """Set the flags that --weights determine. UserError where a flag contradicts them."""
        sizes = mae.SIZES if encoder.family == "masked" else uniformerv2.SIZES
        positions = encoder.config.get("positions", "learned")  # UniFormerV2 has a learned table
        # A table that is stored in the weights can only be resized to another grid.
        self.refuse_other(positions="resized" if positions == "stored" else positions)
        self.check_against_weights(encoder=encoder.family,
                                   model=encoders.size_name(encoder.config["size"], sizes))

    def scale_of(self, model, name):
        """Layer-wise decay: a lower layer has a smaller learning rate (--layer-decay).

        The embedding is layer 0, block i (from 1) is layer i, the head is layer depth + 1."""
        if self.mode != "finetune":
            return 1.0
        return self.layer_decay ** (model.depth + 1 - model.layer_index(name))

    def logits(self, model, batch):
        """Logits (B, Y) of a batch of clips; or, for a probe in training, of stored features."""
        if "features" in batch:
            return probes.probe_of(model)(batch["features"])
        return self.run(model, normalise(batch["video"], model.mean, model.std))

    def run(self, model, video):
        """Normalised video (B, C, T, H, W) -> logits (B, Y) float32."""
        with self.autocast():
            return model(video).float()

    def loss(self, model, batch, rng):
        """Cross entropy; in training with label smoothing, mixup and cutmix."""
        target = self.target(batch)
        if model.training and self.mixup + self.cutmix > 0 and "video" in batch:
            video = normalise(batch["video"], model.mean, model.std)
            video, target = labelled.mix(video, target, self.mixup, self.cutmix)
            logits = self.run(model, video)
        else:
            logits = self.logits(model, batch)
        loss = self.loss_of(logits, target, model.training)
        return loss, {"loss": loss.detach()}


@dataclass
class CrossModel(TwoEncodersStage, name="fuse"):
    """Stage 4: cross-model attention between two frozen encoders, and a learned sum of scores.

    InternVideo, Sec. 3.2, Cross-Model Interaction. Only these parts are trained: cross-model
    attention, its gates, the shares (the weights of both scores in the sum), the initial global
    token (the paper's query token), and both heads with their norms."""

    steps: int = flag(200, paper="5 epochs")
    batch_size: int = flag(32, paper="64")
    lr: float = flag(3e-3, paper="prints 5 x 10^5; probably 5e-5 or 5e-6")
    scalar_scale: float = flag(30.0, "factor on the learning rate of gates and shares: AdamW moves "
                               "all numbers alike, and these must move further",
                               paper="not given", low=0)
    warmup: float = flag(0.2, paper="1 of 5 epochs")
    weight_decay: float = flag(0.001, paper="0.001")
    ema: float = flag(0.0, paper="0.9999")
    drop: float = flag(0.0, "dropout before both heads", paper="0.9", low=0, high=1)
    before: str = flag("", "blocks of the masked encoder that get cross-model attention before "
                       "them, such as 7,15,23,31; default: four, evenly spaced", paper="not given")
    layers: str = flag("", "multimodal layer that each block of --before attends to, such as "
                       "5,11,17,23; default: at the same relative depth")
    gates: bool = flag(True, "tanh gates that start at 0", paper="yes")
    way: str = flag("both", "whose tokens are queries: masked = those of the masked encoder, "
                    "multimodal = the global token of the multimodal encoder, or both",
                    paper="both", choices=("both", "masked", "multimodal"))
    thaw: bool = flag(False, "train all parameters, also those of both encoders", paper="no")
    bridges: bool = flag(True, "cross-model attention; --no-bridges trains only the heads and "
                         "the sum of scores")

    def build(self, train_set):
        """The model of --weights, or both encoders with new cross-model attention."""
        # self.parts: the encoders of --masked and --multimodal; self.rows: for each, the row of
        # every class in its head, None = a new row.
        classes = recognition.number_of_answers(self.classes)
        if self.weights:
            model = fusion.InternVideo.from_run(self.weights)
            self.check_against_weights(
                masked="", multimodal="", second="", before="", layers="", way="both", bridges=True,
                gates=model.config["gates"])
            self.refuse_other(drop=model.config["drop"])
            model = model.with_head(classes, rows=self.rows[0])
        else:
            model = self.new_model([
                encoder if rows == list(range(encoder.config["classes"])) else
                encoder.with_head(classes, rows=rows)
                for encoder, rows in zip(self.parts, self.rows)])
        model.recompute(self.recompute)
        return model.requires_grad_(True) if self.thaw else model

    def new_model(self, pretrained):
        """New cross-model attention between [masked encoder, one or two multimodal encoders]."""
        if self.way == "multimodal" and (self.before or self.layers):
            raise UserError("--way multimodal: has no cross-model attention before blocks; leave "
                            "out --before and --layers")
        layers = numbers(self.layers, "layers")
        return fusion.InternVideo(
            pretrained[0], pretrained[1:], layers=layers and [layers] * (len(pretrained) - 1),
            before=[] if self.way == "multimodal" else numbers(self.before, "before"),
            last=self.way != "masked", gates=self.gates, bridges=self.bridges, drop=self.drop)

    def scale_of(self, model, name):
        """Gates and shares have a larger learning rate (--scalar-scale).

        The shares are a softmax of the parameter `balance`."""
        return self.scalar_scale if ".gate_" in name or name == "balance" else 1.0

    def logits(self, model, batch):
        """Logits (B, Y) of a batch of clips, which go through both encoders."""
        with self.autocast():
            return model(batch["video"]).float()

    def loss(self, model, batch, rng):
        """Cross entropy of the weighted sum of scores. The metrics also hold shares and gates."""
        logits, target = self.logits(model, batch), self.target(batch)
        loss = recognition.cross_entropy(logits, target, self.classes, several=self.several)
        metrics = {"loss": loss.detach()}
        for name, share in zip(("masked", "multimodal", "second"), model.score_weights().detach()):
            metrics[f"share_{name}"] = share
        for name, parameter in model.named_parameters():
            if "gate_" in name:
                metrics[f"gate_{name.replace('.gate_', '.')}"] = parameter.detach().tanh()
        return loss, metrics

    def protocol(self, held_out):
        """How the accuracies are measured."""
        return super().protocol(held_out) | {
            "step 0": "untrained, all gates are closed: the mean of both encoders' logits"}


# --------------------------------------------------------------------------------------------------
# The loop

# --compile compiles the forward pass of each module of these classes.
BLOCKS = (Block, caption_decoder.SelfBlock, caption_decoder.CrossBlock, fusion.CrossModelAttention)


@one_line_errors
def train(stage, resume_command="--resume"):
    """Train, evaluate and save one stage -> the content of metrics.json, a dict.

    resume_command  what a user types to continue this run, for messages: "--resume" or a command
    """
    run = Run(stage, resume_command)                # folder, device, precision, kernels
    torch.manual_seed(stage.seed)
    train_set, held_out = stage.datasets()          # held_out: {"val": ..., "unseen": ...}
    model = build_model(stage, train_set)           # stage.build(train_set)
    if stage.dry_run:
        return dry_run(stage, model, train_set)
    training_loss = run.prepare(model, BLOCKS)      # to the device; compiled; DDP or FSDP2
    optimizer = build_optimizer(model, stage)
    first = run.resume(optimizer)                   # 0, or where the last checkpoint stopped
    train_set = run.start(train_set, held_out)      # the log; the evaluation before any step

    with run.training():                            # progress bar; signals end it after a step
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

# The default run: {command as a user would type it: seconds}. {out} is --out. The seconds are those
# of two Intel cores of 2026; two AMD Zen 5 cores take half as many.
# LOG.md says how it was chosen. Most encoders stay frozen after stages 1 and 2, so the table shows
# what each pretraining taught. All stages with labels use the same 4,000 labelled clips.
CLIPS = "--input-size 32"                      # of 8 frames
FEW_FRAMES = f"{CLIPS} --num-frames 4"         # for the multimodal encoder, as the paper's 8 and 16
PROBE = "--probe-clips 4000 --steps 1000 --eval-every 1000"
TUNING = "--train-clips 4000 --steps 400 --eval-every 200"
DEFAULT_RUN = {
    # Plain pixels: the picture then borrows nothing. Half is hidden: 8 of 16 places are visible.
    f"mae {CLIPS} --no-normalise --mask-ratio 0.5 --decoder-depth 1 --train-clips 10000 "
    "--batch-size 64 --lr 1e-2 --steps 1800 --out {out}/mae": 240,
    # No local units: InternVideo's value. Most captions of the web name no motion.
    f"clip {FEW_FRAMES} --local-units 0 --no-temporal-downsample --motion-words 0.1 --steps 900 "
    "--out {out}/clip": 200,
    # Masked modelling trains no token that represents the whole clip: a query attends to all.
    f"classify {CLIPS} --mode attentive {PROBE} --weights {{out}}/mae --out {{out}}/masked": 14,
    f"classify {FEW_FRAMES} --mode probe --standardise {PROBE} --weights {{out}}/clip "
    "--out {out}/multimodal": 12,
    "fuse --train-clips 4000 --eval-every 100 --masked {out}/masked "
    "--multimodal {out}/multimodal --out {out}/fuse": 45,
    # A control: the same probe of the same network, untrained.
    f"classify {CLIPS} --mode attentive {PROBE} --out {{out}}/untrained": 14,
    # Stage 3 of the paper trains all weights. Its control comes first: the network from scratch.
    f"classify {CLIPS} {TUNING} --out {{out}}/scratch": 32,
    f"classify {CLIPS} {TUNING} --weights {{out}}/mae --out {{out}}/finetuned": 32,
}


def stage_names():
    """Names of all stages; those of this file come first."""
    return sorted(STAGES, key=lambda name: STAGES[name].__module__.startswith("tasks."))


def run_command(argv):
    """Run one stage, for arguments like ["mae", "--steps", "10"].

    Run the default run where there are no arguments, or --out and --seed alone.
    """
    if not argv or argv[0].split("=")[0] in ("--out", "--seed"):
        default_run(DEFAULT_RUN, train, argv)
    elif argv[0] in ("-h", "--help"):
        print(__doc__)
        print("stages: " + ", ".join(f"{name} ({STAGES[name].__doc__.splitlines()[0]})"
                                     for name in stage_names()))
    elif argv[0] not in STAGES:
        raise UserError(f"no stage {argv[0]!r}: choose {', '.join(stage_names())}, or nothing for "
                        "the default run")
    else:
        train(parse(STAGES[argv[0]], argv[1:]))


def main(argv=None):
    """Run a stage or the default run -> the exit code: 0, or as listed at the top of this file."""
    machine.keep_memory()
    return exit_code(lambda: run_command(sys.argv[1:] if argv is None else argv))


# Every file in tasks/ may define stages; importing the file registers them. `import train` in them
# must find this module, although it is called "__main__" when it runs as a command.
sys.modules["train"] = sys.modules[__name__]
TASKS = {module.name: importlib.import_module(f"tasks.{module.name}")
         for module in pkgutil.iter_modules(tasks.__path__)}

if __name__ == "__main__":
    raise SystemExit(main())
