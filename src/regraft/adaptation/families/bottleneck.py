"""The family of bottleneck adapters, which regraft implements itself and stores in PEFT's layout."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, write_adapter
from regraft.adaptation.bottleneck_config import BottleneckConfig
from regraft.adaptation.changes import base_tensor, parameter_of
from regraft.adaptation.families.adapter import Adapter
from regraft.adaptation.lora import PEFT_PREFIX
from regraft.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.checkpoint.derived import Tensors
    from regraft.task import Head


class Bottlenecks(Adapter):
    """Bottleneck adapters, small residual layers in a frozen body."""

    def config_class(self, config: Mapping[str, Any]) -> Any:
        """Return regraft's config class."""
        return BottleneckConfig

    def read_config(self, adaptation: Adaptation, *, for_new_adapter: bool = False) -> BottleneckConfig:
        """Read regraft's config."""
        return BottleneckConfig.from_dict(adaptation.config, f"{adaptation.path}/{ADAPTER_CONFIG}")

    def attach_adapter(
        self, model: Any, base: Base, head: Head, config: Any, heads: Sequence[str], modules: Sequence[str]
    ) -> Any:
        """Add an adapter to each layer that the config names; of `modules`, only heads and poolers are tuned."""
        from regraft.adaptation.bottleneck import attach_bottlenecks

        saved = tuple(name for name in modules if name in heads or name == "pooler")
        config = dataclasses.replace(config, modules_to_save=saved, task_type=head.type.peft_task_type)
        return attach_bottlenecks(model, config)

    def load_adapter(
        self, model: Any, adaptation: Adaptation, head: Head, *, trainable: bool
    ) -> tuple[Any, dict[str, torch.Tensor], Tensors]:
        """Add adapters to the layers, and load the stored tensors if all have the expected names and shapes."""
        from regraft.adaptation.bottleneck import attach_bottlenecks, bottleneck_state, set_bottleneck_state

        try:
            attach_bottlenecks(model, self.read_config(adaptation))
        except MismatchError as error:
            raise MismatchError(f"{adaptation.path}: {error}") from error
        expected = bottleneck_state(model)
        stored_names = {name.removeprefix(PEFT_PREFIX): name for name in adaptation.checkpoint}
        stored_shapes = {name: adaptation.checkpoint.tensors[stored].shape for name, stored in stored_names.items()}
        expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if expected_shapes == stored_shapes:  # otherwise the caller raises an error that lists the differences
            set_bottleneck_state(model, {name: adaptation.checkpoint[stored_names[name]] for name in expected})
        if not trainable:
            model.requires_grad_(False)
        state = {PEFT_PREFIX + name: tensor for name, tensor in bottleneck_state(model).items()}
        return model, state, adaptation.checkpoint

    def save(self, model: Any, base: Base, folder: Path, initial_factors: Tensors) -> None:
        """Write the adapters and the fully tuned modules."""
        from regraft.adaptation.bottleneck import bottleneck_config, bottleneck_state

        config = {**bottleneck_config(model).to_dict(), "base_model_name_or_path": base.name}
        write_adapter(folder, {PEFT_PREFIX + name: tensor for name, tensor in bottleneck_state(model).items()}, config)

    def tunes_module_weight(self, module: str, base: Base) -> bool:
        """Return whether the base lacks the weight: only heads and poolers are fully tuned."""
        return base_tensor(f"{module}.weight", base) is None

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Return the weight of the layer whose output the up-projection is added to."""
        module, separator, _ = parameter.partition(".bottleneck.up.")
        return parameter_of(module, model.get_submodule(module)) if separator else None

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Return the names of the parameters by their stored names, which have PEFT's prefix."""
        return {PEFT_PREFIX + name: name for name, _ in model.named_parameters()}
