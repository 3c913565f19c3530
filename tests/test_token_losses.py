"""Losses over a vocabulary against naive computations with all logits, transformers and TRL."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_mentions
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from regraft.errors import MismatchError, RecipeError
from regraft.task.types.likelihood import CATEGORICAL
from regraft.task.types.token_chunks import map_chunks, row_losses, weighted_sum
from regraft.task.types.token_likelihood import TOKENS
from regraft.task.types.token_logits import StateSignal, TokenLogits, TopKSignal, VocabularyHead
from regraft.task.types.token_losses import (
    KINDS,
    cross_entropy,
    cross_entropy_sum,
    divergence,
    divergence_sum,
    extract_top_k,
    overlaps,
)

LOSSES = ("ce", *KINDS, "top_k")


@dataclasses.dataclass
class Case:
    """A student, a teacher and targets; double precision unless `to` is called."""

    loss: str
    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    options: dict[str, Any]
    targets: torch.Tensor
    teacher: StateSignal
    row_weights: torch.Tensor | None
    temperature: float
    mixture: float
    chunk_rows: int

    def logits(self) -> TokenLogits:
        return TokenLogits(self.states, VocabularyHead(self.weight, self.bias, **self.options))

    def top_k(self) -> TopKSignal:
        signal = extract_top_k(self.teacher.logits, 3, self.temperature, self.teacher.student_ids, chunk_rows=2)
        log_p, columns = self.naive_log_p()
        dense = torch.full((len(log_p), len(self.weight)), -math.inf, dtype=log_p.dtype).index_copy(1, columns, log_p)
        expected = dense.topk(signal.ids.shape[1], 1)
        torch.testing.assert_close(signal.log_probabilities.double(), expected.values.double(), rtol=1e-5, atol=1e-5)
        return TopKSignal(dense.gather(1, signal.ids.long()), signal.ids, signal.temperature)  # not rounded to float32

    def sum(self) -> torch.Tensor:
        logits = self.logits()
        if self.loss == "ce":
            return cross_entropy_sum(logits, self.targets, self.row_weights, chunk_rows=self.chunk_rows)
        signal, kind = (self.top_k(), "forward") if self.loss == "top_k" else (self.teacher, self.loss)
        arguments = (signal, self.temperature, kind, self.mixture, self.row_weights)
        return divergence_sum(logits, *arguments, chunk_rows=self.chunk_rows)

    def rows(self) -> torch.Tensor:
        logits = self.logits()
        if self.loss == "ce":
            return row_losses(logits, cross_entropy(logits, self.targets), chunk_rows=self.chunk_rows)
        signal, kind = (self.top_k(), "forward") if self.loss == "top_k" else (self.teacher, self.loss)
        loss = divergence(logits, signal, self.temperature, kind, self.mixture)
        return row_losses(logits, loss, chunk_rows=self.chunk_rows)

    def naive_log_p(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p over the shared tokens, and the student's ids of these."""
        head = self.teacher.head
        z = naive_logits(self.teacher.states, head.weight, head.bias, head.scale, head.soft_cap) / self.temperature
        ids = self.teacher.student_ids
        ids = torch.arange(len(head.weight)) if ids is None else ids
        return z[:, ids >= 0].log_softmax(1), ids[ids >= 0]

    def naive_rows(self) -> torch.Tensor:
        z = naive_logits(self.states, self.weight, self.bias, **self.options)
        if self.loss == "ce":
            return functional.cross_entropy(z, self.targets, reduction="none")
        z = z / self.temperature
        log_p, shared = self.naive_log_p()
        p = log_p.exp()
        log_q = z.log_softmax(1)[:, shared]
        if self.loss == "forward":
            return (p * (log_p - log_q)).sum(1)
        if self.loss == "top_k":
            k = min(3, p.shape[1])
            top = p.topk(k, 1).indices
            r_p = 1 - p.gather(1, top).sum(1)
            in_top = torch.zeros(z.shape, dtype=torch.bool).scatter(1, shared[top], True)
            log_r_q = z.log_softmax(1).masked_fill(in_top, -1e30).logsumexp(1)
            terms = (p * (log_p - log_q)).gather(1, top).sum(1)
            return terms + torch.where(r_p > 2e-15, r_p * (r_p.clamp_min(1e-30).log() - log_r_q), 0)
        log_q = z[:, shared].log_softmax(1)
        q = log_q.exp()
        if self.loss == "reverse":
            return (q * (log_q - log_p)).sum(1)
        m = self.mixture * p + (1 - self.mixture) * q
        return (self.mixture * p * (log_p - m.log()) + (1 - self.mixture) * q * (log_q - m.log())).sum(1)

    def naive_sum(self) -> torch.Tensor:
        return (self.naive_rows() * (1 if self.row_weights is None else self.row_weights)).sum()

    def inputs(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.states, self.weight, self.bias) if tensor is not None]


