"""A part of a video is a video, and so is a folder of numbered pictures.

1. A part has the frames that a look at the whole file and a selection give, but in a file with an
   index nothing before it is read.
2. Frames whose timestamps repeat or jump back count in the order of decoding, everywhere alike.
3. Pictures of a folder are the frames of a video, in the order of their numbers.
"""

import json
import math
import os
import struct
import zlib

import numpy as np
import pytest

from test_odd_files import ROOT, VIDEOS, write
from video.annotations import DataError, read
from video.checking import check
from video.clips import Clips, one_clip
from video.decoding import Bytes, Part, Video, open_video, probe, read_clip
from video.frames import PictureVideo, is_frames_folder, picture_numbers

av = pytest.importorskip("av")
CASES = ROOT.parent / "shared" / "cases"
UNEVEN = np.cumsum(np.random.default_rng(1).integers(5, 300, 48))

# name -> (file, options of `write`, whether parts in seconds are found without reading all of it)
FILES = {
    "H.264 with B-frames": ("x.mp4", dict(bf="3"), True),
    "one keyframe": ("x.mp4", {"gop": 500, "x264-params": "scenecut=0"}, True),
    "open groups": ("x.mp4", {"x264-params": "open-gop=1:bframes=3:b-pyramid=2"}, True),
    "uneven": ("x.mp4", dict(times=UNEVEN), True),
    "a late start": ("x.mp4", dict(times=np.arange(48) * 100 + 7300), True),
    "an edit list": ("x.mp4", dict(times=np.arange(48) * 100 - 1750), True),
    "fragments": ("x.mp4", dict(
        container_options={"movflags": "frag_keyframe+empty_moov"}.items()), True),
    "Matroska": ("x.mkv", dict(times=UNEVEN), True),
    "HEVC": ("x.mp4", dict(codec="libx265", **{
        "x265-params": "log-level=none:pools=none:open-gop=1:keyint=10"}), True),
    "VP9": ("x.webm", dict(codec="libvpx-vp9", gop=12), True),
    "MPEG-4 in AVI": ("x.avi", dict(codec="mpeg4"), True),
    "MPEG-4 in AVI with B-frames": ("x.avi", dict(codec="mpeg4", bf="2"), True),
    "transport stream": ("x.ts", {}, False),
    "programme stream": ("x.mpg", dict(codec="mpeg2video", rate=25), False),
    "no timestamps": ("x.h264", {}, False),
}


