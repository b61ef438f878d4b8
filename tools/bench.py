"""Measure what the text claims: ratios of two forms, interleaved in one run, medians.

    python tools/bench.py                    all subjects
    python tools/bench.py mae caption        some: mae, clip, video, caption, step, attention ...
    python tools/bench.py table [FILE ...]   the table of docs/speed.md from the --json files
    python tools/bench.py --list

A time alone says more about the machine than about the code, so every line is a ratio. The forms
take turns, and the median of each counts. First their results are compared, in float32 to 1e-3 and
in bfloat16 to 5e-2 of the largest number (8 bits of mantissa, 12 to 24 layers). --peaks measures
memory too, in a process of its own per form (on CUDA: of the allocator). A form that the device's
memory does not hold is named, and the others go on. --json FILE keeps all numbers and the machine
that they come from; subjects measured earlier stay in it. Nothing here is a test.

Others' implementations come from PyPI, in an environment of the bench's own; none is a dependency,
and what is not installed is left out:

    pip install transformers open_clip_torch

With OMP_NUM_THREADS=1 (and, on a machine that others use, `taskset -c 0` before it) times are
processor seconds, which other processes hardly change. Otherwise, and on CUDA, they are wall-clock
seconds. "share" is the share of the rate of plain matrix products, measured before and after.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import subprocess
import tempfile
import time
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention  # noqa: E402
import caption_decoder  # noqa: E402
import clip_video  # noqa: E402
import data  # noqa: E402
import mae  # noqa: E402
import uniformerv2  # noqa: E402
from engine import large_batches, machine, optimisers  # noqa: E402
from caption_decoder import VideoText  # noqa: E402
from video import decoding, moving_shapes, sampling, transforms  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = []      # of all tables of a subject, for --json
PEAKS = False  # --peaks
LARGE = False  # --large


def clock():
    """Seconds, once the device is idle."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    one_thread = DEVICE == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one_thread else time.perf_counter()


def times(forms, rounds=5, warm=True):
    """{name: function} -> {name: median seconds}. Forms take turns; warm: one call before that."""
    seconds = {name: [] for name in forms}
    for i in range(-warm, rounds):
        for name, run in forms.items():
            started = clock()
            run()
            if i >= 0:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def products(precision):
    """Let float32 products of "ours" go where train.py lets them go; the default for others."""
    if DEVICE == "cpu":
        choice = "bf16" if precision == "ours" and PRODUCTS == "on" else "none"
        torch.backends.mkldnn.matmul.fp32_precision = choice


PRODUCTS = "off"  # `prepare` asks machine.choose_onednn


def rate(precision):
    """Operations a second of plain matrix products: what a perfect network would reach. The best
    of many, also of earlier calls: what takes longer met a neighbour."""
    n = 8192 if DEVICE == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    products("ours")
    for _ in range(20):
        started = clock()
        a @ b
        BEST[precision] = max(BEST.get(precision, 0.0), 2 * n**3 / (clock() - started))
    return BEST[precision]


BEST = {}  # {precision: rate}


def added_product(into, a, b, *_, **__):
    return 2 * a[0] * a[1] * b[1]


def convolved_back(grad, x, kernel, *_, **__):
    """Twice the forward pass, also where channels do not mix (torch counts as if they did)."""
    return 4 * math.prod(grad) * math.prod(kernel[1:])


