"""Optimizer groups: weight decay, layer-wise learning rates and LoRA+'s ratio."""


def parameter_groups(model, weight_decay=0.0, layerwise_lr=False, lora_plus_ratio=1.0):
    """Trainable parameters of a model as optimizer groups.

    With layerwise_lr, RWKV-LM's rule for RWKV-6: time_decay learns at twice the rate, and no
    parameter named time_* decays; its other groups have rate 1. Without it they are treated like
    the rest: what has two dimensions longer than 1 decays. lora_plus_ratio multiplies the rate of
    lora_B (Hayou et al. 2024, arXiv 2402.12354).

    -> a list of dicts with "params", "weight_decay" and "lr_scale", which the schedule multiplies
    by its learning rate; empty groups are left out, and names and order depend on the model alone.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        timed = layerwise_lr and leaf.startswith("time_")
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decay = weight_decay if not timed and sum(size > 1 for size in shape) >= 2 else 0.0
        scale = 2.0 if timed and leaf == "time_decay" else lora_plus_ratio if leaf == "lora_B" else 1.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in groups.items()]
