"""Average the weights of a video model with those of the CLIP that it grew from.

WiSE-FT, arXiv 2109.01903, Sec. 3. The average keeps more of CLIP's zero-shot accuracy than the
fine-tuned weights alone.

Where we differ: InternVideo's published list of tensors names blocks 0 to 11 only, perhaps by
mistake. It leaves out half of the visual blocks of L/14. Here all blocks are averaged.
"""

import re

import torch

# The tensors that come from CLIP, by our names.
FROM_CLIP = re.compile(
    r"text\.(positions|embed\.weight|proj\.weight)|text\.norm\..*"
    r"|visual_norm\..*|visual_proj\.weight"
    r"|visual\.(class_token|positions|embed\.weight)|visual\.norm_pre\..*"
    r"|(visual|text)\.blocks\.\d+\.(norm1|norm2|attn|mlp)\..*")


@torch.no_grad()
def merge(model, start, share=0.5):
    """share * start + (1 - share) * model, for the tensors that come from CLIP.

    model, start   clip_video.VideoCLIPs of the same size; `model` is changed in place and returned
    share          in [0, 1]; the published zero-shot scripts use 0.5
    raises         ValueError: a tensor is missing from `start` or has another shape
    """
    known = start.state_dict()
    for name, tensor in model.state_dict().items():
        if FROM_CLIP.fullmatch(name):
            if name not in known or known[name].shape != tensor.shape:
                raise ValueError(f"the two models differ in {name}: they must have the same size")
            tensor.lerp_(known[name].to(tensor), share)
    return model
