"""What data.py promises, in this order.

1. A video file gives the same frames however we get at them, upright, and says what is wrong.
2. Lists and folders are read as people write them; bad files are named, never replaced in silence.
3. A batch is a function of (seed, step), whatever the workers and wherever the run began.
"""

import contextlib
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import VideoFiles, batches, held_out, spread
from video import annotations, loading, segments
from video.annotations import DataError, split_files
from video.checking import check
from video.clips import GREY
from video.decoding import Video, is_shown, probe, read_clip
from video.features import read_features
from video.loading import dead_worker
from video.sampling import SAMPLINGS, choose_frames, dense_indices, segment_indices
from video.shards import describe_sample
from video.transforms import TRANSFORMS, crop_frames, normalise
from video.moving_shapes import MovingShapes

torch.set_num_threads(1)


# ------------------------------------------------------------------------------- one video file


def write_video(path, frames=40, width=64, height=48, fps=10, gop=12, codec="libx264", **options):
    """A video whose grey level encodes the frame number, with B-frames and several keyframes; the
    upper left corner is red, to tell which way is up."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = gop
        stream.options = {"threads": "1", **options}
        for number in range(frames):
            picture = np.full((height, width, 3), 30 + 5 * number % 200, np.uint8)
            picture[:height // 4, :width // 4] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def turn_in_header(path, cosine, sine):
    """Write a rotation into the display matrix of an mp4's track header, as a phone does."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO 14496-12 Sec. 8.3.2, "Track Header Box"
    assert content[matrix:matrix + 4] == b"\0\1\0\0"  # 1.0 in 16.16: found the unit matrix
    for place, value in ((0, cosine), (1, sine), (3, -sine), (4, cosine)):
        at = matrix + 4 * place
        content[at:at + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    return path


def decode_everything(path):
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good videos and three bad ones."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a.mp4", 40), ("b.mkv", 24), ("c d.mp4", 12)):
        write_video(folder / name, frames)
    (folder / "text.mp4").write_text("this is not a video\n")
    whole = (folder / "a.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[:len(whole) // 2])
    return folder


@pytest.mark.parametrize("name, codec, gop", [
    ("x.mp4", "libx264", 12), ("x.mkv", "libx264", 5), ("x.webm", "libvpx", 9),
    ("x.webm", "libvpx-vp9", 9), ("x.avi", "mpeg4", 6), ("x.h264", "libx264", 12)])
def test_any_frames_equal_those_of_a_full_decode(tmp_path, name, codec, gop):
    """After a seek, with B-frames, hidden reference frames, or without any timestamp."""
    path = write_video(tmp_path / name, codec=codec, gop=gop)
    everything, info, rng = decode_everything(path), probe(path), np.random.default_rng(0)
    assert info.frames == len(everything) == len(info.timestamps) == 40
    assert (info.width, info.height) == (64, 48)
    assert np.array_equal(read_clip(path, range(40)), everything)
    for _ in range(12):
        first = rng.integers(40)
        numbers = rng.integers(first, 40, 5)  # unordered, with repeats
        assert np.array_equal(read_clip(path, numbers, info=info), everything[numbers])
        times = np.array(info.timestamps)[numbers]
        assert np.array_equal(read_clip(path, times, info=info), everything[numbers])


@pytest.mark.parametrize("codec, head, tail, shown", [
    ("vp8", 0x10, 0, True), ("vp8", 0x01, 0, False),
    ("vp9", 0x86, 0, True), ("vp9", 0x84, 0, False), ("vp9", 0x88, 0, True),  # profile 0
    ("vp9", 0x96, 0, True), ("vp9", 0x94, 0, False),  # profile 2, 10 bits
    ("vp9", 0xB3, 0, True), ("vp9", 0xB2, 0, False),  # profile 3
    ("vp9", 0x84, 0xC1, True),  # a superframe: hidden and shown frame in one packet
    ("h264", 0x00, 0, True)])
def test_reference_frames_that_are_never_shown_are_not_counted(codec, head, tail, shown):
    """Encoders in two passes store them as packets of their own, with times of their own; a WebM
    file counted by packets then promises frames that no decoder returns."""
    class Packet(bytes):
        is_discard, size = False, 2
    assert is_shown(Packet([head, tail]), codec) == shown


def test_a_time_gives_the_frame_on_show_at_that_time(folder):
    path = folder / "a.mp4"  # 40 frames at 10 per second
    info = probe(path)
    assert (info.fps, info.duration, info.timestamps[0]) == pytest.approx((10, 4, 0))
    by_time = read_clip(path, [0.0, 0.1, 0.199, 1.25, 3.99])
    assert np.array_equal(by_time, read_clip(path, [0, 1, 1, 12, 39]))


def test_a_seek_decodes_less_than_the_whole_file(folder, monkeypatch):
    """Frame 30 is reached from the last keyframe before it."""
    starts = []
    seek = Video._seek
    monkeypatch.setattr(Video, "_seek", lambda self, pts: starts.append(
        self.info.pts.index(pts)) or seek(self, pts))
    first, second, third, last = probe(folder / "a.mp4").keyframes
    read_clip(folder / "a.mp4", [third + 1])
    read_clip(folder / "a.mp4", [5])
    assert starts == [third, first]
    read_clip(folder / "a.mp4", [2, 5, last + 1])  # the frames between are of no use
    assert starts[2:] == [first, last]


def test_frames_are_resized_as_asked(folder):
    path = folder / "a.mp4"
    assert read_clip(path, [0, 1]).shape == (2, 48, 64, 3)
    assert read_clip(path, [0], 24).shape == (1, 24, 32, 3)
    assert read_clip(path, [0], (20, 30)).shape == (1, 20, 30, 3)
    assert abs(int(read_clip(path, [9], 24)[0, 20, 20, 0]) - (30 + 45)) < 8


@pytest.mark.parametrize("cosine, sine, corner", [
    (1, 0, (0, 0)), (0, 1, (0, -1)), (-1, 0, (-1, -1)), (0, -1, (-1, 0))])
def test_a_rotated_video_is_turned_upright(tmp_path, cosine, sine, corner):
    """A phone stores the picture as the sensor sees it, and a matrix that says how to show it."""
    path = turn_in_header(write_video(tmp_path / "phone.mp4", 3), cosine, sine)
    info = probe(path)
    expected = (48, 64) if cosine else (64, 48)
    frame = read_clip(path, [0])[0]
    assert (info.height, info.width) == expected == frame.shape[:2]
    red = frame[corner].astype(int)
    assert red[0] > 180 and red[1] < 80
    assert read_clip(path, [0], 24).shape[1:3] == tuple(side // 2 for side in expected)
    assert read_clip(path, [0], (10, 20)).shape == (1, 10, 20, 3)


@pytest.mark.parametrize("name, wanted, reason", [
    ("missing.mp4", [0], "no such file"), ("text.mp4", [0], "not a readable video"),
    ("truncated.mp4", [0], "not a readable video"), ("a.mp4", [40], "40 frames"),
    ("a.mp4", [-1], "frames"), ("a.mp4", [4.1], "4.000 s"), ("a.mp4", [], "frames must be"),
    ("a.mp4", ["x"], "frames must be"), ("a.mp4", [float("nan")], "nan")])
def test_what_cannot_be_read_is_one_line_that_names_the_file(folder, name, wanted, reason):
    with pytest.raises(DataError) as error:
        read_clip(folder / name, wanted)
    message = str(error.value)
    assert message.startswith(str(folder / name)) and reason in message and "\n" not in message


def test_damage_spoils_only_the_frames_that_depend_on_it(tmp_path):
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "damaged.mp4", frames=30, gop=10, bf="0")
    everything = decode_everything(path)
    with av.open(str(path)) as container:
        packet = next(itertools.islice(container.demux(video=0), 3, None))
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place:place + size] = b"\xff" * size
    path.write_bytes(content)
    assert np.array_equal(read_clip(path, [25, 29]), everything[[25, 29]])
    with pytest.raises(DataError, match="damaged.mp4: damaged") as error:
        read_clip(path, [0, 8])
    assert "\n" not in str(error.value)


