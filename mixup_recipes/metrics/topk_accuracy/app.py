"""The Space: top-k accuracy of pasted class ids. Run with ``python app.py`` in this folder; needs gradio."""

from typing import Any

from formula import topk_accuracy  # type: ignore[import-not-found]  # beside it: the folder is a Space of its own

EXAMPLE = "3, 3 7 1\n0, 2 0 5\n4, 1 2 3"


def compute(rows: str, ks: str = "1 5") -> dict[str, float]:
    """The metric of text: one sample per line, its label and then its class ids, best first.

    Numbers are separated by commas or blanks; ``ks`` likewise. Raises ``ValueError`` for text that is no whole
    number, and what ``topk_accuracy`` raises.
    """
    table = [_whole_numbers(row) for row in rows.splitlines() if row.strip()]
    return topk_accuracy([row[1:] for row in table], [row[0] for row in table], _whole_numbers(ks))


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"expected whole numbers, got {text!r}") from None


def demo() -> Any:
    """The page, a ``gradio.Interface``."""
    import gradio

    def run(rows: str, ks: str) -> dict[str, float]:
        try:
            return compute(rows, ks)
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    return gradio.Interface(
        run,
        [
            gradio.Textbox(EXAMPLE, lines=8, label="One sample per line: label, class ids best first"),
            gradio.Textbox("1 3", label="k"),
        ],
        gradio.JSON(label="Percent"),
        title="Top-k accuracy",
        description="The share of samples whose label is among their k best classes.",
    )


if __name__ == "__main__":
    demo().launch()
