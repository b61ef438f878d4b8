"""Check on a GPU that every form of attention is correct, and measure the speed of training steps.

    python tools/gpu_check.py                   all parts, ten minutes; never run on a GPU so far
    python tools/gpu_check.py attention steps   only these parts
    python tools/gpu_check.py --toy             tiny sizes, to test this file, also on a CPU

attention   every form, mask and dtype against the definition in float64, with gradients
masks       time of FlexAttention against SDPA with the mask as a table
steps       time of training steps, and their share of the GPU's rate

It needs no internet connection and only the dependencies of train.py. If transformers is installed,
its steps are measured, too. The numbers are written to --json after each part. The exit code is 1
if a form of attention is wrong or a part fails.
"""

import argparse
import functools
import json
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench  # noqa: E402  (puts the repository on the path)
from bench import DEVICE, attention, clip_video, mae, machine, transforms  # noqa: E402

RESULTS = {}
TOY = False
STOP_AT = time.monotonic() + 9 * 60  # no new part after nine minutes


def note(part, /, **facts):
    """Print a line of results of a part, and store it for --json."""
    RESULTS.setdefault(part, []).append(facts)
    text = {key: f"{value:.4g}" if isinstance(value, float) else value
            for key, value in facts.items()}
    print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in text.items()), flush=True)


# ------------------------------------------------------------------------------------------------
# Parts


def masks(batch, queries, keys):
    """{name: Mask or None}. "nothing" masks all keys of all queries."""
    frames = torch.arange(keys, device=DEVICE)[None] // 40
    is_token = torch.rand(batch, keys, device=DEVICE) > 0.3
    named = {"none": None, "causal": attention.Mask(causal=True),
             "padding": attention.Mask(is_token=is_token),
             "nothing": attention.Mask(is_token=torch.zeros_like(is_token)),
             "window": attention.Mask(frames=frames, window=1),
             "all": attention.Mask(causal=True, is_token=is_token, frames=frames, window=1)}
    if queries == 1:
        return {name: named[name] for name in ("none", "padding", "nothing")}
    return named


def part_attention():
    """Compare outputs and gradients of every form with the definition in float64."""
    torch.manual_seed(0)
    sizes = ((torch.float32, 130, 261, 3), (torch.float32, 300, 300, 1), (torch.float32, 1, 9, 3),
             (torch.bfloat16, 300, 300, 3))
    wrong = 0
    for dtype, queries, keys, heads in sizes:
        for kind, mask in masks(2, queries, keys).items():
            # (B, heads, N, K), not contiguous, as a projection leaves them
            inputs = [torch.randn(2, n, size, 64, device=DEVICE).to(dtype).transpose(1, 2)
                      .requires_grad_() for n, size in ((queries, 3), (keys, heads), (keys, heads))]
            upstream = torch.randn_like(inputs[0])
            exact = [x.detach().double().requires_grad_() for x in inputs]
            expected = attention.attention(*exact, mask, form="reference")
            gradients = torch.autograd.grad(expected, exact, upstream.double())
            for form in ("reference", "sdpa", "flex", "auto"):
                facts = dict(dtype=str(dtype)[6:], queries=queries, keys=keys, mask=kind, form=form)
                try:
                    right, errors = compare(form, inputs, mask, upstream, [expected, *gradients])
                    note("attention", **facts, forward=errors[0], right=right,
                         gradients=max(errors[1:], default=float("nan")))
                except Exception as error:  # continue with the next form
                    right = False
                    note("attention", **facts, right=False, error=first_line(error))
                wrong += not right
    note("attention", tried=len(RESULTS["attention"]), wrong=wrong)


