"""Reads an adapter layer for the tests."""


def tensors_of(layer):
    """{name: tensor} of a layer as an adapter file holds them."""
    return {name: getattr(layer, name) for name in (*layer.method.parameters, *layer.method.constants)}


def merged_weight(layer):
    """The weight of the plain linear layer that equals this one: (out, in) float32."""
    params = {name: tensor.detach() for name, tensor in tensors_of(layer).items()}
    return layer.method.change.added(layer.base_weight().detach(), params, layer.scale)
