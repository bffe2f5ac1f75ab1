"""The table of families in the tutorials is what the registry says. `python tests/test_families_page.py` writes it anew."""

from pathlib import Path

from litgpt.families import FAMILIES

PAGE = Path(__file__).parents[1] / "tutorials" / "download_model_weights.md"
BEGIN, END = "<!-- families: written by tests/test_families_page.py -->\n", "<!-- end of families -->"


def table() -> str:
    """A row for each family, with its first few names of every publisher."""
    rows = ["| `model_type` in `config.json` | class in transformers | published, for example |", "| --- | --- | --- |"]
    for model_type, family in sorted(FAMILIES.items()):
        brands: dict[str, list[str]] = {}
        for row in family.published():
            brands.setdefault(row.org, []).append(row.hub_name)
        more = {org: f" and {len(names) - 3} more" if names[3:] else "" for org, names in brands.items()}
        examples = [f"{org}: {', '.join(names[:3])}{more[org]}" for org, names in brands.items()]
        types = ", ".join(f"`{name}`" for name in (model_type, *family.wrappers))
        rows.append(f"| {types} | {', '.join(family.architectures)} | {'; '.join(examples)} |")
    return "\n".join(rows) + "\n"


def test_the_page_lists_every_family():
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), "run `python tests/test_families_page.py`"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
