"""What annotations.py promises: each published format is recognised by its content and read as its
authors meant it; videos are found beside, below and around their list; and what breaks a format is
one line that names the place."""

import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import torch

from video import annotations, formats, segments
import data
import train
from video.annotations import DataError, read
from data import VideoFiles

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a video of six frames."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(6):
            picture = np.full((32, 48, 3), 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def table(*lines):
    return "\n".join(lines) + "\n"


# kind -> (files of text, videos, source, [(video, label, caption, split)], classes)
MSRVTT = json.dumps(dict(
    info={}, videos=[dict(video_id="video0", category=9, split="train"),
                     dict(video_id="video1", split="validate"),
                     dict(video_id="video2", split="test")],
    sentences=[dict(sen_id=0, video_id="video0", caption="a car"),
               dict(sen_id=1, video_id="video2", caption="a cat"),
               dict(sen_id=2, video_id="video0", caption="it drives"),
               dict(sen_id=3, video_id="video1", caption="tea")]))
TEMPLATES = json.dumps({"Putting something next to something": "1", "Dropping something": "0"})
SSV2 = json.dumps([
    dict(id="7", label="putting a cup next to a pen",
         template="Putting [something] next to [something]",
         placeholders=["a cup", "a pen"]),
    dict(id="8", label="dropping a pen", template="Dropping [something]", placeholders=["a pen"])])
CASES = {
    "Kinetics": (
        {"lists/train.csv": table("label,youtube_id,time_start,time_end,split",
                                  "riding a bike,-ab_,5,15,train",
                                  '"eating, fast",zzz,130,140,train')},
        ["lists/train/riding a bike/-ab__000005_000015.mp4",
         "lists/train/eating, fast/zzz_000130_000140.mp4"],
        "lists/train.csv",
        [("-ab__000005_000015.mp4", "riding a bike", None, "train"),
         ("zzz_000130_000140.mp4", "eating, fast", None, "train")],
        None),
    "Something-Something V2": (
        {"labels/something-something-v2-labels.json": TEMPLATES,
         "labels/something-something-v2-train.json": SSV2},
        ["20bn-something-something-v2/7.webm", "20bn-something-something-v2/8.webm"],
        "labels/something-something-v2-train.json",
        [("7.webm", "Putting something next to something", "putting a cup next to a pen", None),
         ("8.webm", "Dropping something", "dropping a pen", None)],
        ["Dropping something", "Putting something next to something"]),
    "UCF101, split 1": (
        {"ucfTrainTestlist/classInd.txt": table("1 ApplyEyeMakeup", "2 YoYo"),
         "ucfTrainTestlist/trainlist01.txt": table("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"),
         "ucfTrainTestlist/testlist01.txt": table("YoYo/v_YoYo_g01_c02.avi")},
        ["UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "UCF-101/YoYo/v_YoYo_g01_c02.avi"],
        "ucfTrainTestlist",
        [("v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup", None, "train"),
         ("v_YoYo_g01_c02.avi", "YoYo", None, "val")],
        ["ApplyEyeMakeup", "YoYo"]),
    "UCF101, split 2": (
        {"ClassInd.txt": table("1 ApplyEyeMakeup", "2 YoYo"),
         "testlist02.txt": table("YoYo/v_YoYo_g01_c02.avi")},
        ["v_YoYo_g01_c02.avi"], "testlist02.txt", [("v_YoYo_g01_c02.avi", "YoYo", None, "val")],
        ["ApplyEyeMakeup", "YoYo"]),
    "HMDB51, split 1": (
        {"splits/brush_hair_test_split1.txt": table("a b (1).avi 1 ", "b.avi 2 ", "c.avi 0 "),
         "splits/wave_test_split1.txt": table("d.avi 2 ")},
        ["brush_hair/a b (1).avi", "brush_hair/b.avi", "wave/d.avi"], "splits",
        [("a b (1).avi", "brush_hair", None, "train"), ("b.avi", "brush_hair", None, "val"),
         ("d.avi", "wave", None, "val")],
        ["brush_hair", "wave"]),
    "MSR-VTT": (
        {"MSRVTT_data.json": MSRVTT},
        ["videos/all/video0.mp4", "videos/video0.mp4", "videos/video1.mp4", "videos/video2.mp4"],
        "MSRVTT_data.json",
        [("video0.mp4", None, "a car", "train"), ("video2.mp4", None, "a cat", "val"),
         ("video0.mp4", None, "it drives", "train"), ("video1.mp4", None, "tea", "val")], None),
    "MSR-VTT, the 2 videos of MSRVTT_train.9k.csv": (
        {"MSRVTT_data.json": MSRVTT, "MSRVTT_train.9k.csv": table("video_id", "video0", "video1")},
        ["videos/video0.mp4", "videos/video1.mp4"], "MSRVTT_train.9k.csv",
        [("video0.mp4", None, "a car", None), ("video0.mp4", None, "it drives", None),
         ("video1.mp4", None, "tea", None)], None),
    "MSR-VTT 1k-A": (
        {"MSRVTT_JSFUSION_test.csv": table("key,vid_key,video_id,sentence",
                                           'ret0,msr9,video9,"a cat, asleep"')},
        ["video9.mp4"], "MSRVTT_JSFUSION_test.csv", [("video9.mp4", None, "a cat, asleep", None)],
        None),
    "WebVid": (
        {"results_2M_train.csv": table(
            "videoid,contentUrl,duration,page_dir,name",
            "12,https://x/12.mp4,PT00H00M09S,006001_006050,A wave breaks.")},
        ["videos/006001_006050/12.mp4"], "results_2M_train.csv",
        [("12.mp4", None, "A wave breaks.", None)], None),
    "captions in JSON, as in VINDLU and UMT": (
        {"anno/test.json": json.dumps([dict(video="p.mp4", caption=["one", "two"]),
                                       dict(video="q.mp4", caption="three")])},
        ["p.mp4", "q.mp4"], "anno/test.json",
        [("p.mp4", None, "one", None), ("p.mp4", None, "two", None),
         ("q.mp4", None, "three", None)], None),
    "JSON lines": (
        {"x.jsonl": table('{"path": "p.mp4", "caption": "one", "label": 3}')}, ["p.mp4"], "x.jsonl",
        [("p.mp4", "3", "one", None)], None),
    "table with a header": (
        {"x.csv": table("caption,path", '"one, two",a b.mp4')}, ["a b.mp4"], "x.csv",
        [("a b.mp4", None, "one, two", None)], None),
    "list of `path label` lines": (
        {"x.csv": table("a b.mp4 3", "c.mp4 1")}, ["a b.mp4", "c.mp4"], "x.csv",
        [("a b.mp4", "3", None, None), ("c.mp4", "1", None, None)], None),
    "VideoMAE V2's list of whole videos": (
        {"x.csv": table("a b.mp4 0 -1", "c.mp4 0 -1")}, ["a b.mp4", "c.mp4"], "x.csv",
        [("a b.mp4", None, None, None), ("c.mp4", None, None, None)], None),
    "folder of videos": (
        {}, ["all/run fast/a.mp4", "all/jump/b.mp4"], "all",
        [("b.mp4", "jump", None, None), ("a.mp4", "run fast", None, None)], ["jump", "run fast"]),
    "folder of videos with a .txt beside each": (
        {"all/a.txt": "a dog\n", "all/b.txt": "a cat"}, ["all/a.mp4", "all/b.mp4"], "all",
        [("a.mp4", None, "a dog", None), ("b.mp4", None, "a cat", None)], None),
}


def beside(folder, source):
    """--video-folder, where the videos do not lie in the list's own folder or below it."""
    own = source.split("/")[0] in ("labels", "anno", "ucfTrainTestlist", "splits")
    return str(folder) if own else ""


def lay(folder, texts, videos, content):
    for name, text in {**texts, **dict.fromkeys(videos)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if text is None else text.encode())


@pytest.mark.parametrize("kind", CASES)
def test_every_format_is_recognised_and_its_videos_are_found(tmp_path, kind, clip):
    texts, videos, source, expected, classes = CASES[kind]
    lay(tmp_path, texts, videos, clip)
    folder = beside(tmp_path, source)
    found = read(tmp_path / source, folder)
    assert found.kind == kind and found.classes == classes
    assert [(row.path.split("/")[-1], *row[1:4]) for row in found.rows] == expected
    files = VideoFiles(tmp_path / source, 2, 16, video_folder=folder)
    assert not files.missing and files[0]["video"].shape == (2, 16, 16, 3)
    assert kind in files.summary()
    splits = {row.split for row in found.rows}
    if splits == {"train", "val"}:
        held = VideoFiles(tmp_path / source, 2, 16, train=False, classes=files.classes,
                          video_folder=folder)
        assert [row.split for row in files.rows] == ["train"] * len(files)
        assert {row.split for row in held.rows} == {"val"}


def test_labels_are_numbered_as_the_benchmark_numbers_them(tmp_path, clip):
    texts, videos, source, *_ = CASES["Something-Something V2"]
    lay(tmp_path, texts, videos, clip)
    files = VideoFiles(tmp_path / source, 2, 16, video_folder=str(tmp_path))
    assert [label for _, label in files.items] == [1, 0]
    texts, videos, _, *_ = CASES["UCF101, split 1"]
    lay(tmp_path, texts, videos, clip)
    held = VideoFiles(tmp_path / "ucfTrainTestlist/testlist01.txt", 2, 16, train=False,
                      video_folder=str(tmp_path))
    assert held.items[0][1] == 1 and held.classes == {"label": ("ApplyEyeMakeup", "YoYo")}


@pytest.mark.parametrize("name, text", [
    ("mc.json", json.dumps([dict(video="p.mp4", caption=["no", "yes", "maybe"], answer=1)])),
    ("mc.jsonl",
     json.dumps(dict(video="p.mp4", question="is it?", options=["no", "yes", "maybe"], answer=1))),
    ("mc.csv", "video,question,answer,a0,a1,a2\np,is it?,1,no,yes,maybe\n")])
def test_a_multiple_choice_is_its_candidates_and_the_right_one(tmp_path, clip, name, text):
    lay(tmp_path, {name: text}, ["p.mp4"], clip)
    files = VideoFiles(tmp_path / name, 2, 16)
    item = files[0]
    assert files.kind == "multiple choice" and files.captions == ["yes"]
    assert item["candidates"] == ("no", "yes", "maybe")
    assert item["answer"] == item["caption"] == "yes"
    batch = next(data.batches(files, 2, 0, 1))
    assert batch["candidates"] == [item["candidates"]] * 2


def test_a_question_comes_with_its_answer(tmp_path, clip):
    entries = [dict(video_id="video7", question="who runs?", answer="dog"),
               dict(video="p.mp4", question="what colour?", answer=["red", "blue", "red"])]
    lay(tmp_path, {"qa.json": json.dumps(entries)}, ["p.mp4", "video7.mp4"], clip)
    files = VideoFiles(tmp_path / "qa.json", 2, 16)
    assert files.kind == "question answering" and files.captions is None
    assert [(files[i]["question"], files[i]["answer"]) for i in (0, 1)] == [("who runs?", "dog"),
                                                                            ("what colour?", "red")]


def test_pictures_with_sentences_are_clips_of_one_frame(tmp_path):
    av = pytest.importorskip("av")
    for name, grey in (("a.png", 50), ("b.jpg", 200)):
        picture = np.full((40, 60, 3), grey, np.uint8)
        av.VideoFrame.from_ndarray(picture, format="rgb24").save(str(tmp_path / name))
        (tmp_path / name).with_suffix(".txt").write_text(f"grey {grey}")
    files = VideoFiles(tmp_path, 1, 24, flip=False)
    assert files.kind == "folder of pictures with a .txt beside each"
    assert files.captions == ["grey 50", "grey 200"]
    for item, grey in zip((files[0], files[1]), (50, 200)):
        assert item["video"].shape == (1, 24, 24, 3) and abs(int(item["video"].mean()) - grey) <= 2


def test_the_captions_of_one_video_stay_in_one_part(tmp_path, clip):
    entries = [dict(video=f"{i}.mp4", caption=["a", "b", "c"]) for i in range(10)]
    lay(tmp_path, {"x.json": json.dumps(entries)}, [f"{i}.mp4" for i in range(10)], clip)
    parts = [{path for path, _ in VideoFiles(tmp_path / "x.json", 2, 16, part=part).items}
             for part in ("train", "val")]
    assert not parts[0] & parts[1] and [len(part) for part in parts] == [9, 1]


def test_the_class_order_of_ucf101_is_read_from_a_file_in_any_usual_spelling(tmp_path):
    for i, name in enumerate(("classInd.txt", "ClassInd.txt", "classind.txt")):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / name).write_text("1 YoYo\n2 Archery\n")
        assert formats.ucf101_classes(folder) == ["YoYo", "Archery"]
        with pytest.raises(DataError, match="no trainlist01.txt"):  # it is a folder of UCF101's
            read(folder)
        assert formats.ucf101_classes(tmp_path) is None


@pytest.mark.parametrize("name, text, reason", [
    ("x.json", "{broken", "not JSON"), ("x.json", '{"a": [1]}', "no known format"),
    ("x.json", "[1, 2]", "no known format"),
    ("x.json", TEMPLATES, "file of label names"), ("x.json", SSV2, "labels.json"),
    ("x.json", json.dumps([dict(video="p.mp4", caption=["a", "b"], answer=7)]),
     "entry 1: the answer"),
    ("x.json", json.dumps([dict(video="p.mp4", caption="a"), dict(video="p.mp4")]),
     "entry 2: has no caption"),
    ("x.json", json.dumps([dict(video=3.5, caption="a")]), "entry 1: needs"),
    ("x.csv", "video_id\nvideo0\n", "MSRVTT_data.json"), ("x.csv", "path,label\n", "no line below"),
    ("x.csv", "label,youtube_id,time_start,time_end,split\nrun,abc,now,then,train\n",
     "line 2: a part"),
    ("x.json", json.dumps({"ab": dict(annotations=dict(label="run"), subset="train", url="")}),
     "entry 'ab': annotations must have a segment"),
    ("x.json", json.dumps({"ab": dict(annotations=dict(label="run", segment=[5, "late"]),
                                      subset="train", url="")}), "entry 'ab': a part"),
    ("a_test_split1.txt", "x.avi 1\nwrong 2\n", "line 2"),
    ("x.jsonl", '{"path": "a.mp4"}\n[]\n', "line 2")])
def test_what_breaks_a_format_is_one_line_that_names_the_place(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    message = str(error.value)
    assert name in message and reason in message and "\n" not in message


ACTIVITY = ('{"database": {"a": {"subset": "training", "annotations": '
            '[{"segment": %s, "label": %s}]}}}')
DEEP = '[' * 100_000
VIDEO = '{"video_id": "v", "split": %s}'


@pytest.mark.parametrize("name, text, reason", [
    ("x.csv", 'path,caption\np.mp4,"never closed\np.mp4,b\n', "line 2: not a row"),
    ("x.csv", 'path,caption\np.mp4,"a\nb"\np.mp4,a,b\n', "line 4: 3 columns"),
    ("x.csv", f"path,caption\np.mp4,{'a' * 200_000}\n", "line 2: not a row"),
    ("x.csv", "path,label,label\np.mp4,1,2\n", "two columns"),
    ("x.csv", "label,youtube_id,time_start,time_end\nrun,abc,0,inf\n", "line 2: a part"),
    ("x.csv", "path,label\np.mp4,\np.mp4,3\n", "line 2: has no label"),
    ("x.json", DEEP, "not JSON"), ("x.jsonl", '{"path": "p.mp4"}\n' + DEEP, "line 2: not JSON"),
    ("x.json", '[{"path": "p.mp4", "caption": "\\ud800"}]', "invalid character"),
    ("x.json", '[{"path": "\\ud800.mp4"}]', "invalid character"),
    ("x.json", '[{"path": "a\\u0000.mp4"}]', "not a valid file name"),
    *(("x.json", '[{"path": "p.mp4", %s}]' % said, f"entry 1: {reason}") for said, reason in (
        ('"caption": []', "needs"), ('"caption": ["a", null]', "needs"),
        ('"caption": true', "needs"), ('"question": 3', "needs"),
        ('"label": 1.5', "needs"), ('"label": true', "needs"), ('"split": []', "needs"),
        ('"options": [3], "answer": 0', "needs"),
        ('"candidates": 5, "answer": 0', "needs"), ('"candidates": {}, "answer": 0', "needs"),
        ('"candidates": [], "answer": 0', "the candidates"),
        ('"candidates": "abc", "answer": 0', "the candidates"),
        ('"candidates": ["a", "b"], "answer": true', "the answer"),
        ('"candidates": ["a", "b"], "answer": []', "the answer"),
        ('"candidates": ["a"], "answer": "%s"' % ("9" * 5000), "the answer"),
        ('"question": "q", "answer": []', "an answer must be"),
        ('"question": "q", "answer": true', "an answer must be"))),
    *(("x.json", '{"videos": [%s], "sentences": [%s]}' % both, reason) for both, reason in (
        ((VIDEO % "[]", '{"video_id": "v", "caption": "c"}'), "all of them text"),
        ((VIDEO % "3", ""), "all of them text"),
        ((VIDEO % "null", '{"video_id": "v", "caption": 3}'), "all of them text"),
        ((VIDEO % "null", ""), "names no video"),
        ((VIDEO % "null", '{"video_id": "w", "caption": "c"}'), "'w' is missing"),
        (("3", "null"), "all of them text"))),
    ("x.json", '[{"id": true}]', "entry 1"),
    ("x.json", '[{"id": 7, "template": ["a"]}]', "entry 1"),
    *(("a.json", ACTIVITY % both, "ActivityNet") for both in (
        ("[0, Infinity]", '"run"'), ("[NaN, 3]", '"run"'), ("[false, true]", '"run"'),
        ("[0, 1, 2]", '"run"'), ('["0", "1"]', '"run"'),
        ("[0, 1]", "3"), ("[0, 1]", '"\\ud800"'), (f"[0, 1{'0' * 400}]", '"run"')))],
                         ids=lambda text: text[:40])
def test_values_of_an_odd_kind_are_one_line(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        (segments.read_segments if name == "a.json" else read)(tmp_path / name)
    assert name in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("labels", ["[]", "3", '{"a": true}', '{"a": 0.5}', '{"a": "1"}',
                                    '{"a": []}', DEEP], ids=lambda text: text[:9])
def test_a_labels_file_that_numbers_nothing_is_one_line(tmp_path, labels):
    lay(tmp_path, {"labels.json": labels, "x.json": '[{"id": "7", "template": "a"}]'}, [], b"")
    with pytest.raises(DataError, match="labels"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("labels", [["1699999999", "0"], ["-1", "0"], ["1.5", "2.5"], ["9" * 5000]],
                         ids=lambda labels: labels[0][:10])
def test_numbers_that_can_be_none_of_a_class_are_refused(labels):
    with pytest.raises(DataError, match="is no class number"):
        annotations.number_labels("x.csv", labels, None)


@pytest.mark.parametrize("gap", ["\u2028", "\x85", "\x0b", "\x0c", "\x1e"])
def test_only_a_line_break_ends_a_line(tmp_path, gap):
    entries = [dict(path="p.mp4", caption=f"one{gap}two"), dict(path="q.mp4", caption="b\nc")]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(entry, ensure_ascii=False)
                                                for entry in entries), encoding="utf-8")
    (tmp_path / "x.csv").write_text(f'path,caption\r\np.mp4,one{gap}two\r\nq.mp4,"b\nc"\r\n',
                                    encoding="utf-8", newline="")
    for name in ("x.jsonl", "x.csv"):
        assert [row.caption for row in read(tmp_path / name).rows] == [f"one{gap}two", "b\nc"]


@pytest.mark.parametrize("word, split", [("train", "train"), ("Training", "train"),
                                         ("validate", "val"), ("TEST", "val"), ("", None)])
def test_a_split_is_known_by_its_word(tmp_path, word, split):
    (tmp_path / "x.csv").write_text(f"path,split\np.mp4,{word}\n")
    assert read(tmp_path / "x.csv").rows[0].split == split


def test_a_folders_files_are_its_own_and_nobody_waits_for_a_pipe(tmp_path, clip):
    lay(tmp_path, {}, ["other/a.mp4", "other/b.mp4", "mine/c.mp4"], clip)
    (tmp_path / "mine" / "a.mp4").symlink_to("nowhere")
    (tmp_path / "mine" / "back").symlink_to("..")
    os.mkfifo(tmp_path / "mine" / "b.mp4")
    files = VideoFiles(tmp_path / "mine", 2, 16)
    assert files.missing == [str(tmp_path / "mine" / name) for name in ("a.mp4", "b.mp4")]
    assert "2 MISSING" in files.summary()
    os.mkfifo(tmp_path / "x.csv")
    for source, reason in ((tmp_path / "x.csv", "pipe"), (tmp_path / "mine" / "b.mp4", "pipe"),
                           ("a" * 300, "too long"), ("a\0b", "no such")):
        for reader in (read, segments.read_segments,
                       lambda source: data.open_clips(source, 2, 16)):
            with pytest.raises(DataError, match=reason):
                reader(source)


def test_what_may_not_be_looked_into_is_one_line(tmp_path, clip, monkeypatch):
    lay(tmp_path, {"x.txt": "a"}, ["all/a.mp4"], clip)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    # root, who often runs the tests, may look into everything
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="all: cannot be read .Permission denied"):
        read(tmp_path / "all")
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="all: cannot be read .Permission denied"):
        data.open_clips(tmp_path / "all", 2, 16)
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(DataError, match="cannot be read .Permission denied"):
        read(tmp_path / "x.txt")


