"""The Space: calibration of pasted confidences. Run with ``python app.py`` in this folder; needs gradio."""

from typing import Any

from formula import calibration  # type: ignore[import-not-found]  # beside it: the folder is a Space of its own

EXAMPLE = "0.95 1 0.05\n0.80 1 0.22\n0.60 0 1.40"


def compute(rows: str, bins: int = 15) -> dict[str, float]:
    """The metric of text: one sample per line, its confidence, 1 if it is correct or else 0, and its NLL in nats.

    Numbers are separated by commas or blanks. Raises ``ValueError`` for a line that is not of this form, and
    what ``calibration`` raises.
    """
    table = [_sample(row) for row in rows.splitlines() if row.strip()]
    confidences, correct, nlls = zip(*table, strict=True) if table else ((), (), ())
    return calibration(confidences, correct, nlls, int(bins))


def _sample(row: str) -> tuple[float, bool, float]:
    try:
        confidence, correct, nll = row.replace(",", " ").split()
        return float(confidence), {"0": False, "1": True}[correct], float(nll)
    except (ValueError, KeyError):
        raise ValueError(f"expected confidence, 0 or 1, and NLL, got {row!r}") from None


def demo() -> Any:
    """The page, a ``gradio.Interface``."""
    import gradio

    def run(rows: str, bins: int) -> dict[str, float]:
        try:
            return compute(rows, bins)
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    return gradio.Interface(
        run,
        [
            gradio.Textbox(EXAMPLE, lines=8, label="One sample per line: confidence, correct (0 or 1), NLL in nats"),
            gradio.Slider(1, 100, value=15, step=1, label="Bins"),
        ],
        gradio.JSON(label="ECE in percent, NLL in nats"),
        title="Calibration",
        description="Expected calibration error and mean negative log-likelihood.",
    )


if __name__ == "__main__":
    demo().launch()
