"""Launch profiles, which define where a recipe runs; see README.md."""
