"""The base class of all stages: fields that become flags, and the methods that the loop calls.

A stage is a dataclass. Its fields are the recipe and its methods are the behaviour. `train.train`
runs every stage and has no code for a particular one. To add a stage, write one file in tasks/.
train.py imports every file there, and the class registers itself:

    @dataclass
    class Distill(ClipStage, name="distill"):            # python train.py distill --teacher RUN
        # `python train.py --help` prints the first line of its docstring
        steps: int = flag(500, paper="800 epochs")       # help and range are those of Stage.steps
        teacher: str = flag("", "the frozen teacher: a run's folder or an official file")

        def datasets(self): ...                          # self.open_sets()
        def build(self, train_set): ...                  # the student; self.frozen = the teacher
        def loss(self, model, batch, rng): ...

First read `Stage` and `ClipStage` below, and the first stage in train.py. Further base classes are
in tasks/: MaskedStage (reconstruction.py) hides a part of each clip, ClassifierStage (labelled.py)
predicts labels, SentenceStage (sentences.py) reads text. variants/cards.py has two short stages,
and exercises/ex10_stage.py asks you to write one.

- The loop trains and saves the model that `build` returns. It does not know a teacher or another
  frozen network. Keep such a network on `self`, and move it to the device in `loss`. Make it part
  of the model only if the run has to save it.
- --resume refuses other values of the flags, except those in checkpoints.FREE_TO_CHANGE. --weights
  is among the exceptions, because a checkpoint holds all weights of the model. So a teacher needs a
  flag of its own. Its files must not change until the run has ended.
- Other stages load a run by `config["model"]`, the name of the model's class. A new class of model
  needs a row in MODELS (weights/families.py). A new encoder also needs one in ENCODERS
  (weights/encoders.py).
- tests/test_runs.py has a table of stages. A row there tests that a killed run of the stage resumes
  bit-identically.
"""

import contextlib
import dataclasses
import json
import types
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import weights
from attention import FORMS
from engine import evaluation, processes
from engine.errors import UserError
from engine.frame_size import LARGEST, frame_size, height_width, spelled
from video.sampling import SAMPLINGS
from video.transforms import TRANSFORMS

STAGES = {}  # {name that users type: class}; Stage.__init_subclass__ fills it
GROUPS = ("recipe", "clips", "run", "machine")  # headings of --help, in this order
FLAG_DEFAULTS = dict(help="", low=None, high=None, choices=None, paper="", only="", group="recipe")


def flag(default, help=None, low=None, high=None, choices=None, paper=None, only=None, group=None):
    """A field of a stage, which is also a command-line flag.

    help     meaning and unit
    low, high, choices   the allowed values
    paper    the paper's value
    only     "files": has an effect only with --data; "generated": only without --data. Where it
             has no effect, any value except the default is an error
    group    heading of --help: one of GROUPS

    An argument that is None is taken from the field of the same name in a base class.
    """
    given = dict(help=help, low=low, high=high, choices=choices, paper=paper, only=only,
                 group=group)
    return dataclasses.field(default=default, metadata={
        key: value for key, value in given.items() if value is not None})


def details(field):
    """The arguments of `flag` for a field of a stage: {"help": ..., "low": ..., ...}."""
    return FLAG_DEFAULTS | field.metadata


def generator(seed, *parts):
    """A torch.Generator on the CPU whose state is a function of these arguments alone.

    parts  numbers and words that name the use, such as "loss", step
    """
    entropy = [seed] + [zlib.crc32(str(part).encode()) for part in parts]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


