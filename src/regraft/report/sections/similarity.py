"""Whether the two models do the same inside: attention, hidden states, predictions."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from regraft.report.charts import draw_attention, draw_cka, draw_heads
from regraft.report.page import Chart, Charts, Facts, Section, Table
from regraft.report.wording import finite, number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.diagnosis import AttentionMap, Control, Diagnosis, Similarity
    from regraft.report.page import Block

ORDER = 60


def show(similarity: Similarity, diagnosis: Diagnosis, part: str) -> list[Section]:
    """Show how alike the old tuned and the new model are in what they do.

    Args:
        similarity: The answer.
        diagnosis: The whole diagnosis.
        part: The part's name, for those of the charts.

    Returns:
        Heads, attention maps and hidden states.
    """
    sections = []
    if similarity.divergence and similarity.divergence[0]:
        sections.append(_heads(similarity, part))
    if similarity.maps:
        charts = tuple(_attention(map_, f"{part}-attention-{n}") for n, map_ in enumerate(similarity.maps, 1))
        lead = "Where chosen heads look on one text, in both models: rows attend to columns, bright is much."
        sections.append(Section("attention", "Attention maps", lead, (Charts(charts),)))
    if similarity.cka:
        sections.append(_hidden(similarity, part))
    return sections


def _heads(similarity: Similarity, part: str) -> Section:
    control = similarity.control
    pairs: list[tuple[str, Similarity | Control, str]] = [("old and new model", similarity, "heads")]
    if control and control.divergence and control.divergence[0]:
        pairs.append((f"control: {control.name}", control, "control"))
    top = max(finite(value for _, pair, _ in pairs for row in pair.divergence for value in row), default=0.0) or 1.0
    charts = []
    for title, pair, name in pairs:
        best = similarity.best if pair is similarity else None
        flat = {(i, j): v for i, row in enumerate(pair.divergence) for j, v in enumerate(row)}
        most, least = max(flat, key=flat.__getitem__), min(flat, key=flat.__getitem__)
        finding = (
            f"{title[0].upper()}{title[1:]}: mean divergence {number(statistics.fmean(flat.values()))} bits, most in "
            f"layer {most[0]}, head {most[1]} ({number(flat[most])}), least in layer {least[0]}, head {least[1]} "
            f"({number(flat[least])})."
        )
        head: tuple[str, ...] = ("layer", "head", "divergence (bits)", "cosine")
        rows: list[tuple[str, ...]] = [
            (str(i), str(j), number(v), number(pair.cosine[i][j])) for (i, j), v in flat.items()
        ]
        if best:
            head += ("divergence to other heads", "nearest head")
            rows = [
                (*row, number(similarity.others[i][j]), str(best[i][j])) for row, (i, j) in zip(rows, flat, strict=True)
            ]
        figure = draw_heads(pair.divergence, best, top)
        table = Table(f"Head by head, {title}", head, tuple(rows), prose=2)
        charts.append(Chart(f"{part}-{name}", f"Heads, {title}", finding, figure, table))
    own = sum(nearest == head for row in similarity.best for head, nearest in enumerate(row))
    total = sum(map(len, similarity.best))
    facts = [("matched heads", f"{own} of {total}", "are nearest to the head in their own place")]
    lead = (
        f"How differently matched heads attend on {similarity.texts:,} texts: 0 bits is the same, 1 bit is nothing in "
        "common. A ring marks a head that is nearer to another one of its layer. "
        "Layers and heads are counted from 0, as in the names of tensors."
    )
    blocks: tuple[Block, ...] = (Facts(tuple(facts)), Charts(tuple(charts)))
    return Section("heads", "Similarity of attention heads", lead, blocks)


def _attention(attention: AttentionMap, name: str) -> Chart:
    title = f"Layer {attention.layer}, head {attention.head}: {number(attention.divergence)} bits apart"
    tokens = attention.tokens

    def strongest(rows: Sequence[Sequence[float]]) -> str:
        weight, at, to = max((value, i, j) for i, row in enumerate(rows) for j, value in enumerate(row))
        return f"“{tokens[at]}” attends to “{tokens[to]}” ({number(weight, 2)})"

    finding = f"Layer {attention.layer}, head {attention.head}, {number(attention.divergence)} bits apart."
    if tokens:
        finding = finding[:-1] + f": most strongly, in the old model {strongest(attention.old)}, in the new "
        finding += f"{strongest(attention.new)}."
    rows = tuple(
        (at, to, number(attention.old[i][j]), number(attention.new[i][j]))
        for i, at in enumerate(tokens)
        for j, to in enumerate(tokens)
    )
    table = Table(title, ("token", "attends to", "old", "new"), rows, prose=2)
    return Chart(name, title, finding, draw_attention(attention), table, wide=True)


def _hidden(similarity: Similarity, part: str) -> Section:
    cka, control = similarity.cka, similarity.control
    other = control.cka if control and len(control.cka) == len(cka) else None
    low = min(range(len(cka)), key=cka.__getitem__)
    finding = f"CKA is lowest {_layer(low)}, {number(cka[low])}"
    finding += f", and {number(cka[-1])} in the last layer" if low < len(cka) - 1 else ", the last"
    finding += f"; the control's last layer has {number(other[-1])}." if other else "."
    names = ["embeddings", *(f"layer {i}" for i in range(len(cka) - 1))]
    columns = [cka, *([other] if other else [])]
    rows = tuple((name, *(number(c[i]) for c in columns)) for i, name in enumerate(names))
    name = control.name if control else ""
    head = ("layer", "old and new", *([f"control: {name}"] if other else []))
    figure = draw_cka(cka, other, name)
    table = Table("Linear CKA by layer", head, rows)
    chart = Chart(f"{part}-cka", "Linear CKA of hidden states", finding, figure, table, wide=True)
    facts = (
        ("agreement", percent(similarity.agreement), "of predictions are the same"),
        ("KL", number(similarity.kl), "nats from the old model's predictions to the new one's"),
    )
    lead = "Linear CKA compares what a layer represents: 1 is the same up to rotation and scale."
    return Section("hidden", "Hidden states and predictions", lead, (Facts(facts), Charts((chart,))))


def _layer(place: int) -> str:
    return f"in layer {place - 1}" if place else "in the embeddings"
