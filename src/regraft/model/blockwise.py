"""Blockwise forward passes: a model is run one block at a time, on fixed examples."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import is_experts
from regraft.model.batches import plan_batches
from regraft.model.device import autocast, device
from regraft.model.outputs import forward, last_token_indices, model_inputs, unwrap_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from regraft.task.types import Examples

    Observer = Callable[[str, int, torch.Tensor, torch.Tensor], None]
    Runs = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]


class BlockwiseForward:
    """A forward pass in parts, each of which can be run again after its weights were changed.

    A part is a block with what precedes it: the first part includes the embeddings. The last part is everything after
    the last block. The outputs of a block are stored as the inputs of the next one.

    Some models are a single part, because their blocks cannot be run separately: they share layers, as in ALBERT, or do
    not feed each other, as in XLM. Batches of models that do not lay out tokens as examples × tokens, such as XLNet,
    contain examples of equal length, because padding could not be told from tokens.

    Args:
        model: A model with a head and no virtual tokens.
        examples: The examples to run it on. Two models that run on examples of the same lengths see corresponding
            tokens in the same rows.
        precision: `bf16` or `fp32`.
    """

    def __init__(self, model: Any, examples: Examples, precision: str):
        import torch

        self.model = model.to(device()).eval()
        self.precision = precision
        # observers sum over many rows, so that they need more precision than the model does
        self._row_dtype = torch.float64 if precision == "fp32" else torch.float32
        inner = unwrap_model(model)
        self.blocks = _blocks_of(inner)
        self._body_modules = set(inner.base_model.modules())
        self.names = {module: name for name, module in model.named_modules()}
        plan = plan_batches(model, examples)
        # the layout shows in the order of dimensions, so the number of examples must differ from that of tokens
        example_count = 2 if examples.lengths.max() == 3 else 3
        is_chain, is_batch_first = self._inspect_layout(_batch_inputs(examples, plan[0][:example_count]))
        if not is_chain:
            self.blocks = []
        if not is_batch_first:
            plan = plan_batches(model, examples, equal_length=True)
        self.batches = [_batch_inputs(examples, indices) for indices in plan]
        self.part = 0
        self._block_outputs: list[Any] = [None] * len(self.batches)  # of the block before the current part
        self._part_by_module: dict[str, int] = {}

    @property
    def num_parts(self) -> int:
        """The number of parts: the blocks, and what comes after them."""
        return len(self.blocks) + 1

    def run(
        self, modules: Iterable[torch.nn.Module] = (), observe: Observer | None = None, *, advance: bool = False
    ) -> None:
        """Run the current part on all batches.

        Args:
            modules: The modules to observe; those outside the current part are ignored.
            observe: A function of a module's name, the index of the batch, and the module's inputs and outputs. Both
                are tokens × width without padding, in higher precision than the model's; those of a module that runs
                several times are concatenated. The outputs of experts are the experts that each token is routed to.
            advance: Whether to store the outputs and to proceed to the next part.
        """
        for index in range(len(self.batches)):
            self.run_batch(index, modules, observe, keep_outputs=advance)
        self.part += advance

    def run_batch(
        self,
        index: int,
        modules: Iterable[torch.nn.Module] = (),
        observe: Observer | None = None,
        *,
        keep_outputs: bool = False,
    ) -> None:
        """Run the current part on one batch.

        To proceed to the next part, run all batches with `keep_outputs`, then add 1 to `part`.

        Args:
            index: The index of the batch.
            modules: The modules to observe; those outside the current part are ignored.
            observe: A function of what the modules compute; see `run`.
            keep_outputs: Whether to store the outputs.
        """
        import torch

        batch = self.batches[index]
        stored = self._block_outputs[index]
        runs: Runs = {}
        handles = [self._record_runs(module, index, runs) for module in modules if observe]
        for block in self.blocks[: self.part]:
            block.forward = lambda *_, **__: stored
        if self.part < len(self.blocks):
            self._stop_after_part(index, keep_outputs)
        try:
            with torch.no_grad(), autocast(self.precision, device()):
                forward(self.model, batch)
        except _PartDone:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks[: self.part + 1]:
                del block.forward
        if observe:
            for name, module_runs in runs.items():
                inputs, outputs = (torch.cat(rows) for rows in zip(*module_runs, strict=True))
                observe(name, index, inputs, outputs)

    def _inspect_layout(self, batch: dict[str, torch.Tensor]) -> tuple[bool, bool]:
        """Run a small batch; return whether blocks feed each other, and whether layers read examples × tokens."""
        import torch

        from regraft.adaptation.changes import is_linear_map

        shape = batch["attention_mask"].shape
        runs: list[tuple[Any, Any, Any]] = []  # block, first input, first output
        is_batch_first = True

        def check_layout(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal is_batch_first
            tensor = [*args, *kwargs.values()][0]
            is_partial = tensor[..., 0].numel() < shape.numel()  # position embeddings, or one token of each example
            is_batch_first = is_batch_first and (tensor.dim() < 3 or is_partial or tensor.shape[:2] == shape)

        def recorded(block: Any, block_forward: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = block_forward(*args, **kwargs)
                runs.append((block, [*args, *kwargs.values()][0], _first_tensor(output)))
                return output

            return forward

        layers = [module for module in self.names if is_linear_map(module)]
        handles = [layer.register_forward_pre_hook(check_layout, with_kwargs=True) for layer in layers]
        for block in self.blocks:
            block.forward = recorded(block, block.forward)
        try:
            with torch.no_grad(), autocast(self.precision, device()):
                forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                del block.forward
        is_in_order = [block for block, _, _ in runs] == self.blocks
        is_chain = is_in_order and all(
            torch.equal(output, following_input) for (_, _, output), (_, following_input, _) in itertools.pairwise(runs)
        )
        return is_chain, is_batch_first

    def _record_runs(self, module: Any, index: int, runs: Runs) -> Any:
        """Register a hook that adds a module's inputs and outputs to `runs`, and return its handle."""
        name = self.names[module]
        has_routing = is_experts(module)
        is_head = self.part == len(self.blocks) if self.blocks else module not in self._body_modules

        def record(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._part_by_module.setdefault(name, self.part) != self.part:
                return  # embeddings are computed with every part
            arguments: list[Any] = [*args, *kwargs.values()]
            if has_routing:
                output = arguments[1]
            elif isinstance(output, tuple):
                output = output[0]
            rows = self._rows(arguments[0], index, is_head), self._rows(output, index, is_head)
            runs.setdefault(name, []).append(rows)

        return module.register_forward_hook(record, with_kwargs=True)

    def _rows(self, tensor: torch.Tensor, index: int, is_head: bool) -> torch.Tensor:
        """Return the rows of a tensor that belong to tokens; in the head of a decoder, to those that it reads."""
        import torch

        mask = self.batches[index]["attention_mask"].bool()
        last = last_token_indices(self.model, self.batches[index]) if is_head and tensor.dim() == 3 else None
        if tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
            tensor = tensor[mask] if last is None else tensor[torch.arange(len(mask)), last]
        elif tensor.dim() == 2 and len(tensor) == mask.numel():  # Conv1D and experts flatten examples × tokens
            tensor = tensor[mask.flatten()]
        rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
        return rows.to(self._row_dtype) if rows.is_floating_point() else rows

    def _stop_after_part(self, index: int, keep_outputs: bool) -> None:
        """Make the current block end the forward pass, and optionally store its outputs."""
        block = self.blocks[self.part]
        block_forward = block.forward

        def forward_and_stop(*args: Any, **kwargs: Any) -> None:
            output = block_forward(*args, **kwargs)
            if keep_outputs:
                self._block_outputs[index] = output
            raise _PartDone

        block.forward = forward_and_stop  # not a hook, because some models call `forward` directly


class _PartDone(Exception):
    """The current part of a forward pass is complete."""


def _blocks_of(model: Any) -> list[Any]:
    """Return the first module list that is as long as the model has layers; empty if its blocks share modules."""
    import torch

    count = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    blocks = list(lists[0]) if lists else []
    submodules = [module for block in blocks for module in block.modules()]
    return blocks if len(set(submodules)) == len(submodules) else []


def _first_tensor(output: Any) -> torch.Tensor:
    import torch

    if not torch.is_tensor(output):
        output = next(iter(output.values() if isinstance(output, dict) else output))  # SqueezeBERT returns a dict
    tensor: torch.Tensor = output
    return tensor


def _batch_inputs(examples: Examples, indices: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device()) for name, tensor in model_inputs(examples.batch(indices)).items()}
