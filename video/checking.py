"""Checks a data set and writes small copies of its files: `python data.py PATH`.

    annotations.read --> rows --> check: decode every frame of each clip, find bad files
                                    |--> statistics and a contact sheet
                                    |--> shrink: a small copy of each good clip (--cache)
                                    |--> write_list: a list of the good clips (--fix-list)
"""

import argparse
import collections
import fractions
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import pictures
from video import annotations
from video.decoding import open_video, shown_size
from video.loading import start_worker
from video.rows import DataError, check_part
from video.sampling import segment_indices


def shrink(path, target, side=256, part=None, rate=25.0):
    """Write a small copy of a video, or of a part of it: H.264 in mp4, upright, square pixels.

    side  pixels of the short side; a smaller video keeps its size
    rate  frames per second of a folder of pictures

    Frame n of the copy is frame n of the original, shown at the same time. A keyframe every 12
    frames makes seeks fast. The copy is written under a temporary name, then renamed. An existing
    copy is kept. Raises DataError as `read_clip` does.
    """
    import av
    from av.video.reformatter import VideoReformatter

    if Path(target).exists():
        return
    temporary, ticks = f"{target}.{os.getpid()}.part", 90000  # per second, as in MPEG
    with open_video(path, None, part, rate) as video:
        info = video.info
        # yuv420p stores one colour for 2 x 2 pixels, so sides must be even.
        size = shown_size(info, min(side, info.height, info.width))
        height, width = (2 * max(1, round(x / 2)) for x in size)
        try:
            with av.open(temporary, "w", format="mp4") as copy:
                stream = copy.add_stream("libx264", rate=max(1, round(info.fps)),
                                         options={"crf": "20", "g": "12"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.thread_count = 1  # files are processed in parallel
                stream.codec_context.time_base = fractions.Fraction(1, ticks)
                converter = VideoReformatter()
                for seconds, picture in zip(info.timestamps, video.play((height, width))):
                    picture = np.ascontiguousarray(picture)
                    frame = converter.reformat(av.VideoFrame.from_ndarray(picture, format="rgb24"),
                                               format="yuv420p", threads=1)
                    frame.pts = round(seconds * ticks)
                    frame.time_base = fractions.Fraction(1, ticks)
                    copy.mux(stream.encode(frame))
                copy.mux(stream.encode())
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)


class _Check(torch.utils.data.Dataset):
    """Items are what `check` yields about a clip. With copies, a good clip is also copied."""

    def __init__(self, clips, rate, copies=None, side=256):
        self.clips, self.rate, self.copies, self.side = clips, rate, copies, side

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        path, part = clip = self.clips[index]
        result = {"clip": clip, "bad": None, "info": None, "picture": None}
        try:
            with open_video(path, None, part, self.rate) as video:
                result["info"] = video.info
                check_part(part, video.info)
                count = video.count()
                if count != video.info.frames:
                    raise DataError(f"{path}: has {video.info.frames} frames, of which {count} "
                                    "can be decoded")
                result["picture"] = video.read([count // 2], 96)[0]
            if self.copies:
                shrink(path, self.copies[clip], self.side, part, self.rate)
        except DataError as error:
            result["bad"] = str(error)
        return result


def _identity(item):
    return item


def copies_of(rows, folder):
    """{`Row.clip` of each row: path of its copy in a folder}.

    The name contains a checksum of path and part, because files in different folders may have one
    name.
    """
    def copy_of(clip):
        path, part = clip
        text = os.path.abspath(path) + (str(part) if part else "")
        return str(Path(folder) / f"{Path(path).stem}-{zlib.crc32(text.encode()):08x}.mp4")

    return {row.clip: copy_of(row.clip) for row in rows}


def check(rows, workers=0, copies=None, side=256, rate=25.0):
    """Decode every frame of every clip.

    rows     of `annotations.read`
    workers  number of processes; 0 = this one
    copies   None, or the result of `copies_of`: the path of the small copy of each good clip
    side     short side of the copies, pixels; see `shrink`
    rate     frames per second of folders of pictures
    yields   for each clip, in order, {"clip": Row.clip, "bad": error or None, "info": `VideoInfo`
             or None, "picture": its middle frame, uint8 (h, w, 3), short side 96 pixels, or None}
    """
    clips = list(dict.fromkeys(row.clip for row in rows))
    yield from torch.utils.data.DataLoader(
        _Check(clips, rate, copies, side), batch_size=None, collate_fn=_identity,
        num_workers=workers, worker_init_fn=start_worker, generator=torch.Generator())


def statistics(infos):
    """Lines of text about a list of `VideoInfo`: durations, frames, rates, sizes, codecs."""
    def describe_range(values, unit):
        values = np.array(values)
        return (f"{values.min():.4g} to {values.max():.4g} {unit}, median "
                f"{np.median(values):.4g}")

    def most_frequent(values):
        counts = collections.Counter(values).most_common()
        more = f", {len(counts) - 6} more" if len(counts) > 6 else ""
        return ", ".join(f"{value} ({count:,})" for value, count in counts[:6]) + more

    hours = sum(info.duration for info in infos) / 3600
    rotated = sum(info.rotation != 0 for info in infos)
    single = sum(info.frames == 1 for info in infos)
    durations, frames = [info.duration for info in infos], [info.frames for info in infos]
    sizes = [f"{info.width} x {info.height}" for info in infos]
    return [f"duration   {describe_range(durations, 's')}; {hours:.2f} hours in total",
            f"frames     {describe_range(frames, 'frames')}; {single:,} files of one frame",
            f"rate       {describe_range([info.fps for info in infos], 'frames/s')}",
            f"size       {most_frequent(sizes)}; {rotated:,} rotated upright",
            f"codec      {most_frequent([info.codec for info in infos])}"]


def write_list(listing, bad, path, copies=None):
    """Write the rows of the good clips as JSON lines, which every stage reads.

    listing  of `annotations.read`
    bad      clips to leave out
    path     of the new list; paths in it are relative to its folder. If the class order of the
             source is not alphabetical, labels are written as numbers
    copies   None or {clip: path of its copy}: the list names the copies instead, as whole files
    """
    folder, number = Path(path).resolve().parent, {}
    names = listing.classes if isinstance(listing.classes, list) else []
    if names != sorted(names) or all(map(str.isdecimal, names)):
        number = {name: index for index, name in enumerate(names)}
    with open(path, "w", encoding="utf-8") as file:
        for row in listing.rows:
            if row.clip in bad:
                continue
            entry = {key: value for key, value in row._asdict().items()
                     if value is not None and key not in ("part", "frames_part")}
            target = Path(copies[row.clip] if copies else row.path)
            entry["path"] = os.path.relpath(target.resolve(), folder)
            if row.part and not copies:
                start, end, in_frames = row.part
                entry |= {"start_frame": start, "end_frame": end} if in_frames else {
                    "start": start, "end": end}
            if isinstance(row.label, str) and row.label in number:
                entry["label"] = number[row.label]
            if row.candidates:
                entry["answer"] = row.candidates.index(row.answer)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="data.py", description="Check a data set.")
    parser.add_argument("path", help="folder or list, as for --data of train.py")
    annotations.add_flags(parser)
    parser.add_argument("--out", default="runs/check",
                        help="folder for the contact sheet (default: runs/check)")
    parser.add_argument("--fix-list", default="",
                        help="write a list of the good files to this .jsonl file")
    parser.add_argument("--cache", default="",
                        help="write small copies of the good files into this folder, with "
                        "a list.jsonl for --data; existing copies are kept")
    parser.add_argument("--short-side", type=int, default=256,
                        help="short side of the copies in pixels (default: 256)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="number of processes (default: one per core)")
    return parser


def main(open_files, argv=None):
    """Check a data set. Returns the exit code: 0; 1 if files are bad; 2 for a user's mistake.

    open_files  data.VideoFiles
    """
    args = parser().parse_args(argv)
    try:
        if args.workers < 0 or args.fix_list and Path(args.fix_list).suffix != ".jsonl":
            raise DataError("--workers must be at least 0, and the name of --fix-list must end in "
                            ".jsonl")
        if args.short_side < 16:
            raise DataError(f"--short-side {args.short_side}: give at least 16 pixels")
        if annotations.is_shards(args.path):
            raise DataError(f"{args.path}: tar shards cannot be checked; unpack one and check its "
                            "folder")
        print(open_files(args.path, 1, 32, train=False, video_folder=args.video_folder,
                         frame_rate=args.frame_rate).summary())
        return report(args)
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2


def report(args):
    """Check the clips and write the requested outputs. Returns 1 if some are bad, else 0."""
    listing, copies = annotations.read(args.path, args.video_folder, args.frame_rate > 0), None
    if args.cache:
        Path(args.cache).mkdir(parents=True, exist_ok=True)
        copies = copies_of(listing.rows, args.cache)
    clips = {row.clip for row in listing.rows}
    unit = "clips" if any(row.part for row in listing.rows) else "files"
    results = []
    checked = check(listing.rows, args.workers, copies, args.short_side, args.frame_rate or 25.0)
    for result in tqdm(checked, total=len(clips), unit=unit[:-1], dynamic_ncols=True):
        results.append(result)
        if result["bad"]:
            tqdm.write(f"bad: {result['bad']}")
    bad = {result["clip"] for result in results if result["bad"]}
    good = [result for result in results if not result["bad"]]
    print(f"{len(clips) - len(bad):,} of {len(clips):,} {unit} are good")
    if good:
        print("\n".join(statistics([result["info"] for result in good])))
        chosen = [good[i] for i in segment_indices(len(good), min(60, len(good)))]
        Path(args.out).mkdir(parents=True, exist_ok=True)
        pictures.sheet([result["picture"] for result in chosen], Path(args.out) / "sheet.png",
                       [Path(result["clip"][0]).name[:24] for result in chosen], columns=10)
        print(f"wrote {args.out}/sheet.png")
    if args.cache and good:
        write_list(listing, bad, Path(args.cache) / "list.jsonl", copies)
        before = sum(os.path.getsize(path) for path in {result["clip"][0] for result in good}
                     if os.path.isfile(path)) / 2**20
        after = sum(os.path.getsize(copies[result["clip"]]) for result in good) / 2**20
        print(f"wrote {args.cache}/list.jsonl: {before:,.0f} MiB became {after:,.0f} MiB")
    if args.fix_list:
        write_list(listing, bad, args.fix_list)
        print(f"wrote {args.fix_list}")
    return int(bool(bad))
