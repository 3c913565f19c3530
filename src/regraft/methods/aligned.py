"""`aligned`: the old delta, rotated into the coordinates of the new base.

For new bases that were pre-trained from scratch rather than continued from the old one: their features may agree with
the old ones up to a rotation.

Source: Theseus, Transporting Task Vectors across Different Architectures without Training (Rinaldi et al., 2026,
arXiv:2602.12952), which also moves deltas by orthogonal Procrustes analysis of activations. Git Re-Basin (Ainsworth
et al., 2023, arXiv:2209.04836) aligns units by permutations instead.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import ADAPTER_NAME, PEFT_PREFIX
from regraft.errors import MAX_LISTED, KindError, RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.adaptation.adaptation import Family
    from regraft.base import Base
    from regraft.methods.job import Job
    from regraft.weights import RowMatch


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Options of `aligned`.

    Args:
        shrink: The shrinkage of the rotations towards the identity, from 0 (none) to 1 (which is `direct`).
        texts: The number of the task's training texts, without labels, on which activations are measured.

    Raises:
        RecipeError: `shrink` is not from 0 to 1, or `texts` is below 1.
    """

    shrink: float = 0.5  # lower follows the measured rotation, higher is more robust to few texts
    texts: int = 256  # more measure better, and take longer

    def __post_init__(self) -> None:
        """Refuse a shrinkage that is not from 0 to 1, and fewer than one text."""
        if not 0 <= self.shrink <= 1 or self.texts < 1:
            raise RecipeError(f"shrink must be from 0 to 1 (found {self.shrink}), texts at least 1 ({self.texts}).")


def graft_aligned(job: Job, options: Alignment) -> nn.Module:
    """Compute rotations of the inputs and outputs of each module, and rotate its delta by both.

    A module has the inputs x_o and outputs y_o in the old base, and x_n and y_n in the new base, on the same tokens of
    the task's texts. R and S are the rotations with x_n ≈ R·x_o and y_n ≈ S·y_o; for a norm, S is the rotation of its
    inputs. The delta D of a linear layer becomes S·D·Rᵀ; in a LoRA, B becomes S·B and A becomes A·Rᵀ. In bottleneck
    adapters, which read and change y, the first layer's weight W becomes W·Sᵀ, and the second layer's weight W and bias
    b become S·W and S·b. The delta d of a bias becomes S·d, and the delta e of an embedding row S·e. The delta g of a
    norm's gain becomes the diagonal of S·diag(g)·Sᵀ. The weight W of the head's first layer becomes W·Rᵀ. Experts and
    other modules keep their delta, and the outcome's notes name them.

    Args:
        job: The job, with the task's training texts.
        options: The strength of the rotations, and the number of texts.

    Returns:
        The model, ready for tuning.

    Raises:
        KindError: The adaptation's kind is not supported, none of its modules can be rotated, or the two tokenizers
            divide too few of the texts into the same tokens.
    """
    from regraft.adaptation import fresh_model, load_model
    from regraft.adaptation.changes import SUPPORTED_KINDS
    from regraft.adaptation.transform import check_transformable
    from regraft.methods.cross_moments import compute_table_moments, measure_cross_moments
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    upgrade = job.upgrade
    head = job.data.head
    grafted: nn.Module = job.build_grafted_model()
    tuned = load_model(job.adaptation, upgrade.old, head)
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    forwards = [
        BlockwiseForward(fresh_model(base, head, 0), examples, job.recipe.precision)
        for base, examples in zip((upgrade.old, upgrade.new), encode_aligned(upgrade, job.data, texts), strict=True)
    ]
    rotated_model = _RotatedModel(grafted, tuned, upgrade.old, job.adaptation.family, job.row_match)
    rotations = _Rotations(options.shrink)
    unmatched_tables = () if job.row_match is None else upgrade.old.architecture.token_parameters
    table_moments = compute_table_moments(forwards, unmatched_tables)
    is_head_rotated = False
    for part in range(forwards[0].num_parts):
        for name, (input_moment, output_moment) in measure_cross_moments(forwards, table_moments).items():
            if is_head_rotated:  # later layers of a head read its first layer's output, which is not rotated
                break
            input_rotation = None if input_moment is None else rotations(input_moment)
            if rotated_model.is_head(name):
                rotated_model.rotate_head(name, input_rotation)
                is_head_rotated = True
            else:
                output_rotation = None if output_moment is None else rotations(output_moment)
                rotated_model.rotate(name, input_rotation, output_rotation)
        rotations.clear()
        job.progress("align", part + 1, forwards[0].num_parts, {})
    unrotated_names = rotated_model.list_unrotated()
    if not rotated_model.rotated_names:
        raise KindError(
            f"{job.adaptation.path}: aligned can rotate none of the {len(unrotated_names)} tuned modules "
            f"({', '.join(unrotated_names[:MAX_LISTED])}). Use direct or init."
        )
    job.notes["turned"] = round(sum(rotations.distances) / len(rotations.distances), 4)
    if unrotated_names:
        job.notes["passed_over"] = dict.fromkeys(
            unrotated_names, "no linear layer or norm, nor an embedding of the same tokens"
        )
    return grafted