def test_names_that_do_not_print_are_escaped_or_refused(tmp_path, clip):
    lay(tmp_path, {"list.txt": "x"}, ["a\nb/c.mp4", "d/e.mp4"], clip)
    assert "a\\nb" in VideoFiles(tmp_path, 2, 16).summary()
    assert len(VideoFiles(tmp_path, 2, 16).summary().splitlines()) == 2  # and what is not used
    with pytest.raises(DataError) as error:
        read(tmp_path / "a\nb" / "gone")
    assert "a\\nb" in str(error.value) and "\n" not in str(error.value)
    name = os.fsdecode(b"\xff.mp4")
    (tmp_path / "d" / name).write_bytes(clip)
    with pytest.raises(DataError, match="not UTF-8") as error:
        read(tmp_path)
    str(error.value).encode()


def test_the_command_line_says_what_a_source_is(tmp_path, clip, capsys):
    texts, videos, source, *_ = CASES["WebVid"]
    lay(tmp_path, texts, videos, clip)
    assert annotations.main([str(tmp_path / source)]) == 0
    assert "WebVid, 1 rows" in capsys.readouterr().out
    assert annotations.main([str(tmp_path / "gone")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Kinetics", "UCF101, split 1", "HMDB51, split 1",
                                  "Something-Something V2"])
