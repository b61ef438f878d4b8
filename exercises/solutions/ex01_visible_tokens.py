"""A tube has the same place in all time steps, so the hidden places of one step are counted."""


def visible_tokens(frames, height, width, ratio, patch=16, tubelet=2):
    places = (height // patch) * (width // patch)
    return (frames // tubelet) * (places - int(ratio * places))
