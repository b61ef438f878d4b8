"""Pictures of what a run learned, drawn from arrays. No model is used here.

    curve                 loss over steps: training, held-out clips, trivial baseline
    reconstruction        a masked clip: input, visible part, reconstruction
    similarity            cosine of each sentence and each clip; pairs are on the diagonal
    retrieval             a sentence, and the clips that a model retrieves for it
    captions              frames of a clip, the model's caption and a reference caption
    attention_maps        where something (a word, a layer) attends in a clip
    cross_attention_maps  where tokens of one model attend in another
    confusion             true and predicted classes
    predictions           frames of each clip, and bars for its most likely classes
    gates                 gates and shares of the fusion over training
    segments              true and predicted segments of long videos
    table                 numbers of several runs
    sheet                 many pictures with their names

A stage decides what to draw at the end of a run; this file draws it. A function takes arrays and
writes a PNG with a white background; some also write GIFs. Clips are uint8 (T, H, W, 3) numpy
arrays unless a docstring says otherwise. matplotlib takes a second to import, so functions import
it when they need it.
"""

import json
import textwrap

import numpy as np
import torch


def pyplot():
    """matplotlib.pyplot without a screen, imported at the first use."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def new_figure(rows, columns, width, height):
    """(figure, panels): a white figure and its (rows, columns) array of axes without ticks."""
    plt = pyplot()
    figure, panels = plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                                  facecolor="white", layout="constrained")
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set_visible(False)
    return figure, panels


def finish(figure, path):
    """Write a figure as PNG and close it."""
    plt = pyplot()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def sheet(pictures, path, titles, columns):
    """Pictures, uint8 (h, w, 3) of any sizes, in a grid, each below its title."""
    rows = -(-len(pictures) // columns)
    width = 8 if columns == 1 else 1.6 * columns
    figure, panels = new_figure(rows, columns, width, 1.25 * rows + 0.1)
    for panel, picture, title in zip(panels.flat, pictures, titles):
        panel.imshow(picture)
        panel.set_title(title, fontsize=6, loc="left")
    finish(figure, path)


def plain(text):
    """The text with a dot for each control character; an untrained model may write some."""
    return "".join(letter if letter.isprintable() else "." for letter in text)


def strip(video, count=4):
    """`count` evenly spaced frames of a clip (T, H, W, 3), side by side with white gaps."""
    T = len(video)
    count = min(count, T)
    edges = np.arange(count + 1) * T // count
    chosen = (edges[:-1] + edges[1:] - 1) // 2
    return np.concatenate([np.pad(video[t], ((0, 0), (0, 2), (0, 0)), constant_values=255)
                           for t in chosen], axis=1)


def lit(frames, attention, least):
    """Frames uint8 (t, H, W, 3), bright where attention (t, h, w) is high.

    least  brightness where attention is 0, from 0 to 1; the highest attention has brightness 1
    """
    light = torch.nn.functional.interpolate(attention[:, None] / attention.max(), frames.shape[1:3],
                                            mode="bilinear")
    return (frames * (least + (1 - least) * light[:, 0, ..., None].numpy())).astype(np.uint8)


def similarity(cosines, captions, path):
    """The cosine of each sentence (row) and each clip (column); pairs are on the diagonal."""
    figure, ((panel,),) = new_figure(1, 1, 8.6, 5)
    picture = panel.imshow(cosines.numpy(), cmap="viridis")
    panel.set_yticks(range(len(captions)), [text[:60] for text in captions], fontsize=7)
    panel.set_xticks(range(len(captions)), range(1, len(captions) + 1), fontsize=7)
    best = cosines.argmax(dim=1)
    colours = ["white" if b == i else "red" for i, b in enumerate(best)]
    panel.scatter(best, range(len(best)), s=14, c=colours)
    panel.set_title("cosine of sentence and clip; dot: nearest clip of each sentence, "
                    "red where it is wrong", fontsize=8)
    panel.set_xlabel("held-out clip, in the order of the sentences", fontsize=8)
    figure.colorbar(picture, shrink=0.8)
    finish(figure, path)


def retrieval(cosines, videos, captions, path, rows=5, top=3):
    """The first `rows` sentences, and for each the `top` clips with the highest cosine."""
    rows, top = min(rows, len(captions)), min(top, len(captions))
    figure, panels = new_figure(rows, top, 3.3 * top, 1.25 * rows + 0.3)
    for i in range(rows):
        ranked = cosines[i].argsort(descending=True)[:top].tolist()
        for panel, clip in zip(panels[i], ranked):
            panel.imshow(strip(videos[clip]))
            correct = captions[clip] == captions[i]
            panel.set_xlabel(f"cosine {cosines[i, clip]:.2f}" + (", correct" if correct else ""),
                             fontsize=8, color="green" if correct else "black")
        panels[i][0].set_title(f'"{captions[i]}"', loc="left", fontsize=9)
    finish(figure, path)


def captions(videos, references, written, path, rows=6):
    """Frames of each clip, the model's caption and a reference; and each clip as a GIF.

    path     of the PNG; the GIFs of captions.png are captions_0.gif, captions_1.gif ...
    returns  all paths
    """
    rows, paths = min(rows, len(references)), [path]
    figure, panels = new_figure((rows + 1) // 2, 2, 9, 1.75 * ((rows + 1) // 2))
    for panel, video, reference, text in zip(panels.flat, videos, references, written):
        panel.imshow(strip(video))
        words = [f"model: {plain(text)}", f"truth: {plain(reference)}"]
        short = [textwrap.fill(line, 64, max_lines=2, placeholder=" ...") for line in words]
        panel.set_xlabel("\n".join(short), fontsize=8, loc="left")
        paths.append(path.with_name(f"{path.stem}_{len(paths) - 1}.gif"))
        moving_picture(torch.from_numpy(video).permute(3, 0, 1, 2) / 255, paths[-1],
                       "\n".join(words))
    finish(figure, path)
    return paths


def attention_maps(video, maps, labels, title, path, most=8):
    """A row for each label (a word, a layer): the clip, bright where the label attends.

    maps  (labels, t, h, w) torch; a column for each time step; each row has its own scale
    """
    labels, steps = labels[:most], maps.shape[1]
    frames = video[[t * len(video) // steps for t in range(steps)]]
    figure, panels = new_figure(len(labels), 1, 1.15 * steps + 1.2, 1.12 * len(labels) + 0.4)
    for panel, label, attention in zip(panels[:, 0], labels, maps):
        panel.imshow(strip(lit(frames, attention, 0.25), steps))
        panel.set_ylabel(plain(label), fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    figure.suptitle(plain(title), fontsize=9)
    finish(figure, path)


def strongest(maps, grid, other, count=4):
    """The `count` tokens of one model with the highest attention to a token of another model.

    maps     (N, t', h'*w' or 1 + h'*w') torch: attention of each of N = t*h*w tokens
    grid     (t, h, w) of these tokens
    other    (t', h', w') of the tokens that they attend to
    returns  [(time step, row, column) of each token], grid, and their attention to patches
             (count, t', h', w'); its sum is at most 1, because class tokens get the rest
    """
    t, h, w = grid
    maps = maps[:, :, -other[1] * other[2]:].unflatten(2, other[1:])
    chosen = maps.flatten(1).amax(dim=1).argsort(descending=True)[:count].tolist()
    return [(n // (h * w), n // w % h, n % w) for n in chosen], grid, maps[chosen]


def cross_attention_maps(video, tokens, grid, maps, path):
    """Where tokens of one model attend in another: a row for each token.

    On the left is the frame of the token, with a white frame around its tubelet. On the right is
    the clip, bright where the token attends.

    video   (T, H, W, 3) uint8
    tokens  [(time step, row, column)] on grid (t, h, w)
    maps    (tokens, t, h, w) torch
    """
    T, H, W, _ = video.shape
    steps = maps.shape[1]
    figure, panels = new_figure(len(tokens), 1, 1.15 * (steps + 1), 1.3 * len(tokens) + 0.4)
    frames = video[[(2 * i + 1) * T // (2 * steps) for i in range(steps)]]  # fusion.prepare_clip
    for panel, (t, row, column), attention in zip(panels[:, 0], tokens, maps):
        query = video[t * T // grid[0]].copy()
        h, w = H // grid[1], W // grid[2]
        top, left = row * h, column * w
        query[[top, top + h - 1], left:left + w] = 255
        query[top:top + h, [left, left + w - 1]] = 255
        gap = np.full((H, W // 4, 3), 255, np.uint8)
        shown = strip(lit(frames, attention, 0.2), steps)
        panel.imshow(np.concatenate([query, gap, shown], axis=1))
        panel.set_ylabel(f"step {t + 1} of {grid[0]}", fontsize=8)
    figure.suptitle("left: the tubelet of the query; right: where it attends in the other model, "
                    "over time", fontsize=9)
    finish(figure, path)


def reconstruction(clips, path, title="", borrowed=False):
    """A masked clip and its reconstruction: strips of frames (PNG), and clips side by side (GIF).

    clips     result of tasks.reconstruction: {"input", "visible", "reconstruction", "trivial"},
              each (B, 3, T, H, W) float in [0, 1], torch. Only the first clip of B is drawn
    borrowed  True where the last two use the mean (and contrast) of hidden tubelets of the input
    returns   both paths
    """
    plt = pyplot()
    clips = {name: batch[0].cpu() for name, batch in clips.items()}
    visible = (clips["visible"] == clips["input"]).all(dim=0)                # (T, H, W)
    error = {name: ((clip - clips["input"]) ** 2)[:, ~visible].mean() ** 0.5
             for name, clip in clips.items()}
    source = {"reconstruction": "mean and contrast\nborrowed from input",
              "trivial": "borrowed means"} if borrowed else {
              "reconstruction": "nothing borrowed", "trivial": "mean visible colour"}
    labels = {"input": "input", "visible": f"what the encoder saw\n({visible.float().mean():.0%})"}
    labels |= {name: f"{what}\n({source[name]})\nerror {255 * error[name]:.1f} grey levels"
               for name, what in (("reconstruction", "reconstruction"),
                                  ("trivial", "without a model"))}
    T, H, W = clips["input"].shape[1:]
    shown = torch.linspace(0, T - 1, min(T, 8)).round().long().tolist()
    size = (1.3 * len(shown) * W / H + 1.7, 1.35 * len(clips) + 0.5)
    figure, axes = plt.subplots(len(clips), len(shown), squeeze=False, facecolor="white",
                                figsize=size)
    for row, (name, clip) in zip(axes, clips.items()):
        for axis, frame in zip(row, shown):
            axis.imshow(clip[:, frame].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if name == "input":
                axis.set_title(f"frame {frame}", fontsize=8)
        row[0].set_ylabel(labels[name], fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    shown = ", ".join(labels[name].replace("\n", " ") for name in clips)
    words = f"{title}\nleft to right: {shown}"
    moving_picture(torch.cat(list(clips.values()), dim=-1), path.with_suffix(".gif"), words)
    return [path, path.with_suffix(".gif")]


def moving_picture(clip, path, words=""):
    """Write a clip, float (3, T, H, W) in [0, 1], as a GIF. Small clips are enlarged.

    words  what it shows, stored as the comment of the file; engine/report.py prints it below
    """
    from PIL import Image

    zoom = max(1, 144 // clip.shape[2])
    frames = (clip.permute(1, 2, 3, 0) * 255).round().byte()
    frames = frames.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=120, loop=0,
               comment=words.encode("utf-8", "replace"))


def confusion(tables, names, path):
    """Confusion matrices side by side. Rows are true classes, columns are predictions.

    tables  {title: counts (Y, Y)}; the colour is the share of the row
    """
    figure, (panels,) = new_figure(1, len(tables), 5.4 * len(tables) + 1, 5.4)
    for panel, (title, counts) in zip(panels, tables.items()):
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        panel.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 40:
            panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            panel.set_yticks(range(len(names)), names, fontsize=7)
            for i, j in counts.nonzero().tolist():
                panel.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=6,
                           color="white" if shares[i, j] > 0.5 else "black")
        panel.set(xlabel="predicted", ylabel="true")
        accuracy = 100 * counts.diagonal().sum() / counts.sum().clamp(min=1)
        panel.set_title(f"{title}: {accuracy:.1f} % correct", fontsize=9)
    finish(figure, path)


def predictions(videos, answers, path):
    """A row for each clip: four frames, and bars of the most likely classes for each question.

    answers  for each clip (title, {question: [(class, probability), ...]})
    """
    questions = len(answers[0][1])
    plt = pyplot()
    figure, axes = plt.subplots(len(videos), 1 + questions, squeeze=False, facecolor="white",
                                figsize=(5 + 3 * questions, 1.35 * len(videos) + 0.2),
                                layout="constrained", width_ratios=[5] + [3] * questions)
    for (picture, *panels), video, (title, classes) in zip(axes, videos, answers):
        picture.imshow(strip(video))
        picture.axis("off")
        picture.set_title(plain(title), fontsize=7, loc="left")
        for panel, (question, best) in zip(panels, classes.items()):
            names, shares = zip(*reversed(best))
            panel.barh(range(len(best)), shares, color="tab:blue", alpha=0.5)
            for place, name in enumerate(names):
                panel.text(0.02, place, f"{plain(name)[:30]}  {shares[place]:.0%}", fontsize=7,
                           va="center")
            panel.set(xlim=(0, 1), xticks=[], yticks=[])
            panel.set_title(plain(question) * (questions > 1), fontsize=7, loc="left")
            panel.spines[:].set_visible(False)
    finish(figure, path)


def gates(lines, path):
    """Gates and shares over training, from the keys "gate..." and "share..." of log.jsonl."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), facecolor="white", layout="constrained")
    labels = ("tanh of each gate", "share of each score")
    for axis, word, label in zip(axes, ("gate", "share"), labels):
        for key in sorted({key for line in lines for key in line if key.startswith(word)}):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points), label=key.removeprefix(word + "_"), linewidth=1)
        axis.set(xlabel="step", ylabel=label)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.grid(alpha=0.3)
    finish(figure, path)


def segments(videos, names, path):
    """For each video, frames over the time axis, and bars for true and predicted segments.

    videos   list of (title, frames side by side (h, w, 3) uint8 or None, duration s, true segments
             (start s, end s, label) or None, predicted segments (n, 4): start s, end s, score,
             label)
    names    of the labels; each has a colour. The height of a bar is its score
    """
    plt = pyplot()
    figure, axes = plt.subplots(len(videos), 1, figsize=(11, 2.1 * len(videos)), squeeze=False,
                                facecolor="white", layout="constrained")
    for axis, (title, frames, duration, true, predicted) in zip(axes[:, 0], videos):
        rows = {} if true is None else {"true": [(*row[:2], 1.0, row[2]) for row in true]}
        rows["predicted"] = sorted(np.asarray(predicted).tolist(), key=lambda row: -row[2])
        for height, bars in enumerate(rows.values()):
            draw_bars(axis, -height, bars, names, duration)
        top = 0.5
        if frames is not None:
            top += 1.2
            axis.imshow(frames, extent=(0, duration, 0.5, top), aspect="auto")
        axis.set(xlim=(0, duration), ylim=(0.5 - len(rows), top),
                 yticks=[-height for height in range(len(rows))], yticklabels=list(rows))
        axis.set_title(plain(title), fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("seconds", fontsize=8)
    finish(figure, path)


def draw_bars(axis, y, bars, names, duration):
    """A row of bars (start, end, score, label), with the name of the label if there is space."""
    colours = pyplot().get_cmap("tab20")
    for i, (start, end, score, label) in enumerate(bars):
        axis.barh(y, end - start, left=start, height=0.15 + 0.65 * score, edgecolor="white",
                  color=colours(int(label) % 20))
        middle = (start + end) / 2
        covered = any(left < middle < right for left, right, *_ in bars[:i])
        if end - start > 0.06 * duration and not covered:
            axis.text(middle, y, names[int(label)].replace(" ", "\n", 1), ha="center",
                      va="center", fontsize=6)


def table(rows, columns, path, title):
    """A table as a picture: rows {name: {column: number}}, one line for each."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(1.2 * len(columns) + 2.6, 0.3 * len(rows) + 0.8),
                                facecolor="white", layout="constrained")
    axis.axis("off")
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else f"{row[key]:.1f}"
              for key in columns] for row in rows.values()]
    shown = axis.table(cells, rowLabels=list(rows), colLabels=list(columns), loc="center",
                       edges="horizontal")
    shown.auto_set_font_size(False)
    shown.set_fontsize(8)
    axis.set_title(title, fontsize=9)
    finish(figure, path)


def falls_far(values):
    """True where values, all positive, differ by a factor above 20: a logarithmic axis is clearer.
    """
    return 0 < 20 * min(values) < max(values)


def curve(out, name):
    """Draw loss.png: the training and held-out loss of log.jsonl -> [its path].

    A logarithmic axis shows a loss that `falls_far`."""
    plt = pyplot()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(6, 3.4), facecolor="white")
    losses = []
    for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", "o-"),
                              ("val_trivial_loss", "trivial baseline", "k--")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        losses += [loss for _, loss in points]
        if points:
            axis.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
    if losses and falls_far(losses):
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="loss", title=f"{name}: loss")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)
    return [out / "loss.png"]