def compare(form, inputs, mask, upstream, expected):
    """(True if correct, [relative error of the output and of each gradient]).

    An error is the largest difference, divided by the largest expected number or 1.
    """
    backward = not (DEVICE == "cpu" and form == "flex")  # FlexAttention has none on a CPU
    with torch.set_grad_enabled(backward):
        out = attention.attention(*inputs, mask, form=form)
    results = [out, *(torch.autograd.grad(out, inputs, upstream) if backward else ())]
    errors = [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1))
              for a, b in zip(results, expected)]
    return max(errors) < (1e-5 if out.dtype == torch.float32 else 0.04), errors


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def part_masks():
    """Time FlexAttention against SDPA with the mask as a table, in bfloat16, with backward pass."""
    B, heads, N, K = (1, 2, 512, 64) if TOY else (8, 16, 1568, 64)
    row = torch.arange(N * B, device=DEVICE)[None]
    half = (row[0, :N] < N // 2).expand(B, -1)
    frames = row[:, :N] * 8 // N
    cases = {"packed, 4 to a length": (1, N * B, attention.Mask(frames=row // (N // 4))),
             "window of 3 frames of 8": (B, N, attention.Mask(frames=frames, window=1)),
             "half padding": (B, N, attention.Mask(is_token=half))}
    for name, (batch, length, mask) in cases.items():
        q, k, v = (torch.randn(batch, heads, length, K, device=DEVICE, dtype=torch.bfloat16)
                   .requires_grad_(DEVICE != "cpu") for _ in range(3))

        def form(kind):
            def run():
                with torch.set_grad_enabled(DEVICE != "cpu"):
                    out = attention.attention(q, k, v, mask, form=kind)
                if DEVICE != "cpu":
                    torch.autograd.grad(out.sum(), (q, k, v))
            return run
        runs = {kind: form(kind) for kind in ("sdpa", "flex")}
        if bench.tried((name, "sdpa"), lambda: runs["sdpa"]() or True) is None:  # table too large
            seconds = bench.times({"flex": runs["flex"]}, 10)
            note("masks", mask=name, table="out of memory", flex_ms=1e3 * seconds["flex"])
            continue
        seconds = bench.times(runs, 10)
        note("masks", mask=name, batch=batch, length=length, table_ms=1e3 * seconds["sdpa"],
             flex_ms=1e3 * seconds["flex"], ratio=seconds["sdpa"] / seconds["flex"])


def measured(part, name, loss, model, clips, rounds=10):
    """Measure a training step in bfloat16: milliseconds, share of the GPU's rate, peak memory; or
    note that the GPU has too little memory."""
    if bench.tried((name, "bf16"), lambda: measure(part, name, loss, model, clips, rounds)) is None:
        note(part, step=name, out_of_memory=True)


def measure(part, name, loss, model, clips, rounds):
    step = bench.training(model, loss, "bf16", ours=True)
    _, work = bench.counted(step)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    step()
    first_step = time.monotonic() - started
    seconds = bench.times({name: step}, rounds)[name]
    note(part, step=name, ms=1e3 * seconds, clips_per_s=clips / seconds,
         share=work / seconds / bench.rate("bf16"), gflop=work / 1e9, first_step_s=first_step,
         peak_mib=machine.memory_mib(DEVICE))
    return seconds


def masked(size, clips, pixels, frames):
    """A masked autoencoder and its loss on a batch of uint8 clips."""
    model = mae.VideoMAE(size, frames=frames, image_size=pixels).to(DEVICE).train()
    clip = torch.randint(256, (clips, frames, pixels, pixels, 3), dtype=torch.uint8, device=DEVICE)
    hidden = mae.tube_mask(clips, model.grid, 0.9, torch.Generator().manual_seed(0))

    def loss():
        video = clip.permute(0, 4, 1, 2, 3)
        with torch.autocast(DEVICE, enabled=False):
            target = mae.reconstruction_target(video, hidden, patch=model.encoder.patch)
        return mae.reconstruction_loss(model(video, hidden), target)
    return model, loss


def contrastive(name, clips):
    """A video-text model of 8 frames and its loss on a batch of uint8 clips."""
    torch.manual_seed(0)
    model = clip_video.VideoCLIP(name, kind="video", frames=8).to(DEVICE).train()
    shape = (clips, 8, *model.config["image_size"], 3)
    clip = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    ids = torch.randint(1, 49000, (clips, 77), device=DEVICE)
    ids[:, -1] = 49407

    def loss():
        with torch.autocast(DEVICE, enabled=False):
            video = transforms.normalise(clip, model.mean, model.std)
        return clip_video.contrastive_loss(*model(video, ids))
    return model, loss


def part_steps():
    """Measure steps of VideoMAE-B and -L and of the video-text model L, plain and compiled."""
    plans = [("tiny", 2, 32, 4)] if TOY else [("base", 64, 224, 16), ("large", 64, 224, 16)]
    clips, name = (2, "tiny") if TOY else (16, "l14")
    cases = [(f"VideoMAE {plan[0]}, {plan[1]} clips", plan[1], functools.partial(masked, *plan))
             for plan in plans]
    cases.append((f"UniFormerV2 {name} contrastive, {clips} clips of 8 frames", clips,
                  lambda: contrastive(name, clips)))
    for what, count, make in cases:
        for compiled in (False, True):
            model, loss = make()
            if compiled:
                machine.compile_blocks(model)
            measured("steps", what + ", compiled" * compiled, loss, model, count)
            del model, loss
            free()
    for size, count, pixels, frames in plans:
        if frames == 16:
            others(size, count, pixels)


def others(size, clips, pixels):
    """Measure the same steps of transformers, if it is installed."""
    for kind in ("eager", "sdpa"):
        form = (f"transformers {kind}", "bf16", size, pixels, clips)
        step = f"{form[0]} VideoMAE {size}, {clips} clips"
        try:
            seconds = bench.tried((step, "bf16"),
                                  lambda: bench.times({kind: bench.mae_case(form)}, 5)[kind])
        except ImportError:
            return note("steps", transformers="not installed")
        if seconds is None:
            note("steps", step=step, out_of_memory=True)
        else:
            note("steps", step=step, ms=1e3 * seconds, clips_per_s=clips / seconds)
        free()


def free():
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


PARTS = {"attention": part_attention, "masks": part_masks, "steps": part_steps}


def main():
    """Run the chosen parts. Returns the exit code."""
    global TOY
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to test this file")
    parser.add_argument("--json", default="runs/gpu_check.json", help="file for all results")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.exit(2, f"gpu_check.py: no part {', '.join(unknown)}: choose {', '.join(PARTS)}\n")
    TOY = args.toy
    if DEVICE == "cpu" and not TOY:
        parser.exit(2, "gpu_check.py: no GPU here; --toy tries this file on a CPU\n")
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    note("machine", **bench.conditions())
    for name in args.parts or PARTS:
        started = time.monotonic()
        if started > STOP_AT:
            note("skipped", part=name, reason="nine minutes are over; run it separately")
            continue
        try:
            PARTS[name]()
        except Exception as error:  # continue with the other parts
            traceback.print_exc()
            note("failed", part=name, error=first_line(error))
        note("seconds", part=name, seconds=time.monotonic() - started)
        path.write_text(json.dumps(RESULTS, indent=1) + "\n")
        free()
    print(f"numbers: {path}")
    return int("failed" in RESULTS
               or any(row.get("wrong") for row in RESULTS.get("attention", ())))


if __name__ == "__main__":
    raise SystemExit(main())
