"""Checking a data set, and small copies of its files: `python data.py PATH`.

`check` decodes every frame of every file. `shrink` writes a small copy that decodes fast.
`write_list` lists the readable files. `main` is the command line.
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
from video.annotations import DataError
from video.decoding import Video, shown_size
from video.loading import start_worker
from video.sampling import segment_indices


def shrink(path, target, side=256):
    """Write a small copy of a video: H.264 in mp4, upright, with square pixels.

    side  pixels of its short side, or the video's own if that is less

    Frame n of the copy is frame n of the original, shown at the same time. A keyframe every 12
    frames keeps seeks short. The file is written under another name, then renamed. An existing copy
    stays. Raises DataError as `read_clip`.
    """
    import av
    from av.video.reformatter import VideoReformatter

    if Path(target).exists():
        return
    aside, ticks = f"{target}.{os.getpid()}.part", 90000  # ticks a second, as in MPEG
    with Video(path) as video:
        info = video.info
        # Colours are stored for squares of two by two pixels, so sides must be even.
        size = shown_size(info, min(side, info.height, info.width))
        height, width = (2 * max(1, round(x / 2)) for x in size)
        try:
            with av.open(aside, "w", format="mp4") as copy:
                stream = copy.add_stream("libx264", rate=max(1, round(info.fps)),
                                         options={"crf": "20", "g": "12"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.thread_count = 1  # files are copied in parallel
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
            os.replace(aside, target)
        finally:
            Path(aside).unlink(missing_ok=True)


class _Check(torch.utils.data.Dataset):
    """Item: what `check` yields about a file. Good files are copied."""

    def __init__(self, paths, copies=None, side=256):
        self.paths, self.copies, self.side = paths, copies, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        result = {"path": path, "bad": None, "info": None, "picture": None}
        try:
            with Video(path) as video:
                result["info"] = video.info
                count = video.count()
                if count != video.info.frames:
                    raise DataError(f"{path}: has {video.info.frames} frames, of which {count} "
                                    "can be decoded")
                result["picture"] = video.read([count // 2], 96)[0]
            if self.copies:
                shrink(path, self.copies[path], self.side)
        except DataError as error:
            result["bad"] = str(error)
        return result


def _as_it_is(item):
    return item


def copies_of(source, folder):
    """{path of each file that a source names: path of its copy in a folder}.

    A checksum of the path tells files of the same name apart.
    """
    def copy_of(path):
        checksum = zlib.crc32(os.path.abspath(path).encode())
        return str(Path(folder) / f"{Path(path).stem}-{checksum:08x}.mp4")

    return {row.path: copy_of(row.path) for row in annotations.read(source).rows}


def check(source, workers=0, copies=None, side=256):
    """Decode every frame of every file that a source names.

    workers  processes; 0 = this one
    copies   None, or the result of `copies_of`: where a small copy of each good file goes
    side     of the copies, pixels; see `shrink`
    yields   in order, {"path": str, "bad": reason or None, "info": `VideoInfo` or None,
             "picture": uint8 (h, w, 3) of its middle frame, short side 96 pixels, or None}
    """
    paths = list(dict.fromkeys(row.path for row in annotations.read(source).rows))
    yield from torch.utils.data.DataLoader(
        _Check(paths, copies, side), batch_size=None, collate_fn=_as_it_is, num_workers=workers,
        worker_init_fn=start_worker, generator=torch.Generator())


def statistics(infos):
    """Lines of text about many `VideoInfo`s: durations, frames, rates, sizes, codecs."""
    def spread(values, unit):
        values = np.array(values)
        return (f"{values.min():.4g} to {values.max():.4g} {unit}, half of them below "
                f"{np.median(values):.4g}")

    def most(values):
        counts = collections.Counter(values).most_common()
        more = f", {len(counts) - 6} more" if len(counts) > 6 else ""
        return ", ".join(f"{value} ({count:,})" for value, count in counts[:6]) + more

    hours = sum(info.duration for info in infos) / 3600
    turned = sum(info.rotation != 0 for info in infos)
    still = sum(info.frames == 1 for info in infos)
    durations, frames = [info.duration for info in infos], [info.frames for info in infos]
    sizes = [f"{info.width} x {info.height}" for info in infos]
    return [f"duration   {spread(durations, 's')}; {hours:.2f} hours in all",
            f"frames     {spread(frames, 'frames')}; {still:,} files of one frame",
            f"rate       {spread([info.fps for info in infos], 'frames/s')}",
            f"size       {most(sizes)}; {turned:,} turned upright",
            f"codec      {most([info.codec for info in infos])}"]


def write_list(source, bad, path, copies=None):
    """Write what a source says of its readable files as JSON lines, which every stage reads.

    bad     paths to leave out
    path    of the new list; its entries are relative to its folder. Labels that the source numbers
            in an order of its own are written as numbers
    copies  None or {path: the path to write in its place}
    """
    found, folder = annotations.read(source), Path(path).resolve().parent
    number = {name: place for place, name in enumerate(found.classes or ())}
    with open(path, "w", encoding="utf-8") as file:
        for row in found.rows:
            if row.path in bad:
                continue
            entry = {key: value for key, value in row._asdict().items() if value is not None}
            target = Path(copies[row.path] if copies else row.path)
            entry["path"] = os.path.relpath(target.resolve(), folder)
            if row.label in number:
                entry["label"] = number[row.label]
            if row.candidates:
                entry["answer"] = row.candidates.index(row.answer)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="data.py", description="Check a data set.")
    parser.add_argument("path", help="folder or list, as --data of train.py")
    parser.add_argument("--out", default="runs/check",
                        help="folder for the contact sheet (default: runs/check)")
    parser.add_argument("--fix-list", default="",
                        help="write a list without the bad files here, a .jsonl")
    parser.add_argument("--cache", default="",
                        help="write small copies of the good files into this folder, and "
                             "list.jsonl for --data beside them; existing copies stay")
    parser.add_argument("--short-side", type=int, default=256,
                        help="of the copies, pixels (default: 256)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes (default: one per core)")
    return parser


def main(open_files, argv=None):
    """Check a data set. Returns the exit code: 0, 1 where files are bad, 2 for a user's mistake.

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
            raise DataError(f"{args.path}: tar shards are not checked; unpack one to look into it")
        print(open_files(args.path, 1, 32, train=False).summary())
        return report(args)
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2


