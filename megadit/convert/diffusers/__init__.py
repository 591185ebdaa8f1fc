"""Pipeline folders of diffusers: their parts, their schedulers, and how far their class and the model here differ."""