@dataclass
class Stage:
    """The fields and methods that every stage has. A stage must define

    datasets()               -> (training set, {"val": data set, ...}); see data.py for an item
    build(train_set)         -> the model, untrained or from --weights; its attribute `config`, a
                                dict, has the options of the model and can be written as JSON
    loss(model, batch, rng)  -> (loss, {"loss": number, ...}); random numbers come from `rng` alone

    and may override the methods below. The loop calls them in this order: datasets, build, prepare;
    then batches, loss and evaluate in turns; at the end finish, extras, pictures.

    Each evaluation measures all held-out sets except "test". That set is measured only once, after
    the last step, on `stage.test` clips.
    """

    name = ""           # name on the command line; set by `class X(Stage, name=...)`
    typed = frozenset()  # flags that the user typed; made in code: those that are not the default
    fixed = frozenset()  # flags whose values come from --weights
    began = False       # True as soon as the files in --out belong to this run
    test = 0            # clips of the set "test"; a stage with such a set has a flag for it

    data: str = flag("", "folder of videos, or a list of `path label` lines; default: generated "
                     "moving shapes", group="clips")
    val_data: str = flag("", "the same for evaluation; default: the held-out split of --data, or a "
                         "random tenth of its files", group="clips")
    out: str = flag("", "folder for logs, weights and pictures; default: runs/<stage>", group="run")
    weights: str = flag("", "start from these weights: a run's folder or an official file")
    resume: bool = flag(False, "continue from the newest readable checkpoint in --out, or start at "
                        "step 0 where there is none, so that a cluster can repeat one command",
                        group="run")
    steps: int = flag(1000, "optimiser steps; 0 = evaluate only", low=0)
    batch_size: int = flag(32, "clips per process and step", low=1)
    accum: int = flag(1, "micro-batches per step: more clips, the same memory", low=1)
    lr: float = flag(1e-3, "peak learning rate", low=0)
    min_lr: float = flag(0.01, "final learning rate as a fraction of the peak", low=0, high=1)
    warmup: float = flag(0.05, "share of the steps with a linear warm-up from 0", low=0, high=1)
    optimizer: str = flag("muon", "muon = Muon for the matrices of blocks and other numbered "
                          "layers, AdamW for the rest; adamw = AdamW for all",
                          choices=("muon", "adamw"), paper="adamw")
    weight_decay: float = flag(0.05, "weight decay; none for norms, biases, embeddings, positions",
                               low=0)
    beta2: float = flag(0.999, "AdamW second-moment decay", low=0, high=0.999999)
    clip_grad: float = flag(1.0, "largest gradient norm; 0 = no clipping", low=0)
    ema: float = flag(0.0, "decay per step of a moving average of the weights, used for "
                      "evaluation; 0 = none", low=0, high=1)
    figures: bool = flag(True, "pictures and report.html at the end of the run; --no-figures saves "
                          "some seconds",
                         group="run")
    seed: int = flag(0, "seed of all random numbers", low=0, group="run")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N", group="machine")
    precision: str = flag("auto", "bf16 = bfloat16 autocast; auto = bf16 where the processor "
                          "supports it", choices=("auto", "bf16", "fp32"), group="machine")
    attention: str = flag("auto", "implementation of attention; auto = by device and mask, see "
                          "attention.choose", group="machine",
                          choices=FORMS)
    compile: str = flag("auto", "torch.compile each block; auto = on CUDA only, because on a CPU "
                        "it takes half a minute and gains at most 4 percent",
                        choices=("auto", "on", "off"), group="machine")
    recompute: bool = flag(False, "gradient checkpointing: a third more time, a fraction of the "
                           "memory", group="machine")
    shard: bool = flag(False, "several processes: each keeps a part of weights, gradients and "
                       "optimiser states (FSDP2)", group="machine")
    workers: int = flag(1, "processes that prepare clips, per training process; 0 = itself",
                        low=0, high=1000, group="machine")
    eval_clips: int = flag(256, "held-out clips per evaluation", low=1, group="clips")
    eval_batch: int = flag(32, "clips per batch in evaluation, per process; does not change "
                           "results", low=1, group="machine")
    eval_every: int = flag(0, "steps between evaluations; 0 = five evaluations in the run", low=0,
                           group="run")
    save_every: int = flag(100, "steps between checkpoints", low=1, group="run")
    log_every: int = flag(10, "steps between lines of log.jsonl", low=1, group="run")
    dry_run: bool = flag(False, "print parameters, FLOPs per clip, memory and time, then exit",
                         group="run")

    def __init_subclass__(cls, name=None, **options):
        """Register the stage. Complete its flags with those of the same names in base classes."""
        super().__init_subclass__(**options)
        for key, field in vars(cls).items():
            if isinstance(field, dataclasses.Field):
                inherited = next((vars(base)["__dataclass_fields__"][key].metadata
                              for base in cls.__mro__[1:]
                              if key in vars(base).get("__dataclass_fields__", {})), {})
                field.metadata = types.MappingProxyType(inherited | field.metadata)
        cls.name = name or cls.__name__.lower()
        if name:
            STAGES[name] = cls

    def __post_init__(self):
        self.typed = frozenset(field.name for field in dataclasses.fields(self)
                               if getattr(self, field.name) != field.default)

    # Methods that a stage may override

    def batches(self, train_set, first, repeats=1):
        """Micro-batches from step `first` on. They are a function of (seed, step) alone."""
        return data.batches(train_set, self.batch_size, self.seed, self.steps * self.accum,
                            start=first * self.accum, workers=self.workers, repeats=repeats,
                            rank=processes.rank(), world=processes.world())

    def example(self, model, train_set):
        """A training batch of one clip, for --dry-run. `prepare` has not run there."""
        return next(iter(data.batches(train_set, 1, self.seed, 1)))

    def pixels(self):
        """Pixels of a micro-batch, B * T * H * W. It decides the number of threads on a CPU.

        T, H and W are 1 for a stage without --num-frames or --input-size."""
        height, width = height_width(getattr(self, "input_size", 1))
        return self.batch_size * getattr(self, "num_frames", 1) * height * width

    def evaluate(self, model, batches, held_out_set):
        """Measure the model on one held-out set -> {name: value}. By default, average the metrics.

        batches  its clips, on the device

        Numbers go into the log and metrics.json under "<set>_<name>". Other values (tensors,
        tables) are for `finish` and `pictures`, which get the whole dict.
        """
        rows = []
        for batch in batches:
            rng = generator(self.seed, "evaluation", batch["number"])
            _, metrics = self.loss(model, batch, rng)
            rows.append((batch["number"], len(batch["video"]),
                         {name: float(value) for name, value in metrics.items()}))
        return evaluation.weighted_mean(processes.gather_rows(rows))

    def prepare(self, model, train_set, held_out):
        """Slow work before the first evaluation, such as the features of a probe. --out exists.

        Returns what `batches` gets as `train_set`.
        """
        return train_set

    def untrained(self):
        """Name of the untrained part that --steps 0 would measure, for an error; "" = none.

        Called after `build`."""
        return "" if self.weights else "a network from scratch"

    def training_mode(self, model):
        """Put the model in training mode. A stage with frozen parts keeps them in eval mode."""
        model.train()

    def scale_of(self, model, name):
        """Factor on the learning rate of the parameter with this name."""
        return 1.0

    def protocol(self, held_out):
        """How results are measured: {term: value}, printed at the start and in metrics.json."""
        return {}

    def finish(self, model, held_out, results):
        """Measure what is needed only once, after the last evaluation -> {name: number}.

        held_out  {name: data set}
        results   {name of the set: result of `evaluate`}
        """
        return {}

    def tables(self, results):
        """Entries of metrics.json that are not numbers -> {name: a value that JSON can hold}.

        results  {name of the set: result of `evaluate`}
        """
        return {}

    def pictures(self, model, batch, folder, results):
        """Draw results on one held-out batch into the folder -> paths."""
        return []

    def extras(self, folder):
        """Write the files that belong to the weights, such as a tokenizer, into the folder."""

    # Methods that a stage may call

    def check_against_weights(self, **values):
        """Set flags to the values that --weights determine: {flag: value in the weights}.

        UserError as in `refuse_other`.
        """
        self.refuse_other(**values)
        for name, value in values.items():
            setattr(self, name, value)
        self.fixed |= values.keys()

    def refuse_other(self, **values):
        """UserError where a flag contradicts --weights: {flag: value in the weights}.

        A flag with its default value contradicts nothing, unless the user typed it.
        """
        for name, value in values.items():
            wanted, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if wanted != value and (name in self.typed or wanted != default):
                raise UserError(f"--{name.replace('_', '-')} {wanted}: {self.weights} keeps its "
                                f"own, {value}; leave it out")

    def cached(self, settings, compute):
        """The result of compute(), a dict of tensors and lists, kept in the file features.pt.

        A resumed run reads the file, unless it is damaged or was made with other settings. A new
        run computes again.
        """
        path = Path(self.out) / "features.pt"
        if self.resume and path.exists():
            with contextlib.suppress(Exception):  # damaged in any way: compute it again
                saved = weights.load(path)
                if saved.pop("settings") == settings:
                    return saved
        result = compute()
        if processes.rank() == 0:
            weights.write_torch(path, result | {"settings": settings})
        return result

    def autocast(self):
        """Context in which networks compute in bfloat16 if --precision is bf16.

        Compute losses outside of it, in float32."""
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16")

    def held_out(self, dataset, count, batch_size, shared=True):
        """Yield batches of a data set for evaluation, on the device; see data.held_out.

        shared  True: each process gets some of the batches, and `processes.gather_rows` joins the
                results in the order of batch["number"]; False: each process gets all batches
        """
        rank, world = (processes.rank(), processes.world()) if shared else (0, 1)
        for batch in data.held_out(dataset, count, batch_size, self.workers, rank, world):
            if batch["video"] is not None:
                yield evaluation.to_device(batch, self.device)