class _Rotations:
    """A cache that computes each rotation once for all modules of a part with the same cross moment.

    Args:
        shrink: The shrinkage towards the identity, 0–1.

    Attributes:
        distances: ‖R − I‖ / √width of each rotation R.
    """

    def __init__(self, shrink: float):
        self.shrink = shrink
        self.distances = list[float]()
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, cross_moment: torch.Tensor) -> torch.Tensor:
        """Return the rotation of a cross moment, [width, width]."""
        import torch

        from regraft.weights import rotation

        for cached_moment, cached_rotation in self._cache:
            if cross_moment.shape == cached_moment.shape and torch.equal(cross_moment, cached_moment):
                return cached_rotation
        matrix = rotation(cross_moment, self.shrink)
        self.distances.append(float((matrix - torch.eye(len(matrix)).to(matrix)).norm() / len(matrix) ** 0.5))
        self._cache.append((cross_moment, matrix))
        return matrix

    def clear(self) -> None:
        """Clear the cache, since no later part has the same moments."""
        self._cache.clear()


class _RotatedModel:
    """The grafted model, whose deltas are rotated in place.

    Args:
        grafted: The adaptation on the new base, as a model.
        tuned: The old model.
        old: The old base, for the deltas of tensors that are tuned directly.
        family: The family of the adaptation, which knows the tensors that are tuned directly.
        row_match: How the rows of the vocabularies match; None if they are the same.

    Attributes:
        rotated_names: The names of the rotated modules, without heads.
    """

    def __init__(
        self, grafted: nn.Module, tuned: nn.Module, old: Base, family: Family, row_match: RowMatch | None = None
    ):
        from regraft.adaptation.changes import embedding_weights, is_linear_map

        embeddings = embedding_weights(grafted)
        modules = [(name, module) for name, module in grafted.named_modules() if "original_module" not in name]
        self.modules = {_plain_name(name): module for name, module in modules}
        self.tuned = {
            _plain_name(name): weight for name, weight in tuned.named_parameters() if "original_module" not in name
        }
        self.old = old
        self.row_match = row_match
        self.fully_tuned = {
            _plain_name(name)
            for name, module in modules
            if family.tunes_module_weight(name, old)
            and not (is_linear_map(module) and id(module.weight) in embeddings)  # a tied head, rotated with them
        }
        self.rotated_names: set[str] = set()

    def is_head(self, name: str) -> bool:
        """Return whether a module belongs to the head, or to a pooler that the old base lacks."""
        from regraft.adaptation.changes import base_tensor

        return base_tensor(f"{name}.weight", self.old) is None

    def rotate_head(self, name: str, input_rotation: torch.Tensor | None) -> None:
        """Rotate the weight of a head's first layer.

        Args:
            name: The layer's name in a model without an adapter.
            input_rotation: R, the rotation of the inputs; None for a layer that is not linear, which stays as it is.
        """
        weight = self.modules[name].weight
        _replace_delta(weight, weight, input_rotation, None)

    def rotate(self, name: str, input_rotation: torch.Tensor | None, output_rotation: torch.Tensor | None) -> None:
        """Rotate the delta of a module of the body.

        Args:
            name: The module's name in a model without an adapter.
            input_rotation: R, the rotation of a linear layer's inputs; None for other modules.
            output_rotation: S, the rotation of the outputs; None for a language model's head.
        """
        module = self.modules[name]
        if self._is_changed(name, module):
            self.rotated_names.add(name)
        if name in self.fully_tuned:
            self._rotate_parameters(name, module, input_rotation, output_rotation)
        elif hasattr(module, "lora_A"):
            a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
            _replace_delta(a, a, input_rotation, None)
            _replace_delta(b, b, None, output_rotation)
        elif hasattr(module, "bottleneck"):
            down, up = module.bottleneck.down, module.bottleneck.up
            _replace_delta(down.weight, down.weight, output_rotation, None)
            _replace_delta(up.weight, up.weight, None, output_rotation)
            _replace_delta(up.bias, up.bias[:, None], None, output_rotation)

    def list_unrotated(self) -> list[str]:
        """List the modules of the body with a delta that was not rotated."""
        from regraft.adaptation.changes import parameter_of

        return [
            name if name in self.fully_tuned else parameter_of(name, module)
            for name, module in self.modules.items()
            if name not in self.rotated_names and self._is_changed(name, module)
        ]

    def _rotate_parameters(
        self,
        name: str,
        module: nn.Module,
        input_rotation: torch.Tensor | None,
        output_rotation: torch.Tensor | None,
    ) -> None:
        """Rotate the delta of each parameter of a module that is tuned directly."""
        from torch import nn

        from regraft.adaptation.changes import is_transposed, parameter_delta

        for parameter_name, weight in module.named_parameters(recurse=False):
            tuned = self.tuned[f"{name}.{parameter_name}"]
            delta = parameter_delta(f"{name}.{parameter_name}", tuned, self.old, self.row_match)
            delta = tuned if delta is None else delta
            if isinstance(module, nn.Embedding):
                _replace_delta(weight, delta, output_rotation, None)
            elif weight.dim() == 2 and is_transposed(module):
                _replace_delta(weight, delta, output_rotation, input_rotation)
            elif weight.dim() == 2:
                _replace_delta(weight, delta, input_rotation, output_rotation)
            elif parameter_name == "weight":  # the diagonal of S·diag(g)·Sᵀ is S²·g, with the squares taken by entry
                squares = None if output_rotation is None else output_rotation.square()
                _replace_delta(weight, delta[:, None], None, squares)
            else:
                _replace_delta(weight, delta[:, None], None, output_rotation)

    def _is_changed(self, name: str, module: Any) -> bool:
        """Return whether a module has a delta that is not zero, or an adapter."""
        import torch

        from regraft.adaptation.changes import base_tensor

        if name not in self.fully_tuned:
            return hasattr(module, "bottleneck") or ADAPTER_NAME in getattr(module, "lora_A", ())
        for parameter_name, _ in module.named_parameters(recurse=False):
            tuned = self.tuned[f"{name}.{parameter_name}"]
            base = base_tensor(f"{name}.{parameter_name}", self.old)
            if base is not None and not torch.equal(tuned, base.to(tuned)):
                return True
        return False


def _plain_name(name: str) -> str:
    """Return the name of a tensor or module in a model without an adapter."""
    return name.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{ADAPTER_NAME}", "")


def _replace_delta(
    weight: torch.Tensor, delta: torch.Tensor, input_rotation: torch.Tensor | None, output_rotation: torch.Tensor | None
) -> None:
    """Replace the delta that is part of a weight by (output rotation)·delta·(input rotation)ᵀ, in place."""
    import torch

    with torch.no_grad():
        rotated = delta.double()
        rotated = rotated if input_rotation is None else rotated @ input_rotation.T.to(rotated)
        rotated = rotated if output_rotation is None else output_rotation.to(rotated) @ rotated
        weight.add_((rotated - delta.double()).reshape(weight.shape).to(weight))


ALIGNED = Start(
    "aligned", graft_aligned, Alignment, summary="rotate the old delta into the new base's coordinates", needs=("text",)
)