def report(args):
    """Check the files and write what `args` ask for. Returns 1 where files are bad, else 0."""
    copies = None
    if args.cache:
        Path(args.cache).mkdir(parents=True, exist_ok=True)
        copies = copies_of(args.path, args.cache)
    count = len({row.path for row in annotations.read(args.path).rows})
    results = []
    for result in tqdm(check(args.path, args.workers, copies, args.short_side), total=count,
                       unit="file", dynamic_ncols=True):
        results.append(result)
        if result["bad"]:
            tqdm.write(f"bad: {result['bad']}")
    bad = {result["path"] for result in results if result["bad"]}
    good = [result for result in results if not result["bad"]]
    print(f"{count - len(bad):,} of {count:,} files are good")
    if good:
        print("\n".join(statistics([result["info"] for result in good])))
        chosen = [good[i] for i in segment_indices(len(good), min(60, len(good)))]
        Path(args.out).mkdir(parents=True, exist_ok=True)
        pictures.sheet([result["picture"] for result in chosen], Path(args.out) / "sheet.png",
                       [Path(result["path"]).name[:24] for result in chosen], columns=10)
        print(f"wrote {args.out}/sheet.png")
    if args.cache and good:
        write_list(args.path, bad, Path(args.cache) / "list.jsonl", copies)
        before, after = (sum(map(os.path.getsize, paths)) / 2**20 for paths in zip(
            *((result["path"], copies[result["path"]]) for result in good)))
        print(f"wrote {args.cache}/list.jsonl: {before:,.0f} MiB became {after:,.0f} MiB")
    if args.fix_list:
        write_list(args.path, bad, args.fix_list)
        print(f"wrote {args.fix_list}")
    return int(bool(bad))
