"""Gene tables of any release and species, from annotation files."""
