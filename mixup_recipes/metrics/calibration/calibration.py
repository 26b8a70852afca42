"""Calibration as an `evaluate` metric. `evaluate.load` scans this file: one import per line."""

from typing import Any

import datasets
import evaluate
import numpy as np

from .formula import calibration

_DESCRIPTION = """
Expected calibration error (percent, bins of equal width) and mean negative log-likelihood (nats).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (N,) ids of the predicted classes; or (N, k_max) ids, best first, of which the first counts.
    references: (N,) class ids.
    confidences: (N,) probability of the predicted class, in [0, 1].
    nlls: (N,) -log of the probability of the reference class, in nats.
    bins: number of bins, default 15.
Returns:
    `{"ece": percent, "nll": nats}`.
Raises:
    ValueError: shapes that do not fit, confidences outside [0, 1], negative nlls, or NaN.
    IndexError: the first batch is empty (raised by `evaluate` while it looks at the first sample).
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Calibration(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # Two accepted shapes of `predictions`, so that `evaluate.combine` can feed top-k ids to both metrics.
        top1, topk = datasets.Value("int32"), datasets.Sequence(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features(
                    {
                        "predictions": predictions,
                        "references": datasets.Value("int32"),
                        "confidences": datasets.Value("float32"),
                        "nlls": datasets.Value("float32"),
                    }
                )
                for predictions in (top1, topk)
            ],
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def _compute(
        self,
        predictions: list[Any],
        references: list[int],
        confidences: list[float],
        nlls: list[float],
        bins: int = 15,
    ) -> dict[str, float]:
        top1 = [ids[0] for ids in predictions] if isinstance(predictions[0], list) else predictions
        return calibration(confidences, np.equal(top1, references), nlls, bins)
