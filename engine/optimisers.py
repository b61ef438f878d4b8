"""Optimisers, the learning rate, and the average of the weights."""

import contextlib
import math

import torch

from engine import processes


def clips_per_step(stage):
    """Of all micro-batches and all processes."""
    return stage.batch_size * stage.accum * processes.world()


def peak_rate(stage):
    """The rate after warm-up: --lr, or --blr, where a stage has it, per 256 clips of a step."""
    return stage.lr or getattr(stage, "blr", 0.0) * clips_per_step(stage) / 256


def learning_rate(stage, step):
    """Rate of step 0, 1, ...: linear warm-up from 0, then half a cosine to min_lr of the peak."""
    peak = peak_rate(stage)
    warm = int(stage.warmup * stage.steps)
    if step < warm:
        return peak * step / warm
    progress = (step - warm) / max(1, stage.steps - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (stage.min_lr + (1 - stage.min_lr) * cosine)


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024): the update of a matrix is made orthogonal.

    All directions of the gradient then count alike. AdamW needs thousands of steps to find the weak
    ones, such as "attend to the neighbour" (LOG.md). This is torch's Muon, but all matrices of one
    shape are updated as one stack: the same numbers within rounding, and one kernel call per shape.
    """

    @torch.no_grad()
    def step(self):
        stacks = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
                moment = self.state[parameter]["momentum_buffer"]
                moment.lerp_(parameter.grad, 1 - group["momentum"])
                update = processes.whole(parameter.grad.lerp(moment, group["momentum"]))
                wide = update if update.shape[0] <= update.shape[1] else update.T
                stacks.setdefault(wide.shape, []).append((parameter, wide, group))
        for members in stacks.values():
            stack = self.orthogonal(torch.stack([wide for _, wide, _ in members]),
                                    *members[0][2]["ns_coefficients"])
            for (parameter, _, group), update in zip(members, stack):
                rate = 0.2 * max(parameter.shape) ** 0.5 * group["lr"]  # AdamW's step size
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update if update.shape == parameter.shape else update.T
                parameter.add_(processes.place(update.to(parameter.dtype), parameter), alpha=-rate)

    @staticmethod
    def orthogonal(stack, a, b, c, steps=5):
        """(n, rows, columns), rows <= columns -> the same in bfloat16, singular values close to 1.

        Newton-Schulz: `steps` rounds of x -> a x + b x x'x + c x x'x x'x; no decomposition needed.
        """
        x = stack.bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x


def numbered_layers(model):
    """The parameters in ModuleLists and Sequentials: those of blocks, and of heads and cross-model
    attentions that have several layers -> set of parameters."""
    return {parameter for container in model.modules()
            if isinstance(container, (torch.nn.ModuleList, torch.nn.Sequential))
            for parameter in container.parameters()}


def undecayed(model):
    """Parameters that weight decay leaves alone, because their size means something -> a set.

    Biases, norms and all else of one axis; word embeddings; and the tokens and position tables that
    a module names in its attribute `undecayed`: so do VideoMAE and InternVideo's video-text model.
    UniFormerV2's own recipe spares only what has one axis.
    """
    tables = {getattr(module, name) for module in model.modules()
              for name in getattr(module, "undecayed", ())}
    words = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return tables | words | {x for x in model.parameters() if x.ndim < 2}


class Optimizer:
    """One or two optimisers as one. Each group has a "scale", its factor on the learning rate."""

    def __init__(self, parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        """{parameter: {name: tensor}} of all parts."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def set_rate(self, rate):
        for group in self.param_groups:
            group["lr"] = rate * group["scale"]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def build_optimizer(model, stage):
    """The optimiser of a recipe. Its learning rate is set before each step.

    It decays all but the `undecayed`. Muon moves the matrices of numbered layers. It is scaled to
    the step size of AdamW, so that one learning rate serves both.
    """
    layers, kept, muon, adamw = numbered_layers(model), undecayed(model), {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter in kept else stage.weight_decay
        matrix = parameter.ndim == 2 and parameter in layers and parameter not in kept
        groups = muon if stage.optimizer == "muon" and matrix else adamw
        # Parameters cut into parts (--shard) and whole ones do not mix in a group.
        key = decay, stage.scale_of(model, name), hasattr(parameter, "placements")
        groups.setdefault(key, []).append(parameter)

    def sorted_groups(groups):
        return [{"params": parameters, "weight_decay": decay, "scale": scale}
                for (decay, scale, _), parameters in sorted(groups.items(), key=lambda x: x[0],
                                                            reverse=True)]

    parts = []
    if muon:
        parts.append(Muon(sorted_groups(muon), lr=0.0, adjust_lr_fn="match_rms_adamw"))
    if adamw:
        parts.append(torch.optim.AdamW(sorted_groups(adamw), lr=0.0, fused=True,
                                       betas=(0.9, stage.beta2)))
    return Optimizer(parts)


def clip_gradients(model, limit):
    """Scale all gradients to a norm of at most `limit`, 0 = no limit -> the norm before."""
    return processes.clip(model, limit or math.inf)


class WeightAverage:
    """Exponential moving average of the weights (Polyak), kept in float32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - self.decay)
            else:
                self.state[key].copy_(value)

    @contextlib.contextmanager
    def in_place(self, model):
        """A context in which the model has the averaged weights."""
        own = {key: value.detach().clone() for key, value in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)
