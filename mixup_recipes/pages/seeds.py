"""Mean and spread over seeds as Markdown."""

from mixup_recipes.pages.markdown import escaped
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.seeds import by_setting, grouped


def seeds_table(runs: list[Run]) -> str:
    """Mean and spread over seeds as Markdown, one table per setting, the best mixer first.

    Top-1 in percent, the standard deviation is that of a sample (n - 1). Raises ``UserError``: see ``grouped``.
    """
    tables = []
    for setting, groups in by_setting(grouped(runs)).items():
        protocol = groups[0].rows[0].protocol  # a recipe decides it, so that all groups share it
        lines = [f"| {escaped(setting)} | top-1 ({protocol}) | std | seeds | lowest | highest |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for group in sorted(groups, key=lambda g: -g.mean):
            std = "" if group.std is None else f"{group.std:.2f}"
            used, wanted = group.rows[0].epochs_used, group.rows[0].epochs_wanted
            mean = f"{group.mean:.2f}" + (f" ({used} of {wanted} epochs)" if used < wanted else "")
            numbers = f"{mean} | {std} | {len(group.runs)} | {min(group.top1):.2f} | {max(group.top1):.2f}"
            lines.append(f"| {escaped(group.name)} | {numbers} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n\nMean, standard deviation (n - 1) and range over seeds, top-1 in percent.\n"
