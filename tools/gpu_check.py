"""What can only be seen on a GPU: are all kernels right there, and how far from the limit is a step?

    python tools/gpu_check.py                      all parts; meant for ten minutes, never run on a GPU so far
    python tools/gpu_check.py kernels masks        some
    python tools/gpu_check.py --toy                toy sizes, also on a CPU: does this file itself work?

Parts: kernels (every kernel, mask and dtype against the written-out attention in float64, gradients too),
masks (compiled kernels against a table for torch's fused one), steps (training steps and their share of the
GPU's rate), packed (clips of mixed length in one row against padded ones), convolutions.

It needs no network and nothing that train.py does not need; transformers, where installed, is measured beside
it. Each part's numbers are written to --json as soon as it is done. Exit code 1 where a kernel is wrong.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench  # noqa: E402  (puts the repository on the path)
from bench import DEVICE, attention, clip_video, mae, normalise, train, uniformerv2  # noqa: E402

FOUND = {}
TOY = False
STOP_AT = time.monotonic() + 9 * 60  # no new part after that: what runs this may allow ten minutes


def note(part, /, **facts):
    FOUND.setdefault(part, []).append(facts)
    print(f"{part}: " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                  for key, value in facts.items()), flush=True)


# ------------------------------------------------------------------------------------------------
# Parts


def masks(batch, queries, keys):
    """One of each kind; in "all", and in "nothing", some or all queries may look at nothing."""
    def draw(most, count):
        return torch.randint(0, most, (batch, count), device=DEVICE)
    frames, at = (torch.arange(n, device=DEVICE)[None] // 40 for n in (keys, queries))
    is_token = torch.rand(batch, keys, device=DEVICE) > 0.3
    segments, asking = draw(3, keys).sort()[0], draw(4, queries).sort()[0]
    return {"none": None, "causal": attention.Mask(causal=True), "padding": attention.Mask(is_token=is_token),
            "nothing": attention.Mask(is_token=torch.zeros_like(is_token)),
            "segments": attention.Mask(segments=segments, query_segments=asking),
            "window": attention.Mask(frames=frames, query_frames=at, window=1),
            "all": attention.Mask(causal=True, is_token=is_token, segments=segments, query_segments=asking,
                                  frames=frames, query_frames=at, window=1)}


def part_kernels():
    """Every kernel against the written-out attention in float64: values and gradients."""
    torch.manual_seed(0)
    sizes = {torch.float32: ((130, 261, 3), (300, 300, 1)), torch.bfloat16: ((300, 300, 3),)}
    wrong = 0
    for dtype, shapes in sizes.items():
        for queries, keys, heads in shapes + (((1, 9, 3),) if dtype == torch.float32 else ()):
            for kind, mask in masks(2, queries, keys).items():
                if queries == 1 and kind not in ("none", "padding", "nothing"):
                    continue
                # (B, heads, N, K), not contiguous, as a projection leaves them
                inputs = [torch.randn(2, n, size, 64, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_()
                          for n, size in ((queries, 3), (keys, heads), (keys, heads))]
                upstream = torch.randn_like(inputs[0])
                exact = [x.detach().double().requires_grad_() for x in inputs]
                expected = attention.attention(*exact, mask, kernel="written_out")
                reference = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
                for kernel in ("written_out", "piecewise", "fused", "flex", "auto"):
                    learn = not (DEVICE == "cpu" and kernel == "flex")
                    try:
                        with torch.set_grad_enabled(learn):
                            out = attention.attention(*inputs, mask, kernel=kernel)
                        got = [out, *(torch.autograd.grad(out, inputs, upstream) if learn else ())]
                        errors = [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, reference)]
                        right = max(errors) < (1e-5 if dtype == torch.float32 else 0.04) and \
                            (kind != "nothing" or all(bool((x == 0).all()) for x in got))
                        note("kernels", dtype=str(dtype)[6:], queries=queries, keys=keys, mask=kind, kernel=kernel,
                             forward=errors[0], gradients=max(errors[1:], default=float("nan")), right=right)
                    except Exception as error:  # the next kernel may be right
                        right = False
                        note("kernels", dtype=str(dtype)[6:], queries=queries, keys=keys, mask=kind, kernel=kernel,
                             right=False, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                    wrong += not right
    note("kernels", tried=len(FOUND["kernels"]), wrong=wrong)


def part_masks():
    """FlexAttention against a table for torch's fused kernel, forward and backward, in bfloat16."""
    B, heads, N, K = (1, 2, 512, 64) if TOY else (8, 16, 1568, 64)
    packed = torch.arange(N * B, device=DEVICE)[None] // (N // 4)
    cases = {"packed, 4 to a length": (1, N * B, attention.Mask(segments=packed)),
             "window of 3 frames of 8": (B, N, attention.Mask(frames=torch.arange(N, device=DEVICE)[None] * 8 // N, window=1)),
             "half padding": (B, N, attention.Mask(is_token=(torch.arange(N, device=DEVICE) < N // 2).expand(B, -1))),
             "causal, packed": (1, N * B, attention.Mask(causal=True, segments=packed))}
    for name, (batch, length, mask) in cases.items():
        q, k, v = (torch.randn(batch, heads, length, K, device=DEVICE, dtype=torch.bfloat16).requires_grad_(DEVICE != "cpu")
                   for _ in range(3))

        def form(kernel):
            def run():
                with torch.set_grad_enabled(DEVICE != "cpu"):
                    out = attention.attention(q, k, v, mask, kernel=kernel)
                if DEVICE != "cpu":
                    torch.autograd.grad(out.sum(), (q, k, v))
            return run
        run = {kernel: form(kernel) for kernel in ("fused", "flex")}
        if bench.tried((name, "fused"), lambda: run["fused"]() or True) is None:  # the table of a long row is large
            note("masks", mask=name, table="out of memory", flex_ms=1e3 * bench.times({"flex": run["flex"]}, 10)["flex"])
            continue
        seconds = bench.times(run, 10)
        note("masks", mask=name, batch=batch, length=length, table_ms=1e3 * seconds["fused"], flex_ms=1e3 * seconds["flex"],
             ratio=seconds["fused"] / seconds["flex"])
    for name, milliseconds in attention.fastest_fused(DEVICE).items():
        note("masks", fused=name, milliseconds=milliseconds)


def measured(part, name, loss, model, clips, rounds=10, work=None):
    """Milliseconds, share of the GPU's rate and peak memory of a training step in bfloat16. work: operations of
    a step; default: counted. Returns seconds a step; None where the memory does not suffice, which is noted."""
    seconds = bench.tried((name, "bf16"), lambda: _measured(part, name, loss, model, clips, rounds, work))
    if seconds is None:
        note(part, step=name, out_of_memory=True)
    return seconds


def _measured(part, name, loss, model, clips, rounds, work):
    step = bench.training(model, loss, "bf16", ours=True)
    if work is None:
        work = bench.flops(step)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    step()
    ready = time.monotonic() - started
    seconds = bench.times({name: step}, rounds)[name]
    note(part, step=name, ms=1e3 * seconds, clips_per_s=clips / seconds, share=work / seconds / bench.rate("bf16"),
         gflop=work / 1e9, first_step_s=ready, peak_mib=train.memory_mib(DEVICE))
    return seconds


def masked(size, clips, pixels, frames, compiled):
    """A masked autoencoder and its loss on a batch of bytes."""
    model = mae.VideoMAE(size, frames=frames, image_size=pixels).to(DEVICE).train()
    card = train.MAE(compile="on" if compiled else "off")
    if compiled:
        train.compile_blocks(model)
    clip = torch.randint(256, (clips, frames, pixels, pixels, 3), dtype=torch.uint8, device=DEVICE)
    hidden = mae.tube_mask(clips, model.grid, 0.9, torch.Generator().manual_seed(0))
    visible, wanted = (index.to(DEVICE) for index in mae.split_by_mask(hidden))

    def loss():
        video = clip.permute(0, 4, 1, 2, 3)
        with torch.autocast(DEVICE, enabled=False):
            target = card.faster(mae.target_of)(video, wanted, True, model.encoder.patch, 2)
        return mae.reconstruction_loss(model.reconstruct(video, visible, wanted), target)
    return model, loss


def part_steps():
    """Training steps of VideoMAE-B and -L and of the video-text model L, as they are and compiled."""
    plans = [("tiny", 2, 32, 4)] if TOY else [("base", 64, 224, 16), ("large", 64, 224, 16)]
    for size, clips, pixels, frames in plans:
        for compiled in (False, True):
            model, loss = masked(size, clips, pixels, frames, compiled)
            measured("steps", f"VideoMAE {size}, {clips} clips{', compiled' * compiled}", loss, model, clips)
            del model, loss
            free()
    try:
        for size, clips, pixels, frames in plans:
            for way in ("eager", "sdpa"):
                form = (f"transformers {way}", "bf16", size, pixels, clips)
                if frames == 16:
                    step = f"{form[0]} VideoMAE {size}, {clips} clips"
                    seconds = bench.tried((step, "bf16"), lambda: bench.times({way: bench.mae_case(form)}, 5)[way])
                    note("steps", step=step, **dict(out_of_memory=True) if seconds is None else
                         dict(ms=1e3 * seconds, clips_per_s=clips / seconds))
                    free()
    except ImportError:
        note("steps", transformers="not installed")
    clips, name = (2, "tiny") if TOY else (16, "l14")
    for compiled in (False, True):
        torch.manual_seed(0)
        model = clip_video.VideoCLIP(name, kind="video", frames=8).to(DEVICE).train()
        if compiled:
            train.compile_blocks(model)
        clip = torch.randint(256, (clips, 8, *model.config["image_size"], 3), dtype=torch.uint8, device=DEVICE)
        ids = torch.randint(1, 49000, (clips, 77), device=DEVICE)
        ids[:, -1] = 49407

        def loss():
            with torch.autocast(DEVICE, enabled=False):
                video = normalise(clip, model.mean, model.std)
            return clip_video.contrastive_loss(*model(video, ids))
        measured("steps", f"UniFormerV2 {name} contrastive, {clips} clips of 8 frames{', compiled' * compiled}", loss, model, clips)
        del model, loss
        free()


def part_packed():
    """Clips of mixed length: packed in a row against padded to the longest (plainly, without even a mask)."""
    clips, pixels, frames, size = (4, 32, 8, "tiny") if TOY else (32, 224, 16, "base")
    lengths = [(i % 4 + 1) * frames // 4 for i in range(clips)]
    torch.manual_seed(0)
    model = mae.VideoMAE(size, frames=frames, image_size=pixels).to(DEVICE).train()
    patch = model.encoder.patch
    video = torch.randint(256, (clips, frames, pixels, pixels, 3), dtype=torch.uint8, device=DEVICE).permute(0, 4, 1, 2, 3)
    videos = [clip[:, :T] for clip, T in zip(video, lengths)]
    rng = torch.Generator().manual_seed(0)
    hidden = [mae.tube_mask(1, model.encoder.grid_of(T, pixels, pixels), 0.9, rng)[0] for T in lengths]
    full = mae.tube_mask(clips, model.grid, 0.9, rng)

    def packed(model=model):
        with torch.autocast(DEVICE, enabled=False):
            target = torch.cat([mae.reconstruction_target(clip[None], mask[None], patch=patch)[0]
                                for clip, mask in zip(videos, hidden)])
        return mae.reconstruction_loss(model.packed(videos, hidden), target)

    def padded():
        with torch.autocast(DEVICE, enabled=False):
            target = mae.reconstruction_target(video, full, patch=patch)
        return mae.reconstruction_loss(model(video, full), target)

    def alone():
        """The loss of `packed` from the clips one by one; leaves its gradients."""
        count, total = sum(int(mask.sum()) for mask in hidden) * patch**2 * 6, 0.0
        for clip, mask in zip(videos, hidden):
            part = F.mse_loss(model(clip[None], mask[None]), mae.reconstruction_target(clip[None], mask[None], patch=patch),
                              reduction="sum") / count
            part.backward()
            total += float(part.detach())
        return total

    def gradient():
        found = model.encoder.embed.weight.grad.clone()
        model.zero_grad()
        return found

    loss = packed()                                                          # in float32
    loss.backward()
    got, loss, total = gradient(), float(loss.detach()), alone()
    expected = gradient()
    note("packed", loss=loss, alone=total, gradient_error=float((got - expected).norm() / expected.norm()))
    work = {"padded": None, "packed": bench.flops(alone)}
    for compiled in (False, True):
        if compiled:
            train.compile_blocks(model)
        seconds = {name: measured("packed", name + ", compiled" * compiled, form, model, clips, 5, work[name])
                   for name, form in (("padded", padded), ("packed", packed))}
        if all(seconds.values()):
            note("packed", compiled=compiled, ratio=seconds["padded"] / seconds["packed"])


def part_convolutions():
    """The temporal and the grid convolution of UniFormerV2 in each form, forward and backward, bfloat16."""
    B, t, side, D = (1, 2, 4, 16) if TOY else (16, 8, 16, 1024)
    x = torch.randn(B, t, side, side, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    kernels = {"temporal": torch.randn(D, 3, device=DEVICE), "grid": torch.randn(D, 1, 3, 3, 3, device=DEVICE)}
    bias = torch.zeros(D, device=DEVICE)

    def form(name, way):
        def run():
            with torch.autocast(DEVICE, torch.bfloat16):
                out = uniformerv2.temporal_conv(x.flatten(2, 3), kernels[name], bias, way) if name == "temporal" \
                    else uniformerv2.grid_conv(x, kernels[name], bias, way)
            out.sum().backward()
        return run
    for name, ways in (("temporal", ("conv3d", "conv2d", "shift")), ("grid", ("conv3d", "conv2d"))):
        seconds = bench.times({way: form(name, way) for way in ways}, 5)
        note("convolutions", convolution=name, **{way: 1e3 * value for way, value in seconds.items()})


def free():
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


PARTS = {"kernels": part_kernels, "masks": part_masks, "steps": part_steps, "packed": part_packed,
         "convolutions": part_convolutions}


def main():
    """Run the parts asked for; returns the exit code."""
    global TOY
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--json", default="runs/gpu_check.json", help="file for all numbers")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.exit(2, f"gpu_check.py: no part {', '.join(unknown)}: choose {', '.join(PARTS)}\n")
    TOY = args.toy
    if DEVICE == "cpu" and not TOY:
        parser.exit(2, "gpu_check.py: no GPU here; --toy tries this file on a CPU\n")
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    note("machine", **bench.machine())
    note("machine", attention=attention.use("auto", DEVICE))
    for name in args.parts or PARTS:
        started = time.monotonic()
        if started > STOP_AT:
            note("skipped", part=name, reason="nine minutes are over; run it by itself")
            continue
        try:
            PARTS[name]()
        except Exception as error:  # a part that fails must not take the others with it
            traceback.print_exc()
            note("failed", part=name, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        note("seconds", part=name, seconds=time.monotonic() - started)
        path.write_text(json.dumps(FOUND, indent=1) + "\n")
        free()
    print(f"numbers: {path}")
    return int("failed" in FOUND or any(row.get("wrong") for row in FOUND.get("kernels", ())))


if __name__ == "__main__":
    raise SystemExit(main())
