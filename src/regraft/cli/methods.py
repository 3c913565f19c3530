"""`regraft methods`: list the methods."""


def methods() -> None:
    """List the methods: what each does and needs, and its options with their defaults."""
    from rich.markup import escape
    from rich.table import Table

    from regraft.cli.terminal import console, print_text
    from regraft.methods import Objective, Start, describe_methods, parts

    table = Table("method", "what it does", "needs", box=None, padding=(0, 2, 1, 0))
    table.add_column("options", overflow="fold")
    for row in describe_methods():
        table.add_row(*map(escape, row))
    console.print(table)
    print_text(
        f"START+OBJECTIVE is a method too, with any START of {', '.join(parts(Start))} and any OBJECTIVE of "
        f"{', '.join(parts(Objective))}. If both have an option NAME, write -o START.NAME=VALUE or "
        "-o OBJECTIVE.NAME=VALUE."
    )