def read_by_all(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


def read_by_all_back(grad, q, k, v, *_, **__):
    return sdpa_backward_flop_count(grad, q, k, v)


def counted(run):
    """(what a call returns, its operations): products and convolutions of both passes, 2 for a
    multiplication and an addition. Compiled code runs uncompiled here, because the counter sees
    operators, not generated kernels. nan for FlexAttention, which refuses that. (Torch counts the
    fused attention of GPUs, not that of CPUs: added.)"""
    aten = torch.ops.aten
    added = {aten.addmm_: added_product, aten.convolution_backward: convolved_back,
             aten._scaled_dot_product_flash_attention_for_cpu: read_by_all,
             aten._scaled_dot_product_flash_attention_for_cpu_backward: read_by_all_back}
    try:
        with torch.compiler.set_stance("force_eager"), \
                FlopCounterMode(display=False, custom_mapping=added) as counter:
            result = run()
    except TypeError:
        return run(), math.nan
    return result, counter.get_total_flops()


TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of the largest number


def table(title, case, forms, clips, rounds=5, others=(), due=None, unit="clips"):
    """Measure `case(form)` for all forms; one table, how many times as long as "ours" each takes.

    case    form -> a function that takes a step and returns its loss, or anything to compare
    forms   tuples of a name, "fp32" or "bf16", and whatever else the case needs
    clips   in a step; unit: what they are
    others  names of forms that compute something else: not compared, and their work is their own
    due     operations that a step needs; default: what "ours" does
    """
    runs, first, work = {}, {}, {}
    for form in forms:
        try:
            runs[form] = tried(form, lambda: case(form))
            first[form], work[form] = tried(form, lambda: counted(runs[form])) or (None, None)
        except ImportError as error:
            print(f"{title}: no {form[0]} here ({error}); "
                  "pip install transformers open_clip_torch")
    for form in [form for form, result in first.items() if result is None]:
        ROWS.append(dict(table=title, form=form[0], precision=form[1], out_of_memory=True))
        del runs[form], first[form], work[form]
    ours = {form[1]: form for form in work if form[0] == "ours"}
    for form in work:
        assert torch.isfinite(first[form]).all(), f"{title}: {form[0]} {form[1]} is not finite"
        if form[0] not in others and form[1] in ours:
            close(first[form], first[ours[form[1]]], TOLERANCE[form[1]])
    first.clear()
    free()
    precisions = sorted({form[1] for form in work})
    for precision in precisions:
        rate(precision)
    warm = DEVICE == "cuda"  # compiled forms: the first call was counted uncompiled
    seconds = times({form: runs[form] for form in work}, rounds, warm)
    rates = {precision: rate(precision) for precision in precisions}
    runs.clear()
    free()
    peaks = {form: peak_mib(case, form) if PEAKS else math.nan for form in seconds}
    needed = {form: due or work[form if form[0] in others else ours.get(form[1], form)]
              for form in seconds}  # the same network needs no more than ours
    show(title, seconds, clips, peaks, needed, rates, unit)


def show(title, seconds, clips, peaks, due=None, rates=None, unit="clips"):
    """Print a table and keep its rows.

    seconds, peaks (MiB), due (operations): {form: number}; rates: {precision: operations per
    second}. "-" stands for what was not measured.
    """
    ours = {form[1]: form for form in seconds if form[0] == "ours"}
    best = ", ".join(f"{p}: {r / 1e9:,.0f} GFLOP/s" for p, r in (rates or {}).items())
    print(title + f" ({best})" * bool(best))
    print(f"  {'form':26}{'':6}{'ms':>9}{unit + '/s':>11}" + "".join(f"{'x ' + p:>9}" for p in ours)
          + f"{'peak MiB':>10}{'share':>7}")
    for form, value in seconds.items():
        ratios = {p: value / seconds[ours[p]] for p in ours}
        share = due[form] / value / rates[form[1]] if due else math.nan
        cells = [f"{1e3 * value:9.{1 if value >= 0.01 else 3}f}", f"{clips / value:11.2f}",
                 *(f"{x:9.2f}" for x in ratios.values()), f"{peaks[form]:10.0f}", f"{share:7.0%}"]
        cells = ["-".rjust(len(cell)) if "nan" in cell else cell for cell in cells]
        print(f"  {form[0]:26}{form[1]:6}" + "".join(cells), flush=True)
        row = dict(table=title, form=form[0], precision=form[1], ms=1e3 * value,
                   clips_per_s=clips / value, unit=unit, peak_mib=peaks[form], share=share,
                   gflops=rates[form[1]] / 1e9 if rates else math.nan)
        ROWS.append({key: None if x != x else x for key, x in row.items()})


def tried(form, run):
    """What `run()` returns, or None where the device's memory does not suffice, which is said."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return run()
    print(f"{' '.join(form[:2])}: out of memory", flush=True)
    free()


def free():
    """Give back what the device's allocator keeps, so that the next form finds it."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def training(model, loss, precision, ours, optimiser=None):
    """A step of AdamW as a function; `loss()` runs under autocast where precision says so."""
    optimiser = optimiser or torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run():
        products("ours" if ours else "theirs")
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        return value.detach()
    return run


def close(a, b, tolerance=1e-3):
    """Stop where two forms do not agree; both flattened to one tensor."""
    error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    if not error <= tolerance:
        raise SystemExit(f"bench.py: the two forms differ by {error:.1e} of the largest number")


def prepare(threads):
    """The state of a process that measures, the same in all: allocator, threads, oneDNN or not."""
    global PRODUCTS
    machine.keep_memory()
    torch.set_num_threads(threads)
    PRODUCTS = machine.choose_onednn("auto")[0] if DEVICE == "cpu" else "off"


def peak_mib(case, form):
    """Memory that two calls of `case(form)` add at their peak, in MiB, seen from a fresh process.
    The second step of a training counts: it finds the optimiser's states there. nan = out of
    memory, or a CPU under another system than Linux."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, prepare, (torch.get_num_threads(),)) as pool:
        return pool.apply(peak_of, (case, form))


def peak_of(case, form):
    peak = tried(form, lambda: peak_of_two(case, form))
    return math.nan if peak is None else peak


def peak_of_two(case, form):
    run, status = case(form), Path("/proc/self/status")
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(), run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not status.exists():
        return math.nan
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory counts as new when it is used again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of starting up
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    run(), run()
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 2**10


# ------------------------------------------------------------------------------------------------
# Cases


def caption_case(form):
    """form: (name, precision). 32 sentences of 77 tokens, a third of them padding, 49,408 words."""
    name, precision = form
    torch.manual_seed(0)
    decoder = caption_decoder.CaptionDecoder(512, heads=8, depth=1, visual_width=64,
                                             vocabulary=49408, queries=4).to(DEVICE)
    hidden = torch.randn(32, 76, 512, device=DEVICE, requires_grad=True)
    ids = torch.randint(49408, (32, 77), device=DEVICE)
    lengths = torch.linspace(26, 77, 32, device=DEVICE).long()
    is_text = torch.arange(77, device=DEVICE) < lengths[:, None]

    def run():
        products("ours" if name == "ours" else "theirs")
        decoder.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            if name == "plain":
                loss = caption_decoder.caption_loss(decoder.logits(hidden), ids, is_text)
            else:
                loss = large_batches.chunked_caption_loss(decoder, hidden, ids, is_text)
        loss.backward()
        return loss.detach()
    return run


def coca_case(form):
    """form: (name, precision, pairs). A step of CoCa ViT-B/32 on pictures, with both losses."""
    import open_clip
    name, precision, pairs = form
    torch.manual_seed(0)
    pictures = torch.randn(pairs, 3, 224, 224, device=DEVICE)
    ids = torch.randint(1, 49000, (pairs, 77), device=DEVICE)
    if name == "ours":
        clip = clip_video.VideoCLIP(uniformerv2.Size(768, 12, 12, 3072, 32), text_size="b16",
                                    kind="frames", frames=1)
        decoder = caption_decoder.CaptionDecoder(512, heads=8, depth=12, visual_width=768,
                                                 vocabulary=49408, queries=256)
        model = VideoText(clip, decoder).to(DEVICE).train()
        ids[:, -1] = 49407
        is_text = torch.ones_like(ids, dtype=torch.bool)

        def loss():
            video, text, hidden = model(pictures[:, :, None], ids)
            return clip_video.contrastive_loss(video, text, clip.logit_scale) \
                + 2 * large_batches.chunked_caption_loss(decoder, hidden, ids, is_text)
    else:
        model = open_clip.create_model("coca_ViT-B-32", pretrained=None)
        # open_clip 3.3 leaves this one uninitialised, and its own init_parameters fails.
        decoder = model.text_decoder
        torch.nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)
        model.to(DEVICE).train()
        compare = open_clip.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

        def loss():
            return sum(compare(**model(pictures, ids[:, :76])))
    return training(model, loss, precision, name == "ours")


def bench_caption():
    """The captioning loss over 49,408 words, whole and in chunks; a step of open_clip's CoCa."""
    forms = [(name, precision) for precision in ("fp32", "bf16") for name in ("plain", "ours")]
    table("captioning loss, 32 x 76 of 49,408 words", caption_case, forms, 32,
          rounds=3)
    pairs = 8 if DEVICE == "cpu" else 128
    table(f"CoCa ViT-B/32, {pairs} pictures (12 layers each, not the same network)", coca_case,
          [(name, precision, pairs) for precision in ("fp32", "bf16")
           for name in ("open_clip CoCa", "ours")], pairs, rounds=3, others=("open_clip CoCa",))


ATTENTIONS = {  # (B, heads, N, K)
    "encoder S": (8, 6, 40, 64), "decoder S": (8, 3, 392, 64), "encoder B": (2, 12, 160, 64),
    "decoder B": (2, 6, 1568, 64), "frames of CLIP B": (8, 12, 197, 64),
    "caption, causal": (8, 8, 77, 64), "window of 3 frames": (2, 8, 1568, 64)}


def mask_of(what):
    """The mask of one of ATTENTIONS, or None."""
    if what == "caption, causal":
        return attention.Mask(causal=True)
    if what == "window of 3 frames":
        frames = torch.arange(ATTENTIONS[what][2], device=DEVICE)[None] // 196
        return attention.Mask(frames=frames, window=1)
    return None


def attention_case(form):
    """form: (form of attention, precision, one of ATTENTIONS, with the backward pass?). "ours" is
    what attention.choose returns."""
    name, precision, what, learn = form
    torch.manual_seed(0)
    mask, dtype = mask_of(what), torch.float32 if precision == "fp32" else torch.bfloat16
    inputs = [x.requires_grad_(learn)
              for x in torch.randn(3, *ATTENTIONS[what], device=DEVICE, dtype=dtype)]

    def run():
        products("ours")
        with torch.set_grad_enabled(learn):
            out = attention.attention(*inputs, mask, form="auto" if name == "ours" else name)
        return torch.stack(torch.autograd.grad(out.square().sum(), inputs)) if learn else out
    return run


def bench_attention():
    """Every form of attention on the shapes of the networks, forward and with backward.

    Due is what the allowed pairs need: 4 K operations, three times that with the backward pass."""
    for what, (B, heads, N, K) in ATTENTIONS.items():
        mask, pairs = mask_of(what), B * N * N
        if mask is not None:
            pairs = int(mask.allowed(N, N, DEVICE).sum()) * B // mask.rows
        for learn in (False, True):
            can_flex = not (DEVICE == "cpu" and learn) and not attention.no_compiler(DEVICE)
            names = ["reference", "sdpa", *["flex"] * (mask is not None and can_flex), "ours"]
            forms = [(name, precision, what, learn) for precision in ("fp32", "bf16")
                     for name in names]
            table(f"attention, {what} {B, heads, N, K}, forward{' and backward' * learn}",
                  attention_case, forms, B, rounds=7, unit="rows",
                  due=4 * heads * K * pairs * (3 if learn else 1))


def hugging_face(size, pixels, frames, attend):
    """transformers' VideoMAE of one of our sizes."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=pixels, patch_size=size.patch, num_frames=frames, hidden_size=size.width,
        num_hidden_layers=size.depth, num_attention_heads=size.heads,
        intermediate_size=size.mlp_width, decoder_hidden_size=size.decoder_width,
        decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_heads,
        decoder_intermediate_size=size.decoder_mlp_width, use_mean_pooling=False,
        attn_implementation=attend)
    return VideoMAEForPreTraining(config)


def mae_case(form):
    """form: (name, precision, size, pixels, clips). From uint8 clips on the device to weights."""
    name, precision, size, pixels, clips = form
    size, frames = mae.SIZES[size], 16
    grid = (frames // 2, pixels // size.patch, pixels // size.patch)
    clip = torch.randint(256, (clips, frames, pixels, pixels, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0)).to(DEVICE)
    hidden = mae.tube_mask(clips, grid, 0.9, torch.Generator().manual_seed(0))
    if name.startswith("ours"):
        if importlib.util.find_spec("transformers"):  # the same weights: losses are compared
            theirs = hugging_face(size, pixels, frames, "eager").state_dict()
            model = mae.VideoMAE.from_official(theirs, frames=frames, image_size=pixels,
                                               decoder_heads=size.decoder_heads)
        else:
            model = mae.VideoMAE(size, frames=frames, image_size=pixels)
        model = model.to(DEVICE).train()
        if "compiled" in name:
            machine.compile_blocks(model)

        def loss():
            video = clip.permute(0, 4, 1, 2, 3)
            with torch.autocast(DEVICE, enabled=False):
                target = mae.reconstruction_target(video, hidden, patch=size.patch)
            return mae.reconstruction_loss(model(video, hidden), target)
    else:
        model = hugging_face(size, pixels, frames, name.split()[-1]).to(DEVICE).train()
        mask = hidden.to(DEVICE)

        def loss():
            video = transforms.normalise(clip, mae.IMAGENET_MEAN, mae.IMAGENET_STD)
            video = video.transpose(1, 2)
            return model(video, mask).loss
    return training(model, loss, precision, name.startswith("ours"))


def bench_mae():
    """A training step of VideoMAE against transformers' (eager and SDPA), from the same weights."""
    names = ["transformers eager", "transformers sdpa", "ours"]
    sizes = [("base", 224, 8)] if LARGE else [("small", 112, 8), ("base", 224, 2)]
    if DEVICE == "cuda":
        sizes, names = [("base", 224, 32), ("large", 224, 32)], [*names, "ours compiled"]
    for size, pixels, clips in sizes:
        forms = [(name, precision, size, pixels, clips) for precision in precisions()
                 for name in names]
        table(f"VideoMAE-{size[0].upper()}, {clips} clips of 16x{pixels}x{pixels}", mae_case, forms,
              clips, rounds=5 if size == "small" else 3)


def precisions():
    """Large batches, and GPUs: bfloat16 alone."""
    return ("bf16",) if LARGE or DEVICE == "cuda" else ("fp32", "bf16")


def step_case(form):
    """form: (name, precision). A whole step of VideoMAE-S on 8 clips of 112 pixels: the optimiser,
    and where the clips come from."""
    name, precision = form
    torch.manual_seed(0)
    model = mae.VideoMAE("small", image_size=112).to(DEVICE).train()
    recipe = SimpleNamespace(optimizer="muon" if name == "Muon" else "adamw", weight_decay=0.05,
                             beta2=0.95, scale_of=lambda *_: 1.0)
    optimiser = optimisers.build_optimizer(model, recipe)
    optimiser.set_rate(1e-6)
    shapes = moving_shapes.MovingShapes("train", frames=16, size=112, seed=0)
    batches = data.batches(shapes, 8, 0, 10**6)
    if name == "decoded clips":
        folder = tempfile.TemporaryDirectory()
        for i in range(8):
            made_video(Path(folder.name) / f"{i}.mp4", 640, 360, 150)
        files = data.open_clips(folder.name, frames=16, size=112, part="all")
        batches = data.batches(files, 8, 0, 10**6)
        model.folder = folder  # removed with the model
    elif name != "rendered clips":
        batches = itertools.repeat(next(batches))
    hidden = mae.tube_mask(8, model.grid, 0.9, torch.Generator().manual_seed(0))

    def loss():
        video = next(batches)["video"].to(DEVICE).permute(0, 4, 1, 2, 3)
        with torch.autocast(DEVICE, enabled=False):
            target = mae.reconstruction_target(video, hidden, patch=model.encoder.patch)
        return mae.reconstruction_loss(model(video, hidden), target)
    return training(model, loss, precision, True, optimiser)


def bench_step():
    """Whole steps of VideoMAE-S: AdamW ("ours") or Muon; clips rendered or decoded in the step."""
    names = ("ours", "Muon", "rendered clips", "decoded clips")
    table("whole step, VideoMAE-S, 8 clips of 16x112x112", step_case,
          [(name, precision) for precision in precisions() for name in names], 8,
          others=names[2:])


def clip_case(form):
    """form: (name, precision, pairs). Pictures and sentences, contrastive loss; CLIP ViT-B/16."""
    import open_clip
    name, precision, pairs = form
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    pictures, ids = torch.randn(pairs, 3, 224, 224), torch.randint(1, 49000, (pairs, 77))
    ids[:, 40] = 49407  # the end of each sentence is its largest number
    pictures, ids = pictures.to(DEVICE), ids.to(DEVICE)
    if name == "ours":
        model = clip_video.VideoCLIP.from_official(theirs.state_dict(), frames=1)
        model = model.to(DEVICE).train()

        def loss():
            return clip_video.contrastive_loss(*model(pictures, ids))
    else:
        model, compare = theirs.to(DEVICE).train(), open_clip.loss.ClipLoss()

        def loss():
            return compare(*model(pictures, ids))
    return training(model, loss, precision, name == "ours")


def bench_clip():
    """A contrastive step of CLIP ViT-B/16 and open_clip's, from the same weights."""
    pairs = 256 if DEVICE == "cuda" else 64 if LARGE else 8
    table(f"CLIP ViT-B/16, {pairs} pictures", clip_case,
          [(name, precision, pairs) for precision in precisions()
           for name in ("open_clip", "ours")], pairs, rounds=2 if LARGE else 3)


def plain_temporal(x, kernel, bias):
    """uniformerv2.temporal_conv as one convolution in time and space."""
    x = x.permute(0, 3, 1, 2)[..., None]
    x = torch.nn.functional.conv3d(x, kernel[:, None, :, None, None], bias, padding=(1, 0, 0),
                                   groups=len(kernel))
    return x[..., 0].permute(0, 2, 3, 1)


def plain_grid(x, kernel, bias):
    """uniformerv2.grid_conv as one convolution in time and space."""
    x = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), kernel, bias, padding=1,
                                   groups=len(kernel))
    return x.permute(0, 2, 3, 4, 1)


