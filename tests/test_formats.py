"""What is proved about video/formats.py: the example of each format, which docs/formats.md shows,
is recognised and read; each published format gives the clips, labels and texts that its authors
mean; what a source says and nobody understands is named or refused."""

import json

import numpy as np
import pytest

import data
from tasks import retrieval
from video import annotations, formats
from video.annotations import read
from video.rows import DataError, Part, is_media
from video.texts import read_source

FORMATS = {one.name: one for one in formats.FORMATS}
READABLE = [name for name in FORMATS if name != "file of label names"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a video of ten seconds, two frames a second; frame n is of grey 12 n."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(20):
            picture = np.full((32, 32, 3), 12 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def lay(folder, texts, videos, clip):
    """Write texts, and videos: a file, or for a name that ends in / a folder of 12 pictures."""
    av = pytest.importorskip("av")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name in videos:
        place = folder / name
        (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            place.write_bytes(clip)
            continue
        for number in range(1, 13):
            picture = np.full((32, 32, 3), 20 * number, np.uint8)
            av.VideoFrame.from_ndarray(picture, format="rgb24").save(f"{place}/{number:05d}.png")


def greys(files, index=0):
    """The mean of each frame of a clip, in twelfths: the frame's number in `clip`."""
    return [round(frame.mean() / 12) for frame in files[index]["video"]]


@pytest.mark.parametrize("name", READABLE)
def test_the_example_of_every_format_is_recognised_and_its_clips_are_found(tmp_path, name, clip):
    one = FORMATS[name]
    lay(tmp_path, {one.file: one.example}, one.videos, clip)
    if name == "MSR-VTT ids":
        (tmp_path / "MSRVTT_data.json").write_text(FORMATS["MSR-VTT"].example)
    if name == "Something-Something V2":
        (tmp_path / "labels.json").write_text('{"Dropping something": "0"}')
    first = next(each for each in formats.FORMATS if each.recognises(read_source(
        tmp_path / one.file)))
    assert first.name == name
    files = data.VideoFiles(tmp_path / one.file, 2, 16, train=False, part="all")
    assert not files.missing and files[0]["video"].shape == (2, 16, 16, 3)
    assert files.captions or files.classes or files.rows[0].question or name in files.kind


def test_the_page_of_formats_is_the_one_that_the_table_prints():
    page = (annotations.Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    assert page == formats.page()


def test_readers_of_formats_are_short():
    """Adding a format is adding a row and a reader of at most 25 lines."""
    import inspect
    for one in formats.FORMATS:
        if inspect.isfunction(one.read) and one.read is not formats.read_records:
            assert len(inspect.getsource(one.read).splitlines()) <= 25, one.name


@pytest.mark.parametrize("text, parts", [
    ("path,start,end,label\nx.mp4,1,3,a\nx.mp4,00:00:05.000,0:08,b\n", [(1, 3), (5, 8)]),
    ("path\tstart_time\tend_time\tlabel\nx.mp4\t1.5\t3\ta\nx.mp4\t5\t8,5\tb\n",
     [(1.5, 3), (5, 8.5)]),
    ("path;start_frame;stop_frame;label\nx.mp4;2;6;a\nx.mp4;10;16;b\n",
     [(2, 6, True), (10, 16, True)])])
def test_a_row_that_names_a_part_is_a_clip_of_that_part(tmp_path, clip, text, parts):
    lay(tmp_path, {"x.csv": text}, ["x.mp4"], clip)
    found = read(tmp_path / "x.csv")
    assert [row.part for row in found.rows] == [Part(*part) for part in parts]
    files = data.VideoFiles(tmp_path / "x.csv", 4, 16, sampling="segment", train=False)
    for index, (start, end, *in_frames) in enumerate(parts):
        first, last = (start, end) if in_frames else (2 * start, 2 * end)
        assert all(first <= number < last for number in greys(files, index))
    for epoch in range(5):
        train = data.VideoFiles(tmp_path / "x.csv", 4, 16, sampling="segment", area=1)
        frames = train[1, epoch]["video"]
        first, last = parts[1][:2] if parts[1][2:] else (2 * parts[1][0], 2 * parts[1][1])
        assert all(first <= round(frame.mean() / 12) < last for frame in frames)
    assert "2 clips of 1 video," in files.summary() and str(found.rows[0].part) in files.summary()


def test_times_and_sentences_go_in_pairs(tmp_path, clip):
    entry = {"video": "x.mp4", "sentences": ["one", "two"], "timestamps": [[0, 2], [4, 6.5]]}
    lay(tmp_path, {"x.json": json.dumps([entry])}, ["x.mp4"], clip)
    rows = read(tmp_path / "x.json").rows
    assert [(row.caption, row.part) for row in rows] == [("one", Part(0, 2)), ("two", Part(4, 6.5))]
    entry["timestamps"].append([7, 8])
    (tmp_path / "x.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match="entry 1: parts must be pairs"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("start, end", [("3", "2"), ("", "2"), ("a", "2"), ("-1", "2"), ("1", "")])
def test_a_part_that_cannot_be_is_one_line(tmp_path, clip, start, end):
    lay(tmp_path, {"x.csv": f"path,start,end\nx.mp4,{start},{end}\n"}, ["x.mp4"], clip)
    with pytest.raises(DataError, match="line 2: a part of a video needs a start and a later end"):
        read(tmp_path / "x.csv")


def test_what_a_list_says_and_nobody_uses_is_named(tmp_path, clip):
    lay(tmp_path, {"x.csv": "path,label,weight,mood\nx.mp4,a,1,good\n"}, ["x.mp4"], clip)
    assert read(tmp_path / "x.csv").unused == ("weight", "mood")
    assert "not used: weight, mood" in data.VideoFiles(tmp_path / "x.csv", 2, 16).summary()


def test_a_list_of_no_format_is_told_the_nearest_one_and_what_is_missing(tmp_path):
    (tmp_path / "x.json").write_text('{"images": [], "info": {}}')
    with pytest.raises(DataError, match="nearest is COCO captions; missing: annotations"):
        read(tmp_path / "x.json")


def test_videos_of_msr_vtt_may_lie_in_two_folders(tmp_path, clip):
    content = {"videos": [{"video_id": "video0", "split": "train"},
                          {"video_id": "video7", "split": "test"}],
               "sentences": [{"video_id": "video0", "caption": "a car"},
                             {"video_id": "video7", "caption": "a cat"}]}
    lay(tmp_path, {"MSRVTT_data.json": json.dumps(content)},
        ["TrainValVideo/video0.mp4", "TestVideo/video7.mp4"], clip)
    rows = read(tmp_path / "MSRVTT_data.json").rows
    assert [row.path for row in rows] == [str(tmp_path / "TrainValVideo/video0.mp4"),
                                          str(tmp_path / "TestVideo/video7.mp4")]


def test_folders_that_number_their_own_files_are_not_mixed(tmp_path, clip):
    """1.mp4 of `train` is not 1.mp4 of `val`: the one folder that has most of a list is taken."""
    lay(tmp_path, {"x.csv": "video_id,label\n1,a\n2,b\n3,a\n4,b\n"},
        ["train/1.mp4", "train/2.mp4", "train/4.mp4", "val/1.mp4", "val/3.mp4"], clip)
    files = data.VideoFiles(tmp_path / "x.csv", 2, 16)
    assert files.missing == [str(tmp_path / "train/3.mp4")]
    (tmp_path / "val/2.mp4").write_bytes(clip)
    with pytest.raises(DataError, match="train and .*val have files of the same names"):
        read(tmp_path / "x.csv")
    for name in ("train", "val"):  # the name of the list decides
        (tmp_path / f"{name}.csv").write_text("video_id,label\n1,a\n")
        row, = read(tmp_path / f"{name}.csv").rows
        assert row.path == str(tmp_path / name / "1.mp4")


def test_ids_may_lie_in_many_class_folders(tmp_path, clip):
    lay(tmp_path, {"x.csv": "video_id\n" + "".join(f"{i}\n" for i in range(80))},
        [f"c{i % 40}/{i}.mp4" for i in range(80)], clip)
    files = data.VideoFiles(tmp_path / "x.csv", 2, 16)
    assert len(files) == 80 and not files.missing


@pytest.mark.parametrize("name, text, reason", [
    ("x.txt", "a.mp4,0,4,1\nb.mp4,4,8,2\n", "may be classes, a count of frames"),
    ("x.txt", "a.mp4 20 1\nb.mp4 20 0\n", "may be classes, a count of frames"),
    ("x.txt", "a 1\nb 2\n", "may be frames or classes"),
    ("x.txt", "a 12 1 3\nb 12 2\n", "may be frames or classes"),
    ("x.csv", "path,split\na.mp4,one\nb.mp4,two\n", "line 2: the split 'one' is unknown"),
    ("x.csv", 'path,segment\na.mp4,now\n', "segment must be a list"),
    ("x.jsonl", '{"path": "a.mp4", "label": {"verb": "run"}}\n{"path": "b.mp4", "label": "run"}\n',
     "line 2: its label has no named questions"),
    ("x.json", '[{"path": "a.mp4", "label": "x", "class": "y"}, {"path": "b.mp4", "class": "y"}]',
     "entry 2: has no label")])
def test_what_may_mean_two_things_is_refused(tmp_path, clip, name, text, reason):
    lay(tmp_path, {name: text}, ["a.mp4", "b.mp4"], clip)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name)


@pytest.mark.parametrize("name, text, expected", [
    ("x.csv", 'path,segment,label\na.mp4,"[2, 4]",u\n', [("u", Part(2, 4))]),
    ("x.json", '[{"path": "a.mp4", "segment": {"start": 2, "end": 4}, "label": "u"}]',
     [("u", Part(2, 4))]),
    ("x.json", '[{"path": "a.mp4", "segments": [[0, 2], [4, 6]], "labels": ["u", "v"]}]',
     [("u", Part(0, 2)), ("v", Part(4, 6))]),
    ("x.csv", "video_id,label\n7.0,u\n", [("u", None)]),
    ("x.csv", "path,labels\na.mp4,\"Throwing, tossing\"\n,\n", [("Throwing, tossing", None)]),
    ("x.txt", "# a head\na.mp4 u\n", [("u", None)]),
    ("x.json", '{"path": {"0": "a.mp4", "1": "b.mp4"}, "label": {"0": "u", "1": "v"}}',
     [("u", None), ("v", None)]),
    ("x.json", '{"a.mp4": "u", "b.mp4": "v"}', [("u", None), ("v", None)]),
    ("x.json", '[{"id": "a", "label": "u"}]', [("u", None)])])
def test_what_means_one_thing_is_read(tmp_path, clip, name, text, expected):
    lay(tmp_path, {name: text}, ["a.mp4", "b.mp4", "7.mp4"], clip)
    found = read(tmp_path / name)
    assert [(row.label, row.part) for row in found.rows] == expected
    assert all(row.path.endswith(("a.mp4", "b.mp4", "7.mp4")) for row in found.rows)


def test_numbers_beside_names_of_our_own_order_are_no_places(tmp_path, clip):
    """Sorted names have numbers that nobody has seen; those of classInd.txt everybody knows."""
    lay(tmp_path, {"t.txt": "a.mp4 run\nb.mp4 jump\n", "v.txt": "a.mp4 0\nb.mp4 1\n"},
        ["a.mp4", "b.mp4"], clip)
    with pytest.raises(DataError, match="label '0' is not among the 2 known classes"):
        data.open_sets(str(tmp_path / "t.txt"), str(tmp_path / "v.txt"), frames=2, size=16, seed=0)


REFUSED = [
    (["training/run/a.mp4", "testing/run/b.mp4"], "looks like a split"),
    (["TrainValVideo/a.mp4", "TestVideo/b.mp4"], "looks like a split"),
    (["run/a.mp4", "jump/j0/"], "holds videos .run/a.mp4. and folders of numbered pictures")]


def test_what_stands_in_both_lists_is_said(tmp_path, clip, capsys):
    lay(tmp_path, {"t.txt": "a.mp4 x\nb.mp4 y\n", "v.csv": "path,label,mood\nb.mp4,y,good\n",
                   "s.csv": "path,split\na.mp4,test\nb.mp4,test\n"}, ["a.mp4", "b.mp4"], clip)
    data.open_sets(str(tmp_path / "t.txt"), str(tmp_path / "v.csv"), frames=2, size=16, seed=0)
    said = capsys.readouterr().out
    assert "1 videos are in both" in said and "not used: mood" in said and "none of x" in said
    data.open_sets(str(tmp_path / "s.csv"), frames=2, size=16, seed=0)
    assert "all its rows are of the split val" in capsys.readouterr().out


@pytest.mark.parametrize("videos, reason", REFUSED)
def test_folders_that_are_no_classes_are_refused(tmp_path, clip, videos, reason):
    lay(tmp_path, {}, videos, clip)
    with pytest.raises(DataError, match=reason):
        read(tmp_path)


@pytest.mark.parametrize("videos, texts, note", [
    (["run/a.mp4", "jump/b.mp4", "intro.mp4"], {}, "no labels, because intro.mp4"),
    (["videos/run/a.mp4", "videos/jump/b.mp4"], {}, "one class, videos; give that folder"),
    (["run/a.mp4", "run/b.mp4"], {"run/a.txt": "a dog"}, "1 of 2 files have no .txt")])
def test_what_is_odd_about_a_folder_is_said(tmp_path, clip, videos, texts, note):
    lay(tmp_path, texts, videos, clip)
    assert note in data.VideoFiles(tmp_path, 2, 16).summary()


def test_msvd_takes_the_split_lists_of_the_field(tmp_path, clip):
    lay(tmp_path, {"AllVideoDescriptions.txt": "# a head\n\nmv89psg6zh4_33_46 a bird\n"
                                               "abcdefghijk_1_5 a man\n",
                   "train_list.txt": "mv89psg6zh4_33_46\n", "test_list.txt": "abcdefghijk_1_5\n"},
        ["mv89psg6zh4_33_46.avi", "abcdefghijk_1_5.AVI"], clip)
    rows = read(tmp_path / "AllVideoDescriptions.txt").rows
    assert [(row.caption, row.split) for row in rows] == [("a bird", "train"), ("a man", "val")]
    assert rows[1].path.endswith(".AVI")


def test_paragraphs_are_one_text_a_video(tmp_path, clip):
    for name in ("DiDeMo", "ActivityNet Captions"):
        lay(tmp_path, {FORMATS[name].file: FORMATS[name].example}, FORMATS[name].videos, clip)
        found = read(tmp_path / FORMATS[name].file)
        assert [row.caption for row in found.rows] in (["a dog runs in it leaves"],
                                                       ["A dog runs in. It leaves."])
        assert "times are not used" in found.notes[0] and not found.rows[0].part


@pytest.mark.parametrize("name, cut, whole", [
    ("VATEX", "ab-cdefghij_000002_000004", "ab-cdefghij"), ("Kinetics", "ab_000002_000004", "ab"),
    ("InternVid", "aaa_00:00:02.000_00:00:04.000", "aaa")])
def test_a_clip_is_cut_already_or_a_part_of_the_whole_video(tmp_path, clip, name, cut, whole):
    text = {"VATEX": '[{"videoID": "ab-cdefghij_000002_000004", "enCap": ["one", "two"]}]',
            "Kinetics": "label,youtube_id,time_start,time_end\nrun,ab,2,4\n",
            "InternVid": '{"YoutubeID": "aaa", "Start_timestamp": "00:00:02.000", '
                         '"End_timestamp": "00:00:04.000", "Caption": "a field"}'}[name]
    lay(tmp_path, {FORMATS[name].file: text}, [f"{whole}.mp4"], clip)
    source = tmp_path / FORMATS[name].file
    assert {row.part for row in read(source).rows} == {Part(2, 4)}
    assert greys(data.VideoFiles(source, 2, 16, sampling="segment", train=False)) == [4, 6]
    (tmp_path / f"{cut}.mp4").write_bytes(clip)
    assert {row.part for row in read(source).rows} == {None}


def test_videos_of_msvd_qa_are_named_by_its_map(tmp_path, clip):
    lay(tmp_path, {"val_qa.json": '[{"video_id": 1, "question": "who?", "answer": "bird"}]',
                   "youtube_mapping.txt": "mv89psg6zh4_33_46 vid1\n"},
        ["YouTubeClips/mv89psg6zh4_33_46.avi"], clip)
    found = read(tmp_path / "val_qa.json")
    assert found.kind == "MSVD-QA" and found.rows[0].path.endswith("mv89psg6zh4_33_46.avi")


def test_next_qa_finds_its_folders_by_the_map_and_tgif_its_candidates(tmp_path, clip):
    one = FORMATS["NExT-QA"]
    mapped = '{"4010069381": "1106/4010069381"}'
    lay(tmp_path, {one.file: one.example, "map_vid_vidorID.json": mapped},
        ["videos/1106/4010069381.mp4"], clip)
    row, = read(tmp_path / one.file).rows
    assert row.candidates == ("runs", "walks", "jumps") and row.answer == "walks"
    assert row.path.endswith("1106/4010069381.mp4")
    text = "gif_name\tquestion\ta1\ta2\tanswer\ntumblr_1\twhat?\trun\tjump\t1\n"
    lay(tmp_path, {"action.csv": text}, ["tumblr_1.gif"], clip)
    row, = read(tmp_path / "action.csv").rows
    assert row.candidates == ("run", "jump") and row.answer == "jump"


def test_pictures_that_lie_in_a_folder_are_one_video_and_carry_the_rate(tmp_path, clip):
    lay(tmp_path, {"jester-v1-train.csv": "100;Swiping Left\n7;Thumb Up\n",
                   "jester-v1-labels.csv": "Thumb Up\nSwiping Left\n"},
        ["20bn-jester-v1/100/", "20bn-jester-v1/7/"], clip)
    files = data.VideoFiles(tmp_path / "jester-v1-train.csv", 4, 16, sampling="segment",
                            train=False, frame_rate=12)
    assert [files[i]["labels"]["label"] for i in (0, 1)] == [1, 0]
    assert [round(frame.mean() / 20) for frame in files[0]["video"]] == [2, 5, 8, 11]
    assert "at 12 frames per second" in files.summary()
    folder = tmp_path / "classes"
    lay(folder, {}, ["run/a/", "run/b/", "jump/c/"], clip)
    assert len(data.VideoFiles(folder, 4, 16)) == 3
    single = data.VideoFiles(folder, 1, 16, frame_rate=0)
    assert len(single) == 36 and single.kind == "folder of pictures"


def test_photos_with_numbers_are_no_frames_and_a_mixture_is_refused(tmp_path, clip):
    """ImageNet's names are numbers with gaps. A folder without frames would be lost in silence."""
    lay(tmp_path / "frames", {}, ["run/a/", "run/b/"], clip)
    picture = (tmp_path / "frames/run/a/00001.png").read_bytes()
    for number in (4, 900, 17000):
        for folder in (tmp_path / "photos/cat", tmp_path / "frames/run/c"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"n01_{number}.png").write_bytes(picture)
    assert read(tmp_path / "photos").kind == "folder of pictures"
    with pytest.raises(DataError, match="2 of its folders hold.*run/c does not"):
        read(tmp_path / "frames")


def test_a_part_of_which_most_is_not_there_is_refused_and_an_end_is_cut(tmp_path, clip):
    """A list that counts frames under the name of seconds would train on something else."""
    lay(tmp_path, {"x.csv": "path,start,end\nx.mp4,0,250\nx.mp4,4,10.8\n"}, ["x.mp4"], clip)
    files = data.VideoFiles(tmp_path / "x.csv", 2, 16, sampling="segment", train=False)
    assert "frame numbers start_frame" in files[0]["bad"][0][1] and files[0]["video"] is None
    assert greys(files, 1) == [10, 16]


def test_a_list_of_folders_takes_the_frames_that_it_counts(tmp_path, clip):
    lay(tmp_path, {"x.txt": "data/a 4 0\ndata/b 12 1\n", "v2.txt": "data/a 0 4\ndata/b 0 12\n"},
        ["data/a/", "data/b/"], clip)
    files = data.VideoFiles(tmp_path / "x.txt", 2, 16, sampling="segment", train=False)
    assert [round(frame.mean() / 20) for frame in files[0]["video"]] == [1, 3]
    assert [label for _, label in files.items] == [0, 1]
    assert data.VideoFiles(tmp_path / "v2.txt", 2, 16).classes == {}


def test_diving48_names_its_classes_and_takes_its_frames(tmp_path, clip):
    lay(tmp_path, {"d.json": '[{"vid_name": "a", "label": 1, "start_frame": 0, "end_frame": 6}]',
                   "Diving48_vocab.json": '[["Back", "tuck"], ["Forward", "pike"]]'},
        ["rgb/a.mp4"], clip)
    files = data.VideoFiles(tmp_path / "d.json", 2, 16, sampling="segment", train=False)
    assert files.classes == {"label": ("Back_tuck", "Forward_pike")} and files.items[0][1] == 1
    assert greys(files) == [1, 4]


def test_epic_kitchens_asks_three_questions(tmp_path, clip):
    one = FORMATS["EPIC-Kitchens-100"]
    lay(tmp_path, {one.file: one.example,
                   "EPIC_100_verb_classes.csv": "id,key\n" + "\n".join(
                       f"{i},verb{i}" for i in range(5)),
                   "EPIC_100_noun_classes.csv": "id,key\n" + "\n".join(
                       f"{i},noun{i}" for i in range(5))}, one.videos, clip)
    files = data.VideoFiles(tmp_path / one.file, 2, 16, train=False)
    assert files.classes["verb"][3] == "verb3" and files.classes["action"] == ("verb3 noun3",)
    assert files[0]["labels"] == {"verb": 3, "noun": 3, "action": 0}
    assert files.rows[0].part == Part(0.14, 3.37) and files.captions == ["open door"]
    more = one.example.replace("door,3", "cup,4")
    lay(tmp_path, {"EPIC_100_validation.csv": more}, [], clip)
    for name in (one.file, "EPIC_100_validation.csv"):
        both = data.VideoFiles(tmp_path / name, 2, 16).classes["action"]
        assert both == ("verb3 noun3", "verb3 noun4")
    lay(tmp_path / "frames", {one.file: one.example}, ["P01/rgb_frames/P01_01/"], clip)
    row, = read(tmp_path / "frames" / one.file).rows
    assert row.part == Part(7, 201, True) and row.path.endswith("rgb_frames/P01_01")


@pytest.mark.parametrize("name, text, extra, classes, expected", [
    ("Charades_v1_train.csv", "id,subject,actions\na,X,c001 0 2;c000 1 3;c001 5 6\nb,X,\n",
     {"Charades_v1_classes.txt": "c000 Holding\nc001 Sitting\nc002 Walking\n"},
     ("Holding", "Sitting", "Walking"), [[1, 1, 0], [0, 0, 0]]),
    ("multi.txt", "a.mp4 1 5\nb.mp4 7\n", {}, ("1", "5", "7"), [[1, 1, 0], [0, 0, 1]]),
    ("x.csv", "path,labels\na.mp4,run|jump\nb.mp4,jump\n", {}, ("jump", "run"),
     [[1, 1], [1, 0]]),
    ("x.json", '[{"path": "a.mp4", "labels": ["run", "jump"]}, {"path": "b.mp4", "labels": []}]',
     {}, ("jump", "run"), [[1, 1], [0, 0]])])
def test_several_labels_of_a_clip_are_a_vector(tmp_path, clip, name, text, extra, classes,
                                               expected):
    lay(tmp_path, {name: text} | extra, ["a.mp4", "b.mp4"], clip)
    files = data.VideoFiles(tmp_path / name, 2, 16, train=False)
    assert files.classes == {"label": classes} and files.several == {"label"}
    assert [files[i]["labels"]["label"].tolist() for i in (0, 1)] == expected
    batch = next(data.held_out(files, None, 2))
    assert batch["labels"]["label"].tolist() == expected


def test_hvu_makes_a_question_of_each_category(tmp_path, clip):
    one = FORMATS["HVU"]
    lay(tmp_path, {one.file: one.example, "HVU_Tags_Categories_V1.0.csv":
                   "Tag,Category\nrunning,action\ndog,object\npark,scene\n"}, one.videos, clip)
    files = data.VideoFiles(tmp_path / one.file, 2, 16, train=False)
    assert files.classes == {"action": ("running",), "object": ("dog",), "scene": ("park",)}
    assert files.several == {"action", "object", "scene"}


def test_numbers_behind_a_path_that_may_be_a_part_are_refused(tmp_path, clip):
    lay(tmp_path, {"x.txt": "a.mp4 0 4 1\nb.mp4 4 8 2\n"}, ["a.mp4", "b.mp4"], clip)
    with pytest.raises(DataError, match="may be classes, a count of frames and a class, or a part"):
        read(tmp_path / "x.txt")


def test_labels_from_one_on_make_no_empty_class_and_a_second_list_is_read_alike(tmp_path, clip):
    lay(tmp_path, {"a.txt": "a.mp4 1\nb.mp4 2\n", "b.txt": "a.mp4 2\n", "c.txt": "a.mp4 0\n"},
        ["a.mp4", "b.mp4"], clip)
    files = data.VideoFiles(tmp_path / "a.txt", 2, 16)
    assert files.classes == {"label": ("1", "2")} and "2 numbers from 1 to 2" in files.summary()
    second = data.VideoFiles(tmp_path / "b.txt", 2, 16, classes=files.classes)
    assert second.items[0][1] == 1 and second.classes_without_clips() == ["1"]
    with pytest.raises(DataError, match="label '0' is not among the 2 known classes"):
        data.VideoFiles(tmp_path / "c.txt", 2, 16, classes=files.classes)


def test_numbers_are_places_where_the_classes_have_names(tmp_path, clip):
    """As official classifiers and lists beside them have it."""
    lay(tmp_path, {"a.txt": "a.mp4 2\n"}, ["a.mp4"], clip)
    files = data.VideoFiles(tmp_path / "a.txt", 2, 16, classes={"label": ("x", "y", "z")})
    assert files.items[0][1] == 2


def test_clips_of_one_group_stay_in_one_part_and_absent_classes_are_named(tmp_path, clip, capsys):
    lay(tmp_path, {}, [f"{name}/v_{name}_g{group:02d}_c{number:02d}.avi" for name in ("A", "B")
                       for group in range(1, 4) for number in (1, 2, 3)], clip)
    train_set, held_out = data.open_sets(str(tmp_path), frames=2, size=16, seed=0)
    groups = [{path.rsplit("_c", 1)[0] for path, _ in part.items}
              for part in (train_set, held_out["val"])]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 6
    said = capsys.readouterr().out
    assert "whole groups are held out, which is no official split" in said
    assert "held out: 3 clips; none of " in said


def test_captions_of_one_clip_are_no_negatives_and_parts_of_a_video_are(tmp_path, clip):
    """Two captions of one part agree; another part of the same file is another clip."""
    text = "path,start,end,caption\nx.mp4,0,2,one\nx.mp4,0,2,two\nx.mp4,4,6,three\n"
    lay(tmp_path, {"x.csv": text}, ["x.mp4"], clip)
    files = data.VideoFiles(tmp_path / "x.csv", 2, 16, train=False)
    batch = data.collate([files[i] for i in range(3)])
    assert batch["clip"][0] == batch["clip"][1] != batch["clip"][2]
    torch = pytest.importorskip("torch")
    (video, text), scale = torch.randn(2, 3, 8), torch.tensor(2.0)
    loss = retrieval.pair_loss(video, text, scale, batch, gather=False)
    without = retrieval.pair_loss(video, text, scale, {"caption": batch["caption"]}, gather=False)
    assert loss != without
    assert files.one_item_per_video().count_captions(range(2)) == 3 and len(files) == 2


def test_a_checked_list_of_parts_is_copied_part_by_part(tmp_path, clip, capsys):
    lay(tmp_path, {"x.csv": "path,start,end,label\nx.mp4,1,3,a\nx.mp4,5,8,b\n"}, ["x.mp4"], clip)
    assert data.main([str(tmp_path / "x.csv"), "--workers", "0", "--out", str(tmp_path / "out"),
                      "--cache", str(tmp_path / "small"), "--fix-list", str(tmp_path / "y.jsonl"),
                      "--short-side", "32"]) == 0
    assert "2 of 2 clips are good" in capsys.readouterr().out
    again = data.VideoFiles(tmp_path / "y.jsonl", 2, 16, sampling="segment", train=False)
    assert [row.part for row in again.rows] == [Part(1, 3), Part(5, 8)]
    small = data.VideoFiles(tmp_path / "small" / "list.jsonl", 2, 16, sampling="segment",
                            train=False)
    assert len(set(path for path, _ in small.items)) == 2
    assert [row.part for row in small.rows] == [None, None]
    assert greys(small, 1) == greys(again, 1) == [11, 14]


def test_names_of_media_are_told_by_their_suffix():
    assert is_media("a.MP4") and is_media('"b.jpeg"') and not is_media("c.txt")
