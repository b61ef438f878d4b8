"""What is in a file of weights, and who loads it?

    python -m weights FILE                            what is it, and does it load?
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
from weights.files import DAMAGE, WeightsError, listed, read, unwrap, write_aside, write_torch
from weights.pickles import take_out


def convert(path, target):
    """Write the tensors of any file that `read` knows, or of a pickle with more in it.

    The target is a .safetensors file; it is returned. What was left out is printed on stderr.
    Raises WeightsError.
    """
    try:
        tensors = read(path)[0]
    except WeightsError as error:
        try:
            found, strange = take_out(places.find(path))
        except DAMAGE:
            raise error from None
        tensors = unwrap(found, str(path), places.split(path)[1])
        print(f"warning: left out of {path}, and not run: {listed(sorted(strange))}",
              file=sys.stderr)
    write_aside(target, lambda aside: save_file(
        {key: value.contiguous().clone() for key, value in tensors.items()}, aside))
    return target


def publish(source, target):
    """Write a run under official names; returns lines that say what was written.

    Raises WeightsError where official names cannot hold it.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", ".pth") or target.exists():
        raise WeightsError(f"--official {target}: must be a new file whose name ends in "
                           ".safetensors or .pth")
    kind = read(source)[1].get("model")
    if not isinstance(kind, str) or kind not in MODELS:
        raise WeightsError(f"{source}: holds {kind or 'no run of this project'}, for which there "
                           f"are no official names; there are for runs of {listed(MODELS)}")
    cls = class_of(kind)
    model = (getattr(cls, "from_official", None) or cls.from_run)(source)
    try:
        tensors, envelope = model.to_official(), MODELS[kind][1]
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None
    if target.suffix == ".pth":
        write_torch(target, {envelope: tensors} if envelope else tensors)
    else:
        write_aside(target, lambda aside: save_file(tensors, aside))
    lines = [f"{target}: {len(tensors)} tensors of {kind} under official names, family: "
             f"{describe(unwrap(tensors, str(target)))[0]}"]
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if (folder / "questions.json").exists():
        lines.append(f"the class names lie in {folder / 'questions.json'}; official files have no "
                     "place for them; put it beside the file")
    unsaid = untold(model.config)
    if unsaid:
        lines.append("no name or shape says this, so tell whoever loads it: " + "; ".join(unsaid))
    return "\n".join(lines)


def untold(config):
    """What official files do not hold and official code assumes otherwise: list of texts."""
    size = config.get("size", {})
    width, heads = size.get("width", 0), size.get("heads", 0)
    unsaid = []
    if heads and width != 64 * heads:
        unsaid.append(f"{heads} heads of {width // heads} in place of 64")
    if config.get("model") == "UniFormerV2" and (
            set(config["mean"]), set(config["std"])) != ({0.45}, {0.225}):
        unsaid.append(f"pixels in [0, 1] are normalised with mean {config['mean']} and deviation "
                      f"{config['std']}")
    if {config.get("eps", 1e-6), config.get("head_eps", 1e-6)} != {1e-6}:
        unsaid.append(f"LayerNorm epsilons {config.get('eps')}, before the head "
                      f"{config.get('head_eps')}")
    return unsaid


def explain(source, heads):
    """Print what a file of weights is, and load it. Raises WeightsError."""
    tensors, config = read(source)
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    millions = sum(value.numel() for value in tensors.values()) / 1e6
    print(f"{source}: {len(tensors)} tensors, {millions:.2f} M numbers, "
          + ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
          + " (half precision is widened)")
    if config:
        print(f"a run of this project: {config.get('model', 'several models')}; give it to "
              f"train.py as --weights {source}")
        print("sizes: " + json.dumps(config))
        return
    family, loaders = describe(tensors)
    if family is None:
        raise WeightsError(f"{source}: of no family known here; its names are like "
                           f"{listed(list(tensors)[:5])}")
    print(f"family: {family}")
    for loader in loaders:
        load = class_of(loader).from_official
        keywords = [key for key in inspect.signature(load).parameters if key.endswith("heads")]
        if loader == "CaptionDecoder":  # its shapes tell
            keywords = []
        model = load(source, **(dict.fromkeys(keywords, heads) if heads else {}))
        unused = [key for key in getattr(model, "unused", ())
                  if len(loaders) < 2 or not key.startswith("caption_decoder.")]
        print(f"loads{'' if unused else ', to the last tensor'}: {MODELS[loader][0]}.{loader}"
              f".from_official({str(source)!r})"
              + (f"; of no use there: {listed(unused)}" if unused else ""))
        print("sizes: " + json.dumps(model.config))


def main(argv=None):
    """Say what a file of weights is, whether it loads, and with what.

    The exit code is 0, or 2 where it does not load.
    """
    parser = argparse.ArgumentParser(
        prog="python -m weights", description="What is in a file of weights, and who loads it?")
    parser.add_argument("file", help="a run's folder, or a file of weights")
    parser.add_argument("--convert", default="", help="write its tensors as .safetensors here; of "
                        "a pickle that holds more than tensors, the rest is left out, and nothing "
                        "of it runs")
    parser.add_argument("--official", default="", help="write a run under the official names here: "
                        "NEW.safetensors, or NEW.pth in the envelope that the official code opens")
    parser.add_argument("--heads", type=int, default=0, help="of every attention, where the width "
                        "is none of a published model")
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