# The flag --test, for stages whose generated clips have a test split.
TEST_CLIPS = flag(0, "clips of the test split to measure at the end; no setting was ever "
                  "chosen with that split", only="generated", low=0, group="clips")


@dataclass
class ClipStage(Stage):
    """Base class of the stages that train on clips: opens files or the generated world."""

    num_frames: int = flag(8, "frames per clip", low=1, high=10**4, group="clips")
    input_size: frame_size = flag(40, "height and width in pixels, or HxW, as 112x160", low=1,
                                  high=LARGEST, group="clips", paper="224")
    sampling: str = flag("segment", "segment = frames spread over the video, dense = neighbouring "
                         "frames; the others are those of the published models", only="files",
                         choices=tuple(SAMPLINGS), group="clips")
    transform: str = flag("plain", "how frames are resized and cropped: plain, or as a published "
                          "model does it", only="files",
                          choices=tuple(TRANSFORMS), group="clips")
    video_folder: str = flag("", "folder of the videos, if they are not in that of --data",
                             only="files", group="clips")
    frame_rate: float = flag(25.0, "frames per second of videos that are folders of images; 0 = "
                             "each image is a clip", only="files", low=0, high=1000,
                             group="clips")
    train_clips: int = flag(0, "train on this many clips, over and over; 0 = all", low=0,
                            group="clips")
    generated = "MovingShapes"  # class of video.moving_shapes that generates clips

    @property
    def sides(self):
        """(H, W) of --input-size, in pixels."""
        return height_width(self.input_size)

    def open_sets(self, **options):
        """(training set, {name: held-out set}); see data.open_sets."""
        train_set, held_out = data.open_sets(
            self.data, self.val_data, generated=self.generated, frames=self.num_frames,
            size=self.sides, seed=self.seed, sampling=self.sampling, transform=self.transform,
            video_folder=self.video_folder, frame_rate=self.frame_rate, **options)
        if self.train_clips:
            train_set.first(self.train_clips)
        if not self.test:
            held_out.pop("test", None)
        return train_set, held_out

    def check_clips(self, expected):
        """UserError where weights of Hugging Face expect clips of another size.

        There is none if the user typed --positions, which says how to make position codes for
        another size.

        expected  result of weights.hub_clips
        """
        for name, value in expected.items():
            wanted, given = spelled(value) if name == "input_size" else value, getattr(self, name)
            if given != wanted and "positions" not in self.typed:
                name = name.replace("_", "-")
                raise UserError(
                    f"--{name} {given}: {self.weights} is for {wanted}; pass --{name} {wanted}, or "
                    "type --positions, too: it says how the position codes of other clips are made")

    def evaluated(self, dataset):
        """Indices of the items of a held-out set that an evaluation measures, in order."""
        return data.spread(len(dataset), self.eval_clips) if hasattr(dataset, "__len__") else \
            range(self.eval_clips)

    def clips_protocol(self, held_out):
        """The part of `protocol` that describes the clips."""
        val = held_out["val"]
        of_files = {"sampling": self.sampling, "transform": self.transform} if self.data else {}
        others = {name: one.source for name, one in held_out.items() if one.source != val.source}
        return {"clips": f"{len(self.evaluated(val))} held-out clips of {val.source}",
                "frames": self.num_frames, "pixels": self.input_size} | of_files | others


