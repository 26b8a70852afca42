"""``python -m mixup_recipes``: the console command without its script."""

from mixup_recipes.cli import main

main()
