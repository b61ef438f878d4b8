"""Base of stage 2: loads weights and single pictures, reads prompts, and draws the results."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import clip_video
import data
import uniformerv2
import weights
from caption_decoder import CaptionDecoder, VideoText
from engine import pictures
from engine.command_line import numbers, text_of
from engine.errors import UserError
from engine.frame_size import height_width
from engine.stage import flag
from tasks import captioning, retrieval
from tasks.sentences import SentenceStage
from video import moving_shapes
from video.transforms import normalise
from weights import encoders, merging


@dataclass
class VideoTextStage(SentenceStage):
    """Base of `clip`, which adds its recipe, the model from scratch, and the loss."""

    tokenizer: str = flag("", "tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; default: the "
                          "one beside --weights; without --weights learned from the captions")
    freeze_text: bool = flag(False, "do not train the text encoder")
    freeze_visual: bool = flag(False, "do not train the visual encoder")
    merge: str = flag("", "with --steps 0: official weights of the CLIP that --weights grew from; "
                      "evaluate the average of both (WiSE-FT)")
    merge_share: float = flag(0.5, "share of --merge in the average", paper="0.5, zero-shot", low=0,
                              high=1)
    image_data: str = flag("", "a list of pictures and sentences, in the form of --data; default: "
                           "frames of the videos", group="clips")
    prompts: str = flag("", "a text file with one sentence per line and {} for the class name; "
                        "default: the paper's 16", only="files", group="clips")

    def check_flags(self):
        """UserError if flags contradict each other."""
        if self.accum > 1:
            raise UserError(
                f"--accum {self.accum}: accumulation adds no negatives to a contrastive loss, "
                f"because each micro-batch is compared only with itself; use --batch-size "
                f"{self.batch_size * self.accum} --cache-size {self.batch_size} --local-units 0, "
                "which takes the same memory")
        if self.image_data and not self.image_every:
            raise UserError("--image-data: --image-every 0 uses no images; leave out one of the "
                            "two")
        if self.merge and (self.steps or not self.weights):
            raise UserError("--merge: averages its weights with those of --weights for evaluation; "
                            "give both, and --steps 0")
        if self.kind != "video" and self.global_layers:
            raise UserError(f"--global-layers: is for --kind video, not {self.kind}")
        if self.kind != "video" and not self.weights:  # only UniFormerV2 has these two
            self.local_units, self.temporal_downsample = 0, False

    def open_images(self):
        """Single pictures and their sentences, as clips of one frame."""
        if self.image_data or self.data:
            images = data.open_clips(
                self.image_data or self.data, train=True, frames=1, size=self.sides,
                part="all" if self.image_data or self.val_data else "train", seed=self.seed,
                sampling="segment", flip=False, transform=self.transform,
                video_folder=self.video_folder, frame_rate=0)
        else:
            images = moving_shapes.StillShapes("train", frames=self.num_frames, size=self.sides,
                                               seed=self.seed)
        if self.image_data:
            print(f"--image-data {images.summary()}")
        elif self.train_clips:
            images.first(self.train_clips)
        return images

    def captions(self, train_set):
        """All training captions; [] if --steps 0 needs none."""
        captions = []
        if self.steps or not train_set.classes or train_set.has_captions:
            captions = train_set.training_captions()
        return captions + (self.images.training_captions() if self.image_data else [])

    def check_captions(self, captions):
        """Print how many captions are cut to --context. UserError if --cache-size is impossible."""
        if self.cache_size and self.local_units:
            raise UserError("--cache-size: encodes a batch in pieces, but the BatchNorm of "
                            "--local-units needs the whole batch at once; use --local-units 0")
        longer = [text for text in captions
                  if self.bpe.encode(text, 10**4, trim=True)[0].shape[1] > self.context]
        if longer:
            print(f"{len(longer)} of {len(captions)} captions are longer than --context "
                  f"{self.context} tokens and are cut, such as {longer[0][:60]!r}")

    def layers(self):
        """--global-layers as numbers; None if not given."""
        return () if self.global_layers == "none" else numbers(self.global_layers, "global-layers")

    def load(self):
        """The VideoText of --weights: a run of ours, InternVideo-MM, ViCLIP or CLIP. An image model
        is extended to a video model."""
        clip = encoders.load_clip(
            self.weights, frames=self.num_frames, image_size=self.sides,
            usual_size=height_width(type(self).input_size),
            # --steps 0 evaluates a frame-wise run of ours unchanged.
            grow=self.kind == "video", grow_runs=bool(self.steps), layers=self.layers())
        if self.merge:
            merging.merge(clip, clip_video.VideoCLIP.from_official(self.merge), self.merge_share)
        self.read_tokenizer(clip.config, self.context)
        self.check_against_weights(
            kind=clip.kind, local_units=clip.config["local_units"],
            temporal_downsample=clip.config["temporal_downsample"],
            vocabulary=clip.config["vocabulary"], model=encoders.size_name(
                clip.config["size"], uniformerv2.SIZES | {"small": self.small}))
        if any(key.startswith("caption_decoder.") for key in weights.read(self.weights)[0]):
            decoder = CaptionDecoder.from_official(self.weights)
            self.check_against_weights(caption_depth=decoder.config["depth"],
                                       queries=decoder.config["queries"])
            return VideoText(clip, decoder)
        if not self.steps:
            self.caption_weight = 0.0
        print(f"{self.weights} holds no caption decoder: "
              + ("it starts from scratch" if self.steps else "no captions are scored"))
        return VideoText(clip, self.fresh_decoder(clip))

    def sentences(self):
        """Prompts for class names: the lines of --prompts, or InternVideo's 16."""
        if not self.prompts:
            return retrieval.PROMPTS
        lines = text_of(self.prompts, "prompts").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        if not lines or not all("{}" in line for line in lines):
            raise UserError(f"--prompts {self.prompts}: needs a sentence on each line, with {{}} "
                            "in place of the class name")
        return lines

    def finish(self, model, held_out, results):
        """Multiple choice, and the scores of captions against all true sentences of each clip."""
        val = held_out["val"]
        if not val.has_captions:
            return {}

        def batches():
            return self.held_out(val, self.eval_clips, self.eval_batch)

        numbers = retrieval.multiple_choice(model.clip, batches(), self.bpe, val.choices,
                                            context=self.context, autocast=self.autocast)
        if self.caption_weight:
            numbers |= captioning.evaluate(model, batches(), self.bpe, val,
                                           maximum=self.context - 1, autocast=self.autocast)
        return numbers

    def protocol(self, held_out):
        """How the numbers are measured, for metrics.json."""
        val = held_out["val"]
        words = self.clips_protocol(held_out)
        words["weight merge"] = f"{self.merge_share:g} of CLIP merged" if self.merge else "none"
        if val.has_captions:
            words |= retrieval.gallery_protocol(val, self.evaluated(val)[:self.gallery])
            words["multiple choice"] = "among the sentences of each clip that has choices"
        if val.has_captions and self.caption_weight:
            words["captions"] = "greedy; scored against all true sentences of each clip"
        if val.classes:
            words["zero-shot"] = ", ".join(
                f"{len(names)} classes of {question} (chance {100 / len(names):.1f} %)"
                for question, names in val.classes.items())
            words["prompts"] = (
                f"the mean over {len(self.sentences())} prompts of the softmax over classes"
                if val.prompt_average == "probabilities" else
                "one softmax over classes of their mean sentence")
        return words

    @torch.no_grad()
    def pictures(self, model, batch, folder, results):
        """similarity.png: the similarity matrix. retrieval.png: the best clips for some sentences.
        captions.png: captions under frames. attention.png: attention of the decoder per word."""
        if "caption" not in batch:
            return []
        count = min(16, len(batch["video"]))
        frames, captions = batch["video"][:count], batch["caption"][:count]
        video = normalise(frames, model.clip.mean, model.clip.std)
        ids, _ = self.bpe.encode(captions, self.context, trim=True)
        with self.autocast():
            video_features, text_features, _ = model.clip(video, ids.to(video.device))
            written = model.caption(video, self.bpe, self.context - 1)
        video_features, text_features = (F.normalize(x.float(), dim=-1)
                                         for x in (video_features, text_features))
        cosines, frames = (text_features @ video_features.T).cpu(), frames.cpu().numpy()
        paths = [folder / f"{name}.png" for name in ("similarity", "retrieval", "captions",
                                                     "attention")]
        pictures.similarity(cosines, captions, paths[0])
        pictures.retrieval(cosines, frames, captions, paths[1])
        if not self.caption_weight:
            return paths[:2]
        paths[2:3] = pictures.captions(frames, captions, written, paths[2])
        if model.clip.kind == "joint":  # its tokens do not belong to single frames
            return paths[:-1]
        captioning.draw_attention(model, frames[0], video[:1], written[0], self.bpe, paths[-1])
        return paths