def test_the_classify_stage_takes_what_has_labels(tmp_path, kind, clip, capsys):
    texts, videos, source, *_ = CASES[kind]
    lay(tmp_path, texts, videos, clip)
    tiny = ["--steps", "1", "--batch-size", "2", "--num-frames", "2", "--input-size", "32",
            "--workers", "0", "--data", str(tmp_path / source), "--video-folder",
            beside(tmp_path, source)]
    assert train.main(["mae", *tiny, "--out", str(tmp_path / "mae")]) == 0
    assert train.main(["classify", *tiny, "--weights", str(tmp_path / "mae"),
                       "--out", str(tmp_path / "classify")]) == 0
    assert kind in capsys.readouterr().out


@pytest.mark.parametrize("kind",
                         ["MSR-VTT", "WebVid", "captions in JSON, as in VINDLU and UMT"])
def test_the_clip_stage_takes_what_has_captions(tmp_path, kind, clip, capsys):
    texts, videos, source, *_ = CASES[kind]
    lay(tmp_path, texts, videos, clip)
    assert train.main(["clip", "--steps", "1", "--batch-size", "2", "--image-batch", "2",
                       "--num-frames", "2",
                       "--input-size", "32", "--workers", "0", "--data", str(tmp_path / source),
                       "--video-folder", beside(tmp_path, source),
                       "--out", str(tmp_path / "clip")]) == 0
    assert kind in capsys.readouterr().out