def video_case(form):
    """form: (name, precision, train or infer). UniFormerV2-B/16 with local units, 8 frames."""
    name, precision, way = form
    torch.manual_seed(0)
    video = torch.randn(1, 3, 8, 224, 224, device=DEVICE)
    answer = torch.tensor([3], device=DEVICE)
    model = uniformerv2.UniFormerV2("b16", classes=400, local_units=2, global_mlp_dropout=0.0,
                                    head_dropout=0.0)
    for part in model.modules():  # their outputs start at zero
        if isinstance(part, uniformerv2.LocalUnit):
            torch.nn.init.normal_(part.expand.weight, std=0.02)
    model.to(DEVICE).train(way == "train")
    start = {key: value.clone() for key, value in model.state_dict().items()}

    def loss():
        with contextlib.ExitStack() as patches:
            if name == "plain":
                for owner, function, plain in (
                        (uniformerv2, "temporal_conv", plain_temporal),
                        (uniformerv2, "grid_conv", plain_grid),
                        (attention, "choose", lambda *_: "sdpa")):
                    patches.enter_context(unittest.mock.patch.object(owner, function, plain))
            return torch.nn.functional.cross_entropy(model(video).float(), answer)

    if way == "train":
        step = training(model, loss, precision, name == "ours")
        first = []

        def run():
            if not first:  # running statistics move with every step: the first one is compared
                model.load_state_dict(start)
            first.append(1)
            return step()
        return run

    model.requires_grad_(False)

    @torch.no_grad()
    def run():
        products("ours" if name == "ours" else "theirs")
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            return loss()
    return run


