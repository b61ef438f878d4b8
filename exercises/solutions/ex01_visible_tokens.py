"""Tubes run through time: what is hidden is counted in one frame and holds for all."""


def visible_tokens(frames, height, width, ratio, patch=16, tubelet=2):
    places = (height // patch) * (width // patch)
    return (frames // tubelet) * (places - int(ratio * places))