def check_stage(stage):
    """UserError with one line for each mistake in the code of a stage."""
    cls, faults = type(stage), []
    if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
        faults.append("has flags that are not fields yet: write @dataclass above the class")
    for method in ("datasets", "build", "loss"):
        if not callable(getattr(cls, method, None)):
            faults.append(f"has no method {method}(); see engine.stage.Stage")
    methods = {name for base in cls.__mro__ for name, value in vars(base).items()
               if isinstance(value, types.FunctionType) and not name.startswith("_")}
    for field in dataclasses.fields(stage):
        if field.name in methods or isinstance(field.default, types.FunctionType):
            faults.append(f"the field {field.name} has the name of a method")
    if faults:
        raise UserError(*(f"stage {stage.name or cls.__name__}: {fault}" for fault in faults))


def build_model(stage, train_set):
    """The model of stage.build(train_set). UserError where flags or weights do not fit it."""
    try:
        model = stage.build(train_set)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    if not (stage.resume or stage.dry_run):  # a checkpoint may hold trained weights
        check_trained(stage)
    return model


def check_trained(stage):
    """UserError where --steps 0 would measure untrained weights."""
    untrained = "" if stage.steps else stage.untrained()
    if untrained:
        raise UserError(f"--steps 0: would measure {untrained}, which nothing has trained; give "
                        "--weights of a finished run of this stage, or train it with --steps N")


def check_model(stage, model):
    """UserError where `model.config` is not a dict that can be written as JSON."""
    try:
        if not isinstance(model.config, dict):
            raise TypeError("is no dict")
        json.dumps(model.config)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"stage {stage.name}: build() returns a {type(model).__name__} whose "
                        f"`config` cannot be written as JSON: {error}") from None