def test_a_file_without_a_picture_says_so(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = np.zeros((1, 800), np.int16)
        sound = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="no video stream"):
        probe(tmp_path / "sound.mkv")


# ------------------------------------------------------------------------------ choosing frames


def test_dense_sampling_keeps_its_stride_inside_the_video():
    assert dense_indices(100, 16, 4).tolist() == list(range(18, 82, 4))
    starts = {tuple(dense_indices(70, 16, 4, np.random.default_rng(i))) for i in range(200)}
    assert {s[0] for s in starts} == set(range(7)) and {s[-1] - s[0] for s in starts} == {60}
    assert dense_indices(5, 4, 2).tolist() == [0, 2, 4, 4]
    assert dense_indices(1, 4, 2, np.random.default_rng(0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("n, frames", [(100, 8), (17, 16), (16, 16), (5, 16), (1, 3)])
def test_segment_sampling_takes_one_frame_from_each_segment(n, frames):
    edges = [i * n // frames for i in range(frames + 1)]
    drawn = [segment_indices(n, frames)]
    drawn += [segment_indices(n, frames, np.random.default_rng(i)) for i in range(50)]
    for indices in drawn:
        assert all(a <= i < max(b, a + 1) and i < n for a, b, i in zip(edges, edges[1:], indices))


def views_in_time(name, n, frames, stride=4, clips=1, **options):
    """The chosen frames of each view in time, as lists."""
    return [choose_frames(name, n, frames, stride, view=(clip, clips), **options).tolist()
            for clip in range(clips)]


@pytest.mark.parametrize("name, n, frames, stride, clips, expected", [
    ("dense", 100, 4, 4, 3, [[0, 4, 8, 12], [42, 46, 50, 54], [84, 88, 92, 96]]),
    # windows of the list 0, 4, 8, 12, 16
    ("videomae-dense", 20, 4, 4, 2, [[0, 4, 8, 12], [4, 8, 12, 16]]),
    ("videomae-dense", 9, 4, 4, 2, [[0, 4, 8, 8], [0, 4, 8, 8]]),
    ("videomae-dense", 100, 4, 4, 1, [[42, 47, 52, 57]]),  # spacing 16/3: the 4 frames span all 16
    # ticks of 8, halves of a tick
    ("videomae-segment", 32, 4, 4, 2, [[0, 8, 16, 24], [4, 12, 20, 28]]),
    ("videomae-pretrain", 6, 4, 4, 1, [[0, 4, 4, 4]]),
    ("uniformerv2", 33, 4, 4, 1, [[4, 12, 20, 28]]),
    ("uniformerv2", 33, 4, 4, 3, [[2, 10, 18, 26], [4, 12, 20, 28], [6, 14, 22, 30]]),
    ("internvideo", 32, 4, 4, 1, [[3, 11, 19, 27]]),
    ("internvideo-demo", 33, 5, 4, 1, [[0, 8, 16, 24, 32]]),
    ("viclip", 33, 4, 4, 1, [[0, 8, 16, 24]]),
    ("segment", 32, 4, 4, 1, [[3, 11, 19, 27]])])
def test_official_samplers_choose_the_frames_that_their_rules_give(name, n, frames, stride, clips,
                                                                   expected):
    """Worked out by hand from the published rules."""
    assert views_in_time(name, n, frames, stride, clips) == expected


def test_retrieval_takes_a_frame_a_second_and_at_most_so_many():
    assert views_in_time("retrieval", 100, 12, fps=29.97) == [[0, 30, 60, 90] + 8 * [90]]
    assert views_in_time("retrieval", 100, 3, fps=10.0) == [[0, 40, 90]]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 64, 65, 300])
def test_every_sampler_stays_inside_the_video_and_goes_forward(name, n):
    views = [choose_frames(name, n, 16, rng=np.random.default_rng(i)) for i in range(20)]
    views += [choose_frames(name, n, 16, view=(clip, clips)) for clips in (1, 2, 5)
              for clip in range(clips)]
    for numbers in views:
        assert numbers.shape == (16,) and numbers.dtype.kind == "i"
        assert 0 <= numbers.min() and numbers.max() < n and (np.diff(numbers) >= 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64)])
