"""--dry-run: estimate what a training step costs, without training."""

import time

import torch

from engine import processes
from engine.evaluation import to_device
from engine.stage import generator


def dry_run(stage, model, train_set):
    """Print parameters, FLOPs, memory and time of a step, extrapolated from one clip.

    Returns {"parameters", "forward_flops" (of one clip), "expected_bytes", "seconds" (of a step)}.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def cpu_attention_flops(q, k, v, *_, **__):  # torch counts only GPU attention kernels
        return sdpa_flop_count(q, k, v)

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention_flops}
    model.to(stage.device).train()
    batch = to_device(stage.example(model, train_set), stage.device)
    saved = {}  # {address: bytes} of the tensors that the backward pass needs

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.compiler.set_stance("force_eager"), counter, \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = stage.loss(model, batch, generator(stage.seed, "dry run"))
    forward = counter.get_total_flops()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Bytes in float32: weights; for trained ones a gradient and two AdamW states; the average.
    fixed = 4 * parameters + 12 * trained + (4 * parameters if stage.ema else 0)
    fixed /= processes.world() if stage.shard else 1
    total = fixed + activations * stage.batch_size
    print(f"parameters           {parameters / 1e6:10.2f} M, {trained / 1e6:.2f} M of them trained")
    print(f"FLOPs per clip       {forward / 1e9:10.2f} G forward, about {3 * forward / 1e9:.2f} G "
          "with backward")
    print(f"weights, gradients, AdamW {fixed / 2**20:5.0f} MiB")
    print(f"activations          {activations * stage.batch_size / 2**20:10.0f} MiB for "
          f"{stage.batch_size} clips")
    print(f"expected memory      {total / 2**20:10.0f} MiB, plus the framework's own")
    seconds = seconds_of(stage, model, batch) * stage.batch_size * stage.accum
    minutes = seconds * stage.steps / 60
    print(f"expected time        {seconds:10.2f} s a step at most, {minutes:.1f} minutes for "
          f"{stage.steps} steps; computing alone, measured with single clips; reading files takes "
          "more")
    return dict(parameters=parameters, forward_flops=forward, expected_bytes=total,
                seconds=seconds)


def seconds_of(stage, model, batch):
    """Seconds of a forward and backward pass of this batch, measured at the second call."""
    for _ in range(2):
        began = time.monotonic()
        stage.loss(model, batch, generator(stage.seed, "dry run"))[0].backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.monotonic() - began
