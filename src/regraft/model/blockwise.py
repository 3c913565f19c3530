"""Blockwise forward passes: runs of a model one block at a time, on fixed examples."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import is_experts
from regraft.model.batches import plan_batches
from regraft.model.device import autocast, deploy, device
from regraft.model.outputs import forward, last_token_indices, model_inputs, unwrap_model
from regraft.model.vocabulary_head import has_vocabulary_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from regraft.task.types import Examples

    Observer = Callable[[str, int, torch.Tensor, torch.Tensor], None]
    """A function of a module's name, the index of a batch, and the module's inputs and outputs."""
    ModuleCalls = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
    """By module name, the inputs and outputs of each call."""


class BlockwiseForward:
    """A forward pass in parts, each of which can be run again after a change of its weights.

    The first part consists of the embeddings and the first block, each further part of one block, and the last part of
    everything after the last block. The outputs of a block are stored as the inputs of the next block.

    Some models have a single part, because their blocks cannot be run separately: the blocks share layers, as in
    ALBERT, or do not feed each other, as in XLM. Some models, such as XLNet, have layers that do not read examples ×
    tokens. Their batches contain examples of equal length, because padding could not be recognised.

    Args:
        model: A model with a head and no virtual tokens; it is moved to the device, in evaluation mode.
        examples: The tokenised examples that the model is run on. Two models of the same architecture that run on
            examples of the same lengths have corresponding tokens in the same rows.
        precision: `bf16` or `fp32`.
    """

    def __init__(self, model: nn.Module, examples: Examples, precision: str):
        import torch

        self.model = deploy(model, precision).eval()
        self.precision = precision
        # observers sum over many rows, so they need more precision than the model does
        self._row_dtype = torch.float64 if precision == "fp32" else torch.float32
        inner = unwrap_model(model)
        self.blocks = _find_blocks(inner)
        self._body_modules = set(inner.base_model.modules())
        self._is_language_model = has_vocabulary_head(inner)
        self.names = {module: name for name, module in model.named_modules()}
        plan = plan_batches(model, examples)
        # examples × tokens can be told from tokens × examples only if the two numbers differ
        num_examples = 2 if examples.lengths.max() == 3 else 3
        is_chain, is_batch_first = self._inspect_layout(_batch_inputs(examples, plan[0][:num_examples]))
        if not is_chain:
            self.blocks = []
        if not is_batch_first:
            plan = plan_batches(model, examples, equal_length=True)
        # a language model's head is computed at the rows only, any other head at all tokens
        batch_inputs = _batch if self._is_language_model else _batch_inputs
        self.batches = [batch_inputs(examples, indices) for indices in plan]
        self.part = 0  # the index of the current part
        # for each batch, the output of the block before the current part
        self._stored_outputs: list[Any] = [None] * len(self.batches)
        self._part_by_module: dict[str, int] = {}

    @property
    def num_parts(self) -> int:
        """The number of parts: one per block, and one for everything after the last block."""
        return len(self.blocks) + 1

    def run(self, modules: Iterable[nn.Module] = (), observe: Observer | None = None, *, advance: bool = False) -> None:
        """Run the current part on all batches.

        Args:
            modules: The modules to observe, which may include the block itself; modules outside the current part are
                ignored.
            observe: Called for each batch and module with the module's name, the index of the batch, and the module's
                inputs and outputs. Both are tokens × width without padding, in float64 if the precision is `fp32` and
                in float32 if it is `bf16`. If the module is called several times, its inputs are concatenated, and so
                are its outputs. The outputs of fused experts are replaced by the indices of the experts that each token
                is routed to. A language model's head is observed at the rows only, without its outputs.
            advance: Whether to store the outputs and to proceed to the next part.
        """
        for batch_index in range(len(self.batches)):
            self.run_batch(batch_index, modules, observe, keep_outputs=advance)
        if advance:
            self.part += 1

    def run_batch(
        self,
        batch_index: int,
        modules: Iterable[nn.Module] = (),
        observe: Observer | None = None,
        *,
        keep_outputs: bool = False,
    ) -> None:
        """Run the current part on one batch.

        To proceed to the next part, run all batches with `keep_outputs`, then add 1 to `part`.

        Args:
            batch_index: The index of the batch in `batches`.
            modules: The modules to observe; modules outside the current part are ignored.
            observe: Called for each module, as in `run`.
            keep_outputs: Whether to store the outputs.
        """
        import torch

        calls: ModuleCalls = {}
        modules = list(modules)
        # the logits of all rows would be too large, and the rows of a head are known without them
        heads = [module for module in modules if self._is_language_model and module not in self._body_modules]
        observed = [module for module in modules if module not in heads]
        handles = [self._record_calls(module, batch_index, calls) for module in observed if observe]
        self._skip_completed_parts(batch_index)
        if self.part < len(self.blocks):
            is_observed = observe is not None and self.blocks[self.part] in modules
            self._stop_after_part(batch_index, keep_outputs, calls if is_observed else None)
        try:
            with torch.no_grad(), autocast(self.precision, device()):
                output = forward(self.model, self.batches[batch_index])
                for module in heads:
                    states = output.logits.states.to(self._row_dtype)
                    calls[self.names[module]] = [(states, states[:, :0])]
        except _PartDone:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks[: self.part + 1]:
                del block.forward
        if observe:
            for name, module_calls in calls.items():
                inputs = torch.cat([call_inputs for call_inputs, _ in module_calls])
                outputs = torch.cat([call_outputs for _, call_outputs in module_calls])
                observe(name, batch_index, inputs, outputs)

    def _inspect_layout(self, batch: dict[str, torch.Tensor]) -> tuple[bool, bool]:
        """Run a small batch; return whether blocks feed each other, and whether layers read examples × tokens."""
        import torch

        from regraft.adaptation.changes import is_linear_map

        shape = batch["attention_mask"].shape
        block_calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # block, first input, first output
        layer_layouts: list[bool] = []  # whether a call of a layer is compatible with examples × tokens

        def record_layout(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            tensor = _first_argument(args, kwargs)
            is_partial = tensor[..., 0].numel() < shape.numel()  # position embeddings, or one token of each example
            layer_layouts.append(tensor.dim() < 3 or is_partial or tensor.shape[:2] == shape)

        def recording(block: nn.Module, block_forward: Callable[..., Any]) -> Callable[..., Any]:
            def forward_and_record(*args: Any, **kwargs: Any) -> Any:
                output = block_forward(*args, **kwargs)
                block_calls.append((block, _first_argument(args, kwargs), _first_tensor(output)))
                return output

            return forward_and_record

        layers = [module for module in self.names if is_linear_map(module)]
        handles = [layer.register_forward_pre_hook(record_layout, with_kwargs=True) for layer in layers]
        for block in self.blocks:
            block.forward = recording(block, block.forward)
        try:
            with torch.no_grad(), autocast(self.precision, device()):
                forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                del block.forward
        is_in_order = [block for block, _, _ in block_calls] == self.blocks
        is_chain = is_in_order and all(
            torch.equal(output, next_input) for (_, _, output), (_, next_input, _) in itertools.pairwise(block_calls)
        )
        return is_chain, all(layer_layouts)

    def _record_calls(self, module: nn.Module, batch_index: int, calls: ModuleCalls) -> RemovableHandle:
        """Register a hook that adds a module's inputs and outputs to `calls`, and return the hook's handle."""
        name = self.names[module]
        has_routing = is_experts(module)
        # all of the last part counts as the head, although it may begin with a norm of the body
        is_head = self.part == len(self.blocks) if self.blocks else module not in self._body_modules

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._part_by_module.setdefault(name, self.part) != self.part:
                return  # embeddings are computed with every part
            if has_routing:
                output = [*args, *kwargs.values()][1]  # the indices of the experts
            elif isinstance(output, tuple):
                output = output[0]
            inputs = self._token_rows(_first_argument(args, kwargs), batch_index, is_head)
            calls.setdefault(name, []).append((inputs, self._token_rows(output, batch_index, is_head)))

        return module.register_forward_hook(record, with_kwargs=True)

    def _token_rows(self, tensor: torch.Tensor, batch_index: int, is_head: bool) -> torch.Tensor:
        """Return the rows of a tensor that are not padding; with `is_head`, only those that a decoder's head reads."""
        import torch

        batch = self.batches[batch_index]
        mask = batch["attention_mask"].bool()
        if tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
            reads_last_token = is_head and tensor.dim() == 3 and not self._is_language_model
            last_tokens = last_token_indices(self.model, batch) if reads_last_token else None
            rows = tensor[mask] if last_tokens is None else tensor[torch.arange(len(mask)), last_tokens]
        elif tensor.dim() == 2 and len(tensor) == mask.numel():  # Conv1D and experts flatten examples × tokens
            rows = tensor[mask.flatten()]
        else:
            rows = tensor
        if rows.dim() > 2:
            rows = rows.flatten(0, -2)
        return rows.to(self._row_dtype) if rows.is_floating_point() else rows

    def _skip_completed_parts(self, batch_index: int) -> None:
        """Make all blocks before the current part return the stored output."""
        stored_output = self._stored_outputs[batch_index]

        def return_stored_output(*args: Any, **kwargs: Any) -> Any:
            return stored_output

        for block in self.blocks[: self.part]:
            block.forward = return_stored_output

    def _stop_after_part(self, batch_index: int, keep_outputs: bool, calls: ModuleCalls | None) -> None:
        """Make the current block end the forward pass, and optionally store its outputs and add its call to `calls`."""
        block = self.blocks[self.part]
        block_forward = block.forward

        def forward_and_stop(*args: Any, **kwargs: Any) -> None:
            output = block_forward(*args, **kwargs)
            if keep_outputs:
                self._stored_outputs[batch_index] = output
            if calls is not None:  # the end of the pass skips the block's hooks
                name = self.names[block]
                self._part_by_module.setdefault(name, self.part)
                tensors = _first_argument(args, kwargs), _first_tensor(output)
                inputs, outputs = (self._token_rows(tensor, batch_index, is_head=False) for tensor in tensors)
                calls.setdefault(name, []).append((inputs, outputs))
            raise _PartDone

        block.forward = forward_and_stop  # not a hook, because some models call `forward` directly


class _PartDone(Exception):
    """The current part of a forward pass is complete."""


def _find_blocks(model: Any) -> list[Any]:
    """Return the first module list with as many modules as the model has layers; empty if they share submodules."""
    from torch import nn

    num_layers = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            submodules = [submodule for block in module for submodule in block.modules()]
            return list(module) if len(set(submodules)) == len(submodules) else []
    return []


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _first_tensor(output: Any) -> torch.Tensor:
    import torch

    if torch.is_tensor(output):
        return output
    outputs = output.values() if isinstance(output, dict) else output  # SqueezeBERT returns a dict
    tensor: torch.Tensor = next(iter(outputs))
    return tensor


def _batch(examples: Examples, indices: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device()) for name, tensor in examples.batch(indices).items()}


def _batch_inputs(examples: Examples, indices: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device()) for name, tensor in model_inputs(examples.batch(indices)).items()}
