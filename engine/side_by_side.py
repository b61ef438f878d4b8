"""Run several stages at the same time, each in its own process, with one progress line for all.

    waiting jobs --> ready: all jobs that they need are done --> running, `at_once` --> done

1. A job needs the earlier jobs whose folders its flags name.
2. A stage prints into run.log in its folder. Its progress is read from its log.jsonl.
3. An error in one stage ends the others after a step, with a checkpoint. Ctrl-C and SIGTERM do the
   same for all of them. A second signal ends them at once.
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

POLL_SECONDS = 0.5  # interval at which the logs are read

# Forked processes need not import torch again. Forking is safe only on Linux.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Job:
    """One stage to run: the jobs that it needs, its process, its progress.

    stage    a Stage with `out`
    seconds  estimate of its time
    earlier  earlier jobs, some of which it may need
    """

    def __init__(self, stage, seconds, earlier):
        self.stage, self.seconds, self.left = stage, seconds, seconds
        self.name, self.out = Path(stage.out).name, Path(stage.out)
        named = {getattr(stage, field.name) for field in dataclasses.fields(stage)}
        self.needs = [job for job in earlier if job.stage.out in named]
        self.process, self.latest, self.old_lines = None, "", set()

    def start(self, train, resume_command, clips):
        """Start the process. resume_command and clips: as in `run`."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "run.log").touch()
        except (OSError, ValueError) as error:  # ValueError: a character that is not allowed
            raise UserError(f"--out {self.out}: "
                            f"{getattr(error, 'strerror', None) or error}") from None
        self.old_lines = set(self.lines())
        self.receiver, sender = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=run_job, args=(
            train, self.stage, resume_command, clips, sender, os.getpid(),
            multiprocessing.get_start_method()))
        self.process.start()
        sender.close()

    def lines(self):
        """The complete lines of its log so far."""
        try:
            return (self.out / "log.jsonl").read_text(errors="replace").split("\n")[:-1]
        except OSError:
            return []

    def read_log(self):
        """Read the log and update `left` and `latest` -> texts of new evaluations."""
        texts = []
        for line in self.lines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                step = row.pop("step")
                if "lr" in row:
                    self.left = self.seconds * (1 - step / self.stage.steps)
                    self.latest = f"{step}/{self.stage.steps} loss {row['loss']:.3f}"
                elif line not in self.old_lines:
                    texts.append(f"{self.name}: step {step}: {format_metrics(row)}")
        self.old_lines.update(self.lines())
        return texts

    def end(self):
        """Clean up after the process has ended. Raise the error that ended it, if any."""
        self.process.join()
        code, self.left = self.process.exitcode, 0.0
        if not code:
            return
        log = f"{self.out}/run.log"
        with contextlib.suppress(EOFError):
            if self.receiver.poll():
                error = self.receiver.recv()
                raise type(error)(*(f"{self.name}: {line}" for line in error.args))
        raise RunError(f"{self.name}: " + (
            f"its process was killed by signal {-code}; if nobody did that, memory ran out; see "
            f"{log}" if code < 0 else f"ended with exit code {code}; see the end of {log}"))


def run_job(train, stage, resume_command, clips, sender, parent, method):
    """Main function of a job's process: run the stage, send its error, exit with its code."""
    file = sys.stdout = sys.stderr = open(Path(stage.out) / "run.log", "a", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    multiprocessing.set_start_method(method, force=True)  # for the workers of the stage, as usual
    tqdm.set_lock(threading.RLock())  # the lock from before the fork is shared by all jobs
    threading.Thread(target=end_after_parent, args=(parent,), daemon=True).start()
    machine.keep_memory()
    moving_shapes.set_cache_folder(clips)

    def command():
        try:
            train(stage, resume_command)
        except (UserError, RunError) as error:
            sender.send(error)
            raise

    raise SystemExit(exit_code(command))


def end_after_parent(parent):
    """Send SIGTERM to this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def ready(waiting, done_jobs, room):
    """At most `room` waiting jobs that can start, because all jobs that they need are done."""
    return [job for job in waiting if done_jobs.issuperset(job.needs)][:room]


def seconds_left(jobs, at_once):
    """Estimated seconds until all jobs are done, `at_once` at a time, from `left` of each."""
    waiting, ends, done_jobs, now = list(jobs), {}, set(), 0.0
    while waiting or ends:
        for job in ready(waiting, done_jobs, at_once - len(ends)):
            waiting.remove(job)
            ends[job] = now + job.left
        first = min(ends, key=ends.get)
        now = ends.pop(first)
        done_jobs.add(first)
    return now


def run(train, jobs, at_once, resume_command, clips):
    """Run all jobs. Raises the first job's error, or Interrupted, after all jobs have ended.

    train           the function that runs a stage
    resume_command  what a user types to continue, for messages
    clips           folder in which jobs share generated clips, or None; see
                    moving_shapes.set_cache_folder
    """
    waiting, running, done_jobs, display = list(jobs), [], set(), Display(jobs, at_once)
    try:
        while waiting or running:
            for job in ready(waiting, done_jobs, at_once - len(running)):
                waiting.remove(job)
                running.append(job)
                job.start(train, resume_command, clips)
            connection.wait([job.process.sentinel for job in running], POLL_SECONDS)
            ended = [job for job in running if not job.process.is_alive()]
            display.show(running)
            for job in ended:
                running.remove(job)
                job.end()
                done_jobs.add(job)
                display.print_above(f"{job.name}: done")
    except KeyboardInterrupt:
        stop(running)
        raise Interrupted(f"stopped during {', '.join(job.name for job in running)}; go on with: "
                          f"{resume_command}") from None
    finally:
        display.clear()
        stop(running)


def stop(jobs):
    """Ask the processes of these jobs to save and end, and wait. A second signal kills them."""
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
    """The progress line of all running jobs, with the time left. Evaluations appear above it."""

    def __init__(self, jobs, at_once):
        self.jobs, self.at_once, self.began = jobs, at_once, time.monotonic()
        self.plan = None  # estimated seconds of the whole run, less what old logs show as done
        self.on_screen = sys.stderr.isatty()
        self.shown = -float("inf")

    def show(self, running):
        """Read the logs of running jobs and draw the line; every 15 s if it goes to a file."""
        for job in running:
            for text in job.read_log():
                self.print_above(text)
        left, now = seconds_left(self.jobs, self.at_once), time.monotonic()
        self.plan = self.plan or left
        if now - self.shown < (0 if self.on_screen else 15):
            return
        self.shown, done = now, self.plan - left
        text = "; ".join(f"{job.name} {job.latest}".strip() for job in running)
        if done > 0:  # scale by the speed so far, relative to the plan
            minutes = left * (now - self.began) / done / 60
            text += f"; about {minutes:.0f} min left" if minutes > 1 else "; less than a minute"
        self.clear()
        print(text[:shutil.get_terminal_size().columns - 1] if self.on_screen else text,
              end="" if self.on_screen else "\n", file=sys.stderr, flush=True)

    def print_above(self, text):
        """Print a text above the line."""
        self.clear()
        print(text, flush=True)

    def clear(self):
        """Erase the line."""
        if self.on_screen:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
