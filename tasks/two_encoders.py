"""Base of stage 4: loads two or three encoders, and draws the results."""

import functools
import json
from dataclasses import dataclass

import fusion
from engine import pictures
from engine.errors import UserError
from engine.frame_size import frame_size, spelled
from engine.stage import flag
from tasks import class_names, recognition
from tasks.labelled import LabelledStage
from weights import encoders


@dataclass
class TwoEncodersStage(LabelledStage):
    """Base of `fuse`, which adds its recipe, the model and the loss."""

    masked: str = flag("", "the masked encoder: a run of classify, or an official file",
                       paper="VideoMAE-H")
    multimodal: str = flag("", "the multimodal encoder: a run of classify, or an official file",
                           paper="UniFormerV2-L")
    second: str = flag("", "a second multimodal encoder, for InternVideo-T; default: none")
    num_frames: int = flag(0, "frames per clip; 0 = as many as the encoders need", low=0,
                           paper="16")
    input_size: frame_size = flag(0, "height and width in pixels, or HxW, as 112x160; 0 = the "
                                  "largest that an encoder needs", low=0)

    @functools.cached_property
    def parts(self):
        """[masked encoder, one or two multimodal encoders], with their own heads."""
        if self.weights:
            model = fusion.InternVideo.from_run(self.weights)
            return [model.masked, *model.multimodal]
        return self.load_encoders()

    def heads(self):
        """One head for a fused model, whose heads have the same rows; else that of each encoder."""
        if self.weights:
            count = self.parts[0].config["classes"]
            return [class_names.head_of("weights", self.weights, count)]
        heads = []
        for name in ("masked", "multimodal", "second"):
            if source := getattr(self, name):
                count = encoders.made_for(source)[2]
                heads.append(class_names.head_of(name, source, count))
                if not count:
                    print(f"--{name} {source}: has no classifier; a new one is trained")
        return heads

    def untrained(self):
        """As LabelledStage. New cross-model attention without gates is also untrained. Behind
        closed gates it changes nothing, and the output is the average of the encoders."""
        fresh = not self.weights and self.bridges and not self.gates
        return super().untrained() or "cross-model attention without gates" * fresh

    def load_encoders(self):
        """The encoders of --masked, --multimodal and --second."""
        return encoders.load_several(masked=self.masked, multimodal=self.multimodal,
                                     second=self.second)

    def datasets(self):
        """Clips with at least as many frames as the encoders need."""
        frames = max(encoder.config["frames"] for encoder in self.parts)
        if self.num_frames and self.num_frames < frames:
            raise UserError(f"--num-frames {self.num_frames}: the encoders need {frames} frames; "
                            f"give at least {frames}, or leave it out")
        self.num_frames = self.num_frames or frames
        self.input_size = self.input_size or spelled(fusion.largest_image_size(self.parts))
        return super().datasets()

    def finish(self, model, held_out, results):
        """As LabelledStage. For confusion.png it also evaluates the average of the encoders before
        training."""
        parts = [] if self.weights or not self.figures else self.load_encoders()
        classes = recognition.number_of_answers(self.classes)
        if parts and all(encoder.config["classes"] == classes for encoder in parts):
            late = fusion.InternVideo(parts[0], parts[1:], bridges=False).to(self.device).eval()
            batches = self.held_out(held_out["val"], self.eval_clips, self.eval_batch)
            results["before"] = self.evaluate(late, batches, held_out["val"])
        return super().finish(model, held_out, results)

    def confusions(self, results):
        """Confusion matrices of the encoders' average and of the trained model."""
        before = {"equal average, before": results["before"]["confusion"]} \
            if "before" in results else {}
        return before | {"after": results["val"]["confusion"]}

    def pictures(self, model, batch, folder, results):
        """confusion.png, gates.png, and cross_attention.png: where the masked encoder attends."""
        paths = super().pictures(model, batch, folder, results)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        if sum("share_masked" in line for line in lines) > 1:  # a run of few steps logs no curve
            paths.append(folder / "gates.png")
            pictures.gates(lines, paths[-1])
        if model.before:
            paths.append(folder / "cross_attention.png")
            draw_attention(model, batch["video"][:1], paths[-1])
        return paths


def draw_attention(model, clip, path):
    """Draw where tokens of the masked encoder attend in the first multimodal encoder.

    model  fusion.InternVideo with cross-model attention
    clip   uint8 (1, T, H, W, 3)
    """
    grids = [encoder.grid_of(encoder.config["frames"], *encoder.config["image_size"])
             for encoder in (model.masked, model.multimodal[0])]
    tokens = pictures.strongest(model.attention_maps(clip)[0].cpu(), *grids)
    pictures.cross_attention_maps(clip[0].cpu().numpy(), *tokens, path)
