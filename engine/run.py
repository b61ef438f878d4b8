"""One run of a stage: folder, device, log, signals, progress bar, bad files, checkpoints, results.

    Run(stage) -> prepare(model) -> resume(optimizer) -> start(data sets)
        -> training(): steps(batches) -> check_finite -> log -> evaluate -> save
        -> finish() -> metrics.json, weights, pictures

`train.train` is the loop that calls these methods. Its docstring lists the files of a run.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import attention
import data
import weights
from engine import checkpoints, evaluation, machine, optimisers, pictures, processes, report
from engine.errors import Interrupted, RunError, UserError
from engine.stage import check_model, check_stage, check_trained
from video.loading import dead_worker

MAX_UNREADABLE = 0.5  # a run stops above this share of unreadable clips, once 10 are unreadable


class Log:
    """log.jsonl: one JSON object per line. A resume deletes the lines after its checkpoint.

    step  step of the checkpoint; 0 = start a new log
    """

    def __init__(self, path, step):
        self.path, kept = path, []
        if processes.rank() > 0:
            return
        if step and path.exists():
            for line in path.read_text(errors="replace").split("\n"):
                # Where the run was killed, the last line may be incomplete.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
        text = "".join(line + "\n" for line in kept)
        weights.write_atomically(path, lambda aside: Path(aside).write_text(text))

    def write(self, **values):
        if processes.rank() > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({name: round(value, 7) if isinstance(value, float) else value
                                   for name, value in values.items()}) + "\n")


def add_means(total, values, count):
    """Add the metrics of one of `count` micro-batches to their means in `total`, in place."""
    for name, value in values.items():
        total[name] = total.get(name, 0.0) + float(value) / count


def format_metrics(numbers):
    """{name: number} as text on one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def clip_count(batch):
    """Number of clips in a batch of videos or of stored features."""
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))


