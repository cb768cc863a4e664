"""Gradients of the loss with respect to the weights that an adapter would replace, for LoRA-GA's start."""

from .inject import check_adapter, linear_shapes


def estimate_gradients(model, config, batches, loss):
    """Mean gradient of each target weight over some batches.

    model holds plain nn.Linear targets (before `inject`); loss(model, batch) is a scalar tensor.
    -> module name -> (out, in) in the weight's dtype. The model's own requires_grad flags come back
    afterwards. All gradients are in memory at once. Raises UserError as check_adapter does.
    """
    names = check_adapter(config, linear_shapes(model))
    weights = [model.get_submodule(name).weight for name in names]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        count = 0
        for batch in batches:
            loss(model, batch).backward()
            count += 1
        return {name: weight.grad.div_(max(1, count)) for name, weight in zip(names, weights)}
    finally:
        for weight in weights:
            weight.grad = None
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
