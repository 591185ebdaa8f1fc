"""Features of pictures by pretrained networks: the targets of REPA, and what small scores are made of."""