class Run:
    """One run of a stage.

    resume_command  what a user types to continue this run: "--resume" or a command; for messages

    Attributes that several methods use:

    step       number of steps that are done; first = that number when this process began
    latest     {name: number}, the last training metrics
    results    {set: result of stage.evaluate}, of the last evaluation
    metrics    {"<set>_<name>": number}, the numbers of `results`
    initial    the same from before step 0, with names "initial_..."
    sets       {set: evaluation.HeldOut}
    bad        {path: reason} of unreadable training files
    files      paths of the clips of this step, for messages
    signals    signals that came during training; stopping = all processes agreed to stop
    """

    def __init__(self, stage, resume_command="--resume"):
        self.stage, self.resume_command = stage, resume_command
        self.out = Path(stage.out or f"runs/{stage.name}")
        stage.out = str(self.out)
        check_stage(stage)
        # Choices replace "auto" in the stage, so the log and the checkpoints name them.
        stage.device = processes.start(machine.choose_device(stage.device))
        stage.precision = machine.choose_precision(stage.precision, stage.device)
        stage.compile, self.compile_reason = machine.choose_compile(stage)
        attention.use(stage.attention)
        self.onednn = self.onednn_reason = ""
        if stage.device == "cpu":
            self.onednn, self.onednn_reason = machine.choose_onednn()
        if stage.device == "cpu" and stage.attention == "flex" and stage.steps:
            raise UserError("--attention flex: FlexAttention has no backward pass on a CPU; choose "
                            "auto, reference or sdpa")
        self.step, self.seconds_before, self.initial, self.bad = 0, 0.0, {}, {}
        self.results, self.metrics, self.latest = {}, {}, {}
        self.signals, self.stopping, self.batches, self.warned = [], False, None, False

    # Before the first step

    def prepare(self, model, compiled=()):
        """Move the model to the device, compile its blocks, wrap it for several processes.

        compiled  classes of modules whose forward pass is compiled
        returns   function (batch, rng) -> the results of stage.loss; after its backward pass the
                  gradients are means over processes
        """
        stage, self.model = self.stage, model.to(self.stage.device)
        check_model(stage, model)
        self.threads_reason = ""
        if stage.device == "cpu":
            self.threads_reason = machine.choose_threads(
                sum(p.numel() for p in model.parameters()), stage.pixels())
        if stage.compile == "on":
            machine.compile_blocks(model, compiled)
        self.open_folder()
        self.training_loss = processes.parallel(model, stage.loss, stage.shard,
                                                parts=(attention.Block,))
        self.average = optimisers.WeightAverage(model, stage.ema) if stage.ema else None
        return self.training_loss

    def open_folder(self):
        """Make --out, and move an earlier run in it aside.

        All checks come before this call, so a user's error leaves the folder as it was.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except (OSError, ValueError) as error:  # ValueError: a character that is not allowed
            raise UserError(f"--out {self.out}: "
                            f"{getattr(error, 'strerror', None) or error}") from None
        if not self.stage.resume and processes.rank() == 0:
            checkpoints.archive_old_run(self.out)
        self.stage.began = True
        processes.wait()

    def resume(self, optimizer):
        """With --resume, load the newest readable checkpoint -> its step; otherwise 0."""
        stage, self.optimizer = self.stage, optimizer
        own = checkpoints.tensors_of(self.model, None, self.average)
        last = checkpoints.resume_from(self.out, stage, own) if stage.resume else None
        if not last:
            check_trained(stage)
        if last:
            saved, tensors = last
            checkpoints.restore(tensors, self.model, optimizer, self.average)
            self.step, self.seconds_before = saved["step"], saved["seconds"]
            self.initial, self.bad = saved["initial"], saved["bad"]
            onednn = saved.get("onednn", saved["settings"].get("onednn"))
            if stage.device == "cpu" and onednn in ("on", "off") and onednn != self.onednn:
                # The choice changes the last bits, so a run keeps it on another machine.
                self.onednn, self.onednn_reason = machine.choose_onednn(onednn)
        self.first = self.step
        processes.wait()
        return self.first

    def start(self, train_set, held_out):
        """Print the settings, open the log, evaluate before the first step.

        held_out  {name: data set}
        returns   what stage.batches reads: the training set, or the stored features of a probe
        """
        stage = self.stage
        self.sets = {name: evaluation.HeldOut(one, stage.test if name == "test" else
                                              stage.eval_clips, stage)
                     for name, one in held_out.items()}
        self.protocol = stage.protocol(held_out)
        self.describe(train_set)
        self.log_file = Log(self.out / "log.jsonl", self.first)
        self.started = time.monotonic()
        with processes.unsharded(self.training_loss):
            train_set = stage.prepare(self.model, train_set, held_out)
        self.evaluate(self.first)
        if not self.initial and self.first == 0:
            self.initial = {f"initial_{name}": value for name, value in self.metrics.items()}
        return train_set

    def describe(self, train_set):
        """Print the size of the run, choices for this machine, all settings and the protocol."""
        stage, clips = self.stage, optimisers.clips_per_step(self.stage)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        group = f", {processes.world()} processes" * (processes.world() > 1)
        group += " with a part of the weights each" * (bool(group) and stage.shard)
        finite = hasattr(train_set, "__len__") and not isinstance(train_set, data.VideoShards)
        epochs = f", {stage.steps * clips / len(train_set):.3g} epochs" if finite else ""
        count = torch.get_num_threads()
        threads = f"{count} thread{'s' * (count > 1)}" + f" ({self.threads_reason})" * bool(
            self.threads_reason)
        print(f"{stage.name}: {self.parameters / 1e6:.2f} M parameters, {stage.steps} steps of "
              f"{clips} clips{epochs}, peak lr {optimisers.peak_rate(stage):.2e}, {stage.device}, "
              f"{stage.precision}{group}, {threads} -> {self.out}")
        print(f"attention: {stage.attention}; blocks "
              f"{'compiled' if stage.compile == 'on' else 'not compiled'}"
              + f" ({self.compile_reason})" * bool(self.compile_reason)
              + f"; oneDNN for float32 {self.onednn} ({self.onednn_reason})" * bool(self.onednn))
        print("settings: " + json.dumps(dataclasses.asdict(stage)))
        if self.protocol:
            print("protocol: " + "; ".join(f"{name.replace('_', ' ')}: {value}"
                                           for name, value in self.protocol.items()))

    # Training

    @contextlib.contextmanager
    def training(self):
        """Context with a progress bar, in which Ctrl-C and SIGTERM end the run after a step.

        That step is saved. A second signal of the same kind ends a run of one process at once.
        After a signal the context ends with Interrupted, even if it came in the last step.
        """
        stage = self.stage
        handled = [number for number in (signal.SIGINT, signal.SIGTERM)
                    if signal.getsignal(number) is not signal.SIG_IGN]  # as in a background job
        previous = [(number, signal.signal(number, self.on_signal)) for number in handled]
        self.bar = tqdm(total=stage.steps, initial=self.first, desc=stage.name, unit="step",
                        dynamic_ncols=True, disable=stage.steps == 0 or processes.rank() > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 15)
        try:
            yield
        finally:
            self.bar.close()
            for number in handled:
                signal.signal(number, signal.SIG_IGN)  # no signal while the workers end
            self.batches = None
            # When one of several processes ends, torchrun sends the others SIGTERM.
            if not self.stopping or processes.world() == 1:
                for number, handler in previous:
                    signal.signal(number, handler)
        stop = bool(self.signals) or self.stopping
        if processes.means({"stop": stop}, stage.device)["stop"] > 0:
            line = self.resume_command if self.resume_command != "--resume" else (
                f"python train.py {stage.name} --resume --out {self.out} and the same flags")
            raise Interrupted(f"stopped at step {self.step} of {stage.steps}, saved in "
                              f"{self.out}/last.pt; go on with: {line}")

    def on_signal(self, number, _):
        """The signal handler during training."""
        if number in self.signals and processes.world() == 1:  # second time: stop now
            raise KeyboardInterrupt
        self.signals.append(number)

    def steps(self, batches):
        """Yield (step, micro-batches on the device), up to --steps or until a stop is requested."""
        self.batches = iter(batches)
        del batches  # one reference is left: `training` deletes it, which ends the workers
        self.start_window()
        self.unreadable = self.requested = 0
        self.stage.training_mode(self.model)
        while self.step < self.stage.steps and not self.stopping:
            self.files = []
            yield self.step, self.micro_batches()
            self.step += 1

    def micro_batches(self):
        """Yield the micro-batches of a step. Measure the time spent waiting for them."""
        for _ in range(self.stage.accum):
            began = time.monotonic()
            batch = next(self.batches)
            self.waited += time.monotonic() - began
            self.count_unreadable(batch)
            self.files += batch.get("path", ())
            self.clips += clip_count(batch)
            yield evaluation.to_device(batch, self.stage.device)

    def count_unreadable(self, batch):
        """Print each unreadable file once.

        DataError where at least 10 clips could not be read, and more than half of all.
        """
        unreadable = batch.get("bad", ())
        for path, reason in unreadable:
            if path not in self.bad:
                self.bad[path] = reason
                tqdm.write(f"skipped: {reason}")
        self.unreadable += len(unreadable)
        self.requested += clip_count(batch) + len(unreadable)
        if self.unreadable >= 10 and self.unreadable > MAX_UNREADABLE * self.requested:
            raise data.DataError(f"{self.unreadable} of {self.requested} clips could not be read, "
                                 f"more than half, the last: {reason}; `python data.py PATH` lists "
                                 "all such files")

    def accumulating(self, last):
        """Context of a micro-batch. Only the last one's backward pass averages over processes."""
        return processes.exchange(self.training_loss, on=last)

    def check_finite(self, metrics, grad_norm, rate):
        """Average {name: number} over all processes and check that all numbers are finite.

        If one is not finite, the weights from before this step are saved, and RunError ends the
        run. The processes also agree here whether to stop: a signal to one of them stops all of
        them after the same step.
        """
        stage = self.stage
        if "loss" not in metrics:
            raise UserError(f"stage {stage.name}: loss() returns no number named loss")
        failed_here = not all(map(math.isfinite, metrics.values()))
        metrics = processes.means(metrics | {"stop": bool(self.signals)}, stage.device)
        self.stopping = metrics.pop("stop") > 0
        if math.isfinite(grad_norm) and all(map(math.isfinite, metrics.values())):
            return metrics
        self.save(self.step)
        # Name the files of the processes whose loss failed; of all, where only the gradient did.
        rows = processes.gather_rows([(processes.rank(), failed_here, self.files)])
        known = any(failed for _, failed, _ in rows)
        names = [path for _, failed, files in rows if failed or not known for path in files]
        lower = "--blr or --lr" if hasattr(stage, "blr") else "--lr"
        raise RunError(
            f"step {self.step}: loss {metrics['loss']}, gradient norm {grad_norm}, lr {rate:.2e}, "
            f"batch {', '.join(names) or 'of generated clips'}: not finite; the weights before it "
            f"are in {self.out}/last.pt; try a lower {lower}, or --precision fp32")

    def update_average(self):
        """With --ema, update the average of the weights. Call it after each optimiser step."""
        if self.average:
            self.average.update(self.model)

    def start_window(self):
        """Start to measure the speed that the next line of the log reports."""
        self.window, self.waited, self.clips = time.monotonic(), 0.0, 0

    def seconds(self):
        """Seconds of the whole run, summed over its resumes."""
        return self.seconds_before + time.monotonic() - self.started

    def log(self, step, metrics, rate, grad_norm):
        """Advance the progress bar. Every --log-every steps, log the metrics and the speed."""
        stage = self.stage
        self.latest |= metrics  # a stage may report a metric in some steps only
        self.bar.update()
        if step % stage.log_every and step != stage.steps:
            return
        elapsed = time.monotonic() - self.window
        waiting, memory = self.waited / elapsed, round(machine.memory_mib(stage.device))
        speed = self.clips * processes.world() / elapsed
        self.log_file.write(step=step, **self.latest, lr=rate, grad_norm=grad_norm,
                            clips_per_s=speed, data_wait=waiting, memory_mib=memory,
                            seconds=self.seconds())
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, lr {rate:.1e}, {speed:.0f} clips/s, "
                                 f"data {waiting:.0%}, {memory} MiB")
        # The first steps always wait, because the workers begin with them.
        if waiting > 0.2 and step >= self.first + 3 * stage.log_every and not self.warned:
            self.warned = True
            tqdm.write(f"the step waits for clips {waiting:.0%} of the time: raise --workers"
                           + ", or make small copies with data.py --cache" * bool(stage.data))
        self.start_window()

    def evaluates_at(self, step):
        """True after every --eval-every steps (0: a fifth of the run), and after the last step."""
        every = self.stage.eval_every or max(1, self.stage.steps // 5)
        return step % every == 0 or step == self.stage.steps

    def saves_at(self, step):
        """True after every --save-every steps, after the last step, and before a requested stop."""
        return step % self.stage.save_every == 0 or step == self.stage.steps or self.stopping

    def evaluate(self, step, names=None):
        """Evaluate on the sets in `names`, else on all but "test". Log and print the metrics."""
        held_out = {name: clips for name, clips in self.sets.items()
                    if (name in names if names else name != "test")}
        self.model.eval()
        with torch.no_grad(), self.averaged(), processes.unsharded(self.training_loss):
            results = evaluation.evaluate(self.stage, self.model, held_out)
        self.stage.training_mode(self.model)
        self.results |= results
        numbers = evaluation.numbers_of(results)
        self.metrics |= numbers
        self.log_file.write(step=step, **numbers)
        tqdm.write(f"step {step}: {format_metrics(numbers)}")
        self.start_window()

    def averaged(self):
        """Context in which the model has the averaged weights, if there is --ema."""
        return self.average.in_place(self.model) if self.average else contextlib.nullcontext()

    def save(self, step):
        """Write a checkpoint after `step` steps: model, averaged weights, optimiser, facts."""
        tensors = checkpoints.tensors_of(self.model, self.optimizer, self.average)
        facts = dict(step=step, settings=dataclasses.asdict(self.stage), seconds=self.seconds(),
                     processes=processes.world(), initial=self.initial, bad=self.bad,
                     onednn=self.onednn, tensors=[len(group) for group in tensors.values()])
        checkpoints.save_checkpoint(self.out, facts, tensors,
                                    self.stage.shard and processes.world() > 1)

    # After the last step

    def finish(self):
        """Measure the set "test" and stage.finish, then write all files.

        Returns the content of metrics.json.
        """
        stage, model = self.stage, self.model
        if "test" in self.sets:
            self.evaluate(self.step, ["test"])
        model.eval()
        with self.averaged():
            tensors = {name: processes.full_tensor(value)
                       for name, value in model.state_dict().items()}
            with torch.no_grad(), processes.unsharded(self.training_loss):
                held_out = {name: clips.dataset for name, clips in self.sets.items()}
                self.metrics |= stage.finish(model, held_out, self.results)
                content = self.report()
                if processes.rank() == 0:
                    self.write_outputs(tensors, content)
        unreadable, clips = self.sets["val"].bad, self.sets["val"].clips
        if unreadable:
            print(f"evaluated {clips} of {clips + len(unreadable)} held-out files; not readable: "
                  + "; ".join(reason for _, reason in unreadable))
        if self.bad:
            print(f"{len(self.bad)} unreadable training files were skipped (named above and in "
                  "metrics.json)")
        processes.wait()
        print(f"{stage.name}: done in {content['seconds']:.0f} s; {format_metrics(self.metrics)}")
        return content

    def report(self):
        """The content of metrics.json, a dict."""
        rows = processes.gather_rows([(processes.rank(), list(self.bad.items()))])
        self.bad = dict(pair for _, pairs in rows for pair in pairs)
        unreadable = dict(pair for clips in self.sets.values() for pair in clips.bad)
        return dict(stage=self.stage.name, step=self.step, protocol=self.protocol, **self.metrics,
                    **self.initial, parameters=self.parameters, trained=self.trained,
                    **self.stage.tables(self.results),
                    seconds=round(self.seconds(), 1), processes=processes.world(),
                    bad_files=self.bad | unreadable, settings=dataclasses.asdict(self.stage))

    def write_outputs(self, tensors, metrics):
        """Write weights, pictures, metrics.json and report.html.

        metrics.json comes after the others, so a folder that has it is complete.
        """
        stage, batch = self.stage, self.sets["val"].first
        weights.save(self.out, tensors, self.model.config)
        stage.extras(self.out)
        if stage.figures and batch:
            drawn = stage.pictures(self.model, evaluation.to_device(batch, stage.device), self.out,
                                   self.results)
            drawn += pictures.curve(self.out, stage.name) if stage.steps else []
            print("pictures: " + ", ".join(str(path) for path in drawn))
        text = json.dumps(metrics, indent=1) + "\n"
        weights.write_atomically(self.out / "metrics.json",
                                 lambda path: Path(path).write_text(text))
        if stage.figures:
            report.write(self.out)


def one_line_errors(train):
    """Decorator of train(stage, resume_command) that turns errors into one line.

    An error of the machine becomes a RunError, an interruption becomes Interrupted. The line names
    the last good checkpoint. An error of this program keeps its traceback, which a report needs.
    """
    @functools.wraps(train)
    def wrapped(stage, resume_command="--resume"):
        def with_checkpoint(reason):
            # A checkpoint in --out from before this run began belongs to another run.
            found = checkpoints.checkpoints(Path(stage.out)) if stage.began else []
            return reason + (f"; the last good checkpoint is {found[0]}, go on with "
                             f"{resume_command}" if found else "; no checkpoint was written yet")
        try:
            return train(stage, resume_command)
        except KeyboardInterrupt:
            raise Interrupted(with_checkpoint("interrupted")) from None
        except (OSError, EOFError, MemoryError, RuntimeError) as error:
            reason = describe_error(error, stage)
            if not reason:
                raise
            raise RunError(with_checkpoint(reason)) from None
    return wrapped


def describe_error(error, stage):
    """An error of the machine -> one line of text. An error of this program -> None."""
    text = str(error)
    if isinstance(error, RunError):  # is one line already
        return None
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        return f"out of memory on {stage.device}: try {', or '.join(lower_memory(stage))}; " \
               "--dry-run estimates what a step needs"
    cause = error  # a worker can die at any time, also while a checkpoint is written
    while cause is not None:
        if dead := dead_worker(cause):
            return dead
        cause = cause.__context__
    if not getattr(error, "filename", None) and re.search(  # workers send clips this way
            r"shared memory (object|file)|shared memory\(shm\)|</torch_\d+_\d+|items of ancdata|"
            r"Too many open files", text):
        return (f"no room to pass clips from one process to another "
                f"({text.strip().splitlines()[0][:150]}): fewer --workers, a smaller --batch-size, "
                "a larger /dev/shm, or a higher `ulimit -n`")
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or stage.out}: {error.strerror}"
    if processes.world() > 1 and re.search(r"[Cc]onnection|peer|NCCL|gloo", text):
        return "another process of this run has ended; its own line says why"
    return None


def lower_memory(stage):
    """Flags with which the same step needs less memory: a list of texts."""
    batch, flags = stage.batch_size, []
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), 1)  # smallest divisor above 1
    if hasattr(stage, "cache_size"):
        cache = stage.cache_size or batch
        flags += [f"--cache-size {cache // 2}"] * (cache > 1)
    else:
        flags += [f"--batch-size {batch // parts} --accum {parts * stage.accum}, which is the same "
                  "step"] * (parts > 1)
    flags += [f"--eval-batch {stage.eval_batch // 2}"] * (stage.eval_batch > 1)
    flags += ["--recompute"] * (not stage.recompute)
    flags += ["--precision bf16"] * (stage.precision == "fp32")
    flags += ["--shard"] * (processes.world() > 1 and not stage.shard)
    return flags + ["fewer --workers"]