def test_every_transform_gives_the_size_asked_for(name, shape):
    video = np.random.default_rng(0).integers(256, size=(3, *shape, 3), dtype=np.uint8)
    state = torch.get_rng_state()
    for rng in (None, np.random.default_rng(0)):
        found = crop_frames(name, video, (56, 56), rng)
        assert found.shape == (3, 56, 56, 3) and found.dtype == np.uint8
    again = crop_frames(name, video, (56, 56), np.random.default_rng(0))
    assert np.array_equal(found, again) and torch.equal(torch.get_rng_state(), state)


def gradient(height, width):
    """Columns count from 0: where a pixel came from can be read off its value."""
    columns = np.broadcast_to(np.arange(width)[:, None], (2, height, width, 3))
    return columns.astype(np.uint8)


@pytest.mark.parametrize("name, first, last", [
    # 56 x 56 of 56 x 200: what is left of the columns
    ("videomae", 72, 127), ("uniformerv2", 72, 127), ("clip", 72, 127),
    # squashed to 64 x 64 first: columns 4 to 59 of 64, each 200 / 64 wide
    ("internvideo", 14, 185),
    ("viclip", 1, 198),  # all of it, squashed to 56
    ("internvideo-demo", 75, 123)])  # short side 64 by nearest pixel, columns 86 to 141 of 228
