"""What a trial of a few items says of a model before it is trained."""

import torch
from accelerate.utils import broadcast_object_list
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.batches import Key
from runtime.evaluation import check_outputs, evaluation_mode
from runtime.launch import UserError, describe_strategy


def make_trainable(accelerator, model, dataset, gradient_checkpointing: bool):
    """Freeze what gets no gradient: DDP would stop at it, and FSDP2 could not resume.

    Every process must call this before the model is prepared. Process 0 tries the first items of
    the data set. Raises UserError where the model is random in evaluation mode, has a BatchNorm
    that the launch cannot keep equal, or does not offer gradient checkpointing; ValueError where
    its backbone does not.
    """
    unused = [unused_parameters(model, dataset) if accelerator.is_main_process else []]
    broadcast_object_list(unused)
    for name in unused[0]:
        model.get_parameter(name).requires_grad_(False)
    if unused[0]:
        accelerator.print(f"frozen, since they get no gradient: {', '.join(unused[0])}")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        if accelerator.num_processes > 1 and describe_strategy(accelerator)["strategy"] != "DDP":
            raise UserError(
                "its BatchNorm has other means on each process, and only DDP makes them equal: "
                "launch with multi_gpu.yaml, or name another model"
            )
        accelerator.print("BatchNorm: the numbers depend on the micro-batch and on the processes")
    # FSDP2 divides a model at these layers. CLIP also names some that its vision model lacks, and
    # accelerate would stop at them.
    there = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = there.intersection(getattr(model, "_no_split_modules", None) or ())
    if gradient_checkpointing:
        if not hasattr(model, "activation_checkpointing_enable"):
            raise UserError(f"--gradient_checkpointing: {type(model).__name__} does not offer it")
        model.activation_checkpointing_enable()


def unused_parameters(model, dataset) -> list[str]:
    """The names of the parameters that no item's loss depends on. Raises UserError."""
    keys = [Key(item) for item in range(min(4, len(dataset)))]
    batch = dataset.__getitems__(keys)
    del batch["index"], batch["weight"]
    with evaluation_mode(model):
        again = model(**batch)
        # Only the graph is looked at. Without what backward would need it takes no memory.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            outputs = check_outputs(model(**batch), len(keys), "losses")
    for name, values in outputs.items():
        if not values.float().allclose(again[name].float(), 1e-5, 1e-5, equal_nan=True):
            raise UserError(f"in evaluation mode its {name!r} are random; name another model")
    nodes, seen = [outputs["losses"].grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [earlier for earlier, _ in node.next_functions]
    used = {id(getattr(node, "variable", None)) for node in seen}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in used]
