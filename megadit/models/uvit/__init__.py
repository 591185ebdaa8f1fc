"""U-ViT (Bao et al., arXiv 2209.12152)."""
