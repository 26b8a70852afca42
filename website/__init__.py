"""The documentation site: `make docs` builds it from the pages of this repository."""
