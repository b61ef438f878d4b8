"""Extract the features of videos with any encoder of this project: one file per video.

    python tools/extract.py --data DIR --model runs/default/masked --out features
    python tools/extract.py --data LIST --model vit_b_k710.pth --stride 4    # localisation
    python tools/extract.py --data DIR --model clip.safetensors --pool space

Localisation, grounding and retrieval often start from features instead of pixels.

A window slides over the video, `--stride` frames at a time. It has the number of frames that the
model was made for. Its frames are consecutive, and each is resized to the model's size without
keeping the aspect ratio. A video of n frames gives

    W = max(n - window, 0) // stride + 1

windows. Window w covers frames w * stride to w * stride + window - 1. A video shorter than a window
repeats its last frame. With t time steps per window (16 frames, tubelets of 2: t = 8) and h * w
places per time step:

    --pool all     feats (T', D), T' = W          one feature per window: VideoMAE's after its last
                                                  norm, UniFormerV2's before it, ViCLIP's embedding
    --pool space   feats (T', D), T' = W*t        mean over places of the last block's tokens
    --pool none    feats (T', h*w, D), T' = W*t   the tokens, without class tokens

An .npz contains: feats, float32; timestamps (T',), float64, the middle of the frames of each
feature, in seconds after the first frame; fps; duration in seconds; frames, their number; window
and stride in frames; pool; model, the first 16 digits of the SHA-256 of its file. `--format npy`
writes only feats, which other localisation code reads. (VideoMAE V2's script: --pool all, 16
frames, stride 4 for THUMOS14 and 16 for FineAction.)

Videos whose features exist are skipped. A folder with features of another model or stride is
refused. Unreadable videos are listed at the end.
"""

import argparse
import collections
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip_video  # noqa: E402
import weights  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.machine import choose_device  # noqa: E402
from tasks.localisation import window_feature  # noqa: E402
from video import annotations, decoding, transforms  # noqa: E402
from weights.encoders import load_encoder  # noqa: E402

CHUNK = 512  # frames in memory at a time


def load(source):
    """An encoder (weights.encoders), or ViCLIP, in eval mode."""
    tensors, config = weights.read(source)
    is_viclip = any("temporal_positional_embedding" in name for name in tensors)
    if config.get("kind") == "joint" or is_viclip:
        return clip_video.VideoCLIP.from_official(source).eval()
    return load_encoder(source).eval()


@torch.no_grad()
def features(model, clips, pool):
    """uint8 (B, T, H, W, 3) -> float32 (B, D) for pool="all", (B, t, D) for "space" and
    (B, t, h w, D) for "none"."""
    video = transforms.normalise(clips, model.mean, model.std)
    if isinstance(model, clip_video.VideoCLIP):  # ViCLIP: a class token, then the tokens by frame
        feature, tokens = model.encode_video_tokens(video)
        tokens = tokens[:, 0, 1:].unflatten(1, (video.shape[2], -1))
    elif pool == "all":
        feature = window_feature(model, video)
    else:
        tokens = model.tokens(video).unflatten(1, (model.grid_of(*video.shape[2:])[0], -1))
        if model.family == "multimodal":  # without the class token of each frame
            tokens = tokens[:, :, 1:]
    if pool == "all":
        return feature.float()
    return tokens.mean(dim=2).float() if pool == "space" else tokens.float()


