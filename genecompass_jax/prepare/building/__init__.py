"""A corpus is built: stages of tasks, and who runs them."""
