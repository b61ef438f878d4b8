"""What is proved by trying at random: no line of flags, no list of videos and no file of weights,
however mangled, ends in a traceback or loads as something that it is not.

What a mistake costs is one line and exit code 2 (1 where the machine gives up). The quick suite
draws some cases, the slow one, `pytest -m slow tests/test_fuzz.py`, 300 others of each kind; each
case is a function of its number.
"""

import contextlib
import dataclasses
import io
import json
import pickle
import random
import shutil
import traceback
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import mae
import train
import weights
from engine import pictures as drawing
from engine.stage import details
from test_annotations import CASES, clip, lay  # noqa: F401
from test_classify_card import encoders  # noqa: F401
from test_clip_card import finished  # noqa: F401
from video import annotations
from video.annotations import DataError

QUICK, SLOW = range(8), range(8, 308)
NUMBERS = [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]


def outcome(argv):
    """(exit code, lines on stderr) of train.py; whatever else escapes fails the test, with its
    traceback."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), \
            warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(drawing, "curve", lambda *_: [])
        for kind in train.STAGES.values():
            patch.setattr(kind, "pictures", lambda *_: [])
        try:
            code = train.main(argv)
        except SystemExit as end:
            code = end.code
        except Exception:
            pytest.fail(f"python train.py {' '.join(map(repr, argv))}\n{traceback.format_exc()}")
    lines = [line for line in err.getvalue().splitlines() if line.startswith("train.py: ")]
    assert code in (0, 1, 2), (argv, code)
    assert "Traceback" not in err.getvalue(), (argv, code, err.getvalue())
    assert len(lines) == bool(code), (argv, code, err.getvalue())
    return code, lines


# ------------------------------------------------------------------------------------------------
# Flags

ANYTHING = ("0", "1", "2", "3", "-1", "-7", "0.5", "1e-9", "-0.1", "1.5", "2.5", "nan", "inf",
            "-inf", "99999999999999999999", "1e400", "", " ", "x", "--", "0x10", "１", "2,5",
            "5,2", "1,,2", "\u00e9\u0000\u202e", "true", "auto", "/", ".", "/dev/null",
            "/no/such/place", "~", "{", "*")
SIZED = {"num_frames", "input_size", "batch_size", "image_batch", "context", "vocabulary",
         "queries", "width", "depth", "caption_depth", "videos", "length", "probe_clips",
         "eval_clips", "repeats", "test_clips", "test_crops", "accum", "decoder_depth",
         "eval_batch", "gallery", "answers"}
SMALL = dict(num_frames="4", input_size="16", batch_size="3", eval_clips="3", eval_batch="3",
             workers="0", device="cpu", precision="fp32", probe_clips="6", videos="3",
             image_batch="3", width="8", depth="1")


@pytest.mark.parametrize("n", NUMBERS)
def test_any_line_of_flags_ends_well(n, encoders, finished, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    draw = random.Random(n)
    stage = draw.choice(list(train.STAGES))
    fields = {field.name: field for field in dataclasses.fields(train.STAGES[stage])}
    argv = [stage]
    for name, value in SMALL.items():
        argv += [f"--{name.replace('_', '-')}", value] * (name in fields)
    if stage == "mae":
        argv += ["--input-size", "32", "--mask-ratio", "0.5"]
    if "weights" in fields and stage != "mae" and draw.random() < 0.8:
        argv += ["--weights", str(finished) if stage in ("answer", "retrieve", "clip")
                 else encoders["multimodal"][0]]
    chosen = draw.sample(list(fields), draw.randint(1, 4))
    for name in chosen:
        field = fields[name]
        choices = details(field)["choices"]
        if name == "model" or name in ("steps", "workers"):  # what is legal here may take long
            value = draw.choice(("x", "", "-1", "1.5"))
        elif name in SIZED:
            value = draw.choice(("0", "1", "2", "3", "5", "8", "-1", "x", "", "1.5",
                                 "99999999999999999999"))
        elif choices and draw.random() < 0.7:
            value = str(draw.choice(choices))
        else:
            value = draw.choice(ANYTHING)
        flag = f"--{'no-' * (field.type is bool and draw.random() < 0.5)}{name.replace('_', '-')}"
        argv += [flag] if field.type is bool else [f"{flag}={value}"] if draw.random() < 0.5 else [
            flag, value]
    argv += draw.choice(([], [], [], ["--no-such-flag", "3"], ["stray"], ["-x"]))
    if "steps" not in chosen:
        argv += ["--steps", draw.choice(("0", "1"))]
    (tmp_path / "a file").write_text("")
    places = ("", " ", "x", ".", "/dev/null", "\u00e9\u0000", "*", "x" * 300, "a\nb", "a file",
              "a file/x", "--", *[str(tmp_path / "run")] * 6)
    outcome([*argv, "--out", draw.choice(places)])


# ------------------------------------------------------------------------------------------------
# Lists of videos


def mangled(content, draw):
    """Bytes, changed in one to three ways."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content) + 1)
        match draw.randrange(8):
            case 0:
                del content[place:]
            case 1:
                del content[place:place + draw.randint(1, 9)]
            case 2:
                content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
            case 3:
                content[place:place] = draw.choice((b",", b"\n", b'"', b"{", b"}", b"[", b"]", b":",
                                                    b" ", b"\t", b"null", b"-1", b"\\",
                                                    b"1e999", b"\xef\xbb\xbf", b"\r", b"\0"))
            case 4:
                lines = bytes(content).splitlines(keepends=True)
                draw.shuffle(lines)
                content = bytearray(b"".join(lines))
            case 5:
                content += content[place:]
            case 6 if content:
                content[min(place, len(content) - 1)] ^= 1 << draw.randrange(8)
            case 7:
                text = bytes(content).decode("utf-8", "ignore")
                content = bytearray(text.encode(draw.choice(("utf-16", "latin-1", "utf-8-sig")),
                                                "ignore"))
    return bytes(content)


