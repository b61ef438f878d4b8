"""The size of frames on the command line: 112 for squares, or height x width, as 112x160."""

import argparse
import re

LARGEST = 10**4  # pixels of one side


def frame_size(text):
    """Typed text -> an int for squares, otherwise the text "HxW". Both fit JSON and compare by ==.

    ArgumentTypeError, for argparse, where the text is neither.
    """
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    sides = [int(side) for side in text.split("x")] if re.fullmatch(r"\d+x\d+", text) else []
    if not sides or not 1 <= min(sides) <= max(sides) <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give pixels, as 112, or height x width, as 112x160, each from 1 to "
            f"{LARGEST}")
    return spelled(sides)


def height_width(size):
    """An int, "HxW" or (H, W) -> (H, W)."""
    sides = [int(side) for side in str(size).split("x")] if isinstance(size, (int, str)) else size
    return sides[0], sides[-1]


def spelled(size):
    """An int, "HxW" or (H, W) -> an int or "HxW", as in `frame_size`."""
    height, width = height_width(size)
    return height if height == width else f"{height}x{width}"
