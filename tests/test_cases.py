"""Small inputs from public reports that once went wrong, with frames and labels checked.

They lie in ../shared/cases; without them these tests are skipped, and tests/test_formats.py proves
the same on files that it writes. Their videos are red, or blue from the 33rd frame on.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import data
from tasks import retrieval
from video.annotations import read
from video.decoding import open_video
from video.rows import DataError, Part

pytest.importorskip("av")
CASES = Path(__file__).resolve().parent.parent.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")


def files(name, frames=4, **options):
    return data.VideoFiles(CASES / name, frames, 32, **{
        "sampling": "segment", "train": False} | options)


def colours(dataset, index=0):
    """The colours of a clip's frames, as a set."""
    video = dataset[index]["video"].astype(int).mean(axis=(1, 2))
    return {"red" if frame[0] > frame[2] + 50 else "blue" for frame in video}


def names(dataset):
    return [next(iter(dataset.classes.values()))[label] for _, label in dataset.items]


@pytest.mark.parametrize("train", [True, False])
def test_rows_of_a_table_are_parts_of_its_videos(train):
    found = files("segments_csv/train.csv", train=train)
    assert len(found) == 4 and len({row.path for row in found.rows}) == 2
    assert found.rows[1].part == Part(4, 8)
    for index, name in enumerate(names(found)):
        for epoch in range(4 if train else 1):
            video = found[index, epoch]["video"].astype(int).mean(axis=(1, 2))
            assert {"red" if r > b + 50 else "blue" for r, _, b in video} == {name}


def test_captions_of_internvid_are_of_their_parts():
    found = files("internvid/InternVid-10M-FLT.jsonl")
    for index, caption in enumerate(found.captions):
        assert colours(found, index) == {caption.split()[1]}
    assert "not used: aesthetic_score, umt_score" in found.summary()


@pytest.mark.parametrize("name, count, classes", [
    ("rawframes/list.txt", 8, ("0", "1")), ("rawframes/data", 8, ("clap", "wave")),
    ("jester/jester-v1-train.csv", 4, ("Swiping Left", "Thumb Up"))])
def test_folders_of_pictures_are_videos(name, count, classes):
    found = files(name, frames=12, sampling="dense", stride=1)
    assert len(found) == count and found.classes == {"label": classes}
    assert all(Path(row.path).is_dir() for row in found.rows)
    item = found[0]["video"].astype(float)
    assert item.shape == (12, 32, 32, 3)
    assert len({frame.tobytes() for frame in item}) == 12  # every picture carries its number
    train, val = (data.VideoFiles(CASES / name, 2, 32, part=part) for part in ("train", "val"))
    assert not {row.path for row in train.rows} & {row.path for row in val.rows}


@pytest.mark.parametrize("name, classes", [
    ("numfolders/years", ("2019", "2020")), ("numfolders/one_to_three", ("1", "2", "3")),
    ("onebased/train.csv", ("1", "2"))])
def test_there_are_no_classes_that_nobody_has(name, classes):
    found = files(name)
    assert found.classes == {"label": classes} and not found.classes_without_clips()
    for row, got in zip(found.rows, names(found)):
        assert row.label == got


def test_no_list_takes_the_files_of_its_neighbour():
    with pytest.raises(DataError, match="none of its 4 files exists.*--video-folder .*ssv2"):
        files("sibling/jester/train.csv")
    found = files("sibling/jester/train.csv", video_folder=str(CASES / "sibling/ssv2"))
    assert len(found) == 4 and not found.missing and names(found)[:2] == ["left", "right"]


def test_joined_streams_have_all_their_frames_in_order_or_are_refused():
    """The first half of cat.ts is a.ts, the second b.ts: no frame of one among those of the other.

    Everything that reads the file agrees."""
    parts = []
    for name in ("a.ts", "b.ts"):
        with open_video(CASES / "video" / name) as video:
            parts.append(video.read(np.arange(video.info.frames)))
    try:
        with open_video(CASES / "video" / "cat.ts") as video:
            frames = video.read(np.arange(video.info.frames))
            assert video.count() == len(frames) == sum(map(len, parts))
    except DataError as error:
        assert "\n" not in str(error)
        with pytest.raises(DataError), open_video(CASES / "video" / "cat.ts") as video:
            video.count()
        return
    assert np.abs(frames.astype(int) - np.concatenate(parts)).mean() < 2


