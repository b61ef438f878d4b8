"""Pictures of what a run has learned, drawn from arrays: no model is known here.

    curve        loss over steps, training and held out, with the trivial baseline
    similarity   cosines of sentences and clips; the truth is the diagonal
    retrieval    a sentence, and the clips that were found for it
    captions     frames of a clip, what the model writes, what it was told
    attention    where the caption decoder looks at each word
    confusion    what was said for what
    gates        the bridge opening: gates and shares over training
    looks        where tokens of one model look in another
    segments     what happens when in long videos: truth and what was found
    table        the rows of the default run
    sheet        many pictures with their names

Why here: train.py says what to draw at the end of a stage, and should not be read for how. Every
function takes numbers and writes one PNG, on white, so that it is legible on light and dark pages. The
masked autoencoder's own picture, which needs the model to paint, is mae.draw.

Clips are uint8 (T, H, W, 3); everything else is named in the docstrings. matplotlib is imported late:
it takes a second, and a run that draws nothing never needs it.
"""

import json

import numpy as np
import torch

from video.sampling import segment_indices


def pyplot():
    """matplotlib.pyplot that needs no screen; imported late, for it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def new_figure(rows, columns, width, height):
    """A white figure without axes, and its (rows, columns) array of places."""
    plt = pyplot()
    figure, places = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, facecolor="white",
                                  layout="constrained")
    for place in places.flat:
        place.set(xticks=[], yticks=[])
        for spine in place.spines.values():
            spine.set_visible(False)
    return figure, places


def finish(figure, path):
    """Write a figure as PNG and forget it."""
    plt = pyplot()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def sheet(pictures, path, titles, columns):
    """Pictures, each uint8 (h, w, 3) of its own size, in a grid under their titles."""
    rows = -(-len(pictures) // columns)
    figure, places = new_figure(rows, columns, 8 if columns == 1 else 1.6 * columns, 1.25 * rows + 0.1)
    for place, picture, title in zip(places.flat, pictures, titles):
        place.imshow(picture)
        place.set_title(title, fontsize=6, loc="left")
    finish(figure, path)


def plain(text):
    """Text that a font can show: what an untrained model writes may hold control characters."""
    return "".join(letter if letter.isprintable() else "." for letter in text)


def strip(video, count=4):
    """`count` frames of a clip (T, H, W, 3) side by side, with thin white gaps."""
    chosen = segment_indices(len(video), min(count, len(video)))
    return np.concatenate([np.pad(video[t], ((0, 0), (0, 2), (0, 0)), constant_values=255) for t in chosen], axis=1)


def similarity(cosines, captions, path):
    """Cosines of all sentences (rows) and all clips (columns); the truth is the diagonal."""
    figure, ((axis,),) = new_figure(1, 1, 8.6, 5)
    picture = axis.imshow(cosines.numpy(), cmap="viridis")
    axis.set_yticks(range(len(captions)), [text[:60] for text in captions], fontsize=7)
    axis.set_xticks(range(len(captions)), range(1, len(captions) + 1), fontsize=7)
    best = cosines.argmax(dim=1)
    axis.scatter(best, range(len(best)), s=14, c=["white" if b == i else "red" for i, b in enumerate(best)])
    axis.set_title("cosine of sentence and clip; dot: the best clip of each sentence, red where it is wrong", fontsize=8)
    axis.set_xlabel("held-out clip, in the order of the sentences", fontsize=8)
    figure.colorbar(picture, shrink=0.8)
    finish(figure, path)


def retrieval(cosines, videos, captions, path, rows=5, top=3):
    """A sentence, and the clips that the model finds for it."""
    rows, top = min(rows, len(captions)), min(top, len(captions))
    figure, places = new_figure(rows, top, 3.3 * top, 1.25 * rows + 0.3)
    for i in range(rows):
        for place, found in zip(places[i], cosines[i].argsort(descending=True)[:top].tolist()):
            place.imshow(strip(videos[found]))
            right = captions[found] == captions[i]
            place.set_xlabel(f"cosine {cosines[i, found]:.2f}" + (", its own clip" if right else ""), fontsize=8,
                             color="green" if right else "black")
        places[i][0].set_title(f'"{captions[i]}"', loc="left", fontsize=9)
    finish(figure, path)


def captions(videos, captions, written, path, rows=6):
    """Frames of a clip, what the model writes and what it was told."""
    rows = min(rows, len(captions))
    figure, places = new_figure((rows + 1) // 2, 2, 9, 1.75 * ((rows + 1) // 2))
    for place, video, told, text in zip(places.flat, videos, captions, written):
        place.imshow(strip(video))
        place.set_xlabel(f"model: {plain(text)}\ntruth: {plain(told)}", fontsize=8, loc="left")
    finish(figure, path)


def attention(video, looks, words, title, path, most=8):
    """Rows: words, or what else looks; columns: the time steps of the tokens; bright where it looked (L, t, h, w).
    Each row is scaled by its own brightest place."""
    words, steps = words[:most], looks.shape[1]
    frames = video[[t * len(video) // steps for t in range(steps)]]
    figure, places = new_figure(len(words), 1, 1.15 * steps + 1.2, 1.12 * len(words) + 0.4)
    for place, word, look in zip(places[:, 0], words, looks):
        light = torch.nn.functional.interpolate(look[:, None] / look.max(), frames.shape[1:3], mode="bilinear")
        place.imshow(strip((frames * (0.25 + 0.75 * light[:, 0, ..., None].numpy())).astype(np.uint8), steps))
        place.set_ylabel(plain(word), fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    figure.suptitle(plain(title), fontsize=9)
    finish(figure, path)


def masks(tables, path):
    """{name: (Nq, Nk) bool}: a field for each pair of query (row) and key (column), filled where it may look."""
    figure, places = new_figure(2, (len(tables) + 1) // 2, 2.6 * ((len(tables) + 1) // 2), 5.6)
    for place, (name, table) in zip(places.flat, tables.items()):
        place.imshow(table.numpy(), cmap="Blues", vmin=-0.3, vmax=1.3, extent=(0, table.shape[1], table.shape[0], 0))
        place.set_xticks(range(table.shape[1] + 1), [""] * (table.shape[1] + 1))
        place.set_yticks(range(table.shape[0] + 1), [""] * (table.shape[0] + 1))
        place.grid(color="white", lw=1)
        place.tick_params(length=0)
        place.set_title(name, fontsize=9)
        place.set_xlabel("keys", fontsize=8)
        place.set_ylabel("queries", fontsize=8)
    finish(figure, path)


def strongest(maps, grid, other, count=4):
    """Of the tokens of one model, the `count` whose attention to another model is least even.

    maps     (N, t', h'*w' or 1 + h'*w'), weights of the attention of each of N = t*h*w tokens
    grid     (t, h, w) of these tokens; other (t', h', w'), the grid of those they attend to
    returns  [(time step, row, column) of a token, ...], grid, and their weights (count, t', h', w') on
             patches alone; each sum is at most 1, for class tokens take the rest
    """
    t, h, w = grid
    maps = maps[:, :, -other[1] * other[2]:].unflatten(2, other[1:])
    chosen = maps.flatten(1).amax(dim=1).argsort(descending=True)[:count].tolist()
    return [(n // (h * w), n // w % h, n % w) for n in chosen], grid, maps[chosen]


def looks(video, where, grid, shares, path):
    """Where tokens of one model look in another: a row for each token, framed white in the clip, and the clip
    once more with what it looked at bright.

    video (T, H, W, 3) uint8; where [(t, row, column)] on grid (t, h, w); shares (rows, t, h, w) torch
    """
    T, H, W, _ = video.shape
    figure, places = new_figure(len(where), 1, 1.15 * (shares.shape[1] + 1), 1.3 * len(where) + 0.4)
    for place, (t, row, column), look in zip(places[:, 0], where, shares):
        steps = look.shape[0]
        light = torch.nn.functional.interpolate(look[:, None] / look.max(), (H, W), mode="bilinear")
        frames = video[[i * T // steps for i in range(steps)]] * (0.2 + 0.8 * light[:, 0, ..., None].numpy())
        asks = video[t * T // grid[0]].copy()
        h, w = H // grid[1], W // grid[2]
        top, side = row * h, column * w
        asks[[top, top + h - 1], side:side + w] = 255
        asks[top:top + h, [side, side + w - 1]] = 255
        gap = np.full((H, W // 4, 3), 255, np.uint8)
        place.imshow(np.concatenate([asks, gap, strip(frames.astype(np.uint8), steps)], axis=1))
        place.set_ylabel(f"step {t + 1} of {grid[0]}", fontsize=8)
    figure.suptitle("left: the tubelet that asks; right: where it looks in the other model, over time", fontsize=9)
    finish(figure, path)


def confusion(tables, names, path):
    """tables {title: counts (Y, Y)}, side by side: rows are the truth, columns what the model says; shares of each
    row in colour."""
    figure, (axes,) = new_figure(1, len(tables), 5.4 * len(tables) + 1, 5.4)
    for axis, (title, counts) in zip(axes, tables.items()):
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 40:
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axis.set_yticks(range(len(names)), names, fontsize=7)
            for i, j in counts.nonzero().tolist():
                axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=6,
                          color="white" if shares[i, j] > 0.5 else "black")
        axis.set(xlabel="said", ylabel="true")
        axis.set_title(f"{title}: {100 * counts.diagonal().sum() / counts.sum().clamp(min=1):.1f} % right", fontsize=9)
    finish(figure, path)


def gates(lines, path):
    """Gates and shares over training, from the lines of log.jsonl; keys with "gate" or "share"."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), facecolor="white", layout="constrained")
    for axis, word, label in zip(axes, ("gate", "share"), ("tanh of each gate", "share of each score")):
        for key in sorted({key for line in lines for key in line if key.startswith(word)}):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points), label=key.removeprefix(word + "_"), linewidth=1)
        axis.set(xlabel="step", ylabel=label)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.grid(alpha=0.3)
    finish(figure, path)


def segments(videos, names, path):
    """What happens when: for each video its frames over the time axis, and bars for what is true and what was found.

    videos   list of (title, frames side by side (h, w, 3) uint8 or None, duration s, true segments (start s, end s,
             label) or None, found segments (n, 4): start s, end s, score, label)
    names    of the labels; each has a colour. The higher the bar, the higher the score
    """
    plt = pyplot()
    figure, axes = plt.subplots(len(videos), 1, figsize=(11, 2.1 * len(videos)), squeeze=False, facecolor="white",
                                layout="constrained")
    for axis, (title, frames, duration, true, found) in zip(axes[:, 0], videos):
        rows = {} if true is None else {"true": [(*row[:2], 1.0, row[2]) for row in true]}
        rows["found"] = sorted(np.asarray(found).tolist(), key=lambda row: -row[2])
        for height, (label, bars) in enumerate(rows.items()):
            for i, (start, end, score, kind) in enumerate(bars):
                axis.barh(-height, end - start, left=start, height=0.15 + 0.65 * score, edgecolor="white",
                          color=plt.get_cmap("tab20")(int(kind) % 20))
                middle = (start + end) / 2
                if end - start > 0.06 * duration and not any(left < middle < right for left, right, *_ in bars[:i]):
                    axis.text(middle, -height, names[int(kind)].replace(" ", "\n", 1), ha="center", va="center", fontsize=6)
        top = 0.5
        if frames is not None:
            top += 1.2
            axis.imshow(frames, extent=(0, duration, 0.5, top), aspect="auto")
        axis.set(xlim=(0, duration), ylim=(0.5 - len(rows), top), yticks=[-height for height in range(len(rows))],
                 yticklabels=list(rows))
        axis.set_title(plain(title), fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("seconds", fontsize=8)
    finish(figure, path)


def table(rows, columns, path, title):
    """rows {name: {column: number}}, a line of numbers each, as a picture."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(1.2 * len(columns) + 2.6, 0.3 * len(rows) + 0.8), facecolor="white",
                                layout="constrained")
    axis.axis("off")
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else f"{row[key]:.1f}" for key in columns]
             for row in rows.values()]
    shown = axis.table(cells, rowLabels=list(rows), colLabels=list(columns), loc="center", edges="horizontal")
    shown.auto_set_font_size(False)
    shown.set_fontsize(8)
    axis.set_title(title, fontsize=9)
    finish(figure, path)


def curve(out, name):
    """loss.png: the training and held-out loss of log.jsonl; returns [its path]."""
    plt = pyplot()

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(6, 3.4), facecolor="white")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", "o-"),
                              ("val_trivial_loss", "trivial baseline", "k--")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axis.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
    axis.set(xlabel="step", ylabel="loss", title=f"{name}: loss")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)
    return [out / "loss.png"]


def reconstruction(pictures, path, title=""):
    """A masked clip and its reconstruction: frames as a strip (`path`, .png), moving beside it (.gif).

    pictures  what mae.reconstruction_pictures gave: {name: (B, 3, T, H, W) torch, in [0, 1]}; clip 0
              is drawn, a row for each name
    """
    from PIL import Image

    pictures = {name: clips[0].cpu() for name, clips in pictures.items()}
    shown = (pictures["visible"] == pictures["input"]).float().mean()
    borrowed = "mean and contrast\nborrowed from input" if "borrowed" in pictures else \
        "nothing borrowed"
    labels = {"input": "input", "visible": f"what the encoder saw\n({shown:.0%})",
              "reconstruction": f"reconstruction\n({borrowed})",
              "borrowed": "what was borrowed:\nthe mean alone"}
    T, H, W = pictures["input"].shape[1:]
    frames = torch.linspace(0, T - 1, min(T, 8)).round().long().tolist()
    plt = pyplot()
    figure, axes = plt.subplots(len(pictures), len(frames), squeeze=False, facecolor="white",
                                figsize=(1.3 * len(frames) * W / H + 1.7, 1.35 * len(pictures) + 0.5))
    for row, (name, clip) in zip(axes, pictures.items()):
        for axis, frame in zip(row, frames):
            axis.imshow(clip[:, frame].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if name == "input":
                axis.set_title(f"frame {frame}", fontsize=8)
        row[0].set_ylabel(labels[name], fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)

    side_by_side = torch.cat(list(pictures.values()), dim=-1)                # (3, T, H, rows*W)
    zoom = max(1, 144 // H)
    moving = (side_by_side.permute(1, 2, 3, 0) * 255).round().byte()
    moving = moving.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    images = [Image.fromarray(frame) for frame in moving]
    images[0].save(path.with_suffix(".gif"), save_all=True, append_images=images[1:], duration=120,
                   loop=0)