def bench_video():
    """UniFormerV2-B/16 with local units on 8 frames of 224 pixels, plain and ours."""
    for way in ("infer", "train"):
        table(f"UniFormerV2-B/16, {way}", video_case,
              [(name, precision, way) for precision in precisions() for name in ("plain", "ours")],
              1, rounds=3)


def sample_videos(folder):
    """Paths of real files, from the folder VIDEOS or shared/videos; otherwise of one made here."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "videos"
    videos = Path(os.environ.get("VIDEOS", beside))
    names = ("dog.mp4", "coffee.mp4", "bottles.mp4", "chaplin.mp4", "his_girl_friday.mp4",
             "insect.mp4", "flower.webm", "nasa_13013_hdr.mp4", "man_av1.mp4", "asl/again.mkv",
             "seabirds.avi")
    if all((videos / name).is_file() for name in names):
        return [videos / name for name in names]
    return [made_video(Path(folder) / "made.mp4", 640, 360, 150)]


def made_video(path, width, height, frames):
    """Write coloured tiles that change every third frame; returns the path."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            rng = torch.Generator().manual_seed(i // 3)
            picture = torch.randint(256, (12, 16, 3), generator=rng, dtype=torch.uint8)
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame.reformat(width, height, "yuv420p")))
        container.mux(stream.encode())
    return path


