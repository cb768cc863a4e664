"""BoneLinear: a linear layer of a Hugging Face model with any number of Bone adapters.

A single active adapter is computed by the functions of rwkv_peft.adapters, which never keep a merged weight. They read
the base layer's weight and do not call the layer; it is called only if it has hooks.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.functions.tokens import linear
from ..adapters.product import Frozen
from ..cli.errors import UserError
from ..cli.names import all_finite
from ..ops import products
from .config import PARAMETER, BoneConfig, block_shape
from .products import TRANSPOSED, Dequantized, device_of, offload, offloaded, onload, product_for


class BoneLinear(nn.Module, BaseTunerLayer):
    """A base linear layer and its adapters, by name; made by BoneModel.

    base_layer (in -> out): nn.Linear, GPT-2's Conv1D, or a quantized layer of bitsandbytes. bone_block holds each
    adapter's parameter: bone (r, out), bone-mini (r, mini_r), bat-in (in/r, r, r), bat-out (out/r, r, r).
    """

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_config", "bone_dropout")
    # from peft's class: weight, bias and get_base_layer for the base layer, the others for the adapters
    weight: torch.Tensor
    bias: torch.Tensor | None
    get_base_layer: Callable[[], nn.Linear]
    active_adapters: list[str]
    set_adapter: Callable[[list[str]], None]

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: BoneConfig, name: str = "the layer") -> None:
        super().__init__()
        self.base_layer, self.product = base_layer, product_for(base_layer, name)
        sizes = ("nx", "nf") if isinstance(base_layer, Conv1D) else ("in_features", "out_features")
        self.in_features, self.out_features = (getattr(base_layer, size) for size in sizes)
        self.name = name
        self.bone_config: dict[str, BoneConfig] = {}
        self.bone_dropout = nn.ModuleDict()
        self.bone_block = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BoneConfig) -> None:
        """Add an adapter. Raises UserError if the config's rank does not fit the layer."""
        shape = block_shape(config, self.in_features, self.out_features, self.name)
        self.bone_config[adapter_name] = config
        self.bone_dropout[adapter_name] = nn.Dropout(config.bone_dropout)
        dtype = self.weight.dtype if self.weight.is_floating_point() else torch.float32
        block = torch.zeros(shape, device=device_of(self.base_layer), dtype=dtype)
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=5**0.5)
        self.bone_block[adapter_name] = nn.Parameter(block)
        self.set_adapter(self.active_adapters)
        if config.inference_mode:
            self.bone_block[adapter_name].requires_grad_(False)

    def drop_layer(self, adapter_name: str) -> None:
        """Undo update_layer: remove an adapter that was added."""
        for adapters in (self.bone_block, self.bone_dropout, self.bone_config):
            del adapters[adapter_name]

    def _turned(self, weight: torch.Tensor) -> torch.Tensor:
        """The base layer's weight as (out, in), and back."""
        return weight.t() if self.product is TRANSPOSED else weight

    @property
    def quantized(self) -> bool:
        return isinstance(self.product, Dequantized)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.bone_block]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self.quantized and offloaded(self.base_layer):
            raise UserError(
                f"{self.name} is quantized and offloaded, and Bone needs its weight again in the backward pass; "
                "give a device_map that keeps it on one device"
            )
        self._gather()
        dtype = x.dtype
        x = onload((self.base_layer, self.bone_block), x)
        if isinstance(self.product, Dequantized):
            x = x.to(self.product.compute_dtype(x))
        if watched(self.base_layer):
            y = self._beside(x, names)
        else:
            y = self._adapted(x, names[0]) if len(names) == 1 else self._composed(x, names)
        y = offload((self.base_layer, self.bone_block), y)
        return y.to(dtype) if not torch.is_autocast_enabled(x.device.type) else y

    def _adapted(self, x: torch.Tensor, name: str) -> torch.Tensor:
        seen = self._seen(x, [name])
        if seen is x:
            return self._apply_adapter(x, name, self.bias)
        # The frozen weight gets the dropped part too.
        return self._apply_adapter(seen, name, self.bias) + linear(x - seen, Frozen(self.weight, None, self.product))

    def _apply_adapter(self, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        method, params = self.bone_config[name].method, {PARAMETER: self.bone_block[name]}
        return method.apply(x, Frozen(self.weight, bias, self.product), params, 1.0, 0.0)

    def _composed(self, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Apply several adapters at once, as if they were merged."""
        x = self._seen(x, names)
        weight, change = self._change(names)
        return products.linear(x, (weight + change).to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _beside(self, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Call the base layer, because it has hooks, and add the adapters' part."""
        _, change = self._change(names)
        return self.base_layer(x) + products.linear(self._seen(x, names), change.to(x.dtype))

    def _seen(self, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Return x after the adapters' dropout. Raises UserError for dropout with several adapters."""
        if not self.training or not any(self.bone_dropout[name].p for name in names):
            return x
        if len(names) > 1:
            raise UserError(
                "bone_dropout is defined for one active adapter; activate one with set_adapter, or leave the "
                "dropout out"
            )
        return self.bone_dropout[names[0]](x)

    def _change(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(base weight, change by the adapters), both (out, in); each changes the weight that those before it left."""
        weight = self.product.rows(self.weight, slice(0, self.out_features), exact(self.weight))
        change = torch.zeros_like(weight)
        for name in names:
            change = change + self._delta(name, weight + change)
        return weight, change

    def _delta(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The change of a weight (out, in) by one adapter."""
        return self.bone_config[name].method.change.delta(weight, {PARAMETER: self.bone_block[name]})

    def _removed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Take one merged adapter out of a weight (out, in). Raises UserError if nothing undoes it."""
        change, params = self.bone_config[name].method.change, {PARAMETER: self.bone_block[name].detach()}
        try:
            return weight + change.delta(weight, change.opposite(params))
        except UserError as error:
            raise UserError(f"{self.name}: merging cannot be undone: {error}") from error

    def _gather(self) -> None:
        """Gather the base layer's parameters for this layer: ZeRO-3 gathers them only for the module that owns them."""
        parameters: tuple[Any, ...] = self.weight, self.bias  # under ZeRO-3 DeepSpeed adds methods to them
        for parameter in parameters:
            if hasattr(parameter, "ds_id") and id(parameter) not in getattr(self, "_external_params", {}):
                from deepspeed.zero import register_external_parameter

                register_external_parameter(self, parameter)
                parameter.all_gather()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (by default all active ones) into the base weight, in float32 or float64, rounded once.

        Raises UserError for a quantized base, because its rounding would lose much of the adapter, for a weight
        sharded by ZeRO-3, and with safe_merge for a result that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bone_block]
        if not names:
            return
        if self.quantized:
            raise UserError(
                f"{self.name} is quantized, and merging would round the adapter away; load the base model "
                "without quantization, PeftModel.from_pretrained(base, adapter) on it, and merge that"
            )
        weight = self.get_base_layer().weight
        if weight.is_meta and offloaded(self.base_layer):
            with onload_layer(self):
                self.merge(safe_merge, names)
            return
        if weight.numel() != self.in_features * self.out_features:
            raise UserError(
                f"the weight of {self.name} is spread over processes by ZeRO-3; save the adapter, and merge it "
                "in a process without DeepSpeed"
            )
        merged = self._turned(weight.data).to(exact(weight))
        for name in names:
            merged = merged + self._delta(name, merged).detach()
        if safe_merge and not all_finite(merged.to(weight.dtype)):
            raise UserError(
                f"{self.name}: merging {', '.join(names)} gives values that are not finite; the adapter is "
                "broken. This layer stays as it was; load the model anew, since others may be merged"
            )
        weight.data = self._turned(merged.to(weight.dtype)).contiguous()
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, up to the rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        if weight.is_meta and offloaded(self.base_layer):
            with onload_layer(self):
                self.unmerge()
            return
        original = self._turned(weight.data).to(exact(weight))
        for name in reversed(self.merged_adapters):
            if name in self.bone_block:
                original = self._removed(name, original)
        weight.data = self._turned(original.to(weight.dtype)).contiguous()
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The change of the base weight by one adapter: (out, in), float32, or float64 if the base is."""
        return self._change([adapter_name])[1]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        for name, config in self.bone_config.items():
            saved = state_dict.get(f"{prefix}bone_block.{name}")
            if saved is None:
                continue
            if self.bone_block[name].is_meta and not local_metadata.get("assign_to_params_buffers"):
                raise UserError(
                    f"the adapter of {self.name} has no memory to be loaded into. For a base model that is partly "
                    "on disk: model = get_peft_model(base, PeftConfig.from_pretrained(adapter)), then "
                    "set_peft_model_state_dict(model, load_peft_weights(adapter))"
                )
            # A pre-release of peft saved block affine adapters (3-D) with init_weights true, which now is bone (2-D).
            if saved.dim() == 3 and self.bone_block[name].dim() == 2:
                # "bat": set below for an earlier layer, which shares this config
                if not (config.from_file and config.init_weights in (True, "bat")):
                    raise UserError(
                        f"the file holds a block affine adapter for {self.name}, and this one is {config.method.name}, "
                        f"init_weights={config.init_weights!r}; load it with PeftModel.from_pretrained or load_adapter "
                        "under another name, which read its own settings"
                    )
                config.init_weights = "bat"
                shape = block_shape(config, self.in_features, self.out_features, self.name)
                old = self.bone_block[name]
                self.bone_block[name] = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __repr__(self) -> str:
        return "bone." + super().__repr__()


def exact(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which adapters are added to a weight: float32, or float64 if the weight is."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def watched(layer: nn.Linear) -> bool:
    """True for a layer with hooks that need its call; DeepSpeed ZeRO-3's, on all layers, do not."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return any(hooks) and not hasattr(layer.weight, "ds_id")
