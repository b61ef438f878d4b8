"""What video/decoding.py promises of the files that people have: a legal file gives the right
frames, a broken one gives one line, and nothing crashes, hangs or stays behind.

Right frames are those of a full sequential decode. Right colours are computed from the definition
of the matrix. The files are made here. Sample videos beside the repository (shared/videos, or the
folder VIDEOS) are read too, where there are any.
"""

import csv
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import data
from video import decoding
from video.annotations import DataError
from video.checking import shrink
from video.decoding import Bytes, probe, read_clip, shown_size

av = pytest.importorskip("av")
ROOT = Path(__file__).resolve().parent.parent
VIDEOS = Path(os.environ.get("VIDEOS", ROOT.parent / "shared" / "videos"))


def write(path, frames=30, width=64, height=48, codec="libx264", pix_fmt="yuv420p", times=None,
          rate=10, gop=8,
          aspect=None, container_options=(), **options):
    """A moving square on grey that brightens; frame `i` is shown at times[i] / 1000 s."""
    with av.open(str(path), "w", options=dict(container_options)) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pix_fmt, gop
        clock = Fraction(1, rate if times is None else 1000)
        stream.codec_context.time_base = clock
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.options = {"threads": "1", **options}
        for number in range(frames):
            picture = np.full((height, width, 3), 40 + 6 * number % 160, np.uint8)
            at = number * 3 % max(1, width - 8)
            picture[2:8, at:at + 8] = (250, 20 * number % 250, 90)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = number if times is None else int(times[number]), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def full_decode(path, info, size=None):
    """(frames until the first damage, seconds of each or None), decoded in order."""
    converter = av.video.reformatter.VideoReformatter()
    height, width = shown_size(info, size)
    stored = (width, height) if info.rotation % 180 == 90 else (height, width)
    frames = []
    with av.open(str(path), **({"metadata_errors": "replace"}
                               if int(av.__version__.split(".")[0]) < 19 else {})) as file:
        try:
            for frame in file.decode(file.streams.video[0]):
                picture = converter.reformat(frame, stored[1], stored[0], "rgb24",
                                             threads=1).to_ndarray()
                frames.append((frame.pts, np.rot90(picture, info.rotation // 90)))
        except av.FFmpegError:
            pass
        clock, start = file.streams.video[0].time_base, frames[0][0]
        seconds = [None if start is None else float((pts - start) * clock) for pts, _ in frames]
    return [picture for _, picture in frames], seconds


def agrees_with_a_full_decode(path, size=None, moments=50, at_once=10):
    """Frames at random times, a few at a time, are those on show then; returns the file's info."""
    info, rng = probe(path), np.random.default_rng(0)
    frames, seconds = full_decode(path, info, size)
    if seconds[0] is not None:
        assert np.allclose(info.timestamps[:len(frames)], seconds, atol=1e-6)
    times = rng.uniform(0, info.duration
                        if len(frames) == info.frames else info.timestamps[len(frames)], moments)
    for some in np.split(times, moments // at_once):
        for moment, picture in zip(some, read_clip(path, some, size, info)):
            shown = max(i for i, second in enumerate(info.timestamps) if second <= moment + 1e-6)
            assert np.array_equal(picture, frames[shown]), f"{path} at {moment} s"
    last = len(frames) - 1
    assert np.array_equal(read_clip(path, [last, 0], size), [frames[last], frames[0]])
    return info


# --------------------------------------------------------------------------------- legal, and odd

TIMES = np.cumsum(np.random.default_rng(1).integers(5, 300, 30))
ODD = {  # name -> (file, options of `write`, what must be known of it)
    "variable frame rate": ("x.mp4", dict(times=TIMES), dict(frames=30)),
    "variable frame rate, Matroska": ("x.mkv", dict(times=TIMES), dict(frames=30)),
    "a late start": ("x.mkv", dict(times=np.arange(30) * 100 + 7300), dict(frames=30)),
    "odd width and height": ("x.mp4", dict(width=63, height=41, pix_fmt="yuv444p"),
                             dict(width=63, height=41)),
    "odd, 4:2:0": ("x.webm", dict(width=63, height=41, codec="libvpx-vp9"),
                   dict(width=63, height=41)),
    "4:4:4": ("x.mp4", dict(pix_fmt="yuv444p"), dict(frames=30)),
    "4:2:2 ten bits": ("x.mkv", dict(pix_fmt="yuv422p10le"), dict(frames=30)),
    "ten bits": ("x.mp4", dict(pix_fmt="yuv420p10le"), dict(frames=30)),
    "ten bits, HEVC": ("x.mp4", dict(pix_fmt="yuv420p10le", codec="libx265",
                                     **{"x265-params": "log-level=none:pools=none"}),
                       dict(frames=30)),
    "AV1": ("x.mkv", dict(codec="libsvtav1", preset="10", **{"svtav1-params": "lp=1"}),
            dict(frames=30)),
    "one frame": ("x.mp4", dict(frames=1), dict(frames=1, duration=pytest.approx(0.1, abs=0.01))),
    "two frames": ("x.mp4", dict(frames=2), dict(frames=2)),
    "wide pixels": ("x.mp4", dict(aspect=Fraction(4, 3)), dict(width=85, height=48)),
    "high pixels": ("x.mkv", dict(aspect=Fraction(1, 2)), dict(width=32, height=48)),
    "no index, fragments": ("x.mp4", dict(
        container_options={"movflags": "frag_keyframe+empty_moov"}.items()), dict(frames=30)),
    "transport stream": ("x.ts", {}, dict(frames=30)),
    "no timestamps": ("x.h264", {}, dict(frames=30)),
    "open groups of pictures": ("x.mp4", {"x264-params": "open-gop=1:bframes=3:b-pyramid=2"},
                                dict(frames=30)),
    "intra refresh": ("x.mkv", {"x264-params": "intra-refresh=1:keyint=10:bframes=0"},
                      dict(frames=30)),
    "frames nothing refers to": ("x.mp4", {"x264-params": "bframes=8:b-adapt=0"}, dict(frames=30)),
    "interlaced": ("x.mp4", {"flags": "+ildct+ilme", "x264-params": "tff=1"}, dict(frames=30)),
    "animated gif": ("x.gif", dict(codec="gif", pix_fmt="rgb8"), dict(frames=30)),
    "lossless RGB": ("x.mkv", dict(codec="ffv1", pix_fmt="bgr0"), dict(frames=30)),
    "alpha": ("x.mkv", dict(codec="ffv1", pix_fmt="yuva420p"), dict(frames=30)),
    "grey": ("x.mkv", dict(codec="ffv1", pix_fmt="gray"), dict(frames=30)),
    "twelve bits": ("x.mkv", dict(codec="ffv1", pix_fmt="yuv420p12le"), dict(frames=30)),
    "MPEG-2": ("x.mpg", dict(codec="mpeg2video", rate=25), dict(frames=30)),
    "MPEG-4 in AVI with B-frames": ("x.avi", dict(codec="mpeg4", bf="2", rate=10), {}),
    "Flash": ("x.flv", dict(codec="flv"), dict(frames=30)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_give_the_frames_of_a_full_decode(tmp_path, name):
    file, options, known = ODD[name]
    codec = options.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    info = agrees_with_a_full_decode(write(tmp_path / file, **options))
    for key, value in known.items():
        assert getattr(info, key) == value, key


def test_a_video_of_variable_rate_shows_each_frame_for_its_time(tmp_path):
    path = write(tmp_path / "x.mp4", times=TIMES)
    assert np.allclose(np.diff(probe(path).timestamps), np.diff(TIMES) / 1000, atol=1e-3)


# ------------------------------------------------------------------------------------- its colours

# untagged: BT.601
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114)}


@pytest.mark.parametrize("space", WEIGHTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_matrix_and_range_of_the_colours_are_those_of_the_tag(tmp_path, space, full, pix_fmt):
    """ITU-R BT.709, BT.601 and BT.2020, "Signal format": R' = Y' + 2 (1 - Kr) Cr, and so on."""
    y, u, v = 120, 90, 170
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = space, 2 if full else 1
        frame = av.VideoFrame(32, 32, pix_fmt)
        for plane, value in zip(frame.planes, (y, u, v)):
            deep = "10" in pix_fmt
            plane.update(np.full(plane.buffer_size // (2 if deep else 1),
                                 value * 4 if deep else value,
                                 np.uint16 if deep else np.uint8).tobytes())
        frame.colorspace, frame.color_range = space, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    red, blue = WEIGHTS[space]
    luma, cb, cr = (y / 255, (u - 128) / 255, (v - 128) / 255) if full else (
        (y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    expected = np.clip(255 * np.array([r, g, b]), 0, 255)
    for size in (None, 16):
        assert np.abs(read_clip(tmp_path / "x.mkv", [0], size)[0, 8, 8] - expected).max() < 3


# --------------------------------------------------------------------------- which stream, how long


def test_the_first_video_stream_counts_and_a_cover_picture_is_none(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
        for stream, grey in zip(streams, (50, 200)):
            stream.width, stream.height, stream.pix_fmt = 32, 16 if grey == 50 else 24, "bgr0"
        for _ in range(3):
            for stream, grey in zip(streams, (50, 200)):
                picture = np.full((stream.height, 32, 3), grey, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture,
                                                                       format="rgb24").reformat(
                                                                           format="bgr0")))
        for stream in streams:
            container.mux(stream.encode())
    assert probe(tmp_path / "two.mkv").height == 16
    assert np.all(read_clip(tmp_path / "two.mkv", [1]) == 50)
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic.value
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp",
                                             layout="mono")
        silence.sample_rate = 8000
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8),
                                                              format="rgb24")))
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(DataError, match="no video stream"):
        probe(tmp_path / "song.mp4")


def test_a_picture_named_mp4_is_a_video_of_one_frame(tmp_path):
    av.VideoFrame.from_ndarray(np.full((16, 24, 3), 70, np.uint8),
                               format="rgb24").save(str(tmp_path / "x.png"))
    (tmp_path / "x.png").rename(tmp_path / "x.mp4")
    assert probe(tmp_path / "x.mp4").frames == 1
    assert np.all(read_clip(tmp_path / "x.mp4", [0]) == 70)


def test_a_file_from_memory_is_the_file(tmp_path):
    path = write(tmp_path / "x.mp4")
    content = Bytes("shard.tar/x.mp4", path.read_bytes())
    assert np.array_equal(read_clip(content, [3, 20]), read_clip(path, [3, 20]))
    with pytest.raises(DataError, match="^shard.tar/y.mp4: not a readable video"):
        probe(Bytes("shard.tar/y.mp4", b"nothing"))


def test_a_file_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mp4")
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(decoding.time, "monotonic", lambda: next(clock))
    with pytest.raises(DataError, match="x.mp4: took too long"):
        probe(path)


@pytest.mark.slow
def test_a_hundred_thousand_frames_are_as_good_as_ten(tmp_path):
    path = write(tmp_path / "x.mp4", frames=100_000, width=32, height=32, codec="mpeg4", gop=50,
                 rate=25)
    info = probe(path)
    assert info.frames == 100_000
    started = time.perf_counter()
    found = read_clip(path, np.linspace(0, 99_999, 16).astype(int), info=info)
    assert time.perf_counter() - started < 2 and found.shape == (16, 32, 32, 3)
    agrees_with_a_full_decode(path)


# ------------------------------------------------------------------------------------------ broken


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.ts", "x.webm"])
def test_a_file_cut_anywhere_gives_right_frames_or_one_line(tmp_path, name):
    path = write(tmp_path / name, codec="libvpx" if name.endswith("webm") else "libx264")
    whole, content = read_clip(path, range(30)), path.read_bytes()
    readable = 0
    for tenth in range(10):
        path.write_bytes(content[:len(content) * tenth // 10])
        try:
            info = probe(path)
            found = read_clip(path, [0])
            assert np.array_equal(found[0], whole[0]) and 1 <= info.frames <= 30
            readable += 1
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert readable == 0 if name == "x.mp4" else readable >= 5  # an mp4's index comes last


ATTACK = """
import sys, zlib
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from video.annotations import DataError
from video.decoding import Part, open_video, probe, read_clip
from video.sampling import choose_frames
target, sources = Path(sys.argv[2]), [Path(x) for x in sys.argv[5:]]
first, last = int(sys.argv[3]), int(sys.argv[4])
good = bad = 0
for number in range(first, last):
    rng = np.random.default_rng(number)
    content = np.frombuffer(sources[number % len(sources)].read_bytes(), np.uint8).copy()
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(content)))
        length = int(rng.integers(1, max(2, len(content) // 4)))
        kind = rng.integers(6)
        if kind < 2:  # flip single bits, anywhere or in the header
            span = len(content) if kind else min(len(content), 600)
            for place in rng.integers(span, size=rng.integers(1, 30)):
                content[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            content = content[:max(at, 1)]
        elif kind == 3:
            content[at:at + length] = rng.integers(256, size=len(content[at:at + length]))
        elif kind == 4:
            content = np.concatenate([content[:at], content[at + length:], content[:1]])
        else:
            content = np.concatenate([content[:at], content[at:at + length], content[at:]])
    path = target / f"attack{sources[number % len(sources)].suffix}"
    path.write_bytes(content.tobytes())
    print(number, end=" ", flush=True)
    try:
        info = probe(path)
        numbers = choose_frames("segment", info.frames, 4)
        frames = read_clip(path, numbers, 32, info)
        assert frames.shape[0] == 4 and frames.dtype == np.uint8
        with open_video(path, None, Part(info.duration / 3, 1.5)) as video:
            assert len(list(video.play(32))) == video.info.frames
        good += 1
    except DataError as error:
        assert "\\n" not in str(error) and str(error).startswith(str(path)), error
        bad += 1
print("good", good, "bad", bad)
"""


def attack(folder, first, last, limit):
    """Read mutated files in a process of its own -> how many could be read, how many not."""
    sources = [write(folder / "x.mp4"), write(folder / "x.mkv", times=TIMES),
               write(folder / "x.ts"),
               write(folder / "x.webm", codec="libvpx-vp9"), write(folder / "x.avi", codec="mpeg4"),
               write(folder / "x.gif", codec="gif", pix_fmt="rgb8"),
               write(folder / "y.mp4", codec="mpeg4")]
    done = subprocess.run([sys.executable, "-c", ATTACK, str(ROOT), str(folder), str(first),
                           str(last), *map(str, sources)],
                          capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, (f"ended with {done.returncode} at file "
                                  f"{done.stdout.split()[-1]}: {done.stderr[-2000:]}")
    words = done.stdout.split()
    assert words[-4::2] == ["good", "bad"]
    return int(words[-3]), int(words[-1])


def test_mutated_files_never_crash_or_hang(tmp_path):
    good, bad = attack(tmp_path, 0, 70, limit=60)
    assert good + bad == 70 and good and bad


@pytest.mark.slow
def test_a_thousand_mutated_files_never_crash_or_hang(tmp_path):
    good, bad = attack(tmp_path, 1000, 2000, limit=600)
    assert good + bad == 1000 and good > 100 and bad > 100


# ------------------------------------------------------------------------------- the sample videos


def samples():
    return [json.loads(line) for line in (
        VIDEOS / "videos.jsonl").read_text().splitlines()] if VIDEOS.is_dir() else []


needs_samples = pytest.mark.skipif(not VIDEOS.is_dir(), reason="no sample videos (set VIDEOS)")


@needs_samples
@pytest.mark.parametrize("at_once", [50, pytest.param(5, marks=pytest.mark.slow)])
def test_sample_videos_are_what_their_list_says_and_agree_with_a_full_decode(at_once):
    with open(VIDEOS / "captions.csv") as file:
        assert {row["path"] for row in csv.DictReader(file)} <= {sample["file"]
                                                                 for sample in samples()}
    for sample in samples():
        known, path = sample["probe"], VIDEOS / sample["file"]
        if not known.get("frames"):
            with pytest.raises(DataError):
                read_clip(path, [0])
            continue
        info = agrees_with_a_full_decode(path, 48, at_once=at_once)
        assert info.rotation == known["rotation"] % 360 and info.codec == known["codec"]
        assert info.frames == (known["frames"] if "error" not in known else known["header_frames"])
        if "error" in known:
            with pytest.raises(DataError, match="damaged"):
                read_clip(path, [info.frames - 1])
        turned = info.rotation % 180 == 90
        height, width = (info.width, info.height) if turned else (info.height, info.width)
        # pixels may not be square
        assert height == known["height"] and abs(width / known["width"] - 1) < 0.1


@needs_samples
def test_the_sample_videos_are_a_data_set():
    files = data.VideoFiles(VIDEOS / "captions.csv", 4, 32, sampling="segment", train=False)
    bad = [entry for i in range(0, len(files), 3) for entry in files[i]["bad"]]
    assert len(files.captions) == len(files) and not files.missing and len(bad) <= 3


def test_a_small_copy_shows_the_same_frames_at_the_same_times(tmp_path):
    """Upright, square pixels, even sides; variable frame rate kept."""
    times = np.cumsum([0, *np.random.default_rng(0).integers(20, 200, 39)])
    source = write(tmp_path / "wide.mp4", frames=40, width=96, height=54, times=times,
                   aspect=Fraction(2, 1))
    before = probe(source)
    shrink(source, tmp_path / "copy.mp4", side=32)
    copy = probe(tmp_path / "copy.mp4")
    assert (copy.height, copy.width, copy.frames) == (32, 114, 40) and copy.codec == "h264"
    assert np.allclose(copy.timestamps, before.timestamps, atol=1e-3)
    assert max(np.diff(copy.keyframes)) <= 12
    theirs, ours = (read_clip(path, np.arange(40), (32, 114)).astype(float)
                    for path in (source, tmp_path / "copy.mp4"))
    assert np.abs(theirs - ours).mean() < 6 < np.abs(theirs - ours[::-1]).mean()


def test_a_checked_data_set_is_copied_and_trains_from_the_copies(tmp_path, capsys):
    for name in ("left", "right"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write(tmp_path / "set" / name / "same_name.mp4", width=96, height=64)
    (tmp_path / "set" / "left" / "broken.mp4").write_bytes(b"not a video")
    arguments = [str(tmp_path / "set"), "--workers", "0", "--out", str(tmp_path), "--cache",
                 str(tmp_path / "small"),
                 "--short-side", "32"]
    assert data.main(arguments) == 1 and "became" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").glob("*.mp4")}
    assert len(made) == 2 and not list((tmp_path / "small").glob("*.part"))
    found = data.VideoFiles(tmp_path / "small" / "list.jsonl", 2, 32, train=False)
    assert found.classes == {"label": ("left", "right")}
    assert found[0]["video"].shape == (2, 32, 32, 3)
    assert data.main(arguments) == 1 and {path: path.stat().st_mtime_ns for path in made} == made
    assert data.main([*arguments[:-1], "4"]) == 2 and "--short-side" in capsys.readouterr().err