def naive_logits(states, weight, bias, scale=1.0, soft_cap=None):
    z = scale * (states @ weight.T + (0 if bias is None else bias))
    return z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)


@st.composite
def cases(draw, losses=LOSSES) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, width, teacher_width = draw(st.integers(0, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    num_student, num_teacher = draw(st.integers(5, 12)), draw(st.integers(4, 12))
    loss = draw(st.sampled_from(losses))
    vocabulary = draw(st.sampled_from(("equal", "grown", "mixed")))
    student_ids = None
    if vocabulary == "equal":
        num_teacher = num_student
    elif vocabulary == "grown":
        num_teacher = min(num_teacher, num_student)
        student_ids = torch.arange(num_teacher)
    else:
        student_ids = torch.full((num_teacher,), -1)
        count = draw(st.integers(1, min(num_teacher, num_student)))
        teacher_tokens = torch.randperm(num_teacher, generator=generator)[:count]
        student_ids[teacher_tokens] = torch.randperm(num_student, generator=generator)[:count]
    options = {
        "scale": draw(st.sampled_from((1.0, 0.5, 2.0))),
        "soft_cap": draw(st.sampled_from((None, 1.5, 30.0))),
    }
    head = VocabularyHead(
        normal(num_teacher, teacher_width), normal(num_teacher) if draw(st.booleans()) else None, **options
    )
    return Case(
        loss=loss,
        states=normal(rows, width).requires_grad_(),
        weight=normal(num_student, width).requires_grad_(),
        bias=normal(num_student).requires_grad_() if draw(st.booleans()) else None,
        options=options,
        targets=torch.randint(num_student, (rows,), generator=generator),
        teacher=StateSignal(normal(rows, teacher_width), head, student_ids),
        row_weights=torch.rand(rows, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None,
        temperature=draw(st.sampled_from((1.0, 0.5, 3.0))),
        mixture=draw(st.sampled_from((0.1, 0.5, 0.9))),
        chunk_rows=draw(st.integers(1, 8)),
    )


def make_case(loss: str, rows: int = 5, num_tokens: int = 11, width: int = 6, **changes: Any) -> Case:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = StateSignal(normal(rows, width), VocabularyHead(normal(num_tokens, width)))
    case = Case(
        loss=loss,
        states=normal(rows, width).requires_grad_(),
        weight=normal(num_tokens, width).requires_grad_(),
        bias=normal(num_tokens).requires_grad_(),
        options={},
        targets=torch.randint(num_tokens, (rows,), generator=generator),
        teacher=teacher,
        row_weights=None,
        temperature=1.0,
        mixture=0.5,
        chunk_rows=2,
    )
    return dataclasses.replace(case, **changes)


def assert_equal_gradients(loss: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], rtol=1e-5) -> None:
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-9)
    gradients, expected_gradients = (
        torch.autograd.grad(3 * value, inputs, retain_graph=True) for value in (loss, expected)
    )
    for gradient, naive in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, naive, rtol=rtol, atol=1e-9)