def test_transforms_cut_what_their_recipes_cut(name, first, last):
    found = crop_frames(name, gradient(56, 200), (56, 56))[0, 28, :, 0].astype(int)
    assert abs(found[0] - first) <= 1 and abs(found[-1] - last) <= 1 and (np.diff(found) >= 0).all()


def test_three_crops_are_the_ends_and_the_centre_of_the_longer_side():
    wide = gradient(56, 200)
    starts = [int(crop_frames("videomae", wide, (56, 56), crop=crop, crops=3)[0, 0, 0, 0])
              for crop in range(3)]
    assert starts == [0, 72, 144]
    high = wide.transpose(0, 2, 1, 3)
    starts = [int(crop_frames("uniformerv2", high, (56, 56), crop=crop, crops=3)[0, 0, 0, 0])
              for crop in range(3)]
    assert starts == [0, 72, 144]
    odd = gradient(56, 201)  # 145 columns to spare: VideoMAE rounds the centre down, UniFormerV2 up
    assert [int(crop_frames(name, odd, (56, 56))[0, 0, 0, 0])
            for name in ("videomae", "uniformerv2")] == [72, 73]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_files_are_read_with_every_sampler_and_transform(folder, sampling):
    for transform in TRANSFORMS:
        for train in (True, False):
            files = VideoFiles(folder / "b.mkv", 4, 32, sampling=sampling, transform=transform,
                               train=train)
            assert files[0]["video"].shape == (4, 32, 32, 3)


# ---------------------------------------------------------------------------- many video files


@pytest.mark.parametrize("text, labels, classes", [
    ("a.mp4 1\nb.mkv 0\nc d.mp4 2\n", [1, 0, 2], ["0", "1", "2"]),
    ("a.mp4,1\nb.mkv,0\n\nc d.mp4,2", [1, 0, 2], ["0", "1", "2"]),
    ("a.mp4\trun\nb.mkv\tjump high\nc d.mp4\trun\n", [1, 0, 1], ["jump high", "run"]),
    ("a.mp4::run\r\nb.mkv::jump\r\nc d.mp4::run", [1, 0, 1], ["jump", "run"]),
    ("path label\na.mp4 run\nb.mkv jump\nc d.mp4 run", [1, 0, 1], ["jump", "run"]),
    ("label,path,caption\nrun,a.mp4,\"one, two\"\njump,b.mkv,x\nrun,c d.mp4,y",
     [1, 0, 1], ["jump", "run"]),
    ("\ufeffpath\tlabel\na.mp4\t3\nb.mkv\t0\nc d.mp4\t0", [1, 0, 0], ["0", "3"]),
    ("a.mp4\nb.mkv\nc d.mp4\n", [None] * 3, []),
    ('"a.mp4", run\n"b.mkv", jump\n"c d.mp4", run', [1, 0, 1], ["jump", "run"]),
])
def test_lists_are_read_as_people_write_them(folder, text, labels, classes):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    files = VideoFiles(folder / "list.csv", 2, 16)
    paths = [str(folder / name) for name in ("a.mp4", "b.mkv", "c d.mp4")]
    assert files.items == list(zip(paths, labels))
    assert files.classes == ({"label": tuple(classes)} if classes else {}) and not files.missing
    assert files.captions == (["one, two", "x", "y"] if "caption" in text else None)
    assert ": 3 videos" in files.summary()
    assert ("missing numbers are no classes" in files.summary()) == (classes == ["0", "3"])


@pytest.mark.parametrize("text, reason", [
    ("", "empty"), ("a.mp4 1\nb 2\n", "line 2"), ("hello world\nfoo bar", "line 1"),
    ("nope.mp4 1\n", "none of its 1 files exists"), ("path,label\na.mp4,1,2\n", "line 2"),
    ("a.mp4 swim\n", "'swim' is not among")])
