"""The diagram of the system as SVG, with the numbers of runs in its boxes.

    video -+-> masked encoder -----+--> what is hidden (1)
           |                       +--> classifier (3) -----+
           |                                                +--> cross-model attention, score (4)
           +-> multimodal encoder -+--> classifier (3) -----+
    sentence -> text encoder ------+--> pairs and captions (2)

It is drawn twice, for wide and for narrow windows. STYLE in engine/page.py shows one of the two.
`runs` are objects of report.Record. `role` returns the part of the system that a run trained.
"""

from engine.page import is_number, millions, part, short, text

SYSTEM = ("mae", "clip", "classify", "fuse")  # stages whose runs are in the diagram

# box: (title, file, CSS class, stage, rectangle in the wide diagram, rectangle in the tall one).
# A rectangle is x, y, width, height. The wide diagram is 1230 x 480, the tall one 400 x 786.
BOXES = {
    "video": ("video", "data.py", "s-data", "", (0, 127, 140, 96), (20, 0, 170, 82)),
    "words": ("sentence", "data.py", "s-data", "", (0, 385, 140, 76), (270, 0, 130, 66)),
    "masked": ("masked encoder", "mae.py", "s-mae", "1", (245, 40, 205, 100), (0, 132, 134, 98)),
    "multimodal": ("multimodal encoder", "uniformerv2.py", "s-clip", "2", (245, 215, 205, 100),
                   (142, 132, 148, 98)),
    "text": ("text encoder", "clip_video.py", "s-clip", "2", (245, 373, 205, 100),
             (298, 132, 102, 98)),
    "decoder": ("what is hidden", "mae.py", "s-mae", "1", (550, 8, 205, 98), (22, 284, 134, 104)),
    "masked head": ("classifier", "train.py classify", "s-mae", "3", (550, 122, 205, 98),
                    (0, 438, 134, 84)),
    "multimodal head": ("classifier", "train.py classify", "s-clip", "3", (550, 236, 205, 98),
                        (150, 438, 250, 84)),
    "pairs": ("pairs and captions", "caption_decoder.py", "s-clip", "2", (550, 358, 205, 116),
              (178, 284, 222, 104)),
    "bridge": ("cross-model attention", "fusion.py", "s-fuse", "4", (838, 165, 206, 116),
               (50, 572, 300, 84)),
    "score": ("fused score", "fusion.py", "s-fuse", "4", (1112, 174, 118, 98),
              (110, 702, 180, 84)),
}

# (label, from, to, wide: SVG path, position of the label, tall: SVG path, position of the label)
ARROWS = (
    ("pixels", "video", "masked", "M140 160C190 160 190 90 239 90", (193, 172),
     "M90 82C90 105 67 105 67 126", (127, 102)),
    ("", "video", "multimodal", "M140 190C190 190 190 265 239 265", None,
     "M155 82C155 105 216 105 216 126", None),
    ("words", "words", "text", "M140 423H239", (190, 414), "M349 66V126", (370, 92)),
    ("seen", "masked", "decoder", "M450 75C500 75 500 57 544 57", (494, 36),
     "M88 230V278", (114, 252)),
    ("masked tokens", "masked", "masked head", "M450 105C500 105 500 171 544 171", (478, 160),
     "M11 230V432", (46, 408)),
    ("multimodal tokens", "multimodal", "multimodal head", "M450 250C500 250 500 285 544 285",
     (494, 226), "M164 230V432", (212, 408)),
    ("video vector", "multimodal", "pairs", "M450 285C505 285 495 392 544 392", (472, 341),
     "M236 230V278", (258, 252)),
    ("text vector", "text", "pairs", "M450 426H544", (497, 444), "M349 230V278", (370, 252)),
    ("frozen", "masked head", "bridge", "M755 171C800 171 790 205 832 205", (803, 164),
     "M69 522C69 548 140 544 140 566", None),
    ("frozen", "multimodal head", "bridge", "M755 285C800 285 790 241 832 241", (803, 296),
     "M276 522C276 548 260 544 260 566", (200, 548)),
    ("scores", "bridge", "score", "M1044 223H1106", (1078, 197), "M200 656V696", (240, 674)),
)


def role(run):
    """The part of the system that a run trained: its stage; of a classifier, its encoder."""
    return str(run.settings.get("encoder")) if run.stage == "classify" else run.stage


