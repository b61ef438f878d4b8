"""Measure what the text claims: ratios of two things, interleaved in one run, medians.

    python tools/bench.py                    all cases
    python tools/bench.py cache loss         some
    python tools/bench.py --list

A time alone says more about the machine than about the code, so every line is a ratio: both forms take
turns, and the median of each counts. First the two are compared: a fast form with other numbers is no
gain. Peak memory is taken in a process of its own per form (on CUDA: of the allocator). Nothing here
is a test; what came out, and on which machine, belongs into LOG.md.
"""

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
import unittest.mock
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import caption_decoder  # noqa: E402
import clip_video  # noqa: E402
import fusion  # noqa: E402
import mae  # noqa: E402
import uniformerv2  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def times(forms, rounds=5):
    """{name: function} -> {name: median seconds}, the forms taking turns after one call to warm up."""
    found = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, run in forms.items():
            started = time.perf_counter()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if i:
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def report(what, seconds, slow, fast):
    print(f"{what}: {slow} {1e3 * seconds[slow]:.1f} ms, {fast} {1e3 * seconds[fast]:.1f} ms, "
          f"{seconds[slow] / seconds[fast]:.2f} times faster", flush=True)


def close(a, b, tolerance=1e-3):
    """Stop where two forms do not agree; both flattened to one tensor."""
    error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    if not error <= tolerance:
        raise SystemExit(f"bench.py: the two forms differ by {error:.1e} of the largest number")


def peak_mib(case, form):
    """Memory that one call of `case(form)` adds at its peak, in MiB, seen from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(peak_of, (case, form))


def peak_of(case, form):
    run = case(form)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if Path("/proc/self/clear_refs").exists():  # Linux: forget the peak of starting up, then read the new one
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kib("VmRSS")
        run()
        return (status_kib("VmHWM") - before) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def status_kib(name):
    """A line of Linux's account of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise SystemExit(f"bench.py: no {name} in /proc/self/status")


# ------------------------------------------------------------------------------------------------
# Cases


def bench_cache():
    """Writing 64 words with a key/value cache against computing everything anew for each word."""
    torch.manual_seed(0)
    decoder = caption_decoder.CaptionDecoder(512, heads=8, depth=6, visual_width=768, vocabulary=49408,
                                             queries=256).eval().to(DEVICE)
    words = 64
    for batch in (1, 4):
        visual = torch.randn(batch, 8 * 197, 768, device=DEVICE)
        text = torch.randn(batch, words, 512, device=DEVICE)

        @torch.no_grad()
        def cached():
            pooled, cache, out = decoder.pool(visual), None, []
            for i in range(words):
                hidden, cache = decoder.step(text[:, i:i + 1], pooled, cache)
                out.append(decoder.logits(hidden[:, -1]))
            return torch.stack(out, dim=1)

        @torch.no_grad()
        def anew():
            return torch.stack([decoder.logits(decoder.hidden(visual, text[:, :i + 1])[:, -1])
                                for i in range(words)], dim=1)

        close(cached(), anew())
        report(f"cache: {words} words, batch {batch}", times({"anew": anew, "cached": cached}, 2), "anew", "cached")


def caption_case(form):
    torch.manual_seed(0)
    decoder = caption_decoder.CaptionDecoder(512, heads=8, depth=1, visual_width=64, vocabulary=49408,
                                             queries=4).to(DEVICE)
    hidden = torch.randn(32, 76, 512, device=DEVICE, requires_grad=True)
    ids = torch.randint(49408, (32, 77), device=DEVICE)
    is_text = torch.ones(32, 77, dtype=torch.bool, device=DEVICE)

    def run():
        decoder.zero_grad(set_to_none=True)
        if form == "plain":
            loss = caption_decoder.caption_loss(decoder.logits(hidden), ids, is_text)
        else:
            loss = caption_decoder.chunked_caption_loss(decoder, hidden, ids, is_text)
        loss.backward()
        return loss.detach()
    return run


def bench_loss():
    """The captioning loss over 49,408 words, 32 x 76 tokens: whole against in chunks."""
    forms = {form: caption_case(form) for form in ("plain", "chunked")}
    close(forms["chunked"](), forms["plain"]())
    report("caption loss", times(forms, 3), "plain", "chunked")
    plain, chunked = (peak_mib(caption_case, form) for form in forms)
    print(f"caption loss: peak memory plain {plain:.0f} MiB, chunked {chunked:.0f} MiB, {chunked / plain:.2f} of it")


