"""PixArt-alpha (Chen et al., arXiv 2310.00426)."""
