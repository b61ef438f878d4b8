"""Stages that do not need each other, side by side, a process each, and one line that shows all.

    jobs --> ready, when what a job needs is over --> running, so many at a time --> over

`needs` are not stated anywhere: a stage needs those before it whose folders its flags name. What a
stage prints goes into run.log in its folder; its progress is read from its log.jsonl. An error in
one of them ends the others after a step, with a checkpoint. So does Ctrl-C or SIGTERM; a second one
ends them at once.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

from tqdm import tqdm

from engine import machine
from engine.command_line import exit_code
from engine.errors import Interrupted, RunError, UserError
from engine.run import format_metrics
from video import moving_shapes

TICK = 0.5  # seconds from one look at the logs to the next

# Forked processes need not import torch again. Elsewhere than on Linux forking is not safe.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Job:
    """One stage: what it needs, its process, how far it is.

    stage    a Stage with `out`
    seconds  that it takes, roughly
    earlier  the jobs before it, which it may need
    """

    def __init__(self, stage, seconds, earlier):
        self.stage, self.seconds, self.left = stage, seconds, seconds
        self.name, self.out = Path(stage.out).name, Path(stage.out)
        named = {getattr(stage, field.name) for field in dataclasses.fields(stage)}
        self.needs = [job for job in earlier if job.stage.out in named]
        self.process, self.latest, self.said = None, "", set()

    def start(self, train, again, clips):
        """Begin; `again` and `clips` as in `run`."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "run.log").touch()
        except (OSError, ValueError) as error:  # ValueError: a character that no name may have
            raise UserError(f"--out {self.out}: "
                            f"{getattr(error, 'strerror', None) or error}") from None
        self.said = set(self.lines())
        self.hears, tells = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=work, args=(
            train, self.stage, again, clips, tells, os.getpid(),
            multiprocessing.get_start_method()))
        self.process.start()
        tells.close()

    def lines(self):
        """The whole lines of its log so far."""
        try:
            return (self.out / "log.jsonl").read_text(errors="replace").split("\n")[:-1]
        except OSError:
            return []

    def look(self):
        """Read the log: move `left` and `latest` -> texts of new evaluations."""
        texts = []
        for line in self.lines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                step = row.pop("step")
                if "lr" in row:
                    self.left = self.seconds * (1 - step / self.stage.steps)
                    self.latest = f"{step}/{self.stage.steps} loss {row['loss']:.3f}"
                elif line not in self.said:
                    texts.append(f"{self.name}: step {step}: {format_metrics(row)}")
        self.said.update(self.lines())
        return texts

    def end(self):
        """The process has ended: raise the error that it ended with, if any."""
        self.process.join()
        code, self.left = self.process.exitcode, 0.0
        if not code:
            return
        log = f"{self.out}/run.log"
        with contextlib.suppress(EOFError):
            if self.hears.poll():
                error = self.hears.recv()
                raise type(error)(*(f"{self.name}: {line}" for line in error.args))
        raise RunError(f"{self.name}: " + (
            f"its process was killed by signal {-code}, by nobody you know: out of memory; see "
            f"{log}" if code < 0 else f"ended with exit code {code}; see the end of {log}"))


def work(train, stage, again, clips, tells, parent, method):
    """What the process of a job does: run the stage, tell its error, end with its exit code."""
    file = sys.stdout = sys.stderr = open(Path(stage.out) / "run.log", "a", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    multiprocessing.set_start_method(method, force=True)  # of its workers: as without this file
    tqdm.set_lock(threading.RLock())  # the one from before the fork is shared with all others
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    machine.keep_memory()
    moving_shapes.keep(clips)

    def command():
        try:
            train(stage, again)
        except (UserError, RunError) as error:
            tells.send(error)
            raise

    raise SystemExit(exit_code(command))


def end_with(parent):
    """Ask this process to end, as SIGTERM does, when the one that started it is no more."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def ready(waiting, over, room):
    """At most `room` of the waiting jobs, those that may start: what they need is over."""
    return [job for job in waiting if over.issuperset(job.needs)][:room]


def seconds_left(jobs, at_once):
    """Seconds until all jobs are over, `at_once` at a time, by what each has left."""
    waiting, ends, over, now = list(jobs), {}, set(), 0.0
    while waiting or ends:
        for job in ready(waiting, over, at_once - len(ends)):
            waiting.remove(job)
            ends[job] = now + job.left
        first = min(ends, key=ends.get)
        now = ends.pop(first)
        over.add(first)
    return now


def run(train, jobs, at_once, again, clips):
    """Do all jobs. Raises the error of the first that fails, or Interrupted, when all have ended.

    train    the function that runs a stage
    again    what to type to go on where the run ends early
    clips    folder for clips that several jobs read, or None; see moving_shapes.keep
    """
    waiting, running, over, display = list(jobs), [], set(), Display(jobs, at_once)
    try:
        while waiting or running:
            for job in ready(waiting, over, at_once - len(running)):
                waiting.remove(job)
                running.append(job)
                job.start(train, again, clips)
            connection.wait([job.process.sentinel for job in running], TICK)
            ended = [job for job in running if not job.process.is_alive()]
            display.show(running)
            for job in ended:
                running.remove(job)
                job.end()
                over.add(job)
                display.say(f"{job.name}: done")
    except KeyboardInterrupt:
        stop(running)
        raise Interrupted(f"stopped during {', '.join(job.name for job in running)}; go on with: "
                          f"{again}") from None
    finally:
        display.clear()
        stop(running)


def stop(jobs):
    """Ask the processes of these jobs to save and end, and wait. If interrupted, kill them."""
    processes = [job.process for job in jobs if job.process and job.process.is_alive()]
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
            process.join()


class Display:
    """One line for all jobs that run, with the time left; evaluations are printed above it."""

    def __init__(self, jobs, at_once):
        self.jobs, self.at_once, self.began = jobs, at_once, time.monotonic()
        self.plan = None  # seconds, when the logs of an earlier start have been read
        self.on_screen = sys.stderr.isatty()
        self.shown = -float("inf")

    def show(self, running):
        """Read the logs of the jobs that run; draw the line, every 15 s where it goes to a file."""
        for job in running:
            for text in job.look():
                self.say(text)
        left, now = seconds_left(self.jobs, self.at_once), time.monotonic()
        self.plan = self.plan or left
        if now - self.shown < (0 if self.on_screen else 15):
            return
        self.shown, done = now, self.plan - left
        text = "; ".join(f"{job.name} {job.latest}".strip() for job in running)
        if done > 0:  # the machine is slower or faster than the plan
            minutes = left * (now - self.began) / done / 60
            text += f"; about {minutes:.0f} min left" if minutes > 1 else "; less than a minute"
        self.clear()
        print(text[:shutil.get_terminal_size().columns - 1] if self.on_screen else text,
              end="" if self.on_screen else "\n", file=sys.stderr, flush=True)

    def say(self, text):
        """Print above the line."""
        self.clear()
        print(text, flush=True)

    def clear(self):
        """Take the line away."""
        if self.on_screen:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
