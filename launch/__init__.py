"""Launch profiles: where a recipe runs; see README.md."""