def test_a_wrong_list_is_one_line_that_names_the_place(folder, text, reason):
    (folder / "wrong.txt").write_text(text)
    with pytest.raises(DataError) as error:
        VideoFiles(folder / "wrong.txt", 2, 16, classes=["jump", "run"])
    message = str(error.value)
    assert reason in message and "wrong.txt" in message and "\n" not in message


def test_folders_of_videos_are_classes(tmp_path):
    for name in ("run/x.mp4", "jump/deep/y.avi", "jump/.hidden.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    files = VideoFiles(tmp_path, 2, 16)
    assert files.classes == {"label": ("jump", "run")}
    assert files.items == [(str(tmp_path / "jump/deep/y.avi"), 0), (str(tmp_path / "run/x.mp4"), 1)]
    (tmp_path / "z.mp4").write_text("")
    flat = VideoFiles(tmp_path, 2, 16)
    assert flat.classes == {} and {label for _, label in flat.items} == {None}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no video below"):
        VideoFiles(tmp_path / "empty", 2, 16)
    with pytest.raises(DataError, match="no such file or folder"):
        VideoFiles(tmp_path / "gone", 2, 16)


def test_split_folders_are_not_mistaken_for_classes(tmp_path):
    for name in ("train/run/x.mp4", "val/run/y.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="looks like a split"):
        VideoFiles(tmp_path, 2, 16)


def test_training_and_validation_parts_share_no_file():
    items = [(f"{i}.mp4", None) for i in range(25)]
    train, held = split_files(items)
    assert len(held) == 2 and sorted(train + held) == sorted(items)
    assert split_files(items) == (train, held)
    assert [len(part) for part in split_files(items[:2])] == [1, 1]
    assert split_files(items[:1]) == (items[:1], items[:1])


def test_training_crops_are_random_by_index_and_epoch_and_leave_the_global_state_alone(folder):
    files = VideoFiles(folder / "a.mp4", 4, (32, 40), stride=2)
    state = torch.get_rng_state()
    one, again, later = files[0], files[0], files[0, 1]
    assert torch.equal(torch.get_rng_state(), state)
    assert one["video"].shape == (4, 32, 40, 3) and one["labels"] == {}
    assert np.array_equal(one["video"], again["video"])
    assert not np.array_equal(one["video"], later["video"])


def test_the_views_of_a_test_are_the_centre_then_clips_by_crops_from_end_to_end(tmp_path):
    path = write_video(tmp_path / "wide.mp4", frames=30, width=96, height=48)
    one = VideoFiles(path, 4, 48, stride=2, train=False)[0]["video"]
    many = VideoFiles(path, 4, 48, stride=2, train=False, views=(3, 3))[0]["video"]
    assert many.shape == (10, 4, 48, 48, 3) and (many[0] == one).all()
    assert (many[5] == one).all(), "the middle clip's middle crop is the centre"
    info = probe(path)
    for clip, start in enumerate((0, 11, 22)):
        whole = read_clip(path, start + 2 * np.arange(4), (48, 96), info)
        for crop, left in enumerate((0, 24, 48)):
            assert (many[1 + 3 * clip + crop] == whole[:, :, left:left + 48]).all()


def test_clips_of_a_test_lie_between_the_ends_of_each_segment():
    assert segment_indices(40, 4, view=(0, 1)).tolist() == segment_indices(40, 4).tolist()
    views = [segment_indices(40, 4, view=(clip, 3)).tolist() for clip in range(3)]
    assert views == [[2, 12, 22, 32], [4, 14, 24, 34], [6, 16, 26, 36]]
    assert dense_indices(100, 4, 5, view=(0, 2)).tolist() == [0, 5, 10, 15]
    assert dense_indices(100, 4, 5, view=(1, 2)).tolist() == [80, 85, 90, 95]
    assert dense_indices(10, 4, 5, view=(1, 2)).tolist() == dense_indices(10, 4, 5).tolist()


def test_augmentation_treats_all_frames_of_a_clip_alike(tmp_path):
    import av
    path = tmp_path / "still.avi"
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    still = VideoFiles(path, 6, 32, stride=1, operations=4, magnitude=9, erasing=1.0, area=0.08)
    clips = [still[0, epoch]["video"] for epoch in range(12)]
    for video in clips:
        assert (video == video[:1]).all()
    assert len({video.tobytes() for video in clips}) == 12
    assert all((video == GREY).all(axis=-1)[0].sum() > 8 for video in clips), "a grey box in each"
    assert (still[0, 3]["video"] == clips[3]).all()


def test_repeated_augmentation_puts_clips_of_one_video_side_by_side(folder):
    files = VideoFiles(folder, 2, 24, stride=1)
    plain = list(batches(files, 4, 0, 3))
    twice = list(batches(files, 4, 0, 3, repeats=2))
    for batch in twice:
        assert batch["path"][0::2] == batch["path"][1::2]
        assert not torch.equal(batch["video"][0], batch["video"][1])
    assert [p for batch in twice for p in batch["path"][0::2]] == [p for batch in plain
                                                                   for p in batch["path"]][:6]
    assert torch.equal(next(iter(batches(files, 4, 0, 3, start=1, repeats=2)))["video"],
                       twice[1]["video"])
    with pytest.raises(DataError, match="endless"):
        next(batches(MovingShapes("train", 2, 24), 4, 0, 3, repeats=2))


def test_evaluation_takes_the_centre(folder):
    files = VideoFiles(folder / "a.mp4", 4, 48, stride=2, train=False)
    centre = read_clip(folder / "a.mp4", [16, 18, 20, 22])[:, :, 8:56]
    assert np.array_equal(files[0]["video"], centre)


def test_training_names_and_skips_a_bad_file_evaluation_never_replaces_it(folder):
    """Official loaders put another random video in its place even in a test (VideoMAE
    kinetics.py:118), which makes an accuracy of something that was never measured."""
    (folder / "mixed.txt").write_text("text.mp4 0\nmissing.mp4 1\na.mp4 2\n")
    train = VideoFiles(folder / "mixed.txt", 2, 16)
    assert train.missing == [str(folder / "missing.mp4")] and "1 MISSING" in train.summary()
    item = train[0]
    assert item["path"].endswith("a.mp4") and item["labels"] == {"label": 2}
    assert [path for path, _ in item["bad"]] == [
        str(folder / "text.mp4"), str(folder / "missing.mp4")]
    test = VideoFiles(folder / "mixed.txt", 2, 16, train=False)
    assert test[0]["video"] is None and test[0]["labels"] == {"label": 0}
    assert len(test[0]["bad"]) == 1
    assert test[2]["video"].shape == (2, 16, 16, 3) and test[2]["bad"] == []
    for batch_size in (1, 2, 3):
        seen = list(held_out(test, None, batch_size))
        assert sum(len(b["path"]) for b in seen) == 1 and sum(len(b["bad"]) for b in seen) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_clear_line(folder, workers):
    (folder / "bad.txt").write_text("text.mp4 0\ntruncated.mp4 1\n")
    with pytest.raises(DataError, match="none of its 2 files can be read") as error:
        next(batches(VideoFiles(folder / "bad.txt", 2, 16), 2, 0, steps=1, workers=workers))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="none of the 2 held-out clips"):
        list(held_out(VideoFiles(folder / "bad.txt", 2, 16, train=False), 9, 2, workers))


# -------------------------------------------------------------------------------------- batches


def same(one, two):
    if torch.is_tensor(one):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return one == two


def sources(folder):
    (folder / "good.txt").write_text("a.mp4 0\ntext.mp4 1\nb.mkv 1\nc d.mp4 2\n")
    return MovingShapes("train", 4, 32), VideoFiles(folder / "good.txt", 4, 32, stride=1)


@pytest.mark.parametrize("which", [0, 1])
def test_batches_are_the_same_for_any_workers_and_after_a_resume(folder, which):
    dataset = sources(folder)[which]
    reference = list(batches(dataset, 3, seed=5, steps=6))
    assert len(reference) == 6 and reference[0]["video"].shape == (3, 4, 32, 32, 3)
    assert reference[0]["video"].dtype == torch.uint8
    assert {labels.dtype for labels in reference[0]["labels"].values()} == {torch.int64}
    for other in (batches(dataset, 3, seed=5, steps=6, workers=2),
                  itertools.chain(batches(dataset, 3, 5, 2), batches(dataset, 3, 5, 6, start=2))):
        other = list(other)
        assert len(other) == 6 and all(map(same, reference, other))


def test_the_ranks_of_a_step_share_out_the_batch_of_one_process(folder):
    world = MovingShapes("train", 2, 32)
    whole = list(batches(world, 6, 0, 2))
    parts = [list(batches(world, 3, 0, 2, rank=rank, world=2)) for rank in (0, 1)]
    for step in range(2):
        assert torch.equal(torch.cat([part[step]["video"] for part in parts]), whole[step]["video"])


def test_an_epoch_visits_every_item_once_in_an_order_of_its_own():
    class Numbers:
        def __len__(self):
            return 10

        def __getitem__(self, index_and_epoch):
            return {"video": np.zeros((1, 1, 1, 3), np.uint8), "labels": {"n": index_and_epoch[0]}}

    labels = torch.cat([batch["labels"]["n"]
                        for batch in batches(Numbers(), 4, 0, steps=5)]).tolist()
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert labels[:10] != labels[10:]
    plain = torch.cat([batch["labels"]["n"]
                       for batch in batches(Numbers(), 4, 0, 5, shuffle=False)])
    assert plain.tolist() == 2 * list(range(10))


def test_normalised_pixels_can_be_turned_back_into_the_same_bytes():
    video = torch.randint(256, (2, 3, 4, 5, 3), generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ready = normalise(video.byte(), mean, std)
    assert ready.shape == (2, 3, 3, 4, 5) and ready.dtype == torch.float32
    for channel in range(3):
        back = (ready[:, channel] * std[channel] + mean[channel]) * 255
        assert torch.equal(back.round().long(), video[..., channel])


def test_loading_does_not_touch_the_global_random_state():
    state = torch.get_rng_state()
    next(batches(MovingShapes("train", 1, 16), 2, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number",
                         [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_worker_processes_end_with_the_run_also_after_an_interruption(folder, number):
    """Ctrl-C reaches every process of a terminal, so the signal goes to the whole group."""
    (folder / "two.txt").write_text("a.mp4 0\nb.mkv 1\n")
    script = ("import data, sys\nfiles = data.VideoFiles(sys.argv[1], 4, 32)\n"
              "for batch in data.batches(files, 2, 0, 10**6, workers=2):\n"
              "    print('ready', flush=True)")
    run = subprocess.Popen([sys.executable, "-c", script, str(folder / "two.txt")],
                           cwd=Path(data.__file__).parent,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           start_new_session=True)
    assert run.stdout.readline() == b"ready\n"

    def alive():
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                found += [stat.parent.name] * (int(group) == run.pid and state != "Z")
        return found

    assert len(alive()) >= 3
    os.killpg(run.pid, number)
    assert run.wait(timeout=20) != 0
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()


def test_held_out_items_come_in_order_once():
    world = MovingShapes("val", 1, 16)
    seen = list(held_out(world, 7, 3, workers=2))
    assert [len(batch["caption"]) for batch in seen] == [3, 3, 1]
    assert sum([batch["caption"] for batch in seen], []) == [world[i]["caption"] for i in range(7)]


# --------------------------------------------------------------------------- checking a data set


def test_a_check_names_bad_files_counts_the_rest_and_writes_a_list_without_them(folder, tmp_path,
                                                                                capsys):
    (folder / "check.csv").write_text(
        "path,label,caption\na.mp4,run,\"one, two\"\ntext.mp4,run,x\nb.mkv,jump,y\n"
                                      "truncated.mp4,run,z\na.mp4,run,again\n")
    arguments = [str(folder / "check.csv"), "--out", str(tmp_path), "--workers", "0"]
    assert data.main([*arguments, "--fix-list", str(tmp_path / "good.jsonl")]) == 1
    said = capsys.readouterr().out
    assert "2 of 4 files are good" in said and "h264 (2)" in said and "64 x 48 (2)" in said
    assert "text.mp4: not a readable video" in said
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    fixed = VideoFiles(tmp_path / "good.jsonl", 2, 16)
    assert fixed.classes == {"label": ("jump", "run")}
    assert fixed.captions == ["one, two", "y", "again"]
    assert data.main([str(tmp_path / "good.jsonl"), "--out", str(tmp_path), "--workers", "1"]) == 0
    assert data.main([str(folder / "nothing")]) == 2 and "no such file" in capsys.readouterr().err


def test_a_check_decodes_to_the_end(tmp_path):
    path = write_video(tmp_path / "x.mkv", 24)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) * 3 // 4])
    assert read_clip(path, [0]).shape == (1, 48, 64, 3)  # its beginning is good
    whole = write_video(tmp_path / "y.mp4", 30, gop=10, bf="0")
    av = pytest.importorskip("av")
    with av.open(str(whole)) as container:
        packet = next(itertools.islice(container.demux(video=0), 25, None))
    content = bytearray(whole.read_bytes())
    content[packet.pos:packet.pos + packet.size] = b"\xff" * packet.size
    whole.write_bytes(content)
    result, = check(annotations.read(whole).rows)
    assert "damaged" in result["bad"] and result["info"].frames == 30


def test_part_of_a_list_that_comes_class_by_class_holds_all_classes(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for i in range(3):
            write_video(tmp_path / name / f"{i}.mp4", frames=2)
    files = VideoFiles(tmp_path, 1, 16, train=False)
    labels = [batch["labels"]["label"].tolist() for batch in held_out(files, 3, 2)]
    assert labels == [[0, 1], [2]]
    assert spread(9, 3) == [0, 3, 6] and spread(5, 3) == [0, 1, 3] and spread(2, 5) == [0, 1]


# ---------------------------------------------------------------------- features, samples, names


FEATURES = dict(feats=np.ones((3, 4), np.float32), timestamps=np.arange(3.0), duration=3.0,
                model="m", window=2, stride=1)


def features(**changed):
    content = io.BytesIO()
    np.savez_compressed(content, **FEATURES | changed)
    return content.getvalue()


def one_array(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def test_features_are_what_was_written(tmp_path):
    (tmp_path / "a.npz").write_bytes(features())
    timed = {"a": segments.Timed("train", [(0.0, 1.0, "x")])}
    items, classes, missing = read_features(tmp_path, timed, "Train")
    assert items[0]["features"].shape == (3, 4) and items[0]["segments"] == [(0.0, 1.0, 0)]
    assert classes == ["x"] and not missing


@pytest.mark.parametrize("content", [
    b"", b"PK\3\4" + bytes(50), features()[:-30], features()[:90] + b"\xff" * 40 + features()[130:],
    one_array(np.ones(3)),
    pickle.dumps({"feats": 1}), features(feats=np.array([{}, []], object)),
    features(feats=np.full((3, 4), "x")), features(feats=np.ones(3)),
    features(feats=np.full((3, 4), np.nan)), features(feats=np.ones((3, 4)) * 1j),
    features(feats=np.ones((3, 4), bool)),
    features(timestamps=np.arange(2.0)), features(timestamps=np.ones((3, 3))),
    features(duration=np.ones(2)), features(duration=np.inf),
    features(duration="3"), features(window=2.5), features(window=0), features(stride=True),
    features(model=3)],
    ids=lambda content: f"{len(content)} bytes")
def test_a_damaged_file_of_features_is_one_line(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="a.npz: ") as error:
        read_features(tmp_path, {"a": segments.Timed("train", [])}, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said, expected", [
    ({"json": b'{"caption": "a dog"}', "cls": b"3"}, (3, "a dog")),
    ({"json": b'{"caption": 5}'}, (None, None)), ({"json": b"[" * 99999}, (None, None)),
    ({"cls": b"1699999999"}, None), ({"cls": b"9" * 5000}, None)],
    ids=lambda value: str(value)[:30])
def test_what_stands_beside_a_video_in_a_shard_is_text_and_a_class_number(said, expected):
    sample = {"__url__": "x.tar", "__key__": "a", "mp4": b"", **said}
    if expected is None:
        with pytest.raises(DataError, match="x.tar/a.cls: .* is no class number"):
            describe_sample(sample)
    else:
        item, _ = describe_sample(sample)
        assert (item["labels"].get("label"), item.get("caption")) == expected


def test_a_worker_notes_any_name(monkeypatch):
    desk = torch.zeros(512, dtype=torch.uint8)
    monkeypatch.setattr(loading, "_note", desk)
    loading._write(os.fsdecode(b"a\xff\n.mp4"))
    assert bytes(desk.tolist()).rstrip(b"\0").endswith(rb"a\udcff" + b"\n.mp4")
    monkeypatch.setattr(loading, "_notes", [desk[None]])
    told = dead_worker(
        RuntimeError(f"DataLoader worker (pid(s) {os.getpid()}) exited unexpectedly"))
    assert "\n" not in told and ".mp4" in told