@pytest.mark.parametrize("n", NUMBERS)
def test_any_list_is_read_as_rows_that_make_sense_or_refused_in_one_line(
        n, clip, tmp_path):  # noqa: F811
    draw = random.Random(n)
    kind = draw.choice([kind for kind, (texts, *_) in CASES.items() if texts])
    texts, videos, source, *_ = CASES[kind]
    lay(tmp_path, texts, videos, clip)
    name = draw.choice(list(texts))
    (tmp_path / name).write_bytes(mangled(texts[name].encode(), draw))
    try:
        found = annotations.read(tmp_path / source)
        files = data.VideoFiles(tmp_path / source, 2, 16, train=False,
                                part=draw.choice(("all", "val")))
        item = files[draw.randrange(len(files))]
    except DataError as error:
        assert str(error).count("\n") == 0 and len(str(error)) > 20, str(error)
        return
    assert found.rows and isinstance(found.kind, str)
    for row in found.rows:
        assert isinstance(row.path, str) and row.path
        for value in (row.label, row.caption, row.question, row.answer):
            assert value is None or isinstance(value, str), row
        assert row.split in (None, "train", "val")
        assert row.candidates is None or row.answer in row.candidates
    assert item["video"] is None and item["bad"] or item["video"].shape == (2, 16, 16, 3)
    for question, label in item["labels"].items():
        assert 0 <= label < len(files.classes[question])


# ------------------------------------------------------------------------------------------------
# Checkpoints and weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run stopped after two of four steps, the weights it ends with)."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["mae",
             *("--num-frames 4 --input-size 32 --mask-ratio 0.5 --batch-size 2 --eval-clips 2 "
               "--workers 0 --precision fp32 --device cpu --ema 0.5 --save-every 2").split(),
             "--out"]
    assert outcome([*flags, str(folder / "whole"), "--steps", "4"])[0] == 0
    loss = train.MaskedModelling.loss

    def cut(self, model, batch, rng):
        cut.calls += model.training
        if cut.calls == 3:
            raise KeyboardInterrupt
        return loss(self, model, batch, rng)

    cut.calls = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(train.MaskedModelling, "loss", cut)
        assert train.main([*flags, str(folder / "cut"), "--steps", "4"]) == 130
    return folder, flags, load_file(folder / "whole" / "model.safetensors")


def spoil(path, draw):
    """Change a checkpoint or a file of weights: its bytes, or what it holds."""
    content = path.read_bytes()
    how = draw.randrange(9)
    if how == 0:
        path.write_bytes(content[:draw.randrange(len(content))])
    elif how == 1:
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes(draw.randint(1, 4096)) + content[place:])
    elif how == 2:
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + content[place + draw.randint(1, 4096):])
    elif how <= 4:
        flipped = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
    elif how == 5:
        path.write_bytes(draw.choice((b"", b"\0" * 1000, b"PK\3\4", b"\x80\2.",
                                      pickle.dumps({"model": 3}), pickle.dumps(open),
                                      json.dumps({"model": 1}).encode(), b"\x10\0\0\0\0\0\0\0{}")))
    else:
        inside(path, draw)
    return path.read_bytes() == content


def inside(path, draw):
    """Write the file anew with one thing in it missing, added or of another kind."""
    safe = path.suffix == ".safetensors"
    saved = load_file(path) if safe else weights.load(path)
    group = saved if safe or draw.random() < 0.4 else saved[draw.choice(("model", "average",
                                                                         "optimiser"))]
    key = draw.choice(list(group))
    match draw.randrange(4):
        case 0:
            del group[key]
        case 1:
            group["stray.weight"] = torch.ones(2)
        case 2:
            group[key] = torch.ones(3, 5, 7)
        case 3:
            group[key + "x"] = group.pop(key)
    if safe:
        save_file(group, path)
    else:
        torch.save(saved, path)


@pytest.mark.parametrize("n", NUMBERS)
def test_a_spoilt_checkpoint_is_refused_or_ends_with_the_right_weights(n, run, tmp_path):
    folder, flags, expected = run
    shutil.copytree(folder / "cut", tmp_path / "run")
    draw = random.Random(n)
    spoil(tmp_path / "run" / "last.pt", draw)
    code, _ = outcome([*flags, str(tmp_path / "run"), "--steps", "4", "--resume"])
    if code == 0:
        found = load_file(tmp_path / "run" / "model.safetensors")
        equal = [torch.equal(found[key], value) for key, value in expected.items()]
        assert all(equal), "loaded, and something else"


@pytest.mark.parametrize("n", NUMBERS)
def test_a_spoilt_file_of_weights_is_refused_or_is_the_same(n, run, tmp_path):
    folder, _, expected = run
    shutil.copy(folder / "whole" / "model.safetensors", tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    spoil(path, random.Random(n))
    try:
        found = mae.VideoMAE.from_official(tmp_path).state_dict()
    except weights.WeightsError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)
        return
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key])
                                                   for key in expected)
