"""A model run one block at a time on fixed examples, each block's outputs being kept as the next one's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import is_experts
from regraft.model.batches import plan_batches
from regraft.model.device import autocast, device
from regraft.model.outputs import forward, last_read, model_inputs, unwrap_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from regraft.task.types import Examples

    Watch = Callable[[str, int, torch.Tensor, torch.Tensor], None]


class BlockwiseForward:
    """Goes through a model block by block; a block can be run again after its weights were changed.

    The first part of the model is all up to the first block's end, the last one all after the last block. A model whose
    blocks cannot be told apart, because they share layers as ALBERT's do or do not feed each other as XLM's, is one
    part. Where a model lays out its tokens so that padding cannot be told apart, as XLNet, there is none.

    Args:
        model: A model with a head, of any kind that has no virtual tokens.
        examples: What it is run on; two walks on the same ones see the same tokens in the same rows.
        precision: `bf16` or `fp32`.
    """

    def __init__(self, model: Any, examples: Examples, precision: str):
        import torch

        self.model, self.precision = model.to(device()).eval(), precision
        self.wide = torch.float64 if precision == "fp32" else torch.float32  # for sums that lose nothing
        plain = unwrap_model(model)
        count = plain.config.num_hidden_layers
        lists = [m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        self.blocks = list(lists[0]) if lists else []
        inside = [module for block in self.blocks for module in block.modules()]
        if len(set(inside)) < len(inside):
            self.blocks = []
        self.body = set(plain.base_model.modules())
        self.names = {module: name for name, module in model.named_modules()}
        plan = plan_batches(model, examples)
        few = plan[0][: 2 if examples.lengths.max() == 3 else 3]  # other than the number of tokens
        is_chain, is_padded = self._look(_inputs_of(examples, few))
        if not is_chain:
            self.blocks = []
        if not is_padded:
            plan = plan_batches(model, examples, equal=True)
        self.batches = [_inputs_of(examples, indices) for indices in plan]
        self.states: list[Any] = [None] * len(self.batches)
        self.part = 0
        self.part_of: dict[str, int] = {}

    def _look(self, batch: dict[str, torch.Tensor]) -> tuple[bool, bool]:
        """Run a few texts: return whether each block feeds the next, and whether layers see texts × tokens × width."""
        import torch

        from regraft.adaptation.changes import multiplies

        shape, inputs, outputs = batch["attention_mask"].shape, list[Any](), list[Any]()
        is_padded = True

        def see(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal is_padded
            tensor = [*args, *kwargs.values()][0]
            is_fewer = tensor[..., 0].numel() < shape.numel()  # positions, or one token of each text
            is_padded = is_padded and (tensor.dim() < 3 or is_fewer or tensor.shape[:2] == shape)

        def spy(block: Any, run: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = run(*args, **kwargs)
                inputs.append((block, [*args, *kwargs.values()][0]))
                parts = output.values() if isinstance(output, dict) else output  # a dict, as SqueezeBERT's
                outputs.append(output if torch.is_tensor(output) else next(iter(parts)))
                return output

            return forward

        handles = [
            module.register_forward_pre_hook(see, with_kwargs=True) for module in self.names if multiplies(module)
        ]
        for block in self.blocks:
            block.forward = spy(block, block.forward)
        try:
            with torch.no_grad(), autocast(self.precision, device()):
                forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks:
                del block.forward
        steps = zip(outputs, inputs[1:], strict=False)
        is_chain = [block for block, _ in inputs] == self.blocks and all(torch.equal(a, b) for a, (_, b) in steps)
        return is_chain, is_padded

    @property
    def parts(self) -> int:
        """How many parts the model has: its blocks, and what comes after them."""
        return len(self.blocks) + 1

    def run(
        self, watched: Iterable[torch.nn.Module] = (), watch: Watch | None = None, *, advance: bool = False
    ) -> None:
        """Run the current part on every text.

        Args:
            watched: Modules that are watched where they belong to this part.
            watch: Called with a module's name, the batch's number, what the module is fed and what it gives, each
                tokens × width, padding left out, in `wide`; of a module that runs more than once, the tokens of all its
                runs. What experts give is which of them each token is routed to.
            advance: Whether to keep what comes out and go on to the next part.
        """
        for number in range(len(self.batches)):
            self.run_batch(number, watched, watch, keep_outputs=advance)
        self.part += advance

    def run_batch(
        self, number: int, watched: Iterable[torch.nn.Module] = (), watch: Watch | None = None, *, keep: bool = False
    ) -> None:
        """Run the current part on one batch; who has kept them all goes on by adding 1 to `part`.

        Args:
            number: The batch's.
            watched: Modules that are watched where they belong to this part.
            watch: As in `run`.
            keep: Whether to keep what comes out.
        """
        import torch

        batch, before = self.batches[number], self.states[number]
        runs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        handles = [self._watch(module, number, runs) for module in watched if watch]
        for block in self.blocks[: self.part]:  # their outputs are known
            block.forward = lambda *_, **__: before
        if self.part < len(self.blocks):
            self._end(number, keep)
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
        if watch:
            for name, sides in runs.items():
                fed, output = (torch.cat(side) for side in zip(*sides, strict=True))
                watch(name, number, fed, output)

    def _watch(self, module: Any, number: int, runs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]) -> Any:
        name, routed = self.names[module], is_experts(module)
        late = module not in self.body if not self.blocks else self.part == len(self.blocks)

        def look(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self.part_of.setdefault(name, self.part) != self.part:  # embeddings are computed with every part
                return
            inputs: list[Any] = [*args, *kwargs.values()]
            fed = inputs[0]
            result = inputs[1] if routed else output[0] if isinstance(output, tuple) else output
            runs.setdefault(name, []).append((self._rows(fed, number, late), self._rows(result, number, late)))

        return module.register_forward_hook(look, with_kwargs=True)

    def _rows(self, tensor: torch.Tensor, number: int, late: bool) -> torch.Tensor:
        import torch

        mask = self.batches[number]["attention_mask"].bool()
        last = last_read(self.model, self.batches[number]) if late and tensor.dim() == 3 else None
        if tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
            tensor = tensor[mask] if last is None else tensor[torch.arange(len(mask)), last]  # where the head reads
        elif tensor.dim() == 2 and len(tensor) == mask.numel():  # as Conv1D and experts are fed: laid out flat
            tensor = tensor[mask.flatten()]
        rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
        return rows.to(self.wide) if rows.is_floating_point() else rows

    def _end(self, number: int, keep: bool) -> None:
        block = self.blocks[self.part]
        run = block.forward

        def stop(*args: Any, **kwargs: Any) -> None:
            output = run(*args, **kwargs)
            if keep:
                self.states[number] = output
            raise _PartDone

        block.forward = stop  # no hook: some models call it without


class _PartDone(Exception):
    """What is wanted of a forward pass has been seen."""


def _inputs_of(examples: Examples, indices: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device()) for name, tensor in model_inputs(examples.batch(indices)).items()}
