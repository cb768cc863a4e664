"""BoneModel: puts Bone's layers into a Hugging Face model, through peft's machinery."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel, utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..cli.errors import UserError
from ..models import family_named
from .config import BoneConfig
from .layer import BoneLinear
from .register import SAVES_BIASES, version
from .rwkv_config import CONFIGS

# Modules of transformers whose linear layers' weights are read without a call, by fused kernels.
NEVER_CALLED = tuple(
    """MambaMixer.x_proj MambaMixer.dt_proj MambaMixer.out_proj FalconMambaMixer.x_proj FalconMambaMixer.dt_proj
    FalconMambaMixer.out_proj JambaMambaMixer.dt_proj Mamba2Mixer.out_proj BambaMixer.out_proj
    FalconH1Mixer.out_proj GraniteMoeHybridMambaLayer.out_proj NemotronHMamba2Mixer.out_proj
    Zamba2MambaMixer.out_proj""".split()
)
# trl's trainers of preferences and rewards add an adapter COPY with the same config as COPIED, to compare with how that
# began; they copy only tensors with ".default." in their names, and Bone's names end in ".default".
COPY, COPIED = "ref", "default"
CLASSIFIERS = ("classifier", "score", "qa_outputs")  # peft adds them to modules_to_save by the task, even if absent


def default_targets() -> dict[str, list[str]]:
    """peft's default target modules by model type: MiSS's, or LoRA's if this peft has no MiSS; of an RWKV all linear
    layers of a block."""
    names = ("TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING")
    found = next((dict(getattr(utils, name)) for name in names if hasattr(utils, name)), {})
    return found | {config.model_type: list(family_named(config.version).targets) for config in CONFIGS}


def warn_of_strangers(setting: str, given: Collection[str] | str | None, model: nn.Module) -> None:
    """Warn of names in a list that no module's name ends with: peft ignores them if another one matches."""
    if given is None or isinstance(given, str):
        return
    modules = [f".{name}" for name, _ in model.named_modules()]
    for name in sorted(set(given) - set(CLASSIFIERS)):
        if not any(module.endswith(f".{name}") for module in modules):
            warnings.warn(f"{name!r} of {setting} is no module of the model, and is passed over", stacklevel=2)


class BoneModel(BaseTuner):
    """A model with Bone adapters on its targeted linear layers; made by peft from a BoneConfig.

    model: any torch module. Raises UserError for a target that is not linear, or if the rank does not fit it;
    peft raises ValueError if the targets match nothing.
    """

    prefix = "bone_"
    tuner_layer_cls = BoneLinear
    target_module_mapping = default_targets()

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if config.bias != "none" and version() < SAVES_BIASES:
            raise UserError(
                f"bias={config.bias!r} trains biases, and peft {'.'.join(map(str, version()))} would not save them; "
                f"take peft {'.'.join(map(str, SAVES_BIASES))} or newer, or bias='none'"
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **settings: Any) -> None:
        """Inject as peft does; if it fails, the model stays as it was. Raises UserError for a PeftModel, because the
        adapter's names would match no base model, and the saved adapter could not be loaded."""
        if isinstance(model, PeftModel):
            raise UserError(
                "the model is a PeftModel already; give its base, get_peft_model(model.unload(), …), or add another "
                "adapter: model.add_adapter(name, config)"
            )
        config = self.peft_config[adapter_name]  # peft fills in its targets below if it names none
        given = {setting: getattr(config, setting) for setting in ("target_modules", "modules_to_save")}
        self._undo: list[Callable[[], object]] = []
        try:
            super().inject_adapter(model, adapter_name, *args, **settings)
        except Exception:
            for undo in reversed(self._undo):
                undo()
            raise
        finally:
            del self._undo
        if adapter_name == COPY and self.peft_config.get(COPIED) is config:
            for layer in self.modules():
                if isinstance(layer, BoneLinear) and COPY in layer.bone_block and COPIED in layer.bone_block:
                    layer.bone_block[COPY].data.copy_(layer.bone_block[COPIED].data)
        if not config.from_file:
            for setting, names in given.items():
                warn_of_strangers(setting, names, model)

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **settings: Any) -> None:
        """Merge as peft does. Raises UserError for an unknown adapter, and if a merge would change another module."""
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, *args, **settings)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: Sequence[str] | None) -> None:
        """Raise UserError for an unknown adapter, and if a layer to merge shares its weight with another module, as a
        head does with embeddings: the adapter has changed only the layer."""
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise UserError(
                f"adapter_names={adapter_names!r}: there is no adapter {unknown[0]!r}; give a list of some of "
                f"{', '.join(self.peft_config)}"
            )
        sharers: dict[int, list[str]] = {}  # by id of a parameter
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                sharers.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
        for name, module in self.model.named_modules():
            if not isinstance(module, BoneLinear):
                continue
            merges = set(adapter_names or module.active_adapters) & set(module.bone_block)
            others = [other for other in sharers.get(id(module.weight), ()) if other != name]
            if merges and others:
                raise UserError(
                    f"{name} shares its weight with {others[0]}, which merging would change too; load the base anew "
                    f"and give {name} a weight of its own before it gets the adapter: base.{name}.weight = "
                    f"torch.nn.Parameter(base.{name}.weight.detach().clone()), base.config.tie_word_embeddings = False"
                )

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **_: Any
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise UserError(
                "Bone cannot give each row of a batch an adapter of its own (adapter_names); make a batch of rows "
                "that share one, and choose it with set_adapter"
            )
        yield

    def _create_and_replace(
        self,
        peft_config: BoneConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BoneLinear):
            target.update_layer(adapter_name, peft_config)
            self._undo.append(lambda: target.drop_layer(adapter_name))
            return
        if isinstance(target, BaseTunerLayer):
            raise UserError(
                f"{current_key} has an adapter of another method, {type(target).__name__}; merge or unload that "
                "first (merge_and_unload)"
            )
        if isinstance(parent, nn.MultiheadAttention) or f"{type(parent).__name__}.{target_name}" in NEVER_CALLED:
            raise UserError(
                f"{current_key} is inside of a {type(parent).__name__}, which reads its weight without calling it; "
                "leave it out of target_modules (exclude_modules)"
            )
        layer = BoneLinear(target, adapter_name, peft_config, name=current_key)
        self._undo.append(lambda: setattr(parent, target_name, target))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)
