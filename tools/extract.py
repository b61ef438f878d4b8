"""Features of videos for other people's work: one file per video, by any encoder here.

    python tools/extract.py --data DIR --model runs/default/masked --out features
    python tools/extract.py --data LIST --model vit_b_k710.pth --stride 4          temporal localisation
    python tools/extract.py --data DIR --model clip.safetensors --pool space

Why: localisation, grounding and retrieval start from features, not from pixels, and a second pass over the
videos with another script is where frame rates and offsets go wrong.

A window of as many frames as the model was made for slides over the video, `--stride` frames at a time, its
frames one after another; each is squashed to the model's size. A video of n frames gives
W = max(n - window, 0) // stride + 1 windows (a shorter one repeats its last frame); window w covers frames
w stride to w stride + window - 1. With t token times per window (16 frames, tubelets of 2: t = 8) and h w
token places,

    --pool all     feats (T', D), T' = W        one feature per window: what the last norm before the
                                                head sees (VideoMAE: has seen it; ViCLIP: the embedding)
    --pool space   feats (T', D), T' = W t      mean over places of the last layer's tokens
    --pool none    feats (T', h w, D), T' = W t the tokens themselves; ViCLIP's class token is left out

In each .npz: feats float32; timestamps (T',) float64, seconds from the first frame to the middle of what the
row has seen; fps, duration in seconds, frames; window and stride in frames; pool; model, the first 16 digits of
the SHA-256 of its file. `--format npy` writes feats alone, as much localisation code reads it (16 frames,
stride 4 for THUMOS14, 16 for FineAction, --pool all: VideoMAE V2's script). What is done is not done again;
a folder begun with another model or stride is refused. Unreadable videos are named at the end.
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

from video import annotations  # noqa: E402
from video.annotations import DataError  # noqa: E402
import clip_video  # noqa: E402
from video.decoding import Video  # noqa: E402
from video.transforms import normalise  # noqa: E402
import mae  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402

CHUNK = 512  # frames in memory at a time


def load(source):
    """An encoder with .config of "frames" and "image_size", .mean and .std; see train.load_encoder, and ViCLIP."""
    tensors, config = weights.read(source)
    if config.get("kind") == "joint" or any("temporal_positional_embedding" in name for name in tensors):
        return clip_video.VideoCLIP.from_official(source).eval()
    return train.load_encoder(source).eval()


@torch.no_grad()
def features(model, clips, pool):
    """uint8 (B, T, H, W, 3) -> float32 (B, D) for pool="all", (B, t, D) for "space", (B, t, h w, D) for "none"."""
    video = normalise(clips, model.mean, model.std)
    if isinstance(model, mae.VideoClassifier):
        if pool == "all":
            return model.feature(video).float()
        tokens = model.tokens(video).unflatten(1, (model.encoder.grid_of(*video.shape[2:])[0], -1))
    elif isinstance(model, clip_video.VideoCLIP):  # ViCLIP: its class token, then frame by frame
        feature, tokens = model.encode_video_tokens(video)
        if pool == "all":
            return feature.float()
        tokens = tokens[:, 0, 1:].unflatten(1, (video.shape[2], -1))
    else:
        feature, tokens = model.encode(video)
        if pool == "all":
            return feature.float()
        tokens = tokens[:, :, 1:]
    return tokens.mean(dim=2).float() if pool == "space" else tokens.float()


def extract(model, video, stride, pool, batch_size, device):
    """(features, timestamps) of one open Video, as the head of this file says."""
    info, window = video.info, model.config["frames"]
    starts = np.arange(0, max(info.frames - window, 0) + 1, stride)
    numbers = np.minimum(starts[:, None] + np.arange(window), info.frames - 1)        # (W, window)
    found = []
    per_chunk = max(1, (CHUNK - window) // stride + 1) if stride < window else max(1, CHUNK // window)
    for first in range(0, len(numbers), per_chunk):
        wanted = numbers[first:first + per_chunk]
        distinct, place = np.unique(wanted, return_inverse=True)
        frames = torch.from_numpy(video.read(distinct, model.config["image_size"]))
        for rows in torch.from_numpy(place.reshape(wanted.shape)).split(batch_size):
            found.append(features(model, frames[rows].to(device), pool).cpu())
    found = torch.cat(found).numpy()
    times = 1 if pool == "all" else found.shape[1]
    seen = np.asarray(info.timestamps)[numbers].reshape(len(numbers), times, -1)      # seconds of the frames in each row
    seen = (seen[..., 0] + seen[..., -1]) / 2
    return (found if pool == "all" else found.reshape(-1, *found.shape[2:])), seen.reshape(-1)


def places(paths, out, suffix):
    """{path of a video: path of its features}: sub-folders are kept, and suffixes where two would meet."""
    common = os.path.commonpath([Path(path).parent for path in paths])
    below = {path: Path(os.path.relpath(path, common)) for path in paths}
    met = collections.Counter(name.with_suffix("") for name in below.values())
    return {path: Path(out) / f"{name if met[name.with_suffix('')] > 1 else name.with_suffix('')}{suffix}"
            for path, name in below.items()}


def run(args):
    """Extract what is missing; returns {path: reason} of what cannot be read."""
    if args.stride < 1 or args.batch_size < 1:
        raise train.UserError("--stride and --batch-size must be at least 1")
    paths = list(dict.fromkeys(row.path for row in annotations.read(args.data).rows))
    model, out, device = load(args.model), Path(args.out), train.choose_device(args.device)
    model.to(device)
    settings = dict(model=weights.fingerprint(args.model), window=model.config["frames"], stride=args.stride, pool=args.pool,
                    format=args.format)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists() and json.loads((out / "settings.json").read_text()) != settings:
        raise train.UserError(f"--out {out}: holds features made with {(out / 'settings.json').read_text().strip()}; "
                            "use another folder")
    (out / "settings.json").write_text(json.dumps(settings) + "\n")
    targets = places(paths, out, "." + args.format)
    waiting, bad = [path for path in paths if not targets[path].exists()], {}
    print(f"{args.data}: {len(paths):,} videos, {len(paths) - len(waiting):,} done already; window of "
          f"{settings['window']} frames, model {settings['model']}")
    for path in tqdm(waiting, unit="video", dynamic_ncols=True):
        try:
            with Video(path) as video:
                feats, timestamps = extract(model, video, args.stride, args.pool, args.batch_size, device)
                info = video.info
        except DataError as error:
            bad[path] = str(error)
            continue
        targets[path].parent.mkdir(parents=True, exist_ok=True)

        def write(aside):
            with open(aside, "wb") as file:
                if args.format == "npy":
                    np.save(file, feats)
                else:
                    np.savez(file, feats=feats, timestamps=timestamps, fps=info.fps, duration=info.duration,
                             frames=info.frames, **{key: settings[key] for key in ("window", "stride", "pool", "model")})
        weights.write_aside(targets[path], write)
    return bad


def main(argv=None):
    """Returns the exit code: 0, 1 where videos could not be read, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or list, as --data of train.py")
    parser.add_argument("--model", required=True, help="a run's folder, or an official file of weights")
    parser.add_argument("--out", default="runs/features", help="folder (default: runs/features)")
    parser.add_argument("--stride", type=int, default=16, help="frames from one window to the next (default: 16)")
    parser.add_argument("--pool", default="all", choices=("none", "space", "all"), help="what is averaged (default: all)")
    parser.add_argument("--format", default="npz", choices=("npz", "npy"), help="npy = features alone (default: npz)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (default: 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    try:
        bad = run(args)
    except (train.UserError, weights.WeightsError, DataError, OSError) as error:
        print(f"extract.py: {error}", file=sys.stderr)
        return 2
    for reason in bad.values():
        print(f"bad: {reason}")
    print(f"wrote {args.out}" + (f"; {len(bad)} videos cannot be read, see above" if bad else ""))
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
