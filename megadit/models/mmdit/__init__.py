"""MMDiT (Esser et al., arXiv 2403.03206)."""
