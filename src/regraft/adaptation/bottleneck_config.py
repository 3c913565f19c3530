"""The config of bottleneck adapters, in the format of their `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_INNER_SIZE = 24  # arbitrary: wider bottlenecks fit more, but take more memory and disk
ACTIVATIONS = ("gelu", "relu")
PLACEMENTS = ("houlsby", "pfeiffer")
# the patterns cover BERT and its variants, DistilBERT, Llama and its variants, GPT-2, GPT-NeoX, OPT and ModernBERT
AFTER_ATTENTION = (
    r"(attention\.(output\.dense|out_lin|dense|attn\.o)|self_attn\.(o_proj|out_proj|dense)|attn\.(c_proj|out_proj|Wo))$"
)
"""Matches the last linear layer of an attention, which projects back to the model's width."""
AFTER_FEED_FORWARD = (
    r"(layer\.\d+\.output\.dense|ffn\.lin2|mlp\.(down_proj|c_proj|fc2|dense_4h_to_h|Wo)|layers\.\d+\.fc2)$"
)
"""Matches the last linear layer of a feed-forward, which projects back to the model's width."""


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """The config of bottleneck adapters.

    Args:
        inner_size: The width of the bottleneck.
        activation: `gelu` or `relu`.
        placement: `houlsby`, after attention and after the feed-forward, or `pfeiffer`, after the feed-forward only.
        tune_norms: Whether the model's norms, such as LayerNorm and RMSNorm, are tuned and saved.
        tune_head: Whether the head is tuned; it is saved in any case.
        modules_to_save: The names of the modules that are saved in full: the head, and a pooler that the base lacks.
            Replaced by these when fresh adapters are attached for tuning.
        after_attention: A regular expression that matches the last linear layer of each attention.
        after_feed_forward: A regular expression that matches the last linear layer of each feed-forward.
        task_type: PEFT's name of the task type; replaced by the head's when fresh adapters are attached
            for tuning.

    Raises:
        RecipeError: The inner size is below 1, a value is of another type or not one of those listed, or a pattern is
            not a regular expression.
    """

    inner_size: int = DEFAULT_INNER_SIZE
    activation: str = "gelu"
    placement: str = "houlsby"
    tune_norms: bool = False
    tune_head: bool = True
    modules_to_save: tuple[str, ...] = ()
    after_attention: str = AFTER_ATTENTION
    after_feed_forward: str = AFTER_FEED_FORWARD
    task_type: str = "SEQ_CLS"

    def __post_init__(self) -> None:
        """Refuse values that the class docstring excludes, and make `modules_to_save` a tuple."""
        if type(self.inner_size) is not int or self.inner_size < 1:
            raise RecipeError(f"a bottleneck's inner size is at least 1, found {self.inner_size!r}.")
        if self.activation not in ACTIVATIONS:
            raise RecipeError(f"activation is {' or '.join(ACTIVATIONS)}, found {self.activation!r}.")
        if self.placement not in PLACEMENTS:
            raise RecipeError(f"placement is {' or '.join(PLACEMENTS)}, found {self.placement!r}.")
        for name in ("tune_norms", "tune_head"):
            if type(getattr(self, name)) is not bool:
                raise RecipeError(f"{name} is true or false, found {getattr(self, name)!r}.")
        if isinstance(self.modules_to_save, str):
            raise RecipeError(f"modules_to_save is a list of names, found {self.modules_to_save!r}.")
        for pattern in (self.after_attention, self.after_feed_forward):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise RecipeError(f"the pattern {pattern!r} is not a regular expression ({error}).") from error
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `adapter_config.json`: the fields, and the `peft_type` BOTTLENECK."""
        fields = dataclasses.asdict(self) | {"modules_to_save": list(self.modules_to_save)}
        return {"peft_type": "BOTTLENECK", **fields}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str) -> BottleneckConfig:
        """Read the content of `adapter_config.json`.

        Args:
            config: The content of the file; settings that are not fields are ignored.
            source: The path of the file, for error messages.

        Raises:
            CheckpointError: A value is invalid.
        """
        field_names = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in config.items() if name in field_names})
        except (RecipeError, TypeError) as error:
            raise CheckpointError(f"{source}: {error}") from error