@given(cases())
@settings(max_examples=250, deadline=None)
def test_sums_and_their_gradients_equal_the_naive_ones(case):
    assert_equal_gradients(case.sum(), case.naive_sum(), case.inputs())


@given(cases())
@settings(max_examples=100, deadline=None)
def test_rows_are_equal_with_and_without_gradients(case):
    with torch.no_grad():
        torch.testing.assert_close(case.rows(), case.naive_rows(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(case.sum(), case.naive_sum(), rtol=1e-5, atol=1e-9)
    scales = torch.arange(1.0, len(case.states) + 1)
    assert_equal_gradients((case.rows() * scales).sum(), (case.naive_rows() * scales).sum(), case.inputs())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    case = make_case(loss, options={"scale": 0.7, "soft_cap": 2.0}, temperature=2.0)

    def function(states, weight, bias):
        return dataclasses.replace(case, states=states, weight=weight, bias=bias).sum()

    assert torch.autograd.gradcheck(function, case.inputs())


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_a_student_that_equals_its_teacher_has_no_gradient(loss):
    case = make_case(loss, rows=40, num_tokens=500, width=16, temperature=2.0)
    states, weight = (tensor.detach().float().requires_grad_() for tensor in (case.states, case.weight))
    teacher = StateSignal(states.detach().clone(), VocabularyHead(weight.detach().clone()))
    signal = extract_top_k(teacher.logits, 64, 2.0) if loss == "top_k" else teacher
    kind = "forward" if loss == "top_k" else loss
    logits = TokenLogits(states, VocabularyHead(weight))
    losses, gradient = divergence(logits, signal, 2.0, kind).chunk(logits.dense().detach() / 2, slice(0, 40))
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    for gradient in torch.autograd.grad(divergence_sum(logits, signal, 2.0, kind) / 40, (states, weight)):
        assert gradient.abs().max() < 1e-6


def test_the_gradient_of_a_tied_head_is_added_to_that_of_the_embedding():
    case = make_case("ce")
    ids = torch.tensor([3, 1, 3, 0, 10])
    embedded = dataclasses.replace(case, states=case.weight[ids].tanh())
    assert_equal_gradients(embedded.sum(), embedded.naive_sum(), [case.weight, case.bias])


def test_only_the_gradients_asked_for_are_computed():
    case = make_case("forward")
    frozen = dataclasses.replace(case, weight=case.weight.detach(), bias=None)
    assert_equal_gradients(frozen.sum(), frozen.naive_sum(), [case.states])
    frozen = dataclasses.replace(case, states=case.states.detach())
    assert_equal_gradients(frozen.sum(), frozen.naive_sum(), [case.weight, case.bias])
    assert not dataclasses.replace(frozen, weight=case.weight.detach(), bias=None).sum().requires_grad


def test_cross_entropy_equals_the_loss_of_transformers():
    case = make_case("ce", rows=9)
    labels = torch.cat([torch.tensor([-100]), case.targets])[None]
    dense = torch.cat([naive_logits(case.states, case.weight, case.bias), torch.zeros(1, 11)])[None]
    expected = ForCausalLMLoss(dense, labels, 11, num_items_in_batch=4)
    assert_equal_gradients((case.sum() / 4).float(), expected, case.inputs(), rtol=1e-4)  # it computes in float32


@pytest.mark.parametrize(
    ("kind", "mixture"), [("forward", 0.0), ("js", 0.1), ("js", 0.5), ("js", 0.8), ("reverse", 1.0)]
)
def test_divergences_equal_the_loss_of_trl(kind, mixture):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    case = make_case(kind, mixture=mixture, temperature=1.7)
    teacher = naive_logits(case.teacher.states, case.teacher.head.weight, None)
    student = naive_logits(case.states, case.weight, case.bias)
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, beta=mixture, temperature=1.7, reduction="sum")
    assert_equal_gradients(case.sum(), expected, case.inputs())


def test_a_soft_capped_head_equals_that_of_gemma():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    ids = torch.randint(1, 40, (1, 12))
    head = VocabularyHead(model.lm_head.weight, soft_cap=config.final_logit_softcapping)
    logits = TokenLogits(model.model(ids).last_hidden_state[0, :-1], head)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    for name, gradient, naive in zip(
        names, torch.autograd.grad(TOKENS.loss(logits, ids[0, 1:], "mean"), parameters), expected, strict=True
    ):
        torch.testing.assert_close(gradient, naive, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_with_a_lora_trains_it(loss):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(6, 11, dtype=torch.float64)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.lm_head(states)

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    module = get_peft_model(Model(), config).base_model.model.lm_head.double()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert len(parameters) == 2
    case = make_case(loss, options={"scale": 0.7, "soft_cap": 2.0}, row_weights=torch.rand(5).double())
    head = VocabularyHead(scale=0.7, soft_cap=2.0, project=module)
    case.logits = lambda: TokenLogits(case.states, head)
    loss_sum = case.sum()
    merged = module.weight.data + module.get_delta_weight("default").data
    naive = dataclasses.replace(case, weight=merged.requires_grad_(), bias=module.bias)
    torch.testing.assert_close(loss_sum, naive.naive_sum())
    states_gradient, *gradients = torch.autograd.grad(loss_sum, [case.states, *parameters])
    expected_states, dense = torch.autograd.grad(naive.naive_sum(), [case.states, merged])
    torch.testing.assert_close(states_gradient, expected_states)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    scaling = module.scaling["default"]
    torch.testing.assert_close(gradients[0], scaling * b.T @ dense)
    torch.testing.assert_close(gradients[1], scaling * dense @ a.T)
    with torch.no_grad():
        torch.testing.assert_close(case.sum(), naive.naive_sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_module_that_returns_its_input_is_not_overwritten(loss):
    class Identity(nn.Identity):
        out_features = 11

    case = make_case(loss)
    expected = case.naive_sum().detach()
    dense = case.logits().dense().detach()
    teacher_dense = case.teacher.logits.dense()
    head = VocabularyHead(project=Identity())
    case.logits = lambda: TokenLogits(dense, head)
    top_k = case.top_k()
    case.top_k = lambda: top_k
    case.teacher = StateSignal(teacher_dense, head)
    copies = dense.clone(), teacher_dense.clone()
    torch.testing.assert_close(case.sum(), expected)
    with torch.no_grad():
        torch.testing.assert_close(case.sum(), expected)
        overlaps(case.logits(), case.teacher)
    assert copies[0].equal(dense)
    assert copies[1].equal(teacher_dense)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_close_and_keeps_the_dtypes(loss, autocast):
    exact = make_case(loss, rows=30, num_tokens=50, width=16, chunk_rows=7)
    dtype = torch.float32 if autocast else torch.bfloat16
    states, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in exact.inputs())
    case = dataclasses.replace(exact, states=states, weight=weight, bias=bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = case.sum()
        rows = case.rows()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact.naive_sum(), rtol=0.02, atol=0)
    torch.testing.assert_close(rows.sum(), result)
    result.backward()
    for tensor, gradient in zip(
        (states, weight, bias), torch.autograd.grad(exact.naive_sum(), exact.inputs()), strict=True
    ):
        assert tensor.grad.dtype == dtype
        assert functional.cosine_similarity(tensor.grad.double().flatten(), gradient.flatten(), dim=0) > 0.999


def test_float32_is_exact_over_a_large_vocabulary():
    for loss in LOSSES:
        exact = make_case(loss, rows=20, num_tokens=5000, width=8, temperature=1.5)
        states, weight, bias = (tensor.detach().float().requires_grad_() for tensor in exact.inputs())
        result = dataclasses.replace(exact, states=states, weight=weight, bias=bias).sum()
        torch.testing.assert_close(result.double(), exact.naive_sum(), rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(result, (states, weight, bias))
        for gradient, naive in zip(gradients, torch.autograd.grad(exact.naive_sum(), exact.inputs()), strict=True):
            assert (gradient - naive).norm() < 1e-5 * naive.norm()


def test_a_top_k_signal_of_all_tokens_has_no_tail():
    case = make_case("forward")
    teacher = StateSignal(case.teacher.states.float(), case.teacher.head.cast(torch.float32))
    signal = extract_top_k(teacher.logits, 100)
    assert signal.ids.shape == (5, 11)
    assert_equal_gradients(divergence_sum(case.logits(), signal), case.naive_sum(), case.inputs(), rtol=1e-4)


def test_a_tail_that_the_student_excludes_has_a_finite_loss():
    weight = torch.tensor([[0.0], [0.0], [-1000.0]], requires_grad=True)
    logits = TokenLogits(torch.ones(1, 1), VocabularyHead(weight))
    signal = TopKSignal(torch.tensor([[0.5, 0.4]]).log(), torch.tensor([[0, 1]], dtype=torch.int32))
    loss = divergence_sum(logits, signal)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()


@given(cases(losses=("forward",)))
@settings(max_examples=60, deadline=None)
def test_values_of_rows_equal_the_naive_ones(case):
    logits, kwargs = case.logits(), {"chunk_rows": case.chunk_rows}
    dense = naive_logits(case.states, case.weight, case.bias, **case.options).detach()
    torch.testing.assert_close(logits.dense().detach(), dense)
    assert TOKENS.predict(logits).equal(dense.argmax(1))
    torch.testing.assert_close(TOKENS.confidence(logits), CATEGORICAL.confidence(dense))
    assert TOKENS.right(logits, case.targets).equal(CATEGORICAL.right(dense, case.targets))
    torch.testing.assert_close(map_chunks(logits, lambda z, _: z, **kwargs), dense)
    p = torch.zeros_like(dense)
    log_p, shared = dataclasses.replace(case, temperature=1.0).naive_log_p()
    p[:, shared] = log_p.exp()
    expected = p.minimum(dense.softmax(1)).sum(1)
    torch.testing.assert_close(overlaps(logits, case.teacher, **kwargs), expected)
    top_k = extract_top_k(case.teacher.logits, 4, student_ids=case.teacher.student_ids)
    assert (overlaps(logits, top_k, **kwargs) >= expected - 1e-5).all()
    every = extract_top_k(case.teacher.logits, 12, student_ids=case.teacher.student_ids)
    torch.testing.assert_close(overlaps(logits, every).double(), expected, rtol=1e-5, atol=2e-6)


def test_the_likelihood_equals_that_of_classes():
    case = make_case("ce")
    logits, dense = case.logits(), naive_logits(case.states, case.weight, case.bias)
    for reduction in ("none", "mean"):
        expected = CATEGORICAL.loss(dense, case.targets, reduction)
        assert_equal_gradients(TOKENS.loss(logits, case.targets, reduction).sum(), expected.sum(), case.inputs())
    signal = TOKENS.signal(case.teacher.logits)
    dense_signal = CATEGORICAL.signal(case.teacher.logits.dense())
    torch.testing.assert_close(TOKENS.excess_loss(logits, signal), CATEGORICAL.excess_loss(dense, dense_signal))
    torch.testing.assert_close(TOKENS.overlap(logits, signal), CATEGORICAL.overlap(dense.detach(), dense_signal))
    expected = CATEGORICAL.divergence_terms(dense, dense_signal, 2.0).sum(1).mean()
    assert_equal_gradients(TOKENS.mean_divergence(logits, signal, 2.0), expected, case.inputs())
    assert TOKENS.gradient_scale(3) == CATEGORICAL.gradient_scale(3)
    assert TOKENS.chance_loss([], 11) == math.log(11)


def test_signals_survive_a_cache(tmp_path):
    case = make_case("forward", temperature=2.0)
    ids = torch.arange(11).flip(0)
    head = dataclasses.replace(case.teacher.head, scale=0.5, soft_cap=3.0)
    teacher = StateSignal(case.teacher.states, head, ids)
    top_k = extract_top_k(teacher.logits, 3, 2.0, ids)
    for signal, num_tokens in ((teacher, 0), (top_k, 3)):
        settings = {"temperature": 2.0, "student_ids": ids}
        save_file(TOKENS.cached_tensors(teacher.logits, top_k=num_tokens, **settings), tmp_path / "cache.safetensors")
        stored = TOKENS.cached_signal(load_file(tmp_path / "cache.safetensors"), head=head, **settings)
        expected = divergence_sum(case.logits(), signal, 2.0)
        torch.testing.assert_close(divergence_sum(case.logits(), stored, 2.0), expected)
        rows = torch.tensor([4, 0])
        taken = divergence_sum(case.logits()[rows], stored.take(rows, case.logits()), 2.0)
        others = torch.tensor([1, 2, 3])
        rest = divergence_sum(case.logits()[others], stored.take(others, case.states), 2.0)
        torch.testing.assert_close(taken + rest, expected)


def test_token_logits_are_a_sequence_of_rows():
    logits = make_case("ce").logits()
    assert (len(logits), logits.numel(), logits.shape, logits.device) == (5, 55, (5, 11), torch.device("cpu"))
    assert logits.cpu().to("cpu").isfinite().all()
    assert logits[torch.tensor([2, 0])].dense().equal(logits.dense()[[2, 0]])


def test_inputs_that_do_not_fit_are_refused():
    case = make_case("ce")
    logits, teacher = case.logits(), case.teacher
    top_k = extract_top_k(teacher.logits, 3, 2.0)
    for function, error, *parts in (
        (lambda: cross_entropy(logits, case.targets[:3]), MismatchError, "targets", 5, 3),
        (lambda: cross_entropy(logits, case.targets - 100), MismatchError, "targets", 10, "masked"),
        (
            lambda: weighted_sum(logits, cross_entropy(logits, case.targets), torch.ones(2)),
            MismatchError,
            "row_weights",
        ),
        (lambda: divergence_sum(logits, top_k), MismatchError, "temperature 2"),
        (lambda: overlaps(logits, top_k), MismatchError, "temperature 2"),
        (lambda: divergence_sum(logits, top_k, 2.0, "js"), MismatchError, "js", "StateSignal"),
        (lambda: divergence_sum(logits, teacher, kind="jsd"), RecipeError, "jsd", "js"),
        (lambda: divergence_sum(logits, teacher, kind="js", mixture=0), RecipeError, "mixture", "forward"),
        (lambda: divergence_sum(logits, teacher, 0), RecipeError, "temperature"),
        (lambda: divergence_sum(logits[:2], teacher), MismatchError, "2 rows", 5),
        (lambda: extract_top_k(logits, 0), RecipeError, "k must"),
        (lambda: VocabularyHead(), MismatchError, "weight"),
    ):
        with pytest.raises(error) as raised:
            function()
        assert_mentions(raised, *parts)
    for student_ids, part in (
        (torch.arange(3), "3 entries"),
        (torch.full((11,), -1), "no token"),
        (torch.zeros(11, dtype=torch.int64), "same id"),
        (torch.arange(11) + 1, "student_ids"),
    ):
        with pytest.raises(MismatchError) as raised:
            divergence(logits, dataclasses.replace(teacher, student_ids=student_ids))
        assert_mentions(raised, part)
    with pytest.raises(MismatchError) as raised:
        divergence(logits, StateSignal(teacher.states, VocabularyHead(torch.ones(9, 6).double())))
    assert_mentions(raised, 11, 9, "student_ids")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_are_converted_for_a_module(device):
    """As those of a split, which are stored on the CPU, while a LoRA on the head and its base are on an accelerator."""
    head = VocabularyHead(project=nn.Linear(3, 5, dtype=torch.bfloat16, device=device))
    logits = TokenLogits(torch.ones(2, 3), head).dense()
    assert (logits.device.type, logits.dtype, logits.shape) == (device, torch.float32, (2, 5))