def places(info):
    """(first, last) of parts: around a keyframe, at both ends, one frame long and many."""
    key = info.keyframes[len(info.keyframes) // 2] if info.keyframes else info.frames // 2
    starts = sorted({0, key - 1, key, key + 1, info.frames - 1} & set(range(info.frames)))
    return [(key, info.frames)] + [(first, min(first + length, info.frames))
                                   for first in starts for length in (1, 9)]


def parts(info, first, last):
    """Ways to name the frames from first to last."""
    times = (*info.timestamps, info.duration)
    before = times[first] - (times[first] - times[first - 1]) / 2 if first else 0
    behind = last == info.frames
    return [Part(first, math.inf if behind else last, in_frames=True),
            Part(times[first], math.inf if behind else times[last]),
            Part(before, 1e6 if behind else times[last] - 0.001)]


def is_selected(path, part, first, last, info, frames):
    """Everything about a part agrees with the frames first to last of the whole."""
    with open_video(path, None, part) as video:
        found = video.info
        assert found.frames == last - first and found.pts == info.pts[first:last]
        assert np.allclose(found.timestamps, np.subtract(info.timestamps[first:last],
                                                         info.timestamps[first]), atol=1e-9)
        assert found.keyframes == tuple(key - first for key in info.keyframes if
                                        first <= key < last)
        numbers = [found.frames - 1, 0, found.frames // 2]
        assert np.array_equal(video.read(numbers), frames[first:last][numbers])
        assert np.array_equal(np.stack(list(video.play())), frames[first:last])
        assert video.count() == last - first
    assert np.array_equal(read_clip(path, [0], info=found), frames[[first]])  # the part is known


@pytest.mark.parametrize("name", FILES)
def test_a_part_has_the_frames_that_a_full_read_and_a_selection_give(tmp_path, name, monkeypatch):
    file, options, indexed = FILES[name]
    if options.get("codec", "libx264") not in av.codecs_available:
        pytest.skip("this PyAV has no such encoder")
    path = write(tmp_path / file, frames=48, **options)
    info = probe(path)
    if name == "an edit list":
        assert info.frames == 30  # the first 18 are hidden
    frames, looks = read_clip(path, range(info.frames)), []
    look = Video._probe_all
    monkeypatch.setattr(Video, "_probe_all", lambda self: looks.append(self.part) or look(self))
    for first, last in places(info):
        for part in parts(info, first, last):
            is_selected(path, part, first, last, info, frames)
    assert indexed == all(part is None or part.in_frames for part in looks)


def test_a_part_in_seconds_of_a_file_with_an_index_reads_only_what_is_around_it(tmp_path,
                                                                               monkeypatch):
    path, seen = write(tmp_path / "x.mp4", frames=400, gop=10), []
    packets = Video._packets
    monkeypatch.setattr(Video, "_packets", lambda self: (
        seen.append(packet.pts) or packet for packet in packets(self)))
    with open_video(path, None, Part(30, 32)) as video:
        assert video.info.frames == 20 and video.read(range(20)).shape[0] == 20
    assert len(seen) < 100
    with open_video(Bytes("shard.tar/x.mp4", path.read_bytes()), None, Part(30, 32)) as video:
        assert video.info.frames == 20 and len(seen) < 200


@pytest.mark.parametrize("name", ["x.mp4", "x.ts", "pictures"])
@pytest.mark.parametrize("part, reason", [
    (Part(3, 4), "no frame in seconds 3 to 4; the video has 30 frames in 3.000 s"),
    (Part(1e300, 2e300), "no frame in seconds 1e+300"),
    (Part(30, 40, True), "no frame in frames 30 to 40; the video has 30 frames"),
    (Part(1.01, 1.02), "no frame in seconds 1.01 to 1.02"),
    (Part(2, 2), "cannot read seconds 2 to 2"), (Part(2, 1, True), "cannot read frames 2 to 1"),
    (Part(-1, 2), "must start at 0 or later"), (Part(-1, 2, True), "must start at 0 or later"),
    (Part(math.nan, 2), "cannot read seconds nan to 2")])
def test_a_part_without_a_frame_is_one_line_that_says_what_the_video_has(tmp_path, name, part,
                                                                        reason):
    path = picture_folder(tmp_path / name) if name == "pictures" else write(tmp_path / name)
    with pytest.raises(DataError) as error, open_video(path, None, part, rate=10) as video:
        video.info
    message = str(error.value)
    assert message.startswith(str(path)) and reason in message and "\n" not in message


def test_what_lies_behind_the_end_is_cut_off(tmp_path):
    path = write(tmp_path / "x.mp4")
    for part in (Part(2.5, 99), Part(25, 99, True), Part(2.5, math.inf)):
        with open_video(path, None, part) as video:
            assert video.info.frames == 5 and video.info.duration == pytest.approx(0.5)
            with pytest.raises(DataError, match="5 frames"):
                video.read([5])


@pytest.mark.parametrize("sampling", ["dense", "segment"])
def test_clips_of_a_part_never_show_a_frame_outside_of_it(tmp_path, sampling):
    path, clips = write(tmp_path / "x.mp4", frames=27), Clips()  # each is brighter than the last
    inside = read_clip(path, range(10, 21))[:, -1, [0, -1]].astype(int)
    for part in (Part(10, 21, True), Part(1, 2.1)):
        for key in (None, *((0, seed) for seed in range(20))):
            clips.prepare(4, (48, 64), stride=4, sampling=sampling, train=key is not None)
            shown = clips.clip(path, key, part)[:, -1, [0, -1]].astype(int)
            assert inside.min() - 3 < shown.min() and shown.max() < inside.max() + 3
    again = one_clip(path, 3, (48, 64), part=Part(10, 21, True))
    assert np.array_equal(again, one_clip(path, 3, (48, 64), part=Part(1, 2.1)))
    assert not np.array_equal(again, one_clip(path, 3, (48, 64)))


needs_samples = pytest.mark.skipif(not VIDEOS.is_dir(), reason="no sample videos (set VIDEOS)")


@needs_samples
@pytest.mark.slow
def test_parts_of_the_sample_videos_are_selections():
    for line in (VIDEOS / "videos.jsonl").read_text().splitlines():
        sample = json.loads(line)
        path, known = VIDEOS / sample["file"], sample["probe"]
        if not known.get("frames") or "error" in known or sample["file"] == "portrait_4k60.mp4":
            continue
        info = probe(path)
        for first, last in places(info)[::4]:
            wanted = sorted({first, (first + last) // 2, last - 1})
            expected = read_clip(path, wanted, 48, info)
            for part in parts(info, first, last):
                with open_video(path, None, part) as video:
                    assert video.info.pts == info.pts[first:last], (path, part)
                    found = video.read(np.subtract(wanted, first), 48)
                assert np.array_equal(found, expected), (path, part)


# ------------------------------------------------------------------ timestamps that tell nothing


@pytest.mark.parametrize("later", [0, 1550, 2750])
@pytest.mark.parametrize("options", [{}, {"bf": "0"}])
def test_joined_transport_streams_count_in_the_order_of_decoding(tmp_path, later, options):
    """`cat a.ts b.ts`: all times of the second repeat those of the first, or some fall between."""
    halves = [write(tmp_path / name, times=np.arange(30) * 100 + start, **options)
              for name, start in (("a.ts", 0), ("b.ts", later))]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(half.read_bytes() for half in halves))
    frames = np.concatenate([read_clip(half, range(30)) for half in halves])
    info = probe(path)
    assert (info.frames, info.pts, info.keyframes) == (60, (), ())
    assert np.allclose(info.timestamps, np.arange(60) / 10) and info.fps == pytest.approx(10)
    assert np.array_equal(read_clip(path, range(60)), frames)
    assert np.array_equal(read_clip(path, [45, 3, 0]), frames[[45, 3, 0]])
    assert np.array_equal(read_clip(path, [0.31, 4.5]), frames[[3, 45]])
    with Video(path) as video:
        assert np.array_equal(np.stack(list(video.play())), frames) and video.count() == 60
    for part in (Part(25, 40, True), Part(2.5, 4)):
        is_selected(path, part, 25, 40, info, frames)
    (tmp_path / "list.txt").write_text("joined.ts 0\n")
    rows = read(tmp_path / "list.txt").rows
    assert [result["bad"] for result in check(rows)] == [None]


@pytest.mark.skipif(not (CASES / "video").is_dir(), reason="no cases beside the repository")
def test_the_two_streams_of_the_collection_of_cases_follow_each_other():
    halves = [read_clip(CASES / "video" / name, range(32)) for name in ("a.ts", "b.ts")]
    assert np.array_equal(read_clip(CASES / "video" / "cat.ts", range(64)),
                          np.concatenate(halves))


def test_a_time_jump_forward_keeps_its_times(tmp_path):
    """A recording that was interrupted is legal; nothing repeats."""
    halves = [write(tmp_path / name, times=np.arange(30) * 100 + start)
              for name, start in (("a.ts", 0), ("b.ts", 60_000))]
    (tmp_path / "x.ts").write_bytes(b"".join(half.read_bytes() for half in halves))
    info = probe(tmp_path / "x.ts")
    assert info.frames == 60 == len(info.pts) and 59 < info.timestamps[30] < 61


# ------------------------------------------------------------------------------ folders of pictures


def picture(path, level=100, height=16, width=24):
    """Write a picture of one grey level whose upper left corner is white."""
    values = np.full((height, width, 3), level, np.uint8)
    values[:height // 2, :width // 2] = 255
    written = path.with_suffix(path.suffix.lower())
    av.VideoFrame.from_ndarray(values, format="rgb24").save(str(written))
    written.rename(path)


def picture_folder(folder, names=tuple(f"img_{n:05d}.png" for n in range(1, 31)), **options):
    """Pictures whose level is 10 + 4 times their place in `names`."""
    folder.mkdir()
    for place, name in enumerate(names):
        picture(folder / name, 10 + 4 * place, **options)
    return folder


def levels(frames):
    return ((frames[:, -1, -1, 0].astype(int) - 10) / 4).round().astype(int).tolist()


@pytest.mark.parametrize("names", [
    [f"img_{n:05d}.png" for n in range(1, 13)], [f"{n}.png" for n in range(12)],
    [f"frame{n}.PNG" for n in range(95, 107)], [f"v_001_x264_{10 * n}.png" for n in range(12)],
    [f"Image-{n:03d}.jpg" for n in range(1, 13)]])
def test_pictures_follow_each_other_by_their_number(tmp_path, names):
    folder = picture_folder(tmp_path / "v", names)
    (folder / "notes_1.txt").write_text("not a picture")
    with open_video(folder, rate=5) as video:
        info = video.info
        assert isinstance(video, PictureVideo) and (info.height, info.width) == (16, 24)
        assert (info.frames, info.fps, info.duration) == (12, 5, pytest.approx(2.4))
        assert np.allclose(info.timestamps, np.arange(12) / 5)
        assert levels(video.read(range(12))) == list(range(12)) == levels(np.stack(list(
            video.play())))
        assert levels(video.read([11, 0, 0])) == [11, 0, 0] and levels(video.read([2.0])) == [10]
        assert video.read([0, 1], 8).shape == (2, 8, 12, 3) and video.count() == 12
        with pytest.raises(DataError, match="12 frames"):
            video.read([12])


def test_parts_of_pictures_count_from_the_first_picture_or_use_the_rate(tmp_path):
    folder = picture_folder(tmp_path / "v")
    for part in (Part(5, 9, True), Part(0.5, 0.9), Part(0.45, 0.81)):
        with open_video(folder, None, part, rate=10) as video:
            assert levels(video.read(range(4))) == [5, 6, 7, 8] and video.info.frames == 4
            assert video.info.timestamps == pytest.approx((0, 0.1, 0.2, 0.3))
    with open_video(folder, None, Part(28, 99, True), rate=10) as video:
        assert levels(video.read(range(2))) == [28, 29] and video.count() == 2
    clips = Clips()
    clips.prepare(2, (16, 24), sampling="segment", train=False, frame_rate=10)
    assert levels(clips.clip(folder, None, Part(0.5, 0.9))) == [5, 7]
    with pytest.raises(DataError, match="frame_rate"):
        clips.prepare(2, (16, 24), frame_rate=0)


@pytest.mark.parametrize("names, reason", [
    (["flow_x_00001.jpg", "flow_x_00002.jpg", "flow_y_00001.jpg"], "2 kinds"),
    (["cat_1.jpg", "dog_1.jpg"], "pictures of 2 kinds (cat_1.jpg, dog_1.jpg)"),
    (["img_1.jpg", "img_2.jpg", "image_1.jpg"], "2 kinds"),
    (["img_00001.jpg", "img_00002.jpg", "img_00004.jpg"], "picture 3 is missing after img_00002"),
    (["0.png", "10.png", "30.png"], "picture 20 is missing after 10.png"),
    (["img_1.jpg", "img_01.jpg"], "two pictures of number 1")])
def test_pictures_in_no_clear_order_are_one_line(tmp_path, names, reason):
    folder = picture_folder(tmp_path / "v", names)
    with pytest.raises(DataError) as error, open_video(folder):
        pass
    message = str(error.value)
    assert message.startswith(str(folder)) and reason in message and "\n" not in message


def test_flow_beside_the_pictures_is_not_looked_at(tmp_path):
    names = ["flow_x_00001.jpg", "flow_y_00001.jpg", "img_00002.jpg", "img_00001.jpg",
             ".img_00003.jpg"]
    assert picture_numbers(names) == [(1, "img_00001.jpg"), (2, "img_00002.jpg")]
    assert picture_numbers(["notes.txt"]) == []


def test_a_folder_of_frames_is_known_by_its_names(tmp_path):
    for names, known in (([], False), (["img_1.jpg"], False), (["a.jpg", "b.jpg"], False),
                         (["x_1.jpg", "y_1.jpg"], False), (["1.jpg", "2.jpg"], True),
                         (["00001.jpg", "10001.jpg"], True), (["1.mp4", "2.mp4"], False),
                         (["flow_x_1.jpg", "flow_x_2.jpg"], True)):
        folder = tmp_path / f"v{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"")  # nothing is decoded
        assert is_frames_folder(folder) == known, names
    assert not is_frames_folder(tmp_path / "none")


def test_what_is_wrong_with_a_picture_names_it(tmp_path):
    folder = picture_folder(tmp_path / "v", [f"img_{n}.png" for n in range(4)])
    picture(folder / "img_2.png", height=20)
    with open_video(folder) as video:
        with pytest.raises(DataError, match="img_2.png: has 24 x 20 pixels, but .* 24 x 16"):
            video.count()
    (folder / "img_2.png").write_bytes(b"no picture")
    with open_video(folder) as video:
        assert levels(video.read([3])) == [3]
        with pytest.raises(DataError, match="img_2.png: damaged"):
            video.read([1, 2])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no numbered pictures"), \
            open_video(tmp_path / "empty"):
        pass
    with pytest.raises(DataError, match="rate above 0"):
        open_video(folder, rate=0)


def turned(path):
    """Tell a JPEG's reader to turn it by a quarter: Exif 2.3 Sec. 4.6.4, tag 0x112, value 6."""
    content = path.read_bytes()
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x112, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0" + tiff
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
                     + content[2:])


def deep(path, level):
    """A PNG of 16 bits a channel."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    rows = b"".join(b"\0" + struct.pack(">H", 257 * level) * 3 * 24 for _ in range(16))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2,
                                                                      0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_a_picture_in_a_folder_looks_like_the_same_picture_alone(tmp_path):
    """Turned by its camera, in 16 bits, grey, as JPEG."""
    folder = tmp_path / "turned"
    folder.mkdir()
    for n in (1, 2):
        picture(folder / f"{n}.jpg", 50)
        turned(folder / f"{n}.jpg")
    with open_video(folder) as video:
        found = video.read([1])
        assert np.array_equal(found, read_clip(folder / "2.jpg", [0]))
    assert found.shape == (1, 24, 16, 3) and found[0, 0, -1, 0] > 200 > 100 > found[0, 0, 0, 0]
    folder = tmp_path / "deep"
    folder.mkdir()
    for n in (1, 2):
        deep(folder / f"{n}.png", 90 * n)
    with open_video(folder) as video:
        found = video.read([0, 1])
        assert np.array_equal(found[1:], read_clip(folder / "2.png", [0]))
    assert np.abs(found.astype(int).mean((1, 2, 3)) - (90, 180)).max() <= 1
