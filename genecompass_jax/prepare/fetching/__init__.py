"""Official files: where they are, and how they are fetched."""