def ours(path, numbers, size):
    """Frames of a file, as in training: nothing is known of it beforehand."""
    with decoding.Video(path) as video:
        video.info
        return video.read(numbers, size)


def plain_loop(path, numbers, size):
    """Decode from the start, keep the frames that are wanted."""
    import av
    import numpy as np
    wanted, frames = set(numbers.tolist()), {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                frames[i] = frame.reformat(size[1], size[0], "rgb24").to_ndarray()
            if i == numbers.max():
                break
    return np.stack([frames[i] for i in numbers.tolist()])


CHOICES = {"stride 4, centre": lambda n: sampling.dense_indices(n, 16, 4),
           "spread over the video": lambda n: sampling.segment_indices(n, 16)}


def bench_decode():
    """Sixteen frames of a file at short side 256: video/decoding.py and a plain PyAV loop.

    Both open the file anew and get the same frame numbers; ours also looks at the file first, as
    in training. Frames of another time would differ by more than resizing, and are named."""
    with tempfile.TemporaryDirectory() as folder:
        videos = sample_videos(folder)
        for what, choose in CHOICES.items():
            total = {("plain loop", "bytes"): 0.0, ("ours", "bytes"): 0.0}
            for path in videos:
                for form, value in decode_file(path, what, choose).items():
                    total[form, "bytes"] += value
            show(f"decode, {what}, {len(videos)} files", total, len(videos),
                 dict.fromkeys(total, math.nan))


def decode_file(path, what, choose):
    """Compare and time both forms on one file -> {name: seconds}."""
    info = decoding.probe(path)
    call = path, choose(info.frames), decoding.shown_size(info, 256)
    differ = abs(plain_loop(*call).astype(float) - ours(*call)).mean() > 6
    seconds = times({"plain loop": functools.partial(plain_loop, *call),
                     "ours": functools.partial(ours, *call)}, 3)
    print(f"decode, {what}: {path.name} {info.codec} {info.width}x{info.height}, "
          + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
          + "; other frames" * bool(differ), flush=True)
    return seconds


def repeated(path, source, times):
    """Write a file of `times` copies of the video of another, one after the other; not encoded."""
    import av
    with av.open(str(source)) as once, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(once.streams.video[0])
        clock = once.streams.video[0].time_base
        packets = [packet for packet in once.demux(video=0) if packet.size]
        length = round(decoding.probe(source).duration / clock)
        for number in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.pts, again.dts = packet.pts + number * length, packet.dts + number * length
                again.time_base, again.is_keyframe = clock, packet.is_keyframe
                again.stream = stream
                copy.mux(again)
    return path


def bench_parts():
    """The last 10 s of an hour of 640x360 H.264, against the same 10 s in a file of their own."""
    with tempfile.TemporaryDirectory() as folder:
        alone = made_video(Path(folder) / "alone.mp4", 640, 360, 300)
        hour = repeated(Path(folder) / "hour.mp4", alone, 360)

        def clip(path, *part):
            with decoding.open_video(path, None, decoding.Part(*part) if part else None) as video:
                return video.read(sampling.segment_indices(video.info.frames, 16), 256)
        forms = {"a file of its own": lambda: clip(alone),
                 "part in seconds": lambda: clip(hour, 3590.0, 3600.0),
                 "part in frames": lambda: clip(hour, 359 * 300, 360 * 300, True)}
        same = all((form() == clip(alone)).all() for form in forms.values())
        seconds = times(forms, 15)
    least = seconds["a file of its own"]
    for name, value in seconds.items():
        print(f"parts: {name:18} {1e3 * value:8.1f} ms {value / least:6.2f} x"
              + "  other frames" * (not same), flush=True)
        ROWS.append(dict(table="parts", form=name, ms=1e3 * value, times_alone=value / least,
                         same_frames=bool(same)))


CASES = {"mae": bench_mae, "clip": bench_clip, "video": bench_video, "caption": bench_caption,
         "step": bench_step, "attention": bench_attention, "decode": bench_decode,
         "parts": bench_parts}


def conditions():
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[-1].splitlines()[0]
    versions = {name: importlib.import_module(name).__version__
                for name in ("torch", "torchvision", "transformers", "open_clip")
                if importlib.util.find_spec(name)}
    one_thread = DEVICE == "cpu" and torch.get_num_threads() == 1
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                            text=True, cwd=Path(__file__).parent).stdout.strip()
    return dict(date=str(datetime.date.today()), commit=commit, versions=versions,
                python=platform.python_version(),
                allocator=os.environ.get("LD_PRELOAD") or "of the C library",
                device=torch.cuda.get_device_name() if DEVICE == "cuda" else cpu,
                threads=torch.get_num_threads(),
                clock="processor seconds" if one_thread else "seconds", onednn=PRODUCTS)


