"""Published numbers, and where our runs stand beside them."""
