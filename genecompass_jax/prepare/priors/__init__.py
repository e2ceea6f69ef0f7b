"""Prior tables from public raw files: networks, promoters, families, cells."""
