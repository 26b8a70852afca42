"""Everything of Mixup Recipes beside the methods: recipes, data, training, runs, published tables, pages, the Hub.

The methods are in ``mixers``. Importing this package imports nothing heavy; the console command is ``cli``.
"""

__version__ = "0.2.0"
