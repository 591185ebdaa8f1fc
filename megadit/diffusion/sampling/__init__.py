"""Pictures from a trained model: the loop over a scheduler, what is drawn, and the sheets that show it."""
