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
import os
import resource
import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import caption_decoder  # noqa: E402
import clip_video  # noqa: E402
import data  # noqa: E402
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
    status = Path("/proc/self/status")
    if status.exists():  # Linux: forget the peak of starting up, which may be higher, then read the new one
        Path("/proc/self/clear_refs").write_text("5")
        before = kib(status, "VmRSS")
        run()
        return (kib(status, "VmHWM") - before) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit


def kib(status, name):
    """A number of Linux's account of this process: VmRSS = memory now, VmHWM = the most so far."""
    return int(status.read_text().split(name + ":")[1].split()[0])


# ------------------------------------------------------------------------------------------------
# Cases


def bench_cache():
    """Writing 64 words with a key/value cache against computing everything anew for each word."""
    torch.manual_seed(0)
    decoder = caption_decoder.CaptionDecoder(512, heads=8, depth=6, visual_width=768, vocabulary=49408,
                                             queries=256).eval().to(DEVICE)
    words = 64
    for batch in (1, 4, 16):
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


def sample_videos(folder):
    """Paths of real files, from the folder VIDEOS or shared/videos; otherwise of one that is made here."""
    found = Path(os.environ.get("VIDEOS", Path(__file__).resolve().parent.parent.parent / "shared" / "videos"))
    names = ("dog.mp4", "coffee.mp4", "bottles.mp4", "chaplin.mp4", "his_girl_friday.mp4", "insect.mp4", "flower.webm",
             "nasa_13013_hdr.mp4", "man_av1.mp4", "asl/again.mkv", "seabirds.avi")
    if all((found / name).is_file() for name in names):
        return [found / name for name in names]
    return [made_video(Path(folder) / "made.mp4", 640, 360, 150)]


def made_video(path, width, height, frames):
    """Write coloured tiles that change every third frame; returns the path."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = torch.randint(256, (12, 16, 3), generator=torch.Generator().manual_seed(i // 3), dtype=torch.uint8)
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame.reformat(width, height, "yuv420p")))
        container.mux(stream.encode())
    return path


def decoders(example):
    """{name: function of (path, frame numbers, (H, W)) that opens the file and returns its frames}; torchcodec and
    decord2 where they are installed and read the example."""
    import av
    import numpy as np

    def ours(path, numbers, size):
        with data.Video(path) as video:
            video.info  # as in training: what it holds is not known beforehand
            return video.read(numbers, size)

    def plain(path, numbers, size):
        wanted, found = set(numbers.tolist()), {}
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            for i, frame in enumerate(container.decode(stream)):
                if i in wanted:
                    found[i] = frame.reformat(size[1], size[0], "rgb24").to_ndarray()
                if i == numbers.max():
                    break
        return np.stack([found[i] for i in numbers.tolist()])

    forms = {"data.py": ours, "plain loop": plain}
    try:
        from torchcodec.decoders import VideoDecoder

        def torchcodec(path, numbers, size):
            frames = VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(numbers.tolist()).data
            resized = torch.nn.functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
            return resized.permute(0, 2, 3, 1).numpy()
        torchcodec(example, np.arange(1), (8, 8))  # its FFmpeg is looked for late
        forms["torchcodec"] = torchcodec
    except (ImportError, OSError, RuntimeError) as error:
        print(f"decode: no torchcodec ({str(error).splitlines()[0]})")
    try:
        import decord

        def decord2(path, numbers, size):
            return decord.VideoReader(str(path), height=size[0], width=size[1], num_threads=1).get_batch(numbers).asnumpy()
        forms["decord2"] = decord2
    except (ImportError, OSError) as error:
        print(f"decode: no decord2 ({str(error).splitlines()[0]})")
    return forms


def bench_decode():
    """Sixteen frames of a file at short side 256: data.py, a plain PyAV loop, torchcodec and decord2.

    Every form opens the file anew and gets the same frame numbers, so the others are spared the look at the
    file that chooses them. Frames are compared: those of another time would differ by more than resizing."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        videos = sample_videos(folder)
        forms = decoders(videos[0])
        for what, choose in (("stride 4, centre", lambda n: data.dense_indices(n, 16, 4)),
                             ("spread over the video", lambda n: data.segment_indices(n, 16))):
            total = dict.fromkeys(forms, 0.0)
            for path in videos:
                info = data.probe(path)
                numbers, size = choose(info.frames), data._shown_size(info, 256)
                reference = forms["data.py"](path, numbers, size).astype(float)
                other = [name for name, form in forms.items()
                         if abs(form(path, numbers, size).astype(float) - reference).mean() > 6]
                seconds = times({name: (lambda form=form: form(path, numbers, size)) for name, form in forms.items()}, 5)
                print(f"decode, {what}: {path.name} {info.codec} {info.width}x{info.height}, "
                      + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
                      + (f"; other frames: {', '.join(other)}" if other else ""), flush=True)
                for name, value in seconds.items():
                    total[name] += value
            print(f"decode, {what}, {len(videos)} files: "
                  + ", ".join(f"{name} {len(videos) / value:.2f} clips/s" for name, value in total.items()), flush=True)


def bench_memory():
    """Resident memory over 10,000 decodes of a small file: flat, or something is never freed."""
    page = resource.getpagesize() / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = made_video(Path(folder) / "small.mp4", 160, 120, 30)
        for i in range(1, 10_001):
            data.read_clip(path, [0, 20], 64)
            if i in (500, 2_000, 5_000, 10_000):
                resident = page * int(Path("/proc/self/statm").read_text().split()[1])  # Linux
                print(f"memory: after {i:,} decodes {resident:.1f} MiB", flush=True)


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
         "mae": bench_mae, "fuse": bench_fuse, "decode": bench_decode, "memory": bench_memory}


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
