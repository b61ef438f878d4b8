"""The table of the default run: accuracies of each encoder alone, and of both together.

    python tools/table.py runs/default                      one run: table.json, table.png
    python tools/table.py runs/seed5 runs/seed6 ...         several: means, differences

The clips are those of the test split, and as many with pairs of shape and colour that training
never shows. The weight of late fusion is tuned on the same number of validation clips. Prints the
table, and writes table.json and table.png. Of several runs it reads table.json and prints means.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_video
import data
import fusion
import weights
from engine import machine, pictures
from engine.evaluation import to_device
from tasks import recognition
from tasks.predictions import Classifier
from video import moving_shapes
from weights.tokenizer import load_tokenizer

RUNS = ("mae", "clip", "masked", "multimodal", "untrained", "scratch", "finetuned", "fuse")
CLASSIFIERS = RUNS[2:]
PER_BATCH = 100  # clips
# Names of rows that are compared
MASKED, MULTIMODAL, FUSED = "masked encoder", "multimodal encoder", "cross-model attention"
FINE_TUNED, SENTENCES = f"{MASKED}, fine-tuned", f"{MULTIMODAL}, sentences"
SCRATCH, UNTRAINED = "from scratch", "untrained encoder"
EQUAL, TUNED = "late fusion, equal", "late fusion, tuned"


@torch.no_grad()
def logits_of(models, which, clips, seed):
    """Run every model on `clips` clips of the split `which`.

    models   {name: Classifier}, "fuse" among them
    returns  logits {model: {question: (B, classes)}}, answers {question: (B,)}
    """
    fused = models["fuse"]
    device, bf16 = fused.device, machine.choose_precision("auto", fused.device) == "bf16"
    world = moving_shapes.MovingShapes(which, fused.frames, fused.size, seed)
    if device == "cpu":
        machine.choose_threads(sum(p.numel() for p in fused.model.parameters()),
                               PER_BATCH * world.frames * world.size[0] * world.size[1])
    logits, answers = {name: [] for name in models}, {name: [] for name in world.classes}
    for batch in data.held_out(world, clips, PER_BATCH, workers=1):  # it renders meanwhile
        batch = to_device(batch, device)
        for question, labels in batch["labels"].items():
            answers[question].append(labels)
        for name, one in models.items():
            video = batch["video"]
            video = video if one.fused else fusion.prepare_clip(video, one.encoder)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                logits[name].append(one.model(video).float())
    return ({name: recognition.split_by_question(torch.cat(part), world.classes)
             for name, part in logits.items()},
            {name: torch.cat(part) for name, part in answers.items()})


@torch.no_grad()
def zero_shot(out, which, clips, seed):
    """Accuracies of the multimodal encoder where sentences are its classes: no label was used."""
    device = machine.choose_device("auto")
    model = clip_video.VideoCLIP.from_official(out / "clip").to(device).eval()
    world = moving_shapes.MovingShapes(which, model.config["frames"],
                                       tuple(model.config["image_size"]), seed)
    batches = (to_device(batch, device)
               for batch in data.held_out(world, clips, PER_BATCH, workers=1))
    found = recognition.evaluate_zero_shot(
        model, batches, load_tokenizer(out / "clip" / "tokenizer.json"), world.sentences(),
        combine=world.prompt_average, device=device)
    return {name.removeprefix("zero_shot_"): value for name, value in found.items()}


def rows_of(out, seed, clips):
    """{row: {column: number}}: accuracies in percent, trained parameters, seconds of training."""
    device = machine.choose_device("auto")
    models = {name: Classifier(out / name, device) for name in CLASSIFIERS}
    results = {which: logits_of(models, which, clips, seed) for which in ("val", "test", "unseen")}

    def late(which, share):
        logits, answers = results[which]
        return recognition.accuracies({name: recognition.late_fusion(
            [logits["masked"][name], logits["multimodal"][name]], (1 - share, share))
            for name in answers}, answers)

    def alone(name):
        return lambda which: recognition.accuracies(results[which][0][name], results[which][1])

    share = recognition.best_weight(lambda share: late("val", share)["all_facts"])
    runs = {name: json.loads((out / name / "metrics.json").read_text()) for name in RUNS}
    cost = {name: run["seconds"] for name, run in runs.items()}
    trained = {name: run["trained"] for name, run in runs.items()}
    masked, multimodal = cost["mae"] + cost["masked"], cost["clip"] + cost["multimodal"]
    both = masked + multimodal
    rows = {
        SCRATCH: (alone("scratch"), trained["scratch"], cost["scratch"]),
        FINE_TUNED: (alone("finetuned"), trained["finetuned"], cost["mae"] + cost["finetuned"]),
        UNTRAINED: (alone("untrained"), trained["untrained"], cost["untrained"]),
        MASKED: (alone("masked"), trained["masked"], masked),
        MULTIMODAL: (alone("multimodal"), trained["multimodal"], multimodal),
        SENTENCES: (lambda which: zero_shot(out, which, clips, seed), 0, cost["clip"]),
        EQUAL: (lambda which: late(which, 0.5), 0, both),
        f"{TUNED} on validation ({1 - share:.2f}, {share:.2f})":
            (lambda which: late(which, share), 1, both),
        FUSED: (alone("fuse"), trained["fuse"], both + cost["fuse"])}
    return {row: {key.replace("_", " "): value for key, value in score("test").items()}
            | {"unseen " + key.replace("_", " "): value for key, value in score("unseen").items()}
            | {"trained": count, "seconds": round(seconds)}
            for row, (score, count, seconds) in rows.items()}


def write_table(out, seed, clips=1000):
    """Print the table of the default run in the folder `out`, and write table.json and table.png.

    clips    number of clips of each split
    returns  {row: {column: number}}
    """
    rows = rows_of(Path(out), seed, clips)
    columns = list(rows[SCRATCH])
    title = (f"moving shapes, {clips} test clips and {clips} of pairs of shape and colour never "
             "shown; accuracy in percent, one view")
    print(title)
    width = max(map(len, rows))
    print(" " * width + "".join(f"{column:>{len(column) + 2}s}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{width}s}" + "".join(
            f"{value:>{len(column) + 2},{'d' if isinstance(value, int) else '.1f'}}"
            for column, value in row.items()))
    text = json.dumps({"protocol": title, "seed": seed, "rows": rows}, indent=1) + "\n"
    weights.write_atomically(Path(out) / "table.json", lambda path: Path(path).write_text(text))
    pictures.table(rows, columns, Path(out) / "table.png", title)
    return rows


DIFFERENCES = (  # what is compared, column, row, rows of which the better one is subtracted
    ("masked over multimodal encoder, motion", "motion", MASKED, (MULTIMODAL,)),
    ("multimodal over masked encoder, shape", "shape", MULTIMODAL, (MASKED,)),
    ("the same, pairs never shown, probe", "unseen shape", MULTIMODAL, (MASKED,)),
    ("the same, pairs never shown, sentences", "unseen shape", SENTENCES, (MASKED,)),
    ("cross-model attention over the better encoder, all facts", "all facts", FUSED,
     (MASKED, MULTIMODAL)),
    ("cross-model attention over tuned late fusion, all facts", "all facts", FUSED, (TUNED,)),
    ("cross-model attention over equal late fusion, all facts", "all facts", FUSED, (EQUAL,)),
    ("masked encoder over the same network untrained, motion", "motion", MASKED, (UNTRAINED,)),
    ("masked encoder over the same network untrained, shape", "shape", MASKED, (UNTRAINED,)),
    ("masked encoder over the same network from scratch, motion", "motion", MASKED, (SCRATCH,)),
    *((f"the same, fine-tuned, {column}", column, FINE_TUNED, (SCRATCH,))
      for column in ("motion", "shape", "all facts")),
)
SHOWN = ("motion", "shape", "all facts", "unseen motion", "unseen shape", "unseen all facts")


def over_seeds(folders):
    """Lines of Markdown for README: means over several runs, and differences of each seed."""
    tables = [json.loads((folder / "table.json").read_text()) for folder in folders]
    seeds = [table["seed"] for table in tables]
    tables = [{TUNED if name.startswith(TUNED) else name: row  # the name has the weights, too
               for name, row in table["rows"].items()} for table in tables]
    yield f"Means over seeds {', '.join(map(str, seeds))}."
    yield ""
    yield f"| | {' | '.join(SHOWN)} |"
    yield "|---" * (len(SHOWN) + 1) + "|"
    for name in tables[0]:
        means = (statistics.mean(table[name][column] for table in tables) for column in SHOWN)
        yield f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |"
    yield ""
    yield "| difference in points | mean | each seed |"
    yield "|---|---|---|"
    for what, column, one, others in DIFFERENCES:
        found = [table[one][column] - max(table[other][column] for other in others)
                 for table in tables]
        yield (f"| {what} | {statistics.mean(found):+.1f} | "
               f"{', '.join(f'{value:+.1f}' for value in found)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="+", help="folder of a default run; several: means")
    args = parser.parse_args(argv)
    try:
        if len(args.out) > 1:
            print(*over_seeds(args.out), sep="\n")
            return 0
        out, = args.out
        seed = json.loads((out / "fuse" / "metrics.json").read_text())["settings"]["seed"]
        write_table(out, seed)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        print(f"table.py: {', '.join(map(str, args.out))}: not the folder of a finished default "
              f"run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