# ------------------------------------------------------------------------------------- tar shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory, clip):
    """Three shards of four videos each, one of them no video; captions and labels beside."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        with tarfile.open(folder / f"clips-{number:03d}.tar", "w") as tar:
            for i in range(4):
                key = f"{number}{i}"
                broken = key == "12"
                for suffix, content in (("mp4", b"broken" if broken else clip),
                                        ("txt", f"clip {key}".encode()),
                                        ("cls", str(i).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def test_shards_need_a_package_and_say_so(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match="pip install webdataset"):
        data.open_clips(shards, 2, 16)


@pytest.mark.parametrize("source", ["", "clips-{000..002}.tar"])
def test_shards_give_endless_mixed_clips_and_skip_what_is_broken(shards, source):
    pytest.importorskip("webdataset")
    files = data.open_clips(shards / source if source else shards, 2, 16)
    assert "3 tar shards, 4 videos in the first" in files.summary()
    assert files.captions[1] == "clip 01"
    found = list(data.batches(files, 4, 0, steps=10))
    assert len(found) == 10 and found[0]["video"].shape == (4, 2, 16, 16, 3)
    said = [caption for batch in found for caption in batch["caption"]]
    assert len(set(said)) == 11 and "clip 12" not in said
    assert any("12.mp4" in path for batch in found for path, _ in batch["bad"])
    for batch in found:
        assert [caption[-1] for caption in batch["caption"]] == [str(int(label))
                                                                 for label in batch["labels"][
                                                                     "label"]]
    again = list(data.batches(files, 4, 0, steps=10))
    assert said == [caption for batch in again for caption in batch["caption"]]
    assert torch.equal(found[3]["video"], again[3]["video"])
    other = [caption for batch in data.batches(files, 4, 1, steps=10)
             for caption in batch["caption"]]
    assert other != said


def test_workers_and_ranks_draw_their_own_shards_and_all_take_the_same_steps(shards):
    pytest.importorskip("webdataset")
    files = data.open_clips(shards, 2, 16)
    streams = [[caption for batch in data.batches(files, 4, 0, 8, rank=rank, world=2, workers=2)
                for caption in batch["caption"]] for rank in (0, 1)]
    assert len(streams[0]) == len(streams[1]) == 32 and streams[0] != streams[1]


def test_held_out_shards_are_read_once_in_order(shards):
    pytest.importorskip("webdataset")
    files = data.open_clips(shards, 2, 16, train=False)
    found = list(data.held_out(files, None, 5))
    assert sum((batch["caption"] for batch in found), []) == [
        f"clip {number}{i}" for number in range(3) for i in range(4) if (number, i) != (1, 2)]
    assert sum(len(batch["bad"]) for batch in found) == 1 and len(files) == 12
    parts = [set(data.open_clips(shards, 2, 16, part=part).shards) for part in ("train", "val")]
    assert [len(part) for part in parts] == [2, 1] and not parts[0] & parts[1]


def test_the_clip_stage_takes_shards(shards, tmp_path, capsys):
    pytest.importorskip("webdataset")
    assert train.main(["clip", "--steps", "1", "--batch-size", "2", "--image-batch", "2",
                       "--num-frames", "2",
                       "--input-size", "32", "--workers", "0", "--data", str(shards), "--out",
                       str(tmp_path)]) == 0
    assert "tar shards" in capsys.readouterr().out


def test_names_of_folders_are_names_also_where_they_are_dates_and_what_hides_is_left_out(tmp_path,
                                                                                         clip):
    """Folders called 9 and 10 are two classes. A disk's own folders may be unreadable."""
    for place in ("20240101", "20240102", ".Trash-0", "lost+found"):
        (tmp_path / "dates" / place).mkdir(parents=True)
        (tmp_path / "dates" / place / "a.mp4").write_bytes(clip)
    files = data.VideoFiles(tmp_path / "dates", 2, 16, train=False)
    assert files.classes == {"label": ("20240101", "20240102")}
    assert [label for _, label in files.items] == [0, 1]
    for place in ("10", "9"):
        (tmp_path / "numbers" / place).mkdir(parents=True)
        (tmp_path / "numbers" / place / "a.mp4").write_bytes(clip)
    files = data.VideoFiles(tmp_path / "numbers", 2, 16, train=False)
    assert files.classes == {"label": ("9", "10")}
    assert sorted(files.items) == [(str(tmp_path / "numbers/10/a.mp4"), 1),
                                   (str(tmp_path / "numbers/9/a.mp4"), 0)]