def test_groups_of_ucf101_are_not_split():
    train, val = (data.VideoFiles(CASES / "ucfgroups/UCF-101", 2, 32, part=part)
                  for part in ("train", "val"))
    groups = [{Path(row.path).name.rsplit("_c", 1)[0] for row in one.rows} for one in (train, val)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert "no official split" in train.summary() and len(val.classes_without_clips()) == 1


@pytest.mark.parametrize("name", ["hfmeta", "hfmeta/metadata.csv", "hfmeta/metadata.jsonl"])
def test_metadata_beside_files_are_their_captions(name):
    found = files(name)
    assert [(Path(row.path).name, row.caption) for row in found.rows] == [
        (f"{i}.mp4", f"a clip number {i}") for i in range(4)]


def test_captions_of_one_video_are_no_negatives():
    """Eight captions of each of two videos: each video has all its own captions as answers."""
    torch = pytest.importorskip("torch")
    found = files("manycaptions/train.json")
    assert len(found) == 16
    batch = data.collate([found[i] for i in range(16)])
    video = torch.nn.functional.one_hot(torch.tensor(
        [row.path.endswith("red.mp4") for row in found.rows]).long(), 2).float()
    scale = torch.tensor(20.0)
    loss = retrieval.pair_loss(video, video, scale, batch, gather=False)
    assert abs(loss - np.log(8)) < 1e-3  # a truth of eight equal answers has that entropy
    torch.manual_seed(0)
    assert loss < retrieval.pair_loss(torch.randn(16, 2), video, scale, batch, gather=False)


def test_questions_of_msrvtt_qa_find_videos_by_number():
    found = files("msrvttqa/val_qa.json")
    assert [(Path(row.path).name, row.answer) for row in found.rows[:2]] == [
        ("video6513.mp4", "cook"), ("video6513.mp4", "man")]
    assert not found.missing and found[0]["question"] == "what is a person doing?"


def test_sentences_of_msvd_and_paragraphs_of_didemo():
    found = files("msvd/AllVideoDescriptions.txt")
    assert [Path(row.path).stem for row in found.rows] == ["mv89psg6zh4_33_46"] * 2 + [
        "-_aaizdjMg_1_5"]
    assert found.captions[2] == "a man is cooking" and not found.missing
    content = json.loads((CASES / "didemo/test_data.json").read_text())
    found = files("didemo/test_data.json")
    texts = {}
    for entry in content:
        texts.setdefault(entry["video"], []).append(entry["description"])
    assert found.captions == [" ".join(text) for text in texts.values()]


LABELS = ["Laufen", "Springen"] * 2
NUMBERS = ["0", "1"] * 2


@pytest.mark.parametrize("name, labels", [
    ("semicolon.csv", LABELS), ("semicolon_nohead.csv", LABELS), ("utf16.csv", LABELS),
    ("bom_crlf.csv", LABELS), ("backslash.csv", NUMBERS), ("spaces.txt", NUMBERS),
    ("header_space.txt", NUMBERS), ("video_label_header.csv", NUMBERS),
    ("index_col.csv", ["run", "jump"] * 2), ("no_label.csv", None),
    ("names_with_commas.csv", ["punching, person", "running"] * 2)])
def test_lists_are_read_in_any_encoding_and_with_any_separator(name, labels):
    found = files(f"separators/{name}")
    assert len(found) == 4 and not found.missing and found[3]["video"] is not None
    assert names(found) == labels if labels else found.classes == {}


@pytest.mark.parametrize("name, reason", [
    ("cp1252.csv", "line 2: byte 0xdc is not UTF-8"), ("winabs.csv", "none of its 4 files exists")])
def test_what_cannot_be_known_is_refused(name, reason):
    with pytest.raises(DataError, match=reason):
        files(f"separators/{name}")


def test_a_quoted_caption_keeps_its_commas_and_quotes():
    assert read(CASES / "separators/quoted.csv").rows[0].caption == 'a man, who runs, "fast"'


def test_a_classifier_meets_other_classes_by_name(tmp_path, capsys):
    """clap, jump, wave: without jump the whole head is evaluated; xray it does not know."""
    import train
    tiny = ("--batch-size 4 --num-frames 2 --input-size 16 --workers 0 --precision fp32 "
            "--device cpu --no-figures").split()
    place = CASES / "classorder"
    assert train.main(["classify", *tiny, "--steps", "2", "--data", str(place / "train"),
                       "--out", str(tmp_path / "run")]) == 0

    def evaluate(name):
        capsys.readouterr()
        return train.main(["classify", *tiny, "--steps", "0", "--data", str(place / name),
                           "--weights", str(tmp_path / "run"), "--out", str(tmp_path / name)])

    assert evaluate("test_lacks_jump") == 0
    text = (tmp_path / "test_lacks_jump" / "predictions.csv").read_text()
    assert "class3" in text.splitlines()[0] and "jump" in text
    assert evaluate("test_other") == 2 and "does not know xray" in capsys.readouterr().err
