"""From files of cells to a corpus: sources, quality, splits, medians."""
