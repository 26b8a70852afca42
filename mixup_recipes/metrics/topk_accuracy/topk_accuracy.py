"""Top-k accuracy as an `evaluate` metric. `evaluate.load` scans this file: one import per line."""

import datasets
import evaluate

from .formula import topk_accuracy

_DESCRIPTION = """
Top-k accuracy in percent: the share of samples whose label is among their k best classes.
It takes the ids of the best classes, not scores, which for many classes are slow to store.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (N, k_max) class ids, best first, e.g. `logits.topk(5).indices`.
    references: (N,) class ids.
    ks: which k to report, default (1, 5); none above k_max.
Returns:
    `{"top1": percent, "top5": percent}`, one key per k.
Raises:
    ValueError: no samples, shapes that do not fit, negative or repeated ids, or a k above k_max.
"""

_CITATION = """
@article{russakovsky2015imagenet,
  title={ImageNet Large Scale Visual Recognition Challenge},
  author={Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev and Ma, Sean and
          Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael and Berg, Alexander C. and
          Fei-Fei, Li},
  journal={International Journal of Computer Vision},
  volume={115},
  number={3},
  pages={211--252},
  year={2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TopkAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int32")),
                    "references": datasets.Value("int32"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1409.0575"],
        )

    def _compute(
        self, predictions: list[list[int]], references: list[int], ks: tuple[int, ...] = (1, 5)
    ) -> dict[str, float]:
        return topk_accuracy(predictions, references, ks)