def contrastive_case(form):
    torch.manual_seed(0)
    video, text = (torch.randn(4096, 512, device=DEVICE, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.66, device=DEVICE)

    def run():
        video.grad = text.grad = None
        loss = clip_video.contrastive_loss(video, text, scale, rows=4096 if form == "whole" else 512)
        loss.backward()
        return loss.detach()
    return run


def bench_contrastive():
    """The contrastive loss of 4096 pairs: the whole matrix against blocks of 512 rows."""
    forms = {form: contrastive_case(form) for form in ("whole", "blocks")}
    close(forms["blocks"](), forms["whole"]())
    report("contrastive", times(forms, 3), "whole", "blocks")
    whole, blocks = (peak_mib(contrastive_case, form) for form in forms)
    print(f"contrastive: peak memory whole {whole:.0f} MiB, in blocks {blocks:.0f} MiB, {blocks / whole:.2f} of it")


def bench_conv():
    """The temporal convolution of a local unit, forward and backward, in each of its forms."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 196, 512, device=DEVICE, requires_grad=True)
    kernel, bias = torch.randn(512, 3, device=DEVICE), torch.randn(512, device=DEVICE)

    def form(name):
        def run():
            x.grad = None
            out = uniformerv2.temporal_conv(x, kernel, bias, name)
            out.sum().backward()
            return out.detach()
        return run

    forms = {name: form(name) for name in ("conv3d", "conv2d", "shift")}
    seconds = times(forms)
    for name in ("conv2d", "shift"):
        close(forms[name](), forms["conv3d"]())
        report("temporal convolution", seconds, "conv3d", name)


def bench_mae():
    """A training step of VideoMAE-S at 224 pixels: embedding all tubelets and decoding all positions,
    against what mae.py does."""
    torch.manual_seed(0)
    model = mae.VideoMAE("small").to(DEVICE)
    video = torch.randn(1, 3, 16, 224, 224, device=DEVICE)
    hidden = mae.tube_mask(1, model.grid, 0.9, torch.Generator().manual_seed(0))
    visible, wanted = (index.to(DEVICE) for index in mae.split(hidden))

    def step(prediction):
        loss = mae.reconstruction_loss(prediction, mae.reconstruction_target(video, hidden))
        model.zero_grad()
        loss.backward()
        return loss.detach()

    def plain():
        encoder, decoder = model.encoder, model.decoder
        tokens = encoder.embed(mae.take_tubelets(video, None, 16, 2).flatten(2)) + encoder.codes(model.grid, video)
        for block in encoder.blocks:
            tokens = block(tokens if tokens.shape[1] < hidden.shape[1] else mae.gather(tokens, visible))
        tokens = model.encoder_to_decoder(encoder.norm(tokens))
        table = mae.position_codes("sinusoid", model.grid, 16, 2, tokens.shape[2], video.device)
        tokens = torch.cat([tokens + mae.gather(table, visible), model.mask_token + mae.gather(table, wanted)], dim=1)
        for block in decoder.blocks:
            tokens = block(tokens)
        return step(decoder.head(decoder.norm(tokens))[:, -wanted.shape[1]:])

    forms = {"plain": plain, "mae.py": lambda: step(model(video, hidden))}
    close(forms["mae.py"](), plain())
    report("masked autoencoder, small, batch 1", times(forms, 3), "plain", "mae.py")


# What fuses: masked encoder, multimodal encoder, frames, pixels, clips.
PAIRS = {"tiny": (mae.SIZES["tiny"], uniformerv2.SIZES["tiny"], 8, 64, 8),
         "small": (mae.SIZES["small"], uniformerv2.Size(384, 12, 6, 1536, 16, 224), 8, 224, 1)}


def fuse_case(form):
    """form: a pair, a way of training it, and the blocks with a bridge (default: four, evenly)."""
    pair, way, *late = form
    torch.manual_seed(0)
    masked, multimodal, frames, pixels, batch = PAIRS[pair]
    model = fusion.InternVideo(
        mae.VideoClassifier(masked, classes=16, frames=frames, image_size=pixels, head_scale=1.0),
        uniformerv2.UniFormerV2(multimodal, classes=16, frames=frames), before=list(*late) or None).to(DEVICE).train()
    for name, p in model.named_parameters():
        if "gate_" in name:
            torch.nn.init.constant_(p, 0.5)
    clip = torch.randint(256, (batch, frames, pixels, pixels, 3), dtype=torch.uint8, device=DEVICE)
    answers = torch.arange(batch, device=DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    if way == "all":
        model.requires_grad_(True)

    def run():
        model.zero_grad(set_to_none=True)
        allowed = contextlib.nullcontext() if way == "fusion.py" else \
            unittest.mock.patch.object(torch, "no_grad", contextlib.nullcontext)
        with allowed:
            loss = torch.nn.functional.cross_entropy(model(clip), answers)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in trained])
    return run


def bench_fuse():
    """A training step of the bridge: gradients for all parameters (only some of which an optimiser would get),
    frozen parameters alone, and what fusion.py does; then with bridges in the last quarter only."""
    for pair in PAIRS:
        ways = {way: (pair, way) for way in ("all", "frozen", "fusion.py")}
        forms = {way: fuse_case(form) for way, form in ways.items()}
        for way in ("all", "frozen"):
            close(forms["fusion.py"](), forms[way]())
        depth = PAIRS[pair][0].depth
        ways["late"] = (pair, "fusion.py", range(depth - max(1, depth // 4), depth))
        forms["late"] = fuse_case(ways["late"])
        seconds = times(forms, 3)
        peaks = {way: peak_mib(fuse_case, form) for way, form in ways.items()}
        for way in ("frozen", "fusion.py", "late"):
            report(f"fuse, {pair}", seconds, "all", way)
        print(f"fuse, {pair}: peak memory " + ", ".join(
            f"{way} {peak:.0f} MiB ({peak / peaks['all']:.2f} of all)" for way, peak in peaks.items()))


CASES = {"cache": bench_cache, "loss": bench_loss, "contrastive": bench_contrastive, "conv": bench_conv,
         "mae": bench_mae, "fuse": bench_fuse}


def main():
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="default: all; see --list")
    parser.add_argument("--list", action="store_true", help="name the cases")
    args = parser.parse_args()
    for name in args.cases:
        if name not in CASES:
            parser.exit(2, f"bench.py: no case {name!r}: choose {', '.join(CASES)}\n")
    if args.list:
        print("\n".join(f"{name:12}{case.__doc__.splitlines()[0]}" for name, case in CASES.items()))
        return
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    for name in args.cases or CASES:
        CASES[name]()


if __name__ == "__main__":
    main()