# ------------------------------------------------------------------------------------------------
# The table of docs/speed.md


def markdown(paths):
    """Print two tables, with a column for each --json file: the time of the others divided by ours
    (both in float32; both in bfloat16; theirs in float32 against ours in bfloat16), and the share
    of the rate of plain products that ours reach (float32; bfloat16)."""
    measured = [rows_of(path) for path in paths]
    machines = [" + ".join(dict.fromkeys(row["device"] for row in rows)) for rows in measured]
    ratios, shares = {}, {}
    for place, rows in enumerate(measured):
        ms = {(row["table"], row["form"], row["precision"]): row["ms"] for row in rows}
        for title, form in dict.fromkeys((row["table"], row["form"]) for row in rows):
            empty = ["-"] * len(paths)
            if form == "ours":
                found = {row["precision"]: row["share"] for row in rows
                         if (row["table"], row["form"]) == (title, form) and row["share"]}
                if found:
                    shares.setdefault((title,), empty)[place] = ", ".join(
                        f"{found[p]:.0%}".replace("%", " %") if p in found else "-"
                        for p in ("fp32", "bf16"))
                continue
            pairs = (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"))
            cells = [f"{ms[title, form, a] / ms[title, 'ours', b]:.2f}"
                     if (title, form, a) in ms and (title, "ours", b) in ms else "-"
                     for a, b in pairs]
            if set(cells) != {"-"}:
                ratios.setdefault((title, form), empty)[place] = ", ".join(cells)
    for heads, table in ((("step", "others"), ratios), (("ours, share of products",), shares)):
        lines = [[*heads, *machines], ["---"] * (len(heads) + len(machines)),
                 *([*key, *cells] for key, cells in table.items())]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")


def rows_of(path):
    """The rows of a --json file, each with its device; without those of single kernels."""
    found = json.loads(Path(path).read_text())
    return [row | {"device": subject["device"]} for name, subject in found.items()
            if name != "attention" for row in subject["rows"] if "ms" in row and "table" in row
            and "precision" in row]


def keep(path, subject, about):
    """Write the rows of a subject into the --json file, beside those of others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.is_file() else {}
    found[subject] = dict(about, rows=list(ROWS))
    path.write_text(json.dumps(found, indent=1) + "\n")
    ROWS.clear()


def main():
    """Run the subjects asked for."""
    global PEAKS, LARGE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*",
                        help="default: all; see --list; or: table [FILE ...]")
    parser.add_argument("--list", action="store_true", help="name the subjects")
    parser.add_argument("--peaks", action="store_true", help="measure memory, too")
    parser.add_argument("--large", action="store_true",
                        help="mae and clip with large batches, up to 8 GB, in bfloat16")
    parser.add_argument("--json", default="runs/bench.json",
                        help="file for all numbers (default: runs/bench.json)")
    args = parser.parse_args()
    if args.subjects[:1] == ["table"]:
        paths = args.subjects[1:] or [args.json]
        if absent := [path for path in paths if not Path(path).is_file()]:
            parser.exit(2, f"bench.py: no file {absent[0]}: measure first, with --json FILE\n")
        return markdown(paths)
    for name in args.subjects:
        if name not in CASES and name != "all":
            parser.exit(2, f"bench.py: no subject {name!r}: choose all, table, "
                           f"{', '.join(CASES)}\n")
    if args.list:
        return print("\n".join(f"{name:12}{case.__doc__.splitlines()[0]}"
                               for name, case in CASES.items()))
    PEAKS, LARGE = args.peaks, args.large
    prepare(torch.get_num_threads())
    about = conditions()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for name in CASES if not args.subjects or "all" in args.subjects else args.subjects:
        CASES[name]()
        keep(Path(args.json), name + " --large" * LARGE, about)
    print(f"numbers: {args.json}")


if __name__ == "__main__":
    main()