def tokens(config):
    """(t, patches per frame, width) of an encoder's tokens, from its config; () if unknown."""
    size = part(config, "size")
    if not size or not is_number(config.get("frames")):
        return ()
    frames = config.get("tubelet", 1) * (2 if config.get("temporal_downsample") else 1)
    height, width = config["image_size"]
    return (config["frames"] // frames, height // size["patch"] * (width // size["patch"]),
            size["width"])


def product(*numbers):
    """28, 96 -> "28 × 96"; "" if one of them is None."""
    return " × ".join(f"{n:,}" for n in numbers) if numbers and None not in numbers else ""


def of_size(size):
    """[depth, width] of an encoder as text."""
    return [f"{size['depth']} blocks", f"width {size['width']}"] if "depth" in size else []


def percent(value, words):
    """12.3, "right" -> "12.3 % right"; "" for None."""
    return "" if value is None else f"{value:.1f} % {words}"


def counted(value, words):
    """866112, "trained" -> "0.87 M trained"; "" for None."""
    return "" if value is None else f"{millions(value)} {words}"


def encoders_of(parts):
    """Configs of the masked and the multimodal encoder, from the first run that has one."""
    configs = {name: run.config for name, run in parts.items()}
    fused = configs.get("fuse", {})
    return (configs.get("mae") or configs.get("masked") or part(fused, "masked"),
            part(configs.get("clip", {}), "clip") or configs.get("multimodal")
            or next(iter(fused.get("multimodal", [])), {}))


def labels_of(parts):
    """{arrow: (shape in letters, shape in numbers)}"""
    masked, multimodal = encoders_of(parts)
    t, patches, width = tokens(masked) or (None,) * 3
    visible, ratio = None, parts["mae"].settings.get("mask_ratio") if "mae" in parts else None
    if t and is_number(ratio):
        visible = t * (patches - int(ratio * patches))
    t2, patches2, width2 = tokens(multimodal) or (None,) * 3  # of the multimodal encoder
    settings = next((run.settings for run in parts.values()), {})
    clip = part(parts["clip"].config, "clip") if "clip" in parts else {}
    counts = {run.config.get("classes") or part(run.config, "masked").get("classes")
              for name, run in parts.items() if name in ("masked", "multimodal", "fuse")}
    classes = max((count for count in counts if is_number(count)), default=None)
    side = settings.get("input_size") or None
    vector = product(clip.get("embedding"))
    return {"pixels": ("(3, T, H, W)", product(3, settings.get("num_frames") or None, side, side)),
            "words": ("(L)", f"L ≤ {clip['context']}" if "context" in clip else ""),
            "seen": ("(Nv, D)", product(visible, width)),
            "masked tokens": ("(N, D)", product(t and t * patches, width)),
            "multimodal tokens": ("(t, 1+S, D)", product(t2, patches2 and 1 + patches2, width2)),
            "video vector": ("(E)", vector), "text vector": ("(E)", vector),
            "frozen": ("frozen", ""), "scores": ("2 × (Y)", product(classes and 2, classes))}


def facts_of(parts, table):
    """{box: [line of text, ...]}, only for boxes for which a run has numbers."""
    masked, multimodal = (part(config, "size") for config in encoders_of(parts))
    facts = {"masked": [", ".join(of_size(masked))], "multimodal": [", ".join(of_size(multimodal))]}
    settings = next(iter(parts.values())).settings
    if settings.get("num_frames"):
        facts["video"] = [f"{settings['num_frames']} frames,",
                          f"{settings['input_size']} × {settings['input_size']} pixels"]
    if run := parts.get("mae"):
        loss, trivial = run.number("val_loss"), run.number("val_trivial_loss")
        facts["masked"].append(counted(run.number("parameters"), "in stage 1"))
        facts["decoder"] = [f"loss {short(loss)}" if loss is not None else "",
                            f"of the mean: {short(trivial)}" if trivial else ""]
    if run := parts.get("clip"):
        facts["multimodal"].append(counted(run.number("parameters"), "in stage 2"))
        facts |= {"words": ["a caption"]} | facts_of_words(run)
    for name in ("masked", "multimodal", "fuse"):
        row = "cross-model attention" if name == "fuse" else f"{name} encoder"
        accuracy = part(part(table, "rows"), row).get("all facts")
        if name in parts:
            accuracy = accuracy if is_number(accuracy) else parts[name].accuracy()
            facts["score" if name == "fuse" else f"{name} head"] = [percent(accuracy, "right")]
    if run := parts.get("fuse"):
        gates, shares = run.last("gate_"), [100 * share for share in run.last("share_").values()]
        widest = 100 * max(map(abs, gates.values()), default=0)
        facts["bridge"] = [f"{len(gates)} gates, up to {widest:.0f} % open" if gates else "",
                           counted(run.number("trained"), "trained")]
        facts["score"] += ["shares " + " : ".join(f"{share:.0f}" for share in shares)] \
            if shares else []
    facts = {box: [line for line in lines if line] for box, lines in facts.items()}
    return {box: lines for box, lines in facts.items() if lines}


