"""Inspect, convert and export files of weights.

    python -m weights FILE                            what is in it, and which class loads it
    python -m weights FILE --convert NEW.safetensors  take the tensors out of a pickle
    python -m weights RUN --official NEW.pth          write a run under the official names
"""

import argparse
import inspect
import json
import sys
from collections import Counter
from pathlib import Path

from safetensors.torch import save_file

from weights import places
from weights.families import MODELS, class_of, describe
from weights.files import DAMAGE, WeightsError, listed, read, unwrap, write_atomically, write_torch
from weights.pickles import take_out


def convert(path, target):
    """Write the tensors of a file to the .safetensors file `target`. Returns `target`.

    path    any file that `read` accepts, or a pickle that also contains other objects. These are
            left out, and their names printed on stderr
    raises  WeightsError
    """
    try:
        tensors = read(path)[0]
    except WeightsError as error:
        try:
            content, others = take_out(places.find(path))
        except DAMAGE:
            raise error from None
        tensors = unwrap(content, str(path), places.split(path)[1])
        print(f"warning: left out of {path}, and not run: {listed(sorted(others))}",
              file=sys.stderr)
    write_atomically(target, lambda aside: save_file(
        {key: value.contiguous().clone() for key, value in tensors.items()}, aside))
    return target


def publish(source, target):
    """Write the model of a run under official names. Returns a report as text.

    Raises WeightsError if the official format cannot express the model.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", ".pth") or target.exists():
        raise WeightsError(f"--official {target}: must be a new file whose name ends in "
                           ".safetensors or .pth")
    kind = read(source)[1].get("model")
    if not isinstance(kind, str) or kind not in MODELS:
        raise WeightsError(f"{source}: holds {kind or 'no run of this project'}, for which there "
                           f"are no official names; give a run with one of {listed(MODELS)}")
    cls = class_of(kind)
    model = (getattr(cls, "from_official", None) or cls.from_run)(source)
    try:
        tensors, envelope = model.to_official(), MODELS[kind][1]
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None
    if target.suffix == ".pth":
        write_torch(target, {envelope: tensors} if envelope else tensors)
    else:
        write_atomically(target, lambda aside: save_file(tensors, aside))
    lines = [f"{target}: {len(tensors)} tensors of {kind} under official names, family: "
             f"{describe(unwrap(tensors, str(target)))[0]}"]
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if (folder / "questions.json").exists():
        lines.append(f"official files cannot contain class names; copy "
                     f"{folder / 'questions.json'} beside the file")
    options = unstored_options(model.config)
    if options:
        lines.append("the file does not contain these options; whoever loads it must know them: "
                     + "; ".join(options))
    return "\n".join(lines)


def unstored_options(config):
    """Options that official files do not contain and that differ from the official code's: a list
    of texts."""
    size = config.get("size", {})
    width, heads = size.get("width", 0), size.get("heads", 0)
    options = []
    if heads and width != 64 * heads:
        options.append(f"{heads} heads of width {width // heads} instead of 64")
    if config.get("model") == "UniFormerV2" and (
            set(config["mean"]), set(config["std"])) != ({0.45}, {0.225}):
        options.append(f"pixels in [0, 1] are normalised with mean {config['mean']} and deviation "
                       f"{config['std']}")
    if {config.get("eps", 1e-6), config.get("head_eps", 1e-6)} != {1e-6}:
        options.append(f"LayerNorm epsilons {config.get('eps')}, before the head "
                       f"{config.get('head_eps')}")
    return options


def explain(source, heads):
    """Print what a file of weights contains, and load it. Raises WeightsError."""
    tensors, config = read(source)
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    millions = sum(value.numel() for value in tensors.values()) / 1e6
    print(f"{source}: {len(tensors)} tensors, {millions:.2f} M numbers, "
          + ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
          + " (half precision is converted to float32)")
    if config:
        print(f"a run of this project: {config.get('model', 'several models')}; give it to "
              f"train.py as --weights {source}")
        print("sizes: " + json.dumps(config))
        return
    family, loaders = describe(tensors)
    if family is None:
        raise WeightsError(f"{source}: not a file of a known family; its names are like "
                           f"{listed(list(tensors)[:5])}")
    print(f"family: {family}")
    for loader in loaders:
        load = class_of(loader).from_official
        keywords = [key for key in inspect.signature(load).parameters if key.endswith("heads")]
        if loader == "CaptionDecoder":  # it reads them from the shapes
            keywords = []
        model = load(source, **(dict.fromkeys(keywords, heads) if heads else {}))
        unused = [key for key in getattr(model, "unused", ())
                  if len(loaders) < 2 or not key.startswith("caption_decoder.")]
        print(f"loads{'' if unused else ', to the last tensor'}: {MODELS[loader][0]}.{loader}"
              f".from_official({str(source)!r})"
              + (f"; not used there: {listed(unused)}" if unused else ""))
        print("sizes: " + json.dumps(model.config))


def main(argv=None):
    """The command. Returns the exit code: 0, or 2 if the file does not load."""
    parser = argparse.ArgumentParser(
        prog="python -m weights", description="Inspect, convert and export files of weights.")
    parser.add_argument("file", help="a run's folder, or a file of weights")
    parser.add_argument("--convert", default="", help="write its tensors as .safetensors here; "
                        "other objects in a pickle are left out and not run")
    parser.add_argument("--official", default="", help="write a run under the official names here: "
                        "NEW.safetensors, or NEW.pth as the official code expects it")
    parser.add_argument("--heads", type=int, default=0, help="attention heads of every block, for "
                        "a width that no published model has")
    args = parser.parse_args(argv)
    try:
        if args.heads < 0:
            raise WeightsError(f"--heads {args.heads}: must be at least 1")
        source = args.file
        if args.convert:
            if Path(args.convert).suffix != ".safetensors" or Path(args.convert).exists():
                raise WeightsError(f"--convert {args.convert}: must be a new file whose name ends "
                                   "in .safetensors")
            source = convert(args.file, args.convert)
        if args.official:
            print(publish(source, args.official))
        else:
            explain(source, args.heads)
        return 0
    except (WeightsError, OSError, ValueError) as error:
        print(f"weights: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
