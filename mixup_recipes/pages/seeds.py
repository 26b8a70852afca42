"""Mean and spread over seeds as Markdown."""

from mixup_recipes.pages.markdown import escaped, markdown_table
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import by_setting, grouped


def seeds_table(runs: list[Run]) -> str:
    """Mean and spread over seeds as Markdown, one table per setting, the best mixer first.

    Top-1, or mAP, in percent; the standard deviation is that of a sample (n - 1). Raises ``UserError``: see
    ``grouped``.
    """
    tables, metrics = [], []
    for setting, groups in by_setting(grouped(runs)).items():
        metrics.append(groups[0].metric)
        protocol = groups[0].summary.protocol  # a recipe decides it, so that all groups share it
        rows = []
        for group in sorted(groups, key=lambda g: -g.mean):
            std = "" if group.std is None else f"{group.std:.2f}"
            used, wanted = group.summary.epochs_used, group.summary.epochs_wanted
            mean = f"{group.mean:.2f}" + (f" ({used} of {wanted} epochs)" if used < wanted else "")
            lowest, highest = f"{min(group.values):.2f}", f"{max(group.values):.2f}"
            rows.append([escaped(group.name), mean, std, f"{len(group.runs)}", lowest, highest])
        head = [escaped(setting), f"{groups[0].metric} ({protocol})", "std", "seeds", "lowest", "highest"]
        tables.append(markdown_table(head, rows, right=1))
    shown = " and ".join(dict.fromkeys(metrics))
    return "\n\n".join(tables) + f"\n\nMean, standard deviation (n - 1) and range over seeds, {shown} in percent.\n"