def test_a_table_of_tabs_knows_no_quotes_and_json_knows_whole_numbers_as_pandas_writes_them(
    tmp_path, clip):
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "list.tsv").write_text('path\tcaption\na.mp4\t"Stop" she says\n')
    assert annotations.read(tmp_path / "list.tsv").rows[0].caption == '"Stop" she says'
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4", "label": 7.0}\n')
    assert annotations.read(tmp_path / "list.jsonl").rows[0].label == "7"
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4", "label": 7.5}\n')
    with pytest.raises(DataError, match="label text or a whole number"):
        annotations.read(tmp_path / "list.jsonl")


def test_of_two_files_of_msr_vtt_the_one_that_knows_the_listed_videos_is_read(tmp_path, clip):
    for name, ids in (("a_test.json", ("video2",)), ("b_train_val.json", ("video0", "video1"))):
        (tmp_path / name).write_text(json.dumps({"videos": [{"video_id": i} for i in ids],
                                                 "sentences": [{"video_id": i, "caption": "a cat"}
                                                               for i in ids]}))
    for i in ("video0", "video1"):
        (tmp_path / f"{i}.mp4").write_bytes(clip)
    (tmp_path / "train.csv").write_text("video_id\nvideo0\nvideo1\n")
    assert len(annotations.read(tmp_path / "train.csv").rows) == 2