def facts_of_words(run):
    """The part of `facts_of` for the boxes that only stage 2 trains."""
    clip, bleu = part(run.config, "clip"), run.number("BLEU-4")
    return {"text": [*of_size(part(clip, "text_size"))[:1],
                     f"{clip['vocabulary']:,} tokens" if "vocabulary" in clip else ""],
            "pairs": [percent(run.number("val_t2v_R@1"), "find their clip"),
                      percent(run.number("val_captions_shape"), "write the shape")
                      or (f"BLEU-4 {bleu:.1f}" if bleu is not None else "")]}


def plane(kind, facts, labels):
    """The diagram as SVG; kind: "wide" or "tall"."""
    tall = kind == "tall"
    drawn = [f'<defs><marker id=head-{kind} viewBox="0 0 8 8" refX=6 refY=4 markerWidth=8 '
             'markerHeight=8 orient=auto><path class=head d="M0 0.5L7 4L0 7.5z"/></marker></defs>']
    for _, begin, end, wide_path, _, tall_path, _ in ARROWS:
        off = "" if begin in facts and end in facts else " off"
        drawn.append(f'<path class="arrow{off}" marker-end="url(#head-{kind})" '
                     f'd="{tall_path if tall else wide_path}"/>')
    for box, (title, file, colour, stage, wide_place, tall_place) in BOXES.items():
        x, y, w, h = tall_place if tall else wide_place
        known, middle = facts.get(box), x + w / 2
        words = [("title", title), ("file", file)] + [("fact", line) for line in known or ()]
        top = y + (h - 18 * len(words)) / 2 + 13.5
        body = "".join(f'<text class={style} x="{middle}" y="{top + 18 * i:.1f}">{text(line)}'
                       "</text>" for i, (style, line) in enumerate(words))
        number = f'<circle class=badge cx="{x + 4}" cy="{y + 4}" r="12"/><text class=badge-text ' \
                 f'x="{x + 4}" y="{y + 8.5}">{stage}</text>' if stage else ""
        drawn.append(f'<g class="{colour}{"" if known is not None else " off"}"><rect x="{x}" '
                     f'y="{y}" width="{w}" height="{h}" rx="9"/>{body}{number}</g>')
    for label, begin, end, _, wide_place, _, tall_place in ARROWS:
        off = "" if begin in facts and end in facts else " off"
        if place := tall_place if tall else wide_place:
            drawn += [f'<text class="label{" number" * i}{off}" x="{place[0]}" '
                      f'y="{place[1] + (27 if label == "words" and not tall else 15) * i}">'
                      f"{text(line)}</text>" for i, line in enumerate(labels[label]) if line]
    description = "; ".join(f"{BOXES[box][0]}: {', '.join(lines)}"
                            for box, lines in facts.items() if lines)
    return (f'<svg class={kind} viewBox="{"-9 -9 418 804" if tall else "-1 -5 1232 488"}" role=img '
            f'aria-label="{text(f"The system. {description}")}">{"".join(drawn)}</svg>')


def system(runs, table):
    """The section with the diagram; "" where no run is of one of the four stages."""
    parts = {}
    for run in runs:
        if run.stage in SYSTEM:
            parts.setdefault(role(run), run)
    if not parts:
        return ""
    facts, labels = facts_of(parts, table), labels_of(parts)
    return ("<section id=system><h2>The system</h2><figure class=system>"
            + plane("wide", facts, labels) + plane("tall", facts, labels)
            + "<figcaption><p>Numbers in circles are the four stages. Shapes on arrows are those "
            "of one clip: T frames of H × W pixels; N tokens of width D, of which Nv are visible; "
            "t steps of S patches and a class token; L words; E numbers of the joint space; Y "
            "classes. Parts without a run on this page are pale.</p></figcaption></figure>"
            "</section>")
