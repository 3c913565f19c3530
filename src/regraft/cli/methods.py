"""`regraft methods`: the ways to recycle."""


def methods() -> None:
    """List the recycling methods, what each needs, and its options with their defaults."""
    from rich.table import Table

    from regraft.cli import show
    from regraft.methods import Objective, Start, describe_methods, parts

    table = Table("method", "what it does", "needs", box=None, padding=(0, 2, 1, 0))
    table.add_column("options", overflow="fold")
    for row in describe_methods():
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    show.console.print(table)
    starts, objectives = (", ".join(parts(kind)) for kind in (Start, Objective))
    show.console.print(
        f"Any START+OBJECTIVE is a method too, of the starts {starts} and the objectives {objectives}. Of options that "
        "both have, the name is qualified: -o START.NAME=VALUE, -o OBJECTIVE.NAME=VALUE.",
        highlight=False,
        markup=False,
    )
