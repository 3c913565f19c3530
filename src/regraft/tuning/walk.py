"""A classifier run one block at a time on fixed texts, each block's outputs being kept as the next one's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.errors import MismatchError
from regraft.tuning.predict import autocast, device, forward, last_read, plan_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from regraft.tuning.examples import Examples

    Watch = Callable[[str, int, torch.Tensor, torch.Tensor], None]


class Walk:
    """Goes through a model block by block; a block can be run again after its weights were changed.

    The first part of the model is all up to the first block's end, the last one all after the last block.

    Args:
        model: A classifier of any kind that has no virtual tokens.
        examples: Texts; two walks on the same ones see the same tokens in the same rows.
        precision: `bf16` or `fp32`.

    Raises:
        MismatchError: Its blocks cannot be found.
    """

    def __init__(self, model: Any, examples: Examples, precision: str):
        import torch

        self.model, self.precision = model.to(device()).eval(), precision
        self.wide = torch.float64 if precision == "fp32" else torch.float32  # for sums that lose nothing
        body = getattr(model, "get_base_model", lambda: model)()
        count = body.config.num_hidden_layers
        found = [m for m in body.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        if not found:
            raise MismatchError(
                f"a {type(body).__name__} has no list of its {count} blocks: they cannot be told apart."
            )
        self.blocks = list(found[0])
        self.names = {module: name for name, module in model.named_modules()}
        self.batches = []
        for indices in plan_batches(model, examples):
            batch = examples.batch(indices)
            self.batches.append({n: t.to(device()) for n, t in batch.items() if n not in ("labels", "index")})
        self.states: list[Any] = [None] * len(self.batches)
        self.part = 0
        self.part_of: dict[str, int] = {}

    @property
    def parts(self) -> int:
        """How many parts the model has: its blocks, and what comes after them."""
        return len(self.blocks) + 1

    def run(self, watched: Iterable[torch.nn.Module] = (), watch: Watch | None = None, *, go_on: bool = False) -> None:
        """Run the current part on every text.

        Args:
            watched: Modules that are watched where they belong to this part.
            watch: Called with a module's name, the batch's number, what the module is fed and what it gives, each
                tokens × width, padding left out, in `wide`.
            go_on: Whether to keep what comes out and go on to the next part.
        """
        for number in range(len(self.batches)):
            self.run_batch(number, watched, watch, keep=go_on)
        self.part += go_on

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
        handles = [self._watch(module, number, watch) for module in watched if watch]
        handles += [self._end(number, keep)] if self.part < len(self.blocks) else []
        for block in self.blocks[: self.part]:  # their outputs are known
            block.forward = lambda *_, **__: before
        try:
            with torch.no_grad(), autocast(self.precision, device()):
                forward(self.model, batch)
        except _PartDone:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks[: self.part]:
                del block.forward

    def _watch(self, module: Any, number: int, watch: Watch) -> Any:
        import torch

        name = self.names[module]

        def look(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self.part_of.setdefault(name, self.part) != self.part:  # embeddings are computed with every part
                return
            fed, given = (self._rows(t, number).to(self.wide) for t in (args[0], output))
            with torch.autocast(fed.device.type, enabled=False):  # what is summed up is not to be rounded
                watch(name, number, fed, given)

        return module.register_forward_hook(look)

    def _rows(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        import torch

        mask, last = self.batches[number]["attention_mask"].bool(), last_read(self.model, self.batches[number])
        if tensor.dim() == 3 and self.part == len(self.blocks) and last is not None:  # where a decoder's head reads
            return tensor[torch.arange(len(mask)), last] if tensor.shape[1] == mask.shape[1] else tensor.flatten(0, -2)
        return tensor[mask] if tensor.shape[: mask.dim()] == mask.shape else tensor.flatten(0, -2)

    def _end(self, number: int, keep: bool) -> Any:
        def stop(_: Any, args: Any, output: Any) -> None:
            if keep:
                self.states[number] = output
            raise _PartDone

        return self.blocks[self.part].register_forward_hook(stop)


class _PartDone(Exception):
    """What is wanted of a forward pass has been seen."""
