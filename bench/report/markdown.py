"""Tables in Markdown."""


def table(headings: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """A table in Markdown; columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if i < numbers_from else "--:" for i in range(len(headings))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (headings, rule, *rows))
