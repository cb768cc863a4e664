"""BoneModel: puts Bone's layers into a Hugging Face model, through peft's machinery."""

from peft import utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from .layer import BoneLinear


def default_targets():
    """peft's own choice of target modules by model type: that of MiSS, or of LoRA where MiSS has none."""
    names = ("TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING")
    return next((dict(getattr(utils, name)) for name in names if hasattr(utils, name)), {})


class BoneModel(BaseTuner):
    """A model whose targeted linear layers carry Bone adapters; made by peft from a BoneConfig.

    model: any torch module. Raises UserError for a target that is not linear or that the rank does not fit;
    peft raises ValueError for targets that match nothing.
    """

    prefix = "bone_"
    tuner_layer_cls = BoneLinear
    target_module_mapping = default_targets()

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_):
        if isinstance(target, BoneLinear):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = BoneLinear(base, adapter_name, peft_config, name=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
