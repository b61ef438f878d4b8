"""What is proved about several processes (gloo, on a CPU):

two and four processes have the loss and the gradients of one process with their joined batch, in
every stage, with everything that is random or looks across the batch turned on; so do weights cut
into parts; evaluation gives the same numbers and counts every clip once; a run whose weights are
cut into parts goes on at any number of processes; one process that is asked to stop, or fails, ends
all.

The processes are forks of one program, this file, which imports and builds once:

    python tests/test_processes.py equal FOLDER
    python tests/test_processes.py runs FOLDER
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
JOINED, CLIPS = 8, 13
TINY = dict(device="cpu", precision="fp32", workers=0)


def encoders(folder):
    """Two small classifiers of moving shapes, in folder/masked and folder/multimodal."""
    import train
    import weights
    for name in ("masked", "multimodal"):
        torch.manual_seed(1)
        card = train.PostPretraining(encoder=name, **TINY, num_frames=4, input_size=40,
                                     batch_size=JOINED)
        model = card.build(card.datasets()[0])
        weights.save(folder / name, model, model.config)


def cards(folder):
    """{name: stage}, one for each and more, all that is random turned on; batch_size is the joined
    one."""
    import train
    import weights
    from tasks import localisation, question_answering, retrieval
    from variants.cards import DualMasking
    size = dict(num_frames=4, input_size=32)
    labels = dict(**TINY, **size, batch_size=JOINED)
    encoders(folder)
    clip = dict(**TINY, num_frames=4, vocabulary=600)
    pretrained = train.VideoLanguage(**clip)
    model = pretrained.build(pretrained.datasets()[0])
    weights.save(folder / "clip", model, model.config)
    pretrained.extras(folder / "clip")
    masked = dict(**TINY, **size, batch_size=JOINED, mask_ratio=0.5, drop_path=0.3)
    fused = dict(**TINY, batch_size=JOINED, masked=str(folder / "masked"),
                 multimodal=str(folder / "multimodal"), drop=0.3)
    answering, localising = question_answering.Answering, localisation.Localisation
    return {
        "mae": DualMasking(**masked),
        "mae cut": train.MaskedModelling(**masked, shard=True),
        "clip": train.VideoLanguage(**clip, batch_size=JOINED, image_batch=JOINED),
        "clip cut": train.VideoLanguage(**clip, batch_size=JOINED, image_every=0, shard=True),
        "clip in pieces": train.VideoLanguage(**clip, batch_size=JOINED, image_every=0,
                                              cache_size=2, local_units=0),
        "classify masked": train.PostPretraining(**labels, mixup=0.8, cutmix=1.0, drop=0.3,
                                                 drop_path=0.3),
        "classify multimodal": train.PostPretraining(
            **labels | dict(input_size=40), encoder="multimodal", drop=0.3, drop_path=0.3,
            layer_decay=0.75),
        "classify probe": train.PostPretraining(**labels, mode="probe", probe_clips=CLIPS,
                                                out=str(folder / "probe")),
        "answer": answering(**TINY, batch_size=JOINED, weights=str(folder / "clip"), drop=0.3),
        "retrieve": retrieval.Retrieval(**TINY, num_frames=6, batch_size=JOINED,
                                        weights=str(folder / "clip")),
        "localise": localising(**TINY, batch_size=JOINED, weights=str(folder / "masked"), videos=9,
                               eval_clips=CLIPS, width=16, depth=2, drop=0.3,
                               out=str(folder / "localise")),
        "fuse": train.CrossModel(**fused),
        "fuse cut": train.CrossModel(**fused, shard=True),
    }


def learn(card, train_set, held_out, model):
    """Train on one batch as the loop does, or two where one is of images; then evaluate.

    Returns loss, norm and gradients of each; the metrics; how many clips each batch has."""
    import attention
    from engine import evaluation, processes
    from engine.stage import generator
    card.batch_size = JOINED // processes.world()
    if hasattr(card, "image_batch"):
        card.image_batch = JOINED // processes.world()
    training_loss = processes.parallel(model, card.loss, card.shard, parts=(attention.Block,))
    with processes.unsharded(training_loss):
        train_set = card.prepare(model, train_set, held_out)
    model.train()
    learned = []
    for step, batch in zip(range(1 + bool(getattr(card, "image_every", 0))),
                           card.batches(train_set, 0)):
        torch.manual_seed(generator(0, "dropout", step).initial_seed())
        loss, values = training_loss(batch, generator(0, "loss", step, 0))
        loss.backward()
        norm = processes.clip(model, 1e9)
        whole = {name: processes.full_tensor(p.grad).clone() for name, p in model.named_parameters()
                 if p.grad is not None}
        learned.append((processes.means(values)["loss"], norm, whole))
        model.zero_grad()
    if card.shard or getattr(card, "cache_size", 0):
        return learned, {}, []
    model.eval()
    card.eval_batch, card.eval_clips = 3, CLIPS
    with torch.no_grad(), processes.unsharded(training_loss):
        rows = list(card.held_out(held_out["val"], CLIPS, 3))
        metrics = evaluation.numbers_of({"val": card.evaluate(model, rows, held_out["val"])})
    counts = [(row["number"], len(row["video"])) for row in rows]
    return learned, metrics, processes.gather_rows(counts)


def fork(count, work):
    """work(rank) in so many forks of this process, treated as torchrun treats its own: it keeps
    their meeting place, and where one fails the others get SIGTERM, and after a while SIGKILL.

    Returns the exit codes."""
    # The place opens before the forks and its thread starts after them: a fork that falls into what
    # a thread has locked never gets it back. Who comes early waits at the door.
    door = socket.create_server(("127.0.0.1", 0), backlog=count)
    sys.stdout.flush()
    children = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                                   MASTER_ADDR="127.0.0.1",
                                   MASTER_PORT=str(door.getsockname()[1]),
                                   TORCHELASTIC_USE_AGENT_STORE="True")
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
    store = torch.distributed.TCPStore("127.0.0.1", door.getsockname()[1], is_master=True,
                                       wait_for_workers=False,
                                       master_listen_fd=door.detach())
    began = failed = time.monotonic()
    while None in children.values():
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            children[pid] = os.waitstatus_to_exitcode(status)
            if children[pid] and not any(code for other, code in children.items() if other != pid):
                failed = time.monotonic()
                for other in (other for other, code in children.items() if code is None):
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > (failed + 10 if any(children.values()) else began + 400):
            for other in (other for other, code in children.items() if code is None):
                os.kill(other, signal.SIGKILL)
        time.sleep(0.005)
    del store
    return list(children.values())


def equal(folder, worlds):
    """Leaves {card: what `learn` found} of each process in W.rank.pt, for one process and others.
    """
    from engine import processes
    built = {}
    for name in ("probe", "localise"):
        (folder / name).mkdir()
    for name, card in cards(folder).items():
        torch.manual_seed(0)
        train_set, held_out = card.datasets()
        built[name] = card, train_set, held_out, card.build(train_set)

    def work(rank):
        processes.start("cpu")
        torch.save({name: learn(*parts) for name, parts in built.items()},
                   folder / f"{processes.world()}.{rank}.pt")

    for count in worlds:
        assert not any(fork(count, work)), count


FLAGS = ("--num-frames 4 --input-size 32 --mask-ratio 0.5 --workers 0 --precision fp32 --device "
         "cpu --eval-clips 5 --save-every 2 --log-every 1 --ema 0.9 --drop-path 0.2 "
         "--optimizer adamw --steps 4").split()


def runs(folder, cut=True):
    """Whole runs of train.py, with an accident in most; leaves their exit codes in codes.json."""
    import train
    from data import DataError
    from engine import processes
    own, codes = train.MaskedModelling.loss, {}

    def accident(happen):
        def loss(self, model, batch, rng):
            loss.calls += model.training
            if model.training:
                happen(loss.calls)
            return own(self, model, batch, rng)

        loss.calls = 0
        return loss

    def run(name, count, *more, happen=None, stage=("mae", *FLAGS)):
        def work(rank):
            if happen:
                train.MaskedModelling.loss = accident(happen)
            return train.main([*stage, "--out", str(folder / name), "--batch-size", str(8 // count),
                               *more])

        codes[name] = fork(count, work)

    def asked(step):
        if processes.rank() == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def failing(step):
        if processes.rank() == 1:
            raise DataError("the disk of process 1 is gone")

    def power_cut(step):
        if step == 4:
            os._exit(7)

    run("asked", 2, happen=asked)
    run("failing", 2, happen=failing)
    encoders(folder)
    run("fused", 2, "--masked", str(folder / "masked"), "--multimodal", str(folder / "multimodal"),
        stage="fuse --workers 0 --precision fp32 --device cpu --eval-clips 5 --eval-batch 2 "
              "--steps 1".split())
    if cut:
        run("alone", 1)
        run("whole", 2, "--shard")
        run("cut", 2, "--shard", happen=power_cut)  # the last checkpoint is that of step 2
        for count in (1, 2, 4):
            subprocess.run(["cp", "-r", folder / "cut", folder / f"on{count}"], check=True)
            run(f"on{count}", count, "--resume", *["--shard"] * (count > 1))
        run("muon alone", 1, "--optimizer", "muon")
        run("muon cut", 2, "--optimizer", "muon", "--shard")
        accum = ("--accum", "2", "--workers", "1", "--optimizer", "muon")
        run("accum alone", 1, *accum)
        run("accum", 2, *accum)
        # in the second half of step 4
        run("accum cut off", 2, *accum, happen=lambda calls: power_cut(calls // 2))
        run("accum cut off", 2, *accum, "--resume")
        run("joins", 1)  # goes on in two parts: a folder takes the place of a file
        run("joins", 2, "--resume", "--shard", "--steps", "6")
        run("joins", 1, "--resume", "--steps", "8")
    (folder / "codes.json").write_text(json.dumps(codes))


def program(what, folder):
    done = subprocess.run([sys.executable, __file__, what, str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module", params=[(1, 2), pytest.param((1, 4), marks=pytest.mark.slow)],
                ids=["two", "four"])
def learned(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("equal")
    program(f"equal{request.param[1]}", folder)
    return {(count, rank): torch.load(folder / f"{count}.{rank}.pt", weights_only=True)
            for count in request.param for rank in range(count)}


CARDS = ("mae", "mae cut", "clip", "clip cut", "clip in pieces", "classify masked",
         "classify multimodal", "classify probe", "fuse", "fuse cut", "answer", "retrieve",
         "localise")


@pytest.mark.parametrize("name", CARDS)
def test_several_processes_have_the_loss_and_gradients_of_one_with_their_joined_batch(learned,
                                                                                      name):
    """To 1e-6, where the norm of all gradients is about 1: in the clip stage it is about 20."""
    alone = learned[1, 0][name][0]
    for key, found in learned.items():
        for (loss, norm, gradients), (its_loss, its_norm, its_gradients) in zip(
                found[name][0], alone, strict=True):
            scale = max(1.0, its_norm)
            assert abs(loss - its_loss) < 1e-6 * max(1, its_loss), key
            assert abs(norm - its_norm) < 1e-6 * scale, key
            assert gradients.keys() == its_gradients.keys() and len(gradients) > 1
            for part in gradients:
                difference = (gradients[part] - its_gradients[part]).abs().max()
                assert difference < 1e-6 * scale, (key, part)


@pytest.mark.parametrize("name",
                         [name for name in CARDS if "cut" not in name and "pieces" not in name])
def test_evaluation_counts_every_clip_once_and_gives_the_same_numbers(learned, name):
    """13 clips in batches of 3, on one and several processes: equal to the last bit."""
    for found in learned.values():
        assert found[name][2] == [(0, 3), (1, 3), (2, 3), (3, 3), (4, 1)]
        assert found[name][1] == learned[1, 0][name][1] and found[name][1]


def test_one_process_that_is_asked_to_stop_or_fails_ends_all(tmp_path):
    _, error = program("accidents", tmp_path)
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes["asked"] == [130, 130] and error.count("stopped at step 1 of 4, saved in") == 1
    assert torch.load(tmp_path / "asked" / "last.pt", weights_only=True)["step"] == 1
    assert codes["failing"][1] == 2 and codes["failing"][0] != 0
    assert codes["fused"] == [0, 0]  # a stage that measures once more at its end, for a picture
    assert (tmp_path / "fused" / "metrics.json").exists()
    assert (tmp_path / "fused" / "confusion.png").exists()
    assert error.count("train.py: process 1: the disk of process 1 is gone\n") == 1
    assert "Traceback" not in error


def weights_of(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_run_cut_into_two_parts_goes_on_with_one_two_or_four_processes(tmp_path):
    out, _ = program("runs", tmp_path)
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes["cut"] == [7, 7]
    assert not any(codes["on1"] + codes["on2"] + codes["on4"] + codes["whole"])
    assert "was made by 2 processes, 4 go on with it: 8 clips a step as before" in out
    alone, whole = weights_of(tmp_path / "alone"), weights_of(tmp_path / "whole")
    for count in (1, 2, 4):
        found = weights_of(tmp_path / f"on{count}")
        assert max(float((found[key] - alone[key]).abs().max()) for key in alone) < 1e-4
        # as if never cut
        assert count != 2 or all(torch.equal(found[key], whole[key]) for key in whole)
    for one, other in (("muon alone", "muon cut"), ("accum alone", "accum")):
        assert codes[one] == [0] and codes[other] == [0, 0]
        one, other = weights_of(tmp_path / one), weights_of(tmp_path / other)
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-3, other
    one, other = weights_of(tmp_path / "accum"), weights_of(tmp_path / "accum cut off")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert codes["joins"] == [0] and "8 steps of 8 clips" in out
    names = sorted(path.name for path in (tmp_path / "joins").glob("last*"))
    assert names == ["last.1.pt", "last.pt"]


@pytest.mark.slow
def test_torchrun_trains_and_a_failing_process_ends_all_with_its_reason(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", "train.py", "mae"]
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=300,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([*torchrun, *FLAGS, "--batch-size", "4", "--out", str(tmp_path / "run")],
                          **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mae: done in") == 1 and "2 processes" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val_clips"] == 5
    done = subprocess.run([*torchrun, *FLAGS, "--out", str(tmp_path / "run"), "--mask-ratio",
                           "1.5"], **options)
    assert done.returncode != 0 and done.stderr.count("--mask-ratio 1.5: must be at least 0") == 1


@pytest.mark.slow
def test_a_scheduler_that_asks_torchrun_to_end_finds_the_step_saved_and_how_to_go_on(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", "train.py", "mae", *FLAGS, "--batch-size", "4", "--workers", "1", "--out",
                str(tmp_path)]
    running = subprocess.Popen([*torchrun, "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    began = time.monotonic()
    while not (tmp_path / "last.pt").exists():
        assert running.poll() is None and time.monotonic() < began + 200
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=100)
    assert running.returncode and said.count("stopped at step ") == 1, said
    step = int(said.split("stopped at step ")[1].split()[0])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"equal2": lambda folder: equal(folder, (1, 2)),
     "equal4": lambda folder: equal(folder, (1, 4)), "runs": runs,
     "accidents": lambda folder: runs(folder, cut=False)}[sys.argv[1]](Path(sys.argv[2]))
