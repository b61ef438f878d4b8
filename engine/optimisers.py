"""The optimiser of a recipe, the learning-rate schedule, and the average of the weights."""

import contextlib
import math

import torch

from engine import processes


def clips_per_step(stage):
    """Clips per optimiser step, over all micro-batches and processes."""
    return stage.batch_size * stage.accum * processes.world()


def peak_rate(stage):
    """Learning rate after warm-up: --lr; where that is 0, --blr times clips per step / 256."""
    return stage.lr or getattr(stage, "blr", 0.0) * clips_per_step(stage) / 256


def learning_rate(stage, step):
    """Learning rate of a step: linear warm-up from 0, then a half cosine down to min_lr * peak."""
    peak = peak_rate(stage)
    warmup = int(stage.warmup * stage.steps)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, stage.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (stage.min_lr + (1 - stage.min_lr) * cosine)


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024): the update of a matrix is made orthogonal.

    All directions of the gradient then have the same weight. AdamW needs thousands of steps to
    learn weak directions, such as "attend to the neighbour" (LOG.md). The updates are those of
    torch's Muon within rounding. But all matrices of one shape are updated as one stack, with one
    kernel call per shape.
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
                update = processes.full_tensor(parameter.grad.lerp(moment, group["momentum"]))
                wide = update if update.shape[0] <= update.shape[1] else update.T
                stacks.setdefault(wide.shape, []).append((parameter, wide, group))
        for members in stacks.values():
            stack = self.orthogonal(torch.stack([wide for _, wide, _ in members]),
                                    *members[0][2]["ns_coefficients"])
            for (parameter, _, group), update in zip(members, stack):
                rate = 0.2 * max(parameter.shape) ** 0.5 * group["lr"]  # AdamW's step size
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update if update.shape == parameter.shape else update.T
                update = processes.shard_like(update.to(parameter.dtype), parameter)
                parameter.add_(update, alpha=-rate)

    @staticmethod
    def orthogonal(stack, a, b, c, steps=5):
        """(n, rows, columns), rows <= columns -> the same in bfloat16 with singular values near 1.

        Newton-Schulz iteration: `steps` times x -> a x + b xx'x + c xx'xx'x. It needs no SVD.
        """
        x = stack.bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x


def numbered_layers(model):
    """The set of parameters inside ModuleLists and Sequentials.

    These are the parameters of blocks, and of heads and cross-model attention with several layers.
    """
    return {parameter for container in model.modules()
            if isinstance(container, (torch.nn.ModuleList, torch.nn.Sequential))
            for parameter in container.parameters()}


def no_weight_decay(model):
    """The set of parameters without weight decay.

    These are biases, norms and all others with one axis; word embeddings; and the tokens and
    position tables listed in the attribute `no_weight_decay` of a module. VideoMAE and
    InternVideo's video-text model do the same. UniFormerV2's recipe only excludes parameters with
    one axis.
    """
    tables = {getattr(module, name) for module in model.modules()
              for name in getattr(module, "no_weight_decay", ())}
    embeddings = {module.weight for module in model.modules()
                  if isinstance(module, torch.nn.Embedding)}
    return tables | embeddings | {x for x in model.parameters() if x.ndim < 2}


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
    """The optimiser of a recipe. Set its learning rate before each step.

    With --optimizer muon, Muon trains the matrices of `numbered_layers` and AdamW the rest. Muon's
    updates are scaled to the step size of AdamW, so both use one learning rate. Weight decay does
    not apply to `no_weight_decay`.
    """
    layers, no_decay, muon, adamw = numbered_layers(model), no_weight_decay(model), {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter in no_decay else stage.weight_decay
        matrix = parameter.ndim == 2 and parameter in layers and parameter not in no_decay
        groups = muon if stage.optimizer == "muon" and matrix else adamw
        # A group may not mix sharded parameters (--shard) and full ones.
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
    """Scale all gradients to a norm of at most `limit` (0 = none) -> the norm before scaling."""
    return processes.clip(model, limit or math.inf)


class WeightAverage:
    """Exponential moving average of the weights, in the data type of the weights."""

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
        """Context in which the model has the averaged weights."""
        own = {key: value.detach().clone() for key, value in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)