def extract(model, video, stride, pool, batch_size, device):
    """(feats, timestamps) of one open decoding.Video; see the module docstring."""
    info, window = video.info, model.config["frames"]
    starts = np.arange(0, max(info.frames - window, 0) + 1, stride)
    numbers = np.minimum(starts[:, None] + np.arange(window), info.frames - 1)    # (W, window)
    per_chunk = max(1, CHUNK // window)
    if stride < window:  # windows overlap
        per_chunk = max(1, (CHUNK - window) // stride + 1)
    rows = []
    for first in range(0, len(numbers), per_chunk):
        chunk = numbers[first:first + per_chunk]
        distinct, position = np.unique(chunk, return_inverse=True)
        frames = torch.from_numpy(video.read(distinct, model.config["image_size"]))
        for index in torch.from_numpy(position.reshape(chunk.shape)).split(batch_size):
            rows.append(features(model, frames[index].to(device), pool).cpu())
    rows = torch.cat(rows).numpy()
    times = 1 if pool == "all" else rows.shape[1]
    # timestamps of the frames of each feature
    seconds = np.asarray(info.timestamps)[numbers].reshape(len(numbers), times, -1)
    middles = (seconds[..., 0] + seconds[..., -1]) / 2
    return (rows if pool == "all" else rows.reshape(-1, *rows.shape[2:])), middles.reshape(-1)


def places(clips, out, suffix):
    """{`Row.clip`: path of its features}.

    Sub-folders are kept. So are suffixes, if two videos differ only in them. For a part of a video
    the name contains its start and end.
    """
    common = os.path.commonpath([Path(path).parent for path, _ in clips])
    below = {path: Path(os.path.relpath(path, common)) for path, _ in clips}
    count = collections.Counter(name.with_suffix("") for name in below.values())

    def stem(path, part):
        name = below[path]
        name = name if count[name.with_suffix("")] > 1 else name.with_suffix("")
        return f"{name}_{part.start:g}_{part.end:g}" if part else name

    return {clip: Path(out) / f"{stem(*clip)}{suffix}" for clip in clips}


def check_settings(out, settings):
    """Write the settings into a new folder. UserError if the folder has other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"--out {out}: holds features made with {path.read_text().strip()}; "
                        "use another folder")
    path.write_text(json.dumps(settings) + "\n")


def write_features(target, feats, facts):
    """Write feats and facts as .npz, or only feats as .npy."""
    def write(aside):
        with open(aside, "wb") as file:
            if target.suffix == ".npy":
                np.save(file, feats)
            else:
                np.savez(file, feats=feats, **facts)

    target.parent.mkdir(parents=True, exist_ok=True)
    weights.write_atomically(target, write)


def run(args):
    """Extract the missing features. Returns {clip: reason} for unreadable videos."""
    if args.stride < 1 or args.batch_size < 1:
        raise UserError("--stride and --batch-size must be at least 1")
    annotation = annotations.read(args.data, args.video_folder, args.frame_rate > 0)
    clips = list(dict.fromkeys(row.clip for row in annotation.rows))
    model, out, device = load(args.model), Path(args.out), choose_device(args.device)
    model.to(device)
    settings = dict(model=weights.fingerprint(args.model), window=model.config["frames"],
                    stride=args.stride, pool=args.pool, format=args.format)
    check_settings(out, settings)
    targets = places(clips, out, "." + args.format)
    missing, unreadable = [clip for clip in clips if not targets[clip].exists()], {}
    print(f"{args.data}: {len(clips):,} videos, {len(clips) - len(missing):,} done already; window "
          f"of {settings['window']} frames, model {settings['model']}")
    for clip in tqdm(missing, unit="video", dynamic_ncols=True):
        try:
            path, part = clip
            with decoding.open_video(path, None, part, args.frame_rate or 25.0) as video:
                feats, timestamps = extract(model, video, args.stride, args.pool, args.batch_size,
                                            device)
                info = video.info
        except annotations.DataError as error:
            unreadable[clip] = str(error)
            continue
        facts = {key: settings[key] for key in ("window", "stride", "pool", "model")}
        facts |= dict(timestamps=timestamps, fps=info.fps, duration=info.duration,
                      frames=info.frames)
        write_features(targets[clip], feats, facts)
    return unreadable


def main(argv=None):
    """The command. Returns the exit code: 0; 1 if videos cannot be read; 2 for a user's error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or list, as --data of train.py")
    annotations.add_flags(parser)
    parser.add_argument("--model", required=True,
                        help="a run's folder, or an official file of weights")
    parser.add_argument("--out", default="runs/features", help="folder (default: runs/features)")
    parser.add_argument("--stride", type=int, default=16,
                        help="frames from one window to the next (default: 16)")
    parser.add_argument("--pool", default="all", choices=("none", "space", "all"),
                        help="what is averaged (default: all)")
    parser.add_argument("--format", default="npz", choices=("npz", "npy"),
                        help="npy = only the features (default: npz)")
    parser.add_argument("--batch-size", type=int, default=8,
                        help="windows at a time (default: 8)")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    try:
        unreadable = run(args)
    except (UserError, OSError) as error:
        print(f"extract.py: {error}", file=sys.stderr)
        return 2
    for reason in unreadable.values():
        print(f"not readable: {reason}")
    print(f"wrote {args.out}"
          + (f"; {len(unreadable)} videos cannot be read, see above" if unreadable else ""))
    return int(bool(unreadable))


if __name__ == "__main__":
    raise SystemExit(main())
