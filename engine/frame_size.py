"""The size of frames as users type it: 112 for squares, or height x width, as 112x160."""

import argparse
import re

LARGEST = 10**4  # pixels of a side


def frame_size(text):
    """What was typed -> an int, or where the sides differ the text "HxW": both can be written as
    JSON and compared. For argparse: ArgumentTypeError where it is neither."""
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
    """An int, "HxW" or (H, W) -> an int or "HxW", as `frame_size` returns it."""
    height, width = height_width(size)
    return height if height == width else f"{height}x{width}"
