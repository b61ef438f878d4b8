"""What is proved about several processes (gloo, on a CPU):

two and four processes have the loss and the gradients of one process with their joined batch, in every
stage, with everything that is random or looks across the batch turned on; so do weights cut into parts;
evaluation gives the same numbers and counts every clip once; a run whose weights are cut into parts goes
on at any number of processes; one process that is asked to stop, or fails, ends all.

The processes are forks of one program, this file, which imports and builds once:

    python tests/test_processes.py FOLDER
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
JOINED, WORLDS, CLIPS = 8, (1, 2, 4), 13
TINY = dict(device="cpu", precision="fp32", workers=0)


def cards(folder):
    """{name: card}, one for each stage and more, all that is random turned on; batch_size is the joined one."""
    import train
    size = dict(num_frames=4, input_size=32)
    labels = dict(**TINY, **size, batch_size=JOINED)
    for name, encoder in (("masked", "masked"), ("multimodal", "multimodal")):
        torch.manual_seed(1)
        card = train.Classify(encoder=encoder, **labels | dict(input_size=40))
        model = card.build()
        train.weights.save(folder / name, model, model.config)
    clip = dict(**TINY, num_frames=4, vocabulary=600)
    return {
        "mae": train.MAE(**TINY, **size, batch_size=JOINED, mask_ratio=0.5, dual_mask=True, drop_path=0.3),
        "mae cut": train.MAE(**TINY, **size, batch_size=JOINED, mask_ratio=0.5, drop_path=0.3, shard=True),
        "clip": train.Clip(**clip, batch_size=JOINED, image_batch=JOINED),
        "clip cut": train.Clip(**clip, batch_size=JOINED, image_every=0, shard=True),
        "clip in pieces": train.Clip(**clip, batch_size=JOINED, image_every=0, cache_size=2, local_units=0),
        "classify masked": train.Classify(**labels, mixup=0.8, cutmix=1.0, drop=0.3, drop_path=0.3),
        "classify multimodal": train.Classify(**labels | dict(input_size=40), encoder="multimodal", drop=0.3,
                                              drop_path=0.3, layer_decay=0.75),
        "classify probe": train.Classify(**labels, mode="probe", probe_clips=CLIPS, out=str(folder / "probe")),
        "fuse": train.Fuse(**TINY, batch_size=JOINED, masked=str(folder / "masked"),
                           multimodal=str(folder / "multimodal"), drop=0.3),
        "fuse cut": train.Fuse(**TINY, batch_size=JOINED, masked=str(folder / "masked"),
                               multimodal=str(folder / "multimodal"), drop=0.3, shard=True),
    }


def learn(card, model):
    """Two batches through the card as the loop does it: [loss and gradients of each], then the evaluation."""
    import processes
    import train
    card.batch_size = JOINED // processes.world()
    if hasattr(card, "image_batch"):
        card.image_batch = JOINED // processes.world()
    train_set, held_out = card.datasets()
    take_step = processes.parallel(model, card.loss, card.shard, parts=(train.Block,))
    with processes.unsharded(take_step):
        card.prepare(model)
    model.train()
    found = []
    for step, batch in zip(range(2), card.batches(train_set, 0)):
        torch.manual_seed(train.generator(0, "dropout", step).initial_seed())
        loss, values = take_step(batch, train.generator(0, "loss", step, 0))
        loss.backward()
        norm = processes.clip(model, 1e9)
        whole = {name: processes.whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((processes.means(values)["loss"], norm, whole))
        model.zero_grad()
    model.eval()
    card.batch_size, card.eval_clips = 3, CLIPS
    with torch.no_grad(), processes.unsharded(take_step):
        rows = list(card.held_out(held_out, CLIPS, 3))
        metrics = card.evaluate(model, rows)
    return found, metrics, processes.collect([(row["number"], len(row["video"])) for row in rows])


def fork(count, work):
    """work(rank) in so many forks of this process, treated as torchrun treats its own: it keeps their meeting
    place, and where one fails the others get SIGTERM, and after a while SIGKILL. Returns the exit codes."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sys.stdout.flush()
    children = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                                   MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
                code = work(rank) or 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[pid] = None
    began = failed = time.monotonic()
    while None in children.values():
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            children[pid] = os.waitstatus_to_exitcode(status)
            if children[pid] and not any(code for other, code in children.items() if other != pid):
                failed = time.monotonic()
                for other in (other for other, code in children.items() if code is None):
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > (failed + 10 if any(children.values()) else began + 120):
            for other in (other for other, code in children.items() if code is None):
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    return list(children.values())


def main(folder):
    import processes
    import train
    folder = Path(folder)
    torch.set_num_threads(1)
    began = time.monotonic()
    tick = lambda what: print(f"TICK {what} {time.monotonic() - began:.1f}", flush=True)  # noqa: E731
    built = {}
    (folder / "probe").mkdir()
    for name, card in cards(folder).items():
        torch.manual_seed(0)
        built[name] = card, card.build()

    def equal(rank):
        processes.start("cpu")
        torch.save({name: learn(*pair) for name, pair in built.items()},
                   folder / f"{processes.world()}.{rank}.pt")

    tick("built")
    for count in WORLDS:
        assert not any(fork(count, equal)), count
        tick(f"equal {count}")

    flags = ("--num-frames 4 --input-size 32 --mask-ratio 0.5 --workers 0 --precision fp32 --device cpu --eval-clips 5 "
             "--save-every 2 --log-every 1 --ema 0.9 --drop-path 0.2").split()

    def run(name, *more, loss=None):
        def work(rank):
            if loss:
                train.MAE.loss = loss
            return train.main(["mae", *flags, "--out", str(folder / name), *more])
        return work

    # Cut in two, stopped at step 2 of 4; then on with one, two, four processes, 8 clips a step each time.
    own = train.MAE.loss

    def power_cut(self, model, batch, rng):
        power_cut.calls += model.training
        if power_cut.calls == 4:
            os._exit(7)
        return own(self, model, batch, rng)

    power_cut.calls = 0
    codes = {"cut": fork(2, run("cut", "--steps", "4", "--batch-size", "4", "--shard", loss=power_cut))}
    for count in (1, 2, 4):
        subprocess.run(["cp", "-r", folder / "cut", folder / f"on{count}"], check=True)
        codes[f"on{count}"] = fork(count, run(f"on{count}", "--steps", "4", "--batch-size", str(8 // count), "--resume",
                                              *["--shard"] * (count > 1)))
        tick(f"on {count}")
    codes["again"] = fork(2, run("again", "--steps", "4", "--batch-size", "4", "--shard"))
    codes["whole"] = fork(2, run("whole", "--steps", "4", "--batch-size", "4", "--shard"))

    def asked(self, model, batch, rng):
        if model.training and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, model, batch, rng)

    def failing(self, model, batch, rng):
        if model.training and processes.rank() == 1:
            raise train.data.DataError("the disk of process 1 is gone")
        return own(self, model, batch, rng)

    codes["asked"] = fork(2, run("asked", "--steps", "9", "--batch-size", "4", loss=asked))
    codes["failing"] = fork(2, run("failing", "--steps", "9", "--batch-size", "4", loss=failing))
    (folder / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    began = time.monotonic()
    done = subprocess.run([sys.executable, __file__, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    print(done.stdout, done.stderr, f"{time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def results(folder, count, rank=0):
    return torch.load(folder / f"{count}.{rank}.pt", weights_only=True)


if __name__ == "__main__":
    main(sys.argv[1])
