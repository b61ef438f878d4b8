"""What is proved about video/segments.py and video/features.py: the example of each format of
temporal annotations, which docs/formats.md shows, is recognised and read; what would change the
meaning is refused; features of other people get their times from stride, window and rate, are held
against the annotation, and train."""

import inspect
import json

import numpy as np
import pytest

from tasks import localisation
from test_localise_card import run
from video import segments
from video.features import Grid, read_features
from video.rows import DataError
from video.segments import Timed, read_segments

FORMATS = {one.name: one for one in segments.FORMATS}


def write(folder, texts):
    """Files of texts, or of objects as JSON; the folder."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def database(**videos):
    """ActivityNet's form: id = (subset, [[start, end, label], ...], other keys)."""
    return {"database": {name: {"subset": subset, **more, "annotations": [
        {"segment": [start, end], "label": label} for start, end, label in rows]}
        for name, (subset, rows, more) in videos.items()}}


# ------------------------------------------------------------------------------------------------
# Annotations

READ = {  # format: (id, what its example says of it)
    "ActivityNet 1.3": ("sJFgo9H6zNo", Timed(
        "training", [(0.01, 139.04, "Fun sliding down")], 141.44)),
    "HACS Segments": ("--0edUL8zmA", Timed("training", [(5.4, 11.6, "Dodgeball")], 92.166667)),
    "THUMOS14, ActionFormer's JSON": ("video_validation_0000266", Timed(
        "Validation", [(72.8, 76.4, "BaseballPitch")], 91.4, 30.0)),
    "THUMOS14, one text file per class": ("video_validation_0000266", Timed(
        "Validation", [(72.8, 76.4, "BaseballPitch")])),
    "FineAction": ("v_00000001", Timed("training", [(7.2, 8.1, "drink")], 91.4, None,
                                       "v_00000001")),
    "JSON in ActivityNet's form": ("ab", Timed("training", [(7.2, 8.1, "jump")], 30.5, 25.0)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_every_format_is_recognised_and_read(tmp_path, name):
    one, (video, timed) = FORMATS[name], READ[name]
    write(tmp_path, {one.file: one.example})
    found = read_segments(tmp_path if one.file.endswith(".txt") else tmp_path / one.file)
    assert found.kind == name and found.videos == {video: timed}
    assert found.subsets == one.subsets and timed.subset == one.subsets[0]
    assert f"{name}: 1 videos of {timed.subset}; 1 segments of 1 classes" in found.summary()


def test_readers_are_short():
    for one in segments.FORMATS:
        assert len(inspect.getsource(one.read).splitlines()) <= 25, one.name


def test_what_is_not_used_is_named_once(tmp_path):
    content = database(a=("training", [(1, 2, "x")], {"url": "u", "mood": 1}),
                       b=("testing", [], {"url": "u"}))
    content["database"]["a"]["annotations"][0]["label_id"] = 7
    found = read_segments(write(tmp_path, {"a.json": content}) / "a.json")
    assert set(found.unused) == {"label_id", "url", "mood"}
    assert found.summary().count("url") == 1
    assert "1 videos of training, 1 videos of testing" in found.summary()


def test_the_texts_of_thumos14_are_one_annotation_without_what_is_ambiguous(tmp_path):
    write(tmp_path, {
        "val/annotation/Diving_val.txt": "video_validation_0000001  1.5 4.0\n\n",
        "val/annotation/Ambiguous_val.txt": "video_validation_0000009  1.0 2.0\n",
        "test/annotation/Diving_test.txt": "video_test_0000001 3 5\nvideo_test_0000001 8 9.5\n",
        "test/annotation/GolfSwing_test.txt": "video_test_0000001 6 7\n",
        "readme.txt": "not a class"})
    found = read_segments(tmp_path)
    assert found.videos == {
        "video_validation_0000001": Timed("Validation", [(1.5, 4.0, "Diving")]),
        "video_test_0000001": Timed("Test", [(3.0, 5.0, "Diving"), (8.0, 9.5, "Diving"),
                                             (6.0, 7.0, "GolfSwing")])}
    assert "Ambiguous_val.txt is left out" in found.summary()
    with pytest.raises(DataError, match="give the folder"):
        read_segments(tmp_path / "val/annotation/Diving_val.txt")
    write(tmp_path, {"test/annotation/Shotput_test.txt": "video_test_0000001 6\n"})
    with pytest.raises(DataError, match="Shotput_test.txt, line 1: expected an id"):
        read_segments(tmp_path)


def test_what_actionformers_thumos14_calls_ambiguous_is_left_out(tmp_path):
    content = database(video_test_0000001=("Test", [(1, 2, "Ambiguous"), (3, 4, "Diving")], {}))
    found = read_segments(write(tmp_path, {"t.json": content}) / "t.json")
    assert found.videos["video_test_0000001"].segments == [(3.0, 4.0, "Diving")]
    assert "1 segments labelled Ambiguous" in found.summary()


@pytest.mark.parametrize("more, reason", [
    ({"score": 0.5}, "predictions"), ({"unit": "frames"}, "in seconds"),
    ({"ignore": True}, "leave such segments out"), ({"offset": 3.0}, "start of the video")])
def test_a_key_that_would_change_the_meaning_is_refused(tmp_path, more, reason):
    content = database(a=("training", [(1, 2, "x")], {}))
    entry = content["database"]["a"]["annotations"][0]
    entry |= dict.fromkeys(more, 0)  # says nothing
    path = write(tmp_path, {"a.json": content}) / "a.json"
    assert read_segments(path).videos["a"].segments
    entry |= more
    write(tmp_path, {"a.json": content})
    with pytest.raises(DataError, match=f"a.json, a: has '{next(iter(more))}'.*{reason}"):
        read_segments(path)


@pytest.mark.parametrize("text, reason", [
    ("[]", "ActivityNet's form"), ('{"results": {}}', "ActivityNet's form"),
    ('{"database": {"a": 3}}', "ActivityNet's form"),
    ('{"database": {}}', "ActivityNet's form"),
    (json.dumps(database(a=("training", [(1, 2, "x")], {"duration": "long"}))), "'long'"),
    (json.dumps(database(a=("training", [(1, 2, "x")], {"fps": True}))), "must be numbers"),
    (json.dumps({"database": {"a": {"subset": "training", "annotations": [
        {"segment(frames)": [1, 2], "label": "x"}]}}}), "KeyError: 'segment'")])
def test_what_is_no_annotation_is_one_line(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason) as error:
        read_segments(write(tmp_path, {"a.json": text}) / "a.json")
    assert "a.json" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="not a folder of THUMOS14"):
        read_segments(tmp_path)


# ------------------------------------------------------------------------------------------------
# Features of other people

GRID = Grid(4, 16, 30.0)


def lay(folder, lengths, width=6, suffix=".npy"):
    """Features, (T', width), of videos; in an .npz one array."""
    folder.mkdir(exist_ok=True)
    for name, count in lengths.items():
        array = np.random.default_rng(count).normal(size=(count, width)).astype(np.float32)
        if suffix == ".npz":
            np.savez(folder / f"{name}.npz", array)
        else:
            np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_the_times_of_features_are_the_middles_of_their_windows(tmp_path, suffix):
    folder = lay(tmp_path / "f", {"v_a": 50, "b": 40}, suffix=suffix)
    videos = {"a": Timed("Test", [(1.0, 2.0, "x")], 7.1), "b": Timed("Test", [(0.0, 1.0, "y")]),
              "c": Timed("Test", []), "d": Timed("Train", [])}
    (a, b), classes, missing = read_features(folder, videos, "test", grid=GRID)
    # Row i has seen frames 4 i to 4 i + 15; the middle of frames 0 and 15 is 7.5.
    assert np.allclose(a["times"], (7.5 + 4 * np.arange(50)) / 30)
    assert a["duration"] == 7.1 and b["duration"] == pytest.approx((39 * 4 + 16) / 30)
    assert a["segments"] == [(1.0, 2.0, 0)] and classes == ["x", "y"] and missing == ["c"]
    assert (a["window"], a["stride"], a["misfit"], a["features"].dtype) == (16, 4, "", np.float32)


def test_the_rate_is_the_annotations_unless_a_flag_says_another(tmp_path):
    folder = lay(tmp_path / "f", {"a": 50})
    videos = {"a": Timed("Test", [(0.0, 1.0, "x")], None, 25.0)}
    (item,), *_ = read_features(folder, videos, "Test", grid=Grid(8))
    assert np.allclose(item["times"], (3.5 + 8 * np.arange(50)) / 25)  # the window is the stride
    (item,), *_ = read_features(folder, videos, "Test", grid=Grid(8, 0, 50.0))
    assert np.allclose(item["times"], (3.5 + 8 * np.arange(50)) / 50)


def test_features_are_found_by_the_videos_file_too(tmp_path):
    folder = lay(tmp_path / "f", {"v_7": 50})
    videos = {"x": Timed("Test", [(0.0, 1.0, "x")], file="v_7")}
    assert len(read_features(folder, videos, "Test", grid=GRID)[0]) == 1


@pytest.mark.parametrize("duration, grid, end, fits", [
    (6.7, GRID, 3, True), (8.0, GRID, 3, False), (5.4, GRID, 3, False),
    (6.7, Grid(4, 16, 25.0), 3, False), (6.7, Grid(8, 16, 30.0), 3, False),
    (None, GRID, 3, True), (None, GRID, 8, False)])
def test_features_are_held_against_the_duration_or_the_last_segment(tmp_path, duration, grid, end,
                                                                    fits):
    """47 features, 4 frames apart, at 30 frames a second: 6.7 s. A wrong stride or rate differs."""
    folder = lay(tmp_path / "f", {"a": 47})
    videos = {"a": Timed("Test", [(0.0, end, "x")], duration)}
    if fits:
        assert not read_features(folder, videos, "Test", grid=grid)[0][0]["misfit"]
        return
    with pytest.raises(DataError, match="a.npy: 47 features, .* check --stride") as error:
        read_features(folder, videos, "Test", grid=grid)
    assert "\n" not in str(error.value) and "1 of 1 videos" in str(error.value)


def test_one_odd_video_of_ten_is_told_and_two_are_refused(tmp_path):
    folder = lay(tmp_path / "f", {f"{i}": 47 for i in range(10)})
    videos = {f"{i}": Timed("Test", [(0.0, 1.0, "x")], 6.7 if i else 60.0) for i in range(10)}
    items, *_ = read_features(folder, videos, "Test", grid=GRID)
    assert [bool(item["misfit"]) for item in items] == [True] + 9 * [False]
    videos["1"] = videos["0"]
    with pytest.raises(DataError, match="2 of 10 videos"):
        read_features(folder, videos, "Test", grid=GRID)


A = {"a": Timed("Test", [(0.0, 1.0, "x")], 6.7), "b": Timed("Test", [(0.0, 1.0, "x")], 3.9)}


def test_features_that_lie_the_other_way_are_refused(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    np.save(folder / "a.npy", np.ones((6, 47)))
    with pytest.raises(DataError, match=r"is it \(F, T'\)"):
        read_features(folder, {"a": A["a"]}, "Test", grid=GRID)
    # Without a duration, what differs among the files tells.
    np.save(folder / "b.npy", np.ones((6, 26)))
    loose = {name: Timed("Test", [(0.0, 0.1, "x")]) for name in A}
    with pytest.raises(DataError, match=r"these are \(F, T'\): save them transposed"):
        read_features(folder, loose, "Test", grid=GRID)
    np.save(folder / "b.npy", np.ones((7, 26)))
    with pytest.raises(DataError, match="the second axis is F"):
        read_features(folder, loose, "Test", grid=GRID)


def test_what_cannot_be_read_is_one_line(tmp_path):
    folder = lay(tmp_path / "f", {"a": 47, "b": 27})
    assert len(read_features(folder, A, "Test", grid=GRID)[0]) == 2

    def refuse(reason, videos=A, subset="Test", grid=GRID):
        with pytest.raises(DataError, match=reason) as error:
            read_features(folder, videos, subset, grid=grid)
        assert "\n" not in str(error.value)

    refuse("give the number of frames from one to the next with --stride", grid=Grid())
    refuse("give the frames per second of the video with --rate", grid=Grid(4))
    refuse("has Test; give --train-subset", subset="training")
    refuse("no video of the subset .* has both features", {"a": Timed("Test", [], 6.7)})
    np.save(folder / "a.npy", np.ones((2, 47, 6)))
    refuse("features have 3 axes, not two")
    np.save(folder / "a.npy", np.array([{}, []], object), allow_pickle=True)
    refuse("a.npy: not a file of tools/extract.py, nor one array")
    lay(folder, {"a": 47}, suffix=".npz")
    refuse("a.npy and .*a.npz: two files|a.npz and .*a.npy: two files")
    for name in ("a.npy", "a.npz", "b.npy"):
        (folder / name).unlink()
    (folder / "a.pt").write_bytes(b"no")
    refuse("a.pt: .pt files are not read; save the features of each video as .npy")


def test_features_of_a_part_of_a_video_are_no_features_of_the_video(tmp_path):
    folder = lay(tmp_path / "f", {"a_3_8.5": 47, "b": 27})
    with pytest.raises(DataError, match="a_3_8.5.npy: features of a part of a; .* whole"):
        read_features(folder, A, "Test", grid=GRID)
    lay(folder, {"a": 47})  # beside the whole video a part does no harm
    assert len(read_features(folder, A, "Test", grid=GRID)[0]) == 2
    lay(folder, {"c_1_2": 47})  # an id that only looks like a part
    named = {"c_1_2": Timed("Test", [(0.0, 1.0, "x")], 6.7)}
    assert len(read_features(folder, named, "Test", grid=GRID)[0]) == 1


# ------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def thumos(tmp_path_factory):
    """A folder with thumos14.json and features/*.npy, stride 4 at 30 frames a second; where an
    action is, one number of the features is large."""
    folder, videos, rng = tmp_path_factory.mktemp("thumos"), {}, np.random.default_rng(0)
    (folder / "features").mkdir()
    for i in range(24):
        name = f"video_{'validation' if i < 16 else 'test'}_{i:07d}"
        features = rng.normal(0, 0.3, (60, 6)).astype(np.float32)
        first, label = int(rng.integers(5, 40)), int(rng.integers(2))
        features[first:first + 12, label] += 2
        np.save(folder / "features" / f"{name}.npy", features)
        start, end = ((4 * row + 7.5) / 30 for row in (first, first + 11))
        videos[name] = ("Validation" if i < 16 else "Test", [
            (start, end, ("Diving", "GolfSwing")[label])], {"fps": 30.0, "duration": 8.4})
    write(folder, {"thumos14.json": database(**videos)})
    return folder


def flags_of(folder, *more):
    return ["--data", str(folder / "features"), "--annotations", str(folder / "thumos14.json"),
            "--stride", "4", "--window", "16", *more]


def test_a_run_on_features_of_others_says_what_it_took_and_learns(thumos, tmp_path, capsys):
    assert run(*flags_of(thumos, "--lr", "1e-2", "--batch-size", "8", "--eval-every", "60"),
               out=tmp_path / "run", steps=60) == 0
    out = capsys.readouterr().out
    assert "THUMOS14, ActionFormer's JSON: 16 videos of Validation, 8 videos of Test; " \
           "24 segments of 2 classes" in out
    assert "16 videos of the subset Validation" in out and "8 videos of the subset Test" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_mAP@0.5"] > 60 > metrics["mean_segments_mAP@0.5"]
    assert metrics["settings"]["train_subset"] == "Validation"
    assert localisation.Localiser.from_run(tmp_path / "run").stride == 4
    # the same, evaluated again, with subsets named
    assert run(*flags_of(thumos, "--weights", str(tmp_path / "run"), "--val-subset", "test"),
               out=tmp_path / "again", steps=0) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["val_mAP"] == pytest.approx(metrics["val_mAP"])


def test_mistakes_about_features_of_others_are_one_line(thumos, tmp_path, capsys):
    assert run(*flags_of(thumos), out=tmp_path / "run", steps=1) == 0
    lay(tmp_path / "other", {path.stem: 60 for path in (thumos / "features").iterdir()}, width=5)
    capsys.readouterr()
    for flags, reason in (
            (flags_of(thumos)[:4], "--stride"),
            (flags_of(thumos, "--rate", "15"), "check --stride"),
            (["--rate", "15"], "video files"),
            ([*flags_of(thumos), "--weights", str(tmp_path / "run"), "--data",
              str(tmp_path / "other")], "was trained on features of 6 numbers")):
        assert run(*flags, out=tmp_path / "no", steps=1) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and reason in err, err
