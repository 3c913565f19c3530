"""The sections on the similarity of two models' attention, hidden states and predictions."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from regraft.diagnosis import Similarity
from regraft.report.charts import draw_attention, draw_cka, draw_heads
from regraft.report.page import Chart, Charts, Facts, Section, Table
from regraft.report.wording import finite_values, number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.diagnosis import AttentionMap, Control, Diagnosis

ORDER = 60


def show(similarity: Similarity, diagnosis: Diagnosis, prefix: str) -> list[Section]:
    """Show the similarity of the old and the new deployment.

    Args:
        similarity: The figures of heads, hidden states and predictions.
        diagnosis: The diagnosis that the answer belongs to.
        prefix: The prefix of the charts' names.

    Returns:
        The sections on heads, on attention maps, and on hidden states and predictions, as far as they were measured.
    """
    sections = []
    if _has_heads(similarity):
        sections.append(_heads_section(similarity, prefix))
    if similarity.maps:
        charts = tuple(
            _attention_chart(attention, f"{prefix}-attention-{map_number}")
            for map_number, attention in enumerate(similarity.maps, start=1)
        )
        lead = "The attention of some heads on one text, in both models: rows attend to columns, bright is much."
        sections.append(Section("attention", "Attention maps", lead, (Charts(charts),)))
    if similarity.cka:
        sections.append(_hidden_section(similarity, prefix))
    return sections


def _has_heads(figures: Similarity | Control) -> bool:
    return bool(figures.divergence and figures.divergence[0])


def _heads_section(similarity: Similarity, prefix: str) -> Section:
    """Show the divergence of heads, with the control's on the same colour scale."""
    control = similarity.control if similarity.control and _has_heads(similarity.control) else None
    divergence_rows = [*similarity.divergence, *(control.divergence if control else ())]
    divergences = finite_values(divergence for row in divergence_rows for divergence in row)
    top = max(divergences, default=0.0) or 1.0  # one colour scale for both charts
    charts = [_heads_chart(similarity, "old and new model", f"{prefix}-heads", top)]
    if control:
        charts.append(_heads_chart(control, f"control: {control.name}", f"{prefix}-control", top))
    self_matched = sum(nearest == head for row in similarity.best for head, nearest in enumerate(row))
    num_heads = sum(map(len, similarity.best))
    facts = Facts((("matched heads", f"{self_matched} of {num_heads}", "are nearest to the head in their own place"),))
    lead = (
        f"How differently matched heads attend on {similarity.texts:,} texts: 0 bits is the same, 1 bit is nothing in "
        "common. A ring marks a head that is nearer to another one of its layer. "
        "Layers and heads are counted from 0, as in the names of tensors."
    )
    return Section("heads", "Similarity of attention heads", lead, (facts, Charts(tuple(charts))))


def _heads_chart(figures: Similarity | Control, title: str, name: str, top: float) -> Chart:
    """Draw the divergence of heads; `top` is the end of the colour scale in bits."""
    columns: tuple[str, ...] = ("layer", "head", "divergence (bits)", "cosine")
    if isinstance(figures, Similarity):
        columns += ("divergence to other heads", "nearest head")
    rows: list[tuple[str, ...]] = []
    divergences: dict[tuple[int, int], float] = {}
    for layer, layer_divergences in enumerate(figures.divergence):
        for head, divergence in enumerate(layer_divergences):
            divergences[layer, head] = divergence
            row: tuple[str, ...] = (str(layer), str(head), number(divergence), number(figures.cosine[layer][head]))
            if isinstance(figures, Similarity):
                row += (number(figures.others[layer][head]), str(figures.best[layer][head]))
            rows.append(row)
    most = max(divergences, key=divergences.__getitem__)
    least = min(divergences, key=divergences.__getitem__)
    finding = (
        f"{title[0].upper()}{title[1:]}: mean divergence {number(statistics.fmean(divergences.values()))} bits, most "
        f"in layer {most[0]}, head {most[1]} ({number(divergences[most])}), least in layer {least[0]}, head {least[1]} "
        f"({number(divergences[least])})."
    )
    table = Table(f"Head by head, {title}", columns, tuple(rows), text_columns=2)
    best = figures.best if isinstance(figures, Similarity) else None
    return Chart(name, f"Heads, {title}", finding, draw_heads(figures.divergence, best, top), table)


def _attention_chart(attention: AttentionMap, name: str) -> Chart:
    """Draw the attention of a head in both models, with the strongest weight of each in words."""
    head = f"Layer {attention.layer}, head {attention.head}"
    distance = f"{number(attention.divergence)} bits apart"
    tokens = attention.tokens
    finding = f"{head}, {distance}"
    if tokens:
        old_strongest = _describe_strongest(tokens, attention.old)
        new_strongest = _describe_strongest(tokens, attention.new)
        finding += f": most strongly, in the old model {old_strongest}, in the new {new_strongest}"
    rows = tuple(
        (query, key, number(attention.old[i][j]), number(attention.new[i][j]))
        for i, query in enumerate(tokens)
        for j, key in enumerate(tokens)
    )
    title = f"{head}: {distance}"
    table = Table(title, ("token", "attends to", "old", "new"), rows, text_columns=2)
    return Chart(name, title, f"{finding}.", draw_attention(attention), table, wide=True)


def _describe_strongest(tokens: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    weight, query, key = max((weight, i, j) for i, row in enumerate(rows) for j, weight in enumerate(row))
    return f"“{tokens[query]}” attends to “{tokens[key]}” ({number(weight, 2)})"


def _hidden_section(similarity: Similarity, prefix: str) -> Section:
    facts = (
        ("agreement", percent(similarity.agreement), "of predictions agree"),
        ("KL", number(similarity.kl), "nats from the old model's predictions to the new one's"),
    )
    lead = "Linear CKA compares what a layer represents: 1 is the same up to rotation and scale."
    blocks = (Facts(facts), Charts((_cka_chart(similarity, f"{prefix}-cka"),)))
    return Section("hidden", "Hidden states and predictions", lead, blocks)


def _cka_chart(similarity: Similarity, name: str) -> Chart:
    """Draw CKA by layer, with the control's if it has as many layers."""
    cka = similarity.cka
    control = similarity.control
    control_name = control.name if control else ""
    control_cka = control.cka if control and len(control.cka) == len(cka) else None
    lowest = min(range(len(cka)), key=cka.__getitem__)
    finding = f"CKA is lowest {f'in layer {lowest - 1}' if lowest else 'in the embeddings'}, {number(cka[lowest])}"
    finding += f", and {number(cka[-1])} in the last layer" if lowest < len(cka) - 1 else ", the last"
    finding += f"; the control's last layer has {number(control_cka[-1])}." if control_cka else "."
    columns: tuple[str, ...] = ("layer", "old and new")
    series = [cka]
    if control_cka:
        columns += (f"control: {control_name}",)
        series.append(control_cka)
    layers = ["embeddings", *(f"layer {i}" for i in range(len(cka) - 1))]
    rows = tuple((layer, *map(number, values)) for layer, *values in zip(layers, *series, strict=True))
    figure = draw_cka(cka, control_cka, control_name)
    return Chart(
        name, "Linear CKA of hidden states", finding, figure, Table("Linear CKA by layer", columns, rows), wide=True
    )
