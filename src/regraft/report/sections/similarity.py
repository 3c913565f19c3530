"""Whether the two models do the same inside: attention, hidden states, predictions."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from regraft.report.charts import draw_attention, draw_cka, draw_heads
from regraft.report.page import Chart, Charts, Facts, Section, Table
from regraft.report.wording import finite, number, percent

if TYPE_CHECKING:
    from regraft.report.page import Block


def similarity_sections(diagnosis: dict[str, Any], part: str) -> list[Section]:
    """Show how alike the old tuned and the new model are in what they do.

    Args:
        diagnosis: Its content.
        part: The part's name, for those of the charts.

    Returns:
        Heads, attention maps and hidden states; none if it was not asked.
    """
    found = diagnosis["similarity"]
    if not found:
        return []
    sections = []
    if found["divergence"] and found["divergence"][0]:
        sections.append(_heads(found, part))
    if found["maps"]:
        charts = tuple(_attention(one, f"{part}-attention-{place}") for place, one in enumerate(found["maps"], 1))
        lead = "Where chosen heads look on one text, in both models: rows attend to columns, bright is much."
        sections.append(Section("attention", "Attention maps", lead, (Charts(charts),)))
    if found["cka"]:
        sections.append(_hidden(found, part))
    return sections


def _heads(found: dict[str, Any], part: str) -> Section:
    control = found["control"]
    pairs = [("old and new model", found, found["best"], "heads")]
    if control and control["divergence"] and control["divergence"][0]:
        pairs.append((f"control: {control['name']}", control, None, "control"))
    top = max(finite(value for _, one, *_ in pairs for row in one["divergence"] for value in row), default=0.0) or 1.0
    charts = []
    for title, one, best, name in pairs:
        flat = {(i, j): v for i, row in enumerate(one["divergence"]) for j, v in enumerate(row)}
        most, least = max(flat, key=flat.__getitem__), min(flat, key=flat.__getitem__)
        finding = (
            f"{title[0].upper()}{title[1:]}: mean divergence {number(statistics.fmean(flat.values()))} bits, most in "
            f"layer {most[0]}, head {most[1]} ({number(flat[most])}), least in layer {least[0]}, head {least[1]} "
            f"({number(flat[least])})."
        )
        head: tuple[str, ...] = ("layer", "head", "divergence (bits)", "cosine")
        rows: list[tuple[str, ...]] = [
            (str(i), str(j), number(v), number(one["cosine"][i][j])) for (i, j), v in flat.items()
        ]
        if best:
            others = found["others"]
            head += ("divergence to other heads", "nearest head")
            rows = [(*row, number(others[i][j]), str(best[i][j])) for row, (i, j) in zip(rows, flat, strict=True)]
        figure = draw_heads(one["divergence"], best, top)
        table = Table(f"Head by head, {title}", head, tuple(rows), prose=2)
        charts.append(Chart(f"{part}-{name}", f"Heads, {title}", finding, figure, table))
    own = sum(head == place for row in found["best"] for place, head in enumerate(row))
    total = sum(map(len, found["best"]))
    facts = [("matched heads", f"{own} of {total}", "are nearest to the head in their own place")]
    lead = (
        f"How differently matched heads attend on {found['texts']:,} texts: 0 bits is the same, 1 bit is nothing in "
        "common. A ring marks a head that is nearer to another one of its layer. "
        "Layers and heads are counted from 0, as in the names of tensors."
    )
    blocks: tuple[Block, ...] = (Facts(tuple(facts)), Charts(tuple(charts)))
    return Section("heads", "Similarity of attention heads", lead, blocks)


def _attention(one: dict[str, Any], name: str) -> Chart:
    title = f"Layer {one['layer']}, head {one['head']}: {number(one['divergence'])} bits apart"
    tokens = one["tokens"]

    def strongest(rows: list[list[float]]) -> str:
        weight, at, to = max((value, i, j) for i, row in enumerate(rows) for j, value in enumerate(row))
        return f"“{tokens[at]}” attends to “{tokens[to]}” ({number(weight, 2)})"

    finding = f"Layer {one['layer']}, head {one['head']}, {number(one['divergence'])} bits apart."
    if tokens:
        finding = finding[:-1] + f": most strongly, in the old model {strongest(one['old'])}, in the new "
        finding += f"{strongest(one['new'])}."
    rows = tuple(
        (at, to, number(one["old"][i][j]), number(one["new"][i][j]))
        for i, at in enumerate(tokens)
        for j, to in enumerate(tokens)
    )
    table = Table(title, ("token", "attends to", "old", "new"), rows, prose=2)
    return Chart(name, title, finding, draw_attention(one), table, wide=True)


def _hidden(found: dict[str, Any], part: str) -> Section:
    cka, control = found["cka"], found["control"]
    other = control["cka"] if control and len(control["cka"]) == len(cka) else None
    low = min(range(len(cka)), key=cka.__getitem__)
    finding = f"CKA is lowest {_layer(low)}, {number(cka[low])}"
    finding += f", and {number(cka[-1])} in the last layer" if low < len(cka) - 1 else ", the last"
    finding += f"; the control's last layer has {number(other[-1])}." if other else "."
    names = ["embeddings", *(f"layer {i}" for i in range(len(cka) - 1))]
    columns = [cka, *([other] if other else [])]
    rows = tuple((name, *(number(c[i]) for c in columns)) for i, name in enumerate(names))
    head = ("layer", "old and new", *([f"control: {control['name']}"] if other else []))
    figure = draw_cka(cka, other, control["name"] if control else "")
    table = Table("Linear CKA by layer", head, rows)
    chart = Chart(f"{part}-cka", "Linear CKA of hidden states", finding, figure, table, wide=True)
    facts = (
        ("agreement", percent(found["agreement"]), "texts with the same top class"),
        ("KL", number(found["kl"]), "nats from the old model's predictions to the new one's"),
    )
    lead = "Linear CKA compares what a layer represents: 1 is the same up to rotation and scale."
    return Section("hidden", "Hidden states and predictions", lead, (Facts(facts), Charts((chart,))))


def _layer(place: int) -> str:
    return f"in layer {place - 1}" if place else "in the embeddings"
